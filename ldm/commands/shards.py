"""Pack an indexed corpus into tar shards, and write the index of these.

Writes OUT/shard-000000.tar, ... and OUT.parquet, which keeps the groups and labels; train with
configs/data/shards.yaml. Tiles with a problem are left out, and every other is compared with its
hash on the way. Run the same command again after an interruption: whole shards are kept.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator

from ldm.cli import Dir, Threads, existing_path, option, parse, shown
from ldm.devices import usable_cores
from ldm.files import require_outside

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size_in_bytes(text: str | int) -> int:
    """The number of bytes that `500M` or `1.5G` means, in powers of 1,000."""
    if isinstance(text, int):
        return text
    # No more digits than a disk needs: a longer number is a typing error.
    match = re.fullmatch(r"(\d{1,15}|\d{1,6}\.\d{1,9}(?=[KMGT]))([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{shown(text)} is not a size; give one such as 500M or 1G")
    return size


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "tcga.parquet --out /scratch/tcga_shards --size 1G"

    index: str = option(..., "what scripts/index_corpus.py wrote", positional=True, metavar="INDEX")
    out: Dir = option(..., "folder of the shards; the index is DIR.parquet")
    size: Annotated[int, BeforeValidator(size_in_bytes)] = option(
        10**9, "most bytes of a shard, such as 500M or 1G; if omitted 1G"
    )
    root: tuple[Dir, ...] | None = option(
        None, "where the corpus is, if not where it was indexed; as many as then"
    )
    workers: Threads = option(usable_cores, "threads that read")
    verify: bool = option(False, "read the shards that exist: damaged ones are written again")
    dry_run: bool = option(False, "print what would be written, and exit")


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    out = Path(os.path.abspath(Path(args.out).expanduser()))
    existing_path(args.index, "INDEX", "file")

    from ldm.data.index import CorpusIndex
    from ldm.data.shards import CorpusShards

    index = CorpusIndex.read(args.index)
    roots = [Path(root).expanduser() for root in args.root or index.scanned]
    for root in roots:
        existing_path(root, "--root", "tiles")
    require_outside({"--out": out}, {"--root": roots})
    shards = CorpusShards(index, roots, out, args.size)
    if args.dry_run:
        size = shards.bytes_of(range(len(shards)))
        print(f"{shards.starts[-1]:,} tiles in {len(shards):,} shards, {size / 1e6:,.1f} MB, {out}")
        return
    report = shards.write(args.workers, args.verify)
    print(
        f"{report.tiles:,} tiles in {report.written + report.present:,} shards of {out}, "
        f"{report.bytes / 1e6:,.1f} MB; {report.written:,} written, {report.present:,} were there"
    )
    print(f"index in {shards.index_path}; train with layout: shards")
