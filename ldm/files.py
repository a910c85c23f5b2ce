"""How files and folders reach the disk: written completely or not at all, with their digests.

A file is written under a hidden temporary name beside its target and renamed, since a rename is
atomic only within one file system. It is flushed to the disk before the rename, so that a machine
that loses power keeps either the old file or the new one. Temporary files are created by
`os.open` with mode 0o666 and folders by `os.mkdir`, so the kernel applies the user's umask; reading
the umask with `os.umask` would change it for every thread of the process for a moment.

Names of folders that come out of files (classes) are checked here as well, see
`require_class_names`: checkpoints and tables are passed around between groups, and none may make a
command write elsewhere than it was told.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ldm.errors import NoRoom, UserError

_PACKAGE = Path(__file__).resolve().parent
# Folder of the repository; None where the package is installed without it.
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "workflow" / "Snakefile").is_file() else None
ROOT = CHECKOUT or _PACKAGE  # folder of configs/ and workflow/

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

# What the operating system reports of a disk, a quota or a file size limit that is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of places that cannot be written, or whose file system knows no locks.
UNLOCKABLE = (errno.EACCES, errno.EROFS, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Names that `temporary_path` makes, and those of earlier versions: ".last.ckpt.a8b_c9de" (by
# Python's tempfile), ".000000.png.part", ".shard-000000.tar.part" and ".tiles.json.part".
_TEMPORARY = re.compile(
    r"\..+\.(?:[0-9a-f]{16}\.part"
    r"|(?:ckpt|csv|json|jsonl|md|parquet|png|safetensors|tar)\.[a-z0-9_]{8}"
    r"|(?:json|png|tar)\.part)"
)

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # categories of Unicode
_LONGEST_NAME = 200  # bytes; file systems take 255, with what is put before and after it


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

    Missing folders are made. What was at `path` before stays there until then. A full disk is
    NoRoom.
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
            raise _disk_full(path, cause, _kept(path)) from None
        if recorded and recorded.error:
            raise recorded.error from None
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to fill that appears at `path`, new or empty, after the block."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _disk_full(path, error) from None
        raise


def _disk_full(path: Path, error: OSError, kept: str = "") -> NoRoom:
    """The one line about a disk on which `path` finds no room."""
    return NoRoom(
        f"{path} cannot be written ({os.strerror(error.errno)}, {free_space(path):,} bytes are free"
        f" there); {kept}make room and repeat the command"
    )


class Journal:
    """A file of JSON lines to which work is added as it is finished.

    A process that is killed, or a disk that is full, costs the last line at most: what is left of
    one is cut off before the next is written. Use it as a context manager.

    Args:
        path: The file; it is made where it is missing. One process may write to it at a time.

    Raises:
        NoRoom: The disk, or the quota on it, is full; here and in `add`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise (_disk_full(path, error) if error.errno in FULL else error) from None
        self._file.truncate(sum(map(len, _whole_lines(path))))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, entry: Any) -> None:
        """Add an entry, anything that JSON can hold, as one line."""
        line = (json.dumps(entry) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is nearly full takes a part, and says so at the next write
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            raise (_disk_full(self.path, error) if error.errno in FULL else error) from None


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without a last one that has no end."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def read_journal(path: Path, take: Callable[[Any], None]) -> None:
    """Hand each entry of a journal to `take`.

    A last line without its end is left out: its writer was killed. So is an earlier one that is
    damaged (it is no JSON, or `take` raises a KeyError, TypeError, ValueError or AttributeError);
    a warning names it. What a line listed is not known to be finished then, and is made again.
    """
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            if line.strip():
                take(json.loads(line))
        except (KeyError, TypeError, ValueError, AttributeError):
            log.warning("%s: line %d is damaged; what it listed is made again", path, number)


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


def remove_leftovers(*targets: Path) -> list[Path]:
    """Delete what killed processes left unfinished of files and folders; returns the paths.

    That is what would have become a target, beside it, and everything unfinished directly in
    one that is a folder. Call it only where no other process can be writing to the targets.
    """
    found = []
    for target in map(Path.absolute, targets):
        if target.is_dir():
            found += [path for path in target.iterdir() if is_temporary(path)]
        if target.parent.is_dir():
            own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.part")
            found += [path for path in target.parent.iterdir() if own.fullmatch(path.name)]
    for path in found:
        remove(path, ignore_errors=True)
    return found


@contextmanager
def lock_file(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Lock a file; yields its descriptor, or None without the lock.

    That is where another process has it and `wait` is False, or where it is True and the place
    cannot be written or knows no locks, such as Lustre mounted without them.
    """
    file = _locked(path, wait)
    if file is None:
        yield None
        return
    with file:
        try:
            yield file.fileno()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _locked(path: Path, wait: bool) -> IO | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.close()
            raise
    except BlockingIOError:
        return None
    except OSError as error:
        if wait and error.errno in UNLOCKABLE:
            return None
        raise
    return file


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Delete a file, a link or a folder, if it is there; `ignore_errors` of a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is the folder or below it, wherever links lead."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def require_outside(
    targets: Mapping[str, Path | None], sources: Mapping[str, Path | Sequence[Path] | None]
) -> None:
    """Check that nothing is made in a folder of tiles, where it would count as a class or a tile.

    Targets are what a command writes, by option, None where not given; sources are what it
    reads, or what else it writes. A target that is a source, or lies in one, is a UserError.
    """
    for name, target in targets.items():
        for other, found in sources.items():
            for folder in [found] if isinstance(found, Path) else found or ():
                if target and lies_in(target, folder):
                    raise UserError(
                        f"{name} {target}: lies in {other} {folder}; give a place outside it"
                    )


def require_class_names(names: Any, where: str) -> None:
    """Check that names that a file or folder has can be those of folders.

    A UserError says that they are no list of distinct names, or that one is empty, too long,
    hidden, has a separator of paths (so it would lie elsewhere) or a control character.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: classes={str(names)[:60]!r} must be a list of names")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: classes={names} must differ from one another; rename some")
    for name in names:
        kinds = {unicodedata.category(character) for character in name}
        # Control characters, halves of characters (bytes that are no UTF-8), ends of lines.
        wrong = not name or name.startswith(".") or {"/", "\\"} & set(name) or kinds & _UNPRINTABLE
        if wrong or len(os.fsencode(name)) > _LONGEST_NAME:
            raise UserError(
                f"{where}: class name {name[:60]!r} cannot name a folder; a class name has 1 to"
                f" {_LONGEST_NAME} bytes, does not begin with a dot, and has no slash, backslash or"
                " control character"
            )


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
    """Raise NoRoom unless `size` bytes fit on the disk of `path` beside what is there."""
    path, free = Path(path), free_space(path)
    if free < size:
        raise NoRoom(
            f"{what}: {path} needs {size / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free; "
            f"{_kept(path)}make room, or choose another place"
        )


def _kept(path: Path) -> str:
    return "the one before it is untouched: " if path.is_file() else ""
