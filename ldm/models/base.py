"""What the LightningModules have in common: checkpoint records, seeds, finite losses."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint import KEY, load_strictly, make_record, read_checkpoint
from ldm.errors import UserError


class HistoModule(pl.LightningModule):
    """A LightningModule whose checkpoints say how to rebuild it.

    Class attributes:
        kind: Kind of the checkpoints.
        training_only: Prefixes of weights that only training needs.

    Attributes:
        learning_rate: Set by the command, from the configuration's `base_learning_rate`.
        classes: Class names in label order, or None for a model without labels.
        seed: Set by the command, for the record.
    """

    kind: str
    training_only: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.learning_rate: float | None = None
        self.classes: list[str] | None = None
        self.seed: int | None = None

    def use_classes(self, classes: list[str]) -> None:
        """Called before training with the data's class names, none where it is unlabelled."""

    def rebuild_config(self) -> dict[str, Any]:
        """Target and params (plain containers, no paths) that rebuild this model for inference."""
        raise TypeError(f"{type(self).__name__} does not say how to rebuild itself")

    def metrics(self) -> set[str]:
        """Names that `self.log` writes during validation: what a checkpoint can be chosen by."""
        return set()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed the noise of each batch by (seed, batch number, rank).

        So a resumed run draws what the uninterrupted one would have drawn, without a random state
        in the checkpoint, and no two ranks draw the same.
        """
        key = (self.seed or 0, self.trainer.fit_loop.total_batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = make_record(
            self.kind, self.rebuild_config(), self.classes, self.seed, self.training_only
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint or checkpoint[KEY]["kind"] != self.kind:
            raise UserError(f"the checkpoint to resume does not hold a model of kind {self.kind}")
        stored = checkpoint[KEY]["classes"]
        if self.classes is not None and stored != self.classes:
            raise UserError(
                f"the checkpoint was trained on the classes {stored}, the data has {self.classes}"
            )

    def start_from(self, path: str, what: str = "ckpt_path") -> None:
        """Load the weights of a checkpoint of the same kind as a starting point for training.

        Weights that only training needs (a discriminator, say) may be absent on either side.
        """
        stored = read_checkpoint(path, (self.kind,), what)["state_dict"]
        own = self.state_dict()
        extra = {k for k in own.keys() ^ stored.keys() if k.startswith(self.training_only)}
        state = {k: v for k, v in stored.items() if k not in extra} | {
            k: own[k] for k in extra & own.keys()
        }
        load_strictly(self, state, f"{what}: {path}")

    def check_finite(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> None:
        """Stop at a loss that is not finite, before it reaches the weights.

        Raises:
            UserError: Names the step, the first files of the batch and the remedy.
        """
        if torch.isfinite(loss).all():
            return
        files = ", ".join(map(str, batch["path"][:3]))
        raise UserError(
            f"the loss is {float(loss.detach().mean())} at step {self.global_step}, batch "
            f"{batch_idx} (files: {files}, ...); the last checkpoint is intact: lower the learning "
            "rate, or use --precision bf16-mixed or 32 instead of 16-mixed, and resume"
        )
