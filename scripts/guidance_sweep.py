"""Try guidance scales (and intervals, steps, samplers) and say which serves best.

    python scripts/guidance_sweep.py -r DIFFUSION --classifier CLASSIFIER --real D/val \\
        --judge logs/eval/train5/seed0 --scales 0,3,10,30 -n 64 --out SWEEP

The judge is a classifier of images from eval.py that took no part in the guidance; --real are
labelled tiles that neither the generator nor the judge was trained on. With a label adapter as -r
and without --classifier the scales are those of classifier-free guidance. Writes SWEEP/sweep.csv,
sweep.md, sweep.json, sweep.png (scores over the scale), tiles.png (the same noise under every
setting) and the tiles below SWEEP/tiles. The same command again makes what is missing.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, existing_path, number, resolve_device, run_command
from ldm.errors import UserError

SAMPLERS = ("ddim", "ddpm", "dpm++2m")
SHEET_TILES = 2  # of each class, in tiles.png


def values_of(kind):
    """An argparse type for values with commas between."""

    def parse(text: str) -> list:
        return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


def sampler(text: str) -> str:
    if text not in SAMPLERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SAMPLERS)}")
    return text


def interval(text: str) -> tuple[int, int] | None:
    """`all`, or LOW:HIGH time steps."""
    if text == "all":
        return None
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit()) or int(low) > int(high):
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor LOW:HIGH time steps")
    return int(low), int(high)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="guidance_sweep.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-r", "--resume", required=True, metavar="CKPT", help="diffusion checkpoint or run folder")
    add("--classifier", metavar="CKPT", help="noisy-latent classifier that guides")
    add("--first_stage", metavar="CKPT", help="autoencoder with a fine-tuned decoder")
    add("--judge", required=True, metavar="CKPT", help="checkpoint (or seed folder) from eval.py")
    add("--real", required=True, metavar="DIR", help="held-out real tiles, DIR/CLASS/images")
    add("--out", required=True, metavar="DIR", help="folder of the results")
    add(
        "--scales",
        type=values_of(number(float, 0)),
        default="0,3,10,30",
        help="guidance scales; 0 is unguided (classifier), 1 plain conditional (label adapter)",
    )
    add(
        "--intervals",
        type=values_of(interval),
        default="all",
        help="guided time steps, LOW:HIGH or all",
    )
    add("--steps", type=values_of(number(int, 1)), default="25", help="sampling steps")
    add("--samplers", type=values_of(sampler), default="ddim", help="ddim, ddpm, dpm++2m")
    add("--eta", type=number(float, 0, 1), default=1.0, help="DDIM noise")
    add("--guidance_on", choices=("z_t", "z_0"), default="z_t", help="what the classifier sees")
    add("--guidance_norm", action="store_true", help="scale = |guidance| / |eps|")
    add("--guidance_clip", type=number(float, 0), help="largest |guidance| / |eps|")
    add("--temperature", type=number(float, 0), help="of the classifier (its calibrated one)")
    add("-n", "--n_samples", type=number(int, 8), default=64, help="images per class")
    add("--batch_size", type=number(int, 1), default=32, help="images sampled together")
    add("--seed", type=number(int, 0), default=0, help="seed of the noise")
    add("--precision", choices=("auto", "32", "bf16"), default="auto", help="of the networks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX or mps")
    args = parser.parse_args(argv)
    if args.classifier is None:
        for name in ("guidance_on", "guidance_norm", "guidance_clip", "temperature"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"argument --{name}: needs --classifier")
    return args


def settings_of(args: argparse.Namespace, guided_by_classifier: bool, temperature: float) -> list:
    """The settings to try: every combination, but an unguided one once for all intervals."""
    from ldm.synthesis import Sampling

    grid = []
    for sampler, steps, span, scale in product(
        args.samplers, args.steps, args.intervals, args.scales
    ):
        common = {
            "sampler": sampler,
            "steps": steps,
            "eta": {"ddim": args.eta, "ddpm": 1.0}.get(sampler, 0.0),
            "seed": args.seed,
        }
        if not guided_by_classifier:
            unguided = scale == 1
            values = {"scale": 0.0, "cfg_scale": scale}
        elif scale == 0:
            unguided, values = True, {"scale": 0.0}
        else:
            unguided = False
            values = {
                "scale": scale,
                "guidance_on": args.guidance_on,
                "normalise": args.guidance_norm,
                "clip": args.guidance_clip,
                "temperature": temperature,
            }
        grid.append(Sampling(**common, **values, interval=None if unguided else span))
    return list(dict.fromkeys(grid))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    real_root = existing_path(args.real, "--real", "dir")
    existing_path(args.judge, "--judge")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")

    from ldm.data.tiles import read_tile
    from ldm.evaluation import sweep
    from ldm.features.source import VIT, FeatureSource
    from ldm.run import git_revision, hardware, versions, write_bytes, write_json, write_text
    from ldm.synthesis import Speed, choose_precision, load_models

    device = resolve_device(args.device)
    models = load_models(args.resume, args.classifier, args.first_stage, device)
    classes = models.classes
    if classes is None:
        raise UserError(
            f"--resume {args.resume} takes no labels, so there is nothing to sweep over; give "
            "--classifier"
        )
    by_classifier = models.classifier is not None
    temperature = args.temperature
    if temperature is None:
        temperature = float(models.classifier.temperature) if by_classifier else 1.0
    grid = settings_of(args, by_classifier, temperature)
    extractor = FeatureSource(VIT, args.judge).open(device)
    if extractor.classes != classes:
        raise UserError(
            f"--judge {args.judge} knows the classes {extractor.classes}, the models "
            f"{classes}; train it on folders with the same names"
        )
    real = sweep.judge(real_root, extractor, out / "features" / "real.safetensors", classes)
    sweep.check_counts(real, f"--real {real_root}", len(classes))
    speed = Speed(choose_precision(args.precision, device))

    rows, sheet = [], []
    columns = [(name, i) for name in classes for i in range(SHEET_TILES)]
    for position, sampling in enumerate(grid, 1):
        print(f"[{position}/{len(grid)}] {sampling.label}", flush=True)
        row, files = sweep.measure(
            sampling, models, speed, extractor, real, out, args.n_samples, args.batch_size
        )
        rows.append(row)
        caption = f"{row.series}\nscale {row.scale:g}"
        sheet.append((caption, [read_tile(files[key]) for key in columns]))

    agreement = real.agreement(len(classes)).mean().item()
    chosen = sweep.best(rows)
    write_text(out / "sweep.csv", sweep.to_csv(rows))
    write_text(out / "sweep.md", sweep.to_markdown(rows, agreement))
    write_bytes(out / "sweep.png", sweep.draw(rows, agreement))
    write_bytes(out / "tiles.png", sweep.contact_sheet(sheet, [name for name, _ in columns]))
    record = {
        "command": sys.argv,
        "models": models.files,
        "temperature": temperature,
        "judge": {"name": extractor.name, "identity": extractor.identity, "agreement": agreement},
        "real": {"folder": args.real, "tiles": len(real.labels)},
        "best": chosen.cells(),
        "settings": [row.cells() for row in rows],
        "hardware": hardware(),
        "versions": versions(),
        "revision": git_revision(),
    }
    write_json(out / "sweep.json", record)
    print(sweep.to_markdown(rows, agreement), end="")
    option = "--classifier_scale" if by_classifier else "--cfg_scale"
    print(
        f"best by these numbers: {option} {chosen.scale:g} ({chosen.series}); a judge overlooks "
        f"what an eye sees, so look at {out}/tiles.png before you use it"
    )


if __name__ == "__main__":
    run_command(main)
