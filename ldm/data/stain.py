"""Haematoxylin and eosin in optical density space.

Beer-Lambert: light through stain of concentration c and absorbance vector s leaves as
I = I_0 exp(-c s), so the densities OD = -ln(I / I_0) of several stains add; their intensities
do not.
"""

import numpy as np

# Rows haematoxylin and eosin, columns R G B, unit length. Ruifrok & Johnston, "Quantification of
# histochemical staining by color deconvolution", Anal. Quant. Cytol. Histol. 23 (2001), table 1.
HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
EOSIN = np.array([0.072, 0.990, 0.105])

# A pixel of value 0 would have an infinite density; it is read as half a level.
_DENSITY = -np.log(np.maximum(np.arange(256), 0.5) / 255.0).astype(np.float32)


def stain_matrix() -> np.ndarray:
    """Unit absorbance vectors (3, 3): haematoxylin, eosin, and their normal for the rest."""
    matrix = np.stack([HAEMATOXYLIN, EOSIN, np.cross(HAEMATOXYLIN, EOSIN)])
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def optical_density(image: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> natural-log optical density (..., 3), float32, 0 for white."""
    return _DENSITY[image]


def from_density(density: np.ndarray) -> np.ndarray:
    """Optical density (..., 3) -> transmitted light (..., 3) as uint8, 255 for no density."""
    light = np.exp(-density) * 255.0
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def jitter_stains(image: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Multiply the amounts of haematoxylin, eosin and the rest (Tellez et al. 2018).

    Args:
        image: uint8 (H, W, 3).
        scale: (3,), 1 leaves a stain as it is.
    """
    stains = stain_matrix()
    mixing = np.linalg.inv(stains) @ (np.asarray(scale)[:, None] * stains)  # (3, 3)
    return from_density(optical_density(image) @ mixing.astype(np.float32))
