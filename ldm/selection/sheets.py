"""Contact sheets: what a selection took and what it left, beside the nearest real tiles."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.tiles import read_tile
from ldm.features.neighbours import nearest
from ldm.features.sets import FeatureSet
from ldm.files import remove_leftovers, write_bytes
from ldm.report.grids import Card, card_sheet, shorten
from ldm.selection.select import ACCEPTED, FILL_REASON, FILLED, REJECTED, SURPLUS, USED, Selection

COLUMNS = 8
TILE = 112  # pixels
CAPTION_WIDTH = 17  # characters below a tile
CAPTION_LINES = 4  # at most
# Told apart by people with any colour vision (Okabe and Ito).
COLOURS = {
    ACCEPTED: (0, 158, 115),
    FILLED: (204, 121, 167),
    SURPLUS: (86, 180, 233),
    REJECTED: (213, 94, 0),
}


@dataclass(frozen=True)
class Sheets:
    """Draws the sheets of a selection."""

    selection: Selection
    synthetic: FeatureSet
    real: FeatureSet
    synthetic_root: Path
    real_root: Path
    score: str | None  # what the score is, in words

    def write(self, folder: Path) -> None:
        """FOLDER/CLASS.png for every class."""
        remove_leftovers(folder)
        for name in self.selection.classes:
            write_bytes(sheet_path(folder, name), self.draw(name))

    def sections(self, name: str) -> dict[str, list[int]]:
        """Rows of the selection that are shown of a class, by heading; none is shown twice."""
        of_class = self.selection.of_class
        used = of_class(name, *USED)
        rejected = of_class(name, REJECTED)
        missed = [*of_class(name, SURPLUS), *rejected]
        last = used[COLUMNS:][-COLUMNS // 2 :]
        border = [*last, *missed[: COLUMNS - len(last)]]
        found = {
            "used, the best first": used[:COLUMNS],
            "at the border: the last that are used, the first that are not": border,
            "rejected, the worst first": [i for i in rejected if i not in border][
                : -COLUMNS - 1 : -1
            ],
        }
        return {heading: rows for heading, rows in found.items() if rows}

    def draw(self, name: str) -> bytes:
        """The sheet of a class, as PNG."""
        legend = f"score: {self.score}; " if self.score else ""
        legend += "below each image: the nearest real tile of any class, with the distance"
        judge = self.synthetic.network or self.synthetic.extractor[:12]
        rows = []
        for heading, shown in self.sections(name).items():
            found = zip(*self._neighbours(shown), strict=True)
            rows.append((heading, [self._card(i) for i in shown]))
            rows.append(("", [self._real_card(*one) for one in found]))
        return card_sheet([self._title(name), legend, f"features: {judge}"], rows, TILE, COLUMNS)

    def _card(self, i: int) -> Card:
        """An image with its decision and score, its file, and why it is not used."""
        decision, score = self.selection.decisions[i], self.selection.scores[i]
        file = self.selection.files[i]
        first = decision if np.isnan(score) else f"{decision} {score:.3g}"
        lines = [first, shorten(Path(file).stem, CAPTION_WIDTH)]
        if decision in (REJECTED, FILLED):
            reason = self.selection.reasons[i].removeprefix(FILL_REASON)
            lines += textwrap.wrap(reason, CAPTION_WIDTH)
        picture = read_tile(self.synthetic_root / file)
        return Card([picture], lines[:CAPTION_LINES], COLOURS[decision])

    def _real_card(self, i: int, distance: float) -> Card:
        file, label = self.real.files[i], self.real.classes[self.real.labels[i]]
        lines = [f"real {label}", f"at {distance:.3f}", shorten(Path(file).stem, CAPTION_WIDTH)]
        return Card([read_tile(self.real_root / file)], lines)

    def _title(self, name: str) -> str:
        counts = self.selection.counts()[name]
        keys = [key for key in (FILLED, SURPLUS, REJECTED) if counts[key]]
        others = "".join(f", {counts[key]} {key}" for key in keys)
        accepted = f"{counts['accepted']} accepted of {counts['wanted']} wanted"
        return f"{name}: {accepted}, of {counts['generated']} generated{others}"

    def _neighbours(self, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """The nearest real tile of each image, and its distance."""
        place = {file: i for i, file in enumerate(self.synthetic.files)}
        features = self.synthetic.values[[place[self.selection.files[i]] for i in rows]]
        index, distance = nearest(features, self.real.values)
        return index.tolist(), distance.tolist()


def sheet_path(folder: Path, name: str) -> Path:
    """Where the sheet of a class is."""
    return folder / f"{name}.png"
