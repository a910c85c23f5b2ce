"""One way to build a Lightning trainer, shared by main.py and classifier_train.py."""

import inspect
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli import ArgumentParser, number
from ldm.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import pytorch_lightning as pl

    from ldm.models.base import HistoModule
    from ldm.run import RunFolder

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "64")
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
        node: `lightning.modelcheckpoint` of the configuration: `every_n_train_steps`, `monitor`
            and `mode` change these two; with other ModelCheckpoint parameters a third kind of
            checkpoint is kept.

    Raises:
        UserError: The monitored metric cannot exist.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint

    from ldm.models.callbacks import LastCheckpoint, StopOnSignal

    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    if node and node.get("target", target) != target:
        raise UserError(
            f"lightning.modelcheckpoint.target={node['target']}: only params may be given here; "
            "put another callback "
            "under lightning.callbacks"
        )
    settings = dict((node or {}).get("params") or {})
    monitor = settings.pop("monitor", getattr(model, "monitor", None))
    mode = settings.pop("mode", None)
    every = settings.pop("every_n_train_steps", CHECKPOINT_EVERY)
    common = {
        "dirpath": run.checkpoints,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    callbacks: list[pl.Callback] = [LastCheckpoint(every, **common), StopOnSignal(run.last)]
    if settings:
        # What the configuration adds (save_top_k, filename, train_time_interval ...) is a
        # checkpoint of its own.
        extra = {"filename": "step_{step:08d}", "save_top_k": -1, **settings}
        if "train_time_interval" not in settings:
            extra["every_n_train_steps"] = every
        callbacks.append(ModelCheckpoint(**{**common, **extra}))
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
        callbacks.append(
            ModelCheckpoint(
                filename="best", monitor=monitor, mode=mode or _better(monitor), **common
            )
        )
    return callbacks


def build_trainer(
    run: "RunFolder",
    model: "HistoModule",
    devices: Devices,
    num_nodes: int,
    precision: str,
    callbacks: list["pl.Callback"],
    settings: dict[str, Any],
    loggers: list[Any] | None = None,
) -> "pl.Trainer":
    """A Lightning trainer that logs to CSV and TensorBoard in the run's folder and shows a
    progress bar.

    Args:
        settings: Trainer arguments from the configuration; they take precedence.
        loggers: Further loggers.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LearningRateMonitor

    from ldm.models.callbacks import ProgressBar, Throughput

    # Lightning's remarks (no TPU, a tip for another product) would bury what a run says itself.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Hints for people who tune, and a deprecation inside Lightning: not for every run's log.
    for pattern in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*",
        "Using ModelCheckpoint with manual optimization.*",  # saves after a step, as wanted
        ".*modules? in eval mode at the start.*",  # the frozen first stage, on purpose
        "Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ):
        warnings.filterwarnings("ignore", pattern)
    world = devices.count * num_nodes
    settings = dict(settings)
    if world > 1:
        # A discriminator is unused by the generator's pass and the other way round.
        unused = getattr(model, "automatic_optimization", True) is False
        settings.setdefault("strategy", "ddp_find_unused_parameters_true" if unused else "ddp")
    if not model.automatic_optimization:
        # Lightning leaves accumulation to modules that step by themselves.
        if "accumulate_grad_batches" in settings:
            model.accumulate_grad_batches = settings.pop("accumulate_grad_batches")
        if settings.get("gradient_clip_val") is not None:
            raise UserError(
                "lightning.trainer.gradient_clip_val does not apply to the autoencoder; remove it"
            )
    bar = settings.get("enable_progress_bar", True)
    refresh = 1 if sys.stderr.isatty() else 50
    return pl.Trainer(
        **{
            "accelerator": devices.accelerator,
            "devices": devices.devices,
            "num_nodes": num_nodes,
            "precision": precision,
            "default_root_dir": run.root,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
            **settings,
        },
        logger=[
            # One version per start: a resumed run does not overwrite what was logged before.
            pl.loggers.CSVLogger(run.root, name="metrics"),
            pl.loggers.TensorBoardLogger(run.root, name="", version="tensorboard"),
            *(loggers or []),
        ],
        callbacks=[
            Throughput(),
            LearningRateMonitor("step"),
            *([ProgressBar(refresh_rate=refresh)] if bar else []),
            *callbacks,
        ],
    )


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
        KeyboardInterrupt: Training was interrupted; the checkpoints written until then are whole.
        Stopped: A signal asked the run to stop; `last.ckpt` is of its last step.
    """
    import torch

    from ldm.checkpoint import read_checkpoint

    if checkpoint is not None:
        # A checkpoint that does not fit is refused before anything is written.
        model.on_load_checkpoint(read_checkpoint(checkpoint, (model.kind,), "--resume"))
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
