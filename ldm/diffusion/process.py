"""Common interface of forward processes from clean latents to noise.

Letters: B batch, C channels, H W latent size. A process mixes a clean latent with standard normal
noise, z_t = signal(t) z_0 + noise(t) eps, at a time t in [0, T] that the network gets. Samplers,
guidance and classifiers ask the process for these two factors and for the times to visit, so they
work with any process.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

DrawFn = Callable[..., Tensor]


def equal_times(t: float, count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`count` times t, (count,), marked so that `any_within` need not wait for a GPU."""
    times = torch.full((count,), t, dtype=dtype, device=device)
    times.known = torch.tensor(t, dtype=dtype).item()
    return times


def any_within(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether a time t (B,) is in [lo, hi]. Waits for a GPU unless `equal_times` made t."""
    low, high = interval
    known = getattr(t, "known", None)
    return bool(((t >= low) & (t <= high)).any()) if known is None else low <= known <= high


class Process(ABC):
    """A forward process q(z_t | z_0).

    It is no nn.Module: a few numbers define it, and checkpoints store these (`settings`).

    Attributes:
        T: Largest time of the network.
        settings: Values that rebuild the process, see `ldm.diffusion.make_process`.
        samplers: Names of samplers that suit it (see `ldm.diffusion.samplers.sample`), the default
            first.
        predictions: Names in `ldm.diffusion.prediction.PREDICTIONS` that a network may predict.
        largest_guided: By default, later times are not guided: with hardly any signal left, a
            little guidance of the noise changes the clean latent a lot.
    """

    T: int
    settings: dict[str, Any]
    samplers: ClassVar[tuple[str, ...]]
    predictions: ClassVar[tuple[str, ...]]
    largest_guided: float

    @property
    def guided_interval(self) -> tuple[int, int] | None:
        """Times that are guided by default; None for all."""
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
        """Times (count,) uniform over the process, for networks that need all of them equally.

        Args: as `draw_times`.
        """

    @abstractmethod
    def time_pairs(self, steps: int, start: float | None = None) -> list[tuple]:
        """The (t, t_prev) pairs that a sampler visits, noisiest first.

        Args:
            steps: Sampler steps.
            start: Begin at this time, from a latent noised to it; None begins from noise.

        Raises:
            UserError: `steps` or `start` is out of range.
        """

    @abstractmethod
    def times(self, t: float, count: int, device: torch.device | str) -> Tensor:
        """One time for `count` images, (count,), in the type that the network was trained with."""

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
