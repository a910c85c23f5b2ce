"""Measure speed, and print one line of JSON.

    python scripts/bench.py sample                                     # fresh weights, demo size
    python scripts/bench.py sample --size paper --precision bf16 --channels_last
    python scripts/bench.py sample -r DIFFUSION --classifier CLASSIFIER

`sample`: images per second of DDIM at eta 0, decoded, beside diffusers' pipeline around the same
networks at equal steps, and what classifier guidance costs. Runs alternate in one process; numbers
are the median, least and greatest of the repetitions.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, number, resolve_device, run_command
from ldm.errors import UserError

SIZES = ("demo", "paper")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    subcommands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    sample = subcommands.add_parser("sample", help="sampling", description="Speed of sampling.")
    sample.set_defaults(run=bench_sample)
    add = sample.add_argument
    add("--size", choices=SIZES, help="size of networks with fresh weights (demo when not given)")
    add("-r", "--resume", metavar="CKPT", help="diffusion checkpoint or run folder instead")
    add("--classifier", metavar="CKPT", help="noisy-latent classifier for -r")
    add("-c", "--custom_steps", type=number(int, 1, 1000), default=10, help="sampling steps")
    add("--batch_size", type=number(int, 1), default=8, help="images sampled together")
    add("--repeats", type=number(int, 1), default=5, help="turns that are measured")
    add("--precision", choices=("auto", "32", "bf16"), default="auto", help="as for sampling")
    add("--channels_last", action="store_true", help="memory layout that suits tensor cores")
    add("--compile", action="store_true", help="compile the networks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    args = parser.parse_args(argv)
    if args.size is not None and args.resume is not None:
        raise UserError("--size makes networks with fresh weights; leave it out with -r")
    if args.classifier is not None and args.resume is None:
        raise UserError("--classifier belongs to a diffusion checkpoint; give -r too")
    return args


def bench_sample(args: argparse.Namespace) -> dict:
    from ldm.synthesis import Speed, choose_precision, load_models
    from ldm.synthesis.bench import bench_sampling, random_models

    device = resolve_device(args.device)
    speed = Speed(choose_precision(args.precision, device), args.channels_last, args.compile)
    if args.resume is None:
        models = random_models(args.size or "demo", device)
    else:
        models = load_models(args.resume, args.classifier, device=device)
    T = models.diffusion.schedule.T
    if args.custom_steps > T:
        raise UserError(f"--custom_steps {args.custom_steps} must be in [1, {T}]")
    return bench_sampling(models, args.batch_size, args.custom_steps, args.repeats, speed)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    print(json.dumps(args.run(args)))
    return 0


if __name__ == "__main__":
    run_command(main)
