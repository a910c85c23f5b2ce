"""The network of a perceptual loss, with its weights from this machine."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors
from ldm.errors import UserError
from ldm.models.vit import pretrained_network
from ldm.modules.losses import FeatureDistance, PerceptualLoss, build_lpips

LPIPS = "lpips"


def open_perceptual(network: str, weights: str | None, resolution: int) -> PerceptualLoss:
    """Load the network of a perceptual loss; nothing is downloaded.

    Args:
        network: "lpips", or timm's name of a network.
        weights: File of the network's weights; None finds those of LPIPS in torchvision's cache.
        resolution: Side of a tile in pixels.

    Raises:
        UserError: An unknown network, or weights that are missing or of another network.
    """
    if network == LPIPS:
        return PerceptualLoss(build_lpips(read_backbone(weights)))
    if weights is None:
        raise UserError(
            f"perceptual_network={network!r} needs perceptual_weights=FILE, a local file of its "
            "weights, or lpips"
        )
    settings = f"perceptual_network={network!r}", "perceptual_weights"
    return PerceptualLoss(
        FeatureDistance(pretrained_network(network, resolution, weights, *settings))
    )


def read_backbone(path: str | None) -> dict[str, Tensor]:
    """State dictionary of torchvision's VGG-16: of a file, or from torchvision's download cache."""
    from torchvision.models import VGG16_Weights

    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    found = Path(path).expanduser() if path else cached
    if not found.is_file():
        raise UserError(
            f"perceptual_weight is above 0, but the LPIPS backbone weights are not at {found}; "
            "where there is internet, run python scripts/fetch_weights.py lpips (TORCH_HOME says "
            "where to), or set lossconfig.params.perceptual_weights=FILE, or train without a "
            "perceptual loss with lossconfig.params.perceptual_weight=0"
        )
    return load_tensors(found, "LPIPS backbone (torchvision's vgg16)")
