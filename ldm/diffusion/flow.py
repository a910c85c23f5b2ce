"""Rectified flow: a straight line from clean latents to noise (Liu et al. 2023; Lipman et al.
2023).

Letters: B batch, C channels, H W latent size, S sampling steps. A place on the line is s in [0, 1],
0 clean and 1 noise. The network gets t = T s, so that its time embedding and all code for time
steps get numbers in [0, T] as with a noise schedule.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.process import DrawFn, Process, equal_times
from ldm.errors import UserError

TIME_SAMPLINGS = ("logit_normal", "uniform")
# Start of sampling. At s = 1 a division by the signal 1 - s is impossible. A start from pure noise
# lacks 0.2% of signal here, far below what the network can distinguish.
LARGEST_S = 0.998
LARGEST_GUIDED_S = 0.95


class RectifiedFlow(Process):
    """z_s = (1 - s) z_0 + s eps; the network predicts the velocity eps - z_0.

    Args:
        time_sampling: Distribution of s in training. "logit_normal": logit(s) is normal (Esser et
            al. 2024, eq. 19), so that most images are in the middle of the line; or "uniform".
        time_mean, time_std: Mean and deviation of logit(s); not used with "uniform".
        time_shift: Moves s towards noise, s -> shift s / (1 + (shift - 1) s), in training and in
            sampling (Esser et al. 2024, eq. 23). Larger latents need a larger shift: their
            neighbouring values are more alike, so the same s hides less of the image.
        timesteps: T.

    Raises:
        UserError: A value is out of range.
    """

    samplers = ("euler", "heun")
    predictions = ("flow",)

    def __init__(
        self,
        time_sampling: str = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
        timesteps: int = 1000,
    ):
        if time_sampling not in TIME_SAMPLINGS:
            raise UserError(
                f"time_sampling={time_sampling!r} must be one of {', '.join(TIME_SAMPLINGS)}"
            )
        for name, value in (("time_std", time_std), ("time_shift", time_shift)):
            if not value > 0:
                raise UserError(f"{name}={value} must be above 0")
        if timesteps < 1:
            raise UserError(f"timesteps={timesteps} must be at least 1")
        self.T = timesteps
        self.largest_guided = LARGEST_GUIDED_S * timesteps
        self.time_sampling = time_sampling
        self.time_mean, self.time_std = float(time_mean), float(time_std)
        self.time_shift = float(time_shift)
        self.settings = {
            "name": "flow",
            "time_sampling": time_sampling,
            "time_mean": self.time_mean,
            "time_std": self.time_std,
            "time_shift": self.time_shift,
            "timesteps": timesteps,
        }

    def __eq__(self, other: object) -> bool:
        # The distribution of s in training does not change the meaning of z_s.
        return isinstance(other, RectifiedFlow) and self.T == other.T

    __hash__ = None

    def __repr__(self) -> str:
        return f"RectifiedFlow({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def _s(self, t: Tensor, like: Tensor) -> Tensor:
        # Half-precision latents are multiplied in float32, as in a noise schedule.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        return (t.to(like.device, dtype) / self.T).view(-1, *[1] * (like.ndim - 1))

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        return 1 - self._s(t, like)

    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        return self._s(t, like)

    def draw_times(self, draw: DrawFn, count: int) -> Tensor:
        """Times T s (count,) float32, see `Process.draw_times`."""
        if self.time_sampling == "uniform":
            s = draw(torch.rand, (count,))
            return self.T * (self.time_shift * s / (1 + (self.time_shift - 1) * s))
        # The shift adds its logarithm to logit(s).
        mean = self.time_mean + math.log(self.time_shift)
        return self.T * torch.sigmoid(mean + self.time_std * draw(torch.randn, (count,)))

    def uniform_times(self, draw: DrawFn, count: int) -> Tensor:
        return self.T * draw(torch.rand, (count,))

    def times(self, t: float, count: int, device: torch.device | str) -> Tensor:
        return equal_times(t, count, torch.float32, device)

    def time_pairs(self, steps: int, start: float | None = None) -> list[tuple[float, float]]:
        """See `Process.time_pairs`; the last t_prev is 0, the clean end.

        Steps of s are equal, then shifted; the first s is at most `LARGEST_S`. With a `start` they
        are not shifted, since little of the noisy end is left.
        """
        if not 1 <= steps <= self.T:
            raise UserError(f"sampling steps={steps} must be in [1, {self.T}]")
        if start is None:
            u = [1 - k / steps for k in range(steps)]
            s = [self.time_shift * x / (1 + (self.time_shift - 1) * x) for x in u]
        else:
            if not 0 < start <= self.T:
                raise UserError(f"start={start} must be above 0 and at most {self.T}")
            s = [start / self.T * (1 - k / steps) for k in range(steps)]
        times = [self.T * min(x, LARGEST_S) for x in s]
        return list(zip(times, [*times[1:], 0.0], strict=True))
