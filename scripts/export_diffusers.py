"""Write a diffusion model as a pipeline of the diffusers library.

    python scripts/export_diffusers.py --checkpoint logs/ldm --out exported/ldm

The folder holds the networks (UNet2DModel, AutoencoderKL), the DDIM scheduler, and a README.md that
says how to load it and sample. What is written is compared with the model before.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, boolean, run_command
from ldm.errors import UserError

log = logging.getLogger("export_diffusers")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="export_diffusers.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="diffusion checkpoint or run folder")
    add("--first_stage", metavar="CKPT", help="autoencoder with a tuned decoder")
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--use_ema", type=boolean, default=True, help="the averaged weights, where there are any")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or remove it")
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "this command needs the package diffusers, which is not installed; run `pip install "
            "diffusers`"
        ) from None

    from ldm.checkpoint import checkpoint_path, load_model
    from ldm.exchange.diffusers_export import export

    checkpoint = checkpoint_path(args.checkpoint, "--checkpoint")
    model = load_model(checkpoint, "diffusion", what="--checkpoint")
    if args.first_stage:
        model.replace_first_stage(args.first_stage)
    difference = export(checkpoint, model, out, args.use_ema)
    log.info("%s: %s; largest difference %.1e", out, checkpoint, difference)


if __name__ == "__main__":
    run_command(main)
