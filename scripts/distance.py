"""Choose synthetic tiles by distance to class centroids and make a training folder of them.

    python scripts/distance.py --real D/train5 --synthetic OUT --features VIS --ratio 50 \\
        --out D/train5+fake50%

VIS is what scripts/vis.py wrote for the same two folders. An image is accepted when the centroid
of its class is the nearest, the closest first, up to the wanted number. `--random` draws from all
images instead (the control arm). The folder holds all real tiles, the accepted ones as
synthetic_NAME, selection.csv with every decision, and selection.json with settings and counts.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.errors import UserError

log = logging.getLogger("distance")

MOST_PER_CLASS = 500  # of the published selection


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="distance.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--real", required=True, metavar="DIR", help="labelled real tiles, DIR/CLASS/images")
    add("--synthetic", required=True, metavar="DIR", help="what sample_diffusion.py wrote")
    add("--features", required=True, metavar="DIR", help="what scripts/vis.py wrote for them")
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
    add("--random", action="store_true", help="draw at random from all images of a class")
    add("--seed", type=number(int, 0), default=None, help="of --random (0 when not given)")
    add(
        "--link",
        choices=("copy", "hard", "symbolic"),
        default="copy",
        help="copy the files or link to them",
    )
    args = parser.parse_args(argv)
    if args.seed is not None and not args.random:
        parser.error("argument --seed: belongs to --random; nothing else is random")
    return args


def check_places(out: Path, real: Path, synthetic: Path) -> None:
    """UserError when OUT is one of the sources or lies in one, where it would become a class."""
    for option, folder in (("--real", real), ("--synthetic", synthetic)):
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out {out}: lies in {option} {folder}; give a folder outside it")


def describe(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a table, a row per class."""
    columns = ("generated", "rejected", "surplus", "accepted", "wanted", "shortfall")
    width = max(len("class"), *map(len, counts))
    lines = [f"{'class':{width}}  " + "  ".join(f"{column:>9}" for column in columns)]
    for name, row in counts.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{row[column]:>9}" for column in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    real_root = existing_path(args.real, "--real", "dir")
    synthetic_root = existing_path(args.synthetic, "--synthetic", "dir")
    features = existing_path(args.features, "--features", "dir")
    out = Path(args.out)
    check_places(out, real_root, synthetic_root)

    from ldm.data.tiles import TileFolder
    from ldm.run import git_revision, versions
    from ldm.selection.centroids import Centroids
    from ldm.selection.features import FeatureSet, tiles_digest
    from ldm.selection.select import select_at_random, select_by_distance, wanted_per_class
    from ldm.selection.training_folder import build_training_folder, same_folder_exists

    centroids = Centroids.load(features / "centroids.safetensors")
    synthetic = FeatureSet.load(features / "features_synthetic.safetensors")
    # No pixels are needed here, so the size is of no account.
    real = TileFolder(real_root, 1, labelled=True, classes=centroids.classes, check=False)
    made = TileFolder(synthetic_root, 1, labelled=True, classes=centroids.classes, check=False)
    if tiles_digest(made.paths, made.relative_paths) != synthetic.tiles:
        raise UserError(
            f"--synthetic {synthetic_root}: its images are not those of --features {features};"
            " run scripts/vis.py again"
        )
    real_digest = tiles_digest(real.paths, real.relative_paths)
    if real_digest != centroids.tiles:
        log.warning("the centroids of %s are not of the tiles in --real %s", features, real_root)

    counts = [real.labels.count(label) for label in range(len(real.classes))]
    if args.ratio is not None:
        wanted = wanted_per_class(counts, args.ratio)
    else:
        wanted = [args.per_class or MOST_PER_CLASS] * len(counts)
    seed = (args.seed or 0) if args.random else None
    settings = {
        "selection": "random" if args.random else "distance",
        "seed": seed,
        "ratio": args.ratio,
        "wanted": wanted,
        "classes": real.classes,
        "extractor": centroids.extractor,
        "centroid_tiles": centroids.tiles,
        "real_tiles": real_digest,
        "synthetic_tiles": synthetic.tiles,
        "link": args.link,
    }
    if same_folder_exists(out, settings):
        print(f"{out} is there already, made with the same settings")
        return
    if args.random:
        selection = select_at_random(synthetic, centroids, wanted, seed)
    else:
        selection = select_by_distance(synthetic, centroids, wanted)
    summary = selection.counts()
    record = {
        "settings": settings,
        "counts": summary,
        "command": sys.argv,
        "versions": versions(),
        "revision": git_revision(),
    }
    build_training_folder(out, real, synthetic_root, selection, record, args.link)
    print(describe(summary))
    short = {name: row["shortfall"] for name, row in summary.items() if row["shortfall"]}
    if short:
        missing = ", ".join(f"{name} {number}" for name, number in short.items())
        log.warning("fewer images than wanted, not filled up: %s; sample more", missing)
    accepted = sum(row["accepted"] for row in summary.values())
    print(f"{len(real)} real and {accepted} synthetic tiles in {out}")


if __name__ == "__main__":
    run_command(main)
