"""A first stage that is fitted to the training tiles instead of trained."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.data.tiles import without_augmentation
from ldm.models.base import HistoModule
from ldm.modules.autoencoder import psnr
from ldm.modules.patch_pca import PatchPCA as PatchPCANet
from ldm.progress import FIRST_SIGN, Bar

log = logging.getLogger(__name__)

FIT_TILES = 4096  # tiles that the components are found on; more change the fourth digit


class PatchPCA(HistoModule):
    """Tiles as principal components of their patches, wherever an autoencoder is a first stage.

    A diffusion model whose `first_stage_config` names this class fits it when its own training
    starts. Trained by itself (for a cache of latents, or several models on the same latents), it is
    fitted before the first batch, and nothing else happens.

    Args: See `ldm.modules.patch_pca.PatchPCA`.
    """

    kind = "autoencoder"
    monitor = None

    def __init__(
        self, resolution: int, patch: int = 4, components: int = 12, exponent: float = 0.5
    ):
        super().__init__()
        self.automatic_optimization = False  # there is nothing to optimise
        sizes = {"resolution": resolution, "patch": patch, "components": components}
        self.params = {**sizes, "exponent": exponent}
        self.net = PatchPCANet(**self.params)
        self.tile_size = resolution

    def rebuild_config(self) -> dict[str, Any]:
        return {"target": "ldm.models.patch_pca.PatchPCA", "params": dict(self.params)}

    def metrics(self) -> set[str]:
        return {"val/psnr"}

    def on_fit_start(self) -> None:
        if not self.net.is_fitted:
            fit_first_stage(self.net, self.trainer)

    def configure_optimizers(self) -> None:
        warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Lightning asks for one; fitting is done in `on_fit_start`."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["image"]
        value = psnr(x, self.net(x)[0])
        self.log("val/psnr", value, prog_bar=True, batch_size=len(x), sync_dist=True)

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs and reconstructions, (count, 3, H, W) each."""
        x = batch["image"][:count]
        return {"inputs": x, "reconstructions": self.net(x)[0]}


def fit_first_stage(net: PatchPCANet, trainer: pl.Trainer, batch_size: int = 64) -> None:
    """Fit to the training tiles, without augmentation; every rank finds the same."""
    dataset, device = trainer.datamodule.train_dataset, trainer.strategy.root_device
    dataset = without_augmentation(dataset)
    chosen = torch.linspace(0, len(dataset) - 1, min(FIT_TILES, len(dataset))).long().unique()
    mine = chosen.tolist()[trainer.global_rank :: trainer.world_size]
    values = net.encoder.weight.shape[1]
    sums = torch.zeros(values + 1, values + 1, dtype=torch.float64)
    starts = range(0, len(mine), batch_size)
    for start in Bar(starts, "patch PCA", unit="batch", delay=FIRST_SIGN, leave=False):
        x = torch.stack([dataset[i]["image"] for i in mine[start : start + batch_size]])
        patches = net.patches(x).movedim(1, -1).reshape(-1, values).double()
        # A column of ones gives the sum and the count beside the products.
        patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], dim=1)
        sums += patches.T @ patches
    sums = trainer.strategy.reduce(sums.to(device), reduce_op="sum").cpu()
    # Every rank decomposes the same matrix; one of them decides, should their libraries differ.
    net.cpu().fit(float(sums[-1, -1]), sums[:-1, -1], sums[:-1, :-1])
    net.load_state_dict(trainer.strategy.broadcast(net.state_dict()))
    net.to(device)
    log.info("patch PCA fitted to %d tiles", len(chosen))
