"""Training of the KL autoencoder (stage 1 of the method)."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.models.perceptual import open_perceptual
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.autoencoder import psnr


class AutoencoderKL(HistoModule):
    """Trains `ldm.modules.autoencoder.AutoencoderKL` with a perceptual, a KL and a PatchGAN loss.

    Two Adam optimisers under manual optimisation; `global_step` counts the generator's steps only,
    so that `max_steps`, `disc_start` and checkpoint names mean the same with and without the
    discriminator.

    Args:
        ddconfig, embed_dim: Architecture, see `ldm.modules.autoencoder.AutoencoderKL`.
        lossconfig: target/params of the loss; without it the module only encodes and decodes.
        ckpt_path: Autoencoder checkpoint to start from.
        monitor: Validation metric that chooses the best checkpoint.
        betas: Decay rates of Adam's two moments, for both optimisers.
        accumulate_grad_batches: Batches per optimiser step.
    """

    kind = "autoencoder"
    training_only = ("loss.",)
    # As for a Lightning trainer, of each optimiser's own gradient; set by the command.
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None

    def __init__(
        self,
        ddconfig: dict,
        embed_dim: int,
        lossconfig: dict | None = None,
        ckpt_path: str | None = None,
        monitor: str | None = None,
        betas: tuple[float, float] = (0.5, 0.9),
        accumulate_grad_batches: int = 1,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.ddconfig, self.embed_dim = ddconfig, embed_dim
        self.monitor = monitor
        self.betas = tuple(betas)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.net = AutoencoderNet(ddconfig, embed_dim)
        self.tile_size = self.net.resolution
        self.loss = instantiate_from_config(lossconfig) if lossconfig else None
        if getattr(self.loss, "perceptual_weight", 0) > 0:
            self.loss.perceptual = open_perceptual(
                self.loss.perceptual_network, self.loss.perceptual_weights, self.tile_size
            )
        if ckpt_path:
            self.start_from(ckpt_path)

    def rebuild_config(self) -> dict[str, Any]:
        params = {"ddconfig": self.ddconfig, "embed_dim": self.embed_dim}
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}

    def metrics(self) -> set[str]:
        names = {"val/rec_loss", "val/nll_loss", "val/kl_loss", "val/total_loss", "val/psnr"}
        return names | ({"val/p_loss"} if getattr(self.loss, "perceptual", None) else set())

    def networks(self) -> list[torch.nn.Module]:
        return [self.net.encoder, self.net.decoder]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        # Here gradients are unscaled; Lightning clips for automatic optimisation only.
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def check_data(self, data: pl.LightningDataModule) -> None:
        if self.loss is None:
            raise UserError(
                "model.params.lossconfig is missing: an autoencoder cannot train without a loss"
            )
        discriminator = self.loss.discriminator
        if discriminator is not None and self.tile_size < discriminator.smallest:
            raise UserError(
                "model.params.lossconfig.params.disc_num_layers: such a discriminator needs tiles "
                f"of {discriminator.smallest} pixels, these have {self.tile_size}; lower it, or set"
                " disc_weight=0"
            )
        super().check_data(data)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        options = {"lr": self.learning_rate, "betas": self.betas, "fused": self.fused or None}
        optimizers = [torch.optim.Adam(self.net.parameters(), **options)]
        if self.loss.discriminator is not None:
            discriminator = self.loss.discriminator.parameters()
            optimizers.append(torch.optim.Adam(discriminator, **options))
        return optimizers

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["image"]
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        # The step that this batch belongs to, also while gradients accumulate.
        step = self.global_step
        adversarial = self.loss.disc_scale(step) > 0
        full = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if self.loss.discriminator is not None:
            # The generator's backward pass runs through the discriminator but must not leave
            # gradients in it.
            self.loss.discriminator.requires_grad_(False)
        x_rec, posterior = self.net(x)
        loss, log = self.loss.generator_loss(x, x_rec, posterior, step, self.net.last_layer)
        self.check_finite(loss, batch, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if full:
            self._step(optimizers[0])
            log["grad_norm"] = self.gradient_norm
        if adversarial:
            self.loss.discriminator.requires_grad_(True)
            d_loss, d_log = self.loss.discriminator_loss(x, x_rec, step)
            self.check_finite(d_loss, batch, batch_idx)
            self.manual_backward(d_loss / self.accumulate_grad_batches)
            log |= d_log
            if full:
                # Lightning counts every optimiser's step as a global step, through these two hooks.
                optimizers[1]._on_before_step = optimizers[1]._on_after_step = lambda: None
                self._step(optimizers[1])
        self.log_losses("train", log, len(x), bar=("rec_loss",))

    @staticmethod
    def _step(optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["image"]
        x_rec, posterior = self.net(x, sample=False)  # the mean, so that the number has no noise
        _, log = self.loss.generator_loss(x, x_rec, posterior, self.global_step)
        log["psnr"] = psnr(x, x_rec)
        self.log_losses("val", log, len(x), bar=("rec_loss",))

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs, reconstructions and decoded standard normal latents, (count, 3, H, W) each."""
        x = batch["image"][:count]
        x_rec, posterior = self.net(x, sample=False)
        return {
            "inputs": x,
            "reconstructions": x_rec,
            "samples": self.net.decode(torch.randn_like(posterior.mean)),
        }
