"""Pack an indexed corpus into tar shards, and write the index of these.

    python scripts/index_corpus.py /data/tcga --out tcga.parquet --min_size 224 --group_level 1
    python scripts/write_shards.py tcga.parquet --out /scratch/tcga_shards --size 1G

writes /scratch/tcga_shards/shard-000000.tar, ... and /scratch/tcga_shards.parquet, which keeps the
groups and labels; train with configs/data/shards.yaml.
Tiles with a problem are left out, and every other is compared with its hash on the way. Run the
same command again after an interruption: whole shards are kept.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.devices import usable_cores

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size_in_bytes(text: str) -> int:
    """An argparse type: `500M` or `1.5G`, in powers of 1,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 500M or 1G")
    return size


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="write_shards.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("index", metavar="INDEX", help="what scripts/index_corpus.py wrote")
    add("--out", required=True, metavar="DIR", help="folder of the shards; index: DIR.parquet")
    add("--size", type=size_in_bytes, default="1G", help="bytes of a shard, at most: 500M, 1G")
    add(
        "--root",
        nargs="+",
        metavar="DIR",
        help="where the corpus is, if not where it was indexed; as many as then",
    )
    add("--workers", type=number(int, 1), default=usable_cores(), help="threads that read")
    add(
        "--verify",
        action="store_true",
        help="read the shards that are there: damaged ones are written again",
    )
    add("--dry-run", action="store_true", help="print what would be written, and exit")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    out = Path(os.path.abspath(Path(args.out).expanduser()))
    existing_path(args.index, "INDEX", "file")

    from ldm.data.index import CorpusIndex
    from ldm.data.shards import CorpusShards

    index = CorpusIndex.read(args.index)
    roots = [existing_path(root, "--root", "dir") for root in args.root or index.scanned]
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


if __name__ == "__main__":
    run_command(main)
