"""Grids of tiles: what a page shows of them, and contact sheets as picture files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

GAP, MARGIN, LINE = 14, 24, 15  # pixels between pictures, around a sheet, and of a line of text
Colour = tuple[int, int, int]  # red, green, blue
TEXT, SOFT = (29, 34, 41), (92, 102, 114)


class Tile(NamedTuple):
    """One picture of a grid."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    caption: str = ""  # below it; lines separated by a newline
    kind: str = ""  # "good" or "bad" draws a border, "" none


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


class Card(NamedTuple):
    """Pictures of a contact sheet with the lines of text below them."""

    pictures: Sequence[np.ndarray]  # uint8 (H, W, 3), side by side
    lines: Sequence[str] = ()
    colour: Colour | None = None  # of the first line and a frame around the pictures, if any


def card_sheet(
    title: Sequence[str], rows: Sequence[tuple[str, Sequence[Card]]], side: int, columns: int
) -> bytes:
    """A contact sheet as PNG: lines of a title, then (heading or empty, cards) of each row.

    A picture has `side` pixels, and a row room for `columns` of them at least.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    plain = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 11)
    bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 13)
    columns = max([columns, *(sum(len(card.pictures) for card in cards) for _, cards in rows)])
    lines = [max(len(card.lines) for card in cards) for _, cards in rows]
    heads = [1.6 * LINE if heading else 0 for heading, _ in rows]
    heights = [h + side + (n + 1) * LINE for h, n in zip(heads, lines, strict=True)]
    height = 2 * MARGIN + 1.2 * LINE * len(title) + sum(heights)
    sheet = Image.new("RGB", (2 * MARGIN + columns * (side + GAP), int(height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        style = (SOFT, plain) if i else (TEXT, bold)
        draw.text((MARGIN, MARGIN + 1.2 * i * LINE), line, *style)
    top = MARGIN + 1.2 * LINE * len(title)
    for (heading, cards), head, below in zip(rows, heads, heights, strict=True):
        draw.text((MARGIN, top), heading, TEXT, bold)
        left, upper = MARGIN, int(top + head)
        for card in cards:
            width = len(card.pictures) * (side + GAP) - GAP
            if card.colour:
                box = (left - 3, upper - 3, left + width + 2, upper + side + 2)
                draw.rectangle(box, outline=card.colour, width=3)
            for k, picture in enumerate(card.pictures):
                tile = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(tile, (left + k * (side + GAP), upper))
            for k, line in enumerate(card.lines):
                colour = (card.colour or SOFT) if k == 0 else SOFT
                draw.text((left, upper + side + 4 + k * LINE), line, colour, plain)
            left += width + GAP
        top += below
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def shorten(name: str, letters: int) -> str:
    """The end of a name, as far as it has room."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
