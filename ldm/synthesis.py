"""Synthesis: class folders of sampled tiles with a manifest, from checkpoints.

Letters: B batch, C channels, H W latent size, K classes. An image is named by its class and its
index within the class, and depends on nothing else than these, the models and the `Sampling`
settings: not on the batch it was made in, nor on how often the run was interrupted. On a CPU that
is exact (see `fixed_batches`); on a GPU, up to the rounding of kernels chosen by batch size.
"""

import csv
import io
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import KEY, checkpoint_path, file_sha256, load_model, read_checkpoint
from ldm.data.tiles import read_tile, to_uint8, write_png
from ldm.diffusion.guidance import classifier_guidance, classifier_log_prob_grad
from ldm.diffusion.samplers import EpsFn, IndexedNoise, Step, ddim, ddpm
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.models.classifier import NoisyLatentClassifier
from ldm.models.diffusion import LatentDiffusion
from ldm.run import write_json, write_text

log = logging.getLogger(__name__)

UNCONDITIONAL = "unconditional"  # folder of images that no classifier guided
SCALE_TOLERANCE = 0.05  # relative difference of latent scales that a classifier bears
CPU_BATCH = 8  # images per forward pass on a CPU, see `fixed_batches`
GRID_COLUMNS = 8
GRID_ROWS = 8  # of a grid without classes


@dataclass(frozen=True)
class Sampling:
    """What decides an image, beside the models.

    Attributes:
        sampler: "ddim" or "ddpm".
        steps: Sampler steps, in [1, T].
        eta: DDIM noise, in [0, 1]; DDPM has the noise of eta 1.
        scale: Guidance scale; 0 without a classifier.
        interval: Training time steps (lowest, highest) that are guided; None for all.
        seed: Run seed of the noise.
        ema: Averaged weights of the noise predictor.
    """

    sampler: str
    steps: int
    eta: float
    scale: float
    seed: int
    interval: tuple[int, int] | None = None
    ema: bool = True

    @property
    def label(self) -> str:
        """A folder name for images made this way."""
        name = f"{self.sampler}{self.steps}-eta{self.eta:g}-scale{self.scale:g}-seed{self.seed}"
        if self.interval is not None:
            name += f"-t{self.interval[0]}-{self.interval[1]}"
        return name if self.ema else f"{name}-noema"


def load_models(
    diffusion_path: str | Path,
    classifier_path: str | Path | None = None,
    first_stage_path: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[LatentDiffusion, NoisyLatentClassifier | None, dict[str, str]]:
    """Load models that belong together.

    Args:
        diffusion_path: Checkpoint of kind diffusion; brings its own autoencoder.
        classifier_path: Checkpoint of kind classifier.
        first_stage_path: Checkpoint of kind autoencoder whose decoder was tuned on labels; replaces
            the autoencoder of the diffusion model.

    Returns:
        The models and the SHA-256 of each file, by role.

    Raises:
        UserError: A wrong kind, or models that were not made for one another: another latent space,
            latent scale, noise schedule or class list.
    """
    diffusion = load_model(diffusion_path, "diffusion", device, what="--resume")
    files = {"diffusion": file_sha256(checkpoint_path(diffusion_path))}
    fingerprint = diffusion.autoencoder_fingerprint
    classifier = None
    if classifier_path is not None:
        classifier = load_model(classifier_path, "classifier", device, what="--classifier")
        files["classifier"] = file_sha256(checkpoint_path(classifier_path))
        where = f"--classifier {classifier_path}"
        if classifier.autoencoder_fingerprint != fingerprint:
            raise UserError(
                f"{where} was trained on latents of another autoencoder than {diffusion_path}; "
                f"train it with --first_stage {diffusion_path}"
            )
        if classifier.latent_shape != tuple(diffusion.latent_shape):
            raise UserError(
                f"{where} takes latents {classifier.latent_shape}, {diffusion_path} makes "
                f"{tuple(diffusion.latent_shape)}; train it with the same --image_size"
            )
        ours, theirs = float(diffusion.scale_factor), float(classifier.scale_factor)
        if abs(theirs / ours - 1) > SCALE_TOLERANCE:
            raise UserError(
                f"{where} has latent scale {theirs:.4f}, {diffusion_path} has {ours:.4f} (allowed: "
                f"{SCALE_TOLERANCE:.0%} apart); train it with --first_stage {diffusion_path}"
            )
        if classifier.schedule != diffusion.schedule:
            raise UserError(
                f"{where} was trained for {classifier.schedule}, {diffusion_path} for "
                f"{diffusion.schedule}; train it with --first_stage {diffusion_path}"
            )
    if first_stage_path is not None:
        diffusion.replace_first_stage(str(first_stage_path))
        files["first_stage"] = file_sha256(checkpoint_path(first_stage_path))
        tuned_on = read_checkpoint(first_stage_path)[KEY]["classes"]
        if classifier is not None and tuned_on and tuned_on != classifier.classes:
            raise UserError(
                f"--first_stage {first_stage_path} was tuned on classes {tuned_on}, the classifier "
                f"on {classifier.classes}; use models of the same labelled set"
            )
    return diffusion, classifier, files


def fixed_batches(fn: Callable[..., Tensor], size: int = CPU_BATCH) -> Callable[..., Tensor]:
    """`fn` evaluated on parts of exactly `size` images, the last one padded with its first image.

    CPU kernels round differently for different batch sizes (convolutions of one image, matrix
    products), which shows as single grey levels here and there. With one batch size they see the
    same shapes always, and an image has the same bytes in any batch. Gradients pass through.
    """

    def evaluate(*batch: Tensor) -> Tensor:
        results = []
        for start in range(0, len(batch[0]), size):
            part = [x[start : start + size] for x in batch]
            count = len(part[0])
            if count < size:
                part = [torch.cat([x, x[:1].expand(size - count, *x.shape[1:])]) for x in part]
            results.append(fn(*part)[:count])
        return torch.cat(results)

    return evaluate


@dataclass
class GuidanceSums:
    """Sums over images at one time step."""

    ratio: float = 0.0  # |guidance| / |eps|
    probability: float = 0.0  # p(y | z_t, t) of the wanted class
    images: int = 0


class Synthesiser:
    """Samples images by (class, index).

    Args:
        diffusion: In evaluation mode, on the device to use.
        classifier: Guides, and gives the probability of the wanted class; None for unconditional.
        sampling: Settings.

    Attributes:
        guidance_log: What guidance did at each time step, over all images so far.
    """

    def __init__(
        self,
        diffusion: LatentDiffusion,
        classifier: NoisyLatentClassifier | None,
        sampling: Sampling,
    ):
        self.diffusion = diffusion
        self.classifier = classifier
        self.sampling = sampling
        self.pairs = time_pairs(diffusion.schedule.T, sampling.steps)
        self.device = diffusion.scale_factor.device
        self._in_parts = fixed_batches if self.device.type == "cpu" else lambda fn: fn
        self.guidance_log: dict[int, GuidanceSums] = defaultdict(GuidanceSums)

    def _guided(
        self, eps_fn: EpsFn, labels: Sequence[int], ratios: list[Tensor], log_probs: list[Tensor]
    ) -> EpsFn:
        """`eps_fn` guided to `labels`; each step adds to `ratios`, each part to `log_probs`."""
        y = torch.tensor(labels, device=self.device)  # (B,)

        def log_prob_grad(z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            grad_fn = classifier_log_prob_grad(
                self.classifier.net, y, on_log_prob=lambda t, log_prob: log_probs.append(log_prob)
            )
            return grad_fn(z_t, t)

        in_parts = self._in_parts(log_prob_grad)
        return classifier_guidance(
            eps_fn,
            lambda z_t, t: in_parts(z_t, t, y),
            self.diffusion.schedule,
            self.sampling.scale,
            self.sampling.interval,
            on_ratio=lambda t, ratio: ratios.append(ratio),
        )

    @torch.no_grad()
    def latents(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        on_step: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Clean scaled latents (B, C, H, W) of images `indices` of classes `labels` (-1: no class).

        Raises:
            UserError: The latents are not finite.
        """
        sampling, schedule = self.sampling, self.diffusion.schedule
        shape = self.diffusion.latent_shape
        noise = IndexedNoise(sampling.seed, labels, indices, shape, self.device)
        eps_fn = self._in_parts(self.diffusion.eps_model(use_ema=sampling.ema))
        ratios: list[Tensor] = []  # per guided step, (B,)
        log_probs: list[Tensor] = []  # per guided step and part of the batch
        if self.classifier is not None:
            eps_fn = self._guided(eps_fn, labels, ratios, log_probs)
        if sampling.sampler == "ddim":
            z_T = noise.initial()
            z_0 = ddim(eps_fn, schedule, z_T, self.pairs, sampling.eta, noise, on_step)
        else:
            z_0 = ddpm(eps_fn, schedule, noise.initial(), noise, self.pairs, on_step)
        if not z_0.isfinite().all():
            raise UserError(
                f"sampling gave latents that are not finite (scale={sampling.scale:g}, "
                f"steps={sampling.steps}); lower --classifier_scale or raise --custom_steps"
            )
        if ratios:
            # The last part may be padded.
            log_prob = torch.cat(log_probs).view(len(ratios), -1)[:, : len(labels)]
            self._record(torch.stack(ratios), log_prob.exp())
        return z_0

    def _record(self, ratios: Tensor, probabilities: Tensor) -> None:
        """Add a batch to the guidance log, (guided steps, B) each."""
        low, high = self.sampling.interval or (0, self.diffusion.schedule.T)
        guided = [t for t, _ in self.pairs if low <= t <= high]
        sums = zip(guided, ratios.sum(1).tolist(), probabilities.sum(1).tolist(), strict=True)
        for t, ratio, probability in sums:
            entry = self.guidance_log[t]
            entry.ratio += ratio
            entry.probability += probability
            entry.images += ratios.shape[1]

    @torch.no_grad()
    def images(self, z_0: Tensor) -> np.ndarray:
        """Decoded tiles, uint8 (B, H, W, 3)."""
        return to_uint8(self._in_parts(self.diffusion.decode_first_stage)(z_0))

    @torch.no_grad()
    def probabilities(self, z_0: Tensor, labels: Sequence[int]) -> list[float]:
        """p(y | z_0) of the classifier at t = 0, for each image."""

        def evaluate(z_0: Tensor) -> Tensor:
            t = torch.zeros(len(z_0), dtype=torch.int64, device=self.device)
            return self.classifier.net(z_0, t).float().softmax(dim=1)  # (B, K)

        prob = self._in_parts(evaluate)(z_0)
        return prob.gather(1, torch.tensor(labels, device=self.device)[:, None])[:, 0].tolist()


COLUMNS = ("class", "index", "file", "seed", "sampler", "steps", "eta", "scale", "prob")


class SampleFolder:
    """OUT/CLASS/000000.png, manifest.csv and settings.json.

    Every file appears whole or not at all, an image before its row, so whatever moment a run stops
    at, the next one finds what is finished (`done`) and makes the rest.

    Args:
        root: OUT.
        settings: What decides the images; compared with those in an existing OUT.
        about: Further facts for settings.json, not compared.

    Raises:
        UserError: OUT holds images made with other settings, or files that are not ours.
    """

    def __init__(self, root: Path, settings: dict[str, Any], about: dict[str, Any]):
        self.root = root
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.about = about
        self.rows: dict[tuple[str, int], dict[str, str]] = {}
        if (root / "settings.json").exists():
            self._check_settings()
            self._read_manifest()
        elif root.is_dir() and any(root.iterdir()):
            raise UserError(
                f"--outdir {root}: not empty and without settings.json; give a new folder"
            )
        elif root.exists() and not root.is_dir():
            raise UserError(f"--outdir {root} is a file; give a folder")

    def _check_settings(self) -> None:
        path = self.root / "settings.json"
        try:
            known = json.loads(path.read_text())["images"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: unreadable; give another --outdir") from None
        keys = sorted(known.keys() | self.settings.keys())
        changed = [
            f"{key} {known.get(key)} there, {self.settings.get(key)} now"
            for key in keys
            if known.get(key) != self.settings.get(key)
        ]
        if changed:
            raise UserError(
                f"--outdir {self.root}: its images were made with other settings "
                f"({'; '.join(changed)}); give another folder"
            )

    def _read_manifest(self) -> None:
        path = self.root / "manifest.csv"
        if not path.exists():
            return
        with path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path}: columns {reader.fieldnames} are not {list(COLUMNS)}")
            for row in reader:
                if (self.root / row["file"]).is_file():
                    self.rows[row["class"], int(row["index"])] = row

    def done(self, name: str, index: int) -> bool:
        """Whether the image is there and in the manifest."""
        return (name, index) in self.rows

    def start(self) -> None:
        """Write settings.json, before the first image."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / "settings.json").exists():
            write_json(
                self.root / "settings.json", {"images": self.settings, "first_run": self.about}
            )

    def add(self, name: str, index: int, image: np.ndarray, prob: float | None) -> None:
        """Write one image, uint8 (H, W, 3); its row follows with `write_manifest`."""
        file = f"{name}/{index:06d}.png"
        (self.root / name).mkdir(exist_ok=True)
        write_png(self.root / file, image)
        row = {"class": name, "index": index, "file": file}
        row |= {key: self.settings[key] for key in ("seed", "sampler", "steps", "eta", "scale")}
        row["prob"] = "" if prob is None else f"{prob:.6f}"
        self.rows[name, index] = {key: str(value) for key, value in row.items()}

    def write_manifest(self) -> None:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[key] for key in sorted(self.rows))
        write_text(self.root / "manifest.csv", stream.getvalue())

    def write_guidance(self, log: dict[int, GuidanceSums]) -> None:
        """guidance.csv: by time step, noisiest first, means over the images of this run."""
        lines = ["t,guidance_to_noise,probability,images"]
        for t, sums in sorted(log.items(), reverse=True):
            ratio, probability = sums.ratio / sums.images, sums.probability / sums.images
            lines.append(f"{t},{ratio:.6f},{probability:.6f},{sums.images}")
        write_text(self.root / "guidance.csv", "\n".join(lines) + "\n")

    def write_grid(self, names: Sequence[str]) -> None:
        """grid.png: the first images, a row per class; one class alone fills several rows."""
        files: dict[str, list[Path]] = {name: [] for name in names}
        for name, index in sorted(self.rows):
            if name in files:
                files[name].append(self.root / self.rows[name, index]["file"])
        rows = [paths[:GRID_COLUMNS] for paths in files.values()]
        if len(files) == 1:
            (paths,) = files.values()
            starts = range(0, min(len(paths), GRID_ROWS * GRID_COLUMNS), GRID_COLUMNS)
            rows = [paths[start : start + GRID_COLUMNS] for start in starts]
        columns = max(len(paths) for paths in rows)
        height, width, _ = read_tile(rows[0][0]).shape
        gap = 2  # white pixels between tiles
        shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
        grid = np.full(shape, 255, dtype=np.uint8)
        for i, paths in enumerate(rows):
            for j, path in enumerate(paths):
                top, left = i * (height + gap), j * (width + gap)
                grid[top : top + height, left : left + width] = read_tile(path)
        write_png(self.root / "grid.png", grid)


def make_settings(
    sampling: Sampling, files: dict[str, str], classes: Sequence[str] | None
) -> dict[str, Any]:
    """What decides the images of a folder: sampling, models, class list."""
    return {**asdict(sampling), **{f"{k}_sha256": v for k, v in files.items()}, "classes": classes}


def synthesise(
    synthesiser: Synthesiser, folder: SampleFolder, names: Sequence[str], n: int, batch_size: int
) -> int:
    """Make the images 0..n-1 of each class in `names` that `folder` does not hold yet.

    Args:
        names: Classes of the classifier; `[UNCONDITIONAL]` without one.
        batch_size: Images sampled together, of several classes where one does not fill the batch.

    Returns:
        The number of images made.
    """
    classifier = synthesiser.classifier
    label_of = {UNCONDITIONAL: -1}
    if classifier is not None:
        label_of = {name: label for label, name in enumerate(classifier.classes)}
    jobs = [(name, i) for name in names for i in range(n) if not folder.done(name, i)]
    total = len(names) * n
    if len(jobs) < total:
        log.info("%d of %d images are there already", total - len(jobs), total)
    folder.start()
    steps = synthesiser.sampling.steps
    # A terminal shows every sampler step; a log file gets a line now and then.
    live = sys.stderr.isatty()
    options = {"unit": "img", "dynamic_ncols": True, "mininterval": 0.1 if live else 10.0}
    with tqdm(total=total, initial=total - len(jobs), **options) as bar:

        def show(step: Step) -> None:
            bar.set_postfix_str(f"step {step.j + 1}/{steps}", refresh=live)

        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            labels, indices = [label_of[name] for name, _ in batch], [i for _, i in batch]
            bar.set_description(batch[0][0], refresh=live)
            z_0 = synthesiser.latents(labels, indices, show)
            probabilities = [None] * len(batch)
            if classifier is not None:
                probabilities = synthesiser.probabilities(z_0, labels)
            images = synthesiser.images(z_0)
            for (name, index), image, prob in zip(batch, images, probabilities, strict=True):
                folder.add(name, index, image, prob)
            folder.write_manifest()
            bar.update(len(batch))
    folder.write_grid(names)
    if synthesiser.guidance_log:
        folder.write_guidance(synthesiser.guidance_log)
    return len(jobs)
