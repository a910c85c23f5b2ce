"""Train an autoencoder, a latent diffusion model or a decoder from YAML configurations.

Configurations are merged from left to right, then overridden by `section.key=value` arguments.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.cli import Count, option, parse
from ldm.errors import UserError
from ldm.settings import RunOptions

if TYPE_CHECKING:
    import pytorch_lightning as pl

FIRST_STAGE = "train --base DIFFUSION.yaml -t, with HISTO_AUTOENCODER={run}"
NEXT = {  # what a run is for, by its model
    "AutoencoderKL": FIRST_STAGE,
    "PatchPCA": FIRST_STAGE,
    "DecoderFinetune": "sample -r DIFFUSION --classifier CLASSIFIER --first_stage {run}",
    "LatentDiffusion": "classify --data_dir LABELLED --val_data_dir VAL --first_stage {run}",
}
# Options of the published command that are settings of Lightning's trainer.
OF_TRAINER = [
    "accumulate_grad_batches",
    "benchmark",
    "check_val_every_n_epoch",
    "deterministic",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "min_epochs",
    "min_steps",
    "num_sanity_val_steps",
    "overfit_batches",
    "val_check_interval",
]


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    replaced: ClassVar = {
        **{f"--{key.replace('_', '-')}": f"lightning.trainer.{key}" for key in OF_TRAINER},
        "--accelerator": "give --gpus, --devices or --strategy",
        **dict.fromkeys(("-d", "--debug"), "give --dry_run, or --max_steps"),
        **dict.fromkeys(("-f", "--postfix", "-p", "--project"), "give --name and --logdir"),
        "--no-test": "no test follows a training, leave it out",
    }
    example: ClassVar = """\
--base configs/latent-diffusion/histo-ldm-kl-8.yaml -t --gpus 0,1,2,3 \\
      data.params.train.params.root=/data/tiles"""

    base: tuple[str, ...] = option((), "configurations, merged left to right", "-b", metavar="YAML")
    train: bool = option(False, "train; this or --dry_run is needed", "-t", takes_value=True)
    scale_lr: bool = option(
        False,
        "multiply base_learning_rate by devices x batch size x accumulated batches",
        takes_value=True,
    )
    max_steps: Count | None = option(None, "optimiser steps to train for")
    max_epochs: Count | None = option(None, "epochs to train for")
    overrides: tuple[str, ...] = option(
        (),
        "settings that override those of the configurations",
        positional=True,
        metavar="section.key=value",
    )


def load_configuration(args: Options) -> dict[str, Any]:
    """The checked configuration of `base` (or of the run to resume) and the overrides."""
    from ldm.config import load_configs, resolve, validate_config
    from ldm.run import RunFolder

    bases = args.base
    if args.resume and not bases:
        bases = [RunFolder.of_resume(args.resume)[0].configs / "resolved.yaml"]
    if not bases:
        raise UserError("give at least one YAML configuration, or a run to `resume`", "base")
    config = resolve(load_configs(bases, args.overrides))
    validate_config(config)
    trainer = config.setdefault("lightning", {}).setdefault("trainer", {})
    if args.max_steps is not None:
        trainer["max_steps"] = args.max_steps
    if args.max_epochs is not None:
        trainer["max_epochs"] = args.max_epochs
    if "max_steps" in trainer and "max_epochs" not in trainer:
        trainer["max_epochs"] = -1  # Lightning would stop after 1,000 epochs
    if isinstance(trainer.get("val_check_interval"), int):
        # A number of batches, across epochs: Lightning otherwise refuses one that exceeds an epoch.
        trainer.setdefault("check_val_every_n_epoch", None)
    config["data"].setdefault("params", {}).setdefault("seed", args.seed)
    return config


def configured_devices(args: Options, settings: dict[str, Any]) -> Options:
    """`args`, if it names no devices, with those of `settings`, from which they are removed."""
    wanted = settings.pop("devices", None)
    if args.gpus is None and args.devices is None and wanted not in (None, "auto"):
        if isinstance(wanted, int) and wanted > 0:
            args = replace(args, devices=wanted)
        elif isinstance(wanted, list):
            args = replace(args, gpus=",".join(map(str, wanted)) + ",")  # also of a single one
        else:
            args = replace(args, gpus=str(wanted))
    nodes = settings.pop("num_nodes", 1)
    return replace(args, num_nodes=nodes) if args.num_nodes == 1 else args


def describe(model, data, batch: int, learning_rate: float, scaled: bool) -> str:
    """Parameter counts, data set sizes, effective batch and learning rate, one per line."""
    lines = []
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        trained = sum(p.numel() for p in child.parameters() if p.requires_grad)
        lines.append(f"parameters   {name}: {count:,} ({trained:,} trained)")
    held_out = 0 if data.val_dataset is None else len(data.val_dataset)
    lines.append(
        f"data         {len(data.train_dataset):,} training tiles, {held_out:,} validation tiles"
    )
    if data.classes:
        lines.append(f"classes      {', '.join(data.classes)}")
    lines.append(f"batch        {batch} (devices x batch size x accumulated batches)")
    rule = "base_learning_rate x batch" if scaled else "base_learning_rate, not scaled"
    lines.append(f"learning rate {learning_rate:.3g} ({rule})")
    return "\n".join(lines)


def train(args: Options) -> "tuple[pl.Trainer, pl.LightningModule] | None":
    """Build everything and train; returns the trainer and the model, or None after a dry run."""
    if not (args.train or args.dry_run):
        raise UserError(
            "nothing to do: give `train` to train, or `dry_run` to see what would be trained"
        )
    config = load_configuration(args)

    import pytorch_lightning as pl

    from ldm.config import instantiate_from_config
    from ldm.train import devices_of, train_command

    args = configured_devices(args, config["lightning"]["trainer"])
    devices = devices_of(args)
    pl.seed_everything(args.seed, workers=True, verbose=False)

    data = instantiate_from_config(config["data"])
    data.setup()
    model = instantiate_from_config(config["model"])
    model.seed = args.seed
    model.use_classes(data.classes)
    model.check_data(data)
    lightning = config["lightning"]
    accumulated = lightning["trainer"].get("accumulate_grad_batches", 1)
    batch = devices.ranks * config["data"]["params"]["batch_size"] * accumulated
    model.learning_rate = config["model"]["base_learning_rate"] * (batch if args.scale_lr else 1)
    text = describe(model, data, batch, model.learning_rate, args.scale_lr)
    stem = Path(args.base[0]).stem if args.base else "run"
    nodes = (lightning.get("callbacks") or {}).values()
    settings = dict(lightning["trainer"])
    if lightning.get("strategy"):
        settings["strategy"] = instantiate_from_config(lightning["strategy"])
    trainer, run = train_command(
        args,
        model,
        data,
        devices,
        config,
        stem=stem,
        checkpoints=lightning.get("modelcheckpoint"),
        callbacks=[instantiate_from_config(node) for node in nodes],
        settings=settings,
        loggers=lightning.get("logger"),
        summary=text,
    )
    if args.dry_run:
        return None
    if trainer.is_global_zero:
        command = NEXT.get(type(model).__name__, "sample -r {run}")
        print(f"next: histodiffusion {command.format(run=run.root)}")
    return trainer, model


def main(argv: list[str] | None = None) -> None:
    train(parse(Options, argv))
