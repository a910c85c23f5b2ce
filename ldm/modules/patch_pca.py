"""A first stage without training: tiles as the first principal components of their patches.

Letters: B batch, C components, H W pixels, p side of a patch in pixels, D = 3 p^2 values per patch.
Each latent value is a known linear function of p x p pixels, and decoding is exact on the span of
the components.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.autoencoder import LOGVAR_RANGE, DiagonalGaussian, weights_digest


class _Linear(nn.Module):
    """A matrix and an offset that are fitted once and never trained."""

    def __init__(self, rows: int, columns: int, offset: int):
        super().__init__()
        # NaN until they are fitted, so that an earlier use is noticed.
        self.register_buffer("weight", torch.full((rows, columns), float("nan")))
        self.register_buffer("bias", torch.full((offset,), float("nan")))


class PatchPCA(nn.Module):
    """Encoder and decoder between tiles and principal components of their patches.

    It replaces `ldm.modules.autoencoder.AutoencoderKL`; its posterior has almost no variance.

    Args:
        resolution: Pixels of a tile.
        patch: p; the latent has resolution / p values per side.
        components: C, in [1, 3 p^2]; with all of them decoding is exact.
        exponent: Component c of deviation sd_c is scaled to a deviation proportional to
            sd_c^exponent, with a mean square over components of 1. 0 makes all deviations equal, 1
            keeps their proportions. A network that learns to remove noise learns the components of
            large deviation best: at 0 it spends itself on fine texture.
    """

    def __init__(
        self, resolution: int, patch: int = 4, components: int = 12, exponent: float = 0.5
    ):
        super().__init__()
        if patch < 1 or resolution % patch:
            raise UserError(f"patch={patch} must divide resolution={resolution}")
        values = 3 * patch**2
        if not 1 <= components <= values:
            raise UserError(
                f"components={components} must be in [1, {values}], the values of a patch"
            )
        self.resolution, self.downsampling, self.embed_dim = resolution, patch, components
        self.exponent = exponent
        self.encoder = _Linear(components, values, components)
        self.decoder = _Linear(values, components, values)

    @property
    def latent_size(self) -> int:
        """Height and width of the latent of an image of `resolution` pixels."""
        return self.resolution // self.downsampling

    @property
    def is_fitted(self) -> bool:
        return not bool(torch.isnan(self.encoder.weight).any())

    def patches(self, x: Tensor) -> Tensor:
        """Patches (B, D, H / p, W / p) of images (B, 3, H, W)."""
        return F.pixel_unshuffle(x, self.downsampling)

    def fit(self, count: float, total: Tensor, products: Tensor) -> None:
        """Find the components.

        Args:
            count: Number of patches.
            total: Their sum, (D,) float64.
            products: Sum of their outer products, (D, D) float64.
        """
        mean = total / count
        covariance = products / count - mean[:, None] * mean[None]
        variances, vectors = torch.linalg.eigh(covariance.cpu())  # ascending
        variances, basis = variances.flip(0)[: self.embed_dim], vectors.flip(1)[:, : self.embed_dim]
        if not variances[-1] > 1e-9:
            raise UserError(
                f"components={self.embed_dim}: the patches of these tiles vary in fewer "
                "directions; lower it, and check that the tiles differ"
            )
        # Signs are arbitrary, so the largest value of each component is made positive.
        largest = basis.abs().argmax(0, keepdim=True)
        basis = basis * basis.gather(0, largest).sign()  # (D, C)
        deviations = variances.sqrt()
        scaled = deviations**self.exponent
        scaled = scaled / scaled.square().mean().sqrt()
        mean = mean.cpu()
        weight = (basis * (scaled / deviations)).T  # (C, D)
        self.encoder.weight.copy_(weight)
        self.encoder.bias.copy_(-weight @ mean)
        self.decoder.weight.copy_(basis * (deviations / scaled))
        self.decoder.bias.copy_(mean)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of images (B, 3, H, W) in [-1, 1] over latents (B, C, H / p, W / p)."""
        # Autocast would round to two digits, and float32 costs little here.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.encoder.weight, self.encoder.bias
            mean = F.conv2d(self.patches(x.float()), weight[..., None, None], bias)
        return DiagonalGaussian(torch.cat([mean, torch.full_like(mean, LOGVAR_RANGE[0])], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, of unscaled latents."""
        with torch.autocast(z.device.type, enabled=False):
            weight, bias = self.decoder.weight, self.decoder.bias
            patches = F.conv2d(z.float(), weight[..., None, None], bias)
        return F.pixel_shuffle(patches, self.downsampling)

    def forward(self, x: Tensor, sample: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct `x`; `sample` makes no difference."""
        posterior = self.encode(x)
        return self.decode(posterior.mode()), posterior

    def fingerprint(self) -> str:
        """See `ldm.modules.autoencoder.AutoencoderKL.fingerprint`."""
        return weights_digest([self.encoder])
