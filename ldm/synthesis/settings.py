"""What decides a sampled image, beside the models."""

from dataclasses import dataclass

from ldm.errors import UserError

UNCONDITIONAL = "unconditional"  # folder of images that were made without a class
SAMPLERS = ("ddim", "ddpm", "dpm++2m", "euler", "heun")
GUIDED_ON = ("z_t", "z_0")


@dataclass(frozen=True)
class Sampling:
    """What decides an image, beside the models.

    Attributes:
        sampler: One of `SAMPLERS`; the last two are for rectified flows, the others for noise
            schedules.
        steps: Sampler steps, in [1, T].
        eta: DDIM noise, in [0, 1]; DDPM has the noise of eta 1, all others none.
        scale: Scale of classifier guidance; 0 without a classifier.
        seed: Run seed of the noise.
        interval: Training time steps (lowest, highest) that are guided in any way; None for all.
        ema: Averaged weights of the noise predictors.
        guidance_on: Whether the classifier looks at z_t or at the z_0 predicted from it.
        normalise: Guidance is `scale` times as long as the predicted noise.
        clip: Guidance is at most so many times as long as the predicted noise; None for no limit.
        temperature: The classifier's logits are divided by it.
        cfg_scale: Of classifier-free guidance, for a model that takes labels; 1 is the labelled
            prediction itself.
        autoguidance_scale: Of the extrapolation from a weaker model; 1 is none.
        limit: Predicted clean latents are kept within [-limit, limit], for the samplers of flows;
            None for no limit.
        strength: Images start from real tiles that are noised to this share of the way to pure
            noise, in (0, 1]; None starts from noise.
    """

    sampler: str
    steps: int
    eta: float
    scale: float
    seed: int
    interval: tuple[int, int] | None = None
    ema: bool = True
    guidance_on: str = "z_t"
    normalise: bool = False
    clip: float | None = None
    temperature: float = 1.0
    cfg_scale: float = 1.0
    autoguidance_scale: float = 1.0
    limit: float | None = None
    strength: float | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} must be one of {', '.join(SAMPLERS)}")
        if self.limit is not None and self.sampler not in ("euler", "heun"):
            raise UserError(f"limit={self.limit:g} is for euler and heun, not for {self.sampler}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} must be above 0 and at most 1")
        if self.guidance_on not in GUIDED_ON:
            raise UserError(f"guidance_on={self.guidance_on!r} must be one of z_t, z_0")
        if self.cfg_scale != 1 and self.autoguidance_scale != 1:
            raise UserError(
                f"cfg_scale={self.cfg_scale:g} and autoguidance_scale={self.autoguidance_scale:g}: "
                "both extrapolate the same prediction; set one of them to 1"
            )

    @property
    def label(self) -> str:
        """A folder name for images made this way."""
        parts = [f"{self.sampler}{self.steps}"]
        if self.sampler == "ddim":
            parts.append(f"eta{self.eta:g}")
        parts.append(f"scale{self.scale:g}")
        if self.guidance_on != "z_t":
            parts.append(f"on-{self.guidance_on}")
        if self.normalise:
            parts.append("norm")
        if self.clip is not None:
            parts.append(f"clip{self.clip:g}")
        for name in ("temperature", "cfg_scale", "autoguidance_scale"):
            if getattr(self, name) != 1:
                parts.append(f"{name.removesuffix('_scale')}{getattr(self, name):g}")
        if self.limit is not None:
            parts.append(f"limit{self.limit:g}")
        if self.strength is not None:
            parts.append(f"strength{self.strength:g}")
        parts.append(f"seed{self.seed}")
        if self.interval is not None:
            parts.append(f"t{self.interval[0]}-{self.interval[1]}")
        return "-".join(parts if self.ema else [*parts, "noema"])
