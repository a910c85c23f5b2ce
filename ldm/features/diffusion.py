"""Features of a diffusion model: what its UNet says of a tile at some noise levels.

Letters: B batch, C channels, H W latent size, D features.

A diffusion model that saw many unlabelled tiles keeps what it learned in the middle and the
up-blocks of its UNet (Xiang et al. 2023). A tile is noised a little, passed through the UNet, and
described by mean and deviation over space of these blocks' channels.

A classifier that guides sampling can be asked for the class of a tile without noise, too.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import checkpoint_path, load_model
from ldm.data.tiles import resize_tile, to_tensor
from ldm.errors import UserError
from ldm.features.extractor import FEATURES, LOGITS, Extractor
from ldm.features.source import FeatureSource
from ldm.files import digest_of, file_sha256
from ldm.models.classifier import check_latents
from ldm.models.diffusion import LatentDiffusion
from ldm.modules.autoencoder import weights_digest

NOISES = 4  # draws that features are averaged over, the same for every tile
SEED = 0


def parse_argument(text: str) -> tuple[str, list[int], list[int] | None]:
    """Run, time steps and blocks (None for all) of `RUN@20`, `RUN@20,60` or `RUN@20/0,3`."""
    match = re.fullmatch(r"(.+)@(\d+(?:,\d+)*)(?:/(\d+(?:,\d+)*))?", text)
    if match is None:
        raise UserError(
            f"features diffusion:{text}: give diffusion:RUN@T or RUN@T,T, with time steps of the "
            "model and, after a slash, the blocks (0 the middle, 1, 2, ... the up-blocks)"
        )
    times, blocks = (part and list(map(int, part.split(","))) for part in match.groups()[1:])
    return match[1], times, blocks


def open_diffusion(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load a diffusion model whose averaged UNet makes features."""
    run, times, blocks = parse_argument(source.argument)
    model = load_model(run, "diffusion", device, what="features")
    T, widths = model.schedule.T, model.network().feature_widths
    if max(times) >= T:
        raise UserError(f"features {source}: time steps must be in [0, {T})")
    blocks = list(range(len(widths))) if blocks is None else sorted(set(blocks))
    if blocks[-1] >= len(widths):
        raise UserError(f"features {source}: blocks are 0 (the middle) to {len(widths) - 1}")
    path = checkpoint_path(run, "features")
    pixels = model.first_stage_model.resolution
    facts = {
        "network": weights_digest([model.network()]),
        "latents": model.autoencoder_fingerprint,
        "scale": model.scale_factor.flatten().tolist(),
        "process": model.schedule.settings,
        "times": times,
        "blocks": blocks,
        "noises": NOISES,
        "seed": SEED,
        "pixels": pixels,
    }

    return Extractor(
        name=f"UNet of {run} at t = {', '.join(map(str, times))}",
        network=f"diffusion UNet at t = {times}, blocks {blocks}",
        identity=digest_of(facts),
        transform=centre(pixels),
        forward=lambda images: {FEATURES: features_of(model, images, times, blocks)},
        device=torch.device(device),
        preprocessing=f"shorter side to {pixels}, centre; mean over {NOISES} noises",
        weights=Path(path),
        weights_sha256=file_sha256(path),
    )


def open_guide(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load a guiding classifier, whose logits at t = 0 are its features, too."""
    classifier, at, run = source.argument.rpartition("@")
    if not at or not run or not classifier:
        raise UserError(f"features {source}: give guide:CLASSIFIER@RUN, RUN a diffusion model")
    model = load_model(run, "diffusion", device, what="features")
    guide = load_model(classifier, "classifier", device, what="features")
    check_latents(model, run, guide, f"features {source}", "give the model that it guides")
    guide.attach(model, f"features {source}")
    path = checkpoint_path(classifier, "features")
    pixels, net = model.first_stage_model.resolution, guide.logits_model()

    @torch.no_grad()
    def forward(images: Tensor) -> dict[str, Tensor]:
        z_0 = model.latents({"image": images}, sample=False)
        logits = net(z_0, model.schedule.times(0, len(z_0), z_0.device)).float() / guide.temperature
        return {FEATURES: logits, LOGITS: logits}

    sha256 = file_sha256(path)
    facts = {"guide": sha256, "latents": model.autoencoder_fingerprint, "pixels": pixels}
    return Extractor(
        name=f"guide {classifier}",
        network="guiding classifier at t = 0",
        identity=digest_of(facts),
        transform=centre(pixels),
        forward=forward,
        device=torch.device(device),
        preprocessing=f"shorter side to {pixels}, centre",
        weights=Path(path),
        weights_sha256=sha256,
        classes=list(guide.classes),
    )


def centre(pixels: int) -> Callable[[np.ndarray], Tensor]:
    """What shows the centre of a tile to an autoencoder of so many pixels."""

    def transform(tile: np.ndarray) -> Tensor:
        tile = resize_tile(tile, pixels)  # the shorter side
        top, left = ((side - pixels) // 2 for side in tile.shape[:2])
        return to_tensor(tile[top : top + pixels, left : left + pixels])

    return transform


@torch.no_grad()
def features_of(model: LatentDiffusion, x: Tensor, times: list[int], blocks: list[int]) -> Tensor:
    """Features (B, D) of images (B, 3, H, W) in [-1, 1]: of each time, the mean over noises."""
    z_0 = model.latents({"image": x}, sample=False)
    generator = torch.Generator().manual_seed(SEED)
    # The same noises for every image, so that a feature does not depend on its batch.
    noises = torch.randn((NOISES, *z_0.shape[1:]), generator=generator).to(z_0.device)
    net, found = model.network(), []
    for time in times:
        t = model.schedule.times(time, len(z_0), z_0.device)
        draws = [
            net.with_features(model.schedule.q_sample(z_0, t, eps.expand_as(z_0)), t, blocks)[1]
            for eps in noises
        ]
        found.append(torch.stack(draws).mean(dim=0))
    return torch.cat(found, dim=1)
