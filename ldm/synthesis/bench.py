"""How fast images are sampled: beside diffusers' pipeline, and what guidance costs.

diffusers is a development dependency; it is imported when a benchmark runs.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.classifier import NoisyLatentClassifier, network_config
from ldm.models.diffusion import LatentDiffusion
from ldm.run import git_revision, hardware, versions
from ldm.synthesis.models import Models
from ldm.synthesis.settings import Sampling, Speed
from ldm.synthesis.synthesiser import Synthesiser, accelerated

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Configurations of the autoencoder and the diffusion model, and options of the classifier.
SIZES = {
    "demo": (
        "demo/autoencoder.yaml",
        "demo/diffusion.yaml",
        {"width": 64, "depth": 1, "channel_mult": (1, 2, 2)},
    ),
    "paper": (
        "autoencoder/autoencoder_histo_kl_64x64x3.yaml",
        "latent-diffusion/histo-ldm-kl-8.yaml",
        {},
    ),
}
CLASSES = [f"class{label}" for label in range(9)]  # as many as the paper's labelled set has


def random_models(size: str, device: torch.device) -> Models:
    """Models of one of `SIZES` with fresh weights; time does not depend on what they say."""
    first, second, options = SIZES[size]
    autoencoder, diffusion = (
        OmegaConf.load(CONFIGS / name).model.params for name in (first, second)
    )
    ddconfig = OmegaConf.to_container(autoencoder.ddconfig, resolve=True)
    model = LatentDiffusion(
        unet_config=OmegaConf.to_container(diffusion.unet_config, resolve=True),
        first_stage_config={
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ddconfig": ddconfig, "embed_dim": autoencoder.embed_dim},
        },
        image_size=diffusion.image_size,
        scale_factor=1.0,
        use_ema=False,
    )
    first_stage = model.first_stage_model
    classifier = NoisyLatentClassifier(
        network_config(first_stage, len(CLASSES), **options), "fresh weights", 1.0
    )
    classifier.classes = CLASSES
    models = Models(model.eval().requires_grad_(False), classifier.eval().requires_grad_(False))
    return models.to(device)


class _Foreign(nn.Module):
    """What a diffusers pipeline asks of its networks, around one of ours."""

    def __init__(self, fn: Callable[..., Tensor], device: torch.device, **config: Any):
        super().__init__()
        self.fn, self.device, self.config = fn, device, SimpleNamespace(**config)

    def forward(self, z: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.fn(z, t.to(z.device).expand(len(z))))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.fn(z))


def diffusers_pipeline(models: Models, speed: Speed):
    """diffusers' LDMPipeline with its DDIMScheduler, around the networks of `models`.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        from diffusers import DDIMScheduler, LDMPipeline
    except ImportError:
        raise UserError(
            "this benchmark compares with diffusers, which is not installed; "
            "python -m pip install diffusers"
        ) from None
    model, schedule = models.diffusion, models.diffusion.schedule
    device = model.scale_factor.device
    channels, size, _ = model.latent_shape
    eps = accelerated(model.eps_model(), speed, device)
    unet = _Foreign(eps, device, in_channels=channels, sample_size=size)
    decode = accelerated(model.first_stage_model.decode, speed, device, network=False)
    decoder = _Foreign(decode, device, scaling_factor=float(model.scale_factor))
    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.T,
        trained_betas=schedule.betas.numpy(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = LDMPipeline(decoder, unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bench_sampling(
    models: Models, batch_size: int, steps: int, repeats: int, speed: Speed | None = None
) -> dict[str, Any]:
    """Images per second by DDIM at eta 0: ours, diffusers', and ours with classifier guidance.

    The three run in turn, `repeats` times after a warm-up, so that what else the machine does
    falls on all of them alike; ratios are between runs of the same turn.
    """
    speed = speed or Speed()
    device = models.diffusion.scale_factor.device
    plain = Models(models.diffusion)
    ours = Synthesiser(plain, Sampling("ddim", steps, 0.0, 0.0, 0), speed)
    pipeline = diffusers_pipeline(plain, speed)
    indices = range(batch_size)

    def run(synthesiser: Synthesiser, label: int) -> None:
        synthesiser.images(synthesiser.latents([label] * batch_size, indices))

    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: run(ours, -1),
        "diffusers": lambda: pipeline(batch_size, num_inference_steps=steps, output_type="np"),
    }
    if models.classifier is not None:
        guided = Synthesiser(models, Sampling("ddim", steps, 0.0, 1.0, 0), speed)
        arms["guided"] = lambda: run(guided, 0)
    seconds, memory = _time_in_turn(arms, repeats, device)
    rates = {name: [batch_size / s for s in values] for name, values in seconds.items()}
    result: dict[str, Any] = {
        "bench": "sample",
        "shape": [batch_size, *models.diffusion.latent_shape],
        "image": [models.diffusion.first_stage_model.resolution] * 2,
        "parameters": sum(p.numel() for p in models.diffusion.eps_model().parameters()),
        "steps": steps,
        "repeats": repeats,
        "dtype": "bfloat16 autocast" if speed.precision == "bf16" else "float32",
        "channels_last": speed.channels_last,
        "compile": speed.compile,
        "device": device.type,
        **{f"{name}_images_per_s": _spread(values) for name, values in rates.items()},
        "ours_over_diffusers": _spread(_ratios(rates["ours"], rates["diffusers"])),
        "peak_memory_mib": memory,
        "hardware": hardware(),
        "versions": {**versions(), "diffusers": version("diffusers")},
        "revision": git_revision(),
    }
    if "guided" in rates:
        result["guided_time_over_unguided"] = _spread(_ratios(rates["ours"], rates["guided"]))
    return result


def _time_in_turn(
    arms: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each run by arm, and peak memory in MiB: by arm on a GPU, else of the process."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    memory: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, run in arms.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory[name] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    if not memory:
        # In KiB on Linux, in bytes on macOS.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        memory["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    return seconds, memory


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}
