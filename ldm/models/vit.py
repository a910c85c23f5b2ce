"""The evaluation classifier: any timm architecture, its transforms and its weights.

Letters: B batch, S side of an input in pixels, K classes, D features.
"""

import argparse
import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ldm.checkpoint import KEY, check_record, load_model, load_strictly, load_tensors
from ldm.errors import UserError

log = logging.getLogger(__name__)

# The published script's names: each is timm's NAME_patch16_224 with the patch size asked for.
SHORT_NAMES = ("vit_tiny", "vit_small", "vit_base", "vit_large")
SHORT_NAME_PATCH = 16
# Entries of checkpoints that hold the weights, in the order in which they are looked for.
WEIGHT_ENTRIES = ("state_dict", "model", "teacher", "student")
PREFIXES = ("module.", "backbone.", "_orig_mod.")


def timm_name(arch: str) -> str:
    """timm's name of one of `SHORT_NAMES`; another name stays itself."""
    return f"{arch}_patch16_224" if arch in SHORT_NAMES else arch


class TileClassifier(nn.Module):
    """A timm network with its input normalisation.

    It takes normalised float32 images (as the training augmentation gives them) or uint8 images (as
    `eval_transform` gives them), which it normalises itself, on the device.

    Args:
        arch: One of `SHORT_NAMES`, or any timm name.
        num_classes: K; 0 for features only.
        input_size: S.
        patch_size: Pixels; None for 16 with the short names, else for the architecture's own.
        avgpool_patchtokens: Pool the patch tokens instead of taking the class token.
        drop_path: Stochastic depth; not used, with a line in the log, if the architecture has none.
        mean, std: Of each channel of images in [0, 1], for the normalisation.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int,
        input_size: int = 224,
        patch_size: int | None = None,
        avgpool_patchtokens: bool = False,
        drop: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path: float = 0.0,
        mean: list[float] = IMAGENET_DEFAULT_MEAN,
        std: list[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.classes: list[str] | None = None
        self.outputs = num_classes
        self.origin = "from scratch"
        self.input_size = input_size
        # What a checkpoint records. A trained network needs no dropout.
        self.params: dict[str, Any] = {
            "arch": arch,
            "num_classes": num_classes,
            "input_size": input_size,
            "patch_size": patch_size,
            "avgpool_patchtokens": bool(avgpool_patchtokens),
            "mean": list(mean),
            "std": list(std),
        }
        if patch_size is None and arch in SHORT_NAMES:
            patch_size = SHORT_NAME_PATCH
        asked = {
            "patch_size": patch_size,
            "global_pool": "avg" if avgpool_patchtokens else None,
            "attn_drop_rate": attn_drop_rate or None,
        }
        required = {name: value for name, value in asked.items() if value is not None}
        self.net = _create(arch, num_classes, input_size, drop, drop_path, required)
        if avgpool_patchtokens and not hasattr(self.net, "num_prefix_tokens"):
            raise UserError(
                f"`avgpool_patchtokens` 1: {arch} has no class token, it always pools; leave it out"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.feature_dim = self._dry_run(arch)

    def _dry_run(self, arch: str) -> int:
        """Find D with one black image, which also shows that the sizes fit."""
        try:
            with torch.no_grad():
                black = torch.zeros(1, 3, self.input_size, self.input_size)
                return self.eval().forward_features(black).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"`arch` {arch} does not take `input_size` {self.input_size}: {reason[0]}"
            ) from None
        finally:
            self.train()

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return (images.float() / 255 - self.mean) / self.std
        return images

    def forward_features(self, images: Tensor) -> Tensor:
        """Features before the head, (B, 3, S, S) -> (B, D): a ViT's class token after its norm."""
        tokens = self.net.forward_features(self._normalised(images))
        return self.net.forward_head(tokens, pre_logits=True)  # (B, D)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K) from one pass through the network."""
        tokens = self.net.forward_features(self._normalised(images))
        return self.net.forward_head(tokens, pre_logits=True), self.net.forward_head(tokens)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) after each stage, or of a ViT each block, of images in [-1, 1]."""
        images = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(images, intermediates_only=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, 3, S, S) -> (B, K)."""
        return self.net(self._normalised(images))

    def rebuild_config(self) -> dict[str, Any]:
        """Target and params that rebuild this network."""
        return {"target": "ldm.models.vit.TileClassifier", "params": self.params}


def _create(
    arch: str,
    num_classes: int,
    input_size: int,
    drop: float,
    drop_path: float,
    required: dict[str, Any],
) -> nn.Module:
    """Build the timm network, with new weights: nothing is downloaded."""
    name = timm_name(arch)
    if not timm.is_model(name):
        near = difflib.get_close_matches(arch, [*SHORT_NAMES, *timm.list_models()], n=3)
        hint = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise UserError(
            f"`arch` {arch} is neither one of {', '.join(SHORT_NAMES)} nor in timm; {hint}"
        )
    # Left out if the architecture does not know them, since no user asked for these.
    optional: dict[str, Any] = {"img_size": input_size}
    if drop_path:
        optional["drop_path_rate"] = drop_path
    common = {"pretrained": False, "num_classes": num_classes, "drop_rate": drop, **required}
    while True:
        try:
            net = timm.create_model(name, **common, **optional)
            break
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            argument = unknown.group(1) if unknown else ""
            if argument in required:
                raise UserError(
                    f"`arch` {arch} takes no {argument}; leave that option out"
                ) from None
            if argument not in optional:
                raise
            if argument == "drop_path_rate":
                log.info("%s has no stochastic depth: `drop_path` is not used", arch)
            del optional[argument]
        except (AssertionError, RuntimeError, ValueError) as error:
            given = {**required, "input_size": input_size}
            raise UserError(f"`arch` {arch} does not take {given}: {error}") from None
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1, 1))
    if any(input_size % side for side in patch):
        # timm would ignore the pixels at two borders without a word.
        raise UserError(
            f"`input_size` {input_size} is not a multiple of the {patch[0]} px patches of {arch};"
            " change it or `patch_size`"
        )
    return net


def eval_transform(input_size: int):
    """Make the transform of evaluation: PIL image -> uint8 (3, S, S).

    It resizes the shorter side to S / 0.875 and crops the centre, as published (256 and 224 px).
    `TileClassifier` normalises.
    """
    return create_transform(
        input_size, is_training=False, interpolation="bicubic", crop_pct=0.875, normalize=False
    )


def selected_epoch(path: str | os.PathLike) -> Path:
    """The checkpoint of the selected epoch in the folder of one seed; another path stays itself."""
    best = Path(path).expanduser() / "checkpoints" / "best.ckpt"
    return best if best.is_file() else Path(path).expanduser()


def load_vit(
    path: str | os.PathLike, device: torch.device | str = "cpu", what: str = "`weights`"
) -> tuple[TileClassifier, dict[str, Any]]:
    """Load a classifier that eval.py trained, at its selected epoch, in evaluation mode.

    Args:
        path: A checkpoint, or the folder of one seed (`logs/eval/NAME/seed0`).
        what: Name of the setting in error messages.

    Returns:
        The network and its checkpoint record.
    """
    model = load_model(selected_epoch(path), "vit", device, what)
    return model, model.record


def load_pretrained(
    model: TileClassifier,
    path: str | os.PathLike,
    entry: str | None = None,
    classes: list[str] | None = None,
    what: str = "`finetune`",
) -> None:
    """Load weights from a local file; none may be missing or left over.

    Position embeddings and patch projections of a ViT are resampled to this network's grid (timm's
    conversion). The head is loaded only if it is for the same classes. `model.origin` then says
    what was loaded.

    Args:
        path: Safetensors, a PyTorch state dict (also within a training checkpoint), or a checkpoint
            of eval.py.
        entry: Entry of the checkpoint that holds the weights; None looks for the usual names.
        classes: Classes of this network's head.
        what: Name of the setting in error messages.
    """
    state, known_classes = read_weights(path, entry, what)
    if isinstance(model.net, VisionTransformer):
        state = checkpoint_filter_fn(state, model.net)
    own = model.net.state_dict()

    names = model.net.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    own_head = {key: value for key, value in own.items() if key.startswith(prefixes)}
    body = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    fits = own_head.keys() == state.keys() - body.keys() and all(
        value.shape == state[key].shape for key, value in own_head.items()
    )
    if fits and known_classes in (None, classes):
        model.origin = f"{len(state)} tensors of {path}, head included"
    else:
        model.origin = f"{len(body)} tensors of {path}, the head is new"
        state = body | own_head
    load_strictly(model.net, state, f"{what} {path}")


def pretrained_network(
    arch: str, input_size: int, weights: str | os.PathLike | None, named: str, what: str = "weights"
) -> TileClassifier:
    """Build a timm network without a head, frozen, with weights of a local file.

    Its normalisation is that of its pretrained configuration.

    Args:
        weights: See `load_pretrained`; None is refused, after the name was checked.
        named, what: The settings that name the network and the weights, for errors.
    """
    name = timm_name(arch)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    settings = {"mean": list(config.mean), "std": list(config.std)} if config else {}
    try:
        net = TileClassifier(arch, 0, input_size, **settings)
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    if weights is None:
        raise UserError(
            f"{named}: the weights are not on this machine and nothing is downloaded;"
            " give a local file of weights, or where there is internet run: python -c"
            f" \"import timm; timm.create_model('{name}', pretrained=True)\""
        )
    load_pretrained(net, weights, what=what)
    return net.eval().requires_grad_(False)


def read_weights(
    path: str | os.PathLike, entry: str | None = None, what: str = "`finetune`"
) -> tuple[dict[str, Tensor], list[str] | None]:
    """Read the weights in a local file, and its class names if eval.py wrote it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{what}: no file {path}; give a local checkpoint, nothing is downloaded")
    # Training scripts keep their options, a Namespace of plain values, beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        payload = load_tensors(path, what)
    if not isinstance(payload, dict):
        raise UserError(f"{what} {path} holds a {type(payload).__name__}, not weights by name")

    if KEY in payload:
        check_record(payload, path, ("vit",), what)
        state = {key.removeprefix("net."): value for key, value in payload["state_dict"].items()}
        return state, payload[KEY]["classes"]
    wanted = WEIGHT_ENTRIES if entry is None else (entry,)
    found = [payload[name] for name in wanted if isinstance(payload.get(name), dict)]
    if entry is not None and not found:
        raise UserError(
            f"`checkpoint_key` {entry}: {path} has no such weights, but {sorted(payload)[:8]}"
        )
    payload = found[0] if found else payload
    state = {}
    for key, value in payload.items():
        while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
            key = key.removeprefix(prefix)
        if isinstance(value, Tensor):
            state[key] = value
    if not state:
        raise UserError(f"{what} {path} holds no tensors; name their entry with `checkpoint_key`")
    return state, None
