"""Choose synthetic tiles by one of five strategies and make a training folder of them.

    python scripts/distance.py --real D/train5 --synthetic OUT --features VIS --ratio 50 \\
        --out D/train5+fake50%

FEATURES is what scripts/vis.py wrote for the same two folders, a checkpoint (or seed folder) of
eval.py, or timm:NAME. Which images are accepted is the strategy's:

    centroid    nearest centroid is the own class's, the closest first (as published)
    confidence  given to their class by a classifier, the most probable first
    knn         within reach of a real tile of their class, the most realistic first
    coverage    spread as the real tiles are, each adding most to those before
    random      drawn from all images (the control arm)

The folder holds all real tiles, the accepted ones as synthetic_NAME, selection.csv with every
decision, and selection.json with settings and counts. OUT.sheets has a contact sheet per class.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.errors import UserError
from ldm.selection.options import CONFIDENCES, STRATEGIES, add_network_options

log = logging.getLogger("distance")

MOST_PER_CLASS = 500  # of the published selection
NEIGHBORS = 3  # of the published realism score


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="distance.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--real", required=True, metavar="DIR", help="labelled real tiles, DIR/CLASS/images")
    add("--synthetic", required=True, metavar="DIR", help="what sample_diffusion.py wrote")
    add(
        "--features",
        required=True,
        metavar="JUDGE",
        help="what scripts/vis.py wrote for them, a checkpoint of eval.py, or timm:NAME",
    )
    add("--out", required=True, metavar="DIR", help="training folder to make")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--ratio",
        type=number(int, 1),
        metavar="PERCENT",
        help="synthetic images per class, in percent of its real ones (published: 50 100 200 300)",
    )
    amount.add_argument(
        "--per_class",
        type=number(int, 1),
        metavar="N",
        help=f"most synthetic images of each class ({MOST_PER_CLASS} when neither is given)",
    )
    add("--strategy", choices=STRATEGIES, help="which images are accepted (centroid)")
    add("--random", action="store_true", help="the same as --strategy random")
    add("--seed", type=number(int, 0), help="of --strategy random (0)")
    add(
        "--neighbors",
        type=number(int, 1),
        metavar="K",
        help=f"of --strategy knn: a real tile reaches to its K-th neighbour ({NEIGHBORS})",
    )
    add(
        "--confidence",
        choices=CONFIDENCES,
        help="of --strategy confidence: by the network of --features, or by the classifier that"
        " guided (manifest.csv) (judge)",
    )
    add(
        "--fill",
        action="store_true",
        help="where too few images are accepted, use the best of the rejected, marked as filled",
    )
    add(
        "--downstream",
        metavar="CKPT",
        help="checkpoint of eval.py that the images are for: a warning when it is the judge",
    )
    sheets = parser.add_mutually_exclusive_group()
    sheets.add_argument("--sheets", metavar="DIR", help="folder of contact sheets (OUT.sheets)")
    sheets.add_argument("--no-sheets", action="store_true", help="draw none")
    add(
        "--link",
        choices=("copy", "hard", "symbolic"),
        default="copy",
        help="copy the files or link to them",
    )
    network = parser.add_argument_group("features that are computed here, by a network")
    add_network_options(network, "--features timm:NAME")
    network.add_argument(
        "--cache", metavar="DIR", help="folder of computed features (SYNTHETIC.features)"
    )
    args = parser.parse_args(argv)
    if args.random and args.strategy not in (None, "random"):
        parser.error(f"argument --random: not allowed with --strategy {args.strategy}")
    args.strategy = "random" if args.random else args.strategy or "centroid"
    for option, strategy in (
        ("seed", "random"),
        ("neighbors", "knn"),
        ("confidence", "confidence"),
    ):
        if getattr(args, option) is not None and args.strategy != strategy:
            parser.error(f"argument --{option}: belongs to --strategy {strategy}")
    if args.fill and args.strategy == "random":
        parser.error("argument --fill: --strategy random rejects nothing to fill up with")
    return args


def check_places(places: dict[str, Path | None], sources: dict[str, Path]) -> None:
    """UserError when a folder to be made lies in a folder of images, where it would be a class."""
    for option, place in places.items():
        for other, folder in sources.items():
            if place and folder.resolve() in (place.resolve(), *place.resolve().parents):
                raise UserError(
                    f"{option} {place}: lies in {other} {folder}; give a folder outside it"
                )


def describe(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a table, a row per class."""
    columns = ("generated", "rejected", "surplus", "accepted", "wanted", "shortfall", "filled")
    width = max(len("class"), *map(len, counts))
    lines = [f"{'class':{width}}  " + "  ".join(f"{column:>9}" for column in columns)]
    for name, row in counts.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{row[column]:>9}" for column in columns))
    return "\n".join(lines)


def report_shortfall(counts: dict[str, dict[str, int]]) -> None:
    """Warn of classes that have fewer images than wanted."""
    missing = {name: row["shortfall"] - row["filled"] for name, row in counts.items()}
    filled = {name: row["filled"] for name, row in counts.items()}
    for words, numbers in (
        ("fewer images than wanted, not filled up: %s; sample more", missing),
        ("filled up with rejected images: %s", filled),
    ):
        listed = ", ".join(f"{name} {number}" for name, number in numbers.items() if number)
        if listed:
            log.warning(words, listed)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    real_root = existing_path(args.real, "--real", "dir")
    synthetic_root = existing_path(args.synthetic, "--synthetic", "dir")
    out = Path(args.out)
    sheets = None if args.no_sheets else Path(args.sheets or f"{out}.sheets")
    sources = {"--real": real_root, "--synthetic": synthetic_root}
    check_places({"--out": out}, sources)
    cache = Path(args.cache) if args.cache else None
    check_places({"--sheets": sheets, "--cache": cache}, {**sources, "--out": out})

    from dataclasses import fields

    from ldm.features.centroids import centroid_distances
    from ldm.features.sets import TileFiles
    from ldm.features.source import VIT, FeatureSource
    from ldm.run import git_revision, versions
    from ldm.selection.judge import (
        NetworkOptions,
        compute_judged,
        conflicts,
        is_vis_folder,
        read_judged,
    )
    from ldm.selection.select import select, wanted_per_class
    from ldm.selection.sheets import Sheets, sheet_path
    from ldm.selection.strategies import Choice
    from ldm.selection.training_folder import build_training_folder, same_folder_exists

    options = NetworkOptions(**{f.name: getattr(args, f.name) for f in fields(NetworkOptions)})
    if is_vis_folder(args.features):
        if options.given:
            raise UserError(
                f"{', '.join(options.given)}: the features of --features {args.features} are there"
                " already; such options belong to a checkpoint or timm:NAME"
            )
        judged = read_judged(args.features, synthetic_root)
    else:
        judged = compute_judged(args.features, real_root, synthetic_root, options)
    downstream = None
    if args.downstream:
        existing_path(args.downstream, "--downstream")
        downstream = FeatureSource(VIT, args.downstream).open("cpu")
    real = TileFiles.below(real_root, True, judged.real.classes)
    real_digest = real.digest
    if real_digest != judged.real.tiles:
        log.warning(
            "%s was made with other real tiles than those in --real %s: they judge, but there are"
            " no contact sheets",
            args.features,
            real_root,
        )
        sheets = None

    counts = [real.labels.count(label) for label in range(len(real.classes))]
    if args.ratio is not None:
        wanted = wanted_per_class(counts, args.ratio)
    else:
        wanted = [args.per_class or MOST_PER_CLASS] * len(counts)
    choice = Choice(
        args.strategy,
        neighbors=NEIGHBORS if args.neighbors is None else args.neighbors,
        confidence=args.confidence or "judge",
        seed=args.seed or 0,
    )
    settings = {
        **choice.settings(),
        "fill": args.fill,
        "ratio": args.ratio,
        "wanted": wanted,
        "classes": real.classes,
        "extractor": judged.real.extractor,
        "centroid_tiles": judged.real.tiles,
        "real_tiles": real_digest,
        "synthetic_tiles": judged.synthetic.tiles,
        "link": args.link,
    }
    made_before = same_folder_exists(out, settings)
    if made_before:
        print(f"{out} is there already, made with the same settings")
        if sheets is None or all(sheet_path(sheets, name).is_file() for name in real.classes):
            return

    distances = centroid_distances(judged.synthetic.values, judged.centroids.values)
    strategy = choice.make(judged.synthetic, judged.real, distances, synthetic_root)
    selection = select(strategy, judged.synthetic, distances.numpy(), wanted, args.fill)
    if sheets is not None:
        pictures = Sheets(
            selection, judged.synthetic, judged.real, synthetic_root, real_root, strategy.score
        )
        pictures.write(sheets)
        print(f"contact sheets of {len(real.classes)} classes in {sheets}")
    if made_before:
        return
    summary = selection.counts()
    facts, warnings = conflicts(judged, real, downstream)
    record = {
        "settings": settings,
        "counts": summary,
        **facts,
        "warnings": warnings,
        "command": sys.argv,
        "versions": versions(),
        "revision": git_revision(),
    }
    build_training_folder(out, real, synthetic_root, selection, record, args.link)
    print(describe(summary))
    report_shortfall(summary)
    for warning in warnings:
        log.warning("%s", warning)
    used = sum(row["accepted"] + row["filled"] for row in summary.values())
    print(f"{len(real)} real and {used} synthetic tiles in {out}")


if __name__ == "__main__":
    run_command(main)
