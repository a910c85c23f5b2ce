"""Train an autoencoder, a latent diffusion model or a decoder from YAML configurations.

Configurations are merged from left to right, then overridden by `section.key=value` arguments.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ldm.cli import Count, option, parse
from ldm.settings import RunOptions

if TYPE_CHECKING:
    import pytorch_lightning as pl


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
    program: ClassVar = "histodiffusion train"
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

    base: tuple[str, ...] = option(
        "-b", default=(), metavar="YAML", help="configurations, merged left to right"
    )
    train: bool = option(
        "-t", default=False, takes_value=True, help="train; this or --dry_run is needed"
    )
    scale_lr: bool = option(
        default=False,
        takes_value=True,
        help="multiply base_learning_rate by devices x batch size x accumulated batches",
    )
    max_steps: Count | None = option(default=None, help="optimiser steps to train for")
    max_epochs: Count | None = option(default=None, help="epochs to train for")
    overrides: tuple[str, ...] = option(
        default=(),
        positional=True,
        metavar="section.key=value",
        help="settings that override those of the configurations",
    )


def train(args: Options) -> "tuple[pl.Trainer, pl.LightningModule] | None":
    """See `ldm.commands.configured_training.train`."""
    from ldm.commands.configured_training import train

    return train(args)


def main(argv: list[str] | None = None) -> None:
    train(parse(Options, argv))
