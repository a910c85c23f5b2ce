"""What Lightning calls: image grids, throughput, checkpoints and their files, stops on a signal."""

import logging
import math
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from tqdm import tqdm

from ldm.checkpoint import write_checkpoint
from ldm.data.tiles import to_uint8
from ldm.devices import follow_layout
from ldm.errors import Stopped
from ldm.files import require_space, write_png
from ldm.models.sharding import is_sharded
from ldm.progress import LOG_EVERY, FirstStep

if TYPE_CHECKING:
    from ldm.models.base import HistoModule

log = logging.getLogger(__name__)

MARGIN = 1.1  # room that is asked for, in sizes of the last checkpoint
MOMENTS = 2  # numbers that Adam keeps for each trained weight


class ImageLogger(pl.Callback):
    """Writes what a model's `log_images` shows as PNG grids into RUN/images, TensorBoard and W&B.

    Grids come from the first validation batch (the first training batch
    where nothing is held out), so that successive grids show the same tiles.

    Args:
        batch_frequency: Optimiser steps between two grids.
        max_images: Tiles per grid.
        increase_log_steps: Whether there are grids of steps 1, 2, 4, 8, ... too.
    """

    def __init__(self, batch_frequency: int, max_images: int = 8, increase_log_steps: bool = False):
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        powers = {2**n for n in range(batch_frequency.bit_length()) if 2**n < batch_frequency}
        self._early_steps = powers if increase_log_steps else set()
        self._last_step = 0
        self._batch: dict[str, Any] | None = None

    def _fixed_batch(self, trainer: pl.Trainer) -> dict[str, Any]:
        if self._batch is None:
            data = trainer.datamodule.val_dataset or trainer.datamodule.train_dataset
            items = [data[i] for i in range(min(self.max_images, len(data)))]
            name = "moments" if "moments" in items[0] else "image"  # of cached latents
            self._batch = {name: torch.stack([item[name] for item in items])}
        device = trainer.strategy.root_device
        return {name: tensor.to(device) for name, tensor in self._batch.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        step = trainer.global_step
        # At the last step too, before the last checkpoint: a run that is killed after that has no
        # step left to draw at.
        due = step % self.batch_frequency == 0 or step in self._early_steps or is_last_step(trainer)
        # With gradient accumulation a step lasts several batches.
        if due and step != self._last_step:
            self._last_step = step
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._last_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A network in shards computes on all ranks or on none.
        if not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        from torchvision.utils import make_grid

        folder = Path(trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        was_training = pl_module.training
        # Drawing pictures must not change the run: the random state is put back.
        with torch.random.fork_rng(enabled=True), torch.no_grad():
            torch.manual_seed(0)
            pl_module.eval()
            grids = pl_module.log_images(self._fixed_batch(trainer), self.max_images)
            pl_module.train(was_training)
        if not trainer.is_global_zero:
            return
        for name, images in grids.items():
            images = images.detach().float().cpu().clamp(-1, 1)  # (B, 3, H, W)
            grid = to_uint8(make_grid(images, nrow=4, pad_value=1.0))  # (height, width, 3)
            write_png(folder / f"{name}_{trainer.global_step:08d}.png", grid)
            for logger in trainer.loggers:
                if isinstance(logger, pl.loggers.TensorBoardLogger):
                    logger.experiment.add_image(name, grid, trainer.global_step, dataformats="HWC")
                elif isinstance(logger, pl.loggers.WandbLogger):
                    logger.log_image(name, [grid], trainer.global_step)


class FollowLayout(pl.Callback):
    """Gives optimiser states the memory layout of their weights, which a resumed run may change."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            follow_layout(optimizer)


class ProgressBar(TQDMProgressBar):
    """A progress bar with losses and images per second.

    While it trains, they are read once a second: each time, the program waits for the GPU.
    """

    _read, _metrics = -math.inf, {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: "HistoModule") -> dict[str, float]:
        now = time.monotonic()
        if not trainer.training or now - self._read >= 1:
            self._metrics, self._read = shown_metrics(trainer, pl_module), now
        return self._metrics


def shown_metrics(trainer: pl.Trainer, model: "HistoModule") -> dict[str, float]:
    """The latest values of the metrics that a model shows."""
    values = trainer.callback_metrics
    return {name: float(values[name]) for name in model.shown if name in values}


class TimeLeft(pl.Callback):
    """Tells how far a training is and the time left: during and after the first step.

    A log file is told it now and then from there on; on a terminal the progress bar tells it.

    Args:
        live: Whether there is a progress bar on a terminal.
    """

    _waiting: FirstStep | None = None

    def __init__(self, live: bool = False):
        self.live = live

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._first, self._began = trainer.global_step, time.monotonic()
        self._next = 0.0  # when to tell again, seconds from the beginning
        self._steps = trainer.estimated_stepping_batches
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            say = bar.train_progress_bar.set_postfix_str if self.live else log.info
            self._waiting = FirstStep(self._steps - self._first, say)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: "HistoModule", *_: Any) -> None:
        spent = time.monotonic() - self._began
        step, done = trainer.global_step, trainer.global_step - self._first
        if not done or self._waiting is None:
            return
        self._waiting.end()
        if self.live or spent < self._next:
            return
        # Later and later, lest a run of days fills its log: every six minutes after ten hours.
        self._next = spent + max(LOG_EVERY, spent / 100)
        left = ""
        if math.isfinite(self._steps):
            seconds = max(0.0, spent / done * (self._steps - step))
            left = f" of {self._steps}, about {tqdm.format_interval(seconds)} left"
        shown = shown_metrics(trainer, pl_module).items()
        text = "".join(f", {name} {value:.4g}" for name, value in shown)
        log.info("step %d%s, %.3g s per step%s", step, left, spent / done, text)

    def on_train_end(self, *_: Any) -> None:
        if self._waiting is not None:
            self._waiting.end()

    on_exception = on_train_end


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that has just been trained on."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the run ends with the step that has just been taken."""
    loop, limit = trainer.fit_loop, trainer.max_epochs
    last_epoch = limit is not None and 0 < limit <= loop.epoch_progress.current.processed + 1
    return (
        trainer.should_stop
        or 0 < trainer.max_steps <= trainer.global_step
        or (last_epoch and trainer.is_last_batch)
    )


class RegularCheckpoint(ModelCheckpoint):
    """Writes checkpoints by the number of steps (or the time), between two steps.

    Each is written after the validation of its step. Lightning writes them before it, and a run
    that is resumed from one leaves that validation out: what a validation finds (the best score,
    the classifier's temperature) would be that of an earlier step. It also writes them between the
    batches of a step, whose gradients are then lost.
    """

    _step = 0  # optimiser steps before the batch
    _waiting = False  # for the validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Nothing is new in a resumed run; a model that takes no steps is saved at its end.
        self._last_global_step_saved = trainer.global_step or -1

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._waiting = False
        if trainer.global_step == self._step or not self.is_due(trainer):
            return
        self._waiting = validation_is_due(trainer)
        if not self._waiting:
            # Lightning logs a step after all callbacks; a run that goes on from here would lack it.
            trainer._logger_connector.update_train_step_metrics()
            self.write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._waiting:
            self._waiting = False
            self.write(trainer)
        super().on_validation_end(trainer, pl_module)

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether a checkpoint of the step that has just been taken is wanted."""
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            return True
        if self._train_time_interval is None:
            return False
        now = time.monotonic()
        is_due = now - self._last_time_checked >= self._train_time_interval.total_seconds()
        is_due = trainer.strategy.broadcast(is_due)  # clocks differ
        if is_due:
            self._last_time_checked = now
        return is_due

    def write(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, unless there is one of this step."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class RecentCheckpoints(RegularCheckpoint):
    """Keeps the last `keep` of the checkpoints that are written every so many steps.

    It and the next are classes of their own, since Lightning tells checkpoint callbacks apart by
    class and settings, and a configuration may ask for others at the same interval.
    """

    def __init__(self, keep: int, **kwargs: Any):
        super().__init__(monitor="step", mode="max", save_top_k=keep, **kwargs)


class LastCheckpoint(RegularCheckpoint):
    """Writes `last.ckpt`, from which a run goes on, over the one before.

    That is every so many steps or seconds, at the last step, and when a signal asks the run to
    stop. `fit` puts it behind all other callbacks, so that it holds what they did at its step.

    Schedulers send a signal ahead of a time limit or a preemption. The handler only sets a flag: a
    checkpoint that is written inside a handler may catch the model in the middle of a step.
    `trainer.fit` then raises `Stopped`. Several ranks, which have to agree on the step to stop at,
    look at the flag after `agree_every` batches.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

    def __init__(self, agree_every: int = 10, **kwargs: Any):
        super().__init__(filename="last", **kwargs)
        self.agree_every = agree_every
        self.received: signal.Signals | None = None
        self._stopping = False
        self._validates_first = False  # a run that goes on from what is being saved
        self._batches = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def path(self) -> Path:
        return Path(self.dirpath) / "last.ckpt"

    def _take_signals(self) -> None:
        def note(number: int, frame: Any) -> None:
            self.received = signal.Signals(number)

        # Other threads cannot install handlers.
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, note) for s in self.SIGNALS}

    def on_sanity_check_start(self, *_: Any) -> None:
        # After Lightning has installed its own handlers, and before the first validation: a SIGTERM
        # that Lightning takes ends the run with status 0.
        self._take_signals()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_signals()  # where there is no validation
        super().on_train_start(trainer, pl_module)
        if trainer.fit_loop.restarted_mid_epoch:
            # After a checkpoint of an epoch's last step Lightning does not count the next epoch as
            # begun, and at the start after that miscounts those that are done.
            progress = trainer.fit_loop.epoch_progress
            for count in (progress.total, progress.current):
                count.ready = count.started = count.processed + 1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._batches += 1
        if trainer.world_size == 1:
            self._stopping = self.received is not None
        elif self._batches % self.agree_every == 0:
            decide = trainer.strategy.reduce_boolean_decision
            self._stopping = self._stopping or decide(self.received is not None, all=False)
        super().on_train_batch_end(trainer)
        if self._stopping and self._waiting:
            # It counts if there is no time left for the validation.
            trainer._logger_connector.update_train_step_metrics()
            self._validates_first = True
            trainer.save_checkpoint(self.path)
            self._validates_first = False

    def is_due(self, trainer: pl.Trainer) -> bool:
        return super().is_due(trainer) or self._stopping or is_last_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A validation may end the run, too.
        self._waiting |= trainer.should_stop and not trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        super().write(trainer)
        if self._stopping:
            name = "a signal on another rank" if self.received is None else self.received.name
            raise Stopped(
                f"stopped by {name} after step {trainer.global_step}: {self.path} is written, the "
                "same command goes on from there"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validates_first:
            # The counters of a batch that is done, and of a validation that has just begun.
            loops = checkpoint["loops"]["fit_loop"]
            for count in ("total", "current"):
                loops["epoch_loop.batch_progress"][count]["completed"] += 1
            counts = loops["epoch_loop.val_loop.batch_progress"]
            counts["current"] = dict.fromkeys(counts["current"], 0)
            counts["total"] = {**counts["current"], "ready": 1, "started": 1}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the paths in a checkpoint follow its run folder, if that has been moved.

        Lightning forgets the best score so far if the folder is another, and then replaces the
        best checkpoint by the next one.
        """
        states = checkpoint["callbacks"]
        before = [s["dirpath"] for name, s in states.items() if name.startswith("LastCheckpoint")]
        if before:
            checkpoint["callbacks"] = _with_prefix(states, str(before[0]), str(self.dirpath))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _with_prefix(value: Any, before: str, now: str) -> Any:
    """`value` with `now` in place of `before` at the start of all texts in it."""
    if isinstance(value, dict):
        items = value.items()
        return {_with_prefix(k, before, now): _with_prefix(v, before, now) for k, v in items}
    if isinstance(value, str) and value.startswith(before):
        return now + value[len(before) :]
    return value


class BestCheckpoints(ModelCheckpoint):
    """Keeps the best `save_top_k` checkpoints by a metric, beside `best.ckpt`."""


class Throughput(pl.Callback):
    """Shows training speed, images per second over all ranks, on the bar and in the logs."""

    def __init__(self, every: int = 10):
        self.every = every
        self._images = 0
        self._since: float | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self._since = None  # validation and start-up between epochs are not training

    def on_train_batch_start(self, *_: Any) -> None:
        if self._since is None:
            self._since, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
    ) -> None:
        self._images += len(batch["label"]) * trainer.world_size
        # An epoch of a small labelled set may have fewer batches than that.
        if (batch_idx + 1) % self.every == 0 or trainer.is_last_batch:
            seconds = time.perf_counter() - self._since
            # A tensor, since Lightning waits for the GPU to copy a float to it.
            speed = torch.tensor(self._images / seconds)
            pl_module.log("images_per_s", speed, prog_bar=True, batch_size=1)
            self._since = None

    def on_validation_start(self, *_: Any) -> None:
        self._since = None


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, if the disk has room for them.

    Lightning itself writes to the system's temporary folder and moves the file. Between two file
    systems that is a copy, and a run that is killed meanwhile leaves half a checkpoint.

    Raises:
        UserError: The disk is full while a checkpoint is saved; the one before it stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._size: int | None = None  # bytes of the last checkpoint that was written

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        size = path.stat().st_size if self._size is None and path.is_file() else self._size
        if size is not None:
            require_space(path, int(MARGIN * size))
        write_checkpoint(path, checkpoint)
        self._size = path.stat().st_size


def expected_size(model: nn.Module) -> int:
    """Bytes of a training checkpoint of `model`: its weights, and what Adam keeps for each."""
    weights = sum(value.nbytes for value in model.state_dict().values())
    return weights + MOMENTS * sum(p.nbytes for p in model.parameters() if p.requires_grad)
