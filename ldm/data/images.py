"""Image files: find and decode them.

Imports no torch, so that a command which only looks at files starts at once.

Letters: H W pixels of a file. A tile is a uint8 array (H, W, 3) in RGB.
"""

import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.errors import UserError

ARRAY_EXTENSION = ".npy"
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ARRAY_EXTENSION})

# What Pillow and numpy raise for files that are cut short, mislabelled or hostile.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class UnsupportedImage(UserError):
    """A readable file whose pixels are of no supported kind."""


class Folder(NamedTuple):
    """The wanted files and the subfolders of one folder."""

    path: Path
    modified: int  # st_mtime_ns, read before the names: a later change has a later time
    files: list[str]
    subfolders: list[str]


def is_image(name: str) -> bool:
    """Whether a file name is that of a tile: a known extension, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def read_folder(path: str | os.PathLike, wanted: Callable[[str], bool]) -> Folder:
    """One folder's wanted files and its subfolders, without hidden ones, sorted."""
    modified = os.stat(path).st_mtime_ns
    files, subfolders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                subfolders.append(entry.name)
            elif wanted(entry.name):
                files.append(entry.name)
    return Folder(Path(path), modified, sorted(files), sorted(subfolders))


def walk(root: str | os.PathLike, wanted: Callable[[str], bool]) -> Iterator[Folder]:
    """`root` and every folder below it; links are followed."""
    waiting = [Path(root)]
    while waiting:
        folder = read_folder(waiting.pop(), wanted)
        waiting += [folder.path / name for name in folder.subfolders]
        yield folder


def list_images(root: str | os.PathLike) -> list[Path]:
    """Every image file below `root`, sorted by path; hidden files and folders are skipped."""
    if not os.path.isdir(root):
        return []
    return sorted(folder.path / name for folder in walk(root, is_image) for name in folder.files)


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the class folders directly below `root`, sorted; hidden ones are skipped."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def white_of(high: float) -> float:
    """The value of white, 1 or 255, in floats whose largest value is `high`."""
    return 1.0 if high <= 1.001 else 255.0  # 1 with the rounding errors of a colour transform


def float_to_uint8(values: np.ndarray, white: float, name: str) -> np.ndarray:
    """Levels of a float image in [0, white], rounded to 0 .. 255.

    Raises:
        UnsupportedImage: Values are outside that range, or not finite.
    """
    levels = np.rint(values * (255 / white))
    if not (levels.min() >= 0 and levels.max() <= 255):  # also false for nan
        raise UnsupportedImage(
            f"{name}: values from {values.min():g} to {values.max():g} must be within"
            f" [0, {white:g}]; rescale them"
        )
    return levels.astype(np.uint8)


def _array_tile(array: Any, name: str) -> np.ndarray:
    shape = getattr(array, "shape", ())
    if len(shape) == 4:
        raise UnsupportedImage(
            f"{name}: an array of {shape[0]} tiles; read it as a corpus with layout: array"
        )
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UnsupportedImage(f"{name}: shape {shape} must be (height, width, 3)")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise UnsupportedImage(f"{name}: {array.dtype} values must be uint8 or float; convert them")
    return float_to_uint8(array, white_of(array.max()), name)


def decode_tile(source: str | os.PathLike | IO[bytes], name: str) -> np.ndarray:
    """Decode one image to uint8 RGB, (H, W, 3); transparency is laid on white, like a slide.

    A float array is taken to be in [0, 1] when no value exceeds 1, else in [0, 255].

    Args:
        source: A path or an open binary file.
        name: How errors call it; its extension tells arrays from images.

    Raises:
        UserError: The file is missing, no image, or cut short.
        UnsupportedImage: More than 8 bits per channel, or an array of another shape.
    """
    try:
        if name.lower().endswith(ARRAY_EXTENSION):
            return _array_tile(np.load(source, allow_pickle=False), name)
        with Image.open(source) as image:
            if image.mode.startswith(("I", "F")):
                raise UnsupportedImage(
                    f"{name}: more than 8 bits per pixel (mode {image.mode}); convert to 8-bit RGB"
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
        raise UserError(f"{name}: {reason}; replace or remove the file") from error


def read_tile(path: str | os.PathLike) -> np.ndarray:
    """Decode one image file; see `decode_tile`."""
    return decode_tile(path, os.fspath(path))


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int
) -> Iterator[Any]:
    """`function(item)` of each item in order, computed in threads.

    Args:
        ahead: Most results per thread that wait to be taken, so that they fit into memory.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        queue = deque(pool.submit(function, item) for item in islice(waiting, ahead * workers))
        try:
            while queue:
                result = queue.popleft().result()
                queue.extend(pool.submit(function, item) for item in islice(waiting, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def require_good(errors: Sequence[str], count: int) -> None:
    """Check that no image of a set is bad.

    Args:
        errors: What is wrong with the bad ones.
        count: Number of images in the set.

    Raises:
        UserError: Some files are bad: how many, and the first few by name.
    """
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        more = f" | and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError(f"{len(errors)} of {count} images are bad: {' | '.join(errors[:3])}{more}")


def decode_tiles(
    tiles: Sequence[Any], decode: Callable[[Any], Any], workers: int | None = None
) -> list:
    """`decode(tile)` of every tile in threads (Pillow decodes outside the interpreter's lock).

    Raises:
        UserError: Some files are bad; the message counts them and names the first few.
    """

    def attempt(tile: Any):
        try:
            return decode(tile), None
        except UserError as error:
            return None, str(error)

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(attempt, tiles))
    require_good([message for _, message in outcomes if message is not None], len(tiles))
    return [value for value, _ in outcomes]


def check_tiles(
    tiles: Sequence[Any],
    workers: int | None = None,
    read: Callable[[Any], np.ndarray] = read_tile,
) -> None:
    """Decode every tile once, so that a bad one is known now and not after hours of training.

    Raises:
        UserError: Some files are bad; the message counts them and names the first few.
    """

    def decode(tile: Any) -> None:
        read(tile)  # the pixels are dropped at once: the set need not fit into memory

    decode_tiles(tiles, decode, workers)
