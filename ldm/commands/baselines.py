"""What colour alone, or the features of a pre-trained network, reach on the same sets.

Learns from D/SUBSET, chooses on D/val and reports D/test once, with the results in
LOGDIR/KIND/SUBSET written as eval.py writes its own, so that tables read both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from ldm.cli import Commas, Dir, Pixels, Workers, existing_path, like, option, parse
from ldm.devices import resolve_device
from ldm.errors import UserError
from ldm.features.source import known_forms
from ldm.settings import TIMM, DeviceOption, EvaluationOptions, some_cores

PROBE, SPREADING = "linear_probe", "label_spreading"
OF_NETWORKS = {PROBE, SPREADING, "classifier"}
Kind = Literal["colour_mean", "colour_histogram", "linear_probe", "label_spreading", "classifier"]


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions, DeviceOption):
    example: ClassVar = "--data_path D --subset train5 --kind colour_histogram"

    kind: Annotated[tuple[Kind, ...], Commas] = option(
        ("colour_mean", "colour_histogram"),
        f"some of {', '.join(get_args(Kind))} (a network as it is), with commas between",
        metavar="KINDS",
    )
    logdir: Dir = option("logs/baselines", "results go to LOGDIR/KIND/SUBSET")
    features: str | None = option(
        None, f"network that is probed: {known_forms()}", group=PROBE, metavar="NAME|RUN|FILE"
    )
    weights: str | None = option(
        None,
        "the same as --features RUN; with a network of timm, a local file of weights",
        group=PROBE,
        metavar="RUN|FILE",
    )
    arch: str | None = option(None, "the same as --features timm:NAME", group=PROBE, metavar="NAME")
    input_size: Pixels | None = option(
        None, "pixels, with --arch; if omitted the network's own", group=PROBE
    )
    unlabelled: Dir | None = option(
        None,
        "with label_spreading: tiles that the labels are spread over, for example D/train (names "
        "of folders are ignored)",
        group=PROBE,
    )
    cache: Dir | None = option(
        None, "folder of computed features; if omitted LOGDIR/features", group=PROBE
    )
    device: str = like(DeviceOption, "device", "auto", group=PROBE)
    workers: Workers = like(
        EvaluationOptions, "workers", some_cores, help="threads that decode images"
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each kind once."""
        return tuple(dict.fromkeys(self.kind))

    @property
    def network(self) -> str | None:
        """What `ldm.features.source.parse_features` takes; None where no network was named."""
        named = self.features if self.arch is None else f"{TIMM}{self.arch}"
        return self.weights if named is None else named

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.features is not None:
            if self.arch is not None:
                yield "arch", "not allowed with --features; give one of them"
            if self.weights is not None and not self.features.startswith(TIMM):
                yield "weights", "not allowed with --features RUN; give one of them"
        yield from super().problems()
        if self.cache is not None and {PROBE, SPREADING}.isdisjoint(self.kind):
            yield "cache", "belongs to --kind linear_probe or label_spreading; leave it out"
        for name in ("features", "weights", "arch", "input_size"):
            if getattr(self, name) is not None and OF_NETWORKS.isdisjoint(self.kind):
                yield name, "belongs to --kind linear_probe; add that, or leave it out"
        if (self.unlabelled is None) == (SPREADING in self.kind):
            yield "unlabelled", "belongs to --kind label_spreading; give both, or neither"
        if self.input_size is not None and not (self.network or TIMM).startswith(TIMM):
            yield "input_size", "belongs to --arch; a run of eval.py knows its own, leave it out"


def open_network(args: Options):
    """The network of a linear probe, an `ldm.features.extractor.Extractor`."""
    from ldm.features.source import parse_features

    if args.network is None:
        raise UserError(
            "linear_probe needs a network: --weights RUN (of eval.py), or --arch NAME --weights"
            " FILE (of timm)"
        )
    weights = None if args.network == args.weights else args.weights
    source = parse_features(args.network, weights, args.input_size)
    return source.open(resolve_device(args.device))


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    data_path = existing_path(args.data_path, "--data_path", "tiles")

    from ldm.evaluation.baselines import run_baseline
    from ldm.evaluation.metrics import format_summary
    from ldm.evaluation.sets import GroupTable

    unlabelled = args.unlabelled and existing_path(args.unlabelled, "--unlabelled", "tiles")
    groups, extractor = GroupTable.given(args), None
    if not OF_NETWORKS.isdisjoint(args.kind):  # opened before minutes are spent on the others
        extractor = open_network(args)
    for kind in args.kinds:
        summary = run_baseline(
            kind,
            data_path,
            args.subset,
            Path(args.logdir),
            groups,
            extractor if kind in OF_NETWORKS else None,
            args.workers,
            args.overwrite,
            unlabelled if kind == SPREADING else None,
            args.cache and Path(args.cache),
        )
        print(format_summary(summary))
        print(f"\n{Path(args.logdir) / kind / args.subset / 'summary.json'}\n")
