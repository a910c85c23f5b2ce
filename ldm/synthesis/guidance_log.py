"""What guidance did at each time step: sums over images, a table, and warnings."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm.synthesis.settings import Sampling

# Guidance shorter than 2% of the noise prediction at every step changes an image by less than the
# prediction's own error: the images are those of the unguided model.
WEAKEST_RATIO = 0.02
# Longer than the noise prediction itself, guidance decides where a step goes, and no longer what
# the model learned from data.
STRONGEST_RATIO = 1.0
# Multistep solvers extrapolate from the step before, and strong guidance changes faster from step
# to step than the noise prediction does: solvers of higher order then do worse than DDIM (Lu et al.
# 2022, "DPM-Solver++", section 3). A third of the prediction's length is a rule of thumb.
STRONGEST_RATIO_2M = 0.3
QUANTITIES = ("guidance_to_noise", "probability", "extrapolation_to_noise")


class Means(NamedTuple):
    """Means over images at one time step; None where that kind of guidance did not act."""

    t: float
    guidance_to_noise: float | None  # |classifier guidance| / |eps|
    probability: float | None  # p(y | z_t, t) of the wanted class
    extrapolation_to_noise: float | None  # of classifier-free guidance or autoguidance
    images: int


@dataclass
class GuidanceLog:
    """Sums over images, by time step."""

    # t -> the sum of each of `QUANTITIES`, None where it did not act.
    sums: dict[float, list[float | None]] = field(default_factory=dict)
    images: dict[float, int] = field(default_factory=dict)  # t -> number of images

    def add(self, times: Sequence[float], sums: Sequence[Sequence[float]], images: int) -> None:
        """Add a batch: per time step the three sums over its images, NaN for none."""
        for t, values in zip(times, sums, strict=True):
            known = [None if math.isnan(value) else value for value in values]
            if any(value is not None for value in known):
                self._add(t, known, images)

    def _add(self, t: float, values: Sequence[float | None], images: int) -> None:
        before = self.sums.get(t, [None] * len(QUANTITIES))
        pairs = zip(before, values, strict=True)
        self.sums[t] = [b if a is None else a + (b or 0.0) for a, b in pairs]
        self.images[t] = self.images.get(t, 0) + images

    def record(self) -> list[list]:
        """For a line of JSON; see `merge`."""
        return [[t, *values, self.images[t]] for t, values in self.sums.items()]

    def merge(self, record: list[list]) -> None:
        for t, *values, images in record:
            self._add(t, values, images)

    def __iter__(self) -> Iterator[Means]:
        """Means by time step, noisiest first."""
        for t in sorted(self.sums, reverse=True):
            count = self.images[t]
            means = [None if value is None else value / count for value in self.sums[t]]
            yield Means(t, *means, count)

    def table(self) -> str:
        """CSV."""
        lines = [",".join(("t", *QUANTITIES, "images"))]
        for t, *means, images in self:
            cells = ["" if value is None else f"{value:.6f}" for value in means]
            lines.append(",".join((f"{t:g}", *cells, str(images))))
        return "\n".join(lines) + "\n"

    def warnings(self, sampling: Sampling) -> Iterator[str]:
        """Sentences that name a time step, a ratio and the remedy, where guidance looks wrong."""
        further = "`cfg_scale`" if sampling.cfg_scale != 1 else "`autoguidance_scale`"
        strongest = (0.0, 0.0)  # ratio and its time step, of any guidance
        for quantity, option, clip in (
            ("guidance_to_noise", "`classifier_scale`", ", or set `guidance_clip`"),
            ("extrapolation_to_noise", further, ""),
        ):
            means = [(getattr(row, quantity), row.t) for row in self]
            known = [pair for pair in means if pair[0] is not None]
            if not known:
                continue
            ratio, t = max(known)
            strongest = max(strongest, (ratio, t))
            if ratio < WEAKEST_RATIO:
                yield (
                    f"{option}: guidance does almost nothing, at most {ratio:.4f} of the predicted "
                    f"noise (at t={t:g}); raise it"
                )
            elif ratio > STRONGEST_RATIO:
                yield (
                    f"{option}: guidance dominates, {ratio:.2f} times the predicted noise at "
                    f"t={t:g}; lower it{clip}, or leave such t out with `guidance_interval`"
                )
        ratio, t = strongest
        if sampling.sampler == "dpm++2m" and ratio > STRONGEST_RATIO_2M:
            yield (
                f"`sampler` dpm++2m: guidance is {ratio:.2f} times the predicted noise at t={t:g}, "
                "where a second-order solver may be worse than DDIM; compare with `sampler` ddim, "
                "take more steps or guide less"
            )
