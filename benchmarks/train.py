"""Measure a step of diffusion training by part, beside the same step of other libraries.

A step takes a batch (data), draws latents (encode), predicts the noise (forward), computes the
gradients (backward) and updates the weights and their average (optimiser). diffusers adds noise and
averages weights with its own functions; MONAI's network is trained with ours. Only ours tests for
numbers that are not finite, on the device.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from benchmarks.common import Lap, NetworkOptions, Ready, run_contest
from benchmarks.loading import make_source
from ldm.cli import Count, Workers, like, option, parse, run_command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.networks import Execution, Networks

KINDS = {"latents": "latents", "images": "png"}  # of `benchmarks.loading`
TILES = 32
# The schedule of the paper's configuration. Time does not depend on these numbers.
SCHEDULE = {
    "name": "scaled_linear",
    "timesteps": 1000,
    "linear_start": 1.5e-3,
    "linear_end": 1.55e-2,
}
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 5e-5, 0.01, 0.9999


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    program: ClassVar = "python -m benchmarks.train"
    example: ClassVar = "--size paper --batch_size 1 --peers"

    batch_size: Count = like(NetworkOptions, "batch_size", 4)
    sources: tuple[Literal["latents", "images"], ...] = option(
        ("latents",),
        "train from cached latents, from images that are encoded, or one beside the other",
        metavar="SOURCE",
        published=("--from",),
    )
    workers: Workers = option(0, "loader processes")


def noise_and_average(
    library: str, net: "nn.Module", device: Any
) -> tuple[Callable[["Tensor", "Tensor", "Tensor"], "Tensor"], Callable[["nn.Module"], None]]:
    """The functions of a library that add noise (z_0, t, eps) and average weights."""
    from ldm.diffusion.schedule import NoiseSchedule
    from ldm.modules.ema import EMA

    if library != "diffusers":
        return NoiseSchedule(**SCHEDULE).q_sample, EMA(net, EMA_DECAY).update
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    scheduler = DDPMScheduler(
        SCHEDULE["timesteps"], SCHEDULE["linear_start"], SCHEDULE["linear_end"], SCHEDULE["name"]
    )
    average = EMAModel(net.parameters(), decay=EMA_DECAY, foreach=True)
    average.to(device)
    return (
        lambda z_0, t, eps: scheduler.add_noise(z_0, eps, t),
        lambda net: average.step(net.parameters()),
    )


def latents_of(
    library: str, networks: "Networks", execution: "Execution", batch: dict[str, Any]
) -> tuple[str, Callable[["Tensor"], "Tensor"], int]:
    """The key of a batch's tensor, how latents are drawn from that, and the operations of it."""
    from benchmarks.networks import autoencoder_flops, make_encoder
    from ldm.modules.autoencoder import DiagonalGaussian

    if "moments" in batch:
        return "moments", lambda moments: DiagonalGaussian(moments).sample(), 0
    _, draw = make_encoder(library, networks, execution)
    return "image", draw, autoencoder_flops(library, networks, len(batch["image"]))


def build(
    library: str,
    networks: "Networks",
    execution: "Execution",
    batches: Callable[[], Iterator[dict[str, Any]]],
) -> Ready:
    """A contestant that trains with the L1 error of the noise, AdamW and an average of weights.

    Args:
        batches: Gives batches without end, of `image` or of cached `moments`; can be pickled.
    """
    import torch

    from benchmarks.networks import build_unet, count, randomise, unet_flops

    device = execution.device
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = execution.search
    with device:  # weights are drawn where they are used, which is sooner
        net, predict = build_unet(library, networks.unet)
        execution.place(randomise(net)).train()
        add_noise, average = noise_and_average(library, net, device)
    optimizer = torch.optim.AdamW(
        net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
    )
    finite = torch.ones((), dtype=torch.bool, device=device)
    execution.maybe_compile(net)  # not before: the average is a copy
    stream = batches()
    first = next(stream)
    key, draw, flops = latents_of(library, networks, execution, first)
    flops += unet_flops(library, networks, len(first[key]), train=True)

    def step(lap: Lap) -> None:
        x = next(stream)[key].to(device, non_blocking=True)
        lap("data")
        with execution.autocast(execution.device):
            with torch.no_grad():
                z_0 = draw(x).float()  # (B, C, h, w)
            lap("encode")
            t = torch.randint(SCHEDULE["timesteps"], (len(z_0),), device=device)
            eps = torch.randn_like(z_0)
            z_t = execution.place(add_noise(z_0, t, eps))
            loss = (predict(z_t, t) - eps).float().abs().mean()
        lap("forward")
        loss.backward()
        lap("backward")
        if library == "ours":
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            finite.logical_and_(torch.isfinite(loss) & torch.isfinite(norm))
        optimizer.step()
        optimizer.zero_grad()
        average(net)
        lap("optimiser")

    return Ready(step, count(net), flops)


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from benchmarks.networks import Execution, Networks

    execution, networks = Execution.asked(args), Networks.of(args.size)
    libraries, sources = ["ours", *args.peers], list(dict.fromkeys(args.sources))
    builds, pairs = {}, []
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        for name in sources:
            made = make_source(Path(folder), KINDS[name], networks, TILES, args.batch_size)
            source = replace(made, workers=args.workers)
            for library in libraries:
                build_one = partial(build, library, networks, execution, source.batches)
                builds[f"{library}_from_{name}"] = build_one
            pairs += [(f"ours_from_{name}", f"{peer}_from_{name}") for peer in args.peers]
        if len(sources) == 2:
            pairs += [(f"{lib}_from_latents", f"{lib}_from_images") for lib in libraries]
        shape = [args.batch_size, *networks.latent]
        facts = {"bench": "train", "shape": shape}
        run_contest(args, execution, builds, pairs, **facts)


if __name__ == "__main__":
    run_command(main, Options)
