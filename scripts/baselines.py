"""What colour alone, or a linear probe of a pre-trained network, reaches on the same sets.

    python scripts/baselines.py --data_path D --output_dir train5 \\
        --kind colour_mean,colour_histogram --logdir logs/baselines

learns from `D/train5`, chooses on `D/val` and reports `D/test` once, with the results in
`logs/baselines/KIND/train5/` written as eval.py writes its own, so that tables read both.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, run_command
from ldm.errors import UserError

KINDS = ("colour_mean", "colour_histogram", "linear_probe")


def kinds(text: str) -> list[str]:
    found = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in found if name not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)!r}: choose among {','.join(KINDS)}")
    return found


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="baselines.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True, metavar="D", help="folder of the sets")
    add("--output_dir", required=True, metavar="SUBSET", help="training folder in D")
    add(
        "--kind",
        type=kinds,
        default="colour_mean,colour_histogram",
        metavar="KINDS",
        help=f"some of {','.join(KINDS)}",
    )
    add("--logdir", default="logs/baselines", help="results go to LOGDIR/KIND/SUBSET")
    add(
        "--groups",
        metavar="CSV",
        help="patient, slide or region of each tile of val and test (see eval.py)",
    )
    add("--group_column", metavar="NAME", help="column of --groups (group when not given)")
    probe = parser.add_argument_group("linear_probe")
    probe.add_argument(
        "--weights",
        metavar="RUN|FILE",
        help="a run of eval.py, or with --arch a local file of weights",
    )
    probe.add_argument("--arch", metavar="NAME", help="timm's name of a pre-trained network")
    probe.add_argument(
        "--input_size", type=number(int, 8), help="pixels, with --arch (the network's own)"
    )
    probe.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    probe.add_argument(
        "--num_workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), help="processes"
    )
    add("--overwrite", action="store_true", help="replace results of other settings or files")
    return parser


def probe_source(args: argparse.Namespace):
    """The network of a linear probe, an `ldm.features.source.FeatureSource`."""
    from ldm.features.source import TIMM, VIT, FeatureSource

    if args.arch is not None:
        weights = args.weights and Path(args.weights).expanduser()
        return FeatureSource(TIMM, args.arch, weights, args.input_size)
    if args.weights is None:
        raise UserError(
            "linear_probe needs a network: --weights RUN (of eval.py), or --arch NAME --weights"
            " FILE (of timm)"
        )
    if args.input_size is not None:
        raise UserError(
            "--input_size belongs to --arch; a run of eval.py knows its own, leave it out"
        )
    return FeatureSource(VIT, args.weights)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    data_path = existing_path(args.data_path, "--data_path", "dir")
    if args.groups is None and args.group_column is not None:
        raise UserError("--group_column: belongs to --groups; give that or leave it out")
    table = None if args.groups is None else existing_path(args.groups, "--groups", "file")
    if args.weights is not None:
        existing_path(args.weights, "--weights")
    for name in ("weights", "arch", "input_size"):
        if getattr(args, name) is not None and "linear_probe" not in args.kind:
            raise UserError(f"--{name}: belongs to --kind linear_probe; add that or leave it out")

    from ldm.cli import resolve_device
    from ldm.evaluation.baselines import run_baseline
    from ldm.evaluation.metrics import format_summary
    from ldm.evaluation.sets import GroupTable

    extractor = None
    if "linear_probe" in args.kind:  # opened before minutes are spent on the others
        extractor = probe_source(args).open(resolve_device(args.device))
    groups = None if table is None else GroupTable(table, args.group_column or "group")
    for kind in args.kind:
        summary = run_baseline(
            kind,
            data_path,
            args.output_dir,
            Path(args.logdir),
            groups,
            extractor,
            args.num_workers,
            args.overwrite,
        )
        print(format_summary(summary))
        print(f"\n{Path(args.logdir) / kind / args.output_dir / 'summary.json'}\n")


if __name__ == "__main__":
    run_command(main)
