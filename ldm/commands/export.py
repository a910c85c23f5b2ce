"""Write a diffusion model as a pipeline of the diffusers library.

The folder holds the networks (UNet2DModel, AutoencoderKL), the DDIM scheduler, and a README.md that
says how to load it and sample. What is written is compared with the model before.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from ldm.cli import Ckpt, Dir, option, parse
from ldm.errors import UserError

log = logging.getLogger("export_diffusers")


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--model logs/ldm --out exported/ldm"

    model: Ckpt = option(..., "diffusion checkpoint or run folder", published=("--checkpoint",))
    first_stage: Ckpt | None = option(None, "autoencoder with a fine-tuned decoder")
    out: Dir = option(..., "folder to make")
    ema: bool = option(
        True,
        "export the averaged weights, where there are any",
        takes_value=True,
        published=("--use_ema",),
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or remove it")
    if find_spec("diffusers") is None:
        raise UserError("diffusers, which this command needs, is missing: pip install diffusers")

    from ldm.checkpoint import checkpoint_path, load_model
    from ldm.exchange.diffusers_export import export

    checkpoint = checkpoint_path(args.model, "--model")
    model = load_model(checkpoint, "diffusion", what="--model")
    if args.first_stage:
        model.replace_first_stage(args.first_stage)
    difference = export(checkpoint, model, out, args.ema)
    log.info("%s: %s; largest difference %.1e", out, checkpoint, difference)
