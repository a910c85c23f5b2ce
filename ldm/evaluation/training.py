"""Train the evaluation classifier on one set and one seed, choosing its epoch on another.

Letters: N images, B batch, S side in pixels, K classes.

Every random number is a function of (seed, epoch, step or image), so a run that was interrupted and
resumed makes the same network as one that was not, with any number of loader processes.
"""

import difflib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint import KEY, write_checkpoint
from ldm.data.datamodule import ResumableSampler
from ldm.errors import UserError
from ldm.evaluation.metrics import HEADLINE, confusion_matrix, scores
from ldm.evaluation.sets import Splits, TransformedTiles, seed_generators
from ldm.evaluation.settings import Settings
from ldm.evaluation.vit import TileClassifier, load_pretrained
from ldm.modules.ema import EMA
from ldm.run import write_text

log = logging.getLogger(__name__)

LAST, BEST = Path("checkpoints", "last.ckpt"), Path("checkpoints", "best.ckpt")
SAVE_SECONDS = 60.0  # between writes of last.ckpt; an interruption costs at most this much


@dataclass
class Compute:
    """Where and how to compute: what does not decide the result (up to rounding)."""

    device: torch.device
    precision: str
    num_workers: int

    def __post_init__(self):
        if self.precision == "auto":
            bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
            self.precision = "bf16-mixed" if bf16 else "32"
        if self.precision == "16-mixed" and self.device.type != "cuda":
            raise UserError(f"--precision 16-mixed needs a CUDA device, not {self.device}; use 32")

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "32")

    def loader(self, tiles: TransformedTiles, batch_size: int, **kwargs: Any) -> DataLoader:
        # What only copies from memory is faster without a second process.
        workers = 0 if tiles.in_memory and not tiles.is_random else self.num_workers
        return DataLoader(
            tiles,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: an iterator draws a number for its workers
            **kwargs,
        )


@torch.no_grad()
def predict(model: TileClassifier, loader: DataLoader, compute: Compute) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,) of a whole set, on the CPU."""
    model.eval()
    logits, labels = [], []
    for images, y in loader:
        with compute.autocast():
            logits.append(model(images.to(compute.device, non_blocking=True)).float())
        labels.append(y)
    return torch.cat(logits).cpu(), torch.cat(labels)


def evaluate(
    model: TileClassifier, loader: DataLoader, compute: Compute
) -> tuple[dict[str, Any], float]:
    """Metrics of a whole set (see `ldm.evaluation.metrics.scores`) and its mean cross-entropy."""
    logits, labels = predict(model, loader, compute)
    matrix = confusion_matrix(labels.numpy(), logits.argmax(1).numpy(), logits.shape[1])
    return scores(matrix, loader.dataset.classes), F.cross_entropy(logits, labels).item()


def build_network(settings: Settings, classes: list[str]) -> TileClassifier:
    """The network to train, with the weights of `--finetune`; UserError where they do not fit."""
    model = TileClassifier(
        settings.arch,
        len(classes),
        settings.input_size,
        settings.patch_size,
        bool(settings.avgpool_patchtokens),
        settings.drop,
        settings.attn_drop_rate,
        settings.drop_path,
    )
    model.classes = classes
    if settings.finetune:
        load_pretrained(model, settings.finetune, settings.checkpoint_key, classes)
    return model


def build_optimizer(settings: Settings, model: TileClassifier, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer of that name, without weight decay of biases, norms and embeddings."""
    # Those of apex and bitsandbytes need packages that are not ours, adahessian another loop.
    known = list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"])
    if settings.opt not in known:
        near = difflib.get_close_matches(settings.opt, known, n=3) or known
        raise UserError(f"--opt {settings.opt} is no optimizer of timm; use {', '.join(near)}")
    return create_optimizer_v2(
        model.net,
        opt=settings.opt,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


class Trainer:
    """One network, one seed.

    With `model_ema`, what is validated, selected, stored and reported is the averaged network. Its
    decay warms up (`ldm.modules.ema.EMA`): at a fixed 0.99996 a run of a few thousand steps would
    report little but its own random start.

    Args:
        settings: Checked settings.
        seed: Of everything random.
        splits: Loaded sets; `test` is not touched here.
    """

    def __init__(self, settings: Settings, seed: int, splits: Splits, compute: Compute):
        self.settings, self.seed, self.splits, self.compute = settings, seed, splits, compute
        n = len(splits.train)
        self.batch_size = min(settings.batch_size, n - n % 2 if settings.mixes else n)
        # A set that is smaller than a batch makes one smaller batch; otherwise the images that fill
        # no batch (others in each epoch) are left out, so that all batches are alike.
        self.steps = n // self.batch_size
        self.sampler = ResumableSampler(splits.train, self.batch_size, seed)
        self.loader = compute.loader(
            splits.train, self.batch_size, sampler=self.sampler, drop_last=True
        )
        self.val_loader = compute.loader(splits.val, settings.batch_size)

        seed_generators(seed)
        self.model = build_network(settings, splits.classes).to(compute.device)
        self.ema = None
        if settings.model_ema:
            self.ema = EMA(self.model, settings.model_ema_decay).to(compute.device)
        # The linear rule (Goyal et al. 2017) from 512, as published, for the batch really used.
        self.lr = settings.lr * self.batch_size / 512
        self.optimizer = build_optimizer(settings, self.model, self.lr)
        self.schedule, self.epochs = self._make_schedule()
        self.scaler = torch.amp.GradScaler(
            compute.device.type, enabled=compute.precision == "16-mixed"
        )
        self.mixup: Mixup | None = None
        self.criterion: nn.Module
        if settings.mixes:
            self.mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.mixup_switch_prob,
                mode=settings.mixup_mode,
                label_smoothing=settings.smoothing,
                num_classes=len(splits.classes),
            )
            self.criterion = SoftTargetCrossEntropy()
        elif settings.smoothing > 0:
            self.criterion = LabelSmoothingCrossEntropy(settings.smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

        self.epoch = 0  # epochs done
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None  # epoch, val, val_loss
        self.best_state: dict[str, Tensor] = {}

    def _make_schedule(self):
        """timm's schedule, moved on at every step, and the number of epochs with the cooldown."""
        settings = self.settings
        constant = settings.sched == "constant"
        return create_scheduler_v2(
            self.optimizer,
            sched="step" if constant else settings.sched,
            decay_epochs=settings.epochs + 1,  # of "step": never
            num_epochs=settings.epochs,
            cooldown_epochs=settings.cooldown_epochs,
            # A tiny batch can have a rate below the published floor, which it must not rise to.
            min_lr=min(settings.min_lr, self.lr),
            warmup_lr=min(settings.warmup_lr, self.lr),
            warmup_epochs=settings.warmup,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )

    @property
    def evaluated(self) -> TileClassifier:
        """The network whose numbers count."""
        return self.model if self.ema is None else self.ema.net

    def fit(self, run: Path, show: str = "") -> None:
        """Train up to the last epoch, keeping metrics.csv and, for a resume, last.ckpt in `run`.

        Args:
            show: Name of the progress bar.
        """
        saved = time.monotonic()
        with tqdm(
            total=self.epochs, initial=self.epoch, unit="epoch", desc=show, disable=None,
            dynamic_ncols=True,
        ) as bar:  # fmt: skip
            while self.epoch < self.epochs:
                row = self.run_epoch()
                write_text(run / "metrics.csv", self._history_csv())
                bar.update()
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f} val {row['val_accuracy']:.3f}"
                    f" best {self.best['val']['accuracy']:.3f} {row['images_per_second']:.0f} img/s"
                )
                if bar.disable and (self.epoch % math.ceil(self.epochs / 10) == 0):
                    log.info("%s epoch %d/%d: %s", show, self.epoch, self.epochs, bar.postfix)
                if time.monotonic() - saved > SAVE_SECONDS and self.epoch < self.epochs:
                    write_checkpoint(run / LAST, self.state())
                    saved = time.monotonic()

    def _history_csv(self) -> str:
        lines = [",".join(self.history[0])]
        for row in self.history:
            lines.append(",".join(f"{value:.6g}" for value in row.values()))
        return "\n".join(lines) + "\n"

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch, validate, keep the network if it is the best.

        Returns:
            The new row of `history`.
        """
        start = time.monotonic()
        loss = self._train_epoch()
        trained = time.monotonic()
        val, val_loss = evaluate(self.evaluated, self.val_loader, self.compute)
        # Small validation sets give the same accuracy often; their loss says which epoch is better.
        if self.best is None or (val["accuracy"], -val_loss) > (
            self.best["val"]["accuracy"],
            -self.best["val_loss"],
        ):
            self.best = {"epoch": self.epoch + 1, "val": val, "val_loss": val_loss}
            self.best_state = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self.evaluated.state_dict().items()
            }
        end = time.monotonic()
        self.seconds += end - start
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "val_loss": val_loss,
            **{f"val_{name}": val[name] for name in HEADLINE},
            "images_per_second": self.steps * self.batch_size / (trained - start),
            "seconds": self.seconds,
        }
        self.history.append(row)
        self.epoch += 1
        return row

    def _train_epoch(self) -> float:
        """One pass over the training set; the mean loss."""
        self.model.train()
        self.sampler.set_epoch(self.epoch)
        total = 0.0
        for step, (images, y) in enumerate(self.loader):
            # After the batch was made: without loader processes its augmentation uses these too.
            seed_generators(self.seed, self.epoch, step)
            images = images.to(self.compute.device, non_blocking=True)  # (B, 3, S, S)
            y = y.to(self.compute.device, non_blocking=True)  # (B,)
            if self.mixup is not None:
                images, y = self.mixup(images, y)  # y (B, K) probabilities
            self.schedule.step_update(self.epoch * self.steps + step)
            with self.compute.autocast():
                logits = self.model(images)  # (B, K)
            loss = self.criterion(logits.float(), y)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(
                    f"loss is {value} at epoch {self.epoch + 1}, step {step + 1}; lower --lr, set"
                    " --clip-grad 1 or use --precision 32"
                )
            total += value
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            if self.settings.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.model)
        return total / self.steps

    def state(self) -> dict[str, Any]:
        """A checkpoint: the best network so far, and all that it takes to go on training."""
        return {
            **self.best_checkpoint(),
            "training": {
                "settings": self.settings.as_dict(),
                "seed": self.seed,
                "data": self.splits.identity,
                "epoch": self.epoch,
                "seconds": self.seconds,
                "history": self.history,
                "best": self.best,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        }

    def best_checkpoint(self) -> dict[str, Any]:
        """A checkpoint of the selected network alone."""
        return {KEY: self.model.record(self.seed), "state_dict": self.best_state}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on where `state` was taken. The settings must have been compared before."""
        training = checkpoint["training"]
        self.epoch, self.seconds = training["epoch"], training["seconds"]
        self.history, self.best = training["history"], training["best"]
        self.best_state = checkpoint["state_dict"]
        self.model.load_state_dict(training["model"])
        if self.ema is not None:
            self.ema.load_state_dict(training["ema"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
