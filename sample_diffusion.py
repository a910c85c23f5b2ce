"""Sample tiles from a latent diffusion model, with or without classifier guidance."""

import sys
from pathlib import Path

from ldm.cli import ArgumentParser, boolean, number, resolve_device, run_command
from ldm.errors import UserError

DEFAULT_STEPS = 50
DEFAULT_SCALE = 10.0


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sample_diffusion.py",
        description="Sample tiles: OUTDIR/CLASS/000000.png, manifest.csv, settings.json, grid.png. "
        "The same command again makes what is missing.",
    )
    add = parser.add_argument
    add("-r", "--resume", required=True, metavar="CKPT", help="diffusion checkpoint or run folder")
    add("-n", "--n_samples", type=number(int, 1), default=10, help="images per class")
    add(
        "-c",
        "--custom_steps",
        type=number(int, 1),
        help=f"sampling steps ({DEFAULT_STEPS} when not given, all training time steps with "
        "--vanilla_sample)",
    )
    add(
        "-e",
        "--eta",
        type=number(float, 0, 1),
        help="DDIM noise, 0 deterministic (1.0 when not given)",
    )
    add("-v", "--vanilla_sample", action="store_true", help="DDPM ancestral sampling, not DDIM")
    add(
        "-l",
        "--logdir",
        "--outdir",
        dest="outdir",
        metavar="DIR",
        help="folder of the images (RUN/samples/SETTINGS when not given)",
    )
    add("--classifier", metavar="CKPT", help="noisy-latent classifier that guides")
    add(
        "--classifier_scale",
        type=number(float, 0),
        help=f"guidance scale, 0 for none ({DEFAULT_SCALE:g} when not given)",
    )
    add("--classes", metavar="A,B", help="classes to make (all when not given)")
    add(
        "--guidance_interval",
        nargs=2,
        type=number(int, 0),
        metavar=("LOW", "HIGH"),
        help="guide only at training time steps in [LOW, HIGH]",
    )
    add(
        "--first_stage",
        metavar="CKPT",
        help="autoencoder with a decoder fine-tuned on labels, to decode with",
    )
    add(
        "--batch_size",
        type=number(int, 1),
        default=32,
        help="images sampled together (8, 16, ... on a CPU)",
    )
    add("--seed", type=number(int, 0), default=0, help="seed of the noise")
    add("--ema", type=boolean, default=True, help="averaged weights of the noise predictor")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    return parser


def check_options(args) -> None:
    """Options that exclude one another, before anything is loaded."""
    if args.vanilla_sample and args.eta is not None:
        raise UserError(f"--eta {args.eta:g} belongs to DDIM; leave it out with --vanilla_sample")
    if args.classifier is None:
        for name in ("classifier_scale", "classes", "guidance_interval"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs --classifier; give one or leave it out")
    if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
        low, high = args.guidance_interval
        raise UserError(f"--guidance_interval {low} {high}: LOW must not be above HIGH")


def choose_classes(text: str | None, known: list[str]) -> list[str]:
    """The classes of `--classes A,B`, in the classifier's order; UserError for an unknown one."""
    if text is None:
        return known
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UserError(
            f"--classes {text}: unknown {', '.join(unknown) or 'empty list'}; the classifier knows "
            f"{', '.join(known)}"
        )
    return [name for name in known if name in wanted]


def default_outdir(checkpoint: Path, label: str) -> Path:
    """RUN/samples/LABEL for RUN/checkpoints/x.ckpt, else a folder beside the checkpoint."""
    parent = checkpoint.parent
    run = parent.parent if parent.name == "checkpoints" else parent
    return run / "samples" / label


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check_options(args)

    from ldm.checkpoint import checkpoint_path
    from ldm.synthesis import (
        UNCONDITIONAL,
        SampleFolder,
        Sampling,
        Synthesiser,
        load_models,
        make_settings,
        synthesise,
    )

    device = resolve_device(args.device)
    diffusion, classifier, files = load_models(
        args.resume, args.classifier, args.first_stage, device
    )
    T = diffusion.schedule.T
    steps = args.custom_steps or (T if args.vanilla_sample else min(DEFAULT_STEPS, T))
    if steps > T:
        raise UserError(f"--custom_steps {steps} must be in [1, {T}], the training time steps")
    scale = DEFAULT_SCALE if args.classifier_scale is None else args.classifier_scale
    sampling = Sampling(
        sampler="ddpm" if args.vanilla_sample else "ddim",
        steps=steps,
        eta=1.0 if args.eta is None else args.eta,
        scale=scale if classifier is not None else 0.0,
        interval=tuple(args.guidance_interval) if args.guidance_interval else None,
        seed=args.seed,
        ema=args.ema,
    )
    known = [UNCONDITIONAL] if classifier is None else classifier.classes
    names = choose_classes(args.classes, known)
    checkpoint = checkpoint_path(args.resume, "--resume")
    outdir = Path(args.outdir) if args.outdir else default_outdir(checkpoint, sampling.label)
    classes = None if classifier is None else classifier.classes
    about = {"command": sys.argv, "resume": str(args.resume), "classifier": args.classifier}
    folder = SampleFolder(outdir, make_settings(sampling, files, classes), about)
    synthesiser = Synthesiser(diffusion, classifier, sampling)
    made = synthesise(synthesiser, folder, names, args.n_samples, args.batch_size)
    print(f"{made} images of {len(names)} classes in {outdir}")
    return 0


if __name__ == "__main__":
    run_command(main)
