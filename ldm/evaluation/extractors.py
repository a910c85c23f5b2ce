"""Networks whose features fidelity is measured in, each with its fixed pre-processing.

Letters: B batch, H W pixels of a file, S side of a network's input in pixels, D features.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.checkpoint import KEY, load_tensors
from ldm.data.images import read_tile
from ldm.errors import UserError
from ldm.evaluation.weights import DINOV2, WEIGHTS
from ldm.files import file_sha256
from ldm.models.vit import TileClassifier, eval_transform, load_pretrained
from ldm.selection.features import Extractor

INCEPTION, VIT, TIMM = "inception", "vit", "timm:"
KINDS = (INCEPTION, *DINOV2, VIT, f"{TIMM}NAME")
DINOV2_SIZE = 224  # pixels, as published Frechet distances in DINOv2 have it (16 x 16 patches)


@dataclass(frozen=True)
class FidelityExtractor:
    """A network and what is done to a tile before it.

    Attributes:
        name: For people.
        forward: uint8 (B, 3, H, W) to features (B, D), not normalised.
        transform: A tile, uint8 (H, W, 3), to uint8 (3, H', W').
        device: Of the network.
        weights: File.
        weights_sha256: Of that file.
        preprocessing: In words.
        trained_on: See `ldm.selection.features.Extractor`; None where nothing is recorded.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    transform: Callable[[np.ndarray], Tensor]
    device: torch.device
    weights: Path
    weights_sha256: str
    preprocessing: str
    trained_on: str | None = None

    @property
    def identity(self) -> str:
        """SHA-256 of what decides the features: network, weights and pre-processing."""
        facts = [self.name, self.weights_sha256, self.preprocessing]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What stands beside a measured value."""
        return {
            "name": self.name,
            "weights": str(self.weights),
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "identity": self.identity,
        }

    @torch.no_grad()
    def features(
        self, paths: Sequence[Path], batch_size: int, num_workers: int
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Features of image files in their order, in full float32 precision on every device.

        Returns:
            (N, D) float32 on the CPU, and width and height of each file in pixels.

        Raises:
            UserError: An unreadable image, or features that are not finite.
        """
        loader = DataLoader(
            _Files(paths, self.transform),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=list,  # tiles of a set may differ in size
            generator=torch.Generator(),  # its own: an iterator draws a number for its workers
        )
        rows: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            for batch in tqdm(loader, desc="features", unit="batch", dynamic_ncols=True):
                images = [image for image, _ in batch]
                sizes += [size for _, size in batch]
                found: dict[int, Tensor] = {}
                for shape in dict.fromkeys(image.shape for image in images):
                    places = [i for i, image in enumerate(images) if image.shape == shape]
                    stacked = torch.stack([images[i] for i in places]).to(self.device)
                    values = self.forward(stacked).float().cpu()  # (B', D)
                    found.update(zip(places, values, strict=True))
                rows += [found[i] for i in range(len(images))]
        features = torch.stack(rows)
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"{len(bad)} images have features that are not finite, the first is"
                f" {paths[bad[0]]}; check --weights"
            )
        return features, sizes


class _Files(Dataset):
    """Transformed tiles of files, each with its width and height."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[np.ndarray], Tensor]):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        tile = read_tile(self.paths[index])
        return self.transform(tile), (tile.shape[1], tile.shape[0])


def _channels_first(tile: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1)))


@dataclass(frozen=True)
class _OnPillow:
    """A timm transform of tiles; a class, so that loader processes can take it along."""

    transform: Callable[[Image.Image], Tensor | np.ndarray]

    def __call__(self, tile: np.ndarray) -> Tensor:
        return torch.as_tensor(self.transform(Image.fromarray(tile)))


def is_run_of_eval(path: str | os.PathLike, option: str = "--weights") -> bool:
    """Whether `path` is a seed's folder or a checkpoint that eval.py wrote."""
    path = Path(path).expanduser()
    if path.is_dir():
        return True
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    payload = load_tensors(path, option)
    return isinstance(payload, dict) and KEY in payload


def load_extractor(
    kind: str | None, weights: str | os.PathLike | None, device: torch.device
) -> FidelityExtractor:
    """The network that `--extractor` and `--weights` mean.

    Args:
        kind: Among `KINDS`; None for "vit" when `weights` are of eval.py and for "inception" else.
        weights: Local file or run; None looks into the caches of torch and Hugging Face.

    Raises:
        UserError: An unknown network, weights that are missing or do not fit.
    """
    if weights is not None and not Path(weights).expanduser().exists():
        raise UserError(f"--weights: {weights} does not exist; check the path")
    if kind is None:
        kind = VIT if weights is not None and is_run_of_eval(weights) else INCEPTION
    if kind == INCEPTION:
        return _inception(weights, device)
    if kind in DINOV2:
        return _dinov2(kind, weights, device)
    if kind == VIT:
        if weights is None:
            raise UserError("--extractor vit: give --weights RUN, a seed's folder of eval.py")
        return _of_selection(Extractor.from_checkpoint(weights, device), device)
    if kind.startswith(TIMM):
        name = kind.removeprefix(TIMM)
        try:
            extractor = Extractor.from_timm(name, weights, device, what="--extractor timm")
        except UserError as error:  # it speaks of the options of other commands
            text = str(error).replace("--pretrained_weights", "--weights")
            raise UserError(text.replace("--extractor timm ", f"--extractor {TIMM}")) from None
        return _of_selection(extractor, device)
    raise UserError(f"--extractor {kind}: choose among {', '.join(KINDS)}")


def _local(weights: str | os.PathLike | None, kind: str) -> Path:
    if weights is None:
        return WEIGHTS[kind].require("--weights")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"--weights: {path} is a folder; --extractor {kind} takes a file")
    return path


def _inception(weights: str | os.PathLike | None, device: torch.device) -> FidelityExtractor:
    """The network of published FID: TensorFlow's of 2015, as torch-fidelity converted it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _local(weights, INCEPTION)
    # torch-fidelity unpickles whatever is in the file: only what is tensors alone is given to it.
    load_tensors(path, "--weights")
    try:
        net: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--weights {path}: no weights of torch-fidelity's Inception ({reason}); give"
            f" {WEIGHTS[INCEPTION].place.name}, or name the --extractor that they are for"
        ) from None
    net = net.to(device)
    return FidelityExtractor(
        name="torch-fidelity inception-v3-compat, layer 2048",
        forward=lambda images: net(images)[0],
        transform=_channels_first,
        device=device,
        weights=path,
        weights_sha256=file_sha256(path),
        preprocessing="whole tile to 299 x 299, bilinear as in TensorFlow 1; (x - 128) / 128",
    )


def _dinov2(
    kind: str, weights: str | os.PathLike | None, device: torch.device
) -> FidelityExtractor:
    path = _local(weights, kind)
    from timm import get_pretrained_cfg

    config = get_pretrained_cfg(DINOV2[kind])
    net = TileClassifier(DINOV2[kind], 0, DINOV2_SIZE, mean=list(config.mean), std=list(config.std))
    load_pretrained(net, path, what="--weights")
    net = net.to(device).eval().requires_grad_(False)
    transform = create_transform(
        DINOV2_SIZE, is_training=False, interpolation="bicubic", crop_pct=1.0, normalize=False
    )
    return FidelityExtractor(
        name=f"timm {DINOV2[kind]}, class token",
        forward=net.forward_features,
        transform=_OnPillow(transform),
        device=device,
        weights=path,
        weights_sha256=file_sha256(path),
        preprocessing=(
            f"shorter side to {DINOV2_SIZE}, Pillow bicubic; centre {DINOV2_SIZE} x {DINOV2_SIZE};"
            " ImageNet mean and deviation"
        ),
    )


def _of_selection(extractor: Extractor, device: torch.device) -> FidelityExtractor:
    """A network of `ldm.selection`, with the pre-processing that it has there."""
    assert extractor.weights is not None
    net, size = extractor.net, extractor.net.input_size
    return FidelityExtractor(
        name=f"{net.params['arch']}, features before the head",
        forward=net.forward_features,
        transform=_OnPillow(eval_transform(size)),
        device=device,
        weights=extractor.weights,
        weights_sha256=file_sha256(extractor.weights),
        preprocessing=(
            f"shorter side to {int(size / 0.875)}, Pillow bicubic; centre {size} x {size};"
            f" mean {net.params['mean']}, deviation {net.params['std']}"
        ),
        trained_on=extractor.trained_on,
    )
