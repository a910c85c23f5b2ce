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
import json
import logging
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.data.folders import LINKS, build_folder
from ldm.data.groups import add_group_arguments, grouping_of
from ldm.data.subset import Labelled
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


def describe(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a table, a row per class."""
    columns = list(next(iter(counts.values())))
    width = max(len("class"), *map(len, counts))
    lines = [f"{'class':{width}}  " + "  ".join(f"{column:>7}" for column in columns)]
    for name, row in counts.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{row[column]:>7}" for column in columns))
    return "\n".join(lines)


def included_files(
    include: Path, data: Path, tiles: list[Labelled]
) -> tuple[dict[str, Path], set[str]]:
    """The files of `--include` by their paths below it, and those of `tiles` that are among them.

    Files are the same when their contents are, whatever their names.

    Raises:
        UserError: Other classes than `--data` has, or an empty one.
    """
    from ldm.data.images import class_folders, list_images
    from ldm.files import file_sha256

    files = [path for name in class_folders(include) for path in list_images(include / name)]
    found = {path.relative_to(include).as_posix(): path for path in files}
    theirs, ours = {file.split("/")[0] for file in found}, {tile.label for tile in tiles}
    if theirs != ours:
        raise UserError(
            f"--include {include}: has images of {sorted(theirs)}, --data of {sorted(ours)}; both"
            " must have the same classes"
        )
    sizes = {path.stat().st_size for path in found.values()}
    digests = {file_sha256(path) for path in found.values()}
    # Hashing is slow on large sets, and only a file of one of these sizes can be the same.
    held = {
        tile.file
        for tile in tiles
        if (data / tile.file).stat().st_size in sizes and file_sha256(data / tile.file) in digests
    }
    return found, held


def targets(included: dict[str, Path], drawn: list[str]) -> dict[str, str]:
    """Where each drawn file goes in the subset: its own path, unless an included one has it.

    Raises:
        UserError: Both names are taken.
    """
    found = {}
    for file in drawn:
        folder, _, name = file.rpartition("/")
        target = f"{folder}/more_{name}" if file in included else file
        if target in included or target in found:
            raise UserError(
                f"--include has files {file} and {target}, which are other images than {file} of"
                " --data; rename them"
            )
        found[target] = file
    return found


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

    from ldm.data.images import class_folders, list_images
    from ldm.data.subset import (
        LIST,
        RECORD,
        REST,
        SUBSET,
        count,
        draw,
        percent_of,
        to_csv,
        wanted_per_class,
    )
    from ldm.files import file_sha256
    from ldm.run import MadeFolder, git_revision, versions

    tiles = []
    for name in class_folders(data):
        files = [path.relative_to(data).as_posix() for path in list_images(data / name)]
        if not files:
            raise UserError(f"--data {data}: class folder {name} has no images; remove it")
        tiles += [Labelled(file, file if grouping is None else grouping(file)) for file in files]
    if not tiles:
        raise UserError(f"--data {data}: no class folders; a labelled set is DIR/CLASS/image files")
    included, held = ({}, set()) if include is None else included_files(include, data, tiles)
    there = Counter(file.split("/")[0] for file in included)
    if args.ratio is not None:
        wanted = percent_of(there, args.ratio)
    else:
        if args.per_class is None:
            total = wanted_per_class(tiles, args.fraction)
        else:
            total = {tile.label: args.per_class for tile in tiles}
        wanted = {name: max(0, number - there[name]) for name, number in total.items()}
    if args.by_group and len(held) < len(included):
        log.warning(
            "%d of %d images of --include are not in --data: which groups they are of is unknown",
            len(included) - len(held), len(included)
        )  # fmt: skip
    decisions = draw(tiles, wanted, args.seed, args.by_group, held)
    table = to_csv(tiles, decisions)
    settings = {
        "wanted": wanted,
        "by_group": args.by_group,
        "seed": args.seed,
        "link": args.link,
        "tiles": sha256(table.encode()).hexdigest(),
    }
    if include is not None:
        # The files themselves: their names do not tell whether one was replaced.
        digests = "".join(f"{name} {file_sha256(path)}\n" for name, path in included.items())
        settings["include"] = sha256(digests.encode()).hexdigest()
    if MadeFolder(out, settings, RECORD).exists():
        print(f"{out} is there already, made with the same settings")
        return
    drawn = [
        tile.file
        for tile, decision in zip(tiles, decisions, strict=True)
        if decision == SUBSET and tile.file not in held
    ]
    counts = count(tiles, decisions)
    if grouping is None:
        for row in counts.values():
            del row["groups"]  # each tile is its own
    record = {
        "settings": settings,
        "counts": counts,
        "included": dict(there),
        "drawn": dict(Counter(file.split("/")[0] for file in drawn)),
        "command": sys.argv,
        "versions": versions(),
        "revision": git_revision(),
    }
    chosen = {target: data / file for target, file in targets(included, drawn).items()} | included
    notes = {LIST: table, RECORD: json.dumps(record, indent=2) + "\n"}
    build_folder(out, chosen, notes, args.link)
    print(describe(counts))
    got = record["drawn"]
    short = [
        f"{name} {got.get(name, 0)} of {number}"
        for name, number in wanted.items()
        if got.get(name, 0) < number
    ]
    if short:
        log.warning("fewer tiles than wanted: %s", ", ".join(short))
    if not any(row[REST] for row in counts.values()):
        log.warning("no tile is left for the rest; ask for fewer tiles to have one")
    if include is None:
        print(f"{len(chosen)} of {len(tiles)} tiles in {out}")
    else:
        print(f"{len(included)} tiles of {include} and {len(drawn)} of {data} in {out}")


if __name__ == "__main__":
    run_command(main)
