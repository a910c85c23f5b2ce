"""Small stain-robust pictures of tiles, for comparison pixel by pixel.

Letters: H W pixels of a file, S side of the small picture, D = 3 S S.

A tile's centre square is turned into optical density, reduced to S x S by area averages, and each
channel is centred, divided by its own deviation and the whole scaled to length 1, so the inner
product of two tiles is a correlation in [-1, 1]. What that compares does not change with a factor
or an offset of a channel's density (amount of stain, brightness and tint of the lamp), hardly with
other stain ratios, and little with JPEG compression, noise or blur of the size of a pixel. It is
not blind to shifts, zooms and turns by other than quarter turns.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from ldm.data.stain import optical_density
from ldm.data.tiles import SYMMETRIES, symmetry
from ldm.features.extractor import FEATURES, Extractor, Views
from ldm.features.source import FeatureSource
from ldm.files import digest_of

SIDE = 16
# A channel's deviation is not divided by less than this (natural-log optical density): compression
# and noise of an empty channel would be blown up to a picture otherwise.
FLOOR = 0.02
# Tiles whose densities deviate by less are background: they all look alike, and are no one's copy.
LEAST_CONTRAST = 0.03

CONTRAST = "contrast"

ORIENTATIONS = ("0", "90", "180", "270", "0 flipped", "90 flipped", "180 flipped", "270 flipped")


def centre_square(image: np.ndarray) -> np.ndarray:
    """The largest centred square of (H, W, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def pixel_vector(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The small picture of a tile, float16 (D,) of length 1, and its contrast.

    The contrast is the deviation of its densities within channels, in natural-log units.

    Args:
        image: uint8 (H, W, 3).
    """
    density = optical_density(centre_square(image))
    if len(density) != SIDE:
        kind = cv2.INTER_AREA if len(density) > SIDE else cv2.INTER_LINEAR
        density = cv2.resize(density, (SIDE, SIDE), interpolation=kind)
    density = density.transpose(2, 0, 1).astype(np.float64)  # (3, S, S)
    density -= density.mean(axis=(1, 2), keepdims=True)
    deviation = np.sqrt(np.square(density).mean(axis=(1, 2), keepdims=True))  # (3, 1, 1)
    vector = (density / np.maximum(deviation, FLOOR)).ravel()
    length = np.linalg.norm(vector)
    contrast = float(np.sqrt(np.square(deviation).mean()))
    return (vector / max(length, 1e-6)).astype(np.float16), contrast


def open_pixels(source: FeatureSource, device: torch.device | str) -> Extractor:
    """Small pictures as features, (B, D) float16, with "contrast", (B,) float64."""
    method = {"side": SIDE, "floor": FLOOR}

    def transform(image: np.ndarray) -> Tensor:
        vector, contrast = pixel_vector(image)
        return torch.from_numpy(np.append(vector.astype(np.float64), contrast))  # (D + 1,)

    return Extractor(
        name=f"small pictures of {SIDE} x {SIDE} pixels",
        network="small pictures",
        identity=digest_of(["small pictures", method]),
        transform=transform,
        # A number that was rounded to half precision before stays the same.
        forward=lambda rows: {FEATURES: rows[:, :-1].half(), CONTRAST: rows[:, -1]},
        device=torch.device("cpu"),
        preprocessing=f"centre square, optical density, {SIDE} px, channels standardised",
    )


def oriented(images: Tensor) -> Tensor:
    """The 8 flips and quarter turns of square images, (B, C, H, H) -> (B, 8, C, H, H).

    In the order of `ORIENTATIONS`: turned counter-clockwise by so many degrees, and then flipped
    left to right.
    """
    return torch.stack([symmetry(images, k) for k in range(SYMMETRIES)], dim=1)


def turned_back(image: np.ndarray, orientation: int) -> np.ndarray:
    """The square whose orientation of this number is `image`: undoes one of `oriented`."""
    turns, flipped = orientation % 4, orientation >= 4
    return np.rot90(image[:, ::-1] if flipped else image, -turns)


def oriented_vectors(vectors: Tensor) -> Tensor:
    """All orientations of small pictures, (B, D) -> (B, 8, D)."""
    return oriented(vectors.view(-1, 3, SIDE, SIDE)).flatten(2)


def _oriented_squares(tile: np.ndarray) -> list[np.ndarray]:
    """The orientations of a tile's centre square."""
    # Turned before it is resized and cropped: an odd margin would shift the crop of a turned tile
    # by a pixel, which networks notice.
    square = torch.from_numpy(np.ascontiguousarray(centre_square(tile))).movedim(-1, 0)
    return [view.movedim(0, -1).numpy() for view in oriented(square[None])[0]]


CENTRE = Views("centre", 1, lambda tile: [centre_square(tile)])
ORIENTED = Views("oriented", len(ORIENTATIONS), _oriented_squares)
