"""One way to build a Lightning trainer, shared by main.py and classifier_train.py."""

import importlib.util
import inspect
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli import ArgumentParser, number
from ldm.errors import UserError
from ldm.speed import Speed, add_speed_arguments

if TYPE_CHECKING:
    from pathlib import Path

    import pytorch_lightning as pl

    from ldm.models.base import HistoModule
    from ldm.run import RunFolder

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "64")
LOGGERS = ("tensorboard", "wandb")  # by name; the CSV files are always written
CLIP = "gradient_clip_val"
CHECKPOINT_EVERY = 1000  # optimiser steps


def add_run_arguments(parser: ArgumentParser) -> None:
    """The arguments of a run: where it writes, what it resumes, on which devices it trains."""
    parser.add_argument(
        "-n",
        "--name",
        help="name of the run: it writes to LOGDIR/NAME, and goes on where it stopped",
    )
    parser.add_argument(
        "-r", "--resume", metavar="RUN", help="run folder or checkpoint to go on from"
    )
    parser.add_argument(
        "-s", "--seed", type=number(int, 0, 2**32 - 1), default=23, help="seed of all randomness"
    )
    parser.add_argument("-l", "--logdir", default="logs", help="folder of all runs")
    parser.add_argument(
        "--gpus",
        metavar="LIST",
        help="GPUs as in Lightning 1: '0,1' these two, '2' any two, '0,' number 0 alone",
    )
    parser.add_argument(
        "--devices", type=number(int, 1), help="number of devices of the best kind there is"
    )
    parser.add_argument("--num_nodes", type=number(int, 1), default=1, help="number of machines")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16-mixed on GPUs that have it, else 32",
    )
    add_speed_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be trained, and exit"
    )


@dataclass(frozen=True)
class Devices:
    """Where to train: Lightning's `accelerator`, and `devices` of each machine."""

    accelerator: str
    devices: int | list[int]

    @property
    def count(self) -> int:
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    def describe(self, num_nodes: int, precision: str) -> str:
        """One line for the summary of a run."""
        return f"devices      {self.count} x {self.accelerator} x {num_nodes} machines, {precision}"


def parse_gpus(text: str) -> list[int] | int:
    """`0,1` is a list of indices, `2` a count, `0,` one index, `-1` all (Lightning 1)."""
    try:
        if "," in text:
            indices = [int(part) for part in text.split(",") if part.strip()]
            if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
                raise ValueError
            return indices
        count = int(text)
        if count < -1:
            raise ValueError
        return count
    except ValueError:
        raise UserError(
            f"--gpus {text}: give a list of distinct GPUs ('0,1' or '0,') or a count ('2')"
        ) from None


def choose_devices(gpus: str | None, devices: int | None, dry_run: bool = False) -> Devices:
    """Devices for `--gpus` or `--devices`; without either, one device of the best kind there is.

    Args:
        dry_run: Do not ask whether the GPUs are there (a dry run on a login node).

    Raises:
        UserError: Both are given, or there are too few devices.
    """
    import torch

    if gpus is not None and devices is not None:
        raise UserError("--gpus and --devices both say where to train; give one of them")
    found = torch.cuda.device_count()
    if gpus is not None and gpus.strip() not in ("0", ""):
        wanted = parse_gpus(gpus)
        wanted = found if wanted == -1 else wanted
        needed = max(wanted) + 1 if isinstance(wanted, list) else wanted
        if (needed > found or wanted == 0) and not dry_run:
            raise UserError(
                f"--gpus {gpus}: this machine has {found} CUDA GPUs; leave --gpus out to train on "
                "the best device "
                "there is, or name fewer"
            )
        return Devices("gpu", wanted)
    if gpus is not None:
        return Devices("cpu", 1)  # `--gpus 0` is a count of none
    if found:
        if devices is not None and devices > found and not dry_run:
            raise UserError(f"--devices {devices}: this machine has {found} CUDA GPUs; name fewer")
        return Devices("gpu", devices or 1)
    if torch.backends.mps.is_available() and devices in (None, 1):
        return Devices("mps", 1)
    cores = os.cpu_count() or 1
    if devices is not None and devices > cores and not dry_run:
        raise UserError(
            f"--devices {devices}: this machine has no CUDA GPU and {cores} CPU cores; name fewer"
        )
    return Devices("cpu", devices or 1)


def choose_precision(name: str, devices: Devices) -> str:
    """Lightning's precision for `--precision`; `auto`: bf16-mixed on GPUs that have it, else 32."""
    import torch

    if name != "auto":
        return {"32": "32-true", "64": "64-true"}.get(name, name)
    has_bf16 = (
        devices.accelerator == "gpu"
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported()
    )
    return "bf16-mixed" if has_bf16 else "32-true"


def _better(monitor: str) -> str:
    """Whether more or less of a metric is better, by its name."""
    return "max" if any(word in monitor for word in ("accuracy", "psnr", "gain")) else "min"


def checkpoint_callbacks(
    run: "RunFolder", model: "HistoModule", has_validation: bool, node: dict[str, Any] | None = None
) -> list["pl.Callback"]:
    """`last.ckpt` every so many steps and on a signal to stop, `best.ckpt` by the monitored metric.

    Args:
        node: `lightning.modelcheckpoint` of the configuration. `every_n_train_steps`, `monitor`
            and `mode` change these two; `keep_last: k` keeps the last k of every so many steps as
            well. With other ModelCheckpoint parameters one more kind is kept: by the monitored
            metric where both `monitor` and `save_top_k` are given, else by step.

    Raises:
        UserError: The monitored metric cannot exist.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint

    from ldm.models.callbacks import (
        BestCheckpoints,
        LastCheckpoint,
        RecentCheckpoints,
        RegularCheckpoint,
        StopOnSignal,
    )

    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    if node and node.get("target", target) != target:
        raise UserError(
            f"lightning.modelcheckpoint.target={node['target']}: only params may be given here; "
            "put another callback "
            "under lightning.callbacks"
        )
    settings = dict((node or {}).get("params") or {})
    by_metric = settings.get("monitor") is not None and settings.get("save_top_k", -1) > 0
    monitor = settings.pop("monitor", getattr(model, "monitor", None))
    mode = settings.pop("mode", None)
    every = settings.pop("every_n_train_steps", CHECKPOINT_EVERY)
    keep = settings.pop("keep_last", None)
    common = {
        "dirpath": run.checkpoints,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    callbacks: list[pl.Callback] = [LastCheckpoint(every, **common), StopOnSignal(run.last)]
    stepwise = {"filename": "step_{step:08d}", "every_n_train_steps": every, **common}
    if keep is not None:
        callbacks.append(RecentCheckpoints(keep, **stepwise))
    if monitor:
        if not has_validation:
            raise UserError(
                f"model.params.monitor={monitor!r} needs validation tiles: give "
                "data.params.validation, or "
                "data.params.val_fraction above 0, or set model.params.monitor=null"
            )
        if monitor not in model.metrics():
            raise UserError(
                f"model.params.monitor={monitor!r} is never logged; this model logs "
                f"{', '.join(sorted(model.metrics()))}"
            )
        mode = mode or _better(monitor)
        callbacks.append(ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **common))
    if settings:
        # What the configuration adds (save_top_k, filename, train_time_interval ...) is a
        # checkpoint of its own.
        if by_metric:
            extra = {**common, "filename": "best_{step:08d}", "monitor": monitor, "mode": mode}
            callbacks.append(BestCheckpoints(**{**extra, **settings}))
        elif settings.get("save_top_k", -1) > 0:
            raise UserError(
                f"lightning.modelcheckpoint.params.save_top_k={settings['save_top_k']} needs a "
                "monitor to tell the best by; give one, or keep_last to keep the last ones"
            )
        else:
            timed = {"train_time_interval", "every_n_epochs"} & settings.keys()
            extra = {**stepwise, "save_top_k": -1, **settings}
            if timed:
                del extra["every_n_train_steps"]
            callbacks.append(RegularCheckpoint(**extra))
    return callbacks


def build_trainer(
    run: "RunFolder",
    model: "HistoModule",
    devices: Devices,
    num_nodes: int,
    precision: str,
    callbacks: list["pl.Callback"],
    settings: dict[str, Any],
    loggers: Any = None,
    speed: Speed | None = None,
) -> "pl.Trainer":
    """A Lightning trainer that logs to CSV in the run's folder and shows a progress bar.

    Args:
        settings: Trainer arguments from the configuration; they take precedence.
        loggers: `lightning.logger` of the configuration, see `build_loggers`.
        speed: How the devices are used; the model is prepared for it.

    Raises:
        UserError: Settings that do not go together, or that Lightning refuses.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.models.callbacks import FollowLayout, ProgressBar, Throughput
    from ldm.models.saving import CheckpointFiles

    # Lightning's remarks (no TPU, a tip for another product) would bury what a run says itself.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Hints for people who tune, and a deprecation inside Lightning: not for every run's log.
    for pattern in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*",
        "Using ModelCheckpoint with manual optimization.*",  # saves after a step, as wanted
        ".*module.* in eval mode at the start.*",  # the frozen first stage, on purpose
        "Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ):
        warnings.filterwarnings("ignore", pattern)
    settings, speed = dict(settings), speed or Speed()
    ranks = devices.count * num_nodes
    settings["strategy"] = choose_strategy(settings.get("strategy"), speed, model, ranks, precision)
    model.fused = speed.fuses(devices.accelerator, precision, bool(settings.get(CLIP)))
    speed.prepare(model)
    if not model.automatic_optimization:
        # Lightning leaves accumulation and clipping to modules that step by themselves.
        for name in ("accumulate_grad_batches", CLIP, "gradient_clip_algorithm"):
            if name in settings:
                setattr(model, name, settings.pop(name))
    bar = settings.get("enable_progress_bar", True)
    refresh = 1 if sys.stderr.isatty() else 50
    plugins = settings.pop("plugins", None) or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    arguments = {
        "accelerator": devices.accelerator,
        "devices": devices.devices,
        "num_nodes": num_nodes,
        "precision": precision,
        "default_root_dir": run.root,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        **settings,
        "logger": [
            # One version per start: a resumed run does not overwrite what was logged before.
            pl.loggers.CSVLogger(run.root, name="metrics"),
            *build_loggers(loggers, run),
        ],
        "plugins": [*plugins, *cluster_plugins(), CheckpointFiles()],
        "callbacks": [
            Throughput(),
            FollowLayout(),
            LearningRateMonitor("step"),
            *([ProgressBar(refresh_rate=refresh)] if bar else []),
            *callbacks,
        ],
    }
    try:
        return pl.Trainer(**arguments)
    except (MisconfigurationException, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"lightning.trainer: {said}; change these settings") from None


def cluster_plugins() -> list[Any]:
    """What Lightning is to know of the cluster that started this process.

    Raises:
        UserError: SLURM's variables do not say how many tasks each machine has.
    """
    from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    # Said to everyone on a login node; it is no mistake to run a command there.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    try:
        # Signals are for StopOnSignal: Lightning would requeue by itself, from a file of its own.
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from None


def choose_strategy(
    configured: Any, speed: Speed, model: "HistoModule", ranks: int, precision: str
) -> Any:
    """Lightning's strategy for `--strategy` or `lightning.trainer.strategy`.

    Args:
        configured: `lightning.trainer.strategy`, a name or an object; None when it is not given.
        ranks: Devices of all machines.

    Raises:
        UserError: Both are given, or what does not go with the model or the other settings.
    """
    if configured not in (None, "auto") and speed.strategy != "auto":
        raise UserError(
            f"--strategy {speed.strategy} and lightning.trainer.strategy={configured} both say how "
            "devices share the work; give one of them"
        )
    name = speed.strategy if configured in (None, "auto") else configured
    if not isinstance(name, str):
        return name
    if name.startswith("deepspeed"):
        missing = importlib.util.find_spec("deepspeed") is None
        reason = "the package is not installed, and it" if missing else "it"
        raise UserError(
            f"--strategy deepspeed: {reason} writes checkpoints that no other command here can "
            "read; use --strategy fsdp, which shards weights, gradients and optimiser as ZeRO does"
        )
    if name == "fsdp":
        return _sharded(speed, model, ranks, precision)
    if name not in ("auto", "ddp"):
        return name
    if ranks == 1:
        return "auto"
    # A discriminator is unused by the generator's pass and the other way round.
    return "ddp" if model.automatic_optimization else "ddp_find_unused_parameters_true"


def _sharded(speed: Speed, model: "HistoModule", ranks: int, precision: str) -> Any:
    from ldm.models.diffusion import LatentDiffusion
    from ldm.models.sharding import ShardedStrategy

    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"--strategy fsdp shards the diffusion UNet, and {type(model).__name__} has none; use "
            "--strategy ddp"
        )
    if ranks == 1:
        raise UserError("--strategy fsdp shards over several devices; give --devices or --gpus")
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"--strategy fsdp: --precision {precision} must be 32 or bf16-mixed")
    if speed.compile or speed.channels_last:
        option = "--compile" if speed.compile else "--channels_last"
        raise UserError(f"--strategy fsdp: {option} is for whole networks; leave one of them out")
    return ShardedStrategy(ranks)


def build_loggers(node: Any, run: "RunFolder") -> list[Any]:
    """The loggers beside the CSV files.

    Args:
        node: `lightning.logger`: `tensorboard`, `wandb`, a target/params node, or a list of such;
            None is TensorBoard.

    Raises:
        UserError: A package that is not installed, or W&B without an account or a connection.
    """
    import pytorch_lightning as pl

    from ldm.config import instantiate_from_config

    nodes = ["tensorboard"] if node is None else node if isinstance(node, list) else [node]
    loggers: list[Any] = []
    for each in nodes:
        if each == "tensorboard":
            loggers.append(pl.loggers.TensorBoardLogger(run.root, name="", version="tensorboard"))
        elif each == "wandb":
            loggers.append(_wandb_logger(run))
        else:
            loggers.append(instantiate_from_config(each))
    return loggers


def _wandb_logger(run: "RunFolder") -> Any:
    import uuid

    from pytorch_lightning.loggers import WandbLogger

    from ldm.files import write_text

    # A run that goes on is the same run there, too.
    name = run.root / "wandb" / "run_id.txt"
    identity = name.read_text().strip() if name.is_file() else uuid.uuid4().hex[:12]
    try:
        logger = WandbLogger(
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
    if not name.is_file():
        write_text(name, identity + "\n")
    return logger


def start_loggers(trainer: "pl.Trainer") -> None:
    """Connect to W&B now: whether that is possible is better known before the data is read.

    Raises:
        UserError: No account, or no connection.
    """
    from pytorch_lightning.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            try:
                _ = logger.experiment
            except wandb.errors.Error as error:
                raise UserError(
                    f"lightning.logger=wandb: {str(error).splitlines()[0]}; run `wandb login`, or "
                    "export WANDB_MODE=offline"
                ) from None


def make_ready(trainer: "pl.Trainer", model: "HistoModule", run: "RunFolder") -> None:
    """Clear away what a killed run left, and see that the disk has room for the checkpoints.

    Raises:
        UserError: It has not.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint

    from ldm.files import remove_leftovers, require_space
    from ldm.models.saving import MARGIN, expected_size

    if trainer.is_global_zero:
        for path in remove_leftovers(run.checkpoints):
            log.info("removed %s, which a killed run had not finished", path)
    size = run.last.stat().st_size if run.last.is_file() else expected_size(model)
    kinds = sum(isinstance(c, ModelCheckpoint) for c in trainer.checkpoint_callbacks)
    there = len(list(run.checkpoints.glob("*.ckpt")))
    # One more than is kept: a checkpoint is replaced once the new one is written.
    require_space(run.last, int(MARGIN * size * (1 + max(kinds - there, 0))), "before the start")


def fit(
    trainer: "pl.Trainer",
    model: "HistoModule",
    data: "pl.LightningDataModule",
    run: "RunFolder",
    checkpoint: "Path | None",
    config: dict[str, Any],
    summary: str,
) -> None:
    """Record this start in the run's folder, train, and leave `last.ckpt`.

    Args:
        checkpoint: Where to go on from; None for a new run.
        config: Resolved configuration, for the record.
        summary: What is trained, shown at the start.

    Raises:
        UserError: What cannot go on: no room, numbers that are not finite, ...
        KeyboardInterrupt: Training was interrupted; the checkpoints written until then are whole.
        Stopped: A signal asked the run to stop; `last.ckpt` is of its last step.
    """
    import torch

    from ldm.checkpoint import read_checkpoint

    if checkpoint is not None:
        # A checkpoint that does not fit is refused before anything is written.
        model.on_load_checkpoint(read_checkpoint(checkpoint, (model.kind,), "--resume"))
    make_ready(trainer, model, run)
    start_loggers(trainer)
    if trainer.is_global_zero:
        run.record(config, model.seed)
        log.info("%s\nwriting to    %s", summary, run.root)
    # Older Lightning has no such argument; its own default then is to load everything.
    takes_it = "weights_only" in inspect.signature(trainer.fit).parameters
    safe = {"weights_only": True} if checkpoint and takes_it else {}
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, **safe)
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.save_checkpoint(run.last)
    if trainer.is_global_zero:
        log.info("done at step %d: %s", trainer.global_step, run.last)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
