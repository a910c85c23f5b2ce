"""What every forward process from clean latents to noise has in common.

Letters: B batch, C channels, H W latent size. A process mixes a clean latent with standard normal
noise, z_t = signal(t) z_0 + noise(t) eps, at a time t in [0, T] that the network is told. Samplers,
guidance and classifiers ask the process for these two factors and for the times to visit, so none
of them needs to know which process it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

DrawFn = Callable[..., Tensor]


def equal_times(t: float, count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`count` times t, (count,); `any_within` knows them without asking the device."""
    times = torch.full((count,), t, dtype=dtype, device=device)
    times.known = torch.tensor(t, dtype=dtype).item()
    return times


def any_within(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether one of the times t (B,) is in [lo, hi]. A GPU is waited for unless all are known."""
    low, high = interval
    known = getattr(t, "known", None)
    return bool(((t >= low) & (t <= high)).any()) if known is None else low <= known <= high


class Process(ABC):
    """A forward process q(z_t | z_0).

    Not an nn.Module: it follows from a few numbers, so checkpoints store those (`settings`).

    Attributes:
        T: Largest time of the network.
        settings: What rebuilds the process, see `ldm.diffusion.make_process`.
        samplers: Names in `ldm.diffusion.samplers.SAMPLERS` that suit it, the usual one first.
        predictions: Names in `ldm.diffusion.prediction.PREDICTIONS` of what a network may predict.
        largest_guided: Times above it are left unguided unless a user says otherwise: where hardly
            any signal is left, a little guidance of the noise is a huge one of the clean latent.
    """

    T: int
    settings: dict[str, Any]
    samplers: ClassVar[tuple[str, ...]]
    predictions: ClassVar[tuple[str, ...]]
    largest_guided: float

    @property
    def guided_interval(self) -> tuple[int, int] | None:
        """The times that are guided unless a user says otherwise; None for all."""
        return (0, int(self.largest_guided)) if self.largest_guided < self.T else None

    @abstractmethod
    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """Factor of the clean latent at times t (B,), shaped to multiply `like`: (B, 1, 1, 1)."""

    @abstractmethod
    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """Factor of the noise at times t (B,), shaped as `signal`."""

    @abstractmethod
    def draw_times(self, draw: DrawFn, count: int) -> Tensor:
        """Times of training images, (count,).

        Args:
            draw: Called as draw(fn, size) with fn torch.randn or the like; gives random numbers.
        """

    @abstractmethod
    def uniform_times(self, draw: DrawFn, count: int) -> Tensor:
        """Times (count,) uniform over the process, for what must be good at all of them alike.

        Args: as `draw_times`.
        """

    @abstractmethod
    def time_pairs(self, steps: int, start: float | None = None) -> list[tuple]:
        """The (t, t_prev) pairs that a sampler visits, noisiest first.

        Args:
            steps: Sampler steps.
            start: Begin at this time, from a latent that was noised to it; None begins from noise.

        Raises:
            UserError: `steps` or `start` is out of range.
        """

    @abstractmethod
    def times(self, t: float, count: int, device: torch.device | str) -> Tensor:
        """One time for `count` images, (count,), of the type that the network was trained with."""

    def q_sample(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Sample q(z_t | z_0) (for a noise schedule Ho et al. 2020, eq. 4).

        Args:
            z_0: Clean scaled latents, (B, C, H, W).
            t: Times, (B,).
            eps: Standard normal noise shaped like z_0.
        """
        return self.signal(t, z_0) * z_0 + self.noise(t, z_0) * eps

    def predict_z_0(self, z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean latent that z_t and its noise imply (inverse of `q_sample` in z_0)."""
        return (z_t - self.noise(t, z_t) * eps) / self.signal(t, z_t)

    def predict_eps(self, z_t: Tensor, t: Tensor, z_0: Tensor) -> Tensor:
        """The noise that z_t and its clean latent imply (inverse of `q_sample` in eps), t > 0."""
        return (z_t - self.signal(t, z_t) * z_0) / self.noise(t, z_t)
