"""Folders of copies of tiles, or of links to them, made completely or not at all."""

import csv
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ldm.data.arrays import file_of
from ldm.data.images import read_tile
from ldm.errors import UserError
from ldm.files import atomic_folder, write_png, write_text
from ldm.progress import FIRST_SIGN, Bar

# Of a training folder: where its decisions and settings are, and how its added tiles are named.
DECISIONS, RECORD = "selection.csv", "selection.json"
PREFIX, PSEUDO = "synthetic_", "pseudo_"  # real tiles keep their names
# Names of folders whose tiles are for measuring: what is made of them must not be trained on.
HELD_OUT = ("val", "valid", "validation", "test", "testing", "holdout", "held_out")

# What the operating system says where it has no such links.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)


def refuse_held_out(root: Path, option: str) -> None:
    """UserError when a folder that tiles are trained from is named as one for measuring."""
    if root.resolve().name.lower() in HELD_OUT:
        raise UserError(
            f"{option} {root}: the folder's name says that its tiles are for measuring; what is"
            " made of them would leak into training: give training tiles"
        )


def manifest_column(root: Path, column: str) -> dict[str, str]:
    """What ROOT/manifest.csv of sample_diffusion.py says of each file in a column, if anything."""
    try:
        with (root / "manifest.csv").open(newline="", encoding="utf-8", errors="replace") as stream:
            rows = list(csv.DictReader(stream))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {row["file"]: row[column] for row in rows if row.get(column) and "file" in row}


def build_folder(
    out: Path, files: Mapping[str, Path], notes: Mapping[str, str], link: str = "copy"
) -> None:
    """Make a folder of copies of files, or of links to them; rows of arrays become PNG files.

    It is built under a hidden name beside `out` and renamed, so `out` is complete or not there.

    Args:
        out: New, or an empty folder.
        files: Where each file comes from, by its path in `out`.
        notes: Text files to write beside them: content by path in `out`.
        link: "copy", "hard" or "symbolic" (to absolute paths).
    """
    put = {"copy": shutil.copyfile, "hard": os.link, "symbolic": os.symlink}[link]
    with atomic_folder(out) as partial:
        options = {"unit": "file", "delay": FIRST_SIGN, "leave": False}
        for target, source in Bar(files.items(), out.name, **options):
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            if file_of(source) != source:  # a row of an array
                write_png(partial / target, read_tile(source))
                continue
            try:
                put(source.absolute(), partial / target)
            except OSError as error:
                if link == "copy" or error.errno not in _NO_LINKS:
                    raise
                raise UserError(
                    f"link={link}: {source} cannot be linked from {out} ({error.strerror}); use"
                    " link=copy"
                ) from None
        for name, text in notes.items():
            write_text(partial / name, text)
