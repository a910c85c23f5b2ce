"""A training folder of labelled real tiles and chosen synthetic ones, for eval.py."""

import csv
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.run import write_json, write_text
from ldm.selection.select import KINDS, Selection

PREFIX = "synthetic_"  # of file names; real tiles keep theirs
LINKS = ("copy", "hard", "symbolic")
DECISIONS, RECORD = "selection.csv", "selection.json"


def same_folder_exists(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` was made with the same settings already; False when it can be made.

    Raises:
        UserError: There is something else at `out`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        known = json.loads((out / RECORD).read_text())["settings"]
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


def build_training_folder(
    out: Path,
    real: TileFolder,
    synthetic: Path,
    selection: Selection,
    record: dict[str, Any],
    link: str = "copy",
) -> None:
    """Make OUT/CLASS/: all real tiles, and the accepted (and filled) images as `synthetic_NAME`.

    It is built under a hidden name beside `out` and renamed, so `out` is whole or not there. Every
    decision is in OUT/selection.csv, `record` in OUT/selection.json.

    Args:
        real: Labelled tiles.
        synthetic: Folder that the decisions' files are below.
        link: "copy", "hard" or "symbolic" (to absolute paths).

    Raises:
        UserError: Two files would have one name, or the file system has no such links.
    """
    put = {"copy": shutil.copyfile, "hard": _hard_link, "symbolic": _symbolic_link}[link]
    files: dict[str, Path] = dict(zip(real.relative_paths, real.paths, strict=True))
    for name in selection.classes:
        for path in selection.used(name):
            parent, file = os.path.split(path)
            target = f"{parent}/{PREFIX}{file}"
            if target in files:
                raise UserError(
                    f"--real has a file {target} already, the name of a synthetic image; give the"
                    " folder of real tiles alone"
                )
            files[target] = synthetic / path

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for target, source in files.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            put(source, partial / target)
        write_text(partial / DECISIONS, selection.to_csv())
        write_json(partial / RECORD, record)
        # mkdtemp makes folders private; a data set should get the permissions of any other.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_decisions(path: Path, what: str) -> dict[str, str]:
    """Decision of each synthetic image, by its path below the synthetic folder.

    Args:
        path: A training folder or its selection.csv.
        what: How error messages call it.

    Raises:
        UserError: No such file, or not one of ours.
    """
    file = path / DECISIONS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{what}: no file {file}; give a training folder that scripts/distance.py made, or its"
            f" {DECISIONS}"
        )
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        reader = csv.DictReader(stream)
        if not {"file", "decision"} <= set(reader.fieldnames or ()):
            raise UserError(f"{what}: {file} has no columns file and decision")
        decisions = {row["file"]: row["decision"] for row in reader}
    unknown = sorted(set(decisions.values()) - set(KINDS))
    if unknown:
        raise UserError(f"{what}: {file} has decisions {unknown}; known are {list(KINDS)}")
    return decisions


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
