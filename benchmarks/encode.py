"""Measure how fast the autoencoder encodes images, beside those of other libraries."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from benchmarks.common import Lap, NetworkOptions, Ready, run_contest
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

    from benchmarks.networks import autoencoder_flops, count, make_encoder

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = execution.search
    net, encode = make_encoder(library, networks, execution)
    del net.decoder
    x = execution.place(2 * torch.rand(batch_size, *networks.image) - 1)

    @torch.no_grad()
    def step(lap: Lap) -> None:
        with execution.autocast(execution.device):
            encode(x)

    return Ready(step, count(net), autoencoder_flops(library, networks, batch_size))


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)

    from benchmarks.networks import Execution, Networks

    execution, networks = Execution.asked(args), Networks.of(args.size)
    builds = {
        library: partial(build, library, networks, execution, args.batch_size)
        for library in ["ours", *args.peers]
    }
    pairs, shape = [("ours", peer) for peer in args.peers], [args.batch_size, *networks.image]
    facts = {"bench": "encode", "shape": shape}
    run_contest(args, execution, builds, pairs, **facts)


if __name__ == "__main__":
    run_command(main, Options)
