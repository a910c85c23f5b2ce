"""The training of the noisy-latent classifier, or of a readout of a diffusion model."""

import logging
import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from ldm.checkpoint import load_model
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.files import write_json
from ldm.models.classifier import (
    LatentSpace,
    NoisyLatentClassifier,
    network_config,
    network_config_of,
    process_params,
    start_from_classifier,
    start_from_unet,
)
from ldm.models.diffusion import scale_text
from ldm.models.readout import FeatureData, FeatureMaker, ReadoutClassifier, choose_draws
from ldm.train import devices_of, train_command

log = logging.getLogger(__name__)


def data_config(args: Any, size: int) -> dict[str, Any]:
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


def check_cache(cache, space) -> None:
    """UserError unless the cache has what a classifier on this `LatentSpace` needs."""
    cache.require(space.first_stage.fingerprint(), "`latents`")
    if not cache.train.classes:
        raise UserError(
            f"`latents` {cache.root}: its tiles have no labels; make it with labelled tiles"
        )
    if cache.validation is None:
        raise UserError(
            f"`latents` {cache.root}: it holds no validation tiles; make it with validation tiles"
        )


def net_config(args: Any, space, classes: list[str], source) -> dict[str, Any]:
    """target/params of the encoder; `source` is the model of `init_from`, or None."""
    if source is not None and source.kind == "classifier":
        return source.net_config
    if source is not None:
        return network_config_of(source, len(classes), **args.network)
    return network_config(space.first_stage, len(classes), **args.network)


def build_model(args: Any, space, classes: list[str]):
    """The classifier of `args` for a measured `LatentSpace`."""
    source = None
    if args.init_from:
        source = load_model(args.init_from, ("diffusion", "classifier"), what="`init_from`")
        if not hasattr(source, "net_config") and source.kind == "classifier":
            raise UserError(
                f"`init_from` {args.init_from} is a readout of a diffusion model, not an encoder "
                "of its own; give another checkpoint"
            )
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
    model.classes, model.seed, model.learning_rate = list(classes), args.seed, args.lr
    if source is not None:
        start = start_from_unet if source.kind == "diffusion" else start_from_classifier
        start(model, source, f"`init_from` {args.init_from}")
    return model


def build_readout(args: Any, data, devices):
    """The readout of `args`, and the features that it is trained and validated on."""
    if devices.ranks > 1:
        raise UserError("`readout` trains on one device; leave `devices`, `gpus`, `num_nodes` out")
    diffusion = load_model(args.readout, "diffusion", what="`readout`")
    model = ReadoutClassifier.of(
        diffusion,
        data.classes,
        blocks=args.readout_blocks and list(args.readout_blocks),
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
    model.net.standardise(train.datasets["features"])
    return model, FeatureData(train, validation, args.batch_size, args.seed)


def describe(args: Any, model, data, devices) -> str:
    """Parameters, data, batch and latent space, one per line."""
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
        ]
    )


def write_result(trainer: pl.Trainer, run) -> None:
    """result.json: the last validation and the best one."""
    # From the files: the last validation may have been in an earlier start of the run.
    validated = [row for row in run.read_metrics() if "val/accuracy" in row]
    if not validated:
        return
    last = {name: value for name, value in validated[-1].items() if name.startswith("val/")}
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


def prepare(args: Any, devices):
    """The labelled tiles with their configuration, the classifier, and what it is trained on."""
    space = LatentSpace.load(args.first_stage, "`readout`" if args.readout else "`first_stage`")
    pixels = space.first_stage.resolution
    if args.image_size not in (None, pixels):
        raise UserError(
            f"`image_size` {args.image_size}: {args.first_stage} works on tiles of {pixels} "
            f"pixels; give `image_size` {pixels}"
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


def train(args: Any) -> tuple[pl.Trainer, pl.LightningModule] | None:
    """Build everything and train; returns the trainer and the model, or None after a dry run."""

    devices = devices_of(args)
    pl.seed_everything(args.seed, workers=True, verbose=False)

    node, data, model, features = prepare(args, devices)
    config = {
        "model": {**model.rebuild_config(), "base_learning_rate": args.lr},
        "data": node,
        "arguments": vars(args),
    }
    text = describe(args, model, data, devices)
    regular = {"filename": "model_{step:06d}", "every_n_train_steps": args.save_interval}
    callbacks = []
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
    trainer, run = train_command(
        args,
        model,
        features,
        devices,
        config,
        stem="classifier",
        checkpoints={"params": regular},
        callbacks=callbacks,
        settings=settings,
        loggers=list(args.logger),
        summary=text,
    )
    if args.dry_run:
        return None
    if trainer.is_global_zero:
        write_result(trainer, run)
        print(f"next: histodiffusion sample -r DIFFUSION --classifier {run.root}")
    return trainer, model
