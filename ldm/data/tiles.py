"""Tiles as training sets: preprocess, crop, augment, cache; and tiles as tensors.

Letters: B batch, H W pixels of a file, S side of a tile in pixels.

An image is a uint8 array (H, W, 3) in RGB on the file's side and a float32 tensor (3, S, S) in
[-1, 1] on the network's side; `to_tensor` and `to_uint8` are the only two places that convert.
"""

import copy
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.augmentations.crops.transforms import CropSizeError
from torch import Tensor
from torch.utils.data import Dataset

from ldm.config import instantiate_from_config
from ldm.data.images import check_tiles, decode_tiles, read_tile  # noqa: F401  also for others
from ldm.data.index import CorpusIndex
from ldm.data.stain import jitter_stains
from ldm.data.storage import LAYOUTS, Layout, Place, find_files, layout_of, read_place
from ldm.data.tile_files import TileFiles, matching_classes
from ldm.errors import UserError

log = logging.getLogger(__name__)

AUGMENTATIONS = ("d4", "stain")
SYMMETRIES = 8
# Transforms of albumentations that may come before the crop: those that draw no random numbers.
PREPROCESSING = ("CenterCrop", "LongestMaxSize", "PadIfNeeded", "Resize", "SmallestMaxSize")
CHECK_LIMIT = 20_000  # `check="auto"` decodes sets up to this size (about 0.3 ms per 64 px tile)
CACHE_LIMIT = 4 * 2**30  # bytes of decoded tiles that one set may hold
# Where a tile is stored, an array of numbers since there may be millions: its root, its file among
# those that hold several tiles (-1: a file of its own), see `ldm.data.storage.Place`.
PLACES = [("root", np.int16), ("file", np.int64), ("offset", np.int64), ("size", np.int64)]


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
    return torch.from_numpy(channels_first).float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> np.ndarray:
    """[-1, 1] (3, H, W) or (B, 3, H, W), any float type -> uint8 with channels last.

    Rounds to the nearest level and clamps, so `to_uint8(to_tensor(image))` is `image` exactly.
    """
    assert x.ndim in (3, 4) and x.shape[-3] == 3, tuple(x.shape)
    levels = x.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).cpu().contiguous().numpy()


def symmetry(x: Tensor, number: int) -> Tensor:
    """One of the 8 `SYMMETRIES` of the square (..., S, S): quarter turns, then flipped ones."""
    turned = torch.rot90(x, number % 4, (-2, -1))
    return turned.flip(-1) if number >= 4 else turned


def _resize(size: int) -> A.SmallestMaxSize:
    # Area averaging avoids moire when shrinking; cubic when enlarging. No-op at the right size.
    return A.SmallestMaxSize(
        max_size=size, interpolation=cv2.INTER_CUBIC, area_for_downscale="image"
    )


def resize_tile(image: np.ndarray, size: int) -> np.ndarray:
    """The tile, uint8 (H, W, 3), with its shorter side `size`, as a `TileFolder` resizes it."""
    return _resize(size)(image=image)["image"]


class StainJitter(A.ImageOnlyTransform):
    """More or less haematoxylin and eosin, as other laboratories and other days would have it.

    albumentations' own HEStain drops what the two stains do not explain, which turns tissue blue.

    Args:
        strength: Stains are multiplied by numbers in [1 - strength, 1 + strength]; in (0, 1).
        p: Probability.
    """

    def __init__(self, strength: float = 0.25, p: float = 1.0):
        super().__init__(p=p)
        self.strength = strength

    def get_params(self) -> dict:
        low, high = 1 - self.strength, 1 + self.strength
        return {"scale": self.random_generator.uniform(low, high, 3)}

    def apply(self, img: np.ndarray, scale: np.ndarray, **params) -> np.ndarray:
        return jitter_stains(img, scale)


def _stain() -> list[A.BasicTransform]:
    return [
        StainJitter(),
        A.ColorJitter(
            brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=(-0.02, 0.02)
        ),
    ]


def _build_transform(node: Mapping[str, Any], where: str) -> A.BasicTransform:
    """The transform of a `{target, params}` node."""
    target = node.get("target") if isinstance(node, Mapping) else None
    own = f"{__name__}.StainJitter"
    if not isinstance(target, str) or not (target == own or target.startswith("albumentations.")):
        raise UserError(
            f"{where}={node!r}: give a mapping with target: albumentations.NAME (or {own}) and"
            " params:"
        )
    try:
        transform = instantiate_from_config(node)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, TypeError) as error:
        # albumentations checks values with pydantic, whose text has many lines, some of them links.
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(line for line in lines if not line.startswith("For further information"))
        raise UserError(f"{where}: {target}: {reason}") from None
    if not isinstance(transform, A.BasicTransform):
        raise UserError(f"{where}: {target} is no single transform of images")
    return transform


def _preprocessing(nodes: Sequence[Mapping[str, Any]]) -> list[A.BasicTransform]:
    transforms = []
    for i, node in enumerate(nodes):
        where = f"preprocess[{i}]"
        transform = _build_transform(node, where)
        name = type(transform).__name__
        if name not in PREPROCESSING:
            raise UserError(
                f"{where}: {name} may not come before the crop, only {', '.join(PREPROCESSING)};"
                " put it into augment"
            )
        sizes = isinstance(getattr(transform, "max_size", None), list | tuple)
        places = {getattr(transform, key, None) for key in ("position", "pad_position")}
        if transform.p != 1 or sizes or "random" in places:
            raise UserError(f"{where}: {name} must not be random here; put it into augment")
        transforms.append(transform)
    return transforms


@dataclass(frozen=True)
class Weighted:
    """A corpus by name, and how often a pass draws each of its tiles, see `Corpora`."""

    name: str
    weight: float

    def pass_length(self, count: int) -> int:
        """How many draws a pass has of `count` tiles."""
        return max(1, round(self.weight * count)) if count else 0

    def drawn(self, count: int, seed: int, epoch: int) -> np.ndarray:
        """Indices of the tiles, of `count`, that a pass draws, sorted."""
        number = self.pass_length(count)
        start = epoch * number
        parts = []
        while number:
            turn, first = divmod(start, count)
            generator = np.random.default_rng((seed, crc32(self.name.encode()), turn))
            parts.append(generator.permutation(count)[first : first + number])
            start, number = start + len(parts[-1]), number - len(parts[-1])
        return np.sort(np.concatenate(parts))


class TileSet(Dataset):
    """What every training set of tiles has in common, of images or of cached latents.

    Items and passes are functions of a seed: `tiles[index, seed]` uses the given one (see
    `ldm.data.datamodule.ResumableSampler`), `tiles[index]` draws one from torch, whose seed a
    DataLoader sets in each worker.
    """

    # Weights of the corpora that the tiles come from; empty if a pass has every tile once.
    corpora: Sequence[Weighted] = ()
    classes: list[str]  # class names in label order; empty when unlabelled
    relative_paths: list[str]  # names of the tiles below their root, with `/`
    labels: list[int]  # one int per tile; -1 when unlabelled
    # Patient, slide or region of each tile (its own name where unknown), from an index; None
    # without one.
    groups: list[str] | None

    def path(self, index: int) -> str:
        """Where a tile is stored, for messages and records."""
        raise NotImplementedError

    def without_augmentation(self) -> "TileSet":
        """The same tiles in the same order, as validation sees them."""
        raise NotImplementedError

    def corpus_numbers(self) -> np.ndarray:
        """Number of each tile's corpus, (tiles,) integers; 0 in a set that is no corpus."""
        return np.zeros(len(self), np.int16)

    def tiles_per_corpus(self) -> list[int]:
        return np.bincount(self.corpus_numbers(), minlength=len(self.corpora)).tolist()

    def pass_length(self) -> int:
        """How many tiles a pass draws."""
        if not self.corpora:
            return len(self)
        counts = zip(self.corpora, self.tiles_per_corpus(), strict=True)
        return sum(corpus.pass_length(count) for corpus, count in counts)

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the tiles that a pass draws, (pass_length,) int64, to be shuffled."""
        if not self.corpora:
            return np.arange(len(self))
        numbers = self.corpus_numbers()
        parts = []
        for number, corpus in enumerate(self.corpora):
            members = np.flatnonzero(numbers == number)
            if len(members):
                parts.append(members[corpus.drawn(len(members), seed, epoch)])
        return np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.relative_paths)


def without_augmentation(dataset: Dataset) -> Dataset:
    """The tiles of a training set as validation sees them; a set of another kind as it is."""
    return dataset.without_augmentation() if isinstance(dataset, TileSet) else dataset


class Tiles(TileSet):
    """A set of images, wherever its pixels are stored.

    An item is `dict(image=(3, S, S) float32 in [-1, 1], label=int, path=str)`. A tile goes through
    `preprocess`, has its shorter side resized to `size`, is cropped to a square and augmented.
    Random crops and augmentation are a function of one integer per item, see `TileSet`.

    A subclass adds the tiles of each root, with their labels, and calls `_finish`.

    Args:
        size: S, pixels.
        labelled: Whether tiles have classes.
        classes: The classes there must be, in label order. Default: those found, sorted.
        check: "auto" decodes every file at construction in sets of at most 20,000 without an
            index; True or False.
        cache: Keep decoded tiles in memory, as uint8 after resizing (at most 4 GiB).
        augment: Names among "d4" (the 8 symmetries of the square) and "stain", or nodes
            `{target: albumentations.NAME, params: {...}}`, applied in order to the cropped tile.
        crop: "center" or "random".
        preprocess: Nodes of `PREPROCESSING`, applied in order to the whole tile.
        resize: Whether the shorter side becomes `size`. False crops at the tile's own resolution.
    """

    _PER_TILE = ("relative_paths", "labels", "groups", "_places")  # what `subset` takes a part of

    def __init__(
        self,
        size: int,
        labelled: bool = False,
        classes: Sequence[str] | None = None,
        augment: Sequence[str | Mapping] | None = None,
        crop: Literal["center", "random"] = "center",
        check: bool | Literal["auto"] = "auto",
        cache: bool = False,
        preprocess: Sequence[Mapping] | None = None,
        resize: bool = True,
    ):
        augment = [augment] if isinstance(augment, str | Mapping) else list(augment or [])
        unknown = sorted({name for name in augment if isinstance(name, str)} - set(AUGMENTATIONS))
        if unknown:
            raise UserError(
                f"augment={unknown}: choose among {list(AUGMENTATIONS)}, or give target: and"
                " params: of an albumentations transform"
            )
        if classes is not None and not labelled:
            raise UserError(f"classes={list(classes)}: classes need labelled=true")
        self.size = size
        self.labelled, self._check, self._cache = labelled, check, cache
        self.augment = augment
        self.preprocess = list(preprocess or [])
        self.crop = crop
        self.resize = resize
        self.classes: list[str] = list(classes or [])
        self.relative_paths: list[str] = []
        self.labels: list[int] = []
        self.groups: list[str] | None = None
        self._roots: list[tuple[Path, Layout, str]] = []  # with what begins the tiles' names
        self._files: list[str] = []  # that hold several tiles
        self._places = np.zeros(0, PLACES)
        self._cached: list[np.ndarray] | None = None
        steps = _preprocessing(self.preprocess)
        self._prepare_image = A.Compose([*steps, *([_resize(size)] if resize else [])])
        self._build_transform()

    def _build_transform(self) -> None:
        crop = A.CenterCrop if self.crop == "center" else A.RandomCrop
        steps: list[A.BasicTransform] = [crop(self.size, self.size)]
        for i, item in enumerate(self.augment):
            if item == "d4":
                steps.append(A.D4())
            elif item == "stain":
                steps += _stain()
            else:
                steps.append(self._augmentation(item, f"augment[{i}]"))
        self._transform = A.Compose(steps)

    def _augmentation(self, node: Mapping[str, Any], where: str) -> A.BasicTransform:
        """A transform that turns a tile of S x S into another one, tried once on a grey tile."""
        transform = _build_transform(node, where)
        grey = np.full((self.size, self.size, 3), 128, np.uint8)
        try:
            tried = A.Compose([copy.deepcopy(transform)], seed=0)(image=grey)["image"]
        except (ValueError, TypeError, RuntimeError, CropSizeError, cv2.error) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{where}: {node['target']} fails on a tile of {self.size} px: {reason}"
            ) from None
        if getattr(tried, "shape", None) != grey.shape or tried.dtype != np.uint8:
            raise UserError(
                f"{where}: {node['target']} must leave a tile of {self.size} x {self.size} pixels"
                " in 8 bits as large and deep as it is; correct its params or leave it out"
            )
        return transform

    def _add(self, root: Path, layout: Layout, table: Mapping[str, list], prefix: str = "") -> None:
        """Add the tiles of a root.

        Args:
            table: See `tiles_below`.
            prefix: What begins the names of the tiles.
        """
        holders = sorted(set(table["file"]) - set(table["path"]))  # files of several tiles
        number_of = {file: len(self._files) + n for n, file in enumerate(holders)}
        self._files += holders
        self.relative_paths += [f"{prefix}{path}" for path in table["path"]]
        places = np.zeros(len(table["path"]), PLACES)
        places["root"] = len(self._roots)
        places["file"] = [number_of.get(file, -1) for file in table["file"]]
        places["offset"], places["size"] = table["offset"], table["size"]
        self._places = np.concatenate([self._places, places])
        self._roots.append((root, layout, prefix))

    def _place(self, index: int) -> tuple[Path, Layout, Place]:
        number, file, offset, size = self._places[index].tolist()
        root, layout, prefix = self._roots[number]
        path = self.relative_paths[index].removeprefix(prefix)
        place = Place(path, path if file < 0 else self._files[file], offset, size, None)
        return root, layout, place

    def read(self, index: int) -> np.ndarray:
        """The stored pixels of a tile, uint8 (H, W, 3)."""
        return read_place(*self._place(index))

    def path(self, index: int) -> str:
        root, _, place = self._place(index)
        return str(root / place.path)

    @property
    def paths(self) -> list[Path]:
        """Where each tile is stored."""
        return [Path(self.path(i)) for i in range(len(self))]

    def _add_labels(self, where: str, names: Sequence[str | None]) -> None:
        """Label the tiles that have no label yet, the last ones, by the names of their classes.

        Args:
            where: How errors call the classes.
        """
        if not self.labelled:
            self.labels += [-1] * len(names)
            return
        if None in names:
            tile = self.relative_paths[len(self.labels) + names.index(None)]
            raise UserError(
                f"labelled=true: no class is known of {tile}; put tiles into class folders"
            )
        self.classes = matching_classes(where, sorted(set(names)), self.classes or None)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels += [label_of[name] for name in names]

    def _finish(self, scanned: bool) -> None:
        """Fill the cache or check the files; `scanned` says that an index has decoded them."""
        unknown = self._check == "auto" and not scanned and len(self) <= CHECK_LIMIT
        if self._cache:
            self._fill_cache()
        elif self._check is True or unknown:
            check_tiles(range(len(self)), read=self.read)

    def _prepare(self, index: int) -> np.ndarray:
        """The tile as uint8, resized: its shorter side is S, or at least S without `resize`."""
        try:
            image = self._prepare_image(image=self.read(index))["image"]
        except CropSizeError as error:
            raise UserError(f"{self.path(index)}: preprocess: {error}") from None
        if min(image.shape[:2]) < self.size:
            height, width = image.shape[:2]
            raise UserError(
                f"{self.path(index)}: {width} x {height} pixels are fewer than size={self.size};"
                " set resize=true or a smaller size"
            )
        return image

    def _fill_cache(self) -> None:
        least = len(self) * self.size * self.size * 3
        if least > CACHE_LIMIT:
            raise UserError(
                f"cache=true: {len(self)} tiles of {self.size} px need {least / 2**30:.1f} GiB or"
                f" more, the limit is {CACHE_LIMIT / 2**30:.0f} GiB; use cache=false"
            )

        def decode(index: int) -> np.ndarray:
            image = self._prepare(index)
            # Only the centre of an elongated tile is ever seen with crop="center".
            return self._transform(image=image)["image"] if not self.is_random else image

        self._cached = decode_tiles(range(len(self)), decode)

    @property
    def is_random(self) -> bool:
        """Whether an item depends on a seed."""
        return bool(self.augment) or self.crop == "random"

    def without_augmentation(self) -> "Tiles":
        return self.subset(range(len(self)), random=False)

    def subset(self, indices: Sequence[int], random: bool = True) -> "Tiles":
        """The tiles at `indices`; `random=False` also drops augmentation and crops the centre."""
        part = copy.copy(self)
        for name in self._PER_TILE:
            values = getattr(self, name)
            if isinstance(values, np.ndarray):
                setattr(part, name, values[np.asarray(indices, dtype=np.int64)])
            elif values is not None:
                setattr(part, name, [values[i] for i in indices])
        if self._cached is not None:
            part._cached = [self._cached[i] for i in indices]
        if not random:
            part.augment, part.crop = [], "center"
            part._build_transform()
        return part

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image = self._cached[index] if self._cached is not None else self._prepare(index)
        if self.is_random:
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            # One pair of generators for all steps: seeding each step alike would correlate them.
            self._transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        image = self._transform(image=image)["image"]
        return {"image": to_tensor(image), "label": self.labels[index], "path": self.path(index)}


def tiles_below(
    root: Path, layout: Layout, index: CorpusIndex | None = None, number: int = 0
) -> dict[str, list]:
    """The tiles of a root: a list for each field of `Place`, and `group` (its name if unknown).

    Args:
        index: Index of the root, which is then not read.
        number: Number of the root in the index.
    """
    if index is not None:
        table = index.tiles(number)
        table["group"] = [g or p for g, p in zip(table["group"], table["path"], strict=True)]
        return table
    places = [p for file in find_files(root, layout)[0] for p in layout.places(root, file)]
    if not places:
        raise UserError(f"corpus {root}: its {layout.kind} hold no tiles")
    table = dict(zip(Place._fields, map(list, zip(*places, strict=True)), strict=True))
    return table | {"group": table["path"]}


class TileFolder(Tiles):
    """Tiles below one or more folders, a file each; or in files of arrays.

    Files are sorted within each class (labelled) or root (unlabelled).

    Args:
        root: A folder or several. With `labelled`, each is `root/CLASS/**`. Or files of arrays
            (.npz, .h5, images.npy) with their labels, or a part of one: pathmnist.npz/train.
        size ... resize: See `Tiles`.
        index: Index that scripts/index_corpus.py wrote for the same root or roots. The folders are
            then not walked, and tiles with problems are left out.

    Raises:
        UserError: A folder is missing or empty, classes differ, an image is unreadable, an index no
            longer fits its folder, or a value is not allowed.
    """

    def __init__(
        self,
        root: str | os.PathLike | Iterable[str | os.PathLike],
        size: int,
        labelled: bool = False,
        classes: Sequence[str] | None = None,
        augment: Sequence[str | Mapping] | None = None,
        crop: Literal["center", "random"] = "center",
        check: bool | Literal["auto"] = "auto",
        cache: bool = False,
        preprocess: Sequence[Mapping] | None = None,
        resize: bool = True,
        index: str | os.PathLike | None = None,
    ):
        roots = [root] if isinstance(root, str | os.PathLike | None) else list(root)
        if not roots or any(r is None or not str(r) for r in roots):
            raise UserError(f"root={root!r}: give the folder of the tiles, or a list of folders")
        super().__init__(size, labelled, classes, augment, crop, check, cache, preprocess, resize)
        folders = [Path(folder).expanduser() for folder in roots]
        layout = layout_of(folders[0])
        known = CorpusIndex.of_roots(index, folders, layout) if index is not None else None
        groups: list[str] = []
        for number, folder in enumerate(folders):
            if layout == "folder":
                files = TileFiles.below(folder, labelled, self.classes or None, known, number)
                whole = dict.fromkeys(("offset", "size"), [0] * len(files))  # files of their own
                table = {"path": files.names, "file": files.names, "group": files.groups, **whole}
                self.classes = files.classes
                self.labels += files.labels
                self._add(folder, LAYOUTS[layout], table)
            else:
                table = tiles_below(folder, LAYOUTS[layout], known, number)
                self._add(folder, LAYOUTS[layout], table)
                self._add_labels(f"{folder}: classes", table["label"])
            groups += table["group"] or []
        self.groups = groups if known else None
        self._finish(known is not None)
