"""A step of diffusion training, by part, beside the same step of other libraries.

Letters: B batch, C h w latent.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.bench.contest import Runner, compared, compete
from ldm.bench.loading import Source, make_sources
from ldm.bench.measure import Stopwatch, surroundings
from ldm.bench.networks import (
    Networks,
    build_autoencoder,
    build_unet,
    count,
    encode_flops,
    load,
    randomise,
    unet_flops,
)
from ldm.devices import BACKEND
from ldm.diffusion.schedule import NoiseSchedule
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.ema import EMA

SOURCES = ("latents", "images")
# Of the paper's configuration; time does not depend on them.
SCHEDULE = {
    "name": "scaled_linear",
    "timesteps": 1000,
    "linear_start": 1.5e-3,
    "linear_end": 1.55e-2,
}
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 5e-5, 0.01, 0.9999


@dataclass(frozen=True)
class Execution:
    """How networks are run.

    Attributes:
        precision: "32", or "bf16" for autocast.
        channels_last: Memory layout.
        compile: torch.compile of the networks.
        fused: AdamW in one kernel.
    """

    device: torch.device
    precision: str = "32"
    channels_last: bool = False
    compile: bool = False
    fused: bool = False

    def autocast(self) -> torch.autocast:
        bf16 = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def place(self, net: nn.Module) -> nn.Module:
        """The network on its device, in its layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return net.to(self.device, memory_format=layout)

    def maybe_compile(self, net: nn.Module) -> None:
        if self.compile:
            net.compile(backend=BACKEND)

    def record(self) -> dict[str, Any]:
        return {
            "dtype": "bfloat16 autocast" if self.precision == "bf16" else "float32",
            "channels_last": self.channels_last,
            "compile": self.compile,
            "fused": self.fused,
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Training:
    """A contestant that trains: draw latents, L1 error of the noise, AdamW, moving average.

    Ours does what training does, with its tests for numbers that are not finite. diffusers' adds
    noise and averages weights with its own functions, and tests nothing. MONAI's network is trained
    with our functions, without the tests.

    Attributes:
        library: One of `ldm.bench.networks.LIBRARIES`.
        steps: Of one run.
    """

    library: str
    networks: Networks
    source: Source
    execution: Execution
    steps: int

    @property
    def device(self) -> torch.device:
        return self.execution.device

    def load(self) -> None:
        load(self.library)

    def build(self) -> Runner:
        return _Trainer(self)


class _Trainer:
    def __init__(self, training: Training):
        execution, networks, library = training.execution, training.networks, training.library
        self.training, self.device = training, execution.device
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True  # as in the configurations
        net, self._predict = build_unet(library, networks.unet)
        self._net = execution.place(randomise(net)).train()
        self._optimizer = torch.optim.AdamW(
            net.parameters(),
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=execution.fused or None,
        )
        self._add_noise, self._average = _functions(library, net, self.device)
        execution.maybe_compile(net)  # not before: the average is a copy
        batch_size = training.source.batch_size
        flops = unet_flops(library, networks.unet, batch_size, train=True)
        self._encode = None
        if not training.source.is_cache:
            first, encode = build_autoencoder(library, networks.ddconfig, networks.embed_dim)
            execution.place(randomise(first)).eval().requires_grad_(False)
            execution.maybe_compile(first.encoder)
            self._encode = encode
            flops += encode_flops(library, networks.ddconfig, networks.embed_dim, batch_size)
        self._batches = training.source.batches()
        self.facts = {"parameters": count(net), "flops": flops}

    def run(self) -> dict[str, float]:
        watch = Stopwatch(self.device)
        for _ in range(self.training.steps):
            self._step(watch)
        steps = self.training.steps
        return {part: seconds / steps for part, seconds in watch.seconds().items()}

    def _step(self, watch: Stopwatch) -> None:
        key = "moments" if self._encode is None else "image"
        x = next(self._batches)[key].to(self.device, non_blocking=True)
        watch.lap("data")
        checked = self.training.library == "ours"
        with self.training.execution.autocast():
            z_0 = self._draw(x)
            watch.lap("encode")
            t = torch.randint(SCHEDULE["timesteps"], (len(z_0),), device=self.device)
            eps = torch.randn_like(z_0)
            z_t = self._add_noise(z_0, t, eps)
            if self.training.execution.channels_last:
                z_t = z_t.contiguous(memory_format=torch.channels_last)
            loss = (self._predict(z_t, t) - eps).float().abs().mean()
        if checked:
            assert torch.isfinite(loss)
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        if checked:
            gradients = [p.grad for p in self._net.parameters() if p.grad is not None]
            assert torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average(self._net)
        watch.lap("optimiser")

    @torch.no_grad()
    def _draw(self, x: Tensor) -> Tensor:
        """z_0 (B, C, h, w), of images or of the moments of a cache."""
        z = DiagonalGaussian(x).sample() if self._encode is None else self._encode(x)
        return z.float()


def _functions(
    library: str, net: nn.Module, device: torch.device
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[nn.Module], None]]:
    """Of a library: adding noise (z_0, t, eps), and averaging the weights of a network."""
    if library == "diffusers":
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        scheduler = DDPMScheduler(
            num_train_timesteps=SCHEDULE["timesteps"],
            beta_schedule=SCHEDULE["name"],
            beta_start=SCHEDULE["linear_start"],
            beta_end=SCHEDULE["linear_end"],
        )
        average = EMAModel(net.parameters(), decay=EMA_DECAY, foreach=True)
        average.to(device)
        return (
            lambda z_0, t, eps: scheduler.add_noise(z_0, eps, t),
            lambda net: average.step(net.parameters()),
        )
    schedule = NoiseSchedule(**SCHEDULE)
    ema = EMA(net, EMA_DECAY)
    return schedule.q_sample, ema.update


def bench_training(
    networks: Networks,
    libraries: Sequence[str],
    sources: Sequence[str],
    batch_size: int,
    steps: int,
    repeats: int,
    execution: Execution,
    workers: int = 0,
    processes: str = "each",
    tiles: int = 32,
) -> dict[str, Any]:
    """Images per second of training, by contestant: each library, from each source.

    Args:
        libraries: The first is compared with the others.
        sources: Of `SOURCES`.
        steps: Per turn.
        workers: Loader processes.
        processes: See `ldm.bench.contest.compete`.
        tiles: How many there are.
    """
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        kinds = {"latents": "latents", "images": "png"}
        made = make_sources(
            networks, Path(folder), [kinds[s] for s in sources], batch_size, tiles, workers=workers
        )
        contestants, pairs = {}, []
        for source in sources:
            names = [lib if len(sources) == 1 else f"{lib}_from_{source}" for lib in libraries]
            for name, library in zip(names, libraries, strict=True):
                contestants[name] = Training(
                    library, networks, made[kinds[source]], execution, steps
                )
            pairs += [(names[0], other) for other in names[1:]]
        if len(sources) == 2:
            pairs += [(f"{lib}_from_latents", f"{lib}_from_images") for lib in libraries]
        standings = compete(contestants, repeats, processes)
    return {
        "bench": "train",
        "size": networks.size,
        "from": list(sources),
        "shape": [batch_size, *networks.latent],
        "image": [networks.pixels] * 2,
        "steps": steps,
        "repeats": repeats,
        "workers": workers,
        "processes": processes,
        **execution.record(),
        **compared(standings, pairs, batch_size),
        **surroundings([lib for lib in libraries if lib != "ours"]),
    }
