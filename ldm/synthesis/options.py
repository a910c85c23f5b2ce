"""The options of sample_diffusion.py, which `ldm.load(RUN).sample` takes too.

Imports nothing heavy, so that a command line can be checked before torch is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ldm.cli import (
    MOST,
    Ckpt,
    Count,
    Dir,
    NotNegative,
    Pixels,
    Positive,
    Share,
    Whole,
    like,
    option,
    shown,
)
from ldm.settings import (
    DEFAULT_COUNT,
    DEFAULT_SCALE,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    MACHINE,
    LoaderOptions,
    ProcessOptions,
)

_models = partial(option, group="models")
_images = partial(option, group="images")
_sampler = partial(option, group="sampler")
_guidance = partial(option, group="guidance")
_machine = partial(option, group=MACHINE)


def auto_as_none(text: str | float | None) -> str | float | None:
    """`auto` as None."""
    return None if text == "auto" else text


def part_of(text: str | tuple) -> tuple[int, int]:
    """The share that `3/16` means, as (3, 16)."""
    if not isinstance(text, str):
        return tuple(text)
    words = text.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"{shown(text)} is not of the form I/N, such as 0/16")
    part, count = map(int, words)
    if count > MOST:
        raise ValueError(f"{shown(text)}: there are at most {MOST} parts")
    if part >= count:
        raise ValueError(f"{shown(text)}: parts go from 0/{count} to {count - 1}/{count}")
    return part, count


@dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """Sample tiles from a latent diffusion model: unconditionally, or guided to classes.

    Writes OUT/CLASS/000000.png, manifest.csv, manifest.parquet, settings.json, guidance.csv,
    grid.png and README.md. The same command again makes what is missing.
    """

    program: ClassVar = "histodiffusion sample"
    example: ClassVar = """\
--model logs/ldm --classifier logs/classifier -n 100 -c 50 \\
      --classifier_scale 10 --out OUT"""

    model: Ckpt = _models(..., "diffusion checkpoint or run folder", "-r", published=("--resume",))
    classifier: Ckpt | None = _models(None, "noisy-latent classifier that guides")
    first_stage: Ckpt | None = _models(
        None, "autoencoder with a decoder fine-tuned on labels, to decode with"
    )
    autoguidance: Ckpt | None = _models(None, "earlier diffusion checkpoint to guide away from")
    ema: bool = _models(True, "use the averaged weights of the noise predictor", takes_value=True)

    n_samples: Count | None = _images(None, f"images per class; if omitted {DEFAULT_COUNT}", "-n")
    classes: str | None = _images(
        None, "classes to make, by name or index; if omitted, all", metavar="A,B"
    )
    counts: str | None = _images(None, "images of each class, by name or index", metavar="A=N,B=N")
    balance: Dir | None = _images(
        None, "fill each class of this training set up to the size of its largest, and add -n"
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = _images(0, "seed of the noise")
    out: Dir | None = _images(
        None,
        "folder of the images; if omitted RUN/samples/SETTINGS",
        "-l",
        published=("--outdir", "--logdir"),
    )
    out_size: Pixels | None = _images(None, "resize the images to this side", metavar="PIXELS")
    start_from: Dir | None = _images(
        None,
        "start from these real training tiles instead of noise: class folders, or tiles that "
        "--classifier labels",
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = _images(
        None,
        f"share of the way to noise that --start_from is noised to; if omitted {DEFAULT_STRENGTH}",
        metavar="S",
    )
    source_detail: Annotated[float, Field(gt=0, le=1)] | None = _images(
        None,
        "share of the fine detail that the first stage loses of --start_from, to be added to the "
        "images; if omitted none",
        metavar="D",
    )
    start_confidence: Share | None = _images(
        None,
        "least probability of a tile's class where --classifier labels --start_from",
        metavar="P",
    )
    tar: Count | None = _images(None, "also pack them, N to a tar shard", metavar="N")

    sampler: Literal["ddim", "ddpm", "dpm++2m", "euler", "heun"] | None = _sampler(
        None,
        "euler and heun are for rectified flows, the others for noise schedules; if omitted "
        "ddim, or euler for a flow",
    )
    vanilla_sample: bool = _sampler(False, "the same as --sampler ddpm", "-v")
    custom_steps: Count | None = _sampler(
        None,
        f"sampling steps; if omitted {DEFAULT_STEPS}, or all training time steps with ddpm",
        "-c",
    )
    eta: Share | None = _sampler(None, "DDIM noise, 0 is deterministic; if omitted 1", "-e")

    latent_limit: Positive | None = _sampler(
        None,
        "with euler and heun: keep predicted clean latents within +-X, which strong guidance "
        "would leave",
        metavar="X",
    )

    classifier_scale: NotNegative | None = _guidance(
        None, f"scale of classifier guidance, 0 for none; if omitted {DEFAULT_SCALE:g}"
    )
    guidance_on: Literal["z_t", "z_0"] | None = _guidance(
        None,
        "what the classifier looks at: the noisy latent, or the clean one predicted from it "
        "(slower); if omitted z_t",
    )
    guidance_norm: bool = _guidance(
        False, "make guidance SCALE times as long as the predicted noise, at every step"
    )
    guidance_clip: Positive | None = _guidance(
        None, "guidance is at most R times as long as the predicted noise", metavar="R"
    )
    temperature: (
        Annotated[float | None, Field(ge=1e-3, le=1e3), BeforeValidator(auto_as_none)] | None
    ) = _guidance(
        None,
        "divides the classifier's logits; auto (or omitted): as calibrated on validation",
        metavar="auto|VALUE",
    )
    cfg_scale: NotNegative | None = _guidance(
        None,
        "classifier-free guidance, for a model that takes labels: 1 (or omitted) is the labelled "
        "prediction, more goes beyond it",
        metavar="W",
    )
    autoguidance_scale: NotNegative | None = _guidance(
        None, "how far to go beyond the --autoguidance model; 1 would be no guidance", metavar="W"
    )
    guidance_interval: tuple[Whole, Whole] | None = _guidance(
        None,
        "guide only at training time steps in [LOW, HIGH]; of a flow, thousandths of the way to "
        "noise; if omitted everywhere, or up to 950 for a flow",
        nargs=2,
        metavar=("LOW", "HIGH"),
    )

    batch_size: Count = like(
        LoaderOptions, "batch_size", 32, help="images sampled together (8, 16, ... on a CPU)"
    )
    part: Annotated[tuple[int, int], BeforeValidator(part_of)] | None = _machine(
        None,
        "make only the I-th of N shares, 0/N to N-1/N, beside runs that make the others (job "
        "array); the command without it then writes the manifest",
        metavar="I/N",
    )
    compile: bool = _machine(False, "compile the networks: a slow start, then faster")

    def sampler_for(self, process) -> str:
        """The sampler for a model's process; the process's usual one if none is given."""
        return "ddpm" if self.vanilla_sample else self.sampler or process.samplers[0]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Options that exclude one another."""
        if self.vanilla_sample and self.sampler not in (None, "ddpm"):
            yield "sampler", f"{self.sampler}: --vanilla_sample means ddpm; leave one out"
        if self.part is not None and self.tar is not None:
            yield "tar", "packs all images; leave it out with --part, and give it without"
        other = "ddpm" if self.vanilla_sample else self.sampler
        if other not in (None, "ddim") and self.eta is not None:
            yield "eta", f"{self.eta:g} belongs to DDIM; leave it out with {other}"
        if self.start_from is None:
            for name in ("strength", "source_detail", "start_confidence"):
                if getattr(self, name) is not None:
                    yield name, "needs --start_from DIR; give it or leave this out"
        if self.counts is not None:
            for name, value in (("-n", self.n_samples), ("--classes", self.classes)):
                if value is not None:
                    yield "counts", f"says how many of which class; leave {name} out"
            if self.balance is not None:
                yield "counts", "says how many of each class, as --balance does; give one of them"
        yield from self._problems_of_guidance()

    def _problems_of_guidance(self) -> Iterator[tuple[str, str]]:
        names = ("classifier_scale", "guidance_on", "guidance_clip", "temperature", "guidance_norm")
        if self.classifier is None:
            for name in names:
                if getattr(self, name) not in (None, False):
                    yield name, "needs --classifier; give one or leave it out"
        if self.classifier_scale == 0:
            for name in ("guidance_on", "guidance_clip", "guidance_norm"):
                if getattr(self, name) not in (None, False):
                    yield name, "does nothing with --classifier_scale 0; leave it out"
        if self.guidance_norm and self.guidance_clip is not None:
            yield (
                "guidance_norm",
                "makes guidance as long as --classifier_scale says; leave --guidance_clip out, or "
                "lower the scale",
            )
        if (self.autoguidance is None) != (self.autoguidance_scale is None):
            missing = "autoguidance" if self.autoguidance is None else "autoguidance_scale"
            yield missing, "is missing: --autoguidance CKPT and --autoguidance_scale W go together"
        if self.autoguidance_scale == 1:
            yield "autoguidance_scale", "1 is no guidance; give more, such as 1.5"
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            low, high = self.guidance_interval
            yield "guidance_interval", f"{low} {high}: LOW must not be above HIGH"
