"""Contact sheets: what a selection took and what it left, beside the nearest real tiles."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data.tiles import read_tile
from ldm.features.neighbours import nearest
from ldm.features.sets import FeatureSet
from ldm.files import remove_leftovers, write_bytes
from ldm.selection.select import ACCEPTED, FILL_REASON, FILLED, REJECTED, SURPLUS, USED, Selection

COLUMNS = 8
TILE = 112  # pixels
GAP = 14
MARGIN = 24
LINE = 15  # pixels of a line of text
CAPTION_WIDTH = 19  # characters below a tile
CAPTION_LINES = 4  # at most
WIDTH = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
TEXT, SOFT = (29, 34, 41), (92, 102, 114)
# Told apart by people with any colour vision (Okabe and Ito).
COLOURS = {
    ACCEPTED: (0, 158, 115),
    FILLED: (204, 121, 167),
    SURPLUS: (86, 180, 233),
    REJECTED: (213, 94, 0),
}


@dataclass(frozen=True)
class Section:
    """Rows of a selection under one heading."""

    heading: str
    rows: Sequence[int]


class Sheets:
    """Draws the sheets of a selection.

    Args:
        selection: What to show.
        synthetic, real: The features it was made from.
        synthetic_root, real_root: Where their files are.
        score: What the score is, in words; None where there is none.
    """

    def __init__(
        self,
        selection: Selection,
        synthetic: FeatureSet,
        real: FeatureSet,
        synthetic_root: Path,
        real_root: Path,
        score: str | None,
    ):
        self.selection, self.real = selection, real
        self.synthetic, self.synthetic_root, self.real_root = synthetic, synthetic_root, real_root
        self.score = score
        fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self._font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 11)
        self._bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 13)

    def write(self, folder: Path) -> None:
        """FOLDER/CLASS.png for every class."""
        remove_leftovers(folder)
        for name in self.selection.classes:
            write_bytes(sheet_path(folder, name), self.draw(name))

    def sections(self, name: str) -> list[Section]:
        """What is shown of a class; no image is shown twice."""
        of_class = self.selection.of_class
        used = of_class(name, *USED)
        rejected = of_class(name, REJECTED)
        missed = [*of_class(name, SURPLUS), *rejected]
        best = used[:COLUMNS]
        last = used[COLUMNS:][-COLUMNS // 2 :]
        border = [*last, *missed[: COLUMNS - len(last)]]
        worst = [i for i in rejected if i not in border][-COLUMNS:][::-1]
        sections = [
            Section("used, the best first", best),
            Section("at the border: the last that are used, the first that are not", border),
            Section("rejected, the worst first", worst),
        ]
        return [section for section in sections if section.rows]

    def draw(self, name: str) -> bytes:
        """The sheet of a class, as PNG."""
        sections = self.sections(name)
        words = [[self._words(i) for i in section.rows] for section in sections]
        # Heights of a synthetic tile with its text; one of a real tile has three lines.
        strips = [TILE + (max(map(len, texts)) + 0.8) * LINE for texts in words]
        real_strip = TILE + 4.5 * LINE
        height = sum(strips) + len(sections) * (real_strip + 1.6 * LINE) + 4 * LINE + 2 * MARGIN
        sheet = Image.new("RGB", (WIDTH, int(height)), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((MARGIN, MARGIN), self._title(name), TEXT, self._bold)
        legend = f"score: {self.score}; " if self.score else ""
        legend += "below each image: the nearest real tile of any class, with the distance"
        judge = self.synthetic.network or self.synthetic.extractor[:12]
        draw.text((MARGIN, MARGIN + 1.4 * LINE), legend, SOFT, self._font)
        draw.text((MARGIN, MARGIN + 2.4 * LINE), f"features: {judge}", SOFT, self._font)
        top = MARGIN + 4 * LINE
        for section, texts, strip in zip(sections, words, strips, strict=True):
            draw.text((MARGIN, top), section.heading, TEXT, self._bold)
            top += 1.6 * LINE
            index, distance = self._neighbours(section.rows)
            for column, (i, j, d) in enumerate(zip(section.rows, index, distance, strict=True)):
                left = MARGIN + column * (TILE + GAP)
                self._tile(sheet, left, top, self.synthetic_root / self.selection.files[i])
                decision = self.selection.decisions[i]
                box = (left - 3, top - 3, left + TILE + 2, top + TILE + 2)
                draw.rectangle(box, outline=COLOURS[decision], width=3)
                self._caption(draw, left, top + TILE + 4, texts[column], COLOURS[decision])
                below = top + strip
                self._tile(sheet, left, below, self.real_root / self.real.files[j])
                real = f"real {self.real.classes[self.real.labels[j]]}"
                text = [real, f"at {d:.3f}", _short(self.real.files[j])]
                self._caption(draw, left, below + TILE + 4, text, SOFT)
            top += strip + real_strip
        stream = io.BytesIO()
        sheet.save(stream, format="PNG", optimize=True)
        return stream.getvalue()

    def _title(self, name: str) -> str:
        counts = self.selection.counts()[name]
        others = [key for key in (FILLED, SURPLUS, REJECTED) if counts[key]]
        return (
            f"{name}: {counts['accepted']} accepted of {counts['wanted']} wanted, of"
            f" {counts['generated']} generated"
            + "".join(f", {counts[key]} {key}" for key in others)
        )

    def _words(self, i: int) -> list[str]:
        """Decision and score of an image, its file, and why it is not used."""
        decision, score = self.selection.decisions[i], self.selection.scores[i]
        first = decision if np.isnan(score) else f"{decision} {score:.3g}"
        lines = [first, _short(self.selection.files[i])]
        if decision in (REJECTED, FILLED):
            reason = self.selection.reasons[i].removeprefix(FILL_REASON)
            lines += textwrap.wrap(reason, CAPTION_WIDTH)
        return lines[:CAPTION_LINES]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {file: i for i, file in enumerate(self.synthetic.files)}

    def _neighbours(self, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """The nearest real tile of each image, and its distance."""
        features = self.synthetic.values[[self._index[self.selection.files[i]] for i in rows]]
        index, distance = nearest(features, self.real.values)
        return index.tolist(), distance.tolist()

    def _tile(self, sheet: Image.Image, left: int, top: float, path: Path) -> None:
        pixels = Image.fromarray(read_tile(path))
        sheet.paste(pixels.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, int(top)))

    def _caption(self, draw, left: int, top: float, lines: Sequence[str], colour) -> None:
        for k, line in enumerate(lines):
            draw.text((left, top + k * LINE), line, colour if k == 0 else SOFT, self._font)


def _short(file: str) -> str:
    """The end of a file's name, as far as it fits below a tile."""
    stem = Path(file).stem
    return stem if len(stem) <= CAPTION_WIDTH - 2 else f"…{stem[3 - CAPTION_WIDTH :]}"


def sheet_path(folder: Path, name: str) -> Path:
    """Where the sheet of a class is."""
    return folder / f"{name}.png"
