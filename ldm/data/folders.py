"""Folders that commands make of tiles: whole or not at all, with a record of their settings."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import atomic_folder, write_text

LINKS = ("copy", "hard", "symbolic")


def same_folder_exists(out: Path, settings: dict[str, Any], record: str) -> bool:
    """Whether `out` was made with the same settings already; False when it can be made.

    Args:
        record: Name of the JSON file in `out` whose "settings" say how it was made.

    Raises:
        UserError: There is something else at `out`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        known = json.loads((out / record).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--out {out}: exists and was not made by this command; give a new folder"
        ) from None
    changed = [
        f"{key} {known.get(key)} there, {settings.get(key)} now"
        for key in sorted(known.keys() | settings.keys())
        if known.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"--out {out}: was made with other settings ({'; '.join(changed)}); give another folder"
            " or remove it"
        )
    return True


def build_folder(
    out: Path, files: Mapping[str, Path], notes: Mapping[str, str], link: str = "copy"
) -> None:
    """Make a folder of copies of files, or of links to them.

    It is built under a hidden name beside `out` and renamed, so `out` is whole or not there.

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
                f"--link {kind}: {source} cannot be linked from {target.parent} ({error.strerror});"
                " use --link copy"
            ) from None
        raise
