"""Draw a few-label subset of a labelled folder, class by class and spread over the groups.

    python scripts/make_subset.py --data D/train --fraction 0.05 --group_csv slides.csv \\
        --out D/train5

The subset is a folder of copies or links with subset.csv, which says of every tile of --data
whether it is in the subset or in the rest (its class, file and group), and subset.json with
settings and counts. With --by_group no patient, slide or region is in both.
"""

import argparse
import json
import logging
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.data.folders import LINKS, build_folder, same_folder_exists
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
    return args


def describe(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a table, a row per class."""
    columns = list(next(iter(counts.values())))
    width = max(len("class"), *map(len, counts))
    lines = [f"{'class':{width}}  " + "  ".join(f"{column:>7}" for column in columns)]
    for name, row in counts.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{row[column]:>7}" for column in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    data = existing_path(args.data, "--data", "dir")
    out = Path(args.out).expanduser()
    if data.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: lies in --data {data}; give a folder outside it")
    grouping = grouping_of(args)
    if args.by_group and grouping is None:
        raise UserError(
            "--by_group: needs to know the groups; give --group_level, --group_regex or --group_csv"
        )

    from ldm.data.images import class_folders, list_images
    from ldm.data.subset import (
        LIST,
        RECORD,
        REST,
        SUBSET,
        Labelled,
        count,
        draw,
        to_csv,
        wanted_per_class,
    )
    from ldm.run import git_revision, versions

    tiles = []
    for name in class_folders(data):
        files = [path.relative_to(data).as_posix() for path in list_images(data / name)]
        if not files:
            raise UserError(f"--data {data}: class folder {name} has no images; remove it")
        tiles += [Labelled(file, file if grouping is None else grouping(file)) for file in files]
    if not tiles:
        raise UserError(f"--data {data}: no class folders; a labelled set is DIR/CLASS/image files")
    if args.per_class is None:
        wanted = wanted_per_class(tiles, args.fraction)
    else:
        wanted = {tile.label: args.per_class for tile in tiles}
    decisions = draw(tiles, wanted, args.seed, args.by_group)
    table = to_csv(tiles, decisions)
    settings = {
        "wanted": wanted,
        "by_group": args.by_group,
        "seed": args.seed,
        "link": args.link,
        "tiles": sha256(table.encode()).hexdigest(),
    }
    if same_folder_exists(out, settings, RECORD):
        print(f"{out} is there already, made with the same settings")
        return
    counts = count(tiles, decisions)
    if grouping is None:
        for row in counts.values():
            del row["groups"]  # each tile is its own
    record = {
        "settings": settings,
        "counts": counts,
        "command": sys.argv,
        "versions": versions(),
        "revision": git_revision(),
    }
    chosen = {t.file: data / t.file for t, d in zip(tiles, decisions, strict=True) if d == SUBSET}
    notes = {LIST: table, RECORD: json.dumps(record, indent=2) + "\n"}
    build_folder(out, chosen, notes, args.link)
    print(describe(counts))
    short = [
        f"{name} {row[SUBSET]} of {wanted[name]}"
        for name, row in counts.items()
        if row[SUBSET] < wanted[name]
    ]
    if short:
        log.warning("fewer tiles than wanted: %s", ", ".join(short))
    if not any(row[REST] for row in counts.values()):
        log.warning("no tile is left for the rest; ask for fewer tiles to have one")
    print(f"{len(chosen)} of {len(tiles)} tiles in {out}")


if __name__ == "__main__":
    run_command(main)
