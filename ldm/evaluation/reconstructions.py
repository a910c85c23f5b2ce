"""What an autoencoder loses of tiles: the tiles beside their reconstructions, as two sets.

Letters: N tiles, B batch, D features.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.tile_files import TileFiles
from ldm.data.tiles import to_uint8
from ldm.features.diffusion import centre
from ldm.features.extractor import FEATURES, Extractor
from ldm.features.sets import FeatureSet
from ldm.files import digest_of
from ldm.modules.autoencoder import psnr, weights_digest

PSNR = "psnr"  # dB, of each tile


def reconstruct_set(
    files: TileFiles, net: nn.Module, model: str, extractor: Extractor, **loading: int
) -> FeatureSet:
    """Features of the reconstructions of tiles, in the order of the tiles.

    Args:
        net: An autoencoder or another first stage, on the extractor's device.
        model: Name of `net`, for the record.
        loading: See `FeatureSet.compute`.
    """

    def forward(x: Tensor) -> dict[str, Tensor]:
        x_rec = net.decode(net.encode(x).mode())
        images = torch.stack([extractor.transform(tile) for tile in to_uint8(x_rec)])
        values = extractor.forward(images.to(extractor.device))
        pairs = zip(x, x_rec, strict=True)
        return {
            FEATURES: values[FEATURES],
            PSNR: torch.stack([psnr(a[None], b[None]) for a, b in pairs]),
        }

    through = replace(extractor, transform=centre(net.resolution), forward=forward)
    found = FeatureSet.compute(files, through, raw=True, **loading)
    facts = {
        "root": f"{files.root} by {model}",
        "part": "reconstructions",
        "sha256": digest_of([files.listing, weights_digest([net])]),
        "pixels": {f"{net.resolution}x{net.resolution}": len(files.paths)},
    }
    return replace(found, facts={**found.facts, **facts})


def reconstruction_error(real: FeatureSet, found: FeatureSet) -> dict[str, Any]:
    """Means over tiles: PSNR in dB, and 1 - cosine of the features of tile and reconstruction.

    Args:
        real: Features (N, D) of the tiles themselves.
        found: Of `reconstruct_set` of the same tiles, by the same network.
    """
    cosine = F.cosine_similarity(real.values.double(), found.values.double(), dim=1)
    return {"psnr": float(found.others[PSNR].mean()), "feature_distance": float(1 - cosine.mean())}
