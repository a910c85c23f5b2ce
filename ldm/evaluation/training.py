"""The data of the evaluation classifier's training, and its predictions for a whole set.

Letters: N images, B batch, S side in pixels, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ldm.data.datamodule import ResumableSampler
from ldm.devices import Devices, Ranks
from ldm.evaluation.metrics import HEADLINE
from ldm.evaluation.predictions import Predictions
from ldm.evaluation.sets import TransformedTiles
from ldm.models.vit import TileClassifier
from ldm.models.vit_training import Course, Validation
from ldm.progress import Bar


def make_loader(tiles: TransformedTiles, workers: int, **options: Any) -> DataLoader:
    """Batches of a set: `image` (B, 3, S, S) and `label` (B,); `workers` processes, if they help.

    `options` are the batch size or a sampler.
    """
    # What only copies from memory is faster without a second process.
    workers = 0 if tiles.in_memory and not tiles.is_random else workers
    return DataLoader(
        tiles,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: an iterator draws a number for its workers
        **options,
    )


class RunBatches(Sampler[list]):
    """This process's share of all batches of a run, from the update where it stands.

    Mixup pairs the first image of a batch with its last, the second with the last but one. A share
    is made of such pairs and keeps them opposite each other, so that every image is mixed with the
    one it would have met in a single process. `position` gives the number of updates done so far.
    """

    def __init__(
        self,
        tiles: TransformedTiles,
        course: Course,
        seed: int,
        ranks: Ranks,
        position: Callable[[], int],
    ):
        self.course, self.position, size = course, position, course.batch_size
        self.order = ResumableSampler(tiles, size, seed)
        self.places = list(range(size))
        if ranks.size > 1:
            first = range(ranks.rank, size // 2, ranks.size)
            self.places = [*first, *(size - 1 - i for i in reversed(first))]

    def __len__(self) -> int:
        """Number of batches of the whole run, wherever it stands."""
        return self.course.updates

    def __iter__(self) -> Iterator[list]:
        update = self.position()
        while update < self.course.updates:
            number, first = divmod(update, self.course.steps)
            self.order.set_epoch(number)
            items = list(self.order)  # of the pass
            for step in range(first, self.course.steps):
                if update < self.course.updates:
                    yield [items[step * self.course.batch_size + i] for i in self.places]
                update += 1


class TrainingData(pl.LightningDataModule):
    """The training batches of one network, in the order of `RunBatches`."""

    def __init__(self, tiles: TransformedTiles, batches: RunBatches, workers: int):
        super().__init__()
        self.tiles, self.batches, self.workers = tiles, batches, workers
        self.batch_size = batches.course.batch_size

    def train_dataloader(self) -> DataLoader:
        return make_loader(self.tiles, self.workers, batch_sampler=self.batches)


@dataclass
class Predictor:
    """Predicts whole sets, divided among the processes of a run.

    Each process computes its share, in the precision of `devices`, and has all results.
    """

    devices: Devices
    workers: int  # loader processes
    ranks: Ranks = Ranks()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        fabric = self.ranks.fabric
        return self.devices.device if fabric is None else fabric.device

    def loader(self, tiles: TransformedTiles, batch_size: int) -> DataLoader:
        """This process's share of a set, for `logits`."""
        share = range(self.ranks.rank, len(tiles), self.ranks.size)
        return make_loader(tiles, self.workers, batch_size=batch_size, sampler=share)

    @torch.no_grad()
    def logits(self, net: TileClassifier, loader: DataLoader) -> Tensor:
        """Logits of a whole set, (N, K) float32 on the CPU."""
        net.eval()
        device = net.mean.device
        parts = [torch.empty(0, net.params["num_classes"], device=device)]
        quiet = {"leave": False, "delay": 5, "disable": not self.ranks.is_first}
        for batch in Bar(loader, "predictions", unit="batch", **quiet):
            images = batch["image"].to(device, non_blocking=True)
            with self.devices.autocast(device):
                parts.append(net(images).float())
        logits = torch.empty(len(loader.dataset), parts[0].shape[1])
        for rank, share in enumerate(self.ranks.gather(torch.cat(parts).cpu())):
            logits[rank :: self.ranks.size] = share
        return logits

    def judge(self, tiles: TransformedTiles, batch_size: int) -> Callable[..., Validation]:
        """A function that validates a network on a set."""
        loader = self.loader(tiles, batch_size)
        labels = torch.tensor(tiles.labels)

        def validate(net: TileClassifier) -> Validation:
            logits = self.logits(net, loader)
            scores = predictions_of(tiles, logits).scores()
            headline = {name: scores[name] for name in HEADLINE}
            return Validation(logits, F.cross_entropy(logits, labels).item(), headline)

        return validate


def predictions_of(tiles: TransformedTiles, logits: Tensor) -> Predictions:
    """Logits (N, K) of a set, as predictions."""
    return Predictions.of(tiles, logits.double().softmax(1).numpy())
