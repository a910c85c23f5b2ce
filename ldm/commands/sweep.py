"""Try guidance scales (and intervals, steps, samplers) and say which serves best.

The judge is a classifier of images from eval.py that took no part in the guidance; --real are
labelled tiles that neither the generator nor the judge was trained on. With a label adapter as -r
and without --classifier the scales are those of classifier-free guidance. Writes SWEEP/sweep.csv,
sweep.md, sweep.json, sweep.png (scores over the scale), tiles.png (the same noise under every
setting) and the tiles below SWEEP/tiles. The same command again makes what is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ldm.cli import (
    MOST,
    Ckpt,
    Commas,
    Count,
    Dir,
    NotNegative,
    Positive,
    Share,
    Whole,
    existing_path,
    like,
    option,
    output_path,
    parse,
    shown,
)
from ldm.devices import one_device
from ldm.errors import UserError
from ldm.files import remove_leftovers, require_outside
from ldm.settings import DeviceOption, LoaderOptions, ProcessOptions


def interval(text: str) -> tuple[int, int] | None:
    """`all` (None), or LOW:HIGH time steps."""
    if text == "all":
        return None
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit()) or int(low) > int(high):
        raise ValueError(f"{shown(text)} is neither all nor LOW:HIGH time steps")
    return int(low), int(high)


_tried = partial(option, group="what is tried")
_guidance = partial(option, group="guidance")
_images = partial(option, group="images")


@dataclass(frozen=True, kw_only=True)
class Options(DeviceOption):
    example: ClassVar = """\
--model DIFFUSION --classifier CLASSIFIER --real D/val \\
      --judge logs/eval/train5/seed0 --scales 0,3,10,30 -n 64 --out SWEEP"""

    model: Ckpt = option(..., "diffusion checkpoint or run folder", "-r", published=("--resume",))
    classifier: Ckpt | None = option(None, "noisy-latent classifier that guides")
    first_stage: Ckpt | None = option(None, "autoencoder with a fine-tuned decoder")
    judge: Ckpt = option(..., "checkpoint (or seed folder) from eval.py")
    real: Dir = option(..., "held-out real tiles, DIR/CLASS/images")
    out: Dir = option(..., "folder of the results")
    scales: Annotated[tuple[NotNegative, ...], Commas] = _tried(
        (0.0, 3.0, 10.0, 30.0),
        "guidance scales; 0 is unguided (classifier), 1 plain conditional (label adapter)",
        metavar="X,X",
    )
    intervals: Annotated[
        tuple[Annotated[tuple[Whole, Whole] | None, BeforeValidator(interval)], ...], Commas
    ] = _tried(
        (None,),
        "guided time steps, LOW:HIGH or all; if omitted all, for a flow up to 950",
        metavar="SPANS",
    )
    steps: Annotated[tuple[Count, ...], Commas] = _tried((25,), "sampling steps", metavar="N,N")
    samplers: (
        Annotated[tuple[Literal["ddim", "ddpm", "dpm++2m", "euler", "heun"], ...], Commas] | None
    ) = _tried(
        None,
        "among ddim, ddpm, dpm++2m, or euler, heun for a flow; if omitted ddim or euler",
        metavar="NAME,NAME",
    )
    latent_limit: Positive | None = _tried(
        None, "with euler and heun: keep predicted clean latents within +-X"
    )
    eta: Share = _tried(1.0, "DDIM noise, 0 is deterministic")
    guidance_on: Literal["z_t", "z_0"] = _guidance("z_t", "what the classifier sees")
    guidance_norm: bool = _guidance(False, "scale = |guidance| / |eps|")
    guidance_clip: Positive | None = _guidance(None, "largest |guidance| / |eps|")
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = _guidance(
        None, "temperature of the classifier; if omitted its calibrated one"
    )
    n_samples: Annotated[int, Field(ge=8, le=MOST)] = _images(64, "images per class", "-n")
    batch_size: Count = like(LoaderOptions, "batch_size", 32, help="images sampled together")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = _images(0, "seed of the noise")
    precision: Literal["auto", "32", "bf16"] | None = like(ProcessOptions, "precision", None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.classifier is None:
            for name in ("guidance_on", "guidance_norm", "guidance_clip", "temperature"):
                if getattr(self, name) != getattr(Options, name):
                    yield name, "needs --classifier; give one or leave it out"


def settings_of(args: Options, models) -> list:
    """The settings to try: every combination, but an unguided one once for all intervals."""
    from ldm.synthesis.settings import Sampling

    process, by_classifier = models.diffusion.schedule, models.classifier is not None
    usual, grid = process.guided_interval if by_classifier else None, []
    of_classifier = {
        "guidance_on": args.guidance_on,
        "normalise": args.guidance_norm,
        "clip": args.guidance_clip,
        "temperature": temperature_of(args, models),
    }
    for sampler, steps, span, scale in product(
        args.samplers or process.samplers[:1], args.steps, args.intervals, args.scales
    ):
        guided = scale != (0 if by_classifier else 1)
        values = of_classifier if by_classifier and guided else {}
        sampling = Sampling(
            sampler,
            steps,
            eta={"ddim": args.eta, "ddpm": 1.0}.get(sampler, 0.0),
            seed=args.seed,
            limit=args.latent_limit,
            scale=scale if by_classifier else 0.0,
            cfg_scale=1.0 if by_classifier else scale,
            interval=(span or usual) if guided else None,
            **values,
        )
        grid.append(sampling)
    return list(dict.fromkeys(grid))


def temperature_of(args: Options, models) -> float:
    """What divides the logits of the classifier; 1 without one."""
    if args.temperature is not None:
        return args.temperature
    return 1.0 if models.classifier is None else float(models.classifier.temperature)


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    real_root = existing_path(args.real, "--real", "tiles")
    existing_path(args.judge, "--judge")
    out = output_path(args.out, "--out", "dir")
    require_outside({"--out": out}, {"--real": real_root})
    remove_leftovers(out)

    from ldm.evaluation.sweep import Sweep, series
    from ldm.features.source import VIT, FeatureSource
    from ldm.synthesis.models import load_models

    devices = one_device(args.device).with_precision(args.precision)
    models = load_models(args.model, args.classifier, args.first_stage, devices.device)
    if models.classes is None:
        raise UserError(
            f"--model {args.model} takes no labels, so there is nothing to sweep over; give "
            "--classifier"
        )
    grid = settings_of(args, models)
    judge = FeatureSource(VIT, args.judge, setting="`judge`").open(devices.device)
    if judge.classes != models.classes:
        raise UserError(
            f"--judge {args.judge} knows the classes {judge.classes}, the models "
            f"{models.classes}; train it on folders with the same names"
        )
    sweep = Sweep(models, devices, judge, real_root, out, args.n_samples, args.batch_size)
    for position, sampling in enumerate(grid, 1):
        print(f"[{position}/{len(grid)}] {sampling.label}", flush=True)
        sweep.measure(sampling)
    chosen = sweep.write({"temperature": temperature_of(args, models)})
    print((out / "sweep.md").read_text(encoding="utf-8"), end="")
    option = "--cfg_scale" if models.classifier is None else "--classifier_scale"
    print(
        f"best by these numbers: {option} {chosen['scale']:g} ({series(chosen)}); a judge "
        f"overlooks what an eye sees, so look at {out}/tiles.png before you use it"
    )
