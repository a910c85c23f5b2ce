"""Fine-tuning the decoder with an auxiliary classifier (stage 2b of the method)."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint import load_model, require_given
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.models.perceptual import open_perceptual
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.autoencoder import psnr


class DecoderFinetune(HistoModule):
    """Tunes the decoder so that class evidence survives decoding.

    labelled image -> frozen encoder -> z -> decoder -> reconstruction -> auxiliary classifier ->
    label (Ye et al. 2023, architecture figure). The decoder's loss is the classifier's cross
    entropy plus the reconstruction error; the encoder stays frozen, since the diffusion model
    lives in its latent space. What it leaves behind is an autoencoder checkpoint with the
    fingerprint of the one it started from.

    Args:
        autoencoder_ckpt: The pre-trained autoencoder (or an earlier decoder fine-tuning).
        aux_arch: Any timm architecture, trained from scratch.
        aux_weight: Weight of the cross entropy in the decoder's loss.
        aux_start: Step from which the cross entropy reaches the decoder; before it, only the
            classifier learns, so that the decoder is not tuned by a classifier that knows nothing.
        rec_weight: Weight of the mean absolute reconstruction error.
        perceptual_weight, perceptual_network, perceptual_weights: See
            `ldm.modules.losses.LPIPSWithDiscriminator`.
        weight_decay: AdamW's, of the auxiliary classifier only.
        monitor: Validation metric that chooses the best checkpoint.

    Raises:
        UserError: A missing checkpoint, an unknown architecture, or data without labels.
    """

    kind = "autoencoder"
    training_only = ("aux_classifier.",)

    def __init__(
        self,
        autoencoder_ckpt: str | None,
        aux_arch: str = "resnet18",
        aux_weight: float = 1.0,
        aux_start: int = 0,
        rec_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_network: str = "lpips",
        perceptual_weights: str | None = None,
        weight_decay: float = 0.05,
        monitor: str | None = None,
    ):
        super().__init__()
        key = "model.params.autoencoder_ckpt"
        require_given(autoencoder_ckpt, key, "HISTO_AUTOENCODER")
        source = load_model(autoencoder_ckpt, "autoencoder", what=key)
        if not isinstance(source.net, AutoencoderNet):
            raise UserError(
                f"{key}: {autoencoder_ckpt} holds a "
                f"{type(source.net).__name__}, whose decoder cannot be tuned; give an autoencoder"
            )
        self.source_config = source.rebuild_config()
        self.net: AutoencoderNet = source.net
        self.tile_size = self.net.resolution
        self.net.decoder.requires_grad_(True)
        self.net.post_quant_conv.requires_grad_(True)
        self.aux_arch = aux_arch
        self.aux_weight, self.aux_start, self.rec_weight = aux_weight, aux_start, rec_weight
        self.perceptual_weight, self.perceptual = perceptual_weight, None
        if perceptual_weight > 0:
            self.perceptual = open_perceptual(
                perceptual_network, perceptual_weights, self.tile_size
            )
        self.weight_decay, self.monitor = weight_decay, monitor
        self.aux_classifier = None  # built when the data says how many classes there are

    def rebuild_config(self) -> dict[str, Any]:
        return self.source_config

    def metrics(self) -> set[str]:
        names = {"aux_loss", "aux_accuracy", "rec_loss", "total_loss", "psnr"}
        names |= {"p_loss"} if self.perceptual else set()
        return {f"val/{name}" for name in names}

    def use_classes(self, classes: list[str]) -> None:
        """Make the auxiliary classifier for these classes."""
        self.require_labels(classes, "decoder fine-tuning")
        try:
            self.aux_classifier = timm.create_model(
                self.aux_arch, pretrained=False, num_classes=len(classes)
            )
        except RuntimeError as error:
            raise UserError(
                f"model.params.aux_arch={self.aux_arch!r} is not a timm architecture ({error})"
            ) from None

    def networks(self) -> list[torch.nn.Module]:
        return [self.net.encoder, self.net.decoder, self.aux_classifier]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decoder = [*self.net.decoder.parameters(), *self.net.post_quant_conv.parameters()]
        groups = [
            {"params": decoder, "weight_decay": 0.0},
            {"params": list(self.aux_classifier.parameters()), "weight_decay": self.weight_decay},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=self.fused or None)

    def train(self, mode: bool = True) -> "DecoderFinetune":
        super().train(mode)
        self.net.encoder.eval()
        return self

    def _losses(self, batch: dict[str, Any], sample: bool) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch["image"], batch["label"]
        with torch.no_grad():
            posterior = self.net.encode(x)
            z = posterior.sample() if sample else posterior.mode()
        x_rec = self.net.decode(z)
        reaches_decoder = self.global_step >= self.aux_start
        logits = self.aux_classifier(x_rec if reaches_decoder else x_rec.detach())  # (B, K)
        aux_loss = F.cross_entropy(logits, y)
        rec_loss = (x - x_rec).abs().mean()
        total = self.aux_weight * aux_loss + self.rec_weight * rec_loss
        log = {"aux_loss": aux_loss.detach(), "rec_loss": rec_loss.detach()}
        log["psnr"] = psnr(x, x_rec.detach())
        if self.perceptual is not None:
            p_loss = self.perceptual(x, x_rec).mean()
            total = total + self.perceptual_weight * p_loss
            log["p_loss"] = p_loss.detach()
        log["aux_accuracy"] = (logits.argmax(dim=1) == y).float().mean()
        return total, {"total_loss": total.detach(), **log}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, log = self._losses(batch, sample=True)
        self.check_finite(loss, batch, batch_idx)
        self.log_losses("train", log, len(batch["label"]), bar=("rec_loss", "aux_accuracy"))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        _, log = self._losses(batch, sample=False)
        self.log_losses("val", log, len(batch["label"]), bar=("rec_loss", "aux_accuracy"))

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs and reconstructions, (count, 3, H, W) each."""
        x = batch["image"][:count]
        return {"inputs": x, "reconstructions": self.net(x, sample=False)[0]}
