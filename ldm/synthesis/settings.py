"""What decides a sampled image, beside the models."""

from dataclasses import dataclass

from ldm.errors import UserError

UNCONDITIONAL = "unconditional"  # folder of images that were made without a class
# What the label of a `Sampling` names: setting, its usual value, and how another one is named.
NAMED = (
    ("guidance_on", "z_t", "on-{}"),
    ("normalise", False, "norm"),
    ("clip", None, "clip{:g}"),
    ("temperature", 1, "temperature{:g}"),
    ("cfg_scale", 1, "cfg{:g}"),
    ("autoguidance_scale", 1, "autoguidance{:g}"),
    ("limit", None, "limit{:g}"),
    ("strength", None, "strength{:g}"),
    ("source_detail", None, "detail{:g}"),
)


@dataclass(frozen=True)
class Sampling:
    """What decides an image, beside the models."""

    # "ddim", "ddpm" or "dpm++2m" of noise schedules, "euler" or "heun" of rectified flows.
    sampler: str
    steps: int  # sampler steps, in [1, T]
    eta: float  # DDIM noise, in [0, 1]; DDPM has the noise of eta 1, all others none
    scale: float  # scale of classifier guidance; 0 without a classifier
    seed: int  # run seed of the noise
    # Training time steps (lowest, highest) that are guided in any way; None for all.
    interval: tuple[int, int] | None = None
    ema: bool = True  # averaged weights of the noise predictors
    guidance_on: str = "z_t"  # what the classifier looks at: "z_t", or the "z_0" predicted from it
    normalise: bool = False  # guidance is `scale` times as long as the predicted noise
    # Guidance is at most so many times as long as the predicted noise; None for no limit.
    clip: float | None = None
    temperature: float = 1.0  # the classifier's logits are divided by it
    # Of classifier-free guidance, for a model that takes labels; 1 is the labelled prediction
    # itself.
    cfg_scale: float = 1.0
    autoguidance_scale: float = 1.0  # of the extrapolation from a weaker model; 1 is none
    # Predicted clean latents are kept within [-limit, limit], for the samplers of flows; None for
    # no limit.
    limit: float | None = None
    # Images start from real tiles that are noised to this share of the way to pure noise, in (0,
    # 1]; None starts from noise.
    strength: float | None = None
    # This share of what the first stage loses of its source is added to each image, in (0, 1]; None
    # adds nothing.
    source_detail: float | None = None

    def __post_init__(self):
        if self.limit is not None and self.sampler not in ("euler", "heun"):
            raise UserError(f"limit={self.limit:g} is for euler and heun, not for {self.sampler}")
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
        for name, usual, text in NAMED:
            if getattr(self, name) != usual:
                parts.append(text.format(getattr(self, name)))
        parts.append(f"seed{self.seed}")
        if self.interval is not None:
            parts.append(f"t{self.interval[0]}-{self.interval[1]}")
        return "-".join(parts if self.ema else [*parts, "noema"])
