"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn

from ldm.errors import UserError


class EMA(nn.Module):
    """A copy of `net` whose weights follow an exponential moving average.

    Call `update(net)` once per optimiser step, whatever the gradient accumulation or number of
    ranks. The decay of update number n is min(decay, (1 + n) / (10 + n)), so that an early average
    soon forgets the random initial weights (as in latent diffusion).

    Args:
        net: The trained network; it is copied.
        decay: Final decay per optimiser step, in [0, 1).
    """

    def __init__(self, net: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise UserError(f"ema_decay={decay} must be in [0, 1)")
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        # Copy of `num_updates` that needs no wait for a GPU; None if it is not known.
        self._count: int | None = 0

    def train(self, mode: bool = True) -> "EMA":
        """Keep evaluation mode: the average is never trained."""
        return super().train(False)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        if self._count is None:
            self._count = int(self.num_updates)
        self._count = n = self._count + 1
        self.num_updates += 1
        decay = min(self.decay, (1 + n) / (10 + n))
        averages = list(self.net.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in net.parameters()], 1.0 - decay)
        for average, buffer in zip(self.net.buffers(), net.buffers(), strict=True):
            average.copy_(buffer)

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)
