"""Grids of tiles: what a page shows of them, and contact sheets as picture files."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.report import plots


class Tile(NamedTuple):
    """One picture of a grid.

    Attributes:
        pixels: uint8 (H, W, 3).
        caption: Below it; lines separated by a newline.
        kind: "good" or "bad" draws a border, "" none.
    """

    pixels: np.ndarray
    caption: str = ""
    kind: str = ""


class TileRow(NamedTuple):
    """A row of a grid: its name, and the tiles of each group of columns."""

    name: str
    groups: Sequence[Sequence[Tile]]


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), whose longer side is at most `side` pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]
) -> bytes:
    """PNG with a row of tiles per caption.

    Args:
        rows: Caption and uint8 tiles (H, W, 3) of each row.
        columns: Caption of each column.
    """
    figure = plots.new_figure(1.6 + 0.85 * len(columns), 0.4 + 0.85 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, (caption, tiles) in enumerate(rows):
        for j, tile in enumerate(tiles):
            axes = grid[i, j]
            axes.imshow(tile)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_title(columns[j], fontsize=8)
        grid[i, 0].set_ylabel(caption, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    return plots.to_png(figure)
