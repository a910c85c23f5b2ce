"""Measure how fast DDIM samples images, beside diffusers, and what classifier guidance costs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from benchmarks.common import Lap, NetworkOptions, Ready, run_contest
from ldm.cli import like, option, parse, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.networks import Execution, Networks
    from ldm.synthesis.models import Models

CLASSES = [f"class{label}" for label in range(9)]  # as many as the paper's labelled set has
# Settings of the classifier of each size; the published ones for the paper's.
CLASSIFIERS = {
    "demo": {"width": 64, "depth": 1, "channel_mult": (1, 2, 2)},
    "small": {"width": 64, "depth": 1, "channel_mult": (1, 2, 3)},
    "paper": {},
}


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    program: ClassVar = "python -m benchmarks.sample"
    example: ClassVar = "--size paper --batch_size 32 -c 50"

    size: Literal["demo", "small", "paper"] = like(NetworkOptions, "size", "demo")
    peers: tuple[Literal["diffusers"], ...] = like(
        NetworkOptions,
        "peers",
        ("diffusers",),
        help="diffusers, to compare with; without a name: ours alone",
    )
    custom_steps: Annotated[int, Field(ge=1, le=1000)] = option(10, "sampling steps", "-c")


def random_models(networks: "Networks", classifier: dict[str, Any] | None) -> "Models":
    """Models with random weights: time does not depend on what they say."""
    import torch

    from benchmarks.networks import randomise
    from ldm.models.classifier import NoisyLatentClassifier, network_config
    from ldm.models.diffusion import LatentDiffusion
    from ldm.synthesis.models import Models

    torch.manual_seed(0)
    first = {"ddconfig": networks.ddconfig, "embed_dim": networks.embed_dim}
    model = LatentDiffusion(
        unet_config={"target": "ldm.modules.unet.UNetModel", "params": networks.unet},
        first_stage_config={"target": "ldm.models.autoencoder.AutoencoderKL", "params": first},
        image_size=networks.latent[1],
        channels=networks.latent[0],
        scale_factor=1.0,
        use_ema=False,
    )
    randomise(model).eval().requires_grad_(False)
    if classifier is None:
        return Models(model)
    config = network_config(model.first_stage_model, len(CLASSES), **classifier)
    guide = NoisyLatentClassifier(config, "random weights", 1.0)
    guide.classes = CLASSES
    return Models(model, randomise(guide).eval().requires_grad_(False))


def guided_images(
    pipeline: Any, classify: Callable[["Tensor", "Tensor"], "Tensor"], z_t: "Tensor", steps: int
) -> "Tensor":
    """Images of class 0 by a pipeline of diffusers, which has no classifier guidance of its own.

    Dhariwal & Nichol 2021, algorithm 2, at scale 1, around the pipeline's networks and scheduler.

    Args:
        classify: Logits (B, K) of noisy latents (B, C, h, w) and time steps (B,).
        z_t: The initial noise, (B, C, h, w).
    """
    import torch

    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(steps, device=unet.device)
    for t in scheduler.timesteps:
        eps = unet(z_t, t, return_dict=False)[0]
        with torch.enable_grad():
            x = z_t.detach().requires_grad_()
            log_prob = classify(x, t.expand(len(z_t))).float().log_softmax(dim=1)[:, 0]
            gradient = torch.autograd.grad(log_prob.sum(), x)[0]
        noise = (1 - scheduler.alphas_cumprod.to(z_t.device)[t]).sqrt()
        z_t = scheduler.step(eps - noise * gradient, t, z_t, eta=0.0, return_dict=False)[0]
    return pipeline.vqvae.decode(z_t / pipeline.vqvae.config.scaling_factor, return_dict=False)[0]


def guide_flops(net_config: dict[str, Any], latent: tuple[int, ...], batch_size: int) -> int:
    """Operations of the classifier on a batch: forward, and backward to the latents."""
    import torch

    from benchmarks.networks import count_flops
    from ldm.config import instantiate_from_config

    def run() -> None:
        net = instantiate_from_config(net_config).requires_grad_(False)
        z_t = torch.empty(batch_size, *latent, requires_grad=True)
        net(z_t, torch.empty(batch_size).long()).sum().backward()

    return count_flops(run)


def our_step(
    models: "Models", execution: "Execution", batch_size: int, steps: int
) -> Callable[[Lap], None]:
    """The function that samples a batch by ours: of class 0 where there is a classifier."""
    from ldm.synthesis.settings import Sampling
    from ldm.synthesis.synthesiser import Synthesiser

    guided = models.classifier is not None
    sampling = Sampling("ddim", steps, eta=0.0, scale=float(guided), seed=0)
    synthesiser = Synthesiser(models.to(execution.device), sampling, execution)
    labels = [0 if guided else -1] * batch_size

    def step(lap: Lap) -> None:
        z = synthesiser.latents(labels, range(batch_size))
        lap("steps")
        synthesiser.images(z)
        lap("decode")

    return step


def diffusers_step(
    models: "Models", execution: "Execution", batch_size: int, steps: int
) -> Callable[[Lap], None]:
    """The function that samples a batch by diffusers, with the same networks."""
    import torch

    from ldm.data.tiles import to_uint8
    from ldm.exchange.diffusers_export import build_pipeline

    with execution.device:
        pipeline = build_pipeline(models.diffusion)
    for net in (pipeline.unet, pipeline.vqvae):
        execution.place(net).requires_grad_(False)
    execution.maybe_compile(pipeline.unet)
    classify = None
    if models.classifier is not None:
        classify = execution.place(models.classifier.logits_model())
        execution.maybe_compile(classify)
    shape = (batch_size, *models.diffusion.latent_shape)

    @torch.no_grad()
    def step(lap: Lap) -> None:
        with execution.autocast(execution.device):
            if classify is None:
                pipeline(batch_size, num_inference_steps=steps, output_type="np")
            else:
                z_T = execution.place(torch.randn(shape, device=execution.device))
                to_uint8(guided_images(pipeline, classify, z_T, steps))

    return step


def build(
    library: str,
    execution: "Execution",
    batch_size: int,
    networks: "Networks",
    steps: int,
    classifier: dict[str, Any] | None = None,
) -> Ready:
    """A contestant that samples by DDIM at eta 0, guided by a classifier of these settings."""
    import torch

    from benchmarks.networks import autoencoder_flops, count, unet_flops

    torch.backends.cudnn.benchmark = execution.search
    with execution.device:
        models = random_models(networks, classifier)
    step = (our_step if library == "ours" else diffusers_step)(models, execution, batch_size, steps)
    flops = unet_flops(library, networks, batch_size)
    if classifier is not None:
        flops += guide_flops(models.classifier.net_config, networks.latent, batch_size)
    flops = steps * flops + autoencoder_flops(library, networks, batch_size, True)
    return Ready(step, count(models.diffusion.unet), flops)


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from benchmarks.networks import Execution, Networks

    execution, networks = Execution.asked(args), Networks.of(args.size)
    settings = (execution, args.batch_size, networks, args.custom_steps)
    builds = {library: partial(build, library, *settings) for library in ["ours", *args.peers]}
    builds["guided"] = partial(build, "ours", *settings, CLASSIFIERS[args.size])
    pairs = [*(("ours", peer) for peer in args.peers), ("guided", "ours")]
    shape = [args.batch_size, *networks.latent]
    facts = {"bench": "sample", "shape": shape}
    run_contest(args, execution, builds, pairs, **facts)


if __name__ == "__main__":
    run_command(main, Options)
