"""Whole-slide images as corpora: which tiles of a slide show tissue, and how one is read.

Lengths: micrometres, and pixels of a slide's level 0, its full resolution.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ldm.errors import UserError

if TYPE_CHECKING:
    import openslide

EXTENSIONS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".svslide", ".bif")
OPEN_SLIDES = 16  # that a process keeps open
MASK = 8  # mask pixels along a tile's side
BLOCK = 16  # tiles along the side of what is read at once for the mask
MPP = (0.02, 10)  # micrometres per pixel; others are of a screen or a printer
CHROMA = 15  # levels between a pixel's strongest and weakest colour, from which it is tissue
SHOWN, SIDE = 40, 900  # slides in the report, and pixels of the longer side of each


@dataclass(frozen=True)
class Tiling:
    """How slides are cut into tiles."""

    micrometres: float  # side of a tile on the glass
    pixels: int  # side of a tile as it is read
    tissue: float  # least share of a tile that shows tissue
    mpp: float | None = None  # micrometres per pixel of slides that do not say it

    def side(self, slide: "openslide.OpenSlide", path: Path) -> int:
        """The side of a tile in pixels of level 0; UserError if the resolution does not do."""
        try:
            mpp = np.mean([float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"])
        except (KeyError, ValueError):
            mpp = 0
        if not MPP[0] < mpp < MPP[1]:
            mpp = self.mpp
        if mpp is None:
            raise UserError(f"{path}: does not say how large its pixels are; give `mpp`")
        side = round(self.micrometres / mpp)
        if side < self.pixels * 0.99:
            raise UserError(
                f"{path}: {self.micrometres:g} micrometres are {side} pixels at {mpp:.3g} each,"
                f" fewer than `pixels` {self.pixels}; give fewer, or larger tiles"
            )
        return side


def chosen_tiles(path: Path, tiling: Tiling) -> list[str]:
    """Names of the tiles of a slide that show tissue, such as x001792_y000448_side448_px224.

    That is a square of 448 pixels of level 0, which is read as 224 pixels.
    """
    slide = open_slide(path)
    side = tiling.side(slide, path)
    if side > min(slide.dimensions):
        return []
    # Glass, black borders and shadows have no colour.
    share = np.ptp(overview(slide, side), axis=2) >= CHROMA
    share = share.reshape(len(share) // MASK, MASK, -1, MASK).mean(axis=(1, 3))
    return [
        f"x{column * side:06d}_y{row * side:06d}_side{side}_px{tiling.pixels}"
        for row, column in np.argwhere(share >= tiling.tissue).tolist()
    ]


def window(name: str) -> tuple[int, int, int, int]:
    """x, y and side of a tile at level 0, and its pixels, as its name ends."""
    return tuple(map(int, re.search(r"x(\d+)_y(\d+)_side(\d+)_px(\d+)$", name).groups()))


def read_window(path: Path, name: str) -> np.ndarray:
    """A tile of a slide, (pixels, pixels, 3) uint8, from the level that is next finer."""
    x, y, side, pixels = window(name)
    slide = open_slide(path)
    # The levels of some scanners are a little off powers of two.
    level = slide.get_best_level_for_downsample(side / pixels * 1.01)
    size = max(1, round(side / slide.level_downsamples[level]))
    region = read_region(slide, (x, y), level, (size, size))
    return np.array(region.resize((pixels, pixels), Image.Resampling.BICUBIC))


def open_slide(path: Path) -> "openslide.OpenSlide":
    """An open slide, kept for the next tile; UserError if it is no slide that can be read."""
    return _open(str(path), os.getpid())


@lru_cache(OPEN_SLIDES)
def _open(path: str, process: int) -> "openslide.OpenSlide":
    try:
        import openslide
    except ImportError:
        raise UserError(
            f"{path}: slides need openslide: pip install openslide-python openslide-bin"
        ) from None
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise UserError(f"{path}: no slide that openslide reads ({error}); remove it") from None


def read_region(
    slide: "openslide.OpenSlide", corner: tuple[int, int], level: int, size: tuple[int, int]
) -> Image.Image:
    """A part of a level in RGB, white where nothing was scanned; `corner` is of level 0."""
    import openslide

    try:
        region = slide.read_region(corner, level, size)
    except openslide.OpenSlideError as error:
        _open.cache_clear()  # a slide that has failed once reads nothing more
        raise UserError(f"{slide}: damaged at {corner} ({error}); restore the file") from None
    white = Image.new("RGBA", region.size, "white")
    return Image.alpha_composite(white, region).convert("RGB")


def overview(slide: "openslide.OpenSlide", side: int) -> np.ndarray:
    """The slide at `MASK` pixels per tile, (rows x MASK, columns x MASK, 3) uint8.

    It is read block by block: a slide without smaller levels need not fit into memory.

    Args:
        side: Of a tile, in pixels of level 0; tiles that reach beyond the slide are left out.
    """
    columns, rows = (length // side for length in slide.dimensions)
    picture = np.full((rows * MASK, columns * MASK, 3), 255, np.uint8)
    level = slide.get_best_level_for_downsample(side / MASK)
    scale = side / slide.level_downsamples[level]
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, BLOCK):
            across, down = min(BLOCK, columns - column), min(BLOCK, rows - row)
            size = round(across * scale), round(down * scale)
            corner = (column * side, row * side)
            region = read_region(slide, corner, level, size)
            region = region.resize((across * MASK, down * MASK), Image.Resampling.BOX)
            y, x = row * MASK, column * MASK
            picture[y : y + down * MASK, x : x + across * MASK] = np.array(region)
    return picture


def report(slides: Mapping[Path, list[str]], tiling: Tiling) -> str:
    """A page of slides, evenly taken from all, with their tiles outlined.

    Args:
        slides: Names of the tiles of each slide.
    """
    import cv2

    from ldm.report.page import Page

    page = Page("Slides of a corpus")
    count = sum(map(len, slides.values()))
    page.facts([(f"{len(slides):,}", "slides"), (f"{count:,}", "tiles")])
    chosen = sorted(slides)[:: -(-len(slides) // SHOWN)]
    size = f"{tiling.micrometres:g} micrometres, read as {tiling.pixels} pixels"
    page.text(f"{len(chosen)} of the slides, with outlines of their tiles of {size}.", soft=True)
    pictures = []
    for path in chosen:
        names = slides[path]
        side = window(names[0])[2]
        picture = overview(open_slide(path), side)
        scale = SIDE / max(picture.shape)
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for x, y, *_ in map(window, names):
            corners = np.rint(np.array([(x, y), (x + side, y + side)]) * MASK * scale / side)
            cv2.rectangle(picture, *corners.astype(int).tolist(), (0, 110, 70), 1)
        encoded = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
        pictures.append((encoded, f"{path}: {len(names):,} tiles"))
    page.pictures(pictures)
    return page.render()
