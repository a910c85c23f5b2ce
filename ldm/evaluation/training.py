"""Train the evaluation classifier on one set and one seed, choosing its epoch on another.

Letters: N images, B batch, S side in pixels, K classes.

Every random number is a function of (seed, update) or (seed, pass, image), so a run that was
interrupted and resumed makes the same network as one that was not, with any number of loader
processes.
"""

import difflib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from ldm.checkpoint import KEY, write_checkpoint
from ldm.data.datamodule import ResumableSampler
from ldm.devices import Ranks
from ldm.errors import UserError
from ldm.evaluation.metrics import HEADLINE
from ldm.evaluation.predictions import Predictions
from ldm.evaluation.sets import Splits, TransformedTiles, seed_generators
from ldm.evaluation.settings import MATCHED_VALIDATIONS, Settings
from ldm.evaluation.vit import TileClassifier, load_pretrained
from ldm.files import write_text
from ldm.modules.ema import EMA

log = logging.getLogger(__name__)

LAST, BEST = Path("checkpoints", "last.ckpt"), Path("checkpoints", "best.ckpt")
SAVE_SECONDS = 60.0  # between writes of last.ckpt; an interruption costs at most this much


@dataclass
class Compute:
    """Where and how to compute: what does not decide the result (up to rounding)."""

    device: torch.device
    precision: str
    num_workers: int
    ranks: Ranks = Ranks()

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
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: an iterator draws a number for its workers
            **({"batch_size": batch_size} | kwargs),
        )

    def evaluation_loader(self, tiles: TransformedTiles, batch_size: int) -> DataLoader:
        """This process's share of a set, for `predict`."""
        share = range(self.ranks.rank, len(tiles), self.ranks.size)
        return self.loader(tiles, batch_size, sampler=share)


@torch.no_grad()
def predict(model: TileClassifier, loader: DataLoader, compute: Compute) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,) of a whole set, on the CPU.

    Args:
        loader: Of `Compute.evaluation_loader`. Each process computes its share and has them all.
    """
    model.eval()
    parts = [torch.empty(0, model.params["num_classes"], device=compute.device)]
    for images, _ in loader:
        with compute.autocast():
            parts.append(model(images.to(compute.device, non_blocking=True)).float())
    labels = torch.tensor(loader.dataset.labels)
    logits = torch.empty(len(labels), parts[0].shape[1])
    for rank, share in enumerate(compute.ranks.gather(torch.cat(parts).cpu())):
        logits[rank :: compute.ranks.size] = share
    return logits, labels


class SharedBatches(Sampler[list]):
    """One process's share of the batches that a single process would have.

    Mixup pairs the first image of a batch with its last, the second with the last but one. A share
    is made of such pairs and keeps them opposite each other, so that every image is mixed with the
    one it would have met in a single process.

    Args:
        sampler: Of the whole batches; its items are taken `batch_size` at a time.
        batch_size: Of all processes together, a multiple of twice their number.
    """

    def __init__(self, sampler: ResumableSampler, batch_size: int, ranks: Ranks):
        self.sampler, self.batch_size = sampler, batch_size
        first = range(ranks.rank, batch_size // 2, ranks.size)
        self.places = [*first, *(batch_size - 1 - i for i in reversed(first))]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list]:
        items = list(self.sampler)
        for start in range(0, len(items), self.batch_size):
            yield [items[start + place] for place in self.places]


def evaluate(model: TileClassifier, loader: DataLoader, compute: Compute) -> tuple[Tensor, float]:
    """Logits (N, K) of a whole set, and its mean cross-entropy."""
    logits, labels = predict(model, loader, compute)
    return logits, F.cross_entropy(logits, labels).item()


def predictions_of(tiles: TransformedTiles, logits: Tensor) -> Predictions:
    """Logits (N, K) of a set, as predictions."""
    return Predictions(
        tiles.classes,
        tiles.relative_paths,
        np.array(tiles.labels),
        logits.argmax(1).numpy(),
        logits.double().softmax(1).numpy(),
        tiles.groups,
    )


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
        n, ranks = len(splits.train), compute.ranks
        # Mixing needs pairs, and so do the shares of several processes.
        unit = 2 * ranks.size if settings.mixes or ranks.size > 1 else 1
        self.batch_size = min(settings.batch_size, n) // unit * unit
        if self.batch_size == 0:
            raise UserError(
                f"{n} training images in batches of {settings.batch_size} are too few for"
                f" {ranks.size} devices; use fewer --devices"
            )
        # A set that is smaller than a batch makes one smaller batch; otherwise the images that fill
        # no batch (others in each epoch) are left out, so that all batches are alike.
        self.steps = n // self.batch_size  # of a pass
        self.notes: list[str] = []
        if self.batch_size < settings.batch_size <= n:
            self.notes.append(
                f"batches of {self.batch_size} instead of {settings.batch_size}, a multiple of"
                f" {unit} for {ranks.size} devices: the learning rate is lowered to match"
            )
        elif self.batch_size < settings.batch_size:
            self.notes.append(
                f"batches of {self.batch_size} instead of {settings.batch_size}, as there are only"
                f" {n} training images: the learning rate is lowered to match, and larger sets"
                " differ in this too"
            )
        self.updates = 0  # done so far
        self.marks = self._marks()
        self.sampler = ResumableSampler(
            splits.train, self.batch_size, seed, position=lambda: self.updates
        )
        if ranks.size == 1:
            self.loader = compute.loader(
                splits.train, self.batch_size, sampler=self.sampler, drop_last=True
            )
        else:
            shares = SharedBatches(self.sampler, self.batch_size, ranks)
            self.loader = compute.loader(splits.train, 1, batch_sampler=shares)
        self.val_loader = compute.evaluation_loader(splits.val, settings.batch_size)

        seed_generators(seed)
        self.model = build_network(settings, splits.classes).to(compute.device)
        if ranks.size > 1 and compute.device.type == "cuda":
            # Its keys are those of batch norm; networks without batch norm stay as they are.
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema = None
        if settings.model_ema:
            self.ema = EMA(self.model, settings.model_ema_decay).to(compute.device)
        # What is called in training: it adds up the gradients of all processes.
        self.trained: nn.Module = self.model
        if ranks.size > 1:
            on_gpu = compute.device.type == "cuda"
            self.trained = DistributedDataParallel(
                self.model, device_ids=[compute.device.index] if on_gpu else None
            )
        # The linear rule (Goyal et al. 2017) from 512, as published, for the batch really used.
        self.lr = settings.lr * self.batch_size / 512
        self.optimizer = build_optimizer(settings, self.model, self.lr)
        self.schedule = self._make_schedule()
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

        self.batches = self._draw_batches()
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []  # a row per validation
        # The best so far: updates, logits of val (N, K), val_accuracy, val_loss.
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] = {}

    def _marks(self) -> list[int]:
        """After how many updates it validates; the last is the end."""
        settings = self.settings
        if settings.match_steps is None:
            epochs = settings.epochs + settings.cooldown_epochs
            return [epoch * self.steps for epoch in range(1, epochs + 1)]
        length = settings.match_steps
        count = settings.validations or min(MATCHED_VALIDATIONS, length)
        return [-(-length * k // count) for k in range(1, count + 1)]

    def passes(self, updates: int) -> int | float:
        """Passes over the training set that so many updates are."""
        whole, rest = divmod(updates, self.steps)
        return round(updates / self.steps, 2) if rest else whole

    def _make_schedule(self):
        """timm's schedule, moved on at every update."""
        settings = self.settings
        matched = settings.match_steps is not None
        length = settings.match_steps if matched else settings.epochs
        constant = settings.sched == "constant"
        return create_scheduler_v2(
            self.optimizer,
            sched="step" if constant else settings.sched,
            decay_epochs=length + 1,  # of "step": never
            num_epochs=length,
            cooldown_epochs=settings.cooldown_epochs,
            # A tiny batch can have a rate below the published floor, which it must not rise to.
            min_lr=min(settings.min_lr, self.lr),
            warmup_lr=min(settings.warmup_lr, self.lr),
            warmup_epochs=settings.warmup,
            step_on_epochs=False,
            updates_per_epoch=1 if matched else self.steps,
        )[0]

    @property
    def evaluated(self) -> TileClassifier:
        """The network whose numbers count."""
        return self.model if self.ema is None else self.ema.net

    def fit(self, run: Path, show: str = "") -> None:
        """Train up to the last update, keeping metrics.csv and, for a resume, last.ckpt in `run`.

        Args:
            show: Name of the progress bar.
        """
        saved = time.monotonic()
        end = self.marks[-1]
        with tqdm(
            total=end, initial=self.updates, unit="update", desc=show, dynamic_ncols=True,
            disable=None if self.compute.ranks.is_first else True,
        ) as bar:  # fmt: skip
            while self.updates < end:
                row = self.run_round()
                if not self.compute.ranks.is_first:
                    continue
                write_text(run / "metrics.csv", self._history_csv())
                bar.update(self.updates - bar.n)
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f} val {row['val_accuracy']:.3f}"
                    f" best {self.best['val_accuracy']:.3f} {row['images_per_second']:.0f} img/s"
                )
                if bar.disable and len(self.history) % math.ceil(len(self.marks) / 10) == 0:
                    log.info("%s update %d/%d: %s", show, self.updates, end, bar.postfix)
                if time.monotonic() - saved > SAVE_SECONDS and self.updates < end:
                    write_checkpoint(run / LAST, self.state())
                    saved = time.monotonic()

    def _history_csv(self) -> str:
        lines = [",".join(self.history[0])]
        for row in self.history:
            lines.append(",".join(f"{value:.6g}" for value in row.values()))
        return "\n".join(lines) + "\n"

    def run_round(self) -> dict[str, float]:
        """Train up to the next validation, validate, keep the network if it is the best.

        Returns:
            The new row of `history`.
        """
        start, first = time.monotonic(), self.updates
        loss = self._train_until(self.marks[len(self.history)])
        trained = time.monotonic()
        logits, val_loss = evaluate(self.evaluated, self.val_loader, self.compute)
        val = predictions_of(self.splits.val, logits).scores()
        # Small validation sets give the same accuracy often; their loss says which is better.
        is_better = self.best is None or (val["accuracy"], -val_loss) > (
            self.best["val_accuracy"],
            -self.best["val_loss"],
        )
        # One process decides: another machine may round otherwise.
        if self.compute.ranks.broadcast(is_better):
            self.best = {
                "updates": self.updates,
                "logits": logits,
                "val_accuracy": val["accuracy"],
                "val_loss": val_loss,
            }
            self.best_state = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self.evaluated.state_dict().items()
            }
        end = time.monotonic()
        self.seconds += end - start
        row = {
            "epoch": self.passes(self.updates),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "val_loss": val_loss,
            **{f"val_{name}": val[name] for name in HEADLINE},
            "images_per_second": (self.updates - first) * self.batch_size / (trained - start),
            "seconds": self.seconds,
            "updates": self.updates,
        }
        self.history.append(row)
        return row

    def _draw_batches(self) -> Iterator[list[Tensor]]:
        """Batches from where `updates` stands, pass after pass.

        A validation in the middle of a pass only pauses it, and so costs no batch that loader
        processes have made ahead.
        """
        while True:
            yield from self.loader

    def _train_until(self, mark: int) -> float:
        """Train until `mark` updates are done; the mean loss."""
        self.model.train()
        total, first = 0.0, self.updates
        while self.updates < mark:
            images, y = next(self.batches)
            epoch, step = divmod(self.updates, self.steps)
            # After the batch was made: without loader processes its augmentation uses these too.
            seed_generators(self.seed, epoch, step)
            images = images.to(self.compute.device, non_blocking=True)  # (B, 3, S, S)
            y = y.to(self.compute.device, non_blocking=True)  # (B,)
            if self.mixup is not None:
                images, y = self.mixup(images, y)  # y (B, K) probabilities
            if self.compute.ranks.size > 1:  # what is dropped differs between the processes
                seed_generators(self.seed, epoch, step, self.compute.ranks.rank)
            self.schedule.step_update(self.updates)
            with self.compute.autocast():
                logits = self.trained(images)  # (B, K)
            loss = self.criterion(logits.float(), y)
            value = self.compute.ranks.mean(loss).item()
            if not math.isfinite(value):
                raise UserError(
                    f"loss is {value} at epoch {epoch + 1}, step {step + 1}; lower --lr, set"
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
            self.updates += 1
        return total / (self.updates - first)

    def state(self) -> dict[str, Any]:
        """A checkpoint: the best network so far, and all that it takes to go on training."""
        return {
            **self.best_checkpoint(),
            "training": {
                "settings": self.settings.as_dict(),
                "seed": self.seed,
                "data": self.splits.identity,
                "updates": self.updates,
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
        self.updates, self.seconds = training["updates"], training["seconds"]
        self.history, self.best = training["history"], training["best"]
        self.best_state = checkpoint["state_dict"]
        self.model.load_state_dict(training["model"])
        if self.ema is not None:
            self.ema.load_state_dict(training["ema"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
