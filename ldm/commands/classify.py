"""Train the noisy-latent classifier that guides sampling, on labelled tiles.

With --readout it reads the features of a frozen diffusion model, which takes few labels and
seconds; otherwise it is an encoder of its own, from scratch or from --init_from.

--image_size and the attention resolutions are in pixels, as in guided diffusion; the network
works on the latents of --first_stage.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ldm.cli import (
    MOST,
    Ckpt,
    Commas,
    Count,
    Dir,
    NotNegative,
    Pixels,
    Rate,
    Whole,
    Workers,
    existing_path,
    like,
    option,
    parse,
)
from ldm.errors import UserError
from ldm.settings import RunOptions

if TYPE_CHECKING:
    import pytorch_lightning as pl


FIRST_STAGE_VARIABLE = "HISTO_FIRST_STAGE"
AUGMENT = "d4"
VAL_FRACTION = 0.1
# Where they are omitted: of the published encoder, and of a readout, which has 8,000 vectors to
# learn from instead of images.
DEFAULTS = {"iterations": (300_000, 1500), "batch_size": (32, 128), "lr": (5e-5, 1e-3)}
# Options of an encoder's training or network, which a readout has not.
OF_ENCODER = ("noised", "microbatch", "schedule_sampler", "first_stage", "init_from")
# Options of an encoder's network that the checkpoint of --init_from leaves open.
KEPT = ("classifier_pool", "classifier_dropout", "classifier_use_checkpoint")


_data = partial(option, group="data")
_training = partial(option, group="training")
_network = partial(option, group="network")
_readout = partial(option, group="readout of a diffusion model")


def default_of(name: str) -> str:
    encoder, readout = DEFAULTS[name]
    return f"if omitted {encoder:g}, or {readout:g} with --readout"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    replaced: ClassVar = {
        "--classifier-use-fp16": "give --precision 16-mixed instead, or leave it out"
    }
    example: ClassVar = """\
--data_dir D/train5 --val_data_dir D/val --first_stage logs/ldm \\
      --iterations 10000 --name classifier"""

    data_dir: Dir | None = _data(None, "labelled tiles, DIR/CLASS/images")
    val_data_dir: Dir | None = _data(
        None, "labelled tiles to validate on; if omitted, a share of --data_dir is held out"
    )
    val_fraction: Annotated[float, Field(ge=0.01, le=0.5)] | None = _data(
        None, f"share held out; if omitted {VAL_FRACTION}"
    )
    latents: Dir | None = _data(
        None,
        "cache of scripts/cache_latents.py with labels and validation tiles, in place of "
        "--data_dir; augmented as its views are",
    )
    first_stage: Ckpt | None = _data(
        lambda: os.environ.get(FIRST_STAGE_VARIABLE),
        "diffusion (best) or autoencoder checkpoint that gives the latents; if omitted, the "
        f"environment variable {FIRST_STAGE_VARIABLE}",
    )
    init_from: Ckpt | None = _data(
        None,
        "diffusion checkpoint whose encoder and middle the classifier starts from, and whose "
        "latents it takes, or an (imported) classifier; the network is that of the checkpoint",
    )
    image_size: Pixels | None = _data(None, "pixels of a tile; must be the autoencoder's")
    augment: Literal["none", "d4", "stain", "d4,stain"] | None = _data(
        None, f"d4: the 8 symmetries of the square; stain: its colours; if omitted {AUGMENT}"
    )
    workers: Workers = _data(2, "loader processes", published=("--num_workers",))

    noised: bool = _training(
        True,
        "train on noisy latents; False trains at t = 0 only, on clean latents, as published",
        takes_value=True,
    )
    iterations: Count | None = _training(None, f"optimiser steps; {default_of('iterations')}")
    batch_size: Count | None = _training(
        None, f"images per step and device; {default_of('batch_size')}"
    )
    microbatch: Annotated[int, Field(ge=-1, le=MOST)] = _training(
        -1, "images per pass; -1 for all at once"
    )
    lr: Rate | None = _training(None, f"learning rate; {default_of('lr')}")
    anneal_lr: bool = _training(True, "let the learning rate fall linearly to 0", takes_value=True)
    weight_decay: NotNegative = _training(0.05, "weight decay of AdamW")
    schedule_sampler: Literal["uniform", "stratified"] = _training(
        "uniform", "how t is drawn; stratified spreads each batch evenly over the schedule"
    )
    log_interval: Count = _training(10, "steps between log entries")
    eval_interval: Count = _training(500, "steps between validations")
    save_interval: Count = _training(10_000, "steps between checkpoints")
    patience: Count | None = _training(
        None, "stop after this many validations without a better one"
    )
    logger: tuple[Literal["tensorboard", "wandb"], ...] = _training(
        ("tensorboard",), "loggers beside the CSV files; without a name, none", nargs="*"
    )

    classifier_width: Annotated[int, Field(ge=32, le=2**14)] = _network(
        128, "channels of the first level"
    )
    classifier_depth: Count = _network(2, "residual blocks per level")
    classifier_channel_mult: Annotated[tuple[Count, ...], Commas] | None = _network(
        None,
        "width by level, in multiples of the first; if omitted, by the size of the tiles",
        metavar="1,2,4",
    )
    classifier_attention_resolutions: Annotated[tuple[Count, ...], Commas] | None = _network(
        None,
        "levels with attention, in pixels: a level of factor k counts as image_size / k",
        metavar="32,16",
    )
    classifier_pool: str = _network("attention", "attention, adaptive, spatial or spatial_v2")
    classifier_resblock_updown: bool = _network(
        True, "resample inside the residual blocks", takes_value=True
    )
    classifier_use_scale_shift_norm: bool = _network(
        True, "condition on t by scale and shift", takes_value=True
    )
    classifier_use_checkpoint: bool = _network(
        False,
        "recompute features in the backward pass: less memory, the same gradients",
        takes_value=True,
    )
    classifier_dropout: Annotated[float, Field(ge=0, le=0.9)] = _network(
        0.0, "dropout in every block"
    )
    readout: Ckpt | None = _readout(
        None, "diffusion checkpoint whose averaged UNet is read, frozen; one device trains"
    )
    readout_blocks: Annotated[tuple[Whole, ...], Commas] | None = _readout(
        None,
        "blocks that are read: 0 the middle, 1, 2, ... the up-blocks in the order of use; if "
        "omitted, all",
        metavar="0,1,2",
    )
    readout_width: Count | None = _readout(None, "hidden units; if omitted 256")
    readout_dropout: Annotated[float, Field(ge=0, le=0.9)] | None = _readout(
        None, "dropout of features and hidden units; if omitted 0.3"
    )
    readout_draws: Count | None = _readout(
        None,
        "draws of augmentation, time and noise of each training tile; if omitted, as many as "
        "make 8,000 in all, and at least 8",
    )
    resume: str | None = like(RunOptions, "resume", None, published=("--resume_checkpoint",))

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._problems_of_readout()
        if self.microbatch == 0:
            yield "microbatch", "0 must be -1 (all at once) or above 0"
        if self.latents is None and self.data_dir is None:
            yield "data_dir", "is missing; give the folder of the labelled tiles, or --latents"
        for name in ("data_dir", "val_data_dir", "val_fraction", "augment"):
            if self.latents is not None and getattr(self, name) is not None:
                yield (
                    name,
                    "the tiles, hold-out and augmentation of --latents are those it was made "
                    "with; leave it out",
                )

    def _problems_of_readout(self) -> Iterator[tuple[str, str]]:
        for field in fields(self):
            name, factory = field.name, field.default_factory
            if getattr(self, name) == (factory() if callable(factory) else field.default):
                continue
            of_network = name.startswith("classifier_")
            if self.readout is None:
                if name.startswith("readout_"):
                    yield name, "needs --readout CKPT; give it or leave this out"
                if self.init_from is not None and of_network and name not in KEPT:
                    yield name, "follows from --init_from; leave it out"
            elif of_network or name in OF_ENCODER:
                yield name, "is an option of an encoder; leave it out with --readout"

    @property
    def network(self) -> dict[str, Any]:
        """Settings of the encoder's network, as far as --init_from leaves them open."""
        names = [name for name in vars(self) if name.startswith("classifier_")]
        values = {name: getattr(self, name) for name in (KEPT if self.init_from else names)}
        # Lists, as the configuration that is stored with the weights has them.
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {name.removeprefix("classifier_"): value for name, value in values.items()}

    def with_defaults(self) -> "Options":
        """What depends on the kind of classifier and, where tiles are read, on these, resolved."""
        usual = {name: values[self.readout is not None] for name, values in DEFAULTS.items()}
        if self.latents is None:  # a cache has its own
            usual |= {"augment": AUGMENT, "val_fraction": VAL_FRACTION}
        usual = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return replace(
            self, **usual, first_stage=self.readout or self.first_stage or self.init_from
        )


def check_paths(args: Options) -> None:
    """Missing files and folders, before anything heavy is imported."""
    if not args.first_stage:
        raise UserError(
            "--first_stage is missing: give a diffusion or autoencoder checkpoint, or export "
            f"{FIRST_STAGE_VARIABLE}=CKPT"
        )
    for path, name, kind in (
        (args.first_stage, "--readout" if args.readout else "--first_stage", "any"),
        (args.init_from, "--init_from", "any"),
        (args.latents, "--latents", "dir"),
        (args.data_dir, "--data_dir", "tiles"),
        (args.val_data_dir, "--val_data_dir", "tiles"),
    ):
        if path is not None:
            existing_path(path, name, kind)


def train(args: Options) -> "tuple[pl.Trainer, pl.LightningModule] | None":
    """See `ldm.commands.classifier_training.train`."""
    args = args.with_defaults()
    check_paths(args)

    from ldm.commands.classifier_training import train

    return train(args)


def main(argv: list[str] | None = None) -> None:
    train(parse(Options, argv))
