"""Settings of the evaluation classifier; the published ones are the defaults.

Imports nothing heavy, so that `eval.py --help` answers at once.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ldm.errors import UserError

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")
SCHEDULES = ("cosine", "tanh", "constant")
NO_AUGMENT = "none"
MATCHED_VALIDATIONS = 40  # of a run whose length is given in updates


@dataclass(frozen=True)
class Settings:
    """What decides a trained classifier beside its data and seed. Fields are named as the options.

    Defaults are those of the published script, with two differences in what they do:
    - `cooldown_epochs` is 0: the published 10 never ran, because its loop ended at `epochs`.
    - `warmup_epochs` None means 5, or a tenth of `epochs` where that is less.

    With `match_steps` a run is that many optimiser updates instead of `epochs`, and is validated
    `validations` times at equal distances: training sets of different sizes then get the same
    updates, the same schedule and equally many chances to be selected.
    """

    # Network
    arch: str = "vit_small"
    patch_size: int | None = None  # None: 16 for the short names, else the architecture's own
    input_size: int = 224
    avgpool_patchtokens: int = 0
    finetune: str | None = None
    checkpoint_key: str | None = None
    drop: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path: float = 0.1

    # Optimisation
    epochs: int = 300
    batch_size: int = 256
    opt: str = "adamw"
    lr: float = 5e-4  # at a batch of 512
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: int | None = None
    cooldown_epochs: int = 0
    match_steps: int | None = None
    validations: int | None = None  # None: 40, or as many as there are updates
    warmup_updates: int | None = None  # None: a tenth of match_steps
    sched: str = "cosine"
    weight_decay: float = 0.05
    momentum: float = 0.9
    clip_grad: float | None = None
    model_ema: bool = True
    model_ema_decay: float = 0.99996
    precision: str = "auto"

    # Augmentation
    crop_flip: bool = True
    d4: bool = False
    stain_jitter: float = 0.0
    smoothing: float = 0.1
    aa: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    train_interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which needs an even number of images in each."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def warmup(self) -> int:
        """Warm-up in epochs, or in updates with `match_steps`; resolved."""
        if self.match_steps is not None:
            tenth = self.match_steps // 10
            return tenth if self.warmup_updates is None else self.warmup_updates
        if self.warmup_epochs is None:
            return min(5, self.epochs // 10)
        return self.warmup_epochs

    def check(self) -> None:
        """UserError for values that contradict each other or would have no effect."""
        self._check_length()
        if self.mixes and self.batch_size % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be even, as mixup and cutmix pair images;"
                " change it or add --mixup 0 --cutmix 0"
            )
        if self.color_jitter != Settings.color_jitter and self.aa != NO_AUGMENT:
            raise UserError(
                f"--color-jitter {self.color_jitter} has no effect under --aa {self.aa}, which"
                " jitters colours itself; add --aa none"
            )
        if self.checkpoint_key and not self.finetune:
            raise UserError("--checkpoint_key names an entry of the file that --finetune gives")

    def _check_length(self) -> None:
        if self.match_steps is not None:
            for name in ("epochs", "warmup_epochs", "cooldown_epochs"):
                if getattr(self, name) != getattr(Settings, name):
                    instead = " and --warmup_updates" if name == "warmup_epochs" else ""
                    raise UserError(
                        f"--{name.replace('_', '-')} {getattr(self, name)}: --match_steps"
                        f" {self.match_steps} counts updates{instead}; leave one of them out"
                    )
            if (self.validations or 0) > self.match_steps:
                raise UserError(
                    f"--validations {self.validations} must be at most --match_steps"
                    f" {self.match_steps}; lower it"
                )
            if self.warmup >= self.match_steps:
                raise UserError(
                    f"--warmup_updates {self.warmup} must be less than --match_steps"
                    f" {self.match_steps}; lower it"
                )
            return
        for name in ("validations", "warmup_updates"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"--{name} {getattr(self, name)} belongs to --match_steps; give that, or leave"
                    " it out"
                )
        if self.warmup >= self.epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup} must be less than --epochs {self.epochs}; lower it"
            )
        if self.cooldown_epochs and self.sched == "constant":
            raise UserError("--cooldown-epochs needs a --sched that decays: cosine or tanh")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
