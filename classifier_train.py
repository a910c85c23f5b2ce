"""Train the noisy-latent classifier that guides sampling, on labelled tiles.

With --readout it reads the features of a frozen diffusion model, which takes few labels and
seconds; otherwise it is an encoder of its own, from scratch or from --init_from.

--image_size and the attention resolutions are in pixels, as in guided diffusion; the network
works on the latents of --first_stage.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ldm.cli import (
    MOST,
    Commas,
    Count,
    NotNegative,
    Pixels,
    Rate,
    Whole,
    Workers,
    existing_path,
    like,
    option,
    parse,
    run_command,
)
from ldm.errors import UserError
from ldm.settings import RunOptions

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger("classifier_train")

FIRST_STAGE_VARIABLE = "HISTO_FIRST_STAGE"
AUGMENT = "d4"
VAL_FRACTION = 0.1
# Where they are omitted: of the published encoder, and of a readout, which has 8,000 vectors to
# learn from instead of images.
DEFAULTS = {"iterations": (300_000, 1500), "batch_size": (32, 128), "lr": (5e-5, 1e-3)}
# Options of an encoder's training or network, which a readout has not.
OF_ENCODER = ("noised", "microbatch", "schedule_sampler", "first_stage", "init_from")


_data = partial(option, group="data")
_training = partial(option, group="training")
_network = partial(option, group="network")
_readout = partial(option, group="readout of a diffusion model")


def default_of(name: str) -> str:
    encoder, readout = DEFAULTS[name]
    return f"if omitted {encoder:g}, or {readout:g} with --readout"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    program: ClassVar = "classifier_train.py"
    replaced: ClassVar = {
        "--classifier-use-fp16": "give --precision 16-mixed instead, or leave it out"
    }
    example: ClassVar = """\
  python classifier_train.py --data_dir D/train5 --val_data_dir D/val --first_stage logs/ldm \\
      --iterations 10000 --name classifier"""

    data_dir: str | None = _data(
        default=None, metavar="DIR", help="labelled tiles, DIR/CLASS/images"
    )
    val_data_dir: str | None = _data(
        default=None,
        metavar="DIR",
        help="labelled tiles to validate on; if omitted, a share of --data_dir is held out",
    )
    val_fraction: Annotated[float, Field(ge=0.01, le=0.5)] | None = _data(
        default=None, help=f"share held out; if omitted {VAL_FRACTION}"
    )
    latents: str | None = _data(
        default=None,
        metavar="DIR",
        help="cache of scripts/cache_latents.py with labels and validation tiles, in place of "
        "--data_dir; augmented as its views are",
    )
    first_stage: str | None = _data(
        default_factory=lambda: os.environ.get(FIRST_STAGE_VARIABLE),
        metavar="CKPT",
        help="diffusion (best) or autoencoder checkpoint that gives the latents; if omitted, the "
        f"environment variable {FIRST_STAGE_VARIABLE}",
    )
    init_from: str | None = _data(
        default=None,
        metavar="CKPT",
        help="diffusion checkpoint whose encoder and middle the classifier starts from, and whose "
        "latents it takes; its network is then that of the checkpoint",
    )
    image_size: Pixels | None = _data(
        default=None, help="pixels of a tile; must be the autoencoder's"
    )
    augment: Literal["none", "d4", "stain", "d4,stain"] | None = _data(
        default=None,
        help=f"d4: the 8 symmetries of the square; stain: its colours; if omitted {AUGMENT}",
    )
    workers: Workers = _data(default=2, published=("--num_workers",), help="loader processes")

    noised: bool = _training(
        default=True,
        takes_value=True,
        help="train on noisy latents; False trains at t = 0 only, on clean latents, as published",
    )
    iterations: Count | None = _training(
        default=None, help=f"optimiser steps; {default_of('iterations')}"
    )
    batch_size: Count | None = _training(
        default=None, help=f"images per step and device; {default_of('batch_size')}"
    )
    microbatch: Annotated[int, Field(ge=-1, le=MOST)] = _training(
        default=-1, help="images per pass; -1 for all at once"
    )
    lr: Rate | None = _training(default=None, help=f"learning rate; {default_of('lr')}")
    anneal_lr: bool = _training(
        default=True, takes_value=True, help="let the learning rate fall linearly to 0"
    )
    weight_decay: NotNegative = _training(default=0.05, help="weight decay of AdamW")
    schedule_sampler: Literal["uniform", "stratified"] = _training(
        default="uniform",
        help="how t is drawn; stratified spreads each batch evenly over the schedule",
    )
    log_interval: Count = _training(default=10, help="steps between log entries")
    eval_interval: Count = _training(default=500, help="steps between validations")
    save_interval: Count = _training(default=10_000, help="steps between checkpoints")
    patience: Count | None = _training(
        default=None, help="stop after this many validations without a better one"
    )
    logger: tuple[Literal["tensorboard", "wandb"], ...] = _training(
        default=("tensorboard",),
        nargs="*",
        help="loggers beside the CSV files; without a name, none",
    )

    classifier_width: Annotated[int, Field(ge=32, le=2**14)] = _network(
        default=128, help="channels of the first level"
    )
    classifier_depth: Count = _network(default=2, help="residual blocks per level")
    classifier_channel_mult: Annotated[tuple[Count, ...], Commas] | None = _network(
        default=None,
        metavar="1,2,4",
        help="width by level, in multiples of the first; if omitted, by the size of the tiles",
    )
    classifier_attention_resolutions: Annotated[tuple[Count, ...], Commas] | None = _network(
        default=None,
        metavar="32,16",
        help="levels with attention, in pixels: a level of factor k counts as image_size / k",
    )
    classifier_pool: str = _network(
        default="attention", help="attention, adaptive, spatial or spatial_v2"
    )
    classifier_resblock_updown: bool = _network(
        default=True, takes_value=True, help="resample inside the residual blocks"
    )
    classifier_use_scale_shift_norm: bool = _network(
        default=True, takes_value=True, help="condition on t by scale and shift"
    )
    classifier_use_checkpoint: bool = _network(
        default=False,
        takes_value=True,
        help="recompute features in the backward pass: less memory, the same gradients",
    )
    classifier_dropout: Annotated[float, Field(ge=0, le=0.9)] = _network(
        default=0.0, help="dropout in every block"
    )
    readout: str | None = _readout(
        default=None,
        metavar="CKPT",
        help="diffusion checkpoint whose averaged UNet is read, frozen; one device trains",
    )
    readout_blocks: Annotated[tuple[Whole, ...], Commas] | None = _readout(
        default=None,
        metavar="0,1,2",
        help="blocks that are read: 0 the middle, 1, 2, ... the up-blocks in the order of use; if "
        "omitted, all",
    )
    readout_width: Count | None = _readout(default=None, help="hidden units; if omitted 256")
    readout_dropout: Annotated[float, Field(ge=0, le=0.9)] | None = _readout(
        default=None, help="dropout of features and hidden units; if omitted 0.3"
    )
    readout_draws: Count | None = _readout(
        default=None,
        help="draws of augmentation, time and noise of each training tile; if omitted, as many as "
        "make 8,000 in all, and at least 8",
    )
    resume: str | None = like(RunOptions, "resume", None, published=("--resume_checkpoint",))

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._problems_of_readout()
        if self.microbatch == 0:
            yield "microbatch", "0 must be -1 (all at once) or above 0"
        if self.latents is None:
            if self.data_dir is None:
                yield "data_dir", "is missing; give the folder of the labelled tiles, or --latents"
            return
        for name in ("data_dir", "val_data_dir", "val_fraction", "augment"):
            if getattr(self, name) is not None:
                yield (
                    name,
                    "the tiles, hold-out and augmentation of --latents are those it was made "
                    "with; leave it out",
                )

    def _problems_of_readout(self) -> Iterator[tuple[str, str]]:
        own = [field.name for field in fields(self)]
        if self.readout is None:
            for name in own:
                if name.startswith("readout_") and getattr(self, name) is not None:
                    yield name, "needs --readout CKPT; give it or leave this out"
        network = [name for name in own if name.startswith("classifier_")]
        if self.readout is not None:
            for field in fields(self):
                name = field.name
                if name == "first_stage" and self.first_stage == os.environ.get(
                    FIRST_STAGE_VARIABLE
                ):
                    continue
                if name in (*OF_ENCODER, *network) and getattr(self, name) != field.default:
                    yield name, "is an option of an encoder; leave it out with --readout"
        elif self.init_from is not None:
            kept = ("classifier_pool", "classifier_dropout", "classifier_use_checkpoint")
            for field in fields(self):
                given = getattr(self, field.name) != field.default
                if field.name in network and field.name not in kept and given:
                    yield field.name, "follows from --init_from; leave it out"

    def with_defaults(self) -> "Options":
        """Numbers that depend on the kind of classifier resolved."""
        kind = 0 if self.readout is None else 1
        chosen = {name: values[kind] for name, values in DEFAULTS.items()}
        given = {name: getattr(self, name) for name in DEFAULTS}
        return replace(
            self.with_tile_defaults(),
            **{name: chosen[name] if value is None else value for name, value in given.items()},
            first_stage=self.readout or self.first_stage or self.init_from,
        )

    def with_tile_defaults(self) -> "Options":
        """Augmentation and hold-out resolved, where tiles are read; a cache has its own."""
        if self.latents is not None:
            return self
        return replace(
            self,
            augment=self.augment or AUGMENT,
            val_fraction=self.val_fraction or VAL_FRACTION,
        )


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv).with_defaults()


def data_config(args: Options, size: int) -> dict[str, Any]:
    """The data node: labelled tiles, augmented in training only, or a cache of latents."""
    params: dict[str, Any] = {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "seed": args.seed,
    }
    target = "ldm.data.datamodule.DataModuleFromConfig"
    if args.latents:
        return {"target": target, "params": {**params, "latents": args.latents}}
    augment = [] if args.augment == "none" else args.augment.split(",")

    def tiles(root: str, **params: Any) -> dict[str, Any]:
        params = {"root": root, "size": size, "labelled": True, **params}
        return {"target": "ldm.data.tiles.TileFolder", "params": params}

    params["train"] = tiles(args.data_dir, augment=augment)
    if args.val_data_dir:
        params["validation"] = tiles(args.val_data_dir)
    else:
        params["val_fraction"] = args.val_fraction
    return {"target": target, "params": params}


def check_paths(args: Options) -> None:
    """Missing files and folders, before anything heavy is imported."""
    if not args.first_stage:
        raise UserError(
            "--first_stage is missing: give a diffusion or autoencoder checkpoint, or export "
            f"{FIRST_STAGE_VARIABLE}=CKPT"
        )
    name = "--readout" if args.readout else "--first_stage"
    existing_path(args.first_stage, name)
    if args.init_from:
        existing_path(args.init_from, "--init_from")
    if args.latents:
        existing_path(args.latents, "--latents", "dir")
    else:
        existing_path(args.data_dir, "--data_dir", "dir")
    if args.val_data_dir:
        existing_path(args.val_data_dir, "--val_data_dir", "dir")


def check_cache(cache, space) -> None:
    """UserError unless the cache has what a classifier on this `LatentSpace` needs."""
    cache.require(space.first_stage.fingerprint(), "--latents")
    if not cache.train.classes:
        raise UserError(
            f"--latents {cache.root}: its tiles have no labels; make it with labelled tiles"
        )
    if cache.validation is None:
        raise UserError(
            f"--latents {cache.root}: it holds no validation tiles; make it with --val_data, or "
            "hold some out"
        )


def _list(values: tuple[int, ...] | None) -> list[int] | None:
    """A list, as the configuration that is stored with the weights has it."""
    return None if values is None else list(values)


def net_config(args: Options, space, classes: list[str], source) -> dict[str, Any]:
    """target/params of the encoder; `source` is the diffusion model of --init_from, or None."""
    from ldm.models.classifier import network_config, network_config_of

    if source is not None:
        return network_config_of(
            source,
            len(classes),
            pool=args.classifier_pool,
            dropout=args.classifier_dropout,
            use_checkpoint=args.classifier_use_checkpoint,
        )
    return network_config(
        space.first_stage,
        len(classes),
        width=args.classifier_width,
        depth=args.classifier_depth,
        channel_mult=_list(args.classifier_channel_mult),
        attention_resolutions=_list(args.classifier_attention_resolutions),
        pool=args.classifier_pool,
        resblock_updown=args.classifier_resblock_updown,
        use_scale_shift_norm=args.classifier_use_scale_shift_norm,
        dropout=args.classifier_dropout,
        use_checkpoint=args.classifier_use_checkpoint,
    )


def build_model(args: Options, space, classes: list[str]):
    """The classifier of `args` for a measured `LatentSpace`."""
    from ldm.checkpoint import load_model
    from ldm.models.classifier import NoisyLatentClassifier, process_params, start_from_unet

    source = None
    if args.init_from:
        source = load_model(args.init_from, "diffusion", what="--init_from")
    model = NoisyLatentClassifier(
        net_config=net_config(args, space, classes, source),
        autoencoder_fingerprint=space.first_stage.fingerprint(),
        scale_factor=space.scale_factor,
        **process_params(space.schedule),
        noised=args.noised,
        t_sampler=args.schedule_sampler,
        microbatch=None if args.microbatch == -1 else args.microbatch,
        weight_decay=args.weight_decay,
        anneal_steps=args.iterations if args.anneal_lr else None,
        first_stage=space.first_stage,
    )
    if source is not None:
        start_from_unet(model, source, f"--init_from {args.init_from}")
    model.classes, model.seed, model.learning_rate = list(classes), args.seed, args.lr
    return model


def build_readout(args: Options, data, devices):
    """The readout of `args`, and the features that it is trained and validated on."""
    from ldm.checkpoint import load_model
    from ldm.models.readout import FeatureData, FeatureMaker, ReadoutClassifier, choose_draws

    if devices.ranks > 1:
        raise UserError("--readout trains on one device; leave --devices, --gpus, --num_nodes out")
    diffusion = load_model(args.readout, "diffusion", what="--readout")
    model = ReadoutClassifier.of(
        diffusion,
        data.classes,
        blocks=_list(args.readout_blocks),
        width=args.readout_width or 256,
        dropout=0.3 if args.readout_dropout is None else args.readout_dropout,
        weight_decay=args.weight_decay,
        anneal_steps=args.iterations if args.anneal_lr else None,
    )
    model.seed, model.learning_rate = args.seed, args.lr
    if args.dry_run:
        return model, data
    tiles = data.train_dataset
    draws = args.readout_draws or choose_draws(len(tiles))
    log.info("reading %d draws of %d tiles", draws, len(tiles))
    maker = FeatureMaker(model, diffusion, devices)
    train, validation = maker.training(tiles, draws, args.seed), maker.validation(data.val_dataset)
    model.net.standardise(train.features)
    return model, FeatureData(train, validation, args.batch_size, args.seed)


def describe(args: Options, model, data, devices) -> str:
    """Parameters, data, batch and latent space, one per line."""
    from ldm.models.diffusion import scale_text

    counts = [data.train_dataset.labels.count(label) for label in range(len(model.classes))]
    tiles = ", ".join(f"{name} {n}" for name, n in zip(model.classes, counts, strict=True))
    channels, size, _ = model.latent_shape
    scale = scale_text(model.scale_factor)
    t = "over the whole schedule" if model.noised else "0 only, on clean latents"
    ranks = devices.ranks
    passes = math.ceil(args.batch_size / (getattr(model, "microbatch", None) or args.batch_size))
    return "\n".join(
        [
            f"parameters   {sum(p.numel() for p in model.net.parameters()):,}",
            f"data         {len(data.train_dataset):,} training tiles, "
            f"{len(data.val_dataset):,} validation tiles",
            f"classes      {tiles}",
            f"latents      {channels}x{size}x{size}, scale {scale}, t {t}",
            f"batch        {ranks * args.batch_size} ({ranks} devices x {args.batch_size}, "
            f"{passes} passes each)",
            f"learning rate {args.lr:.3g}{' annealed to 0' if args.anneal_lr else ''} over "
            f"{args.iterations:,} steps",
            devices.describe(),
        ]
    )


def write_result(trainer: "pl.Trainer", run) -> None:
    """result.json: the last validation and the best one."""
    from ldm.checkpoint import load_model
    from ldm.files import write_json

    last = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    if not last:
        return  # the run was complete already
    best = next(c for c in trainer.checkpoint_callbacks if c.monitor == "val/accuracy")
    result = {
        "step": trainer.global_step,
        "last": last,
        "best": {
            "val/accuracy": float(best.best_model_score),
            "temperature": float(load_model(best.best_model_path, "classifier").temperature),
            "checkpoint": "checkpoints/best.ckpt",
        },
    }
    write_json(run.root / "result.json", result)
    accuracies = {k.removeprefix("val/"): v for k, v in last.items() if "accuracy" in k}
    log.info("validation: %s", ", ".join(f"{k} {v:.4f}" for k, v in accuracies.items()))
    log.info(
        "best validation accuracy %.4f at temperature %.3f: %s",
        result["best"]["val/accuracy"],
        result["best"]["temperature"],
        best.best_model_path,
    )


def prepare(args: Options, devices):
    """The labelled tiles with their configuration, the classifier, and what it is trained on."""
    from ldm.config import instantiate_from_config
    from ldm.models.classifier import LatentSpace

    space = LatentSpace.load(args.first_stage, "--readout" if args.readout else "--first_stage")
    pixels = space.first_stage.resolution
    if args.image_size not in (None, pixels):
        raise UserError(
            f"--image_size {args.image_size}: {args.first_stage} works on tiles of {pixels} "
            f"pixels; give --image_size {pixels}"
        )
    node = data_config(args, pixels)
    data = instantiate_from_config(node)
    data.setup()
    if data.cache is not None:
        check_cache(data.cache, space)
    if args.readout:
        model, features = build_readout(args, data, devices)
    else:
        space = space.measured(data.train_dataset.without_augmentation())
        model, features = build_model(args, space, data.classes), data
    return node, data, model, features


def train(args: Options) -> "tuple[pl.Trainer, pl.LightningModule] | None":
    """Build everything and train; returns the trainer and the model, or None after a dry run."""
    check_paths(args)

    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import EarlyStopping

    from ldm.run import RunFolder
    from ldm.train import checkpoint_callbacks, devices_of, fit

    devices = devices_of(args)
    pl.seed_everything(args.seed, workers=True, verbose=False)

    node, data, model, features = prepare(args, devices)
    config = {
        "model": {**model.rebuild_config(), "base_learning_rate": args.lr},
        "data": node,
        "arguments": vars(args),
    }
    text = describe(args, model, data, devices)
    run, checkpoint = RunFolder.find(
        args.logdir, args.name, args.resume, "classifier", config["model"]
    )
    regular = {"filename": "model_{step:06d}", "every_n_train_steps": args.save_interval}
    callbacks = checkpoint_callbacks(run, model, True, {"params": regular})
    if args.patience:
        callbacks.append(EarlyStopping("val/accuracy", mode="max", patience=args.patience))
    settings = {
        "max_steps": args.iterations,
        "max_epochs": -1,
        "log_every_n_steps": args.log_interval,
        # Counted in steps across epochs; a short run still validates once, at its end.
        "val_check_interval": min(args.eval_interval, args.iterations),
        "check_val_every_n_epoch": None,
    }
    trainer = fit(
        model,
        features,
        run,
        devices,
        checkpoint=checkpoint,
        callbacks=callbacks,
        settings=settings,
        loggers=list(args.logger),
        config=config,
        summary=text,
        dry_run=args.dry_run,
    )
    if args.dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(config)))
        print(text)
        return None
    if trainer.is_global_zero:
        write_result(trainer, run)
    return trainer, model


def main(argv: list[str] | None = None) -> None:
    train(parse_arguments(argv))


if __name__ == "__main__":
    run_command(main, Options)
