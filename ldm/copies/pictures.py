"""Pictures of a copy check: the most suspicious pairs, and the distances as histograms.

Letters: S side of a shown tile in pixels.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.copies.check import CopyCheck
from ldm.data.tiles import read_tile
from ldm.features.pixels import centre_square, turned_back
from ldm.report import plots

SHOWN = 128  # S
GAP = 6
TEXT = 58  # height of the lines below a pair
LETTERS = 62  # that fit below a pair
PAIRS_IN_A_ROW = 3


def sheet(check: CopyCheck, chosen: Sequence[int]) -> bytes:
    """PNG of pairs: synthetic tile, training tile turned to match it, absolute difference.

    The frame of a flagged pair is red.

    Args:
        chosen: Synthetic tiles.
    """
    columns = min(PAIRS_IN_A_ROW, len(chosen))
    rows = -(-len(chosen) // columns)
    width, height = 3 * SHOWN + 4 * GAP, SHOWN + TEXT + 2 * GAP
    page = Image.new("RGB", (columns * width, rows * height), "white")
    for place, i in enumerate(chosen):
        corner = (place % columns * width, place // columns * height)
        page.paste(_pair(check, int(i), (width, height)), corner)
    stream = io.BytesIO()
    page.save(stream, format="PNG")
    return stream.getvalue()


def _pair(check: CopyCheck, i: int, size: tuple[int, int]) -> Image.Image:
    comparison = check.closest(i)
    side = comparison.synthetic
    neighbour = int(side.neighbours.index[i])
    synthetic = _square(check.synthetic.paths[i])
    train = turned_back(_square(check.train.paths[neighbour]), int(side.neighbours.orientation[i]))
    difference = np.abs(synthetic.astype(int) - train).astype(np.uint8)
    flagged = bool(check.flagged[i])
    card = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(card)
    edge = "crimson" if flagged else "lightgray"
    draw.rectangle((1, 1, size[0] - 2, size[1] - 2), outline=edge, width=2)
    for column, picture in enumerate((synthetic, train, difference)):
        card.paste(Image.fromarray(picture), (GAP + column * (SHOWN + GAP), GAP))
    lines = (
        f"synthetic  {_short(check.synthetic.names[i])}",
        f"training   {_short(check.train.names[neighbour])}",
        f"{comparison.name}: distance {side.distance[i]:.3f}, relative {side.relative[i]:.3f}"
        f" ({'below' if flagged else 'above'} {comparison.threshold:.3f})",
    )
    font = ImageFont.load_default(12)
    for number, line in enumerate(lines):
        draw.text((GAP, SHOWN + 2 * GAP + 16 * number), line, fill="black", font=font)
    return card


def _square(path: Path) -> np.ndarray:
    """The centre square of a file as it is shown, uint8 (S, S, 3)."""
    image = centre_square(read_tile(path))
    kind = cv2.INTER_AREA if len(image) > SHOWN else cv2.INTER_CUBIC
    return cv2.resize(image, (SHOWN, SHOWN), interpolation=kind)


def _short(name: str) -> str:
    limit = LETTERS - 11
    return name if len(name) <= limit else "..." + name[3 - limit :]


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
