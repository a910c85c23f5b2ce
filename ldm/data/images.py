"""Image files: find and decode them.

Imports no torch, so that a command which only looks at files starts at once.

Letters: H W pixels of a file. A tile is a uint8 array (H, W, 3) in RGB.
"""

import io
import logging
import math
import os
import re
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.data.arrays import find_row, is_array, list_rows
from ldm.errors import UserError

log = logging.getLogger(__name__)

ARRAY_EXTENSION = ".npy"
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ARRAY_EXTENSION})
WHITE = "white.txt"  # says which value is white in a set that has more than 8 bits per channel

# What operating systems and file servers leave in folders, beside hidden files.
_JUNK = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir")
_JUNK += ("lost+found", "system volume information")
# Kinds of files that stand beside tiles and that nobody takes for tiles: records and models.
_RECORDS = re.compile(
    r"(\.(csv|tsv|xlsx|json|jsonl|txt|md|pdf|html|xml|ya?ml|log|py|sh|parquet|md5|sha256|part|ckpt"
    r"|pt|pth|safetensors))?"
)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes
# What Pillow and numpy raise for files that are cut short, mislabelled or hostile.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class UnsupportedImage(UserError):
    """A readable file whose pixels are of no supported kind."""


class Folder(NamedTuple):
    """One folder of a tree and its wanted files."""

    path: Path
    modified: int  # st_mtime_ns, read before the names: a later change has a later time
    files: list[str]


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or what an operating system left."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(name: str) -> bool:
    """Whether a file name is that of a tile: a known extension, and no junk."""
    return not is_junk(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _entries(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Names of the subfolders and of the files in a folder, sorted, without junk."""
    names: tuple[list[str], list[str]] = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_junk(entry.name):
                names[not entry.is_dir()].append(entry.name)
    return sorted(names[0]), sorted(names[1])


def walk(root: str | os.PathLike, wanted: Callable[[str], bool]) -> Iterator[Folder]:
    """`root` and every folder below it, each once, with the files whose names are `wanted`.

    Links are followed after all real folders, so that a folder has its own name rather than that of
    a link to it. What else lies in the folders is counted and reported at the end.
    """

    def identity(folder: Path) -> tuple[int, int]:
        state = os.stat(folder)
        return state.st_dev, state.st_ino

    root = Path(root)
    seen = {*map(identity, root.resolve().parents)}  # a link may lead upwards
    folders, links, others = [root], [], Counter()
    while folders or links:
        path = folders.pop() if folders else links.pop()
        if (key := identity(path)) in seen:
            _warn(f"{path} leads to a folder that is read already, or that holds {root}; left out")
            continue
        seen.add(key)
        modified = os.stat(path).st_mtime_ns
        subfolders, files = _entries(path)
        for below in (path / name for name in subfolders):
            (links if below.is_symlink() else folders).append(below)
        others.update(os.path.splitext(name)[1].lower() for name in files if not wanted(name))
        yield Folder(path, modified, [name for name in files if wanted(name)])
    kinds = [f"{n:,} {kind}" for kind, n in sorted(others.items()) if not _RECORDS.fullmatch(kind)]
    if kinds:
        _warn(f"{root}: left out {', '.join(kinds)} files, which are not read here")


@lru_cache(1000)
def _warn(text: str) -> None:
    """Log a warning once, since a command lists the same folder several times."""
    log.warning(text)


def list_images(root: str | os.PathLike) -> list[Path]:
    """Every image file below `root`, sorted by path; junk is skipped. Also the rows of an array."""
    if not os.path.isdir(root):
        root = Path(root)
        return sorted(root / name for name in list_rows(root)) if is_array(root) else []
    return sorted(folder.path / name for folder in walk(root, is_image) for name in folder.files)


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the class folders directly below `root`, sorted; or of the classes of an array."""
    if not os.path.isdir(root):
        names = (path.relative_to(root) for path in list_images(root))
        return sorted({name.parts[0] for name in names if len(name.parts) > 1})
    return _entries(root)[0]


@lru_cache(4096)
def declared_white(folder: Path) -> float | None:
    """The value of white that `WHITE` in this folder, or in one above it, declares; else None."""
    for place in (folder, *folder.parents):
        try:
            text = (place / WHITE).read_text(errors="replace")
        except OSError:  # there is none, or the folder is in a file
            continue
        try:
            white = float(text)
        except ValueError:
            white = 0
        if not 0 < white < math.inf:
            raise UserError(f"{place / WHITE} must hold a number, such as 1, 255, 4095 or 65535")
        return white
    return None


def to_levels(pixels: np.ndarray, name: str, white: float | None = None) -> np.ndarray:
    """Pixels of any depth, (H, W) or (H, W, 3), as a tile.

    8 bits stay as they are. Of others, [0, white] becomes 0 .. 255, rounded.

    Args:
        name: Path of the file, for errors; `declared_white` of its folder comes first.
        white: The value of white where none is declared.
    """
    shape = getattr(pixels, "shape", ())
    if len(shape) == 2:
        return to_levels(np.stack([pixels] * 3, axis=2), name, white)
    if len(shape) == 4:
        raise UnsupportedImage(
            f"{name}: an array of {shape[0]} tiles; give this file where a folder of tiles is"
            " meant, or read it as a corpus with layout: array"
        )
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UnsupportedImage(f"{name}: shape {shape} must be (height, width, 3)")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise UnsupportedImage(f"{name}: {pixels.dtype} values must be numbers; convert them")
    white = declared_white(Path(name).parent) or white
    if white is None:
        raise UnsupportedImage(
            f"{name}: {pixels.dtype} values, more than 8 bits; write the value of white (1, 255 or"
            f" 65535, say) into a file {WHITE} in the folder of the set, or convert to 8-bit RGB"
        )
    levels = np.rint(pixels * (255 / white))
    if not (levels.min() >= 0 and levels.max() <= 255):  # also false for nan
        raise UnsupportedImage(
            f"{name}: values from {pixels.min():g} to {pixels.max():g} must be within"
            f" [0, {white:g}]; rescale them, or correct {WHITE}"
        )
    return levels.astype(np.uint8)


def _decode(content: bytes, name: str) -> np.ndarray:
    """The pixels of a file at its own depth, turned as its orientation says."""
    if name.lower().endswith(ARRAY_EXTENSION):
        return np.load(io.BytesIO(content), allow_pickle=False)
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Pillow takes the upper halves of 16-bit colours without a word.
            if not (image.mode.startswith(("I", "F")) or ";16" in str(image.tile)):
                ImageOps.exif_transpose(image, in_place=True)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                return np.array(image.convert("RGB"))
            image.load()  # OpenCV takes files that are cut short
            if image.has_transparency_data:
                raise UnsupportedImage(
                    f"{name}: more than 8 bits per channel and transparency; convert to 8-bit RGB"
                )
    except UnidentifiedImageError:
        if not content.startswith(_TIFF):  # Pillow knows no colours of 32 bits in these
            raise
    import cv2

    version_4 = hasattr(cv2, "setLogLevel")
    (cv2 if version_4 else cv2.utils.logging).setLogLevel(0)  # silent
    # These flags keep the depth and turn the image; IMREAD_UNCHANGED does not turn all formats.
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None:
        raise ValueError
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1])


def decode_tile(content: bytes, name: str) -> np.ndarray:
    """Decode an image file to uint8 RGB, (H, W, 3); transparency is laid on white, like a slide.

    Args:
        name: Path of the file: its extension tells arrays from images, and see `to_levels`.
    """
    try:
        return to_levels(_decode(content, name), name)
    except UserError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError):
        raise UserError(
            f"{name}: unreadable or truncated image; replace or remove the file"
        ) from None


def read_tile(path: str | os.PathLike) -> np.ndarray:
    """Read and decode an image file, or a row of an array, see `decode_tile`.

    Raises:
        UserError: It cannot be read.
    """
    try:
        try:
            content = Path(path).read_bytes()
        except NotADirectoryError:  # it lies in a file
            array, row = find_row(Path(path))
            return to_levels(array[row], os.fspath(path), array.white)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; replace or remove the file") from error
    return decode_tile(content, os.fspath(path))


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


def attempts(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int
) -> Iterator[Any]:
    """As `map_ahead`, where the `UserError` that an item raises is its result."""

    def attempt(item: Any) -> Any:
        try:
            return function(item)
        except UserError as error:
            return error

    return map_ahead(attempt, items, workers, ahead)


def require_good(outcomes: Sequence[Any]) -> None:
    """Check that none of the results of `attempts` on all images of a set is an error."""
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, UserError)]
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        more = f" | and {len(errors) - 3} more" if len(errors) > 3 else ""
        bad = f"{len(errors)} of {len(outcomes)} images are bad"
        raise UserError(f"{bad}: {' | '.join(errors[:3])}{more}")


def decode_tiles(tiles: Sequence[Any], decode: Callable[[Any], Any]) -> list:
    """`decode(tile)` of every tile in threads (Pillow decodes outside the interpreter's lock).

    Raises:
        UserError: See `require_good`.
    """
    outcomes = list(attempts(decode, tiles, min(8, os.cpu_count() or 1), 16))
    require_good(outcomes)
    return outcomes


def check_tiles(tiles: Sequence[Any], read: Callable[[Any], np.ndarray] = read_tile) -> None:
    """Decode every tile once, so that a bad one is known now and not after hours of training."""
    # The pixels are dropped at once: the set need not fit into memory.
    decode_tiles(tiles, lambda tile: read(tile) is None)
