"""Training of the evaluation classifier: timm's recipe under `ldm.train.fit`.

Letters: N images, B batch, S side in pixels, K classes.

Every random number is a function of (seed, update) or (seed, pass, image), so a run that was
interrupted and resumed makes the same network as one that was not, with any number of loader
processes.
"""

import difflib
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ldm.data.seeds import seed_generators
from ldm.errors import UserError
from ldm.files import write_csv
from ldm.models.base import HistoModule
from ldm.models.vit import TileClassifier, load_pretrained
from ldm.models.vit_settings import MATCHED_VALIDATIONS, Settings
from ldm.modules.ema import EMA

log = logging.getLogger(__name__)

LEARNING_RATE_BATCH = 512  # images of the batch that `Settings.lr` is given for
LOG_LINES = 10  # of a run without a progress bar


@dataclass(frozen=True)
class Course:
    """How a training is divided into batches, passes over the set, and validations."""

    batch_size: int  # images, of all devices together
    steps: int  # updates of a pass
    marks: tuple[int, ...]  # updates after which the network is validated; the last is the end
    notes: tuple[str, ...] = ()  # what a reader of the results should know about the batches

    @classmethod
    def of(cls, settings: Settings, images: int, ranks: int = 1) -> "Course":
        """The course for a training set of so many images, on so many devices.

        A set that is smaller than a batch makes one smaller batch. Otherwise the images that fill
        no batch (others in each pass) are left out, so that all batches are alike.
        """
        # Mixing needs pairs, and so do the shares of several processes.
        unit = 2 * ranks if settings.mixes or ranks > 1 else 1
        wanted = settings.batch_size
        batch_size = min(wanted, images) // unit * unit
        if batch_size == 0:
            raise UserError(
                f"{images} training images in batches of {wanted} are too few for {ranks} devices;"
                " use fewer `devices`"
            )
        notes: tuple[str, ...] = ()
        if batch_size < wanted:
            why, more = f"a multiple of {unit} for {ranks} devices", ""
            if images < wanted:
                why = f"as there are only {images} training images"
                more = ", and larger sets differ in this too"
            note = f"batches of {batch_size} instead of {wanted}, {why}"
            notes = (f"{note}: the learning rate is lowered to match{more}",)
        steps = images // batch_size
        if settings.match_steps is None:
            passes = settings.epochs + settings.cooldown_epochs
            return cls(batch_size, steps, tuple(range(steps, passes * steps + 1, steps)), notes)
        length = settings.match_steps
        count = settings.validations or min(MATCHED_VALIDATIONS, length)
        marks = tuple(-(-length * k // count) for k in range(1, count + 1))  # rounded up
        return cls(batch_size, steps, marks, notes)

    @property
    def updates(self) -> int:
        """Updates of the whole training."""
        return self.marks[-1]

    def passes(self, updates: int) -> int | float:
        """Passes over the training set that so many updates are."""
        complete, rest = divmod(updates, self.steps)
        return round(updates / self.steps, 2) if rest else complete


class Validation(NamedTuple):
    """What a validation found."""

    logits: Tensor  # (N, K), on the CPU
    loss: float  # mean cross-entropy
    scores: dict[str, float]  # `accuracy` among them


def build_network(settings: Settings, classes: list[str]) -> TileClassifier:
    """The network to train, with the weights of `finetune`."""
    net = TileClassifier(
        settings.arch,
        len(classes),
        settings.input_size,
        settings.patch_size,
        bool(settings.avgpool_patchtokens),
        settings.drop,
        settings.attn_drop_rate,
        settings.drop_path,
    )
    net.classes = classes
    if settings.finetune:
        load_pretrained(net, settings.finetune, settings.checkpoint_key, classes)
    return net


def build_optimizer(settings: Settings, net: TileClassifier, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer of that name, without weight decay of biases, norms and embeddings."""
    # Those of apex and bitsandbytes need packages that are not ours, adahessian another loop.
    known = list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"])
    if settings.opt not in known:
        near = difflib.get_close_matches(settings.opt, known, n=3) or known
        raise UserError(f"`opt` {settings.opt} is no optimizer of timm; use {', '.join(near)}")
    return create_optimizer_v2(
        net.net,
        opt=settings.opt,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


def build_schedule(
    settings: Settings, course: Course, optimizer: torch.optim.Optimizer, lr: float
) -> Scheduler:
    """timm's schedule, to be moved on at every update."""
    matched = settings.match_steps is not None
    length = settings.match_steps if matched else settings.epochs
    constant = settings.sched == "constant"
    return create_scheduler_v2(
        optimizer,
        sched="step" if constant else settings.sched,
        decay_epochs=length + 1,  # of "step": never
        num_epochs=length,
        cooldown_epochs=settings.cooldown_epochs,
        # A tiny batch can have a rate below the published floor, which it must not rise to.
        min_lr=min(settings.min_lr, lr),
        warmup_lr=min(settings.warmup_lr, lr),
        warmup_epochs=settings.warmup,
        step_on_epochs=False,
        updates_per_epoch=1 if matched else course.steps,
    )[0]


class VitTraining(HistoModule):
    """Trains a `TileClassifier` and keeps the network of its best validation.

    With `model_ema`, what is validated, selected, stored and reported is the averaged network. Its
    decay warms up (`ldm.modules.ema.EMA`): at a fixed 0.99996 a run of a few thousand steps would
    report little but its own random start.

    A checkpoint holds the best network so far as its model, and under `training` all that it takes
    to go on.

    Args:
        net: The network; its `classes` are those of the data.
        judge: Validates a network, on all ranks together.
        facts: What must be equal where the training goes on: `settings` and `data`.
    """

    kind = "vit"

    def __init__(
        self,
        net: TileClassifier,
        settings: Settings,
        course: Course,
        seed: int,
        judge: Callable[[TileClassifier], Validation],
        facts: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.net, self.classes, self.seed = net, net.classes, seed
        self.settings, self.course, self.judge, self.facts = settings, course, judge, facts or {}
        # The linear rule (Goyal et al. 2017) for the batch really used.
        self.learning_rate = settings.lr * course.batch_size / LEARNING_RATE_BATCH
        self.ema = EMA(net, settings.model_ema_decay) if settings.model_ema else None
        self.mixup, self.criterion = self._make_loss()
        self.updates = 0  # done so far
        self.history: list[dict[str, float]] = []  # a row per validation
        # The best validation so far (updates, logits (N, K), val_accuracy, val_loss) and the
        # weights of then, on the CPU.
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] = {}
        self.seconds = 0.0  # of training and validation so far
        self._loss_sum = 0.0  # over the updates since the last validation
        self._resumed: dict[str, Any] = {}

    def _make_loss(self) -> tuple[Mixup | None, nn.Module]:
        settings = self.settings
        if not settings.mixes and settings.smoothing > 0:
            return None, LabelSmoothingCrossEntropy(settings.smoothing)
        if not settings.mixes:
            return None, nn.CrossEntropyLoss()
        mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            mode=settings.mixup_mode,
            label_smoothing=settings.smoothing,
            num_classes=len(self.classes),
        )
        return mixup, SoftTargetCrossEntropy()

    @property
    def evaluated(self) -> TileClassifier:
        """The network whose numbers count."""
        return self.net if self.ema is None else self.ema.net

    def rebuild_config(self) -> dict[str, Any]:
        return self.net.rebuild_config()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.settings, self.net, self.learning_rate)
        self.schedule = build_schedule(self.settings, self.course, optimizer, self.learning_rate)
        if "optimizer" in self._resumed:
            optimizer.load_state_dict(self._resumed.pop("optimizer"))
        return optimizer

    def on_train_start(self) -> None:
        # Since the last validation, also where that was in the process that was interrupted.
        self._since = time.monotonic() - self._resumed.pop("since_validation", 0.0)

    def seed_batch(self) -> None:
        """Seed what is drawn for a batch, and set its learning rate.

        This comes after the batch was made, since without loader processes its augmentation uses
        the same generators.
        """
        seed_generators(self.seed, *divmod(self.updates, self.course.steps))
        self.schedule.step_update(self.updates)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, y = batch["image"], batch["label"]  # (B, 3, S, S), (B,)
        if self.mixup is not None:
            images, y = self.mixup(images, y)  # y (B, K) probabilities
        if self.trainer.world_size > 1:  # what is dropped differs between the processes
            place = divmod(self.updates, self.course.steps)
            seed_generators(self.seed, *place, self.trainer.global_rank)
        loss = self.criterion(self.net(images).float(), y)
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.check_finite(mean, batch, batch_idx)
        self.arrivals.add(mean, self._add_loss)
        return loss

    def _add_loss(self, mean: float) -> None:
        self._loss_sum += mean

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        # Lightning would clip in the order of the optimizer's groups, which rounds otherwise.
        if self.settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip_grad)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.net)
        self.updates += 1

    def validate(self) -> dict[str, float]:
        """Validate the evaluated network, keep it if it is the best so far, and log a row."""
        self.arrivals.settle()
        trained = time.monotonic()
        self.eval()
        found = self.judge(self.evaluated)
        self.train()
        accuracy, best = found.scores["accuracy"], self.best
        # Small validation sets give the same accuracy often; their loss says which is better.
        is_better = best is None or (
            (accuracy, -found.loss) > (best["val_accuracy"], -best["val_loss"])
        )
        # One process decides: another machine may round otherwise.
        if self.trainer.strategy.broadcast(is_better):
            self.best = {
                "updates": self.updates,
                "logits": found.logits,
                "val_accuracy": accuracy,
                "val_loss": found.loss,
            }
            self.best_state = _on_cpu(self.evaluated)
        end = time.monotonic()
        self.seconds += end - self._since
        updates = self.updates - (self.history[-1]["updates"] if self.history else 0)
        row = {
            "epoch": self.course.passes(self.updates),
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": self._loss_sum / updates,
            "val_loss": found.loss,
            **{f"val_{name}": value for name, value in found.scores.items()},
            "images_per_second": updates * self.course.batch_size / (trained - self._since),
            "seconds": self.seconds,
            "updates": self.updates,
        }
        self.history.append(row)
        self._since, self._loss_sum = end, 0.0
        return row

    def best_checkpoint(self) -> dict[str, Any]:
        """A checkpoint of the selected network alone."""
        checkpoint = {"state_dict": self.best_state}
        super().on_save_checkpoint(checkpoint)
        return checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["training"] = {
            **self.facts,
            "seed": self.seed,
            "updates": self.updates,
            "seconds": self.seconds,
            "since_validation": time.monotonic() - self._since,
            "loss_sum": self._loss_sum,
            "history": self.history,
            "best": self.best,
            "weights": checkpoint["state_dict"],
        }
        checkpoint["state_dict"] = self.best_state or _on_cpu(self.evaluated)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        training = checkpoint["training"]
        self.best_state = checkpoint["state_dict"] if training["best"] else {}
        checkpoint["state_dict"] = training["weights"]
        self.updates, self.seconds = training["updates"], training["seconds"]
        self.history, self.best = list(training["history"]), training["best"]
        self._loss_sum = training["loss_sum"]
        self._resumed = {"since_validation": training["since_validation"]}

    def resume_earlier_version(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint that was written before `fit` trained this network, too."""
        training = checkpoint["training"]
        weights = {f"net.{name}": value for name, value in training["model"].items()}
        for name, value in (training["ema"] or {}).items():
            weights[f"ema.{name}"] = value
        later = {"weights": weights, "loss_sum": 0.0, "since_validation": 0.0}
        checkpoint = {**checkpoint, "training": {**training, **later}}
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._resumed["optimizer"] = training["optimizer"]


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of a network."""
    return {name: v.detach().to("cpu", copy=True) for name, v in net.state_dict().items()}


class ValidateAtMarks(pl.Callback):
    """Validates a `VitTraining` where its course says so, and keeps RUN/metrics.csv.

    Put it before the callbacks that write checkpoints, so that these hold the validation. `show` is
    the name of the run in the lines of its log.
    """

    def __init__(self, show: str):
        self.show = show

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VitTraining, *args: Any, **kwargs: Any
    ) -> None:
        marks, done = pl_module.course.marks, len(pl_module.history)
        if pl_module.updates != marks[done]:
            return
        row = pl_module.validate()
        if not trainer.is_global_zero:
            return
        rows = [{k: f"{v:.6g}" for k, v in r.items()} for r in pl_module.history]
        write_csv(Path(trainer.default_root_dir) / "metrics.csv", rows, list(row))
        if not sys.stderr.isatty() and (done + 1) % math.ceil(len(marks) / LOG_LINES) == 0:
            log.info(
                f"{self.show} update {pl_module.updates}/{marks[-1]}: loss {row['train_loss']:.3f}"
                f" val {row['val_accuracy']:.3f} best {pl_module.best['val_accuracy']:.3f}"
                f" {row['images_per_second']:.0f} img/s"
            )
