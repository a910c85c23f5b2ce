"""Pictures of a copy check: the most suspicious pairs, and the distances as histograms."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ldm.copies.check import CopyCheck
from ldm.data.tiles import read_tile
from ldm.features.pixels import centre_square, turned_back
from ldm.report import plots
from ldm.report.grids import Card, card_sheet, shorten

SIDE = 128  # pixels of a shown tile
LETTERS = 50  # of a name below a pair
PAIRS_IN_A_ROW = 3
FLAGGED, NOT_FLAGGED = (220, 20, 60), (130, 130, 130)


def sheet(check: CopyCheck, chosen: Sequence[int]) -> bytes:
    """PNG of pairs: synthetic tile, training tile turned to match it, absolute difference.

    The frame of a flagged pair is red.

    Args:
        chosen: Synthetic tiles.
    """
    cards = [_pair(check, int(i)) for i in chosen]
    starts = range(0, len(cards), PAIRS_IN_A_ROW)
    rows = [("", cards[start : start + PAIRS_IN_A_ROW]) for start in starts]
    return card_sheet([], rows, SIDE, 3)


def _pair(check: CopyCheck, i: int) -> Card:
    comparison = check.closest(i)
    side = comparison.synthetic
    neighbour = int(side.neighbours.index[i])
    synthetic = _square(check.synthetic.paths[i])
    train = turned_back(_square(check.train.paths[neighbour]), int(side.neighbours.orientation[i]))
    difference = np.abs(synthetic.astype(int) - train).astype(np.uint8)
    flagged = bool(check.flagged[i])
    lines = (
        f"{comparison.name}: distance {side.distance[i]:.3f}, relative {side.relative[i]:.3f}"
        f" ({'below' if flagged else 'above'} {comparison.threshold:.3f})",
        f"synthetic  {shorten(check.synthetic.names[i], LETTERS)}",
        f"training   {shorten(check.train.names[neighbour], LETTERS)}",
    )
    return Card((synthetic, train, difference), lines, FLAGGED if flagged else NOT_FLAGGED)


def _square(path: Path) -> np.ndarray:
    """The centre square of a file as it is shown, uint8 (SIDE, SIDE, 3)."""
    image = centre_square(read_tile(path))
    kind = cv2.INTER_AREA if len(image) > SIDE else cv2.INTER_CUBIC
    return cv2.resize(image, (SIDE, SIDE), interpolation=kind)


def histogram(check: CopyCheck) -> bytes:
    """PNG: distances and relative distances to the training set, a row of panels per space."""
    rows = len(check.comparisons)
    figure = plots.new_figure(10.0, 3.4 * rows, dpi=110)
    panels = figure.subplots(rows, 2, squeeze=False)
    for (left, right), comparison in zip(panels, check.comparisons, strict=True):
        for axes, values, words in (
            (left, "distance", "distance to the nearest training tile"),
            (right, "relative", "relative distance"),
        ):
            sides = (
                ("held-out", getattr(comparison.held_out, values), "0.55"),
                ("synthetic", getattr(comparison.synthetic, values), "C0"),
            )
            plots.draw_histogram(axes, sides, f"{words}, {comparison.name}")
        plots.mark_threshold(right, comparison.threshold, "flagged")
    panels[0][0].legend(frameon=False, loc="upper left")
    return plots.to_png(figure)
