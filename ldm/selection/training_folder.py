"""A training folder of labelled real tiles and chosen ones, for eval.py, and its record."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.folders import DECISIONS, PREFIX, PSEUDO, RECORD, build_folder
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.features.extractor import Extractor
from ldm.features.neighbours import centroid_distances
from ldm.run import MadeFolder, provenance
from ldm.selection.judge import Judged, conflicts
from ldm.selection.select import KINDS, REMOVED, Selection, select
from ldm.selection.sheets import Sheets, sheet_path
from ldm.selection.strategies import Choice, Strategy


def placed(name: str, pseudo_class: str | None = None) -> str:
    """Where a tile is in a training folder: CLASS/synthetic_NAME, or CLASS/pseudo_FOLDER_NAME.

    Args:
        name: Path of a synthetic tile CLASS/NAME, or of an unlabelled one.
        pseudo_class: The class that an unlabelled tile is used for.
    """
    if pseudo_class is not None:
        return f"{pseudo_class}/{PSEUDO}{name.replace('/', '_')}"
    parent, file = os.path.split(name)
    return f"{parent}/{PREFIX}{file}"


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


def decide(
    judged: Judged,
    choice: Choice,
    wanted: Sequence[int],
    fill: bool = False,
    candidates_root: Path = Path(),
) -> tuple[Strategy, Selection]:
    """The strategy for the synthetic tiles of `judged`, and its decisions on all of them.

    Args:
        wanted, fill, candidates_root: See `WantedFolder`.
    """
    synthetic, p = judged.synthetic, judged.probabilities
    distances = centroid_distances(synthetic.values, judged.real.centroids)
    strategy = choice.make(synthetic, judged.real, distances, candidates_root, p)
    known = None if p is None else p.numpy()
    return strategy, select(strategy, synthetic, distances.numpy(), wanted, fill, known)


@dataclass(frozen=True)
class WantedFolder:
    """A training folder that is wanted."""

    out: Path
    real: TileFiles  # its labelled real tiles
    candidates_root: Path  # folder of the tiles that are chosen among
    pseudo: bool  # these are unlabelled ones, which have their classes from the judge
    judged: Judged  # features of both
    choice: Choice
    wanted: Sequence[int]  # most images to use, by class
    ratio: int | None  # percent of the real tiles that `wanted` was found from, for the record
    fill: bool  # use the best of the rejected images where candidates are too few
    link: str  # "copy", "hard" or "symbolic" (to absolute paths)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the content of the folder."""
        judge = self.judged.judge
        further = {
            name: getattr(judge, name)
            for name in ("calibrated_on", "spread_over")
            if judge is not None and getattr(judge, name) is not None
        }
        return {
            **self.choice.settings(),
            "fill": self.fill,
            "ratio": self.ratio,
            "wanted": self.wanted,
            "classes": self.real.classes,
            "extractor": self.judged.real.extractor,
            "centroid_tiles": self.judged.real.tiles,
            "real_tiles": self.real.digest,
            f"{'unlabelled' if self.pseudo else 'synthetic'}_tiles": self.judged.synthetic.tiles,
            "link": self.link,
            **further,
        }

    def is_made(self) -> bool:
        """Whether the folder is there; UserError where something else is there."""
        return MadeFolder(self.out, self.settings, RECORD).exists()

    def has_sheets(self, sheets: Path) -> bool:
        """Whether there is a contact sheet of each class."""
        return all(sheet_path(sheets, name).is_file() for name in self.real.classes)

    @cached_property
    def _decided(self) -> tuple[Strategy, Selection]:
        return decide(self.judged, self.choice, self.wanted, self.fill, self.candidates_root)

    def draw_sheets(self, sheets: Path) -> None:
        """Write a contact sheet of each class."""
        strategy, selection = self._decided
        sets, roots = (
            (self.judged.synthetic, self.judged.real),
            (self.candidates_root, self.real.root),
        )
        Sheets(selection, *sets, *roots, strategy.score).write(sheets)

    def make(self, downstream: Extractor | None) -> dict[str, Any]:
        """Make OUT/CLASS/: all real tiles, and the accepted (and filled) ones, see `placed`.

        `out` is complete or not there. Every decision is in OUT/selection.csv.

        Args:
            downstream: The model that the images are for, where it is known.

        Returns:
            The content of OUT/selection.json: settings, `counts` (see `Selection.counts`), the
            judge with its `agreement` with the wanted classes and its scores on `val`, and
            `warnings` of judges that are no good witnesses.
        """
        _, selection = self._decided
        facts, warnings = conflicts(self.judged, self.real, downstream)
        if self.judged.judge is not None:
            # Unlabelled tiles have their classes from the judge itself.
            agreement = None if self.pseudo else selection.agreement()
            facts["judge"] |= {"agreement": agreement, "val": self.judged.val}
            facts["judge"]["left_out"] = self.judged.left_out
        record = {"settings": self.settings, "counts": selection.counts(), **facts}
        record |= {"warnings": warnings, **provenance()}
        files: dict[str, Path] = dict(zip(self.real.names, self.real.paths, strict=True))
        for name in selection.classes:
            for path in selection.used(name):
                target = placed(path, name if self.pseudo else None)
                if target in files:
                    raise UserError(
                        f"two files would be {target} in {self.out}; give a folder of real tiles"
                        " alone, and candidates whose names differ"
                    )
                files[target] = self.candidates_root / path
        notes = {DECISIONS: selection.to_csv(), RECORD: json.dumps(record, indent=2) + "\n"}
        build_folder(self.out, files, notes, self.link)
        return record
