"""Models that belong together, from their checkpoints."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import checkpoint_path, load_model
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.files import file_sha256
from ldm.models.base import HistoModule
from ldm.models.classifier import GuidingClassifier, check_latents
from ldm.models.diffusion import LatentDiffusion
from ldm.synthesis.settings import UNCONDITIONAL, Sampling


@dataclass(frozen=True)
class Models:
    """What a synthesiser needs, in evaluation mode."""

    diffusion: LatentDiffusion  # the noise predictor, and the decoder
    # Guides, and gives the probability of the wanted class.
    classifier: GuidingClassifier | None = None
    weak: LatentDiffusion | None = None  # an earlier or smaller noise predictor, for autoguidance
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each checkpoint, by role
    # What each checkpoint says of itself, by role.
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str] | None:
        """Class names in label order; None when nothing here knows classes."""
        if self.classifier is not None:
            return self.classifier.classes
        return self.diffusion.classes if self.diffusion.conditional else None

    @property
    def names(self) -> list[str]:
        """The class folders that can be filled."""
        return self.classes or [UNCONDITIONAL]

    def label(self, name: str) -> int:
        """Label of a class; -1 without classes."""
        return -1 if self.classes is None else self.classes.index(name)

    def to(self, device: torch.device) -> "Models":
        for model in (self.diffusion, self.classifier, self.weak):
            if model is not None:
                model.to(device)
        return self


def load_models(
    diffusion_path: str | Path,
    classifier_path: str | Path | None = None,
    first_stage_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    autoguidance_path: str | Path | None = None,
) -> Models:
    """Load models that belong together.

    Args:
        diffusion_path: Checkpoint of kind diffusion; brings its own autoencoder, and classes if it
            was tuned to take labels.
        classifier_path: Checkpoint of kind classifier.
        first_stage_path: Checkpoint of kind autoencoder whose decoder was tuned on labels; replaces
            the autoencoder of the diffusion model.
        autoguidance_path: Checkpoint of kind diffusion, worse than the first.

    Raises:
        UserError: A wrong kind, or models that were not made for one another: another latent space,
            latent scale, noise schedule or class list.
    """
    files: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}

    def note(role: str, path: str | Path, model: HistoModule) -> None:
        """Note what a reader of a data set may want to know of a checkpoint."""
        files[role] = file_sha256(checkpoint_path(path))
        known = {name: model.record[name] for name in ("classes", "seed", "revision")}
        facts[role] = {"model": model.record["model"]["target"].rsplit(".", 1)[-1], **known}

    diffusion = load_model(diffusion_path, "diffusion", device, what="`model`")
    note("diffusion", diffusion_path, diffusion)
    classifier = weak = None
    if classifier_path is not None:
        classifier = load_model(classifier_path, "classifier", device, what="`classifier`")
        note("classifier", classifier_path, classifier)
        _attach(classifier, classifier_path, diffusion, diffusion_path)
    if autoguidance_path is not None:
        weak = load_model(autoguidance_path, "diffusion", device, what="`autoguidance`")
        note("autoguidance", autoguidance_path, weak)
        where = f"`autoguidance` {autoguidance_path}"
        if files["autoguidance"] == files["diffusion"]:
            raise UserError(f"{where} is {diffusion_path} itself; give an earlier one of its run")
        check_latents(diffusion, diffusion_path, weak, where, "give an earlier one of its run")
        if diffusion.conditional and weak.conditional:
            _check_classes(diffusion, diffusion_path, weak, where)
    if first_stage_path is not None:
        first_stage = diffusion.replace_first_stage(first_stage_path)
        note("first_stage", first_stage_path, first_stage)
        tuned, classes = first_stage.classes, Models(diffusion, classifier).classes
        if classes and tuned and tuned != classes:
            raise UserError(
                f"`first_stage` {first_stage_path} was tuned on classes {tuned}, the classifier on "
                f"{classes}; use models of the same labelled set"
            )
    return Models(diffusion, classifier, weak, files, facts)


def _attach(
    classifier: GuidingClassifier,
    path: str | Path,
    diffusion: LatentDiffusion,
    diffusion_path: str | Path,
) -> None:
    """Connect a classifier with the noise predictor that it guides, if they belong together."""
    where = f"`classifier` {path}"
    if not classifier.classes:
        raise UserError(f"{where} is damaged: it names no classes; give another checkpoint")
    remedy = f"train it with `first_stage` {diffusion_path}"
    check_latents(diffusion, diffusion_path, classifier, where, remedy)
    classifier.attach(diffusion, where)
    if diffusion.conditional:
        _check_classes(diffusion, diffusion_path, classifier, where)


def _check_classes(
    diffusion: LatentDiffusion, path: str | Path, other: HistoModule, where: str
) -> None:
    if other.classes != diffusion.classes:
        raise UserError(
            f"{where} knows the classes {other.classes}, {path} {diffusion.classes}; use models of "
            "the same labelled set"
        )


def make_settings(
    sampling: Sampling, models: Models, devices: Devices | None = None, out_size: int | None = None
) -> dict[str, Any]:
    """What decides the images of a folder, as `SampleFolder` compares it.

    Args:
        devices: How the networks are run.
        out_size: Pixels that the images are resized to; None keeps the model's size.
    """
    return {
        **asdict(sampling),
        **{f"{role}_sha256": digest for role, digest in models.files.items()},
        "classes": models.classes,
        **(devices or Devices()).record(),
        "out_size": out_size,
    }
