"""Turn a checkpoint of latent diffusion, or of the published method's code, into one of ours.

The configuration, native or published, says what the networks look like. A report lists the
weights that were used, left out and missing.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ldm.cli import Ckpt, File, existing_path, option, parse
from ldm.errors import UserError
from ldm.files import remove_leftovers, require_class_names

log = logging.getLogger("import_checkpoint")

_kind = partial(option, group="what the file does not say")


@dataclass(frozen=True, kw_only=True)
class Options:
    example: ClassVar = """\
ldm.ckpt --kind diffusion --config ldm.yaml \\
      --out models/diffusion.ckpt"""

    file: File = option(..., "checkpoint of other code, or a folder of diffusers", positional=True)
    kind: Literal["autoencoder", "diffusion", "classifier"] = option(..., "what to make of it")
    config: str | None = option(
        None,
        "configuration of the checkpoint; a classifier without one has the published network",
        metavar="YAML",
    )
    out: Ckpt = option(..., "checkpoint to write")
    autoencoder: Ckpt | None = _kind(
        None,
        "diffusion: our autoencoder, for a file without one; classifier: our diffusion model (or "
        "autoencoder) that it works with",
    )
    scale_factor: Annotated[float, Field(ge=1e-6, le=1e6)] | None = _kind(
        None, "scale of the latents, if the file does not hold it", metavar="X"
    )
    classes: str | None = _kind(
        None, "classifier: class names in the order of its outputs", metavar="A,B,C"
    )
    noised: bool = _kind(
        False,
        "classifier: it was trained on noisy latents (the published one was not)",
        takes_value=True,
    )
    allow_pickle: bool = option(False, "read files with objects beside the weights")
    allow_missing: bool = option(False, "leave missing weights as they are initialised")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kind == "classifier":
            for name in ("autoencoder", "classes"):
                if not getattr(self, name):
                    yield name, "is needed with --kind classifier; give it"
            return
        if not self.config:
            yield "config", f"is needed with --kind {self.kind}; give it"
        if self.classes:
            yield "classes", f"a model of kind {self.kind} has none; leave it out"
        if self.kind == "autoencoder":
            for name in ("autoencoder", "scale_factor"):
                if getattr(self, name):
                    yield name, "is not needed with --kind autoencoder; leave it out"


def main(argv: list[str] | None = None) -> None:
    args = parse(Options, argv)
    source, out = existing_path(args.file, "FILE"), Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or remove it")
    classes = [name.strip() for name in (args.classes or "").split(",")]
    if args.kind == "classifier":
        require_class_names(classes, "--classes")
    remove_leftovers(out)

    from ldm.exchange import foreign

    node = foreign.read_model_node(args.config, args.kind) if args.config else None
    if source.is_dir() and args.kind != "classifier":
        from ldm.exchange.diffusers_import import read_folder

        state, beside = read_folder(source, node, args.kind), {}
    else:
        state, beside = foreign.read_foreign(source, args.allow_pickle)
    if args.kind == "autoencoder":
        module, report = foreign.import_autoencoder(state, node)
    elif args.kind == "diffusion":
        module, report = foreign.import_diffusion(state, node, args.autoencoder, args.scale_factor)
    else:
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
