"""Write a diffusion model as a pipeline of the diffusers library.

The folder holds the networks (UNet2DModel, AutoencoderKL), the DDIM scheduler, and a README.md that
says how to load it and sample. What is written is compared with the model before.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.cli import option, parse
from ldm.errors import UserError

log = logging.getLogger("export_diffusers")


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = "--model logs/ldm --out exported/ldm"

    model: str = option(
        ..., "diffusion checkpoint or run folder", metavar="CKPT", published=("--checkpoint",)
    )
    first_stage: str | None = option(None, "autoencoder with a fine-tuned decoder", metavar="CKPT")
    out: str = option(..., "folder to make", metavar="DIR")
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
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "this command needs the package diffusers, which is not installed; run `pip install "
            "diffusers`"
        ) from None

    from ldm.checkpoint import checkpoint_path, load_model
    from ldm.exchange.diffusers_export import export

    checkpoint = checkpoint_path(args.model, "--model")
    model = load_model(checkpoint, "diffusion", what="--model")
    if args.first_stage:
        model.replace_first_stage(args.first_stage)
    difference = export(checkpoint, model, out, args.ema)
    log.info("%s: %s; largest difference %.1e", out, checkpoint, difference)
