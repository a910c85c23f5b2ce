"""How fast images are sampled: beside diffusers' pipeline, and what guidance costs."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.bench.contest import Runner, compared, compete
from ldm.bench.measure import Stopwatch, count_flops, surroundings
from ldm.bench.networks import (
    SIZES,
    Networks,
    build_autoencoder,
    count,
    load,
    randomise,
    unet_flops,
)
from ldm.bench.training import Execution
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.models.classifier import NoisyLatentClassifier, network_config
from ldm.models.diffusion import LatentDiffusion
from ldm.synthesis.models import Models, load_models
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

CLASSES = [f"class{label}" for label in range(9)]  # as many as the paper's labelled set has
ARMS = ("ours", "diffusers", "guided")


def random_models(networks: Networks, with_classifier: bool = True) -> Models:
    """Models with fresh weights; time does not depend on what they say."""
    torch.manual_seed(0)
    model = LatentDiffusion(
        unet_config={"target": "ldm.modules.unet.UNetModel", "params": networks.unet},
        first_stage_config={
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ddconfig": networks.ddconfig, "embed_dim": networks.embed_dim},
        },
        image_size=networks.latent[1],
        channels=networks.latent[0],
        scale_factor=1.0,
        use_ema=False,
    )
    randomise(model)
    if not with_classifier:
        return Models(model.eval().requires_grad_(False))
    options = SIZES[networks.size][2] if networks.size in SIZES else {}
    classifier = NoisyLatentClassifier(
        network_config(model.first_stage_model, len(CLASSES), **options), "fresh weights", 1.0
    )
    classifier.classes = CLASSES
    randomise(classifier)
    return Models(model.eval().requires_grad_(False), classifier.eval().requires_grad_(False))


@dataclass(frozen=True)
class Weights:
    """Where the networks come from: fresh ones of an architecture, or checkpoints."""

    networks: Networks | None = None
    diffusion: str | os.PathLike | None = None
    classifier: str | os.PathLike | None = None

    def models(self, device: torch.device, guided: bool) -> Models:
        if self.networks is not None:
            return random_models(self.networks, guided).to(device)
        return load_models(self.diffusion, self.classifier if guided else None, device=device)

    @property
    def has_classifier(self) -> bool:
        return self.networks is not None or self.classifier is not None


def networks_of(model: LatentDiffusion) -> Networks:
    """The architecture of a model."""
    first = model.first_stage_config["params"]
    return Networks(model.unet_config["params"], first["ddconfig"], first["embed_dim"])


@dataclass(frozen=True)
class Sampler:
    """A contestant that samples by DDIM at eta 0.

    Attributes:
        arm: One of `ARMS`.
        decode: Whether the latents become images.
    """

    arm: str
    weights: Weights
    batch_size: int
    steps: int
    execution: Execution
    decode: bool = True

    @property
    def device(self) -> torch.device:
        return self.execution.device

    def load(self) -> None:
        load("diffusers" if self.arm == "diffusers" else "ours")

    def build(self) -> Runner:
        return _Theirs(self) if self.arm == "diffusers" else _Ours(self)

    def facts(self, model: LatentDiffusion) -> dict[str, Any]:
        networks = networks_of(model)
        library = "diffusers" if self.arm == "diffusers" else "ours"
        facts = {
            "parameters": count(model.unet),
            "shape": [self.batch_size, *networks.latent],
            "image": [networks.pixels] * 2,
        }
        if self.arm == "guided":
            return facts
        flops = self.steps * unet_flops(library, networks.unet, self.batch_size, train=False)
        if self.decode:
            with torch.device("meta"), torch.no_grad():
                net, _ = build_autoencoder(library, networks.ddconfig, networks.embed_dim)
                z = torch.empty(facts["shape"])
                flops += count_flops(lambda: net.decode(z))
        return {**facts, "flops": flops}


class _Ours:
    def __init__(self, sampler: Sampler):
        self.sampler, execution = sampler, sampler.execution
        torch.backends.cudnn.benchmark = True
        models = sampler.weights.models(sampler.device, sampler.arm == "guided")
        devices = Devices(channels_last=execution.channels_last, compile=execution.compile)
        devices = devices.with_precision(execution.precision)
        scale = 1.0 if sampler.arm == "guided" else 0.0
        sampling = Sampling("ddim", sampler.steps, 0.0, scale, 0)
        T = models.diffusion.schedule.T
        if sampler.steps > T:
            raise UserError(f"--custom_steps {sampler.steps} must be in [1, {T}]")
        self._synthesiser = Synthesiser(models, sampling, devices)
        self.facts = sampler.facts(models.diffusion)

    def run(self) -> dict[str, float]:
        label = 0 if self.sampler.arm == "guided" else -1
        size = self.sampler.batch_size
        watch = Stopwatch(self.sampler.device)
        z_0 = self._synthesiser.latents([label] * size, range(size))
        watch.lap("steps")
        if self.sampler.decode:
            self._synthesiser.images(z_0)
            watch.lap("decode")
        return watch.seconds()


class _Theirs:
    def __init__(self, sampler: Sampler):
        from ldm.exchange.diffusers_export import build_pipeline

        self.sampler = sampler
        torch.backends.cudnn.benchmark = True
        model = sampler.weights.models(torch.device("cpu"), False).diffusion
        self.pipeline = build_pipeline(model)
        execution = sampler.execution
        execution.place(self.pipeline.unet).requires_grad_(False)
        execution.place(self.pipeline.vqvae).requires_grad_(False)
        execution.maybe_compile(self.pipeline.unet)
        self.facts = sampler.facts(model)

    def latents(self, z: Tensor) -> Tensor:
        """Clean latents of noise, as the pipeline makes them."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(self.sampler.steps)
        z = z * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            # The sum of a step is in float32, as ours is.
            with self.sampler.execution.autocast():
                eps = self.pipeline.unet(scheduler.scale_model_input(z, t), t).sample.float()
            z = scheduler.step(eps, t, z, eta=0.0).prev_sample
        return z

    def images(self, z: Tensor) -> Any:
        """As the pipeline decodes them, (B, H, W, 3) in [0, 1]."""
        vae = self.pipeline.vqvae
        with self.sampler.execution.autocast():
            x = vae.decode(z / vae.config.scaling_factor).sample.float()
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        watch = Stopwatch(self.sampler.device)
        z = torch.randn(self.facts["shape"], device=self.sampler.device)
        if self.sampler.execution.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        z = self.latents(z)
        watch.lap("steps")
        if self.sampler.decode:
            self.images(z)
            watch.lap("decode")
        return watch.seconds()


def bench_sampling(
    weights: Weights,
    batch_size: int,
    steps: int,
    repeats: int,
    execution: Execution,
    processes: str = "each",
    decode: bool = True,
    peers: tuple[str, ...] = ("diffusers",),
    guided: bool = True,
) -> dict[str, Any]:
    """Images per second by DDIM at eta 0: ours, diffusers', and ours with classifier guidance.

    diffusers has networks of its own with the same weights (`ldm.exchange.diffusers_export`).

    Args:
        decode: Whether the latents become images.
        guided: Whether to measure guidance too, where there is a classifier.
    """
    arms = ["ours", *peers, *(["guided"] if guided and weights.has_classifier else [])]
    contestants = {arm: Sampler(arm, weights, batch_size, steps, execution, decode) for arm in arms}
    standings = compete(contestants, repeats, processes)
    pairs = [("ours", peer) for peer in peers]
    if "guided" in arms:
        pairs.append(("guided", "ours"))
    facts = standings["ours"].facts
    return {
        "bench": "sample",
        "size": "" if weights.networks is None else weights.networks.size,
        "shape": facts["shape"],
        "image": facts["image"] if decode else None,
        "steps": steps,
        "repeats": repeats,
        "processes": processes,
        **{k: v for k, v in execution.record().items() if k != "fused"},
        **compared(standings, pairs, batch_size),
        **surroundings(list(peers)),
    }
