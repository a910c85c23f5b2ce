"""What the LightningModules have in common: checkpoint records, seeds, finite numbers."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint import KEY, load_strictly, make_record, read_checkpoint, training_step_of
from ldm.devices import Arrivals
from ldm.errors import UserError
from ldm.models.sharding import gather_shards

# Optimiser steps in a row that float16's loss scaling may skip for gradients that are not finite.
# It halves its scale at each, so that the first one of 65,536 is below 1 by then: smaller cannot
# help, the gradient itself is not finite.
SKIPPED_STEPS = 24
REMEDY = "lower the learning rate, or use `precision` bf16-mixed or 32 instead of 16-mixed"


class HistoModule(pl.LightningModule):
    """A LightningModule whose checkpoints say how to rebuild it."""

    kind: str  # of the checkpoints
    training_only: tuple[str, ...] = ()  # prefixes of names of weights that only training needs
    # Name of the latent space of a model that trains on latents; None for one that needs images.
    autoencoder_fingerprint: str | None = None
    outputs: int | None = None  # number of classes that its network knows; None if it has no labels
    tile_size: int | None = None  # pixels of the tiles that it is built for; None for any
    fused = False  # whether optimisers take a step in one kernel; `ldm.train.fit` sets it

    def __init__(self):
        super().__init__()
        self.learning_rate: float | None = None  # set by the command, as the seed is
        self.classes: list[str] | None = None  # in label order; None for a model without labels
        self.seed: int | None = None
        self.gradient_norm: Tensor | None = None
        self._shared: torch.Generator | None = None  # of all ranks, see `draw`
        self._files: list[str] = []  # of the batches of the current optimiser step
        self._stepped = True
        self._skipped: Counter[int] = Counter()  # by optimiser: steps in a row, see SKIPPED_STEPS
        self.arrivals = Arrivals()  # losses and gradient norms to look at
        self.shown: dict[str, None] = {}  # names of values on the progress bar

    def networks(self) -> list[torch.nn.Module]:
        """The networks that training calls, which are worth compiling."""
        return []

    def use_classes(self, classes: list[str]) -> None:
        """Take the class names of the data before training; none if it is unlabelled."""

    def require_labels(self, classes: list[str], name: str) -> None:
        """Take the class names; UserError if there are none for what is called `name`."""
        if not classes:
            raise UserError(
                f"{name} needs labelled tiles: set data.params.train.params.labelled=true and give"
                " a folder with one folder per class"
            )
        self.classes = list(classes)

    def check_data(self, data: pl.LightningDataModule) -> None:
        """Check, before a run begins, that this model can train on the data.

        Raises:
            UserError: Tiles have another size than the model is built for; or latents are cached,
                and the model needs images or has another latent space.
        """
        cache = getattr(data, "cache", None)
        if cache is None:
            for name, tiles in (("train", data.train_dataset), ("validation", data.val_dataset)):
                size = getattr(tiles, "size", self.tile_size)
                if self.tile_size not in (None, size):
                    raise UserError(
                        f"data.params.{name}.params.size={size}: the model is built for tiles of "
                        f"{self.tile_size} pixels; set it to that, or change the model"
                    )
            return
        if self.autoencoder_fingerprint is None:
            raise UserError(
                f"latents: {cache.root} holds no images, and {type(self).__name__} trains on "
                "images; set data.params.latents=null and give data.params.train"
            )
        cache.require(self.autoencoder_fingerprint)

    def rebuild_config(self) -> dict[str, Any]:
        """Target and params that rebuild this model for inference: plain values, no paths."""
        raise TypeError(f"{type(self).__name__} does not say how to rebuild itself")

    def metrics(self) -> set[str]:
        """Names that validation logs, by which the best checkpoint can be chosen."""
        return set()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self._stepped:
            self._files, self._stepped = [], False
        self._files += map(str, batch.get("path", ()))
        self.seed_batch()

    def on_validation_start(self) -> None:
        self.arrivals.settle()  # its metrics are of finite weights

    def seed_batch(self) -> None:
        """Seed the noise of each batch by (seed, batch number, rank).

        A resumed run then draws what the uninterrupted one would have drawn, without a random state
        in the checkpoint, and no two ranks draw the same. What `draw` gives depends on the seed and
        the batch number alone.
        """
        batches = self.trainer.fit_loop.total_batch_idx
        if self.trainer.world_size == 1:
            torch.manual_seed(self._batch_seed(batches, 0))
        else:
            self._shared = torch.Generator(self.device).manual_seed(self._batch_seed(batches, 0))
            torch.manual_seed(self._batch_seed(batches, 1 + self.global_rank))

    def _batch_seed(self, batches: int, stream: int) -> int:
        key = (self.seed or 0, batches, stream)
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1

    def draw(self, fn: Callable[..., Tensor], size: Sequence[int], **options: Any) -> Tensor:
        """Draw random numbers for the images of a training batch, on the model's device.

        Several ranks draw the numbers of all their batches, and each takes its own, as tiles are
        dealt (`ldm.data.datamodule.ResumableSampler`): R ranks with batches of B images see what
        one rank with a batch of R B images sees.

        Args:
            fn: torch.randn, or another function that takes a size, a generator, a device, and what
                is in `options`.
            size: Shape; its first entry is the number of images on this rank.
        """
        ranks = 1 if self._trainer is None else self.trainer.world_size
        if ranks == 1:
            return fn(size, device=self.device, **options)
        size = (ranks * size[0], *size[1:])
        drawn = fn(size, generator=self._shared, device=self.device, **options)
        return drawn[self.trainer.global_rank :: ranks]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record of the model; the metrics of its steps reach the disk before it does.

        Raises:
            UserError: A loss, a gradient or a weight is not finite; every checkpoint that exists is
                therefore good.
        """
        self.arrivals.settle()
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise UserError(
                    f"{name} is not finite after step {self._steps_done()}, so no checkpoint is "
                    f"written; {self._last_checkpoint()}: {REMEDY}, and resume"
                )
        checkpoint[KEY] = make_record(
            self.kind, self.rebuild_config(), self.classes, self.seed, self.training_only
        )
        for logger in [] if self._trainer is None else self.trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint[KEY]["classes"]
        if self.classes is not None and stored != self.classes:
            raise UserError(
                f"the checkpoint was trained on the classes {stored}, the data has {self.classes}"
            )

    def check_start(self, params: dict[str, Any], where: str) -> None:
        """Raise a UserError if weights of a model of these parameters mean something else here."""

    def start_from(self, path: str) -> None:
        """Load the weights of a checkpoint of the same kind as a starting point for training.

        Weights that only training needs (a discriminator, say) may be absent on either side.
        """
        payload = read_checkpoint(path, (self.kind,), "ckpt_path")
        self.check_start(payload[KEY]["model"]["params"], f"ckpt_path: {path}")
        stored, own = payload["state_dict"], self.state_dict()
        extra = {k for k in own.keys() ^ stored.keys() if k.startswith(self.training_only)}
        state = {k: v for k, v in stored.items() if k not in extra}
        state |= {k: own[k] for k in extra & own.keys()}
        load_strictly(self, state, f"ckpt_path: {path}")

    def check_finite(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> None:
        """Stop at a loss that is not finite, before it reaches a checkpoint.

        On a CPU that is before it reaches the weights, on a GPU some batches later (see
        `ldm.devices.Arrivals`). The UserError names the step, the files of the batch, the last
        checkpoint and the remedy.
        """
        step, files = self._steps_done(), batch.get("path", ())

        def check(value: float) -> None:
            if not math.isfinite(value):
                self._stop(f"the loss is {value} at step {step}, batch {batch_idx}", files)

        self.arrivals.add(loss, check)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the norm of the gradient, and stop if it is not finite, as `check_finite` does.

        Lightning calls this once per step of each optimiser, also under manual optimisation, when
        the gradients of all accumulated batches and ranks are together.

        Raises:
            UserError: Names the step, the files of its batches, the last checkpoint and the remedy.
                With float16 an infinite gradient is normal, the loss scaler skips that step; there
                it is an error after `SKIPPED_STEPS` in a row.
        """
        self._stepped = True
        weights = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in weights if p.grad is not None]
        self.gradient_norm = gather_shards(torch.nn.utils.get_total_norm(gradients))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        most = SKIPPED_STEPS if scaler is not None and scaler.is_enabled() else 1
        step, files, key = self._steps_done(), self._files, id(optimizer)

        def check(norm: float) -> None:
            self._skipped[key] = 0 if math.isfinite(norm) else self._skipped[key] + 1
            if self._skipped[key] == most:
                often = f" {most} times in a row" if most > 1 else ""
                self._stop(f"the gradient is {norm}{often} at step {step}", files)

        self.arrivals.add(self.gradient_norm, check)

    def log(self, name: str, value: Any, prog_bar: bool = False, **options: Any) -> None:
        """Log a value as Lightning does, and with `prog_bar` have the progress bar show it.

        Lightning would read what is shown at every batch, for which it waits for the GPU;
        `ldm.models.callbacks.ProgressBar` reads it when it draws the bar.
        """
        if prog_bar:
            self.shown[name] = None
        super().log(name, value, **options)

    def log_losses(
        self, split: str, log: dict[str, Tensor], batch_size: int, bar: Sequence[str]
    ) -> None:
        """Log values as SPLIT/NAME; those named in `bar` are shown on the progress bar, too."""
        for on_bar in (True, False):
            values = {f"{split}/{k}": v for k, v in log.items() if (k in bar) == on_bar}
            self.log_dict(values, prog_bar=on_bar, batch_size=batch_size, sync_dist=split == "val")

    def _steps_done(self) -> int:
        return 0 if self._trainer is None else self.global_step

    def _stop(self, reason: str, files: Sequence[str], most: int = 8) -> NoReturn:
        listed = ", ".join(map(str, files[:most]))
        listed += f" and {len(files) - most} more" if len(files) > most else ""
        last = self._last_checkpoint()
        raise UserError(f"{reason} (files: {listed}); {last}: {REMEDY}, and resume")

    def _last_checkpoint(self) -> str:
        """Text that says where to go on after an error; see `on_save_checkpoint`."""
        root = None if self._trainer is None else Path(self.trainer.default_root_dir)
        found = [] if root is None else list((root / "checkpoints").glob("*.ckpt"))
        if not found:
            return "there is no checkpoint yet"
        steps = {path: training_step_of(path) or 0 for path in found}
        newest = max(found, key=lambda path: (steps[path], path.name == "last.ckpt"))
        return f"the last good checkpoint is {newest}, of step {steps[newest]}"
