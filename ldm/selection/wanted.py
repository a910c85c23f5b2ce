"""A selection as a whole: from the features of a judge to a training folder and its record."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.folders import RECORD
from ldm.data.tile_files import TileFiles
from ldm.features.centroids import centroid_distances
from ldm.features.extractor import Extractor
from ldm.run import MadeFolder, provenance
from ldm.selection.judge import Judged, conflicts
from ldm.selection.select import Selection, select
from ldm.selection.sheets import Sheets, sheet_path
from ldm.selection.strategies import Choice, Strategy
from ldm.selection.training_folder import build_training_folder


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
    distances = centroid_distances(synthetic.values, judged.centroids.values)
    strategy = choice.make(synthetic, judged.real, distances, candidates_root, p)
    known = None if p is None else p.numpy()
    return strategy, select(strategy, synthetic, distances.numpy(), wanted, fill, known)


@dataclass(frozen=True)
class WantedFolder:
    """A training folder that is wanted.

    Attributes:
        out: The folder.
        real: Its labelled real tiles.
        candidates_root: Folder of the tiles that are chosen among.
        pseudo: These are unlabelled ones, which have their classes from the judge.
        judged: Features of both.
        choice: The strategy.
        wanted: Most images to use, by class.
        ratio: Percent of the real tiles that `wanted` was found from, for the record.
        fill: Use the best of the rejected images where candidates are too few.
        link: See `build_training_folder`.
    """

    out: Path
    real: TileFiles
    candidates_root: Path
    pseudo: bool
    judged: Judged
    choice: Choice
    wanted: Sequence[int]
    ratio: int | None
    fill: bool
    link: str

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
        Sheets(
            selection,
            self.judged.synthetic,
            self.judged.real,
            self.candidates_root,
            self.real.root,
            strategy.score,
        ).write(sheets)

    def make(self, downstream: Extractor | None) -> dict[str, Any]:
        """Make the folder.

        Args:
            downstream: The model that the images are for, where it is known.

        Returns:
            Its record: settings, `counts` (see `Selection.counts`), the judge with its `agreement`
            with the wanted classes and its scores on `val`, and `warnings` of judges that are no
            good witnesses.
        """
        _, selection = self._decided
        counts = selection.counts()
        facts, warnings = conflicts(self.judged, self.real, downstream)
        if self.judged.judge is not None:
            # Unlabelled tiles have their classes from the judge itself.
            agreement = None if self.pseudo else selection.agreement()
            facts["judge"] |= {"agreement": agreement, "val": self.judged.val}
            facts["judge"]["left_out"] = self.judged.left_out
        record = {
            "settings": self.settings,
            "counts": counts,
            **facts,
            "warnings": warnings,
            **provenance(),
        }
        build_training_folder(
            self.out, self.real, self.candidates_root, selection, record, self.link, self.pseudo
        )
        return record
