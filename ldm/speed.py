"""How training uses its devices: several of them, compiled networks, layouts, fused optimisers."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli import ArgumentParser, boolean
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.models.base import HistoModule

BACKEND = "inductor"  # of torch.compile
STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
FUSED = ("auto", "true", "false")


def add_speed_arguments(parser: ArgumentParser) -> None:
    """`--strategy`, and what makes training faster without changing what is trained."""
    add = parser.add_argument_group("devices, memory and speed").add_argument
    add(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="of several devices: ddp keeps the model on each, fsdp shards the diffusion UNet, its "
        "average and its optimiser; auto: ddp",
    )
    add("--compile", action="store_true", help="compile the networks: a slow start, then faster")
    add("--channels_last", action="store_true", help="memory layout that suits tensor cores")
    add(
        "--tf32",
        type=boolean,
        help="True: matrix products and convolutions of float32 on tensor cores, with 10 bits of "
        "mantissa; False: neither; not given: as PyTorch does, convolutions only",
    )
    add(
        "--fused",
        choices=FUSED,
        default="auto",
        help="optimiser steps in one kernel; auto: on GPUs, without gradient clipping and float16",
    )


@dataclass(frozen=True)
class Speed:
    """See `add_speed_arguments`."""

    strategy: str = "auto"
    compile: bool = False
    channels_last: bool = False
    tf32: bool | None = None
    fused: str = "auto"

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Speed":
        return cls(args.strategy, args.compile, args.channels_last, args.tf32, args.fused)

    def fuses(self, accelerator: str, precision: str, clips: bool) -> bool:
        """Whether optimisers take a step in one kernel.

        Args:
            accelerator: Lightning's.
            precision: Lightning's.
            clips: Whether gradients are clipped.

        Raises:
            UserError: `--fused true` where gradients have to be unscaled or clipped before it.
        """
        # Lightning refuses to clip in mixed precision before an optimiser that could unscale the
        # gradients by itself, as fused ones can.
        why = "float16 with its gradient scaling" if precision == "16-mixed" else None
        if clips and precision.endswith("-mixed"):
            why = f"gradient clipping in {precision}"
        if self.fused == "true" and why:
            raise UserError(f"--fused true does not go with {why}; leave it out")
        return self.fused == "true" or (
            self.fused == "auto" and accelerator == "gpu" and why is None
        )

    def prepare(self, model: "HistoModule") -> None:
        """Lay out and compile the networks of `model`, and set what holds for the process.

        Names of parameters stay as they are: modules are compiled in place, so that checkpoints
        are the same with and without.
        """
        import torch

        if self.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
            for network in model.networks():
                network.to(memory_format=torch.channels_last)
        if self.compile:
            # The autoencoder's adaptive weight goes through the decoder's graph twice, which
            # buffers that the first pass may overwrite would forbid.
            from torch._functorch import config as functorch_config

            functorch_config.donated_buffer = False
            for network in model.networks():
                network.compile(backend=BACKEND)


def follow_layout(optimizer: Any) -> None:
    """Give the states of an optimiser the strides of the parameters that they belong to.

    Fused kernels walk through both in the order of memory, whatever their strides: with the states
    of a run that began in another layout they would silently mix up the weights.
    """
    import torch

    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
