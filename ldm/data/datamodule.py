"""The LightningDataModule that a configuration's `data:` node describes."""

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ldm.config import instantiate_from_config
from ldm.data.groups import by_regex, random_order
from ldm.data.latents import LatentCache
from ldm.data.tiles import Tiles, TileSet
from ldm.errors import UserError

log = logging.getLogger(__name__)


class ResumableSampler(DistributedSampler):
    """One endless order of shuffled tiles, a function of the seed; each pass is a window onto it.

    In each pass every tile comes once, or as often as the weight of its corpus says (but for a
    remainder smaller than a batch). A pass starts at batch `position()`, so a resumed run goes on
    with the batch that the uninterrupted one would have had, wherever it stopped. A `TileSet` gets
    (index, seed) pairs: the augmentation (or the cached view) of a tile then depends neither on the
    number of workers and ranks nor on any other use of random numbers.

    A DistributedSampler, since Lightning leaves those as they are.

    Args:
        batch_size: Per rank.
        num_replicas: Ranks. They see disjoint shares of the pass.
        position: Batches (per rank) drawn so far. Default: whole passes, counted by `set_epoch`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] | None = None,
    ):
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        length = dataset.pass_length() if isinstance(dataset, TileSet) else len(dataset)
        share = length // num_replicas
        if share == 0:
            raise UserError(
                f"{length} training tiles are too few for {num_replicas} devices; use fewer"
            )
        self.batch_size = min(batch_size, share)
        self.num_samples = share - share % self.batch_size
        self.position = position

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        batches = self.num_samples // self.batch_size
        position = self.epoch * batches if self.position is None else self.position()
        epoch, first = divmod(position, batches)
        first *= self.batch_size
        return iter((self._order(epoch) + self._order(epoch + 1))[first:][: self.num_samples])

    def _order(self, epoch: int) -> list[int] | list[tuple[int, int]]:
        """This rank's tiles in one pass."""
        generator = np.random.default_rng((self.seed, epoch))
        is_seeded = isinstance(self.dataset, TileSet)
        drawn = self.dataset.drawn(self.seed, epoch) if is_seeded else np.arange(len(self.dataset))
        order = generator.permutation(len(drawn))
        seeds = generator.integers(2**62, size=len(drawn))  # of the draws, in index order
        order = order[self.rank :: self.num_replicas][: self.num_samples]
        if is_seeded:
            return list(zip(drawn[order].tolist(), seeds[order].tolist(), strict=True))
        return order.tolist()


def start_worker(worker_id: int) -> None:
    """Set up a loader process."""
    cv2.setNumThreads(0)  # a pool of threads per worker only fights over the cores


def split_by_group(
    groups: list[str], labels: list[int], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split tiles into (train, held out) so that no group is on both sides.

    Groups are taken in the order of a hash of (seed, group), so a tile keeps its side when others
    are added, until each class has its share held out. At least half of each class stays in train.

    Args:
        groups: Patient, slide or region of each tile.
        labels: Classes of the tiles; the same number everywhere when there are none.
        fraction: Share of the tiles to hold out, in (0, 1).
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)

    label_of = np.asarray(labels) - np.min(labels)  # unlabelled tiles, all -1, become one class
    total = np.bincount(label_of)
    target = np.maximum(1, np.round(fraction * total))
    held_count = np.zeros_like(total)
    held: list[int] = []

    for group in sorted(members, key=lambda group: random_order(seed, group)):
        count = np.bincount(label_of[members[group]], minlength=len(total))
        wanted = ((count > 0) & (held_count < target)).any()
        if wanted and (2 * (held_count + count) <= total)[count > 0].all():
            held += members[group]
            held_count += count
    if not held:
        raise UserError(
            f"val_fraction={fraction}: {len(groups)} tiles in {len(members)} groups are too few to"
            " hold some out; add tiles, give `validation` or set val_fraction=0"
        )
    without = int(((total > 0) & (held_count == 0)).sum())
    if without:
        log.warning("validation: %d classes have too few groups to hold one out", without)
    chosen = set(held)
    return [i for i in range(len(groups)) if i not in chosen], sorted(held)


class DataModuleFromConfig(pl.LightningDataModule):
    """Training and validation tiles from `{target, params}` nodes.

    Without `validation`, a share of the training tiles is held out, unaugmented: the same tiles for
    the same seed. Data sets are built on first use of `train_dataset` or `val_dataset`.

    With `latents`, the tiles of a cache take the place of both, in the same order: neither `train`
    nor `validation` is then built, and hold-out and augmentation are those of the cache.

    Args:
        batch_size: Tiles per step and rank. A training set smaller than it makes one smaller batch;
            otherwise an incomplete last batch is dropped.
        train: Node of the training set. Needed unless there are `latents`.
        validation: Node of the validation set, or None.
        num_workers: Loader processes.
        prefetch: Batches that each of them prepares ahead.
        val_fraction: Share held out, in [0, 0.5]; 0 for none. Not used with `validation`.
        group_regex: Regular expression whose first group is the patient, slide or region in a
            tile's name: those tiles stay together. Without it, those of one group of an index do.
        seed: Seed of the hold-out, the order and the augmentation.
        latents: Folder of a cache that scripts/cache_latents.py made.

    Attributes:
        cache: The open cache, once the data sets are built; None without `latents`.

    Raises:
        UserError: The classes of the two sets differ, tiles are bad, or a cache is damaged.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        num_workers: int = 2,
        prefetch: int = 2,
        val_fraction: float = 0.05,
        group_regex: str | None = None,
        seed: int = 0,
        latents: str | None = None,
    ):
        super().__init__()
        if train is None and latents is None:
            raise UserError("train: give the node of the training tiles, or latents=DIR of a cache")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.val_fraction = val_fraction
        self.group_regex = group_regex
        self.seed = seed
        self.latents = latents
        self.cache: LatentCache | None = None
        self._train_node = train
        self._validation_node = validation

    def setup(self, stage: str | None = None) -> None:
        _ = self._sets

    @cached_property
    def _sets(self) -> tuple[Dataset, Dataset | None]:
        if self.latents is not None:
            self.cache = LatentCache.read(self.latents, "data.params.latents")
            views = self.cache.train.shards.views
            log.info("cached latents: %s, %d views of each training tile", self.cache.root, views)
            return self.cache.train, self.cache.validation
        train = instantiate_from_config(self._train_node)
        if self._validation_node is not None:
            validation = instantiate_from_config(self._validation_node)
            ours, theirs = getattr(train, "classes", []), getattr(validation, "classes", [])
            if ours and theirs and list(ours) != list(theirs):
                raise UserError(
                    f"classes of train {list(ours)} and validation {list(theirs)} differ;"
                    " make the class folders alike"
                )
            return train, validation
        if self.val_fraction == 0:
            return train, None
        if not isinstance(train, Tiles):
            raise UserError(
                f"val_fraction={self.val_fraction} needs tiles to hold some out of, not"
                f" {type(train).__name__}; give `validation` or set val_fraction=0"
            )
        groups = train.groups or train.relative_paths
        if self.group_regex is not None:
            groups = list(map(by_regex(self.group_regex), train.relative_paths))
        kept, held = split_by_group(groups, train.labels, self.val_fraction, self.seed)
        return train.subset(kept), train.subset(held, random=False)

    @property
    def train_dataset(self) -> Dataset:
        """The training tiles, built on first use."""
        return self._sets[0]

    @property
    def val_dataset(self) -> Dataset | None:
        """The given or held-out validation tiles; None when there are none."""
        return self._sets[1]

    @property
    def classes(self) -> list[str]:
        """Class names in label order; empty when the training tiles are unlabelled."""
        return list(getattr(self.train_dataset, "classes", []))

    def train_dataloader(self) -> DataLoader:
        options: dict[str, Any] = {}
        trainer = self.trainer
        if trainer is not None:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            options = {
                "num_replicas": trainer.world_size,
                "rank": trainer.global_rank,
                "position": lambda: progress.total.ready,
            }
            # Lightning cannot know that the sampler finds its place by itself.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        sampler = ResumableSampler(self.train_dataset, self.batch_size, self.seed, **options)
        return self._loader(self.train_dataset, sampler=sampler)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.val_dataset is None else self._loader(self.val_dataset)

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=self.prefetch if self.num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            # Its own generator: an iterator draws one number for its workers, which would
            # otherwise shift the sequence that the model's noise comes from.
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )
