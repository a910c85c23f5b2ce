"""Choose synthetic tiles by one of five strategies and make a training folder of them.

    python scripts/distance.py --real D/train5 --synthetic OUT --features VIS --ratio 50 \\
        --out D/train5+fake50%

FEATURES is what scripts/vis.py wrote for the same two folders, a checkpoint (or seed folder) of
eval.py, timm:NAME or diffusion:RUN@T. Which images are accepted is the strategy's:

    centroid    nearest centroid is the own class's, the closest first (as published)
    confidence  given to their class by a classifier, the most probable first
    knn         within reach of a real tile of their class, the most realistic first
    coverage    spread as the real tiles are, each adding most to those before
    random      drawn from all images (the control arm)

The folder holds all real tiles, the accepted ones as synthetic_NAME, selection.csv with every
decision, and selection.json with settings and counts. OUT.sheets has a contact sheet per class.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ldm.cli import Count, Whole, existing_path, option, parse, run_command
from ldm.errors import UserError
from ldm.settings import FeatureOptions

log = logging.getLogger("distance")

MOST_PER_CLASS = 500  # of the published selection
NEIGHBORS = 3  # of the published realism score


@dataclass(frozen=True, kw_only=True)
class Options(FeatureOptions):
    """Choose synthetic tiles by one of five strategies and make a training folder of them.

    Which images are accepted is the strategy's:
        centroid    nearest centroid is the own class's, the closest first (as published)
        confidence  given to their class by a classifier, the most probable first
        knn         within reach of a real tile of their class, the most realistic first
        coverage    spread as the real tiles are, each adding most to those before
        random      drawn from all images (the control arm)
    """

    program: ClassVar = "distance.py"
    example: ClassVar = """\
  python scripts/distance.py --real D/train5 --synthetic OUT --features VIS --ratio 50 \\
      --out 'D/train5+fake50%'"""

    real: str = option(metavar="DIR", help="labelled real tiles, DIR/CLASS/images")
    synthetic: str = option(metavar="DIR", help="what sample_diffusion.py wrote")
    features: str = option(
        metavar="JUDGE",
        help="what scripts/vis.py wrote for them, a checkpoint of eval.py, timm:NAME or "
        "diffusion:RUN@T",
    )
    out: str = option(metavar="DIR", help="training folder to make")
    ratio: Count | None = option(
        default=None,
        metavar="PERCENT",
        help="synthetic images per class, in percent of its real ones (published: 50 100 200 300)",
    )
    per_class: Count | None = option(
        default=None,
        metavar="N",
        help=f"most synthetic images of each class; {MOST_PER_CLASS} where --ratio is omitted too",
    )
    strategy: Literal["centroid", "confidence", "knn", "coverage", "random"] | None = option(
        default=None, help="which images are accepted; if omitted centroid"
    )
    random: bool = option(default=False, help="the same as --strategy random")
    seed: Whole | None = option(default=None, help="with --strategy random: its seed; if omitted 0")
    neighbors: Count | None = option(
        default=None,
        metavar="K",
        help="with --strategy knn: a real tile reaches to its K-th neighbour; if omitted "
        f"{NEIGHBORS}",
    )
    confidence: Literal["judge", "manifest"] | None = option(
        default=None,
        help="with --strategy confidence: by the network of --features (one that knows no classes "
        "by logistic regression on --real), or by the classifier that guided (manifest.csv); if "
        "omitted judge",
    )
    fill: bool = option(
        default=False,
        help="where too few images are accepted, use the best of the rejected, marked as filled",
    )
    downstream: str | None = option(
        default=None,
        metavar="CKPT",
        help="checkpoint of eval.py that the images are for: a warning when it is the judge",
    )
    sheets: str | None = option(
        default=None, metavar="DIR", help="folder of contact sheets; if omitted OUT.sheets"
    )
    no_sheets: bool = option(default=False, help="draw no contact sheets")
    link: Literal["copy", "hard", "symbolic"] = option(
        default="copy", help="copy the files or link to them"
    )
    cache: str | None = option(
        default=None,
        group="features",
        metavar="DIR",
        help="folder of computed features; if omitted SYNTHETIC.features",
    )

    @property
    def chosen_strategy(self) -> str:
        return "random" if self.random else self.strategy or "centroid"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.ratio is not None and self.per_class is not None:
            yield "per_class", "not allowed with --ratio; give one of them"
        if self.no_sheets and self.sheets is not None:
            yield "no_sheets", "not allowed with --sheets; give one of them"
        if self.random and self.strategy not in (None, "random"):
            yield "random", f"not allowed with --strategy {self.strategy}; give one of them"
            return
        owners = {"seed": "random", "neighbors": "knn", "confidence": "confidence"}
        for name, strategy in owners.items():
            if getattr(self, name) is not None and self.chosen_strategy != strategy:
                yield name, f"belongs to --strategy {strategy}; leave it out"
        if self.fill and self.chosen_strategy == "random":
            yield "fill", "--strategy random rejects nothing to fill up with; leave it out"


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv)


def check_places(places: dict[str, Path | None], sources: dict[str, Path]) -> None:
    """UserError when a folder to be made lies in a folder of images, where it would be a class."""
    for name, place in places.items():
        for other, folder in sources.items():
            if place and folder.resolve() in (place.resolve(), *place.resolve().parents):
                raise UserError(
                    f"{name} {place}: lies in {other} {folder}; give a folder outside it"
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

    from ldm.data.tile_files import TileFiles
    from ldm.features.centroids import centroid_distances
    from ldm.features.source import VIT, FeatureSource
    from ldm.run import MadeFolder, git_revision, versions
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
    from ldm.selection.training_folder import RECORD, build_training_folder

    options = NetworkOptions(
        pretrained_weights=args.pretrained_weights,
        input_size=args.input_size,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=args.device,
        cache=args.cache,
    )
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
    real = TileFiles.below(real_root, classes=judged.real.classes)
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
        args.chosen_strategy,
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
    made_before = MadeFolder(out, settings, RECORD).exists()
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
    run_command(main, Options)
