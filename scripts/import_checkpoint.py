"""Turn a checkpoint of latent diffusion, or of the published method's code, into one of ours.

    python scripts/import_checkpoint.py model.ckpt --kind autoencoder --config kl-f4.yaml \\
        --out models/autoencoder.ckpt
    python scripts/import_checkpoint.py ldm.ckpt --kind diffusion --config ldm.yaml \\
        --out models/diffusion.ckpt
    python scripts/import_checkpoint.py model_010000.pt --kind classifier --classes ADI,BACK,DEB \\
        --autoencoder models/diffusion.ckpt --out models/classifier.ckpt

The configuration, native or published, says what the networks look like. A report lists the
weights that were used, left out and missing.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import ArgumentParser, boolean, existing_path, number, run_command
from ldm.errors import UserError

log = logging.getLogger("import_checkpoint")

KINDS = ("autoencoder", "diffusion", "classifier")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="import_checkpoint.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", metavar="FILE", help="checkpoint of other code")
    add("--kind", required=True, choices=KINDS, help="what to make of it")
    add("--config", metavar="YAML", help="its configuration (a classifier's: the published one's)")
    add("--out", required=True, metavar="CKPT", help="checkpoint to write")
    add(
        "--autoencoder",
        metavar="CKPT",
        help="diffusion: our autoencoder, for a file without one; classifier: our diffusion model "
        "(or autoencoder) that it works with",
    )
    add("--scale_factor", type=number(float, 1e-6), metavar="X", help="latent scale, if not in it")
    add("--classes", metavar="A,B,C", help="classifier: class names in the order of its outputs")
    add(
        "--noised",
        type=boolean,
        default=False,
        help="classifier: trained on noisy latents (the published one is not)",
    )
    add("--allow_pickle", action="store_true", help="read files with objects beside the weights")
    add(
        "--allow_missing", action="store_true", help="leave missing weights as they are initialised"
    )
    args = parser.parse_args(argv)
    if args.kind != "classifier" and not args.config:
        parser.error(f"--kind {args.kind} needs --config YAML")
    if args.kind == "classifier" and not (args.autoencoder and args.classes):
        parser.error("--kind classifier needs --autoencoder CKPT and --classes A,B,C")
    if args.kind != "classifier" and args.classes:
        parser.error(f"--classes: a model of kind {args.kind} has none")
    if args.kind == "autoencoder" and (args.autoencoder or args.scale_factor):
        parser.error("--autoencoder and --scale_factor: an autoencoder's file needs neither")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    source, out = existing_path(args.file, "FILE", "file"), Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or remove it")

    from ldm.exchange import foreign

    node = foreign.read_model_node(args.config) if args.config else None
    state, beside = foreign.read_foreign(source, args.allow_pickle)
    if args.kind == "autoencoder":
        module, report = foreign.import_autoencoder(state, node)
    elif args.kind == "diffusion":
        module, report = foreign.import_diffusion(state, node, args.autoencoder, args.scale_factor)
    else:
        classes = [name.strip() for name in args.classes.split(",")]
        if len(set(classes)) < len(classes) or "" in classes:
            raise UserError(f"--classes {args.classes}: names must differ and not be empty")
        module, report = foreign.import_classifier(
            state, args.autoencoder, classes, node, args.scale_factor, args.noised
        )
    for line in report.lines():
        log.info("%s", line)
    if report.missing and not args.allow_missing:
        raise UserError(
            f"{source}: {len(report.missing)} weights are missing, the first is "
            f"{report.missing[0]}; correct --config or --kind, or give --allow_missing to leave "
            "them as they are initialised"
        )
    foreign.write_imported(module, report, source, out, beside)
    log.info("%s holds a model of kind %s", out, args.kind)


if __name__ == "__main__":
    run_command(main)
