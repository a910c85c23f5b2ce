"""Draw a few-label subset of a labelled folder, class by class and spread over the groups.

    python scripts/make_subset.py --data D/train --fraction 0.05 --group_csv slides.csv \\
        --out D/train5

The subset is a folder of copies or links with subset.csv, which says of every tile of --data
whether it is in the subset or in the rest (its class, file and group), and subset.json with
settings and counts. With --by_group no patient, slide or region is in both.

    python scripts/make_subset.py --data D/train --include D/train5 --ratio 100 --out D/real100

makes the ceiling of an experiment with synthetic tiles: D/train5 and as many real tiles more.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.data.folders import LINKS
from ldm.data.groups import add_group_arguments, grouping_of
from ldm.errors import UserError

log = logging.getLogger("make_subset")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="make_subset.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="labelled tiles, DIR/CLASS/images")
    add("--out", required=True, metavar="DIR", help="folder to make")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--fraction",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="of the tiles of each class (published: 0.05)",
    )
    amount.add_argument(
        "--per_class",
        type=number(int, 1),
        metavar="N",
        help="tiles of each class, the same number for all",
    )
    amount.add_argument(
        "--ratio",
        type=number(int, 1),
        metavar="PERCENT",
        help="with --include: so many more tiles of each class, in percent of those it has",
    )
    add(
        "--include",
        metavar="DIR",
        help="a labelled folder that is all in the subset; only what it lacks is drawn",
    )
    add_group_arguments(parser)
    add(
        "--by_group",
        action="store_true",
        help="no group is both in the subset and in the rest; what is over is unused",
    )
    add("--seed", type=number(int, 0), default=0, help="another seed, other tiles")
    add("--link", choices=LINKS, default="copy", help="copy the files or link to them")
    args = parser.parse_args(argv)
    if args.fraction == 0:
        parser.error("argument --fraction: 0 must be above 0")
    if args.ratio is not None and args.include is None:
        parser.error("argument --ratio: is in percent of --include; give that too")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    data = existing_path(args.data, "--data", "dir")
    out = Path(args.out).expanduser()
    if data.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: lies in --data {data}; give a folder outside it")
    include = None if args.include is None else existing_path(args.include, "--include", "dir")
    if include is not None and include.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: lies in --include {include}; give a folder outside it")
    grouping = grouping_of(args)
    if args.by_group and grouping is None:
        raise UserError(
            "--by_group: needs to know the groups; give --group_level, --group_regex or --group_csv"
        )

    from ldm.data.subset import Amount, Subset, describe

    amount = Amount(args.fraction, args.per_class, args.ratio)
    subset = Subset.plan(data, amount, grouping, args.by_group, args.seed, include)
    if not subset.make(out, args.link):
        print(f"{out} is there already, made with the same settings")
        return
    print(describe(subset.counts()))
    total = len(subset.tiles)
    if include is None:
        print(f"{len(subset.drawn)} of {total} tiles in {out}")
    else:
        print(
            f"{len(subset.included)} tiles of {include} and {len(subset.drawn)} of {data} in {out}"
        )


if __name__ == "__main__":
    run_command(main)
