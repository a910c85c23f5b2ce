"""Folders of copies of tiles, or of links to them, made completely or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ldm.errors import UserError
from ldm.files import atomic_folder, write_text

LINKS = ("copy", "hard", "symbolic")


def build_folder(
    out: Path, files: Mapping[str, Path], notes: Mapping[str, str], link: str = "copy"
) -> None:
    """Make a folder of copies of files, or of links to them.

    It is built under a hidden name beside `out` and renamed, so `out` is complete or not there.

    Args:
        out: New, or an empty folder.
        files: Where each file comes from, by its path in `out`.
        notes: Text files to write beside them: content by path in `out`.
        link: "copy", "hard" or "symbolic" (to absolute paths).

    Raises:
        UserError: The file system has no such links.
    """
    put = {"copy": shutil.copyfile, "hard": _hard_link, "symbolic": _symbolic_link}[link]
    with atomic_folder(out) as partial:
        for target, source in files.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            put(source, partial / target)
        for name, text in notes.items():
            write_text(partial / name, text)


def _hard_link(source: Path, target: Path) -> None:
    _link(os.link, source, target, "hard")


def _symbolic_link(source: Path, target: Path) -> None:
    _link(os.symlink, source.absolute(), target, "symbolic")


def _link(make: Callable[[Path, Path], None], source: Path, target: Path, kind: str) -> None:
    try:
        make(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise UserError(
                f"link={kind}: {source} cannot be linked from {target.parent} ({error.strerror});"
                " use link=copy"
            ) from None
        raise
