"""Sample tiles from a latent diffusion model: unconditionally, or guided to classes."""

import argparse
import sys
from pathlib import Path

from ldm.cli import ArgumentParser, boolean, number, run_command
from ldm.devices import shared_devices
from ldm.errors import UserError

DEFAULT_STEPS = 50
DEFAULT_SCALE = 10.0
DEFAULT_COUNT = 10


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sample_diffusion.py",
        description="Sample tiles: OUTDIR/CLASS/000000.png, manifest.csv, manifest.parquet, "
        "settings.json, guidance.csv, grid.png, README.md. The same command again makes what is "
        "missing.",
    )
    add = parser.add_argument_group("models").add_argument
    add("-r", "--resume", required=True, metavar="CKPT", help="diffusion checkpoint or run folder")
    add("--classifier", metavar="CKPT", help="noisy-latent classifier that guides")
    add(
        "--first_stage",
        metavar="CKPT",
        help="autoencoder with a decoder fine-tuned on labels, to decode with",
    )
    add("--autoguidance", metavar="CKPT", help="earlier diffusion checkpoint to guide away from")
    add("--ema", type=boolean, default=True, help="averaged weights of the noise predictor")

    add = parser.add_argument_group("images").add_argument
    add(
        "-n",
        "--n_samples",
        type=number(int, 1),
        help=f"images per class ({DEFAULT_COUNT} when not given)",
    )
    add("--classes", metavar="A,B", help="classes to make, by name or index (all when not given)")
    add("--counts", metavar="A=N,B=N", help="images of each class, by name or index")
    add(
        "--balance",
        metavar="DIR",
        help="fill each class of this training set up to the size of its largest, and add -n",
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise")
    add(
        "-l",
        "--logdir",
        "--outdir",
        dest="outdir",
        metavar="DIR",
        help="folder of the images (RUN/samples/SETTINGS when not given)",
    )
    add("--out_size", type=number(int, 1), metavar="PIXELS", help="resize the images to this side")
    add("--tar", type=number(int, 1), metavar="N", help="also pack them, N to a tar shard")

    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", choices=("ddim", "ddpm", "dpm++2m"), help="ddim when not given")
    add("-v", "--vanilla_sample", action="store_true", help="the same as --sampler ddpm")
    add(
        "-c",
        "--custom_steps",
        type=number(int, 1),
        help=f"sampling steps ({DEFAULT_STEPS} when not given, all training time steps with ddpm)",
    )
    add(
        "-e",
        "--eta",
        type=number(float, 0, 1),
        help="DDIM noise, 0 deterministic (1.0 when not given)",
    )

    add = parser.add_argument_group("guidance").add_argument
    add(
        "--classifier_scale",
        type=number(float, 0),
        help=f"scale of classifier guidance, 0 for none ({DEFAULT_SCALE:g} when not given)",
    )
    add(
        "--guidance_on",
        choices=("z_t", "z_0"),
        help="what the classifier looks at: the noisy latent, or the clean one predicted from it "
        "(slower); z_t when not given",
    )
    add(
        "--guidance_norm",
        action="store_true",
        help="make guidance SCALE times as long as the predicted noise, at every step",
    )
    add(
        "--guidance_clip",
        type=number(float, 0),
        metavar="R",
        help="guidance is at most R times as long as the predicted noise",
    )
    add(
        "--temperature",
        type=temperature,
        metavar="auto|VALUE",
        help="divides the classifier's logits; auto (when not given): as calibrated on validation",
    )
    add(
        "--cfg_scale",
        type=number(float, 0),
        metavar="W",
        help="classifier-free guidance, for a model that takes labels: 1 (when not given) is the "
        "labelled prediction, more goes beyond it",
    )
    add(
        "--autoguidance_scale",
        type=number(float, 0),
        metavar="W",
        help="how far to go beyond the --autoguidance model; 1 would be no guidance",
    )
    add(
        "--guidance_interval",
        nargs=2,
        type=number(int, 0),
        metavar=("LOW", "HIGH"),
        help="guide only at training time steps in [LOW, HIGH]",
    )

    add = parser.add_argument_group("machine").add_argument
    add(
        "--batch_size",
        type=number(int, 1),
        default=32,
        help="images sampled together (8, 16, ... on a CPU)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    add(
        "--devices",
        type=number(int, 1),
        help="processes on this machine, one per GPU, or per CPU core (each computes with one "
        "thread there); 1 when not given, or what torchrun or srun started",
    )
    add("--num_nodes", type=number(int, 1), help="machines, with torchrun or srun on each")
    add(
        "--part",
        type=part_of,
        metavar="I/N",
        help="make only the I-th of N shares, 0/N to N-1/N, beside runs that make the others (job "
        "array); the command without it then writes the manifest",
    )
    add(
        "--precision",
        choices=("auto", "32", "bf16"),
        default="auto",
        help="auto: bf16 on GPUs that have it, else 32",
    )
    add("--channels_last", action="store_true", help="memory layout that suits tensor cores")
    add("--compile", action="store_true", help="compile the networks: a slow start, then faster")
    return parser


def temperature(text: str) -> float | None:
    """An argparse type: `auto` (None) or a number above 0."""
    return None if text == "auto" else number(float, 1e-3, 1e3)(text)


def part_of(text: str) -> tuple[int, int]:
    """An argparse type: `3/16` as (3, 16)."""
    words = text.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/16")
    part, count = map(int, words)
    if part >= count:
        raise argparse.ArgumentTypeError(f"{text}: parts go from 0/{count} to {count - 1}/{count}")
    return part, count


def check_options(args) -> None:
    """Options that exclude one another, before anything is loaded."""
    if args.vanilla_sample and args.sampler not in (None, "ddpm"):
        raise UserError(f"--sampler {args.sampler}: --vanilla_sample means ddpm; leave one out")
    if args.part is not None and args.tar is not None:
        raise UserError("--tar packs all images; leave it out with --part, and give it without")
    args.sampler = "ddpm" if args.vanilla_sample else args.sampler or "ddim"
    if args.sampler != "ddim" and args.eta is not None:
        raise UserError(f"--eta {args.eta:g} belongs to DDIM; leave it out with {args.sampler}")
    if args.counts is not None:
        for name, value in (("-n", args.n_samples), ("--classes", args.classes)):
            if value is not None:
                raise UserError(f"--counts says how many of which class; leave {name} out")
        if args.balance is not None:
            raise UserError("--counts and --balance both say how many of each class; give one")
    if args.classifier is None:
        for name in ("classifier_scale", "guidance_on", "guidance_clip", "temperature"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs --classifier; give one or leave it out")
        if args.guidance_norm:
            raise UserError("--guidance_norm needs --classifier; give one or leave it out")
    if args.classifier_scale == 0:
        for name in ("guidance_on", "guidance_clip", "guidance_norm"):
            if getattr(args, name) not in (None, False):
                raise UserError(f"--{name} does nothing with --classifier_scale 0; leave it out")
    if args.guidance_norm and args.guidance_clip is not None:
        raise UserError(
            "--guidance_norm makes guidance as long as --classifier_scale says; leave "
            "--guidance_clip out, or lower the scale"
        )
    if args.guidance_clip == 0:
        raise UserError("--guidance_clip 0 must be above 0; for no guidance: --classifier_scale 0")
    if (args.autoguidance is None) != (args.autoguidance_scale is None):
        raise UserError("--autoguidance CKPT and --autoguidance_scale W go together; give both")
    if args.autoguidance_scale == 1:
        raise UserError("--autoguidance_scale 1 is no guidance; give more, such as 1.5")
    if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
        low, high = args.guidance_interval
        raise UserError(f"--guidance_interval {low} {high}: LOW must not be above HIGH")


def check_models(args, models) -> None:
    """Options that do nothing with these models."""
    if models.classes is None:
        for name in ("classes", "counts", "balance"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs --classifier, or a model that takes labels as -r")
    if args.cfg_scale is not None and not models.diffusion.conditional:
        raise UserError(
            f"--cfg_scale needs a model that takes labels; {args.resume} is unconditional: give a "
            "label adapter as -r, or guide with --classifier"
        )
    guided = models.classifier is not None and args.classifier_scale != 0
    guided |= args.cfg_scale not in (None, 1) or args.autoguidance_scale is not None
    if args.guidance_interval and not guided:
        raise UserError(
            "--guidance_interval needs --classifier with a scale above 0, --cfg_scale or "
            "--autoguidance; give one or leave it out"
        )


def choose_counts(args, models) -> dict[str, int]:
    """Images per class, as the options say."""
    from ldm.synthesis.counts import balance, choose_classes, parse_counts

    if args.counts is not None:
        return parse_counts(args.counts, models.names)
    names = models.names if args.classes is None else choose_classes(args.classes, models.names)
    if args.balance is not None:
        return balance(args.balance, names, models.names, args.n_samples or 0)
    return dict.fromkeys(names, args.n_samples or DEFAULT_COUNT)


def choose_sampling(args, models):
    """The `Sampling` that the options mean for these models."""
    from ldm.synthesis import Sampling

    T = models.diffusion.schedule.T
    steps = args.custom_steps or (T if args.sampler == "ddpm" else min(DEFAULT_STEPS, T))
    if steps > T:
        raise UserError(f"--custom_steps {steps} must be in [1, {T}], the training time steps")
    scale, heat = 0.0, 1.0
    if models.classifier is not None:
        scale = DEFAULT_SCALE if args.classifier_scale is None else args.classifier_scale
        heat = args.temperature or float(models.classifier.temperature)
    # What each sampler is, in DDIM's terms: ancestral sampling has the noise of eta 1.
    eta = {"ddim": 1.0 if args.eta is None else args.eta, "ddpm": 1.0, "dpm++2m": 0.0}
    return Sampling(
        sampler=args.sampler,
        steps=steps,
        eta=eta[args.sampler],
        scale=scale,
        seed=args.seed,
        interval=tuple(args.guidance_interval) if args.guidance_interval else None,
        ema=args.ema,
        guidance_on=args.guidance_on or "z_t",
        normalise=args.guidance_norm,
        clip=args.guidance_clip,
        temperature=heat,
        cfg_scale=1.0 if args.cfg_scale is None else args.cfg_scale,
        autoguidance_scale=1.0 if args.autoguidance_scale is None else args.autoguidance_scale,
    )


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
        SampleFolder,
        Synthesiser,
        load_models,
        make_settings,
        synthesise,
    )
    from ldm.synthesis.production import Part
    from ldm.synthesis.shards import write_shards

    # Everything that can be wrong is found before other processes are started.
    devices = shared_devices(args.device, args.devices, args.num_nodes).with_precision(
        args.precision, channels_last=args.channels_last, compile=args.compile
    )
    models = load_models(
        args.resume, args.classifier, args.first_stage, autoguidance_path=args.autoguidance
    )
    check_models(args, models)
    sampling, counts = choose_sampling(args, models), choose_counts(args, models)
    checkpoint = checkpoint_path(args.resume, "--resume")
    outdir = Path(args.outdir) if args.outdir else default_outdir(checkpoint, sampling.label)
    settings = make_settings(sampling, models, devices, args.out_size)
    part = Part(*(args.part or (0, 1)))
    folder = SampleFolder(outdir, settings, models.facts)

    with devices.launch() as (ranks, device):
        synthesiser = Synthesiser(models.to(device), sampling, devices)
        report = synthesise(synthesiser, folder, counts, args.batch_size, ranks, part)
    if not ranks.is_first:
        return 0
    for warning in folder.guidance_log.warnings(sampling):
        print(f"warning: {warning}", file=sys.stderr)
    shards = write_shards(folder, args.tar) if args.tar else []
    if not part.is_whole:
        print(
            f"part {part.number} of {part.count}: {report.made} images made, {report.present} were "
            f"there, in {outdir}; once all parts are made, the same command without --part"
        )
    elif report.made:
        print(
            f"{report.made} images of {len(counts)} classes in {outdir}, {report.seconds:.1f} s, "
            f"{report.images_per_s:.2f} images/s"
        )
    else:
        print(f"nothing to do: all {report.present} images are in {outdir}")
    if shards:
        print(f"{len(shards)} shards: {shards[0]} ... {shards[-1].name}")
    return 0


if __name__ == "__main__":
    run_command(main)
