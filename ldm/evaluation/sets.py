"""The labelled sets of an evaluation: tiles under timm's transforms, compared before any training.

Letters: S side in pixels.
"""

import csv
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from ldm.cli import existing_path
from ldm.data.arrays import is_array, open_arrays
from ldm.data.folders import PREFIX, PSEUDO
from ldm.data.groups import by_csv
from ldm.data.images import class_folders
from ldm.data.seeds import seed_generators
from ldm.data.stain import jitter_stains
from ldm.data.tile_files import TileFiles
from ldm.data.tiles import TileSet, Weighted, check_tiles, decode_tiles, read_tile
from ldm.errors import UserError
from ldm.files import file_sha256
from ldm.models.vit import eval_transform
from ldm.models.vit_settings import NO_AUGMENT, Settings
from ldm.settings import EvaluationOptions

log = logging.getLogger(__name__)

EVALUATED = ("val", "test")
IMBALANCE = 3  # times the smallest class that the largest may be without a note
CACHE_LIMIT = 2 * 2**30  # bytes of decoded tiles that one set may hold in memory


class TransformedTiles(TileSet):
    """Labelled tiles as a timm transform gives them: items have an `image` and a `label`.

    Args:
        root: Folder of class folders.
        size: S.
        transform: From a PIL image to a tensor (3, S, S).
        random: Whether the transform draws random numbers; items are then taken by (index, seed),
            as `ResumableSampler` gives them, and the global generators are left where they end up.
        classes: The classes there must be; None for those of the folder.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        transform: Callable[[Image.Image], Tensor],
        random: bool,
        classes: Sequence[str] | None = None,
    ):
        self.files = TileFiles.below(root, classes=classes)
        self.classes, self.labels = self.files.classes, self.files.labels
        self.relative_paths, self.paths = self.files.names, self.files.paths
        self.groups = None
        self.size = size
        self.is_random = random
        self._transform = transform
        self._cached: list[np.ndarray | Tensor] | None = None

    def balance(self, real_share: float) -> None:
        """Let a pass draw so large a share from the real tiles, the rest from the added ones.

        Raises:
            UserError: There are no tiles of one kind.
        """
        counts = np.bincount(self.corpus_numbers(), minlength=2).tolist()
        if 0 in counts:
            raise UserError(
                f"`real_share` {real_share:g}: {self.files.root} has {counts[0]} real and"
                f" {counts[1]} added tiles ({PREFIX}* or {PSEUDO}*), so nothing can be balanced;"
                " leave it out"
            )
        real = min(max(1, round(real_share * len(self))), len(self) - 1)
        draws = (real, len(self) - real)
        self.corpora = [
            Weighted(name, number / count)
            for name, number, count in zip(("real", "added"), draws, counts, strict=True)
        ]

    def corpus_numbers(self) -> np.ndarray:
        """0 for a real tile and 1 for one that a selection added, (N,)."""
        names = (name.rpartition("/")[2] for name in self.relative_paths)
        return np.array([name.startswith((PREFIX, PSEUDO)) for name in names], np.int16)

    @property
    def in_memory(self) -> bool:
        return self._cached is not None

    def path(self, index: int) -> str:
        return str(self.paths[index])

    def load(self) -> None:
        """Decode every tile, so that a bad file is known before training, and keep what fits.

        Kept are pixels for a random transform and results for a fixed one.
        """
        each = read_tile(self.paths[0]).nbytes if self.is_random else 3 * self.size * self.size
        if each * len(self) <= CACHE_LIMIT:
            self._cached = decode_tiles(self.paths, self._prepare)
        else:
            check_tiles(self.paths)

    def _prepare(self, path: Path) -> np.ndarray | Tensor:
        pixels = read_tile(path)
        return pixels if self.is_random else self._transform(Image.fromarray(pixels))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        item = self._cached[index] if self.in_memory else self._prepare(self.paths[index])
        if self.is_random:
            if seed is not None:
                seed_generators(seed, accelerators=False)
            item = self._transform(Image.fromarray(item))
        return {"image": item, "label": self.labels[index]}


def random_d4(image: Image.Image) -> Image.Image:
    """One of the 8 symmetries of the square, drawn with Python's generator: tissue has no up."""
    turn = random.choice((None, *Image.Transpose))
    return image if turn is None else image.transpose(turn)


def random_stains(strength: float, image: Image.Image) -> Image.Image:
    """The stains times random numbers in [1 - strength, 1 + strength], drawn as `random_d4`."""
    scale = [random.uniform(1 - strength, 1 + strength) for _ in range(3)]
    return Image.fromarray(jitter_stains(np.asarray(image), np.array(scale)))


def train_transform(settings: Settings):
    """timm's training augmentation: PIL image -> normalised float32 (3, S, S).

    Without `crop_flip` the image is resized and its centre cropped as for an evaluation.
    """
    geometry, colour, final = _timm_steps(settings)
    if not settings.crop_flip:
        # The last step makes a tensor.
        geometry = eval_transform(settings.input_size).transforms[:-1]
    if settings.d4:
        geometry = [*geometry, random_d4]
    if settings.stain_jitter:
        colour = [partial(random_stains, settings.stain_jitter), *colour]
    for step in colour:
        operations = [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return Compose([*geometry, *colour, *final])


def _timm_steps(settings: Settings) -> list[list[Callable]]:
    """timm's steps of geometry, of colour, and those to a tensor with an erased area."""
    try:
        parts = create_transform(
            settings.input_size,
            is_training=True,
            color_jitter=settings.color_jitter,
            auto_augment=None if settings.aa == NO_AUGMENT else settings.aa,
            interpolation=settings.train_interpolation,
            re_prob=settings.reprob,
            re_mode=settings.remode,
            re_count=settings.recount,
            hflip=0.0 if settings.d4 else 0.5,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError):
        raise UserError(
            f"`aa` {settings.aa} is no policy that timm knows; use for example"
            " rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0 or none"
        ) from None
    return [part.transforms for part in parts]


def _at_least_one_bit(level_fn: Callable, level: float, hparams: dict) -> tuple[int]:
    """Bits per channel that timm's Posterize keeps.

    At the highest level timm asks for none: a black image with Pillow 12, an exception with 13.
    """
    return (max(1, level_fn(level, hparams)[0]),)


@dataclass(frozen=True)
class GroupTable:
    """Where the patient, slide or region of a tile is written.

    That is a CSV as `ldm.data.groups.by_csv` reads it, of paths below the folder of a set. Where it
    has a column `split`, a set takes the rows of its own name.
    """

    path: Path
    column: str = "group"

    @classmethod
    def given(cls, options: EvaluationOptions) -> "GroupTable | None":
        """What the options `groups` and `group_column` say."""
        if options.groups is None:
            return None
        path = existing_path(options.groups, "groups", "file")
        return cls(path, options.group_column or "group")

    def groups(self, split: str, names: Sequence[str]) -> list[str]:
        """The group of each tile of a set; a UserError if one has no group or two."""
        with self.path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            by_split = "split" in next(csv.reader(stream), [])
        try:
            grouping = by_csv(self.path, self.column, f"split={split}" if by_split else None)
            return [grouping(name) for name in names]
        except UserError as error:
            # Rows are chosen by the column `split` here, not by an option.
            message = str(error).replace("choose rows with group_rows", "add a column split")
            raise UserError(f"`groups`, {split} set: {message}") from None


@dataclass
class Splits:
    """The three sets of an evaluation, indexed."""

    train: TransformedTiles
    val: TransformedTiles
    test: TransformedTiles | None
    identity: dict[str, dict[str, Any]]  # tells whether the files of a set changed
    notes: list[str]  # what a reader of the results should know about the sets

    @property
    def evaluated(self) -> dict[str, TransformedTiles]:
        """The sets that are evaluated on."""
        return {"val": self.val} if self.test is None else {"val": self.val, "test": self.test}

    @property
    def groups(self) -> dict[str, list[str] | None]:
        """Groups of the tiles that are evaluated on, by set."""
        return {name: tiles.groups for name, tiles in self.evaluated.items()}

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def reported(self) -> str:
        return "val" if self.test is None else "test"

    def load(self) -> None:
        """Decode all tiles (see `TransformedTiles.load`)."""
        for tiles in (self.train, *self.evaluated.values()):
            tiles.load()


def evaluated_sets(data_path: Path) -> list[str]:
    """Those of `val` and `test` that are folders below `data_path`, or arrays in that file."""
    parts = open_arrays(data_path) if is_array(data_path) else ()
    return [name for name in EVALUATED if name in parts or (data_path / name).exists()]


def open_evaluation_sets(
    data_path: Path, classes: Sequence[str], input_size: int, groups: GroupTable | None = None
) -> dict[str, TransformedTiles]:
    """Those of `val` and `test` that are below `data_path`, with their groups."""
    transform = eval_transform(input_size)
    found = {
        name: TransformedTiles(data_path / name, input_size, transform, False, classes)
        for name in evaluated_sets(data_path)
    }
    if groups is not None:
        for name, tiles in found.items():
            tiles.groups = groups.groups(name, tiles.relative_paths)
    return found


def open_splits(
    data_path: Path,
    train_folder: str,
    settings: Settings,
    num_classes: int | None = None,
    groups: GroupTable | None = None,
) -> Splits:
    """Index `data_path`/{train_folder, val, test} and compare their classes.

    Args:
        num_classes: What the user believes; checked, never used instead of the folders.
    """
    root = _training_root(data_path, train_folder)
    train = TransformedTiles(root, settings.input_size, train_transform(settings), random=True)
    if settings.real_share is not None:
        train.balance(settings.real_share)
    if num_classes not in (None, len(train.classes)):
        raise UserError(
            f"`num_classes` {num_classes}: {root} has {len(train.classes)} class folders"
            f" ({', '.join(train.classes)}); leave the option out or correct the folders"
        )
    if len(train.classes) < 2:
        raise UserError(f"{root} has one class folder, {train.classes[0]}; two or more are needed")
    if "val" not in evaluated_sets(data_path):
        existing_path(data_path / "val", "`data_path` (val, which chooses the epoch)")
    _refuse_untrained_classes(root, data_path, train.classes)
    evaluation = open_evaluation_sets(data_path, train.classes, settings.input_size, groups)
    notes = list(_notes(train, evaluation))
    for note in notes:
        log.warning("%s: %s", train_folder, note)
    identity: dict[str, dict[str, Any]] = {
        name: {"images": len(tiles), "per_class": tiles.files.counts, "sha256": tiles.files.listing}
        for name, tiles in {"train": train, **evaluation}.items()
    }
    if settings.finetune:
        identity["finetune"] = {"sha256": file_sha256(settings.finetune)}
    return Splits(train, evaluation["val"], evaluation.get("test"), identity, notes)


def _training_root(data_path: Path, name: str) -> Path:
    """The folder of the training set, which its name may not leave `data_path` for.

    The name is not resolved: a training folder may well be a link to another disk.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise UserError(
            f"`subset` {name}: must name a folder below `data_path` {data_path}; it is"
            " the training subset, and its results go to LOGDIR under the same name"
        )
    if relative.parts[0] in EVALUATED:
        raise UserError(
            f"`subset` {name} is what the network is evaluated on; name the folder"
            " of the training images"
        )
    return data_path / relative


def _refuse_untrained_classes(root: Path, data_path: Path, classes: Sequence[str]) -> None:
    """Check that every class that is evaluated has a training folder; UserError otherwise."""
    for name in evaluated_sets(data_path):
        folder = data_path / name
        there = class_folders(folder)
        missing = [label for label in there if label not in classes]
        # Where the names merely differ, what opens the set says so.
        if missing and set(classes) <= set(there):
            raise UserError(
                f"{root} has no class folder {', '.join(missing)}, which {folder} has: a class"
                " without training images is never predicted; add images of it, or take its folder"
                f" out of {' and '.join(EVALUATED)}"
            )


def _notes(train: TransformedTiles, evaluation: dict[str, TransformedTiles]) -> Iterator[str]:
    """Notes on classes that differ much in size, and on evaluated images that are trained on."""
    counts = np.bincount(train.labels)
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > IMBALANCE * counts[smallest]:
        yield (
            f"the classes are not balanced: {counts[largest]} training images of"
            f" {train.classes[largest]}, {counts[smallest]} of {train.classes[smallest]}; look at"
            " macro F1 and the rows per class, accuracy follows the large ones"
        )
    for name, tiles in evaluation.items():
        shared = set(train.files.digests) & set(tiles.files.digests)
        if shared:
            example = train.relative_paths[train.files.digests.index(min(shared))]
            number = sum(digest in shared for digest in tiles.files.digests)
            yield (
                f"{number} images of {name} are in the training set too ({example}): results are"
                " too good to be true"
            )
