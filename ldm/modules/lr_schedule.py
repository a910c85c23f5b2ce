"""Learning-rate factors by optimiser step."""

import math
from collections.abc import Sequence

from ldm.errors import UserError


class LambdaLinearScheduler:
    """Linear warm-up, then a linear slope, in one or more cycles (names of published configs).

    Within a cycle the factor rises from `f_start` to `f_max` over `warm_up_steps`, then moves
    linearly to `f_min` at the cycle's end. Use an instance as the function of
    `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        warm_up_steps, cycle_lengths: Optimiser steps, one entry per cycle.
        f_start, f_max, f_min: Factors of the base learning rate, one entry per cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
    ):
        lengths = {len(warm_up_steps), len(f_min), len(f_max), len(f_start), len(cycle_lengths)}
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(
                "scheduler_config: warm_up_steps, f_min, f_max, f_start and cycle_lengths must be "
                "lists of one length"
            )
        self.cycles = list(zip(warm_up_steps, cycle_lengths, f_start, f_max, f_min, strict=True))

    def __call__(self, step: int) -> float:
        """Factor of the base learning rate at optimiser step `step`, counted from 0."""
        for warm_up, length, f_start, f_max, f_min in self.cycles:
            if step < warm_up:
                return f_start + (f_max - f_start) * step / warm_up
            if step < length:
                # Measured from the cycle's start, as the published schedule does.
                return f_min + (f_max - f_min) * (length - step) / length
            step -= length
        return self.cycles[-1][-1]


class LinearAnneal:
    """Factor that falls linearly from 1 to 0 over `total_steps` (`anneal_lr`)."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        return max(0.0, 1.0 - step / self.total_steps)


class WarmupCosine:
    """Linear warm-up, a plateau at 1, then half a cosine down to `f_min`.

    Args:
        warm_up_steps: Optimiser steps until the factor is 1.
        total_steps: Optimiser steps of the whole training; later ones stay at `f_min`.
        plateau: Share of `total_steps` before the descent begins, in [0, 1).
        f_min: Last factor, in [0, 1].
    """

    def __init__(
        self, warm_up_steps: int, total_steps: int, plateau: float = 0.0, f_min: float = 0.0
    ):
        if not 0 <= warm_up_steps <= total_steps or total_steps < 1:
            raise UserError(
                f"scheduler_config: warm_up_steps={warm_up_steps} must be in [0, total_steps="
                f"{total_steps}], and total_steps above 0"
            )
        if not 0 <= plateau < 1 or not 0 <= f_min <= 1:
            raise UserError(
                f"scheduler_config: plateau={plateau} must be in [0, 1), f_min={f_min} in [0, 1]"
            )
        self.warm_up_steps, self.total_steps = warm_up_steps, total_steps
        self.plateau, self.f_min = plateau, f_min

    def __call__(self, step: int) -> float:
        """Factor of the base learning rate at optimiser step `step`, counted from 0."""
        warm_up = min(1.0, (step + 1) / self.warm_up_steps) if self.warm_up_steps else 1.0
        done = (min(step / self.total_steps, 1.0) - self.plateau) / (1 - self.plateau)
        fall = (1 + math.cos(math.pi * max(0.0, done))) / 2
        return warm_up * (self.f_min + (1 - self.f_min) * fall)
