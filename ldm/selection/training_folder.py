"""A training folder of labelled real tiles and chosen synthetic ones, for eval.py."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from ldm.data import folders
from ldm.data.folders import DECISIONS, PREFIX, PSEUDO, RECORD
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.selection.select import KINDS, REMOVED, Selection


def placed(name: str, pseudo_class: str | None = None) -> str:
    """Where a tile is in a training folder.

    Args:
        name: Path of a synthetic tile CLASS/NAME, or of an unlabelled one.
        pseudo_class: The class that an unlabelled tile is used for.
    """
    if pseudo_class is not None:
        return f"{pseudo_class}/{PSEUDO}{name.replace('/', '_')}"
    parent, file = os.path.split(name)
    return f"{parent}/{PREFIX}{file}"


def build_training_folder(
    out: Path,
    real: TileFiles,
    candidates: Path,
    selection: Selection,
    record: dict[str, Any],
    link: str = "copy",
    pseudo: bool = False,
) -> None:
    """Make OUT/CLASS/: all real tiles, and the accepted (and filled) images as `synthetic_NAME`.

    `out` is whole or not there. Every decision is in OUT/selection.csv, `record` in
    OUT/selection.json.

    Args:
        real: Labelled tiles.
        candidates: Folder that the decisions' files are below.
        link: "copy", "hard" or "symbolic" (to absolute paths).
        pseudo: They are unlabelled tiles, in folders of any depth, which become
            `pseudo_FOLDER_NAME`.
    """
    files: dict[str, Path] = dict(zip(real.names, real.paths, strict=True))
    for name in selection.classes:
        for path in selection.used(name):
            target = placed(path, name if pseudo else None)
            if target in files:
                raise UserError(
                    f"two files would be {target} in {out}; give a folder of real tiles alone, and"
                    " candidates whose names differ"
                )
            files[target] = candidates / path

    notes = {DECISIONS: selection.to_csv(), RECORD: json.dumps(record, indent=2) + "\n"}
    folders.build_folder(out, files, notes, link)


def read_decisions(path: Path, what: str) -> dict[str, str]:
    """Decision of each synthetic image, by its path below the synthetic folder.

    Args:
        path: A training folder or its selection.csv.
        what: How error messages call it.
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
    known = [*KINDS, REMOVED]
    unknown = sorted(set(decisions.values()) - set(known))
    if unknown:
        raise UserError(f"{what}: {file} has decisions {unknown}; known are {known}")
    return decisions
