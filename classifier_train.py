"""Train the noisy-latent classifier that guides sampling, on labelled tiles.

    python classifier_train.py --data_dir D --val_data_dir V --iterations 300000 --anneal_lr True \\
        --batch_size 32 --lr 5e-5 --save_interval 10000 --weight_decay 0.05 --image_size 256 \\
        --classifier_attention_resolutions 32,16 --classifier_depth 2 --classifier_width 128 \\
        --classifier_pool attention --classifier_resblock_updown True \\
        --classifier_use_scale_shift_norm True --first_stage CKPT

`--image_size` and the attention resolutions are in pixels, as in guided diffusion; the network
works on the latents of `--first_stage`.
"""

import argparse
import logging
import math
import os
from typing import TYPE_CHECKING, Any

from ldm.cli import ArgumentParser, boolean, existing_path, number, run_command
from ldm.errors import UserError
from ldm.run import LOGGERS
from ldm.train import add_run_arguments

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger("classifier_train")

FIRST_STAGE_VARIABLE = "HISTO_FIRST_STAGE"
AUGMENTATIONS = ("none", "d4", "stain", "d4,stain")
AUGMENT = "d4"
VAL_FRACTION = 0.1
OF_TILES = ("data_dir", "val_data_dir", "val_fraction", "augment")  # a cache has its own


def whole_numbers(text: str) -> list[int]:
    """An argparse type for `32,16`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 32,16") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must hold numbers above 0")
    return values


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="classifier_train.py", description=__doc__.splitlines()[0])
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data_dir", help="labelled tiles, DIR/CLASS/images")
    add("--val_data_dir", help="labelled tiles to validate on; without it a share is held out")
    add(
        "--val_fraction",
        type=number(float, 0.01, 0.5),
        help=f"share held out ({VAL_FRACTION} when not given)",
    )
    add(
        "--latents",
        metavar="DIR",
        help="cache of scripts/cache_latents.py with labels and validation tiles, in place of "
        "--data_dir; augmented as its views are",
    )
    add(
        "--first_stage",
        metavar="CKPT",
        default=os.environ.get(FIRST_STAGE_VARIABLE),
        help="diffusion (best) or autoencoder checkpoint that gives the latents",
    )
    add("--image_size", type=number(int, 8), help="pixels of a tile; as the autoencoder's")
    add(
        "--augment",
        choices=AUGMENTATIONS,
        help=f"d4: the 8 symmetries of the square ({AUGMENT} when not given)",
    )
    add("--num_workers", type=number(int, 0), default=2, help="loader processes")

    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--noised", type=boolean, default=True, help="False trains at t = 0 only, on clean latents")
    add("--iterations", type=number(int, 1), default=300_000, help="optimiser steps")
    add("--batch_size", type=number(int, 1), default=32, help="images per step and device")
    add(
        "--microbatch", type=number(int, -1), default=-1, help="images per pass; -1 for all at once"
    )
    add("--lr", type=number(float, 0), default=5e-5, help="learning rate")
    add("--anneal_lr", type=boolean, default=True, help="let the learning rate fall linearly to 0")
    add("--weight_decay", type=number(float, 0), default=0.05, help="of AdamW")
    add(
        "--schedule_sampler",
        choices=("uniform", "stratified"),
        default="uniform",
        help="how t is drawn; stratified spreads each batch evenly over the schedule",
    )
    add("--log_interval", type=number(int, 1), default=10, help="steps between log entries")
    add("--eval_interval", type=number(int, 1), default=500, help="steps between validations")
    add("--save_interval", type=number(int, 1), default=10_000, help="steps between checkpoints")
    add(
        "--patience",
        type=number(int, 1),
        help="stop after so many validations without a better one",
    )
    add(
        "--logger",
        nargs="*",
        choices=LOGGERS,
        default=["tensorboard"],
        help="beside the CSV files; without names none",
    )
    add("--resume_checkpoint", metavar="CKPT", dest="resume", help="the same as --resume")

    net = parser.add_argument_group("network")
    add = net.add_argument
    add("--classifier_width", type=number(int, 32), default=128, help="channels of the first level")
    add("--classifier_depth", type=number(int, 1), default=2, help="residual blocks per level")
    add(
        "--classifier_channel_mult",
        type=whole_numbers,
        metavar="1,2,4",
        help="width by level, in multiples of the first; by tile size when not given",
    )
    add(
        "--classifier_attention_resolutions",
        type=whole_numbers,
        metavar="32,16",
        help="levels with attention, in pixels: a level of factor k counts as image_size / k",
    )
    add("--classifier_pool", default="attention", help="attention, adaptive, spatial or spatial_v2")
    add("--classifier_resblock_updown", type=boolean, default=True, help="resample in the blocks")
    add(
        "--classifier_use_scale_shift_norm", type=boolean, default=True, help="t by scale and shift"
    )
    add(
        "--classifier_use_checkpoint",
        type=boolean,
        default=False,
        help="recompute features in the backward pass: less memory, the same gradients",
    )
    add("--classifier_dropout", type=number(float, 0, 0.9), default=0.0, help="in every block")

    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.microbatch == 0:
        parser.error("argument --microbatch: 0 must be -1 (all at once) or above 0")
    if args.latents is None:
        if args.data_dir is None:
            parser.error("argument --data_dir: give the folder of the labelled tiles, or --latents")
        args.augment = args.augment or AUGMENT
        args.val_fraction = args.val_fraction or VAL_FRACTION
    else:
        given = [name for name in OF_TILES if getattr(args, name) is not None]
        if given:
            parser.error(
                f"argument --{given[0]}: the tiles, hold-out and augmentation of --latents are "
                "those it was made with; leave it out"
            )
    return args


def data_config(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """The data node: labelled tiles, augmented in training only, or a cache of latents."""
    params: dict[str, Any] = {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
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


def check_paths(args: argparse.Namespace) -> None:
    """Missing files and folders, before anything heavy is imported."""
    if not args.first_stage:
        raise UserError(
            "--first_stage is missing: give a diffusion or autoencoder checkpoint, or export "
            f"{FIRST_STAGE_VARIABLE}=CKPT"
        )
    existing_path(args.first_stage, "--first_stage")
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


def build_model(args: argparse.Namespace, space, classes: list[str]):
    """The classifier of `args` for a measured `LatentSpace`."""
    from ldm.models.classifier import NoisyLatentClassifier, network_config

    schedule = space.schedule
    model = NoisyLatentClassifier(
        net_config=network_config(
            space.first_stage,
            len(classes),
            width=args.classifier_width,
            depth=args.classifier_depth,
            channel_mult=args.classifier_channel_mult,
            attention_resolutions=args.classifier_attention_resolutions,
            pool=args.classifier_pool,
            resblock_updown=args.classifier_resblock_updown,
            use_scale_shift_norm=args.classifier_use_scale_shift_norm,
            dropout=args.classifier_dropout,
            use_checkpoint=args.classifier_use_checkpoint,
        ),
        autoencoder_fingerprint=space.first_stage.fingerprint(),
        scale_factor=space.scale_factor,
        timesteps=schedule["timesteps"],
        beta_schedule=schedule["name"],
        linear_start=schedule["linear_start"],
        linear_end=schedule["linear_end"],
        noised=args.noised,
        t_sampler=args.schedule_sampler,
        microbatch=None if args.microbatch == -1 else args.microbatch,
        weight_decay=args.weight_decay,
        anneal_steps=args.iterations if args.anneal_lr else None,
        first_stage=space.first_stage,
    )
    model.classes, model.seed, model.learning_rate = list(classes), args.seed, args.lr
    return model


def describe(args: argparse.Namespace, model, data, devices) -> str:
    """Parameters, data, batch and latent space, one per line."""
    counts = [data.train_dataset.labels.count(label) for label in range(len(model.classes))]
    tiles = ", ".join(f"{name} {n}" for name, n in zip(model.classes, counts, strict=True))
    channels, size, _ = model.latent_shape
    t = "over the whole schedule" if model.noised else "0 only, on clean latents"
    ranks = devices.ranks
    passes = math.ceil(args.batch_size / (model.microbatch or args.batch_size))
    return "\n".join(
        [
            f"parameters   {sum(p.numel() for p in model.net.parameters()):,}",
            f"data         {len(data.train_dataset):,} training tiles, "
            f"{len(data.val_dataset):,} validation tiles",
            f"classes      {tiles}",
            f"latents      {channels}x{size}x{size}, scale {float(model.scale_factor):.4f}, t {t}",
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


def train(args: argparse.Namespace) -> "tuple[pl.Trainer, pl.LightningModule] | None":
    """Build everything and train; returns the trainer and the model, or None after a dry run."""
    check_paths(args)

    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import EarlyStopping

    from ldm.config import instantiate_from_config
    from ldm.models.classifier import LatentSpace
    from ldm.run import RunFolder
    from ldm.train import checkpoint_callbacks, devices_of, fit

    devices = devices_of(args)
    pl.seed_everything(args.seed, workers=True, verbose=False)

    space = LatentSpace.load(args.first_stage)
    pixels = space.first_stage.resolution
    if args.image_size not in (None, pixels):
        raise UserError(
            f"--image_size {args.image_size}: {args.first_stage} works on tiles of {pixels} "
            f"pixels; give --image_size {pixels}"
        )
    data = instantiate_from_config(data_config(args, pixels))
    data.setup()
    tiles = data.train_dataset
    if data.cache is None:
        tiles = tiles.subset(range(len(tiles)), random=False)
    else:
        check_cache(data.cache, space)
    space = space.measured(tiles)
    model = build_model(args, space, data.classes)
    config = {
        "model": {**model.rebuild_config(), "base_learning_rate": args.lr},
        "data": data_config(args, pixels),
        "arguments": vars(args),
    }
    text = describe(args, model, data, devices)
    if args.dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(config)))
        print(text)
        return None

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
        data,
        run,
        devices,
        checkpoint=checkpoint,
        callbacks=callbacks,
        settings=settings,
        loggers=args.logger,
        config=config,
        summary=text,
    )
    if trainer.is_global_zero:
        write_result(trainer, run)
    return trainer, model


def main(argv: list[str] | None = None) -> None:
    train(parse_arguments(argv))


if __name__ == "__main__":
    run_command(main)
