"""The names of networks that make features, as `--features NAME|RUN|FILE` takes them.

Imports nothing heavy, so that a command line can be checked before torch is loaded.
"""

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

    from ldm.features.extractor import Extractor

VIT, TIMM, INCEPTION, PIXELS = "vit", "timm", "inception", "pixels"
DIFFUSION, GUIDE = "diffusion", "guide"
# timm's names of the published DINOv2 networks.
DINOV2 = {
    "dinov2": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_giant": "vit_giant_patch14_dinov2.lvd142m",
}
# Where each kind is opened, as MODULE:FUNCTION. The function takes a `FeatureSource` of its kind
# and a torch device and returns an `ldm.features.extractor.Extractor`. A new kind is one line here,
# and one in FORMS if its name needs an argument; its module is imported only when it is asked for.
KINDS: dict[str, str] = {
    VIT: "ldm.features.networks:open_vit",
    TIMM: "ldm.features.networks:open_timm",
    INCEPTION: "ldm.features.networks:open_inception",
    **dict.fromkeys(DINOV2, "ldm.features.networks:open_dinov2"),
    PIXELS: "ldm.features.pixels:open_pixels",
    DIFFUSION: "ldm.features.diffusion:open_diffusion",
    GUIDE: "ldm.features.diffusion:open_guide",
}
# Kinds whose name is followed by an argument: what stands after the colon.
FORMS: dict[str, str] = {VIT: "RUN", TIMM: "NAME", DIFFUSION: "RUN@T", GUIDE: "CLASSIFIER@RUN"}


@dataclass(frozen=True)
class FeatureSource:
    """A network that makes features, as a user names it."""

    kind: str  # a key of `KINDS`
    # What follows `KIND:`; for "vit" a run or checkpoint of eval.py, for "timm" timm's name of a
    # network; for "diffusion" RUN@T and for "guide" CLASSIFIER@RUN, see `ldm.features.diffusion`.
    # Empty for kinds without an argument.
    argument: str = ""
    # Local file of weights; None for those in the caches of torch and Hugging Face. The kinds
    # "vit", "pixels", "diffusion" and "guide" take none.
    weights: Path | None = None
    # Side of the network's input in pixels; None for its own. For "timm" only.
    input_size: int | None = None
    setting: str = "`features`"  # name of the setting that names the network, for errors

    def __str__(self) -> str:
        if self.kind == VIT:
            return self.argument
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    def open(self, device: "torch.device | str") -> "Extractor":
        """Load the network; nothing is downloaded."""
        module, function = KINDS[self.kind].split(":")
        return getattr(importlib.import_module(module), function)(self, device)


def known_forms() -> str:
    """All forms of a source, for help and errors."""
    names = [f"{kind}:{FORMS[kind]}" if kind in FORMS else kind for kind in KINDS]
    return ", ".join([*names, "a run or checkpoint of eval.py", "a file of Inception weights"])


def parse_features(
    text: str, weights: str | Path | None = None, input_size: int | None = None
) -> FeatureSource:
    """The source that a user's text means.

    Args:
        text: KIND or KIND:ARGUMENT with a kind among `KINDS`, or a path: a run (the folder of a
            seed) or checkpoint of eval.py, or a file of weights of torch-fidelity's Inception.
        weights: Local file of weights for the named network.
        input_size: See `FeatureSource`.
    """
    kind, colon, argument = text.partition(":")
    weights = None if weights is None else Path(weights).expanduser()
    if kind in KINDS and bool(colon) == (kind in FORMS):
        if colon and not argument:
            raise UserError(f"features {text!r}: {kind}: needs an argument, {kind}:{FORMS[kind]}")
    elif Path(text).expanduser().exists():
        if _is_run_of_eval(Path(text).expanduser()):
            kind, argument = VIT, text
        else:
            kind, argument, weights = INCEPTION, "", Path(text).expanduser()
    elif kind in FORMS:
        raise UserError(f"features {text!r}: give {kind}:{FORMS[kind]}")
    else:
        near = difflib.get_close_matches(text, list(KINDS), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"features {text!r}: neither a known network nor an existing path; {hint}"
            f"allowed are {known_forms()}"
        )
    source = FeatureSource(kind, argument, weights, input_size)
    if kind == VIT and not Path(argument).expanduser().exists():
        raise UserError(f"features {text!r}: {argument} does not exist; check the path")
    if input_size is not None and kind != TIMM:
        raise UserError(
            f"input_size={input_size}: features {text!r} have an input size of their own; it can"
            " be set for timm:NAME only"
        )
    if weights is not None and kind in (VIT, PIXELS, DIFFUSION, GUIDE):
        raise UserError(f"weights={weights}: features {text!r} take no separate file of weights")
    if weights is not None and not weights.exists():
        raise UserError(f"weights={weights}: the file does not exist; check the path")
    return source


def _is_run_of_eval(path: Path) -> bool:
    """Whether an existing path is the folder of a seed or a checkpoint that eval.py wrote."""
    if path.is_dir():
        return True
    if path.suffix == ".safetensors":
        return False
    from ldm.checkpoint import KEY, load_tensors

    payload = load_tensors(path, "features")
    return isinstance(payload, dict) and KEY in payload
