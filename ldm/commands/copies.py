"""Did the generator copy training tiles? Compare synthetic tiles with its training set.

--train is what the generator saw, --holdout real tiles that it never saw, of other patients; both
may lie in folders of any depth. For each synthetic tile, the nearest training tile is searched in
pixels and, given a network, in its features, over the 8 flips and quarter turns, and compared with
the same distances of the held-out tiles. Writes REPORT/report.md, report.json, copies.csv (a row
per synthetic tile), suspicious.png and histogram.png; REPORT/cache makes a second run quick.

`--remove FOLDER --removed_to NEW` makes NEW, the training folder FOLDER of scripts/distance.py
without the flagged tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ldm.cli import Count, Dir, existing_path, like, option, output_path, parse
from ldm.devices import resolve_device
from ldm.features.source import known_forms
from ldm.files import remove_leftovers, require_outside
from ldm.settings import DeviceOption, LoaderOptions, NetworkChoice


@dataclass(frozen=True, kw_only=True)
class Options(NetworkChoice, DeviceOption):
    example: ClassVar = """\
--synthetic OUT --train D/train --holdout D/val --out REPORT \\
      --features logs/eval/train5/seed0"""

    synthetic: Dir = option(..., "what sample_diffusion.py wrote")
    train: Dir = option(..., "real tiles that the generator saw")
    holdout: Dir = option(..., "real tiles that it never saw, of other patients")
    out: str = option(..., "folder of the report", metavar="REPORT")
    features: str | None = like(
        NetworkChoice,
        "features",
        None,
        help=f"compare in features of this network too: {known_forms()}; if omitted, in pixels "
        "only",
    )
    quantile: Annotated[float, Field(ge=1e-5, le=0.5)] = option(
        0.01, "share of new tiles that may be flagged by mistake", metavar="SHARE"
    )
    group_regex: str | None = option(
        None,
        "its first group is the patient or slide in a real tile's path: none may be in both "
        "--train and --holdout, and tiles of one group are not compared with one another",
        metavar="REGEX",
    )
    sheet: Annotated[int, Field(ge=1, le=300)] = option(24, "pairs in suspicious.png")
    remove: str | None = option(
        None, "training folder that holds some of the tiles", metavar="FOLDER"
    )
    removed_to: str | None = option(None, "where it goes without the flagged ones", metavar="NEW")
    batch_size: Count = like(LoaderOptions, "batch_size", 64)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if (self.remove is None) != (self.removed_to is None):
            missing = "remove" if self.remove is None else "removed_to"
            yield missing, "is missing: --remove and --removed_to belong together"


def check_paths(args: Options) -> tuple[dict[str, Path], Path]:
    """The folders of the three sets, by name, and that of the report; none lies in another."""
    names = ("synthetic", "train", "holdout")
    sets = {name: existing_path(getattr(args, name), f"--{name}", "tiles") for name in names}
    out = output_path(args.out, "--out", "dir")
    sources, targets = {f"--{name}": path for name, path in sets.items()}, {"--out": out}
    for name, path in sources.items():
        require_outside({name: path}, {other: sources[other] for other in sources if other != name})
    if args.remove:
        targets["--removed_to"] = output_path(args.removed_to, "--removed_to", "dir")
        sources["--remove"] = existing_path(args.remove, "--remove", "dir")
    require_outside(targets, sources)
    return sets, out


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    sets, out = check_paths(args)
    remove_leftovers(out, out / "cache")

    from ldm.copies.check import check_copies
    from ldm.copies.removal import Removal
    from ldm.copies.report import write_report
    from ldm.data.images import class_folders
    from ldm.data.tile_files import TileFiles
    from ldm.features.source import parse_features

    device, extractor = resolve_device(args.device), None
    if args.network:
        source = parse_features(args.network, args.pretrained_weights, args.input_size)
        extractor = source.open(device)
    labelled = bool(class_folders(sets["synthetic"]))
    synthetic = TileFiles.below(sets["synthetic"], labelled)
    train, held_out = (TileFiles.below(sets[name], False) for name in ("train", "holdout"))
    settings = {
        "quantile": args.quantile,
        "network": extractor and extractor.identity,
        "group_regex": args.group_regex,
        "synthetic_tiles": synthetic.listing,
        "train_tiles": train.listing,
        "holdout_tiles": held_out.listing,
    }
    removal = None
    if args.remove:  # whether it can be done is known before minutes are spent on the comparison
        removal = Removal(args.remove, args.removed_to, synthetic, settings)
    check = check_copies(
        synthetic,
        held_out,
        train,
        out / "cache",
        extractor,
        args.quantile,
        args.group_regex,
        args.batch_size,
        device,
    )
    write_report(check, out, {"network_name": extractor and extractor.name, **settings}, args.sheet)
    count = int(check.flagged.sum())
    print(f"{count} of {len(check.synthetic)} synthetic tiles are flagged: {out}/report.md")
    if removal and removal.is_made:
        print(f"{removal.out} is there already, made with the same settings")
    elif removal:
        print(f"{removal.out}: {removal.remove(check.reasons())} tiles removed")
