"""Tiny real models, as checkpoints, for tests that need a whole pipeline."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.checkpoint import KEY, make_record, write_checkpoint
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.classifier import NoisyLatentClassifier, network_config
from ldm.models.diffusion import LatentDiffusion

PIXELS = 32
LATENT = (3, 16, 16)
CLASSES = ["ADI", "LYM", "TUM"]
COLOURS = {"ADI": (230, 220, 225), "LYM": (90, 40, 140), "TUM": (200, 90, 150)}
# Overrides of a run that draws pictures; sampling for them takes as long as ten steps of training.
PICTURES = [
    "lightning.callbacks.image_logger.target=ldm.models.callbacks.ImageLogger",
    "lightning.callbacks.image_logger.params.batch_frequency=3",
    "lightning.callbacks.image_logger.params.max_images=2",
]

SCHEDULE = {
    "target": "ldm.modules.lr_schedule.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [4],
        "cycle_lengths": [100],
        "f_start": [0.1],
        "f_max": [1.0],
        "f_min": [0.5],
    },
}

DDCONFIG = {
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 3,
    "resolution": PIXELS,
}
UNET = {
    "image_size": LATENT[1],
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of a usual size everywhere: fresh networks end in zeros and would predict nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))


def save(module, path: Path) -> Path:
    payload = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(payload)
    write_checkpoint(path, payload)
    return path


def autoencoder(seed: int = 0) -> AutoencoderKL:
    module = AutoencoderKL(ddconfig=DDCONFIG, embed_dim=3)
    randomise(module, seed)
    with torch.no_grad():
        module.net.quant_conv.bias[3:] -= 8  # a trained posterior is narrow
    return module


def diffusion(autoencoder_path: Path, scale_factor: float = 0.8, **params) -> LatentDiffusion:
    module = LatentDiffusion(
        unet_config={"target": "ldm.modules.unet.UNetModel", "params": UNET},
        first_stage_ckpt=str(autoencoder_path),
        image_size=LATENT[1],
        scale_factor=scale_factor,
        **params,
    )
    randomise(module.unet, 1)
    if module.ema is not None:
        randomise(module.ema.net, 2)
    return module


def classifier(
    model: LatentDiffusion, classes: list[str] | None = None, seed: int = 3, **params
) -> NoisyLatentClassifier:
    """A classifier for the latents of `model`; `params` replace what it takes from there."""
    first_stage = model.first_stage_model
    classes = CLASSES if classes is None else classes
    net = network_config(first_stage, len(classes), width=32, depth=1, channel_mult=(1, 1))
    params = {
        "net_config": net,
        "autoencoder_fingerprint": first_stage.fingerprint(),
        "scale_factor": float(model.scale_factor),
        **params,
    }
    module = NoisyLatentClassifier(**params)
    randomise(module.net, seed)
    module.classes = list(classes)
    return module


def models(folder: Path) -> Path:
    """autoencoder.ckpt, diffusion.ckpt and classifier.ckpt, which belong together, in `folder`."""
    model = diffusion(save(autoencoder(), folder / "autoencoder.ckpt"))
    save(model, folder / "diffusion.ckpt")
    save(classifier(model), folder / "classifier.ckpt")
    return folder


def tiles(root: Path, per_class: int, seed: int = 0, pixels: int = PIXELS) -> Path:
    """Class folders of noisy tiles, one colour and one size of check per class.

    Networks of 32 channels see the checks only: with 32 groups their group norm takes each
    channel's mean away, and the colour with it.
    """
    generator = np.random.default_rng(seed)
    for k, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir(parents=True)
        bands = (np.arange(pixels) // 2 ** (k + 1)) % 2
        checks = 40 * ((bands[:, None] ^ bands[None, :]) - 0.5)[..., None]
        for i in range(per_class):
            noise = generator.normal(0, 20, (pixels, pixels, 3))
            image = (np.array(colour) + checks + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / name / f"{seed}_{i}.png")
    return root


def vit_checkpoint(net) -> dict:
    """What eval.py stores of a TileClassifier."""
    record = make_record("vit", net.rebuild_config(), net.classes, 0)
    return {KEY: record, "state_dict": net.state_dict()}
