"""A classifier that reads a frozen diffusion UNet, to guide its sampling.

Letters: B batch, C channels, H W latent size, D features, K classes, N tiles.

What the UNet learned without labels is in its middle and up-blocks; a hidden layer on top of them
needs few labels. Features of some draws of (augmentation, t, noise) of each tile are made once, so
training takes seconds. Guidance shares the UNet's pass with the noise prediction.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, StackDataset

from ldm.data.datamodule import ResumableSampler
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.models.classifier import QUARTERS, GuidingClassifier, tile_names
from ldm.models.diffusion import LatentDiffusion, scale_record
from ldm.modules.autoencoder import weights_digest
from ldm.modules.readout import Readout
from ldm.progress import Bar

log = logging.getLogger(__name__)

FEATURE_PASSES = 8000  # passes of the UNet over training tiles, unless the draws are given
LEAST_DRAWS = 8


class ReadoutPass(nn.Module):
    """One pass of a UNet that gives the noise and the logits of a readout.

    Args:
        diffusion: Its averaged network is read.
        blocks: See `ldm.modules.unet.UNetModel.with_features`.
        head: The readout.
    """

    def __init__(self, diffusion: LatentDiffusion, blocks: Sequence[int], head: Readout):
        super().__init__()
        self.net, self.prediction = diffusion.network(), diffusion.prediction
        self.blocks, self.head = list(blocks), head

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noise (B, C, H, W) and logits (B, K) of z_t at t (B,)."""
        output, features = self.net.with_features(z_t, t, self.blocks)
        return self.prediction.eps(z_t, t, output), self.head(features, t)


class ReadoutClassifier(GuidingClassifier):
    """p(y | z_t, t) from the features of a frozen diffusion UNet.

    The UNet is not part of the checkpoint: the digest of its averaged weights is, and `attach`
    refuses another one.

    Args:
        head: Arguments of `ldm.modules.readout.Readout`.
        blocks: See `ldm.modules.unet.UNetModel.with_features`.
        diffusion_digest: SHA-256 of the weights of the UNet that is read.
        latent_shape: (C, H, W).
        label_smoothing: Of the training loss.
        Others as `ldm.models.classifier.GuidingClassifier`.
    """

    def __init__(
        self,
        head: dict,
        blocks: list[int],
        diffusion_digest: str,
        latent_shape: list[int],
        autoencoder_fingerprint: str,
        scale_factor: float | list[float],
        process: dict,
        label_smoothing: float = 0.05,
        weight_decay: float = 0.05,
        anneal_steps: int | None = None,
    ):
        super().__init__(autoencoder_fingerprint, scale_factor, process, weight_decay, anneal_steps)
        self.head_settings, self.blocks = dict(head), list(blocks)
        self.diffusion_digest = diffusion_digest
        self.latent_shape = tuple(latent_shape)
        self.label_smoothing = label_smoothing
        self.net = Readout(**head)
        self.outputs = head["classes"]
        object.__setattr__(self, "_both", None)  # its UNet stays out of the checkpoint

    @classmethod
    def of(
        cls,
        diffusion: LatentDiffusion,
        classes: Sequence[str],
        blocks: Sequence[int] | None = None,
        width: int = 256,
        dropout: float = 0.3,
        **params: Any,
    ) -> "ReadoutClassifier":
        """Build an untrained readout for a diffusion model and attach it to the model.

        Args:
            blocks: None for the middle and all up-blocks.
            params: Further ones of the class.

        Raises:
            UserError: The model takes labels, or has no such block.
        """
        if diffusion.conditional:
            raise UserError(
                "`readout`: the diffusion model takes labels already; give the unlabelled one that "
                "it started from"
            )
        widths = diffusion.network().feature_widths
        blocks = list(range(len(widths))) if blocks is None else sorted(set(blocks))
        if not blocks or min(blocks) < 0 or max(blocks) >= len(widths):
            raise UserError(
                f"`readout_blocks` {','.join(map(str, blocks))}: the UNet has the middle, 0, and "
                f"up-blocks 1 to {len(widths) - 1}"
            )
        features = sum(2 * widths[b] for b in blocks)
        head = {"features": features, "classes": len(classes), "width": width, "dropout": dropout}
        model = cls(
            head=head,
            blocks=blocks,
            diffusion_digest=weights_digest([diffusion.network()]),
            latent_shape=list(diffusion.latent_shape),
            autoencoder_fingerprint=diffusion.autoencoder_fingerprint,
            scale_factor=scale_record(diffusion.scale_factor),
            process=diffusion.schedule.settings,
            **params,
        )
        model.classes = list(classes)
        model.attach(diffusion, "`readout`")
        return model

    def attach(self, diffusion: LatentDiffusion, where: str) -> None:
        """Read the averaged network of this model from now on.

        Raises:
            UserError: It is not the one that the readout was trained on.
        """
        if weights_digest([diffusion.network()]) != self.diffusion_digest:
            raise UserError(
                f"{where} reads the features of another diffusion model than the one given; a "
                "readout goes with one checkpoint: give that one, or train another readout"
            )
        object.__setattr__(self, "_both", ReadoutPass(diffusion, self.blocks, self.net))

    def shared_model(self) -> ReadoutPass:
        assert self._both is not None, "attach a diffusion model first"
        return self._both

    def logits_model(self) -> Callable[[Tensor, Tensor], Tensor]:
        both = self.shared_model()
        return lambda z_t, t: both(z_t, t)[1]

    def rebuild_config(self) -> dict[str, Any]:
        params = {
            "head": self.head_settings,
            "blocks": self.blocks,
            "diffusion_digest": self.diffusion_digest,
            "latent_shape": list(self.latent_shape),
            "autoencoder_fingerprint": self.autoencoder_fingerprint,
            "scale_factor": scale_record(self.scale_factor),
            "process": self.schedule.settings,
        }
        return {"target": "ldm.models.readout.ReadoutClassifier", "params": params}

    def check_data(self, data: pl.LightningDataModule) -> None:
        """Features are made from images or cached latents before training starts."""

    # Training, on features

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer, y = self.optimizers(), batch["label"]
        logits = self.net(batch["features"], batch["t"]).float()  # (B, K)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.check_finite(loss, batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.anneal_steps is not None:
            self.lr_schedulers().step()
        accuracy = (logits.argmax(dim=1) == y).float().mean()
        bar = {"train/loss": loss.detach(), "train/accuracy": accuracy}
        self.log_dict(bar, prog_bar=True, batch_size=len(y))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        features, t = batch["features"], batch["t"]  # (B, 1 + QUARTERS, D), (B, 1 + QUARTERS)
        clean, *noisy = (
            self.net(features[:, i], t[:, i]).float() for i in range(features.shape[1])
        )
        self.log_validation(clean, noisy, batch["label"])


@dataclass
class FeatureMaker:
    """Makes the sets that a readout is trained and validated on.

    Their items have the features and the time(s) `t` of a tile, its `label` and its `path`.
    """

    model: ReadoutClassifier  # attached to its diffusion model
    diffusion: LatentDiffusion  # gives the latents
    devices: Devices  # where and how the UNet is computed
    batch_size: int = 64  # tiles per pass

    def __post_init__(self):
        self.device = self.devices.device
        self.diffusion.to(self.device)

    def _features(self, z_t: Tensor, t: Tensor) -> Tensor:
        net = self.diffusion.network()
        with self.devices.autocast(self.device):
            return net.with_features(z_t, t, self.model.blocks)[1].float().cpu()

    def _batches(self, tiles: Dataset, seeds: np.ndarray | None = None):
        """Batches of images or cached moments, with their paths."""
        for start in range(0, len(tiles), self.batch_size):
            chosen = range(start, min(start + self.batch_size, len(tiles)))
            items = [tiles[i] if seeds is None else tiles[i, int(seeds[i])] for i in chosen]
            name = "moments" if "moments" in items[0] else "image"
            batch = {name: torch.stack([item[name] for item in items]).to(self.device)}
            yield batch, [str(item["path"]) for item in items]

    @torch.no_grad()
    def training(self, tiles: Dataset, draws: int, seed: int) -> StackDataset:
        """`draws` augmentations, times and noises of each tile, functions of the seed.

        Times are uniform over the process.
        """
        process, parts, times = self.diffusion.schedule, [], []
        options = {"desc": "draws", "unit": "img", "step": self.batch_size}
        with Bar(total=draws * len(tiles), **options) as bar:
            for draw in range(draws):
                seeds = np.random.default_rng((seed, draw)).integers(2**62, size=len(tiles))
                generator = torch.Generator().manual_seed(int(seeds[0]))
                for batch, _ in self._batches(tiles, seeds):
                    z_0 = self.diffusion.latents(batch, generator)
                    drawn = process.uniform_times(
                        lambda fn, size, g=generator: fn(size, generator=g), len(z_0)
                    )
                    t = drawn.to(self.device)
                    eps = torch.randn(z_0.shape, generator=generator).to(self.device)
                    parts.append(self._features(process.q_sample(z_0, t, eps), t))
                    times.append(t.cpu())
                    bar.update(len(z_0))
        return _stacked(parts, times, list(tiles.labels) * draws, list(tiles.paths) * draws)

    @torch.no_grad()
    def validation(self, tiles: Dataset) -> StackDataset:
        """Each tile without noise at t = 0, and noised at one t in each quarter of the process."""
        process, parts, times = self.diffusion.schedule, [], []
        batches = Bar(self._batches(tiles), "validation", -(-len(tiles) // self.batch_size))
        for batch, paths in batches:
            z_0 = self.diffusion.latents(batch, sample=False)
            zero = torch.zeros(len(paths), dtype=torch.int64, device=self.device)
            points = [(z_0, zero)]
            for quarter in range(QUARTERS):
                t, eps = self.model.validation_point(tile_names(paths), quarter, z_0)
                points.append((process.q_sample(z_0, t, eps), t))
            parts.append(torch.stack([self._features(*point) for point in points], dim=1))
            times.append(torch.stack([t for _, t in points], dim=1).cpu())
        return _stacked(parts, times, list(tiles.labels), tiles.paths)


def _stacked(
    features: list[Tensor], t: list[Tensor], labels: list[int], paths: Sequence
) -> StackDataset:
    both = {"features": torch.cat(features), "t": torch.cat(t).float()}
    return StackDataset(**both, label=labels, path=list(map(str, paths)))


class FeatureData(pl.LightningDataModule):
    """The features of training and validation tiles, see `FeatureMaker`."""

    def __init__(self, train: StackDataset, validation: StackDataset, batch_size: int, seed: int):
        super().__init__()
        self.train_dataset, self.val_dataset = train, validation
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        tiles, size, pinned = self.train_dataset, self.batch_size, torch.cuda.is_available()
        order = ResumableSampler(tiles, size, self.seed, position=lambda: progress.total.ready)
        return DataLoader(tiles, batch_size=size, sampler=order, pin_memory=pinned)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_dataset, batch_size=1024)


def choose_draws(tiles: int) -> int:
    """Draws per tile where none are given: few tiles need more, each is seen in more ways."""
    return max(LEAST_DRAWS, FEATURE_PASSES // tiles)
