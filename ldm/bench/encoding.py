"""Encoding of images by the autoencoder, beside those of other libraries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.bench.contest import Runner, compared, compete
from ldm.bench.measure import Stopwatch, surroundings
from ldm.bench.networks import Networks, build_autoencoder, count, encode_flops, load, randomise
from ldm.bench.training import Execution


@dataclass(frozen=True)
class Encoder:
    """A contestant that encodes one batch of random images again and again.

    Attributes:
        steps: Batches of one run.
    """

    library: str
    networks: Networks
    batch_size: int
    execution: Execution
    steps: int

    @property
    def device(self) -> torch.device:
        return self.execution.device

    def load(self) -> None:
        load(self.library)

    def build(self) -> Runner:
        return _Encoding(self)


class _Encoding:
    def __init__(self, encoder: Encoder):
        networks, execution = encoder.networks, encoder.execution
        self.encoder = encoder
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        architecture = (networks.ddconfig, networks.embed_dim)
        net, self._encode = build_autoencoder(encoder.library, *architecture)
        del net.decoder
        execution.place(randomise(net)).eval().requires_grad_(False)
        execution.maybe_compile(net.encoder)
        size = (encoder.batch_size, 3, networks.pixels, networks.pixels)
        self._x = (2 * torch.rand(size) - 1).to(execution.device)
        if execution.channels_last:
            self._x = self._x.contiguous(memory_format=torch.channels_last)
        flops = encode_flops(encoder.library, *architecture, encoder.batch_size)
        self.facts = {"parameters": count(net), "flops": flops}

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        watch = Stopwatch(self.encoder.device)
        for _ in range(self.encoder.steps):
            with self.encoder.execution.autocast():
                self._encode(self._x)
        return {part: value / self.encoder.steps for part, value in watch.seconds().items()}


def bench_encoding(
    networks: Networks,
    libraries: Sequence[str],
    batch_size: int,
    steps: int,
    repeats: int,
    execution: Execution,
    processes: str = "each",
) -> dict[str, Any]:
    """Images per second of encoding, latents drawn, by library; the first beside the others."""
    contestants = {
        library: Encoder(library, networks, batch_size, execution, steps) for library in libraries
    }
    standings = compete(contestants, repeats, processes)
    pairs = [(libraries[0], other) for other in libraries[1:]]
    return {
        "bench": "encode",
        "size": networks.size,
        "shape": [batch_size, 3, networks.pixels, networks.pixels],
        "steps": steps,
        "repeats": repeats,
        "processes": processes,
        **execution.record(),
        **compared(standings, pairs, batch_size),
        **surroundings([lib for lib in libraries if lib != "ours"]),
    }
