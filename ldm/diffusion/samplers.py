"""Samplers from noise to clean latents, as functions over a noise predictor.

Contract: `eps_fn(z_t, t) -> eps_pred` with z_t (B, C, H, W) and t (B,), int64 for a noise schedule
and float32 for a rectified flow. All noise comes from the caller (`noise_fn(j)` for step
j = 0..S-1, noisiest first): a sampler draws no random numbers itself.

| variable | in the DDIM paper (Song et al. 2021) |
|---|---|
| `alpha_bar_t`, `alpha_bar_prev` | alpha_t and alpha_{t-1}, eq. 12 |
| `sigma_t` | sigma_t, the deviation of the noise added, eq. 16 |
| `z_0_pred` | predicted x_0, eq. 9 |
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError

EpsFn = Callable[[Tensor, Tensor], Tensor]
NoiseFn = Callable[[int], Tensor]


class Step(NamedTuple):
    """State that a sampler reports after each step."""

    j: int  # step of the sampler, 0 = noisiest
    t: float  # training time step that the network saw
    t_prev: float  # time step of `z`
    z: Tensor  # latents after the step, (B, C, H, W)
    z_0_pred: Tensor  # clean latents as predicted at t, (B, C, H, W)


class IndexedNoise:
    """Standard normal noise that depends on (seed, class, image, step) only.

    So an image is the same in any batch, at any position, on any device: values are drawn in
    float32 on the CPU, then moved. It uses NumPy's Philox because torch's CPU generator keeps only
    32 bits of its seed: among 100,000 images, about one pair would share all its noise.

    Args:
        seed: Seed of the run, at least 0.
        class_index: Class of the images, one for all or one per image; -1 for unconditional images.
        indices: Number of each image within its class, (B,).
        shape: Shape of one latent, (C, H, W).
    """

    def __init__(
        self,
        seed: int,
        class_index: int | Sequence[int],
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        indices = [int(i) for i in indices]
        classes = [class_index] * len(indices) if isinstance(class_index, int) else class_index
        # SeedSequence takes no negative numbers, hence + 1.
        self._keys = [(seed, int(c) + 1, i) for c, i in zip(classes, indices, strict=True)]
        self._shape = tuple(shape)
        self._device = device

    def _draw(self, stream: int) -> Tensor:
        draws = [
            np.random.Generator(
                np.random.Philox(np.random.SeedSequence((*key, stream)))
            ).standard_normal(self._shape, dtype=np.float32)
            for key in self._keys
        ]
        noise = torch.from_numpy(np.stack(draws))  # (B, C, H, W)
        if torch.device(self._device).type == "cuda":
            return noise.pin_memory().to(self._device, non_blocking=True)  # overlaps other work
        return noise.to(self._device)

    def initial(self) -> Tensor:
        """z_T, (B, C, H, W)."""
        return self._draw(0)

    def __call__(self, j: int) -> Tensor:
        """Noise of sampler step j, (B, C, H, W)."""
        return self._draw(j + 1)


def ddim(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    z_T: Tensor,
    pairs: Sequence[tuple[int, int]],
    eta: float = 0.0,
    noise_fn: NoiseFn | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12).

    Args:
        eps_fn: Noise predictor, possibly guided.
        z_T: Standard normal latents, (B, C, H, W).
        pairs: From `time_pairs`.
        eta: 0 is deterministic, 1 has the posterior variance of DDPM.
        noise_fn: Needed when eta > 0.
        on_step: Called after each step.

    Returns:
        The latents at the last t_prev, (B, C, H, W).

    Raises:
        UserError: when eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must be in [0, 1] (0 deterministic, 1 as noisy as DDPM)")
    assert eta == 0 or noise_fn is not None
    z = z_T
    for j, (t, t_prev) in enumerate(pairs):
        steps = schedule.times(t, len(z), z.device)  # (B,)
        eps_pred = eps_fn(z, steps)
        z_0_pred = schedule.predict_z_0(z, steps, eps_pred)
        # Scalars in float64; the latents keep their type.
        alpha_bar_t, alpha_bar_prev = _alpha_bars(schedule, t, t_prev)
        sigma_t = (
            eta
            * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)) ** 0.5
        )
        direction = max(1 - alpha_bar_prev - sigma_t**2, 0.0) ** 0.5
        z = alpha_bar_prev**0.5 * z_0_pred + direction * eps_pred
        if sigma_t > 0:
            z = z + sigma_t * noise_fn(j)
        if on_step is not None:
            on_step(Step(j, t, t_prev, z, z_0_pred))
    return z


def ddpm(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    z_T: Tensor,
    noise_fn: NoiseFn,
    pairs: Sequence[tuple[int, int]] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, eqs. 6 and 7).

    Args: as in `ddim`. If `pairs` is omitted, all T steps are taken, down to the clean end. On a
    subsequence of steps the posterior q(z_prev | z_t, z_0) is that of the shortened chain.
    """
    pairs = time_pairs(schedule.T, schedule.T) if pairs is None else pairs
    z = z_T
    for j, (t, t_prev) in enumerate(pairs):
        steps = schedule.times(t, len(z), z.device)  # (B,)
        z_0_pred = schedule.predict_z_0(z, steps, eps_fn(z, steps))
        alpha_bar_t, alpha_bar_prev = _alpha_bars(schedule, t, t_prev)
        alpha = alpha_bar_t / alpha_bar_prev  # of the step t_prev -> t
        weight_z_0 = alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar_t)
        weight_z_t = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        z = weight_z_0 * z_0_pred + weight_z_t * z
        variance = (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        if variance > 0:
            z = z + variance**0.5 * noise_fn(j)
        if on_step is not None:
            on_step(Step(j, t, t_prev, z, z_0_pred))
    return z


def dpm_solver_pp_2m(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    z_T: Tensor,
    pairs: Sequence[tuple[int, int]],
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2), deterministic.

    It is a multistep method of second order in lambda = log(alpha / sigma) on the predicted clean
    latent. The first and the last step are of first order, like DDIM's: before the first there is
    no prediction to extrapolate from, and in the last one lambda grows without bound.

    Args: as in `ddim`, without noise.
    """
    z, last = z_T, len(pairs) - 1
    z_0_before, h_before = None, None
    for j, (t, t_prev) in enumerate(pairs):
        steps = schedule.times(t, len(z), z.device)  # (B,)
        z_0_pred = schedule.predict_z_0(z, steps, eps_fn(z, steps))
        alpha_bar_t, alpha_bar_prev = _alpha_bars(schedule, t, t_prev)
        # exp(-lambda) at both ends; 0 at the clean one.
        ratio_t = ((1 - alpha_bar_t) / alpha_bar_t) ** 0.5
        ratio_prev = ((1 - alpha_bar_prev) / alpha_bar_prev) ** 0.5
        data = z_0_pred
        if j < last:
            h = math.log(ratio_t / ratio_prev)  # step in lambda, above 0
            if j > 0:
                data = z_0_pred + h / (2 * h_before) * (z_0_pred - z_0_before)
            z_0_before, h_before = z_0_pred, h
        shrink = ((1 - alpha_bar_prev) / (1 - alpha_bar_t)) ** 0.5
        z = shrink * z + alpha_bar_prev**0.5 * (1 - ratio_prev / ratio_t) * data
        if on_step is not None:
            on_step(Step(j, t, t_prev, z, z_0_pred))
    return z


def euler(
    eps_fn: EpsFn,
    process: Process,
    z_T: Tensor,
    pairs: Sequence[tuple[float, float]],
    limit: float | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Euler's method along a rectified flow, deterministic: z moves by (s_prev - s) (eps - z_0).

    Args: as in `ddim`, without noise, and
        limit: Predicted clean latents are clamped to [-limit, limit], and the noise is computed
            from z_t and them. None for no limit.
    """
    z = z_T
    for j, (t, t_prev) in enumerate(pairs):
        z_0_pred, eps_pred = _limited(eps_fn, process, z, t, limit)
        z = process.q_sample(z_0_pred, process.times(t_prev, len(z), z.device), eps_pred)
        if on_step is not None:
            on_step(Step(j, t, t_prev, z, z_0_pred))
    return z


def heun(
    eps_fn: EpsFn,
    process: Process,
    z_T: Tensor,
    pairs: Sequence[tuple[float, float]],
    limit: float | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Heun's method along a rectified flow: two evaluations a step, of second order, deterministic.

    Each step follows the mean of the velocities at its both ends. The last step, whose end is
    clean, is Euler's (as in Karras et al. 2022, algorithm 1).

    Args: as in `euler`.
    """
    z = z_T
    for j, (t, t_prev) in enumerate(pairs):
        z_0_pred, eps_pred = _limited(eps_fn, process, z, t, limit)
        end = process.times(t_prev, len(z), z.device)
        z_next = process.q_sample(z_0_pred, end, eps_pred)
        if j < len(pairs) - 1:
            z_0_end, eps_end = _limited(eps_fn, process, z_next, t_prev, limit)
            velocity = ((eps_pred - z_0_pred) + (eps_end - z_0_end)) / 2
            z_next = z + (t_prev - t) / process.T * velocity
        z = z_next
        if on_step is not None:
            on_step(Step(j, t, t_prev, z, z_0_pred))
    return z


def _limited(
    eps_fn: EpsFn, process: Process, z: Tensor, t: float, limit: float | None
) -> tuple[Tensor, Tensor]:
    """The predicted clean latents, clamped to the limit, and the matching noise."""
    steps = process.times(t, len(z), z.device)  # (B,)
    eps_pred = eps_fn(z, steps)
    z_0_pred = process.predict_z_0(z, steps, eps_pred)
    if limit is None:
        return z_0_pred, eps_pred
    z_0_pred = z_0_pred.clamp(-limit, limit)
    return z_0_pred, process.predict_eps(z, steps, z_0_pred)


def sample(
    name: str,
    eps_fn: EpsFn,
    process: Process,
    z_T: Tensor,
    pairs: Sequence[tuple[float, float]],
    eta: float = 0.0,
    noise_fn: NoiseFn | None = None,
    limit: float | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Run the sampler of this name, one of `process.samplers`; see the functions above."""
    common = (eps_fn, process, z_T)
    if name == "ddim":
        return ddim(*common, pairs, eta, noise_fn, on_step)
    if name == "ddpm":
        return ddpm(*common, noise_fn, pairs, on_step)
    if name == "dpm++2m":
        return dpm_solver_pp_2m(*common, pairs, on_step)
    return {"euler": euler, "heun": heun}[name](*common, pairs, limit, on_step)


def _alpha_bars(schedule: NoiseSchedule, t: int, t_prev: int) -> tuple[float, float]:
    alpha_bar_prev = schedule.alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
    return schedule.alphas_cumprod[t].item(), alpha_bar_prev
