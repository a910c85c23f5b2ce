"""Settings of the evaluation classifier; the published ones are the defaults.

Imports nothing heavy, so that `eval.py --help` answers at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from ldm.cli import Count, File, NotNegative, Pixels, Rate, Share, Whole, option
from ldm.errors import Problems

NO_AUGMENT = "none"
MATCHED_VALIDATIONS = 40  # of a run whose length is given in updates

_network = partial(option, group="network")
_training = partial(option, group="optimisation")
_augment = partial(option, group="augmentation")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a trained classifier beside its data and seed. Fields are named as the options.

    Defaults are those of the published script, with two differences in what they do:
    - `cooldown_epochs` is 0: the published 10 never ran, because its loop ended at `epochs`.
    - `warmup_epochs` None means 5, or a tenth of `epochs` where that is less.

    With `match_steps` a run is that many optimiser updates instead of `epochs`, and is validated
    `validations` times at equal distances: training sets of different sizes then get the same
    updates, the same schedule and equally many chances to be selected.
    """

    arch: str = _network("vit_small", "vit_tiny, vit_small, vit_base, vit_large or any timm name")
    patch_size: Count | None = _network(
        None, "pixels; if omitted 16 with the four names above, else the architecture's own"
    )
    input_size: Pixels = _network(224, "pixels")
    avgpool_patchtokens: Annotated[int, Field(ge=0, le=1)] = _network(
        0, "1: mean of the patch tokens instead of the class token"
    )
    finetune: File | None = _network(
        None,
        "local weights to start from; if omitted, training starts from scratch",
        published=("--pretrained_weights",),
    )
    checkpoint_key: str | None = _network(
        None,
        "entry of FILE that holds the weights, for example teacher; if omitted, it is found",
        metavar="ENTRY",
    )
    drop: Share = _network(0.0, "dropout before the head")
    attn_drop_rate: Share = _network(0.0, "dropout of attention weights")
    drop_path: Share = _network(0.1, "stochastic depth")

    epochs: Count = _training(300, "passes over the training set")
    batch_size: Count = _training(
        256, "images per step, of all devices together; a smaller set makes one smaller batch"
    )
    real_share: Annotated[float, Field(gt=0, lt=1)] | None = _training(
        None,
        "share of the drawn images that are real tiles, the rest synthetic or pseudo-labelled "
        "ones that `histodiffusion select` added; if omitted as the folder has them",
        metavar="S",
    )
    opt: str = _training("adamw", "any timm optimizer")
    lr: Rate = _training(5e-4, "learning rate at a batch of 512, scaled to the batch")
    min_lr: Rate = _training(1e-5, "least learning rate of the schedule")
    warmup_lr: Rate = _training(1e-6, "learning rate at which the warm-up starts")
    warmup_epochs: Whole | None = _training(
        None, "if omitted 5, or a tenth of the epochs where that is less"
    )
    cooldown_epochs: Whole = _training(0, "further epochs at the least learning rate")
    match_steps: Count | None = _training(
        None,
        "exactly N updates instead of `epochs`, whatever the set's size, so that training sets "
        "of different sizes compare",
        metavar="N",
    )
    validations: Count | None = _training(
        None,
        "with `match_steps`: validate V times at equal distances; if omitted "
        f"{MATCHED_VALIDATIONS}, or as many times as there are updates",
        metavar="V",
    )
    warmup_updates: Whole | None = _training(
        None, "with `match_steps`: updates of warm-up; if omitted a tenth", metavar="W"
    )
    sched: Literal["cosine", "tanh", "constant"] = _training("cosine", "learning rate schedule")
    weight_decay: NotNegative = _training(0.05, "weight decay")
    momentum: Share = _training(0.9, "momentum of the optimizers that have one, for example sgd")
    clip_grad: NotNegative | None = _training(
        None, "largest gradient norm; if omitted, gradients are not clipped", metavar="NORM"
    )
    model_ema: bool = _training(
        True, "evaluate the moving average of the weights", off=("--no_model_ema",)
    )
    model_ema_decay: Annotated[float, Field(ge=0, le=0.9999999)] = _training(
        0.99996, "decay of the moving average per step, after a warm-up of (1 + n) / (10 + n)"
    )
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = option(
        "auto", "auto stands for the precision of the device", group="run"
    )

    crop_flip: bool = _augment(
        True,
        "random resized crops and mirroring; without: the centre, as in the evaluation",
        off=("--no_crop_flip",),
    )
    d4: bool = _augment(False, "turn by quarters and mirror both ways, as suits tissue")
    stain_jitter: Annotated[float, Field(ge=0, le=0.99)] = _augment(
        0.0,
        "multiply haematoxylin, eosin and the rest by random numbers in [1 - S, 1 + S], as other "
        "laboratories would; 0 for none",
        metavar="S",
    )
    smoothing: Annotated[float, Field(ge=0, le=0.99)] = _augment(0.1, "label smoothing")
    aa: str = _augment(
        "rand-m9-mstd0.5-inc1", "timm augmentation policy, or none", metavar="POLICY"
    )
    color_jitter: NotNegative = _augment(
        0.4, "strength, with `aa` none (a policy jitters colours itself)"
    )
    train_interpolation: Literal["random", "bilinear", "bicubic"] = _augment(
        "bicubic", "interpolation of random resized crops"
    )
    reprob: Share = _augment(0.25, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = _augment("pixel", "what random erasing fills in")
    recount: Count = _augment(1, "most areas erased in an image")
    mixup: NotNegative = _augment(0.8, "mixup alpha; 0 for none")
    cutmix: NotNegative = _augment(1.0, "cutmix alpha; 0 for none")
    mixup_prob: Share = _augment(1.0, "share of the batches that are mixed")
    mixup_switch_prob: Share = _augment(
        0.5, "share of the mixed batches that cutmix takes when both are on"
    )
    mixup_mode: Literal["batch", "pair", "elem"] = _augment("batch", "what shares one mixing ratio")

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
        """Raise `Problems` if values contradict each other or would have no effect."""
        found = dict(self.problems())
        if found:
            raise Problems(found)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Settings that contradict others or have no effect, and why."""
        if self.match_steps is None:
            yield from self._problems_of_epochs()
        else:
            yield from self._problems_of_updates(self.match_steps)
        if self.mixes and self.batch_size % 2:
            yield (
                "batch_size",
                f"{self.batch_size} must be even, as mixup and cutmix pair images; change it, or "
                "set mixup and cutmix to 0",
            )
        if self.color_jitter != Settings.color_jitter and self.aa != NO_AUGMENT:
            yield (
                "color_jitter",
                f"{self.color_jitter} has no effect with aa {self.aa}, which jitters colours "
                "itself; set aa to none",
            )
        if self.checkpoint_key and not self.finetune:
            yield "checkpoint_key", "names an entry of the file finetune; give that too"

    def _problems_of_epochs(self) -> Iterator[tuple[str, str]]:
        for name in ("validations", "warmup_updates"):
            value = getattr(self, name)
            if value is not None:
                yield name, f"{value} belongs to match_steps; give that, or leave it out"
        if self.warmup >= self.epochs:
            yield "warmup_epochs", f"{self.warmup} must be less than epochs {self.epochs}; lower it"
        if self.cooldown_epochs and self.sched == "constant":
            yield "cooldown_epochs", "needs a sched that decays: cosine or tanh"

    def _problems_of_updates(self, steps: int) -> Iterator[tuple[str, str]]:
        for name in ("epochs", "warmup_epochs", "cooldown_epochs"):
            if getattr(self, name) != getattr(Settings, name):
                instead = " and warmup_updates" if name == "warmup_epochs" else ""
                yield (
                    name,
                    f"{getattr(self, name)}: match_steps {steps} counts updates{instead}; leave "
                    "one of them out",
                )
        if (self.validations or 0) > steps:
            yield "validations", f"{self.validations} must be at most match_steps {steps}; lower it"
        if self.warmup >= steps:
            yield "warmup_updates", f"{self.warmup} must be less than match_steps {steps}; lower it"
