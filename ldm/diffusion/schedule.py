"""The forward process q(z_t | z_0) and the time steps that samplers visit.

Letters: B batch, C channels, H W latent size, T training time steps, S sampling steps. A time step
`t` is in [0, T); -1 stands for the clean end, where alpha_bar is 1. Tables are float64 on the CPU;
gathered values have the type and device of the latents that they multiply.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.process import DrawFn, Process, equal_times
from ldm.errors import UserError

NAMES = ("scaled_linear", "linear", "cosine")
# alpha_bar of the last step where it should be 0: small enough to hide the image, large
# enough to divide by (its root, 2^-13, costs float32 half of its digits).
TERMINAL_ALPHA_BAR = 2.0**-26
SMALLEST_GUIDED_SIGNAL = 0.05  # with zero terminal SNR


def make_betas(
    name: str = "scaled_linear",
    timesteps: int = 1000,
    linear_start: float = 0.0015,
    linear_end: float = 0.0155,
) -> Tensor:
    """Noise variances of the forward process, (T,) float64.

    Args:
        name: "scaled_linear" is linear in sqrt(beta) (Rombach et al. 2022; configurations published
            with that code call it linear), "linear" is linear in beta (Ho et al. 2020), "cosine" is
            Nichol & Dhariwal 2021, eq. 17, which has no start and end.
        timesteps: Time steps of training, T.
        linear_start: First beta of the two linear schedules.
        linear_end: Last beta, at least `linear_start` and below 1.

    Raises:
        UserError: The name is unknown or a value is out of range.
    """
    if name not in NAMES:
        raise UserError(f"schedule={name!r} must be one of {', '.join(NAMES)}")
    if timesteps < 1:
        raise UserError(f"timesteps={timesteps} must be at least 1")
    if name == "cosine":
        # f(t) = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008; beta tends to 1, hence the clipping.
        steps = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2  # (T + 1,)
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if not 0 < linear_start <= linear_end < 1:
        raise UserError(
            f"linear_start={linear_start}, linear_end={linear_end} must satisfy "
            "0 < linear_start <= linear_end < 1"
        )
    if name == "linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64)
    ends = linear_start**0.5, linear_end**0.5
    return torch.linspace(*ends, timesteps, dtype=torch.float64) ** 2


class NoiseSchedule(Process):
    """q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4).

    Args: as in `make_betas`, and
        rescale_zero_terminal_snr: Stretch sqrt(alpha_bar) so that the last step is noise alone (Lin
            et al. 2024, algorithm 1). Otherwise a trace of the image remains at t = T - 1. A
            sampler that starts from noise lacks it and cannot make very bright or dark images.

    Raises:
        UserError: See `make_betas`.
    """

    samplers = ("ddim", "ddpm", "dpm++2m")
    predictions = ("eps", "v")

    def __init__(
        self,
        name: str = "scaled_linear",
        timesteps: int = 1000,
        linear_start: float = 0.0015,
        linear_end: float = 0.0155,
        rescale_zero_terminal_snr: bool = False,
    ):
        self.settings = {
            "name": name,
            "timesteps": timesteps,
            "linear_start": linear_start,
            "linear_end": linear_end,
        }
        self.T = timesteps
        self.betas = make_betas(name, timesteps, linear_start, linear_end)  # (T,)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)  # (T,)
        self.largest_guided = float(timesteps)
        self._trailing = rescale_zero_terminal_snr
        if rescale_zero_terminal_snr:
            self.settings["rescale_zero_terminal_snr"] = True
            self._rescale()
        # t = -1 gathers the last entry, the clean end. Roots are taken in float64, since
        # 1 - alpha_bar of the first steps would lose digits in float32.
        padded = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
        self._tables = {
            "alpha_bar": padded,
            "signal": padded.sqrt(),
            "noise": (1 - padded).sqrt(),
        }
        self._cache: dict[tuple, Tensor] = {}

    def _rescale(self) -> None:
        """Make the last alpha_bar at most `TERMINAL_ALPHA_BAR`, and keep the first."""
        if self.T < 2:
            raise UserError("rescale_zero_terminal_snr needs at least 2 timesteps")
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alphas_cumprod = root.square()
        # In a very fine table, half of the entry before is smaller still.
        last = min(TERMINAL_ALPHA_BAR, float(self.alphas_cumprod[-2]) / 2)
        self.alphas_cumprod[-1] = last
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / before
        self.largest_guided = float((root >= SMALLEST_GUIDED_SIGNAL).nonzero().max())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and torch.equal(self.betas, other.betas)

    __hash__ = None

    def __repr__(self) -> str:
        return f"NoiseSchedule({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def _gather(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        # Half-precision latents are multiplied in float32: a bfloat16 alpha_bar has two digits.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        key = (table, like.device, dtype)
        if key not in self._cache:
            self._cache[key] = self._tables[table].to(dtype).to(like.device)
        return self._cache[key][t.to(like.device)].view(-1, *[1] * (like.ndim - 1))

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar_t for time steps t (B,) in [-1, T), shaped to multiply `like`: (B, 1, 1, 1)."""
        return self._gather("alpha_bar", t, like)

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """sqrt(alpha_bar_t), shaped as `alpha_bar`."""
        return self._gather("signal", t, like)

    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar_t), shaped as `alpha_bar`."""
        return self._gather("noise", t, like)

    def draw_times(self, draw: DrawFn, count: int) -> Tensor:
        """Time steps (count,) int64, uniform in [0, T)."""
        return draw(partial(torch.randint, self.T), (count,))

    def uniform_times(self, draw: DrawFn, count: int) -> Tensor:
        return self.draw_times(draw, count)

    def times(self, t: float, count: int, device: torch.device | str) -> Tensor:
        return equal_times(t, count, torch.int64, device)

    def time_pairs(self, steps: int, start: float | None = None) -> list[tuple[int, int]]:
        """See `time_pairs`; a `start` omits the steps above it.

        With zero terminal SNR the steps are counted from the end, since only the last entry of the
        table is the noise that sampling starts from (Lin et al. 2024, section 3.3).
        """
        pairs = time_pairs(self.T, steps)
        if self._trailing:
            times = [self.T - 1 - k * self.T // steps for k in range(steps)]
            pairs = list(zip(times, [*times[1:], -1], strict=True))
        if start is None:
            return pairs
        pairs = [pair for pair in pairs if pair[0] <= start]
        if not pairs:
            raise UserError(f"start={start} of {steps} sampling steps leaves none; raise either")
        return pairs

    def v(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0 (Salimans & Ho 2022, appendix D).

        Args: as in `Process.q_sample`.
        """
        return self.signal(t, z_0) * eps - self.noise(t, z_0) * z_0

    def eps_of_v(self, z_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise that z_t and its v imply: sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) z_t."""
        return self.signal(t, z_t) * v + self.noise(t, z_t) * z_t

    def min_snr_weight(self, t: Tensor, like: Tensor, gamma: float, predicted: str) -> Tensor:
        """Min-SNR-gamma weights of a squared error (Hang et al. 2023, section 3.4).

        With SNR = alpha_bar_t / (1 - alpha_bar_t), an error of z_0 has weight min(SNR, gamma). An
        error of eps is larger by SNR, one of v by SNR + 1, hence min(SNR, gamma) / SNR and
        / (SNR + 1).

        Args:
            t: Time steps, (B,) int64 in [0, T).
            like: Tensor that the weights multiply.
            gamma: Largest signal-to-noise ratio that counts, above 0.
            predicted: "eps" or "v".
        """
        snr = (self.signal(t, like) / self.noise(t, like)).square()  # shaped as `alpha_bar`
        return snr.clamp(max=gamma) / (snr + 1 if predicted == "v" else snr)


def time_pairs(T: int, steps: int, offset: int = 1) -> list[tuple[int, int]]:
    """The (t, t_prev) pairs that a sampler visits, noisiest first.

    t_k = floor(k T / S) + offset for k = 0..S-1, and t_prev of each pair is the t of the next one;
    the last one goes to t_0 - 1. With offset 1, as published with latent diffusion, that end is
    step 0 (alpha_bar = alphas_cumprod[0]); with offset 0 it is -1 (alpha_bar = 1). Steps that would
    leave the table (S = T) take offset 0. S need not divide T.

    Raises:
        UserError: `steps` is not in [1, T].
    """
    if not 1 <= steps <= T:
        raise UserError(f"sampling steps={steps} must be in [1, {T}], the training time steps")
    assert offset >= 0
    ascending = [k * T // steps for k in range(steps)]
    if ascending[-1] + offset >= T:
        offset = 0
    times = [t + offset for t in reversed(ascending)]
    return list(zip(times, [*times[1:], times[-1] - 1], strict=True))
