"""Scan a corpus of tiles once and write an index that training reads instead of walking the tree.

Every tile is decoded and hashed. Unreadable, truncated and too small ones and copies of another are
listed in corpus.problems.csv and left out; of slides, tiles that show tissue are chosen, and
slides.html shows which. Run again after an interruption to go on, and after
files were added or changed: only those are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ldm.cli import Count, Threads, option, parse
from ldm.data.groups import grouping_of
from ldm.devices import usable_cores
from ldm.errors import UserError
from ldm.files import require_outside
from ldm.settings import GroupOptions

SLIDES = "slides"
Micrometres = Annotated[float, Field(gt=0, le=10_000)]


@dataclass(frozen=True, kw_only=True)
class Options(GroupOptions):
    example: ClassVar = "ROOT --out corpus.parquet --min_size 224 --group_level 1"

    roots: tuple[str, ...] = option(
        ...,
        "folder of a corpus, or a file of arrays; several share one index",
        positional=True,
        metavar="ROOT",
    )
    out: str = option(..., "Parquet file to write", metavar="INDEX")
    layout: Literal["folder", "array", "shards", "slides"] = option(
        "folder",
        "folder: image files in folders of any depth; array: images.npy, .npz and HDF5 files as "
        "PanNuke, MedMNIST and PatchCamelyon have them (ROOT may be a file, or FILE/PART); "
        "shards: tar files; slides: whole-slide images",
    )
    min_size: Count = option(1, "tiles with a shorter side are left out", metavar="PIXELS")
    keep_duplicates: bool = option(
        False, "list tiles with the same bytes as another, but do not leave them out"
    )
    workers: Threads = option(usable_cores, "threads")
    tile_um: Micrometres | None = option(
        None,
        "side of a tile in micrometres; if omitted 112, 224 pixels of 0.5",
        group=SLIDES,
        metavar="LENGTH",
    )
    pixels: Count | None = option(
        None, "side of a tile in pixels, as it is read; if omitted 224", group=SLIDES
    )
    tissue: Annotated[float, Field(gt=0, le=1)] | None = option(
        None,
        "least share of a tile that shows tissue; if omitted 0.5",
        group=SLIDES,
        metavar="SHARE",
    )
    mpp: Micrometres | None = option(
        None, "micrometres per pixel of slides that do not say it", group=SLIDES, metavar="LENGTH"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        for name in ("tile_um", "pixels", "tissue", "mpp"):
            if getattr(self, name) is not None and self.layout != "slides":
                yield name, "is for --layout slides; give that, or leave it out"


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    roots = [Path(root).expanduser() for root in args.roots]
    if len({root.resolve() for root in roots}) < len(roots):
        raise UserError(f"ROOT {' '.join(args.roots)}: the same folder twice; give it once")
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file, such as index.parquet")
    if out.suffix != ".parquet":
        raise UserError(
            f"--out {out}: an index is a Parquet file; give it a name such as {out.stem}.parquet"
        )
    require_outside({"--out": out}, {"ROOT": roots})
    grouping = grouping_of(args)

    from ldm.data.scan import PROBLEMS, index_corpora, page_of, problems_of
    from ldm.data.slides import Tiling

    tiling = None
    if args.layout == "slides":
        tiling = Tiling(args.tile_um or 112.0, args.pixels or 224, args.tissue or 0.5, args.mpp)
    options = (args.min_size, grouping, args.keep_duplicates, args.workers, tiling)
    index, counts = index_corpora(roots, out, args.layout, *options)
    for i, root in enumerate(roots):
        tiles = index.tiles(i)
        labels, groups = (len(set(tiles[name]) - {None}) for name in ("label", "group"))
        print(f"{root}: {len(tiles['path']):,} tiles, {labels:,} labels, {groups:,} groups")
    print(f"{counts['files']:,} files, {counts['known']:,} of them known from an earlier scan")
    if any(counts[name] for name in PROBLEMS):
        found = ", ".join(f"{counts[name]:,} {name}" for name in PROBLEMS if counts[name])
        kept = "; duplicates are kept" if args.keep_duplicates else ""
        print(f"problems: {found}{kept} ({problems_of(out)})")
    page = f", slides with their tiles in {page_of(out)}" if tiling else ""
    print(f"index in {out}{page}")
