"""Networks that make features: our classifiers, timm's, torch-fidelity's Inception and DINOv2.

Letters: B batch, H W pixels of a tile, S side of a network's input in pixels, D features,
K classes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import checkpoint_path, load_tensors
from ldm.errors import UserError
from ldm.features.extractor import FEATURES, LOGITS, Extractor
from ldm.features.source import DINOV2, INCEPTION, FeatureSource
from ldm.features.weights import WEIGHTS, cached_weights
from ldm.files import digest_of, file_sha256
from ldm.models.vit import (
    TileClassifier,
    eval_transform,
    load_vit,
    pretrained_network,
    selected_epoch,
    timm_name,
)

DINOV2_SIZE = 224  # pixels, as published Frechet distances in DINOv2 have it (16 x 16 patches)
RUN_RESULT = "result.json"  # what eval.py writes in the folder of a seed


def open_vit(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load a classifier that eval.py trained, from a checkpoint or the folder of a seed."""
    net, record = load_vit(source.argument, device, source.setting)
    weights = checkpoint_path(selected_epoch(source.argument), source.setting)
    name = f"{record['model']['params']['arch']} of {source.argument}"
    return classifier_extractor(net, name, weights, device, _recorded_training_tiles(weights))


def open_timm(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load a timm network, with weights from a local file or from the caches of this machine.

    The name may have a tag such as `.augreg_in21k`.
    """
    import timm

    arch = source.argument
    name = timm_name(arch)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    size = source.input_size or (config.input_size[-1] if config else 224)
    weights = source.weights or cached_weights(config)
    net = pretrained_network(arch, size, weights, f"features {source}").to(device)
    return classifier_extractor(net, f"{arch} with {weights.name}", weights, device)


def open_inception(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load the network of published FID: TensorFlow's of 2015, as torch-fidelity converted it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _weights_file(source)
    # torch-fidelity unpickles whatever is in the file, so it is given only what is tensors alone.
    load_tensors(path, "weights")
    try:
        net: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"weights {path}: no weights of torch-fidelity's Inception ({reason}); give"
            f" {WEIGHTS[INCEPTION].place.name}, or name the network that they are for"
        ) from None
    net = net.to(device)
    return _published(
        "torch-fidelity inception-v3-compat, layer 2048",
        lambda images: {FEATURES: net(images)[0].float()},
        lambda tile: torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1))),
        device,
        path,
        "whole tile to 299 x 299, bilinear as in TensorFlow 1; (x - 128) / 128",
    )


def open_dinov2(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Load a DINOv2 network of timm, which sees the whole tile at 224 pixels."""
    from timm.data import create_transform

    path = _weights_file(source)
    name = DINOV2[source.kind]
    net = pretrained_network(name, DINOV2_SIZE, path, f"features {source}").to(device)
    options = {"is_training": False, "interpolation": "bicubic", "crop_pct": 1, "normalize": False}
    return _published(
        f"timm {name}, class token",
        lambda images: {FEATURES: net.forward_features(images).float()},
        _of_pillow(create_transform(DINOV2_SIZE, **options)),
        device,
        path,
        f"shorter side to {DINOV2_SIZE}, Pillow bicubic; centre {DINOV2_SIZE} x {DINOV2_SIZE};"
        " ImageNet mean and deviation",
    )


def classifier_extractor(
    net: TileClassifier,
    name: str,
    weights: Path,
    device: torch.device | str,
    trained_on: str | None = None,
) -> Extractor:
    """The features of a network before its head, and its logits where it has classes.

    Args:
        net: On `device`, in evaluation mode.
        name: Name for people.
        weights: The file that it was read from.
    """
    size = net.input_size
    weights_sha256 = file_sha256(weights)

    def forward(images: Tensor) -> dict[str, Tensor]:
        if net.classes is None:
            return {FEATURES: net.forward_features(images).float()}  # (B, D)
        features, logits = net.features_and_logits(images)  # (B, D), (B, K)
        return {FEATURES: features.float(), LOGITS: logits.float()}

    return Extractor(
        name=name,
        network=f"{net.params['arch']}, features before the head",
        identity=digest_of({**net.params, "num_classes": None, "weights": weights_sha256}),
        transform=_of_pillow(eval_transform(size)),
        forward=forward,
        device=torch.device(device),
        preprocessing=(
            f"shorter side to {int(size / 0.875)}, Pillow bicubic; centre {size} x {size};"
            f" mean {net.params['mean']}, deviation {net.params['std']}"
        ),
        weights=weights,
        weights_sha256=weights_sha256,
        classes=net.classes,
        trained_on=trained_on,
    )


def _published(network, forward, transform, device, weights: Path, preprocessing: str) -> Extractor:
    """An extractor with a network whose architecture its name tells completely."""
    weights_sha256 = file_sha256(weights)
    return Extractor(
        name=network,
        network=network,
        identity=digest_of([network, weights_sha256, preprocessing]),
        transform=transform,
        forward=forward,
        device=torch.device(device),
        preprocessing=preprocessing,
        weights=weights,
        weights_sha256=weights_sha256,
    )


def _weights_file(source: FeatureSource) -> Path:
    """The file of weights that was given, or the one in a cache of this machine."""
    if source.weights is None:
        return WEIGHTS[source.kind].require()
    if not source.weights.is_file():
        raise UserError(f"weights {source.weights}: a folder; features {source} need a file")
    return source.weights


def _recorded_training_tiles(checkpoint: Path) -> str | None:
    """What eval.py wrote beside a checkpoint SEED/checkpoints/best.ckpt about its training set."""
    try:
        result = json.loads((checkpoint.parents[1] / RUN_RESULT).read_text())
        return result["data"]["train"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _of_pillow(transform):
    """A timm transform as one of tiles, uint8 (H, W, 3) -> uint8 (3, S, S)."""
    return lambda tile: torch.as_tensor(transform(Image.fromarray(tile)))
