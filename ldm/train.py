"""One way to train: every stage goes through `fit`."""

import inspect
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins import environments
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.checkpoint import read_checkpoint
from ldm.config import instantiate_from_config, tile_roots
from ldm.devices import (
    Devices,
    in_shell_of_slurm,
    leave_group,
    quieten_lightning,
    training_devices,
    within_memory,
)
from ldm.errors import UserError
from ldm.files import remove_leftovers, require_outside, require_space, write_text
from ldm.models.base import HistoModule
from ldm.models.callbacks import (
    MARGIN,
    BestCheckpoints,
    CheckpointFiles,
    FollowLayout,
    LastCheckpoint,
    ProgressBar,
    RecentCheckpoints,
    RegularCheckpoint,
    Throughput,
    TimeLeft,
    expected_size,
)
from ldm.models.diffusion import LatentDiffusion
from ldm.models.sharding import ShardedStrategy
from ldm.run import RunFolder
from ldm.settings import RunOptions, SpeedOptions

log = logging.getLogger(__name__)

CLIP = "gradient_clip_val"
CHECKPOINT_EVERY = 1000  # optimiser steps
# Checkpoints are called as we say, and overwritten.
OWN_NAMES = {"enable_version_counter": False, "auto_insert_metric_name": False}


def devices_of(args: RunOptions) -> Devices:
    """The devices that the options of a training ask for."""
    chosen = training_devices(args.gpus, args.devices, args.num_nodes, args.dry_run)
    speed = {field.name: getattr(args, field.name) for field in fields(SpeedOptions)}
    return chosen.with_precision(args.precision, **speed)


def fit(
    model: HistoModule,
    data: pl.LightningDataModule,
    run: RunFolder,
    devices: Devices,
    *,
    checkpoint: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    settings: dict[str, Any] | None = None,
    loggers: Any = None,
    config: dict[str, Any] | None = None,
    summary: str = "",
    dry_run: bool = False,
) -> pl.Trainer:
    """Train a model in a run's folder, and leave `last.ckpt`.

    Args:
        checkpoint: Where to go on from; None for a new run.
        callbacks: See `checkpoint_callbacks`.
        settings: Arguments of Lightning's trainer; they take precedence.
        loggers: `lightning.logger` of the configuration, see `build_loggers`; False for none, not
            even the CSV files.
        config: Resolved configuration, for the record of this start; None keeps no record.
        summary: What is trained, shown at the start.
        dry_run: Only print `config` and `summary` and check what can be checked without the
            devices; nothing is written.

    Raises:
        UserError: The settings contradict each other, the disk is too small, a number is not
            finite, or the checkpoint holds another model.
        KeyboardInterrupt: Training was interrupted; all checkpoints that exist are complete.
        Stopped: A signal asked the run to stop; `last.ckpt` is of its last step.
    """
    if checkpoint is None and config is not None:
        require_outside({"`logdir`": run.root}, {"the folder of tiles": tile_roots(config["data"])})
    trainer = build_trainer(model, run, devices, callbacks, settings or {}, loggers, dry_run)
    if checkpoint is not None:
        # A checkpoint that does not fit is refused before anything is written.
        model.on_load_checkpoint(read_checkpoint(checkpoint, (model.kind,), "`resume`"))
    _prepare_disk(trainer, model, run, dry_run)
    summary += f"\n{devices.describe(model.fused)}"
    if dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), summary, sep="\n")
        return trainer
    _start_loggers(trainer, run)
    if trainer.is_global_zero:
        if config is not None:
            run.record(config, model.seed)
        log.info("%s\nwriting to    %s", summary, run.root)
    joined = torch.distributed.is_initialized()
    _run(trainer, model, data, checkpoint)
    if trainer.is_global_zero:
        log.info("done at step %d: %s", trainer.global_step, run.last)
    if not joined:
        leave_group()
    return trainer


def train_command(
    args: RunOptions,
    model: HistoModule,
    data: pl.LightningDataModule,
    devices: Devices,
    config: dict[str, Any],
    *,
    stem: str,
    checkpoints: dict[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[pl.Trainer, RunFolder]:
    """Train in the folder that a command's options name, going on where an earlier start stopped.

    Args:
        config: Resolved configuration.
        stem: What an unnamed run is called after its time.
        checkpoints: See `node` of `checkpoint_callbacks`.
        callbacks: Further ones.
        options: See `fit`.
    """
    run, found = RunFolder.find(args.logdir, args.name, args.resume, stem, config["model"])
    kept = checkpoint_callbacks(run, model, data.val_dataset is not None, checkpoints)
    options |= {"config": config, "dry_run": args.dry_run, "callbacks": [*kept, *callbacks]}
    return fit(model, data, run, devices, checkpoint=found, **options), run


def _run(
    trainer: pl.Trainer, model: HistoModule, data: pl.LightningDataModule, checkpoint: Path | None
) -> None:
    # Older Lightning has no such argument; its own default then is to load everything.
    takes_it = "weights_only" in inspect.signature(trainer.fit).parameters
    safe = {"weights_only": True} if checkpoint and takes_it else {}
    try:
        with within_memory(data.batch_size):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, **safe)
    except SystemExit:  # what Lightning makes of Ctrl-C; older versions return
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def build_trainer(
    model: HistoModule,
    run: RunFolder,
    devices: Devices,
    callbacks: Sequence[pl.Callback],
    settings: dict[str, Any],
    loggers: Any = None,
    dry_run: bool = False,
) -> pl.Trainer:
    """A Lightning trainer for a model, which is prepared for the devices.

    It logs to CSV in the run's folder and shows a progress bar. Arguments: see `fit`.
    """
    quieten_lightning()
    settings = dict(settings)
    settings["strategy"] = choose_strategy(settings.get("strategy"), devices, model)
    model.fused = devices.fuses(clips=bool(settings.get(CLIP)))
    if dry_run:  # what was said of devices is checked by now
        devices = Devices("cpu", 1)
        settings |= {"strategy": "auto", "plugins": None}
    devices.prepare(model, model.networks())
    if not model.automatic_optimization:
        # Lightning leaves accumulation and clipping to modules that step by themselves.
        for name in ("accumulate_grad_batches", CLIP, "gradient_clip_algorithm"):
            if name in settings:
                setattr(model, name, settings.pop(name))
    plugins = settings.pop("plugins", None) or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    watching: list[pl.Callback] = [Throughput(), FollowLayout()]
    kept: list[Any] = []
    if loggers is not False:
        # One version per start: a resumed run does not overwrite what was logged before.
        kept = [CSVLogger(run.root, name="metrics"), *build_loggers(loggers, run)]
        watching.append(LearningRateMonitor("step"))
    if settings.get("enable_progress_bar", True):
        live = settings["enable_progress_bar"] = sys.stderr.isatty()
        watching += [ProgressBar(), TimeLeft(live)] if live else [TimeLeft()]
    arguments = {
        "accelerator": devices.accelerator,
        "devices": devices.devices,
        "num_nodes": devices.num_nodes,
        "precision": devices.precision,
        "default_root_dir": run.root,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        **settings,
        "logger": kept,
        "plugins": [*plugins, *([] if dry_run else cluster_plugins()), CheckpointFiles()],
        "callbacks": [*watching, *_in_order(callbacks)],
    }
    try:
        return pl.Trainer(**arguments)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())}") from None


def _in_order(callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """The callbacks in an order in which `last.ckpt` holds what all others have done.

    What a validation decides is decided at its end: at the end of the epoch, as Lightning does it
    where each has one validation, is after the checkpoint of the epoch's last step.
    """
    for callback in callbacks:
        if not str(getattr(callback, "monitor", None)).startswith("val/"):
            continue
        if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end is None:
            callback._check_on_train_epoch_end = False
        if isinstance(callback, ModelCheckpoint) and callback._save_on_train_epoch_end is None:
            callback._save_on_train_epoch_end = False
    # Lightning moves checkpoints behind other callbacks, and keeps their order.
    return sorted(callbacks, key=lambda callback: isinstance(callback, LastCheckpoint))


def cluster_plugins() -> list[Any]:
    """What Lightning is to know of the cluster that started this process."""
    if environments.TorchElasticEnvironment.detect() or not environments.SLURMEnvironment.detect():
        return []
    if in_shell_of_slurm():
        return [environments.LightningEnvironment()]
    try:
        # Signals are for LastCheckpoint: Lightning would requeue by itself, from a file of its own.
        return [environments.SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from None


def choose_strategy(configured: Any, devices: Devices, model: HistoModule) -> Any:
    """Lightning's strategy for `strategy` or `lightning.trainer.strategy` (`configured`).

    Raises:
        UserError: Both are given, or the strategy does not go with the model or the devices.
    """
    if configured not in (None, "auto") and devices.strategy != "auto":
        raise UserError(
            f"`strategy` {devices.strategy} and lightning.trainer.strategy={configured} both say "
            "how devices share the work; give one of them"
        )
    name = devices.strategy if configured in (None, "auto") else configured
    if isinstance(name, str) and name.startswith("deepspeed"):
        raise UserError(
            "`strategy` deepspeed: it writes checkpoints that no other command here can read; use "
            "`strategy` fsdp, which shards weights, gradients and optimiser as ZeRO does"
        )
    if name == "fsdp":
        return _sharded(devices, model)
    if name not in ("auto", "ddp"):
        return name
    if devices.ranks == 1:
        return "auto"
    # A discriminator is unused by the generator's pass and the other way round.
    return "ddp" if model.automatic_optimization else "ddp_find_unused_parameters_true"


def _sharded(devices: Devices, model: HistoModule) -> Any:
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"`strategy` fsdp shards the diffusion UNet, and {type(model).__name__} has none; use "
            "`strategy` ddp"
        )
    if devices.ranks == 1:
        raise UserError("`strategy` fsdp shards over several devices; give `devices` or `gpus`")
    if devices.precision not in ("32", "bf16-mixed"):
        raise UserError(
            f"`strategy` fsdp: `precision` {devices.precision} must be 32 or bf16-mixed"
        )
    if devices.compile or devices.channels_last:
        option = "`compile`" if devices.compile else "`channels_last`"
        raise UserError(f"`strategy` fsdp: {option} is for whole networks; leave one of them out")
    return ShardedStrategy(devices.ranks)


def checkpoint_callbacks(
    run: RunFolder, model: HistoModule, has_validation: bool, node: dict[str, Any] | None = None
) -> list[pl.Callback]:
    """`last.ckpt` every so many steps and on a signal to stop, `best.ckpt` by the monitored metric.

    Args:
        node: `lightning.modelcheckpoint` of the configuration. `every_n_train_steps`, `monitor`
            and `mode` change these two; `keep_last: k` keeps the last k of every so many steps as
            well. With other ModelCheckpoint parameters one more kind is kept: by the monitored
            metric where both `monitor` and `save_top_k` are given, else by step.

    Raises:
        UserError: The monitored metric cannot exist.
    """
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    if node and node.get("target", target) != target:
        raise UserError(
            f"lightning.modelcheckpoint.target={node['target']}: only params may be given here; "
            "put another callback under lightning.callbacks"
        )
    settings = dict((node or {}).get("params") or {})
    by_metric = settings.get("monitor") is not None and settings.get("save_top_k", -1) > 0
    monitor = settings.pop("monitor", getattr(model, "monitor", None))
    mode = settings.pop("mode", None)
    every = settings.pop("every_n_train_steps", CHECKPOINT_EVERY)
    keep = settings.pop("keep_last", None)
    common = {"dirpath": run.checkpoints, **OWN_NAMES}
    stepwise = {"filename": "step_{step:08d}", "every_n_train_steps": every, **common}
    callbacks: list[pl.Callback] = [LastCheckpoint(every_n_train_steps=every, **common)]
    if keep is not None:
        callbacks.append(RecentCheckpoints(keep, **stepwise))
    best = {}
    if monitor:
        _check_monitor(monitor, model, has_validation)
        rises = any(word in monitor for word in ("accuracy", "psnr", "gain"))
        best = {"monitor": monitor, "mode": mode or ("max" if rises else "min"), **common}
        callbacks.append(ModelCheckpoint(filename="best", **best))
    if settings:
        callbacks.append(_further_checkpoints(settings, stepwise, best if by_metric else None))
    return callbacks


def _check_monitor(monitor: str, model: HistoModule, has_validation: bool) -> None:
    if not has_validation:
        raise UserError(
            f"model.params.monitor={monitor!r} needs validation tiles: give "
            "data.params.validation, or data.params.val_fraction above 0, or set "
            "model.params.monitor=null"
        )
    if monitor not in model.metrics():
        raise UserError(
            f"model.params.monitor={monitor!r} is never logged; this model logs "
            f"{', '.join(sorted(model.metrics()))}"
        )


def _further_checkpoints(
    settings: dict[str, Any], stepwise: dict[str, Any], best: dict[str, Any] | None
) -> pl.Callback:
    """The kind of checkpoint that a configuration adds (save_top_k, train_time_interval ...).

    It is by the monitored metric (parameters `best`), or by step (`stepwise`) if `best` is None.
    """
    if best is not None:
        return BestCheckpoints(**{"filename": "best_{step:08d}", **best, **settings})
    if settings.get("save_top_k", -1) > 0:
        raise UserError(
            f"lightning.modelcheckpoint.params.save_top_k={settings['save_top_k']} needs a "
            "monitor to tell the best by; give one, or keep_last to keep the last ones"
        )
    extra = {**stepwise, "save_top_k": -1, **settings}
    if {"train_time_interval", "every_n_epochs"} & settings.keys():
        del extra["every_n_train_steps"]
    return RegularCheckpoint(**extra)


def build_loggers(node: Any, run: RunFolder) -> list[Any]:
    """The loggers beside the CSV files.

    `node` is `lightning.logger`: `tensorboard`, `wandb`, a target/params node, or a list of such;
    None is TensorBoard.
    """

    def build(each: Any) -> Any:
        if each == "tensorboard":
            return TensorBoardLogger(run.root, name="", version="tensorboard")
        return _wandb_logger(run) if each == "wandb" else instantiate_from_config(each)

    nodes = ["tensorboard"] if node is None else node if isinstance(node, list) else [node]
    return [build(each) for each in nodes]


def _wandb_logger(run: RunFolder) -> Any:
    # A run that goes on is the same run at W&B, too.
    name = run.wandb_id
    identity = name.read_text().strip() if name.is_file() else uuid.uuid4().hex[:12]
    try:
        return WandbLogger(
            name=run.root.name,
            save_dir=run.root,
            id=identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "histodiffusion"),
        )
    except ModuleNotFoundError:
        raise UserError(
            "lightning.logger=wandb needs the package wandb, which is not installed; run `pip "
            "install wandb`, or leave lightning.logger out"
        ) from None


def _start_loggers(trainer: pl.Trainer, run: RunFolder) -> None:
    """Connect to W&B now: whether that is possible is better known before the data is read."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            if not run.wandb_id.is_file():
                write_text(run.wandb_id, f"{logger.version}\n")
            try:
                _ = logger.experiment
            except wandb.errors.Error as error:
                raise UserError(
                    f"lightning.logger=wandb: {str(error).splitlines()[0]}; run `wandb login`, or "
                    "export WANDB_MODE=offline"
                ) from None


def _prepare_disk(trainer: pl.Trainer, model: HistoModule, run: RunFolder, dry_run: bool) -> None:
    """Clear away what a killed run left, and see that the disk has room for the checkpoints."""
    if trainer.is_global_zero and not dry_run:
        for path in remove_leftovers(run.root, run.checkpoints, run.configs, run.images):
            log.info("removed %s, which a killed run had not finished", path)
    size = run.last.stat().st_size if run.last.is_file() else expected_size(model)
    kinds = sum(isinstance(c, ModelCheckpoint) for c in trainer.checkpoint_callbacks)
    there = len(list(run.checkpoints.glob("*.ckpt")))
    # One more than is kept: a checkpoint is replaced once the new one is written.
    require_space(run.last, int(MARGIN * size * (1 + max(kinds - there, 0))), "before the start")
