"""A training folder without the synthetic tiles that a copy check flagged."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ldm.data.folders import DECISIONS, RECORD
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.files import atomic_folder, file_sha256, write_csv, write_json
from ldm.run import MadeFolder
from ldm.selection.select import REMOVED
from ldm.selection.training_folder import placed


class Removal:
    """Makes a copy of a training folder without the tiles that a copy check flags.

    Args:
        root: A folder that scripts/distance.py made.
        out: The folder to be made.
        synthetic: The tiles that are checked; those of the training folder must be among them.
        settings: What is checked and how; they are added to those of the folder.

    Attributes:
        is_made: Whether `out` is there already, made so.
    """

    def __init__(self, root: str, out: str, synthetic: TileFiles, settings: dict[str, Any]):
        self.root, self.out = Path(root).expanduser(), Path(out).expanduser()
        self.columns, self.rows, self.record = _read(self.root)
        files = {row["file"]: self.root / placed(row["file"]) for row in self.rows}
        self.used = {name: path for name, path in files.items() if path.is_file()}
        digests = dict(zip(synthetic.names, synthetic.digests, strict=True))
        for name, path in self.used.items():
            if digests.get(name) != file_sha256(path):
                raise UserError(
                    f"`remove` {root}: its tile {placed(name)} is not {name} of `synthetic`; check"
                    " the synthetic folder that it was chosen from"
                )
        self.settings = {**self.record["settings"], "copy_check": settings}
        self.is_made = MadeFolder(self.out, self.settings, RECORD, name="removed_to").exists()

    def remove(self, reasons: dict[str, str]) -> int:
        """Make the folder, and return how many tiles it lacks.

        Their decision becomes `removed`, and the counts follow. `out` is built under a hidden name
        and renamed, so it is complete or not there; symbolic links stay links.

        Args:
            reasons: Why, by name, of the flagged tiles.
        """
        removed = {name: path for name, path in self.used.items() if name in reasons}
        rows, counts = [], {name: dict(row) for name, row in self.record["counts"].items()}
        change: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            if row["file"] in removed:
                change[row["class"], row["decision"]] += 1
                row = {**row, "decision": REMOVED, "reason": f"copy check: {reasons[row['file']]}"}
            rows.append(row)
        for (name, decision), number in change.items():
            counts[name][decision] -= number
            counts[name][REMOVED] = counts[name].get(REMOVED, 0) + number
            if decision == "accepted":
                counts[name]["shortfall"] += number
        gone = {path.resolve() for path in removed.values()}

        def without(parent: str, names: list[str]) -> list[str]:
            inside = Path(parent).resolve()
            return [name for name in names if inside / name in gone]

        with atomic_folder(self.out) as partial:
            shutil.copytree(self.root, partial, symlinks=True, ignore=without, dirs_exist_ok=True)
            write_csv(partial / DECISIONS, rows, self.columns)
            record = {**self.record, "settings": self.settings, "counts": counts}
            write_json(partial / RECORD, record)
        return len(removed)


def _read(root: Path) -> tuple[list[str], list[dict[str, str]], dict[str, Any]]:
    """Columns and rows of the decisions in a training folder, and its record."""
    try:
        record = json.loads((root / RECORD).read_text())
        with (root / DECISIONS).open(newline="") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error):
        record, rows, columns = {}, [], []
    right = {"class", "file", "decision", "reason"} <= set(columns)
    if not right or not isinstance(record, dict) or not {"settings", "counts"} <= set(record):
        raise UserError(
            f"`remove` {root}: no training folder of scripts/distance.py ({DECISIONS} and {RECORD}"
            " with settings and counts are missing or damaged)"
        )
    return columns, rows, record
