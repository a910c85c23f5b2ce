"""The autoencoder's loss: pixels, perception, KL, PatchGAN (Rombach et al. 2022, appendix G)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.discriminator import NLayerDiscriminator


def build_lpips(backbone: Mapping[str, Tensor]) -> nn.Module:
    """LPIPS with the VGG-16 backbone (Zhang et al. 2018), frozen, for images in [-1, 1].

    The network and the trained linear heads are torchmetrics'.

    Args:
        backbone: State dictionary of torchvision's VGG-16.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    lpips = _LPIPS(net="vgg", pnet_rand=True)
    # torchmetrics splits VGG into slices but keeps the numbers: features.5.bias, slice2.5.bias.
    state = {}
    for name in lpips.net.state_dict():
        source = "features." + name.split(".", 1)[1]
        if source not in backbone:
            raise UserError(
                f"the LPIPS backbone lacks the weight {source}; give the file of torchvision's "
                "vgg16 state dictionary"
            )
        state[name] = backbone[source]
    lpips.net.load_state_dict(state, strict=True)
    return lpips.eval().requires_grad_(False)


class FeatureDistance(nn.Module):
    """Distance of images in the feature maps of a frozen network.

    It is LPIPS without trained heads (Zhang et al. 2018, equation 1 with w = 1), as a mean over
    the maps: channels are scaled to length 1 at each position, and their squared differences are
    summed over channels and averaged over positions. Its range is [0, 4].

    Args:
        network: Frozen; has `feature_maps`, images (B, 3, H, W) in [-1, 1] -> maps (B, C, h, w).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, x_rec: Tensor) -> Tensor:
        pairs = zip(*(self.network.feature_maps(images) for images in (x, x_rec)), strict=True)
        squares = [(F.normalize(a) - F.normalize(b)).square().sum(dim=1) for a, b in pairs]
        distances = [square.mean(dim=(1, 2)) for square in squares]  # (B,) each
        return torch.stack(distances).mean(dim=0)[:, None, None, None]


class PerceptualLoss:
    """Perceptual distance by a frozen network, which follows the images' device.

    It is no nn.Module: the weights come from a library, so they belong neither in checkpoints nor
    in the parameters of the optimiser or DDP.

    Args:
        network: `build_lpips` or `FeatureDistance`.
    """

    def __init__(self, network: nn.Module):
        self._net = network

    def __call__(self, x: Tensor, x_rec: Tensor) -> Tensor:
        """Distance of each pair of images (B, 3, H, W) in [-1, 1]: (B, 1, 1, 1)."""
        self._net.to(x.device)
        return self._net(x.contiguous(), x_rec.contiguous())


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


class LPIPSWithDiscriminator(nn.Module):
    """Reconstruction, KL and adversarial loss with an adaptive adversarial weight.

    The reconstruction term is a Laplace negative log-likelihood summed over each image's pixels,
    (|x - x_rec| + perceptual_weight * distance) / exp(logvar) + logvar. The adversarial term is
    weighted so that its gradient at the decoder's last layer is as long as that of the
    reconstruction (Esser et al. 2021, eq. 7).

    Args:
        disc_start: Generator step (optimiser step) from which the discriminator is used.
        logvar_init: Log-variance of the reconstruction term.
        pixelloss_weight: Weight of |x - x_rec|.
        kl_weight: Weight of KL(q || N(0, 1)), summed over each image.
        disc_weight: Weight of the adversarial term; 0 trains without a discriminator.
        disc_ramp: Steps over which the adversarial term grows from 0 after `disc_start`; 0
            switches it on at once, as published.
        disc_adaptive_max: Upper clamp of the adaptive weight.
        disc_num_layers: Convolutions of the discriminator that halve the side.
        disc_in_channels: Channels of a tile.
        disc_loss: Adversarial loss of the discriminator.
        disc_factor: Further factor of both adversarial losses.
        perceptual_weight: Weight of the perceptual distance; 0 needs no network.
        perceptual_network: "lpips", or timm's name of a network whose feature maps are compared.
            The code that builds this loss opens it and passes the distance as `perceptual`.
        perceptual_weights: File of the network's weights; None for those of LPIPS's VGG-16 in
            torchvision's cache.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_loss: Literal["hinge", "vanilla"] = "hinge",
        disc_ramp: int = 0,
        disc_adaptive_max: float = 1e4,
        perceptual_network: str = "lpips",
        perceptual_weights: str | None = None,
    ):
        super().__init__()
        self.disc_start = disc_start
        self.disc_ramp = disc_ramp
        self.kl_weight = kl_weight
        self.pixelloss_weight = pixelloss_weight
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.disc_adaptive_max = disc_adaptive_max
        self.perceptual_weight = perceptual_weight
        self.d_loss = D_LOSSES[disc_loss]
        self.register_buffer("logvar", torch.tensor(float(logvar_init)))
        self.perceptual_network, self.perceptual_weights = perceptual_network, perceptual_weights
        self.perceptual: PerceptualLoss | None = None  # needed if `perceptual_weight` is above 0
        self.discriminator = None
        if disc_weight > 0 and disc_factor > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, n_layers=disc_num_layers)

    def disc_scale(self, step: int) -> float:
        """Factor of the adversarial losses: 0 before generator step `disc_start`, then ramped."""
        if self.discriminator is None or step < self.disc_start:
            return 0.0
        ramp = (
            1.0 if self.disc_ramp == 0 else min(1.0, (step - self.disc_start + 1) / self.disc_ramp)
        )
        return self.disc_factor * ramp

    def adaptive_weight(self, nll: Tensor, g_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return self.disc_weight * ratio.clamp(0.0, self.disc_adaptive_max).detach()

    def generator_loss(
        self,
        x: Tensor,
        x_rec: Tensor,
        posterior: DiagonalGaussian,
        step: int,
        last_layer: nn.Parameter | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the autoencoder and its parts.

        Args:
            x, x_rec: Images and reconstructions, (B, 3, H, W) in [-1, 1].
            step: Generator steps done so far.
            last_layer: The decoder's last weight. If omitted (validation), there is no adversarial
                term.
        """
        l1 = (x - x_rec).abs()
        distance = self.pixelloss_weight * l1
        log = {"rec_loss": l1.detach().mean()}
        if self.perceptual_weight > 0:
            assert self.perceptual is not None, "set `perceptual` before training with it"
            p_loss = self.perceptual(x, x_rec)
            distance = distance + self.perceptual_weight * p_loss
            log["p_loss"] = p_loss.detach().mean()
        nll = (distance / self.logvar.exp() + self.logvar).sum() / len(x)
        kl = posterior.kl().mean()
        loss = nll + self.kl_weight * kl
        log |= {"nll_loss": nll.detach(), "kl_loss": kl.detach()}
        scale = self.disc_scale(step)
        if scale > 0 and last_layer is not None:
            g_loss = -self.discriminator(x_rec).mean()
            d_weight = self.adaptive_weight(nll, g_loss, last_layer)
            loss = loss + d_weight * scale * g_loss
            log |= {"g_loss": g_loss.detach(), "d_weight": d_weight}
        return loss, {"total_loss": loss.detach(), **log}

    def discriminator_loss(
        self, x: Tensor, x_rec: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminator on images and reconstructions, and its mean logits."""
        logits_real = self.discriminator(x.detach())
        logits_fake = self.discriminator(x_rec.detach())
        loss = self.disc_scale(step) * self.d_loss(logits_real, logits_fake)
        log = {
            "disc_loss": loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        return loss, log
