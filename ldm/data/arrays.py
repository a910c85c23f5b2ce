"""Arrays of tiles as this field publishes them, read row by row and never unpacked.

PanNuke's .npy files, MedMNIST's .npz files and PatchCamelyon's HDF5 files: each array of
(N, H, W, 3) in them is a set of tiles, with the labels that stand beside it.

Letters: N rows, H W pixels.
"""

import errno
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.files import require_class_names

PANNUKE, TYPES = "images.npy", "types.npy"  # the tiles of PanNuke, and their tissues
OPEN_FILES = 64  # files of arrays, or shards, that a process keeps open
SAMPLED = 16  # rows whose range says what white is, where nothing else does
CHUNK = 1 << 16  # compressed bytes that are inflated at a time
STATES = 512  # places of a compressed array at which inflating can begin
# Labels and masks of PatchCamelyon lie in files of their own, beside its tiles.
_HOLDERS = re.compile(rf"{PANNUKE}|.*\.npz|.*(?<!_y)(?<!_mask)\.(h5|hdf5)", re.IGNORECASE)


def holds_arrays(name: str) -> bool:
    """Whether a file of this name may hold arrays of tiles."""
    return _HOLDERS.fullmatch(name) is not None


def file_of(path: Path) -> Path:
    """The file that a path leads into: itself, or a file of arrays, FILE/PART or FILE/PART/TILE."""
    if path.exists():
        return path
    return next((parent for parent in path.parents if parent.is_file()), path)


def is_array(path: Path) -> bool:
    """Whether a path is that of a file of arrays, or of a part of one; also by a link to it."""
    file = file_of(path)
    return file.is_file() and holds_arrays(file.resolve().name)


def list_rows(root: Path) -> list[str]:
    """The tiles of a file of arrays, or of a part of one, named like files in class folders.

    That is CLASS/000003.png, CLASS/PART_000003.png in a file of several arrays, and without CLASS
    where there are no labels. `find_row` finds what ROOT/NAME stands for.
    """
    return [
        "/".join(filter(None, (label, f"{part and part + '_'}{i:06d}.png")))
        for part, array in open_arrays(root).items()
        for i, label in enumerate(array.class_names())
    ]


def find_row(path: Path) -> "tuple[TileArray, int]":
    """The array and the row of a tile in a file of arrays, see `list_rows`.

    Raises:
        FileNotFoundError: There is no such array.
    """
    file = file_of(path)
    part, _, row = path.stem.rpartition("_")
    try:
        arrays = open_arrays(file)
        first = path.relative_to(file).parts[0]
        return arrays[part or (first if first in arrays else "")], int(row)
    except (KeyError, ValueError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None


@dataclass
class TileArray:
    """An array of tiles in a file."""

    path: str
    rows: Any  # `rows[i]` reads one, (H, W, 3), or (H, W) in grey; has a shape and a dtype
    labels: Any  # an array of N labels; None without labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= len(self):
            raise UserError(f"{self.path} has {len(self)} tiles, not {i + 1}")
        return np.ascontiguousarray(self.rows[i])

    @cached_property
    def white(self) -> float | None:
        """The value of white, by the range of some rows, in an array of floats; else None."""
        if self.rows.dtype.kind != "f":
            return None
        some = np.linspace(0, len(self) - 1, SAMPLED).astype(int)
        # fmax looks past rows that are not finite; those are reported when they are read.
        high = np.fmax.reduce([self.rows[i].max() for i in some])
        return 1.0 if high <= 1.001 else 255.0  # 1 with the rounding errors of a colour transform

    def class_names(self) -> list[str | None]:
        """The label of each row as a name; numbers are filled with zeros, to be sorted as such."""
        if self.labels is None:
            return [None] * len(self)
        labels = np.asarray(self.labels)
        shaped = labels.size == len(self) == labels.shape[0]
        if not shaped or labels.dtype.kind not in "iuUS":
            raise UserError(
                f"{self.path}: its labels, {labels.dtype} {labels.shape}, must be a number or a"
                f" name for each of {len(self)} tiles"
            )
        labels = labels.reshape(-1)
        if labels.dtype.kind in "iu":
            width = len(str(labels.max()))
            return [f"{label:0{width}d}" for label in labels.tolist()]
        names = [str(label) for label in labels.astype(str)]
        require_class_names(sorted(set(names)), self.path)
        return names


def open_arrays(path: Path) -> dict[str, TileArray]:
    """The arrays of tiles in a file by name, such as train and test; or the PART of FILE/PART.

    The only array of a file has no name.
    """
    file = file_of(path)
    # By process, since a handle of HDF5 must not be shared after a fork.
    arrays = _open(str(file.resolve()), os.getpid())
    if file == path:
        return arrays
    if path.name not in arrays:
        raise UserError(f"{file} has no part {path.name}, only {', '.join(filter(None, arrays))}")
    return {"": arrays[path.name]}


@lru_cache(OPEN_FILES)
def _open(path: str, process: int) -> dict[str, TileArray]:
    reader = {".npy": _numpy, ".npz": _zipped}.get(Path(path).suffix.lower(), _hdf5)
    try:
        found = reader(path)
        tiles = {
            name: TileArray(path, rows, _labels(path, name, found))
            for name, rows in found.items()
            if _holds_tiles(name, rows.shape)
        }
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, FileNotFoundError | UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no complete file of arrays ({reason}); write it again") from None
    for name, rows in () if tiles else found.items():
        raise UserError(
            f"{path}: shape {rows.shape}{name and f' of {name}'} must be (tiles, height, width, 3)"
        )
    parts = [re.sub(r"_?(images|x)_?", "", name.replace("/", "_")) for name in tiles]
    names = parts if len(set(parts)) == len(parts) else list(tiles)
    return dict(zip(names, tiles.values(), strict=True))


def _holds_tiles(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array holds tiles in colour; or grey ones, which only its name can tell."""
    return 0 not in shape and (shape[3:] == (3,) or (len(shape) == 3 and "images" in name))


def _labels(path: str, name: str, found: dict[str, Any]) -> Any:
    """The labels of the tiles `name`: train_labels of train_images, y of x, types of PanNuke."""
    beside = Path(path).with_name(TYPES)
    if not name:
        return _numpy(str(beside))[""] if beside.is_file() else None
    label = re.sub(r"(?<![a-z])x(?![a-z])", "y", name.replace("images", "labels"))
    if label != name and label in found:
        return found[label][:]
    beside = Path(re.sub(r"_x(?=\.\w+$)", "_y", path))
    if str(beside) != path and beside.is_file():
        return next(iter(_hdf5(str(beside)).values()), None)
    return None


def _numpy(path: str) -> dict[str, Any]:
    try:
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path}: pickled arrays are not read; save it again as numbers or text, or remove"
                " it"
            ) from None
        raise


def _hdf5(path: str) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}
    h5py.File(path, "r").visititems(
        lambda name, node: found.update({name: node} if isinstance(node, h5py.Dataset) else {})
    )
    return found


def _zipped(path: str) -> dict[str, Any]:
    """The arrays of a .npz file: those of tiles row by row, others as they are."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            with archive.open(member) as stream:
                first = np.lib.format.read_magic(stream) == (1, 0)
                read = f"read_array_header_{1 if first else 2}_0"
                shape, fortran, dtype = getattr(np.lib.format, read)(stream)
                header = stream.tell()
            if dtype.hasobject or fortran:
                continue  # pickled, or not in rows
            # The local header ends with a name and extra bytes of its own lengths.
            file.seek(member.header_offset + 26)
            start = file.tell() + 4 + sum(np.frombuffer(file.read(4), "<u2").tolist())
            name = member.filename.removesuffix(".npy")
            if member.compress_type == zipfile.ZIP_STORED:
                found[name] = np.memmap(path, dtype, "r", start + header, shape)
            elif member.compress_type == zipfile.ZIP_DEFLATED:
                found[name] = _Deflated(path, start, member, header, shape, dtype)
    return found


class _Deflated:
    """The rows of a compressed array in a .npz file.

    A compressed stream can be read from its beginning only, or from a place where the state of the
    decompressor is known. States are kept at places spread over the stream, once it is read so far.
    """

    def __init__(self, path: str, start: int, member: Any, header: int, shape: tuple, dtype: Any):
        self.path, self.shape, self.dtype = path, shape, dtype
        self._header = header  # bytes before the first row
        self._every = max(1 << 20, member.file_size // STATES)
        self._checksum = member.CRC
        # (inflated bytes, their checksum, place in the file, decompressor) before a chunk.
        self._states = [(0, 0, start, zlib.decompressobj(-zlib.MAX_WBITS))]
        self._last = self._states[0]  # of the chunk that was read last
        self._lock = Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Row `key`, or all rows for a slice."""
        whole = isinstance(key, slice)
        shape = self.shape if whole else self.shape[1:]
        size = self.dtype.itemsize * int(np.prod(shape))
        first = self._header + (0 if whole else int(key) * size)
        return np.frombuffer(self._read(first, first + size), self.dtype).reshape(shape)

    def _read(self, first: int, end: int) -> bytes:
        """These inflated bytes; UserError where the file is damaged."""
        with self._lock, open(self.path, "rb") as file:
            known = (state for state in (*self._states, self._last) if state[0] <= first)
            at, checksum, place, inflate = max(known, key=lambda state: state[0])
            inflate = inflate.copy()
            parts = []
            file.seek(place)
            while at < end:
                self._last = (at, checksum, place, inflate.copy())
                if at >= self._states[-1][0] + self._every:
                    self._states.append(self._last)
                chunk = file.read(CHUNK)
                try:
                    inflated = inflate.decompress(chunk)
                except zlib.error:
                    chunk = inflated = b""
                checksum = zlib.crc32(inflated, checksum)
                cut = at + len(inflated) < end or checksum != self._checksum
                if not chunk or (inflate.eof and cut):
                    raise UserError(f"{self.path} is damaged or cut short; restore it")
                parts.append(inflated[max(0, first - at) : end - at])
                at, place = at + len(inflated), place + len(chunk)
        return b"".join(parts)
