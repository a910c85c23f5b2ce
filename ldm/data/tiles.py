"""Tiles: find, check, decode, augment, write.

Letters: B batch, H W pixels of a file, S side of a tile in pixels.

An image is a uint8 array (H, W, 3) in RGB on the file's side and a float32 tensor (3, S, S) in
[-1, 1] on the network's side; `to_tensor` and `to_uint8` are the only two places that convert.
"""

import copy
import logging
import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.stain import jitter_stains
from ldm.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
AUGMENTATIONS = ("d4", "stain")
CROPS = ("center", "random")
CHECK_LIMIT = 20_000  # `check="auto"` decodes sets up to this size (about 0.3 ms per 64 px tile)
CACHE_LIMIT = 4 * 2**30  # bytes of decoded tiles that one TileFolder may hold

# What Pillow raises for files that are cut short, mislabelled or hostile.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def list_images(root: str | os.PathLike) -> list[Path]:
    """Every image file below `root`, sorted by path; hidden files and folders are skipped."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return sorted(found)


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the class folders directly below `root`, sorted; hidden ones are skipped."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def read_tile(path: str | os.PathLike) -> np.ndarray:
    """Decode one image to uint8 RGB, (H, W, 3); transparency is laid on white, like a slide.

    Raises:
        UserError: The file is missing, no image, cut short, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path}: more than 8 bits per pixel (mode {image.mode}); convert to 8-bit RGB"
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "unreadable or truncated image"
        raise UserError(f"{path}: {reason}; replace or remove the file") from error


def decode_tiles(
    paths: Sequence[Path], decode: Callable[[Path], Any], workers: int | None = None
) -> list:
    """`decode(path)` of every path in threads (Pillow decodes outside the interpreter's lock).

    Raises:
        UserError: Some files are bad: how many, and the first few by name.
    """

    def attempt(path: Path):
        try:
            return decode(path), None
        except UserError as error:
            return None, str(error)

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(attempt, paths))
    bad = [message for _, message in outcomes if message is not None]
    if len(bad) == 1:
        raise UserError(bad[0])
    if bad:
        more = f" | and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{len(bad)} of {len(paths)} images are bad: {' | '.join(bad[:3])}{more}")
    return [value for value, _ in outcomes]


def check_tiles(paths: Sequence[str | os.PathLike], workers: int | None = None) -> None:
    """Decode every file once, so that a bad one is known now and not after hours of training.

    Raises:
        UserError: How many files are bad, with the first few by name.
    """

    def decode(path: Path) -> None:
        read_tile(path)  # the pixels are dropped at once: the set need not fit into memory

    decode_tiles(paths, decode, workers)


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


def write_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG; the file appears whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".png.part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            Image.fromarray(array).save(stream, format="PNG")
        # mkstemp makes files private; a data set should get the permissions of any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    """

    def get_params(self) -> dict:
        return {"scale": self.random_generator.uniform(0.75, 1.25, 3)}

    def apply(self, img: np.ndarray, scale: np.ndarray, **params) -> np.ndarray:
        return jitter_stains(img, scale)


def _stain() -> list[A.BasicTransform]:
    return [
        StainJitter(p=1.0),
        A.ColorJitter(
            brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=(-0.02, 0.02)
        ),
    ]


class TileFolder(Dataset):
    """Tiles below one or more folders.

    An item is `dict(image=(3, S, S) float32 in [-1, 1], label=int, path=str)`; the label is -1 when
    the set is unlabelled. The shorter side is resized to `size`, then a square is cropped.

    Random crops and augmentation are a function of one integer per item: `tiles[index, seed]` uses
    the given one (see `ldm.data.datamodule.ResumableSampler`), `tiles[index]` draws it from torch,
    whose seed a DataLoader sets in each worker.

    Attributes:
        classes: Class names in label order; empty when unlabelled.
        paths: Files, sorted within each class (labelled) or root (unlabelled).
        relative_paths: The same below their root, with `/`; patient or slide names are found here.
        labels: One int per path.

    Args:
        root: A folder or several. With `labelled`, each is `root/CLASS/**`.
        size: S, pixels.
        classes: The classes there must be, in label order. Default: the folders' names, sorted.
        augment: Names among "d4" (the 8 symmetries of the square) and "stain".
        crop: "center" or "random".
        check: "auto" decodes every file at construction in sets of at most 20,000; True or False.
        cache: Keep decoded tiles in memory, as uint8 after resizing (at most 4 GiB).

    Raises:
        UserError: A missing or empty folder, classes that differ, an unreadable image, a bad value.
    """

    def __init__(
        self,
        root: str | os.PathLike | Iterable[str | os.PathLike],
        size: int,
        labelled: bool = False,
        classes: Sequence[str] | None = None,
        augment: Sequence[str] | None = None,
        crop: str = "center",
        check: bool | str = "auto",
        cache: bool = False,
    ):
        roots = [root] if isinstance(root, str | os.PathLike | None) else list(root)
        if not roots or any(r is None or not str(r) for r in roots):
            raise UserError(f"root={root!r}: give the folder of the tiles, or a list of folders")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"size={size!r} must be a whole number of pixels, at least 1")
        augment = [augment] if isinstance(augment, str) else list(augment or [])
        unknown = sorted(set(augment) - set(AUGMENTATIONS))
        if unknown:
            raise UserError(f"augment={unknown}: choose among {list(AUGMENTATIONS)}")
        if crop not in CROPS:
            raise UserError(f"crop={crop!r}: choose among {list(CROPS)}")
        if check not in (True, False, "auto"):
            raise UserError(f"check={check!r}: choose among true, false and auto")
        if classes is not None and not labelled:
            raise UserError(f"classes={list(classes)}: classes need labelled=true")

        self.size = size
        self.augment = augment
        self.crop = crop
        self.classes: list[str] = list(classes or [])
        self.paths: list[Path] = []
        self.relative_paths: list[str] = []
        self.labels: list[int] = []
        for folder in roots:
            self._index(Path(folder).expanduser(), labelled)
        self._build_transforms()

        self._cached: list[np.ndarray] | None = None
        if cache:
            self._fill_cache()
        elif check is True or (check == "auto" and len(self) <= CHECK_LIMIT):
            check_tiles(self.paths)

    def _index(self, root: Path, labelled: bool) -> None:
        if not root.is_dir():
            reason = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"tile folder {root} {reason}; check the path")
        if not labelled:
            self._add(root, root, label=-1)
            return

        found = class_folders(root)
        if not found:
            raise UserError(f"{root}: no class folders; a labelled set is {root}/CLASS/image files")
        if not self.classes:
            self.classes = found
        missing = sorted(set(self.classes) - set(found))
        extra = sorted(set(found) - set(self.classes))
        if missing or extra:
            raise UserError(
                f"{root}: class folders {found} differ from the classes {self.classes}"
                f" (missing {missing}, extra {extra}); rename, add or remove folders"
            )
        loose = sum(1 for p in root.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
        if loose:
            log.warning("%s: %d images beside the class folders are not used", root, loose)
        for label, name in enumerate(self.classes):
            self._add(root, root / name, label)

    def _add(self, root: Path, folder: Path, label: int) -> None:
        paths = list_images(folder)
        if not paths:
            what = "tile folder" if label < 0 else "class folder"
            raise UserError(
                f"{what} {folder} has no images ({' '.join(sorted(EXTENSIONS))}); add some"
            )
        self.paths += paths
        self.relative_paths += [path.relative_to(root).as_posix() for path in paths]
        self.labels += [label] * len(paths)

    def _build_transforms(self) -> None:
        self._resize = A.Compose([_resize(self.size)])
        crop = A.CenterCrop if self.crop == "center" else A.RandomCrop
        steps: list[A.BasicTransform] = [crop(self.size, self.size)]
        if "d4" in self.augment:
            steps.append(A.D4())
        if "stain" in self.augment:
            steps += _stain()
        self._transform = A.Compose(steps)

    def _decode(self, path: Path) -> np.ndarray:
        """The tile as uint8 with its shorter side S."""
        return self._resize(image=read_tile(path))["image"]

    def _fill_cache(self) -> None:
        least = len(self) * self.size * self.size * 3
        if least > CACHE_LIMIT:
            raise UserError(
                f"cache=true: {len(self)} tiles of {self.size} px need {least / 2**30:.1f} GiB or"
                f" more, the limit is {CACHE_LIMIT / 2**30:.0f} GiB; use cache=false"
            )

        def decode(path: Path) -> np.ndarray:
            image = self._decode(path)
            # Only the centre of an elongated tile is ever seen with crop="center".
            return self._transform(image=image)["image"] if not self.is_random else image

        self._cached = decode_tiles(self.paths, decode)

    @property
    def is_random(self) -> bool:
        """Whether an item depends on a seed."""
        return bool(self.augment) or self.crop == "random"

    def subset(self, indices: Sequence[int], random: bool = True) -> "TileFolder":
        """The tiles at `indices`; `random=False` also drops augmentation and crops the centre."""
        part = copy.copy(self)
        for name in ("paths", "relative_paths", "labels"):
            values = getattr(self, name)
            setattr(part, name, [values[i] for i in indices])
        if self._cached is not None:
            part._cached = [self._cached[i] for i in indices]
        if not random:
            part.augment, part.crop = [], "center"
            part._build_transforms()
        return part

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, None)
        path = self.paths[index]
        image = self._cached[index] if self._cached is not None else self._decode(path)
        if self.is_random:
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            # One pair of generators for all steps: seeding each step alike would correlate them.
            self._transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        image = self._transform(image=image)["image"]
        return {"image": to_tensor(image), "label": self.labels[index], "path": str(path)}
