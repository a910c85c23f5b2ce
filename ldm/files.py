"""How files and folders reach the disk: written completely or not at all, with their digests.

A file is written under a hidden temporary name beside its target and renamed, since a rename is
atomic only within one file system. It is flushed to the disk before the rename, so that a machine
that loses power keeps either the old file or the new one. Temporary files are created by
`os.open` with mode 0o666 and folders by `os.mkdir`, so the kernel applies the user's umask; reading
the umask with `os.umask` would change it for every thread of the process for a moment.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# What the operating system reports of a disk, a quota or a file size limit that is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Names that `temporary_path` makes, and those of earlier versions: ".last.ckpt.a8b_c9de" (by
# Python's tempfile), ".000000.png.part", ".shard-000000.tar.part" and ".tiles.json.part".
_TEMPORARY = re.compile(
    r"\..+\.(?:[0-9a-f]{16}\.part"
    r"|(?:ckpt|csv|json|jsonl|md|parquet|png|safetensors|tar)\.[a-z0-9_]{8}"
    r"|(?:json|png|tar)\.part)"
)


def temporary_path(target: Path) -> Path:
    """A hidden name beside `target` that no other process uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


class _Recorded:
    """A binary file that keeps its first write error, which `torch.save` replaces by its own."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, block) -> int:
        try:
            return self._file.write(block)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears at `path` when the block ends without an error.

    Missing folders are made. What was at `path` before stays there until then.

    Raises:
        UserError: The disk, or the quota on it, is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    recorded = None
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            recorded = _Recorded(file)
            yield recorded
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = (recorded and recorded.error) or error
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise UserError(
                f"{path} cannot be written ({os.strerror(cause.errno)}, {free_space(path):,} bytes "
                f"are free there); {_kept(path)}make room and repeat the command"
            ) from None
        if recorded and recorded.error:
            raise recorded.error from None
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder that appears at `path` when the block ends without an error.

    Yields:
        The temporary folder to fill, beside `path`. `path` must be new, or an empty folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file atomically, see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file atomically, indented by two spaces, with a newline at its end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A CSV: a header line, then a line for each row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(
    path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """Write a CSV file atomically, see `csv_text`."""
    write_text(path, csv_text(rows, columns))


def write_png(path: str | os.PathLike, image: "np.ndarray") -> None:
    """Write an image, uint8 (H, W) or (H, W, 3), as a PNG file atomically."""
    from PIL import Image

    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="png")


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of a file or folder that is being written, see `atomic_file`."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete temporary files and folders that a killed process left directly in `folder`.

    Call it only where no other process can be writing to the folder.

    Returns:
        The paths that were deleted.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_temporary(path)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(facts: Any) -> str:
    """SHA-256 of facts that JSON can hold, hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of_text(parts: Iterable[str]) -> str:
    """SHA-256 of texts that follow each other, as UTF-8, hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def free_space(path: str | os.PathLike) -> int:
    """Bytes that can still be written to the disk of `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: str | os.PathLike, size: int, what: str = "checkpoint") -> None:
    """Check that a file of `size` bytes fits on the disk of `path` beside what is there.

    Raises:
        UserError: There is too little room.
    """
    path, free = Path(path), free_space(path)
    if free < size:
        raise UserError(
            f"{what}: {path} needs {size / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free; "
            f"{_kept(path)}make room, or choose another place"
        )


def _kept(path: Path) -> str:
    return "the one before it is untouched: " if path.is_file() else ""
