"""Measure how fast DDIM samples images, beside diffusers, and what classifier guidance costs."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from benchmarks.common import (
    Contestant,
    Lap,
    NetworkOptions,
    Ready,
    compared,
    compete,
    print_result,
)
from ldm.cli import like, option, parse, run_command

if TYPE_CHECKING:
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
    program: ClassVar = "benchmarks.sample"
    example: ClassVar = "  python -m benchmarks.sample --size paper --batch_size 32 -c 50"

    size: Literal["demo", "small", "paper"] = like(NetworkOptions, "size", "demo")
    peers: tuple[Literal["diffusers"], ...] = like(
        NetworkOptions,
        "peers",
        ("diffusers",),
        help="diffusers, to compare with; without a name: ours alone",
    )
    custom_steps: Annotated[int, Field(ge=1, le=1000)] = option(
        "-c", default=10, help="sampling steps"
    )


def parse_arguments(argv: list[str] | None = None) -> Options:
    return parse(Options, argv)


def random_models(networks: "Networks", classifier: dict[str, Any] | None) -> "Models":
    """Models with random weights; time does not depend on what they say.

    Args:
        networks: The architecture.
        classifier: Settings of the classifier's network, or None for none.
    """
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


def build(
    arm: str,
    networks: "Networks",
    classifier: dict[str, Any],
    execution: "Execution",
    batch_size: int,
    steps: int,
) -> Ready:
    """A contestant that samples by DDIM at eta 0: "ours", "guided" (ours too) or "diffusers"."""
    import torch

    from benchmarks.networks import autoencoder_flops, count, unet_flops
    from ldm.devices import one_device
    from ldm.exchange.diffusers_export import build_pipeline
    from ldm.synthesis.settings import Sampling
    from ldm.synthesis.synthesiser import Synthesiser

    torch.backends.cudnn.benchmark = True
    guided = arm == "guided"
    models = random_models(networks, classifier if guided else None)
    if arm == "diffusers":
        pipeline = build_pipeline(models.diffusion)
        for net in (pipeline.unet, pipeline.vqvae):
            execution.place(net).requires_grad_(False)
        execution.maybe_compile(pipeline.unet)

        def step(lap: Lap) -> None:
            with execution.autocast():
                pipeline(batch_size, num_inference_steps=steps, output_type="np")
    else:
        devices = one_device(str(execution.device)).with_precision(
            execution.precision,
            channels_last=execution.channels_last,
            compile=execution.compile,
        )
        sampling = Sampling("ddim", steps, eta=0.0, scale=float(guided), seed=0)
        synthesiser = Synthesiser(models.to(execution.device), sampling, devices)
        labels = [0 if guided else -1] * batch_size

        def step(lap: Lap) -> None:
            z = synthesiser.latents(labels, range(batch_size))
            lap("steps")
            synthesiser.images(z)
            lap("decode")

    parameters = count(models.diffusion.unet)
    if guided:
        return Ready(step, parameters)
    flops = steps * unet_flops(arm, networks, batch_size)
    return Ready(step, parameters, flops + autoencoder_flops(arm, networks, batch_size, True))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)

    from benchmarks.networks import Execution, Networks

    execution, networks = Execution.of(args), Networks.of(args.size)
    settings = (networks, CLASSIFIERS[args.size], execution, args.batch_size, args.custom_steps)
    contestants = {
        arm: Contestant(
            partial(build, arm, *settings), execution.device, arm if arm in args.peers else "ours"
        )
        for arm in ["ours", *args.peers, "guided"]
    }
    pairs = [*(("ours", peer) for peer in args.peers), ("guided", "ours")]
    numbers = compared(compete(contestants, args), pairs, args.batch_size)
    shape = [args.batch_size, *networks.latent]
    print_result(args, bench="sample", shape=shape, dtype=execution.dtype, **numbers)


if __name__ == "__main__":
    run_command(main, Options)
