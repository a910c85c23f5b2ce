"""What a notebook needs: `import ldm`, then load, encode, sample, describe, select and train.

    run = ldm.load("logs/ldm", classifier="logs/classifier")
    tiles = run.sample("TUM", 100, classifier_scale=10)
    real, made = run.features("D/train5"), run.features(tiles, labels="TUM")
    chosen = tiles[ldm.select(made, real, per_class=50)]
    probe = ldm.fit_probe(real)

Everything is done by what the commands use. Wherever tiles are taken, they are one of

    a path                    a folder of images, or of class folders
    a NumPy array or tensor   uint8 (N, H, W, 3)
    a tensor                  float (N, 3, H, W) in [-1, 1], which is rounded to 256 levels

and tiles that are given back are uint8 arrays (N, H, W, 3). What a user did wrong is an
`ldm.errors.UserError`, whose message is one line.

Letters: N tiles, H W pixels, C channels, h w latent size, D features, K classes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import KEY, checkpoint_path, load_model, read_checkpoint
from ldm.cli import checked, existing_path, options_of
from ldm.data.images import class_folders
from ldm.data.tile_files import TileFiles, TilesInMemory
from ldm.data.tiles import to_uint8
from ldm.devices import one_device, one_thread, within_memory
from ldm.errors import UserError, require_whole
from ldm.evaluation.runs import train_and_report
from ldm.features.diffusion import centre
from ldm.features.extractor import FEATURES, Extractor
from ldm.features.judge import Judge
from ldm.features.sets import FeatureSet
from ldm.features.source import DIFFUSION, VIT, FeatureSource
from ldm.files import require_class_names, write_png
from ldm.models.vit_settings import Settings
from ldm.progress import Bar
from ldm.selection.judge import Judged
from ldm.selection.strategies import Choice
from ldm.selection.training_folder import decide
from ldm.synthesis.models import load_models
from ldm.synthesis.options import Options
from ldm.synthesis.request import check_models, choose_counts, choose_sampling, choose_sources
from ldm.synthesis.synthesiser import Synthesiser

Tiles = str | os.PathLike | np.ndarray | Tensor
Labels = str | Sequence[str] | None  # a class name of each tile, or one of all
TIME = 400  # training time step of a diffusion model at which it describes tiles best
# Options of sample_diffusion.py that decide tiles, beside the models, the classes and their number.
_SOURCES = ("start_from", "strength", "source_detail", "start_confidence")
OF_SAMPLES = ("seed", "ema", "batch_size", *_SOURCES)


def load(run: str | os.PathLike, device: str = "auto", **others: str | os.PathLike):
    """Load a trained model: a `DiffusionRun`, an `AutoencoderRun` or a `ClassifierRun`.

    Args:
        run: Run folder or checkpoint of main.py, or the folder of one seed of eval.py.
        device: auto, cpu, cuda, cuda:INDEX or mps.
        others: Checkpoints beside a diffusion model, named as the options of sample_diffusion.py:
            `classifier`, `first_stage` and `autoguidance`.

    Raises:
        UserError: A checkpoint is missing, of another kind, or belongs to other models.
    """
    best = Path(run).expanduser() / "checkpoints" / "best.ckpt"
    last = best.with_name("last.ckpt")
    path = best if best.is_file() and not last.is_file() else checkpoint_path(run, "`run`")
    kind = read_checkpoint(path, tuple(RUNS), "`run`")[KEY]["kind"]
    allowed = ("classifier", "first_stage", "autoguidance") if kind == "diffusion" else ()
    if unknown := sorted(set(others) - set(allowed)):
        raise UserError(
            f"`{unknown[0]}` is nothing that a run of kind {kind} takes; it takes "
            f"{', '.join(allowed) or 'no others'}"
        )
    return RUNS[kind](path, device, **others)


class ClassifierRun:
    """A network that eval.py trained; `classes` are its K class names in label order."""

    def __init__(self, path: Path, device: str):
        self._extractor = FeatureSource(VIT, str(path)).open(one_device(device).device)
        self.classes: list[str] = self._extractor.classes

    def features(self, tiles: Tiles, labels: Labels = None) -> FeatureSet:
        """Features of tiles, see `DiffusionRun.features`, and `logits`."""
        return FeatureSet.compute(_tiles(tiles, labels, self.classes), self._extractor)


class AutoencoderRun:
    """An autoencoder. Its latents are not scaled."""

    def __init__(self, path: Path, device: str):
        self._device = one_device(device).device
        net = load_model(path, "autoencoder", self._device, "`run`").net
        self._pixels, self._decode = net.resolution, net.decode
        self._encode = lambda x: net.encode(x).mode()

    def encode(self, tiles: Tiles, batch_size: int = 32) -> Tensor:
        """Latents of tiles, the means of their posteriors, (N, C, h, w) float32 on the CPU.

        The shorter side of a tile is resized to the model's size, and its centre is taken.
        """
        see, forward = centre(self._pixels), lambda x: {FEATURES: self._encode(x)}
        encoder = Extractor("autoencoder", "autoencoder", "", see, forward, self._device, "")
        files = _tiles(tiles)
        return encoder.extract(files.paths, batch_size, what="latents", read=files.read).features

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 32) -> np.ndarray:
        """Tiles, uint8 (N, H, W, 3), of latents as `encode` gives them."""
        with within_memory(batch_size):
            parts = latents.split(batch_size)
            return np.concatenate([to_uint8(self._decode(z.to(self._device))) for z in parts])


class DiffusionRun(AutoencoderRun):
    """A diffusion model with its autoencoder and what guides it. Its latents are scaled.

    Attributes:
        classes: K names in label order; None where neither a classifier nor the model has classes.
    """

    def __init__(self, path: Path, device: str, **others: str | os.PathLike):
        self._devices = one_device(device).with_precision(None)
        self._device = self._devices.device
        self._paths = {"model": str(path), **{name: str(path) for name, path in others.items()}}
        roles = {f"{name}_path": path for name, path in others.items()}
        self._models = load_models(path, **roles, device=self._device)
        model = self._models.diffusion
        self._pixels, self._decode = model.first_stage_model.resolution, model.decode_first_stage
        self._encode = lambda x: model.latents({"image": x}, sample=False)
        self._extractors: dict[str, Extractor] = {}
        self.classes = self._models.classes

    def sample(self, label: str | None = None, count: int = 8, **options: Any) -> np.ndarray:
        """The tiles that sample_diffusion.py makes of the same models with the same options.

        Args:
            label: Class by name, or several as A,B; by default all, one class after the other.
            count: N, of each class. Tile i is the same, however many there are.
            options: `seed`, `batch_size`, `ema`, `start_from`, `strength`, `source_detail`,
                `start_confidence`, and any other option of the groups sampler and guidance by its
                name, such as `classifier_scale`, `custom_steps` and `eta`.

        Raises:
            UserError: An option is unknown, wrong, or does nothing with these models.
        """
        for name, field in options_of(Options).items():
            group = field.metadata["option"]["group"]
            if name in options and group not in ("sampler", "guidance") and name not in OF_SAMPLES:
                raise UserError(f"`{name}` is no option of `sample`; leave it out")
        values = {**self._paths, "classes": label, "n_samples": count, **options}
        args, models = checked(Options, values), self._models
        check_models(args, models)
        sampling, counts = choose_sampling(args, models), choose_counts(args, models)
        sources = choose_sources(args, models, counts)
        synthesiser = Synthesiser(models, sampling, self._devices)
        jobs, parts = [(name, i) for name, number in counts.items() for i in range(number)], []
        with (
            one_thread(self._device),
            within_memory(args.batch_size),
            Bar(total=len(jobs), desc="sampling", unit="img", step=args.batch_size) as bar,
        ):
            for start in range(0, len(jobs), args.batch_size):
                batch = jobs[start : start + args.batch_size]
                starts = detail = None
                if sources is not None:
                    starts, detail = sources.start(batch, sampling.source_detail)
                labels, indices = [models.label(name) for name, _ in batch], [i for _, i in batch]
                z_0 = synthesiser.latents(labels, indices, sources=starts)
                parts.append(synthesiser.images(z_0, detail))
                bar.update(len(batch))
        return np.concatenate(parts)

    def features(self, tiles: Tiles, labels: Labels = None, at: int | str = TIME) -> FeatureSet:
        """What the UNet says of tiles, for `fit_probe` and `select`.

        Args:
            labels: Class name of each tile, or one of all; a folder has those of its class folders.
            at: Training time step that tiles are noised to, or `T,T/BLOCK,BLOCK`.

        Returns:
            `values`, (N, D) of length 1, with labels and files.
        """
        at = str(at)
        if at not in self._extractors:
            source = FeatureSource(DIFFUSION, f"{self._paths['model']}@{at}")
            self._extractors[at] = source.open(self._device)
        return FeatureSet.compute(_tiles(tiles, labels, self.classes), self._extractors[at])


RUNS = {"diffusion": DiffusionRun, "autoencoder": AutoencoderRun, "vit": ClassifierRun}


@dataclass(frozen=True)
class Probe:
    """A calibrated classifier on the features of `real` tiles: few labels suffice."""

    judge: Judge
    real: FeatureSet

    def probabilities(self, features: FeatureSet) -> np.ndarray:
        """Of each of `real.classes`, (N, K) float64; UserError for another network's features."""
        if features.extractor != self.real.extractor:
            raise UserError("the probe was fitted on features of another network; use the same one")
        return self.judge.probabilities([features]).numpy()

    def predict(self, features: FeatureSet) -> list[str]:
        """The likeliest class of each tile."""
        return [self.real.classes[k] for k in self.probabilities(features).argmax(axis=1)]


def fit_probe(real: FeatureSet, unlabelled: FeatureSet | None = None) -> Probe:
    """Fit a probe on labelled tiles, at least 2 of a class.

    Args:
        unlabelled: Tiles that the labels are spread over, see `ldm.features.spreading`. Without
            them it is a logistic regression, its penalty by cross-validation.
    """
    further = None if unlabelled is None else [unlabelled]
    return Probe(Judge.fit([_labelled(real, "real")], unlabelled=further), real)


def select(
    synthetic: FeatureSet,
    real: FeatureSet,
    per_class: int,
    strategy: str = "centroid",
    neighbors: int = 3,
    seed: int = 0,
) -> np.ndarray:
    """Rows of the synthetic tiles that are worth training on, by class, best first.

    Args:
        synthetic, real: Labelled, and described by the same network.
        per_class: Most tiles of a class; there are fewer where more are rejected.
        strategy: centroid (published), confidence, knn, coverage or random, as of
            scripts/distance.py.
        neighbors: Of knn.
        seed: Of random.
    """
    require_whole("per_class", per_class, 1)
    classes, names = _labelled(real, "real").classes, _labelled(synthetic, "synthetic").class_names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"`synthetic` tiles of {unknown}: `real` has only {classes}")
    choice = Choice(strategy, neighbors, "judge", seed)
    judge = Judge.fit([real]) if choice.needs_judge else None
    labels = torch.tensor([classes.index(name) for name in names])
    made = replace(synthetic, labels=labels, classes=classes).in_order()
    judged = Judged(real, made, judge=judge)
    _, decided = decide(judged, choice, [per_class] * len(classes))
    rows = {file: row for row, file in enumerate(synthetic.files)}
    chosen = [rows[file] for name in decided.classes for file in decided.used(name)]
    return np.array(chosen, dtype=np.int64)


def write_tiles(folder: str | os.PathLike, tiles: Tiles, labels: Labels, prefix: str = "") -> None:
    """Write FOLDER/CLASS/PREFIX000000.png, the layout of every training set."""
    files = _tiles(tiles, labels)
    if not files.classes:
        raise UserError("`labels` are missing; give the class name of each tile")
    for i, (name, path) in enumerate(zip(files.class_names, files.paths, strict=True)):
        write_png(Path(folder).expanduser() / name / f"{prefix}{i:06d}.png", files.read(path))


def train_classifier(
    data_path: str | os.PathLike,
    subset: str,
    logdir: str | os.PathLike = "logs/eval",
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    workers: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Train the ViT of eval.py on DATA_PATH/SUBSET, choose on val, report test once.

    Args:
        logdir: Results go to LOGDIR/SUBSET; what is finished there is not made again.
        settings: Options of eval.py by name, such as `arch`, `input_size` and `epochs`.

    Returns:
        The content of LOGDIR/SUBSET/summary.json.
    """
    devices = one_device(device).with_precision(settings.get("precision"))
    if "precision" in settings:
        settings["precision"] = devices.precision
    options = checked(Settings, settings)
    data, logs = existing_path(data_path, "`data_path`", "tiles"), Path(logdir).expanduser()
    return train_and_report(data, subset, options, list(seeds), logs, devices, workers)


def _labelled(features: FeatureSet, name: str) -> FeatureSet:
    if not features.classes:
        raise UserError(f"`{name}` tiles have no labels; give `labels`, or a folder of classes")
    return features


def _tiles(tiles: Tiles, labels: Labels = None, classes: Sequence[str] | None = None) -> TileFiles:
    """The tiles as a set of files; `classes` are what the labels are names of, if known."""
    if isinstance(tiles, str | os.PathLike):
        root = existing_path(tiles, "`tiles`", "tiles")
        if labels is not None:
            raise UserError("`labels` are for arrays; a folder has those of its class folders")
        if classes is not None and class_folders(root):
            return TileFiles.below(root, classes=classes)
        return TileFiles.if_classes(root, "`tiles`")
    if isinstance(tiles, Tensor):
        floating = tiles.is_floating_point() and tiles.ndim == 4 and tiles.shape[1] == 3
        tiles = to_uint8(tiles) if floating else tiles.cpu().numpy()
    tiles = np.asarray(tiles)
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3 or not len(tiles):
        raise UserError(
            f"`tiles` of {tiles.dtype} {tiles.shape} must be uint8 (N, H, W, 3), or a tensor of "
            "floats (N, 3, H, W) in [-1, 1]"
        )
    names = [f"{i:06d}" for i in range(len(tiles))]
    files = TilesInMemory(Path(), names, [-1] * len(tiles), [], arrays=tiles)
    if labels is None:
        return files
    names = [labels] * len(tiles) if isinstance(labels, str) else [str(name) for name in labels]
    classes = sorted(set(names)) if classes is None else list(classes)
    require_class_names(classes, "`labels`")
    unknown = sorted(set(names) - set(classes))
    if unknown or len(names) != len(tiles):
        raise UserError(
            f"`labels`: {len(names)} names of {len(tiles)} tiles, unknown {unknown}; give one of "
            f"{', '.join(classes)} for each tile"
        )
    return replace(files, labels=[classes.index(name) for name in names], classes=classes)
