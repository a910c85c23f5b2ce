"""Scan a corpus of tiles once and write an index that training reads instead of walking the tree.

Every tile is decoded and hashed. Unreadable, truncated and too small ones and copies of another are
listed in corpus.problems.csv and left out. Run again after an interruption to go on, and after
files were added or changed: only those are read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ldm.cli import Count, Threads, option, parse, run_command
from ldm.data.groups import grouping_of
from ldm.devices import usable_cores
from ldm.errors import UserError
from ldm.settings import GroupOptions


@dataclass(frozen=True, kw_only=True)
class Options(GroupOptions):
    program: ClassVar = "index_corpus.py"
    example: ClassVar = (
        "  python scripts/index_corpus.py ROOT --out corpus.parquet --min_size 224 --group_level 1"
    )

    roots: tuple[str, ...] = option(
        positional=True, metavar="ROOT", help="folder of a corpus; several share one index"
    )
    out: str = option(metavar="INDEX", help="Parquet file to write")
    layout: Literal["folder", "array", "shards"] = option(
        default="folder",
        help="folder: image files in folders of any depth; array: images.npy files as PanNuke's; "
        "shards: tar files",
    )
    min_size: Count = option(
        default=1, metavar="PIXELS", help="tiles with a shorter side are left out"
    )
    keep_duplicates: bool = option(
        default=False,
        help="list tiles with the same bytes as another, but do not leave them out",
    )
    workers: Threads = option(default_factory=usable_cores, help="threads")


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
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
    grouping = grouping_of(args)

    from ldm.data.scan import PROBLEMS, index_corpora, problems_of

    index, scan, counts = index_corpora(
        roots, out, args.layout, args.min_size, grouping, args.keep_duplicates, args.workers
    )
    for i, root in enumerate(roots):
        tiles = index.tiles(i)
        labels, groups = (len(set(tiles[name]) - {None}) for name in ("label", "group"))
        print(f"{root}: {len(tiles['path']):,} tiles, {labels:,} labels, {groups:,} groups")
    print(f"{scan.files:,} files, {scan.known:,} of them known from an earlier scan")
    if counts:
        found = ", ".join(f"{counts[name]:,} {name}" for name in PROBLEMS if counts[name])
        kept = "; duplicates are kept" if args.keep_duplicates else ""
        print(f"problems: {found}{kept} ({problems_of(out)})")
    print(f"index in {out}")


if __name__ == "__main__":
    run_command(main, Options)
