"""Choose synthetic or unlabelled tiles by one of five strategies and make a training folder.

FEATURES is what scripts/vis.py wrote for the same two folders, a checkpoint (or seed folder) of
eval.py, timm:NAME or diffusion:RUN@T. Which images are accepted is the strategy's:

    centroid    nearest centroid is the own class's, the closest first (as published)
    confidence  given to their class by a classifier, the most probable first
    knn         within reach of a real tile of their class, the most realistic first
    coverage    spread as the real tiles are, each adding most to those before
    random      drawn from all images (the control arm)

With --unlabelled, a judge gives each tile its class first. --features given several times is a
judge of several networks, which --val measures.

The folder holds all real tiles, the accepted ones as synthetic_NAME or pseudo_NAME, selection.csv
with every decision, and selection.json with settings and counts. OUT.sheets has a contact sheet
per class.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from ldm.cli import Ckpt, Count, Dir, Seed, contradictions, existing_path, option, parse
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.files import require_outside
from ldm.settings import TIMM, FeatureOptions

log = logging.getLogger("distance")

MOST_PER_CLASS = 500  # of the published selection
NEIGHBORS = 3  # of the published realism score

_judge = partial(option, group="judge")
_choice = partial(option, group="which tiles are chosen")
_results = partial(option, group="training folder")


@dataclass(frozen=True, kw_only=True)
class Options(FeatureOptions):
    example: ClassVar = """\
--real D/train5 --synthetic OUT --features VIS --ratio 50 \\
      --out 'D/train5+fake50%'"""

    real: Dir = option(..., "labelled real tiles, DIR/CLASS/images")
    synthetic: Dir | None = option(None, "what sample_diffusion.py wrote")
    unlabelled: Dir | None = option(
        None,
        "in place of --synthetic: real tiles, each for the class that the judge gives it (names "
        "of folders are ignored, and tiles of --real left out)",
    )
    features: tuple[str, ...] = option(
        ...,
        "what scripts/vis.py wrote for them, a checkpoint of eval.py, timm:NAME or "
        "diffusion:RUN@T; several are judge together, as the mean of their calibrated opinions",
        metavar="JUDGE",
        repeats=True,
    )
    choose: bool = _judge(
        False,
        "use only that one of --features which tells left-out tiles of --real apart best, for "
        "example of diffusion:RUN@50, RUN@200 and RUN@400",
    )
    val: Dir | None = _judge(
        None,
        "labelled tiles that the judge is measured on: accuracy and calibration by class; they "
        "also calibrate a checkpoint of eval.py",
    )
    spread: Dir | None = option(
        None,
        "unlabelled tiles: the judge spreads the labels of --real over them (Zhou et al. 2003), "
        "in place of a logistic regression",
    )
    out: Dir = option(..., "training folder to make")
    ratio: Count | None = _choice(
        None,
        "synthetic images per class, in percent of its real ones (published: 50 100 200 300)",
        metavar="PERCENT",
    )
    per_class: Count | None = _choice(
        None,
        f"most synthetic images of each class; {MOST_PER_CLASS} where --ratio is omitted too",
        metavar="N",
    )
    strategy: Literal["centroid", "confidence", "knn", "coverage", "random"] | None = _choice(
        None, "which images are accepted; if omitted centroid, with --unlabelled random"
    )
    random: bool = _choice(False, "the same as --strategy random")
    seed: Seed | None = _choice(None, "with --strategy random: its seed; if omitted 0")
    neighbors: Count | None = _choice(
        None,
        f"with --strategy knn: a real tile reaches to its K-th neighbour; if omitted {NEIGHBORS}",
        metavar="K",
    )
    confidence: Literal["judge", "manifest"] | None = _choice(
        None,
        "with --strategy confidence: by the network of --features (one that knows no classes by "
        "logistic regression on --real), or by the classifier that guided (manifest.csv); if "
        "omitted judge",
    )
    fill: bool = _choice(
        False, "where too few images are accepted, use the best of the rejected, marked as filled"
    )
    downstream: Ckpt | None = _results(
        None, "checkpoint of eval.py that the images are for: a warning when it is the judge"
    )
    sheets: Dir | None = _results(None, "folder of contact sheets; if omitted OUT.sheets")
    no_sheets: bool = _results(False, "draw no contact sheets")
    link: Literal["copy", "hard", "symbolic"] = _results("copy", "copy the files or link to them")
    cache: Dir | None = option(
        None,
        "folder of computed features and fitted judges; if omitted SYNTHETIC.features or "
        "UNLABELLED.features",
        group="features",
    )

    @property
    def chosen_strategy(self) -> str:
        usual = "centroid" if self.unlabelled is None else "random"
        return "random" if self.random else self.strategy or usual

    def problems(self) -> Iterator[tuple[str, str]]:
        for names in (("synthetic", "unlabelled"), ("ratio", "per_class"), ("sheets", "no_sheets")):
            yield from contradictions(self, *names)
        if self.synthetic is None and self.unlabelled is None:
            yield "synthetic", "is missing; give it, or --unlabelled"
        if self.unlabelled is not None and self.confidence == "manifest":
            yield "confidence", "manifest belongs to --synthetic; leave it out"
        if self.spread is not None and self.confidence == "manifest":
            yield "confidence", "manifest asks no judge, so nothing can be spread; leave one out"
        if self.choose and len(self.features) < 2:
            yield "choose", "chooses among several --features; give them, or leave it out"
        if self.random and self.strategy not in (None, "random"):
            yield "random", f"not allowed with --strategy {self.strategy}; give one of them"
            return
        owners = {"seed": "random", "neighbors": "knn", "confidence": "confidence"}
        for name, strategy in owners.items():
            if getattr(self, name) is not None and self.chosen_strategy != strategy:
                yield name, f"belongs to --strategy {strategy}; leave it out"
        if self.fill and self.chosen_strategy == "random":
            yield "fill", "--strategy random rejects nothing to fill up with; leave it out"


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


def report_judge(judge: dict) -> None:
    """Print what a judge is worth on --val, and how often it sees the wanted classes."""
    from ldm.report.tables import aligned

    rows: dict[str, dict[str, float | None]] = {}
    for one in judge["left_out"]:
        print(
            f"{one['network']}: accuracy {one['accuracy']:.3f}, cross-entropy"
            f" {one['cross_entropy']:.3f} on left-out tiles of --real"
        )
    if judge["val"]:
        val = judge["val"]
        print(
            f"judge on {val['images']} tiles of --val: accuracy {val['accuracy']:.3f}, macro F1"
            f" {val['macro_f1']:.3f}, calibration error {val['calibration_error']:.3f}"
        )
        for one in val["networks"] if len(val["networks"]) > 1 else ():
            print(f"  {one['network']} alone: accuracy {one['accuracy']:.3f}")
        keys = ("sensitivity", "precision", "confidence")
        rows = {name: {key: row[key] for key in keys} for name, row in val["per_class"].items()}
    for name, row in (judge["agreement"] or {}).items():
        shares = {f"as wanted {when}": share for when, share in row.items()}
        rows[name] = {**rows.get(name, {}), **shares}
    cells = {
        name: {key: "" if value is None else f"{value:.3f}" for key, value in row.items()}
        for name, row in rows.items()
    }
    if cells:
        print(aligned(cells, 16))


def judge(args: Options, real_root: Path, candidates_root: Path, needed: bool):
    """What `--features` means, an `ldm.selection.judge.Judged`; with a judge if it is needed."""
    from ldm.features.source import parse_features
    from ldm.selection.judge import compute_judged, is_vis_folder, read_judged

    needed = (
        needed
        or args.choose
        or any(given is not None for given in (args.unlabelled, args.val, args.spread))
    )
    folders = [name for name in args.features if is_vis_folder(name)]
    if not folders:
        sources = [
            # The weights and the size are those of a network of timm among several.
            parse_features(name, args.pretrained_weights, args.input_size)
            if len(args.features) == 1 or name.startswith(TIMM)
            else parse_features(name)
            for name in args.features
        ]
        return compute_judged(
            real_root,
            candidates_root,
            args.unlabelled is not None,
            (source.open(resolve_device(args.device)) for source in sources),
            Path(args.cache) if args.cache else None,
            needed,
            args.val and existing_path(args.val, "--val", "tiles"),
            args.choose,
            args.spread and existing_path(args.spread, "--spread", "tiles"),
            **args.loading,
        )
    names = ("pretrained_weights", "input_size", "batch_size", "workers", "device", "cache")
    names += ("unlabelled", "val", "spread")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given or len(args.features) > 1:
        raise UserError(
            f"{', '.join(given) or 'several'}: the features of --features {folders[0]} are there"
            " already, of one network and two sets; such options belong to a checkpoint, timm:NAME"
            " or diffusion:RUN@T"
        )
    return read_judged(folders[0], candidates_root, needed)


def wanted_folder(args: Options, real_root: Path, candidates_root: Path):
    """The training folder that is wanted, an `ldm.selection.training_folder.WantedFolder`."""
    from ldm.data.tile_files import TileFiles
    from ldm.selection.select import wanted_per_class
    from ldm.selection.strategies import Choice
    from ldm.selection.training_folder import WantedFolder

    choice = Choice(
        args.chosen_strategy,
        neighbors=args.neighbors or NEIGHBORS,
        confidence=args.confidence or "judge",
        seed=args.seed or 0,
    )
    judged = judge(args, real_root, candidates_root, choice.needs_judge)
    real = TileFiles.below(real_root, classes=judged.real.classes)
    counts = [real.labels.count(label) for label in range(len(real.classes))]
    if args.ratio is not None:
        wanted = wanted_per_class(counts, args.ratio)
    else:
        wanted = [args.per_class or MOST_PER_CLASS] * len(counts)
    return WantedFolder(
        Path(args.out),
        real,
        candidates_root,
        args.unlabelled is not None,
        judged,
        choice,
        wanted,
        ratio=args.ratio,
        fill=args.fill,
        link=args.link,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    real_root = existing_path(args.real, "--real", "tiles")
    option_name = "--synthetic" if args.unlabelled is None else "--unlabelled"
    candidates_root = existing_path(args.synthetic or args.unlabelled, option_name, "tiles")
    out = Path(args.out)
    sheets = None if args.no_sheets else Path(args.sheets or f"{out}.sheets")
    sources = {"--real": real_root, option_name: candidates_root}
    require_outside({"--out": out}, sources)
    cache = Path(args.cache) if args.cache else None
    require_outside({"--sheets": sheets, "--cache": cache}, {**sources, "--out": out})
    downstream = args.downstream and existing_path(args.downstream, "--downstream")

    from ldm.data.folders import refuse_held_out
    from ldm.features.source import VIT, FeatureSource
    from ldm.report.tables import aligned

    if args.unlabelled is not None:
        refuse_held_out(candidates_root, option_name)
    folder = wanted_folder(args, real_root, candidates_root)
    if downstream:
        downstream = FeatureSource(VIT, args.downstream, setting="`downstream`").open("cpu")
    if sheets and folder.real.digest != folder.judged.real.tiles:
        log.warning(
            "%s was made with other real tiles than those in --real %s: they judge, but there are"
            " no contact sheets",
            args.features[0],
            real_root,
        )
        sheets = None
    made_before = folder.is_made()
    if made_before:
        print(f"{out} is there already, made with the same settings")
    if sheets and not (made_before and folder.has_sheets(sheets)):
        folder.draw_sheets(sheets)
        print(f"contact sheets of {len(folder.real.classes)} classes in {sheets}")
    if made_before:
        return
    record = folder.make(downstream)
    counts = record["counts"]
    print(aligned(counts, 9))
    report_shortfall(counts)
    if "val" in record["judge"]:
        report_judge(record["judge"])
    for warning in record["warnings"]:
        log.warning("%s", warning)
    used = sum(row["accepted"] + row["filled"] for row in counts.values())
    what = "synthetic" if args.unlabelled is None else "pseudo-labelled"
    print(f"{len(folder.real)} real and {used} {what} tiles in {out}")
    print(f"next: histodiffusion evaluate --data_path {out.parent} --subset {out.name}")
