"""The file with the weights of LPIPS's backbone."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import load_tensors
from ldm.errors import UserError


def find_backbone(path: str | None) -> Path:
    """The given file, or the one in torchvision's download cache; nothing is ever downloaded."""
    from torchvision.models import VGG16_Weights

    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    found = Path(path).expanduser() if path else cached
    if not found.is_file():
        raise UserError(
            f"perceptual_weight is above 0, but the LPIPS backbone weights are not at {found}; "
            "where there is internet, run python scripts/fetch_weights.py lpips (TORCH_HOME says "
            "where to), or set lossconfig.params.perceptual_weights=FILE, or train without LPIPS "
            "with lossconfig.params.perceptual_weight=0"
        )
    return found


def read_backbone(path: str | None) -> dict[str, Tensor]:
    """State dictionary of torchvision's VGG-16; see `find_backbone`."""
    return load_tensors(find_backbone(path), "LPIPS backbone (torchvision's vgg16)")
