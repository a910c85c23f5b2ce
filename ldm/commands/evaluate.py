"""Train a ViT on real and synthetic tiles and report what it is worth on held-out real ones.

It trains on D/SUBSET, chooses the epoch on D/val and reports D/test once: accuracy, macro F1,
sensitivity and specificity of the whole set. As in the published script, --output_dir is the name
of the training subset; the results go to LOGDIR/SUBSET. The same command again goes on where it
stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ldm.cli import MOST, Ckpt, Dir, Seed, contradictions, existing_path, like, option, parse
from ldm.devices import Devices, one_device, shared_devices
from ldm.errors import UserError
from ldm.models.vit_settings import Settings
from ldm.settings import PRECISION_HELP, EvaluationOptions, SharedDevices

if TYPE_CHECKING:
    from ldm.evaluation.sets import GroupTable

run_option = partial(option, group="run")


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions, SharedDevices, Settings):
    example: ClassVar = "--arch vit_small --data_path D --subset 'train5+fake50%' --seeds 0 1 2"

    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] | None = like(
        Settings, "precision", None, help=PRECISION_HELP.format("bf16-mixed")
    )
    logdir: Dir = run_option("logs/eval", "results go to LOGDIR/SUBSET")
    seed: Seed | None = run_option(None, "seed; if omitted 0")
    seeds: tuple[Seed, ...] | None = run_option(
        None, "several seeds: one network each, then mean and deviation", metavar="N"
    )
    num_classes: Annotated[int, Field(ge=2, le=MOST)] | None = run_option(
        None, "compared with the class folders, which decide"
    )
    resume: Ckpt | None = run_option(
        None, "checkpoint to go on from (an interrupted run goes on by itself), or to --eval"
    )
    eval: bool = run_option(
        False, "no training: evaluate --resume CKPT, or else the result of this SUBSET and seed"
    )

    @property
    def all_seeds(self) -> list[int]:
        """Each seed once: of --seeds, or the one of --seed."""
        return list(dict.fromkeys(self.seeds or [self.seed or 0]))

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from EvaluationOptions.problems(self)
        yield from Settings.problems(self)
        yield from contradictions(self, "seeds", "seed")
        if len(self.all_seeds) > 1:
            for name in ("resume", "eval"):
                if getattr(self, name):
                    yield name, "is for one network; give one --seed"
        if self.eval and self.devices not in (None, 1):
            yield "devices", f"{self.devices} is for training; leave it out with --eval"


def evaluate(args: Options, data_path: Path, devices: Devices, groups: "GroupTable | None") -> None:
    """Evaluate a trained network on the sets below `data_path`, and print what was found."""
    from ldm.evaluation.metrics import HEADLINE, format_intervals, format_per_class
    from ldm.evaluation.runs import evaluate_checkpoint

    folder = Path(args.logdir) / args.subset
    checkpoint = existing_path(
        args.resume or folder / f"seed{args.all_seeds[0]}",
        "--resume" if args.resume else "--eval (of a trained network; or give --resume CKPT)",
    )
    report = evaluate_checkpoint(checkpoint, data_path, devices, folder, args.workers, groups)
    for name in ("val", "test"):
        if name in report:
            values = {k: report[name][k] for k in (*HEADLINE, "auc")}
            known = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
            print(f"{name}: {known}\n{format_intervals(report['bootstrap'][name])}")
            print(f"{format_per_class([report[name]])}\n")
    print(f"{folder / 'evaluation.json'}")


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)
    data_path = existing_path(args.data_path, "--data_path", "tiles")
    if args.finetune:
        existing_path(args.finetune, "--finetune", "file")

    if args.eval:
        devices = one_device(args.device)
    else:
        devices = shared_devices(args.device, args.devices, args.num_nodes)
    devices = devices.with_precision(args.precision)
    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    # An omitted precision is recorded as it always was.
    settings = Settings(**values | {"precision": devices.precision if args.precision else "auto"})
    if devices.precision == "16-mixed" and devices.accelerator != "gpu":
        raise UserError(
            f"--precision 16-mixed needs a CUDA device, not {devices.accelerator}; use 32"
        )

    from ldm.evaluation.metrics import format_summary
    from ldm.evaluation.runs import train_and_report
    from ldm.evaluation.sets import GroupTable

    groups = GroupTable.given(args)
    if args.eval:
        evaluate(args, data_path, devices, groups)
        return 0
    summary = train_and_report(
        data_path,
        args.subset,
        settings,
        args.all_seeds,
        Path(args.logdir),
        devices,
        args.workers,
        num_classes=args.num_classes,
        resume=args.resume,
        overwrite=args.overwrite,
        groups=groups,
    )
    if summary is not None:
        print(format_summary(summary))
        print(f"\n{Path(args.logdir) / args.subset / 'summary.json'}")
        print("next: the same with another --subset of the same tiles, to compare with")
    return 0
