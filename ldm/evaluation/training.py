"""Train the evaluation classifier, choose its epoch on val, report test once.

Letters: N images, B batch, S side in pixels, K classes.

Every random number is a function of (seed, epoch, step or image), so a run that was interrupted and
resumed makes the same network as one that was not, with any number of loader processes.
"""

import hashlib
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint import KEY, file_sha256, read_checkpoint, write_checkpoint
from ldm.data.datamodule import EpochSampler
from ldm.data.tiles import TileFolder, check_tiles, decode_tiles, read_tile
from ldm.errors import UserError
from ldm.evaluation.metrics import HEADLINE, confusion_matrix, mean_and_std, scores
from ldm.evaluation.settings import NO_AUGMENT, Settings
from ldm.evaluation.vit import TileClassifier, eval_transform, load_pretrained, load_vit
from ldm.modules.ema import EMA
from ldm.run import git_revision, hardware, versions, write_json, write_text

log = logging.getLogger(__name__)

CACHE_LIMIT = 2 * 2**30  # bytes of prepared tiles that one set may hold in memory
SAVE_SECONDS = 60.0  # between writes of last.ckpt; an interruption costs at most this much


def seed_generators(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, which timm's augmentation draws from."""
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


class TransformedTiles(TileFolder):
    """Labelled tiles as a timm transform gives them: items are (image, label).

    All tiles are decoded at construction, so that a bad file is known before training. They are kept
    in memory (as files for a random transform, as its results for a fixed one) where they fit.

    Args:
        root: Folder of class folders.
        size: S.
        transform: From a PIL image to a tensor (3, S, S).
        random: Whether the transform draws random numbers: then the items are taken by
            (index, seed), as `EpochSampler` gives them.
        classes: The classes there must be; None for those of the folder.

    Raises:
        UserError: A missing or empty folder, other classes, unreadable images.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        transform: Callable[[Image.Image], Tensor],
        random: bool,
        classes: Sequence[str] | None = None,
    ):
        super().__init__(root, size, labelled=True, classes=classes, check=False)
        self._timm_transform = transform
        self._random = random
        each = read_tile(self.paths[0]).nbytes if random else 3 * size * size
        self._cached = None
        if each * len(self) <= CACHE_LIMIT:
            self._cached = decode_tiles(self.paths, self._prepare)
        else:
            check_tiles(self.paths)

    @property
    def is_random(self) -> bool:
        return self._random

    @property
    def in_memory(self) -> bool:
        return self._cached is not None

    def _prepare(self, path: Path) -> np.ndarray | Tensor:
        pixels = read_tile(path)
        return pixels if self._random else self._timm_transform(Image.fromarray(pixels))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        item = self._cached[index] if self._cached else self._prepare(self.paths[index])
        if self._random:
            if seed is not None:
                seed_generators(seed)
            item = self._timm_transform(Image.fromarray(item))
        return item, self.labels[index]

    def digests(self) -> list[str]:
        """SHA-256 of each file."""
        return [file_sha256(path) for path in self.paths]
