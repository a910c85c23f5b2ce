"""Measure how fast the autoencoder encodes images, beside those of other libraries."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from benchmarks.common import (
    Contestant,
    Lap,
    NetworkOptions,
    Ready,
    compared,
    compete,
    print_result,
)
from ldm.cli import parse, run_command

if TYPE_CHECKING:
    from benchmarks.networks import Execution, Networks


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    program: ClassVar = "python -m benchmarks.encode"
    example: ClassVar = "--size paper --batch_size 1"


def build(library: str, networks: "Networks", execution: "Execution", batch_size: int) -> Ready:
    """A contestant that encodes one batch of random images again and again."""
    import torch

    from benchmarks.networks import autoencoder_flops, build_autoencoder, count, randomise

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = execution.search
    net, encode = build_autoencoder(library, networks)
    del net.decoder
    execution.place(randomise(net)).eval().requires_grad_(False)
    execution.maybe_compile(net.encoder)
    x = execution.place(2 * torch.rand(batch_size, *networks.image) - 1)

    @torch.no_grad()
    def step(lap: Lap) -> None:
        with execution.autocast():
            encode(x)

    return Ready(step, count(net), autoencoder_flops(library, networks, batch_size))


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from benchmarks.networks import Execution, Networks

    execution, networks = Execution.of(args), Networks.of(args.size)
    contestants = {
        library: Contestant(
            partial(build, library, networks, execution, args.batch_size), execution.device, library
        )
        for library in ["ours", *args.peers]
    }
    turns = compete(contestants, args)
    pairs = [("ours", peer) for peer in args.peers]
    shape = [args.batch_size, *networks.image]
    numbers = compared(turns, pairs, args.batch_size)
    print_result(args, bench="encode", shape=shape, dtype=execution.dtype, **numbers)


if __name__ == "__main__":
    run_command(main, Options)
