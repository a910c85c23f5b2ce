"""The KL autoencoder that maps tiles to latents (Rombach et al. 2022, section 3.1 and appendix G).

Letters: B batch, C channels, H W spatial. `x` is an image in [-1, 1]; `z` a latent, not yet scaled.
Attributes that hold weights keep the names of published checkpoints.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.modules.blocks import attend, group_norm

NORM_EPS = 1e-6  # published autoencoders; the UNets use PyTorch's 1e-5
LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """Posterior q(z | x) = N(mean, exp(logvar)), one independent Gaussian per latent value.

    Args:
        moments: Mean and log-variance stacked over channels, (B, 2C, H, W).
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(
        self,
        generator: torch.Generator | None = None,
        draw: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Draw z.

        Args:
            generator: Source of the noise; a CPU generator gives the same draw on every device.
            draw: Function (size, dtype=...) -> standard normal Tensor, used instead of `generator`.
        """
        if draw is not None:
            return self.mean + self.std * draw(self.mean.shape, dtype=self.mean.dtype)
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) of each image, (B,), nats (Kingma & Welling 2014, appendix B)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class _Block(nn.Module):
    """A block that can recompute its features in the backward pass instead of storing them."""

    use_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class ResnetBlock(_Block):
    """Pre-activation residual block without time embedding."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels == out_channels:
            self.nin_shortcut = nn.Identity()
        else:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(_Block):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v)
        )
        h = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Published weights were trained with padding on the right and below only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where `attention` is set."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, dropout: float, attention: bool
    ):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels, dropout)
            for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(blocks if attention else 0))

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to moments (B, 2 z_channels, H/f, W/f), f = 2^(levels - 1)."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        in_channels: int,
        z_channels: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for level, mult in enumerate(ch_mult):
            attention = resolution // 2**level in attn_resolutions
            stage = _Level(channels, ch * mult, num_res_blocks, dropout, attention)
            channels = ch * mult
            if level < len(ch_mult) - 1:
                stage.downsample = _Downsample(channels)
            self.down.append(stage)
        self.mid = _Middle(channels, dropout)
        self.norm_out = group_norm(channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (B, z_channels, H / f, W / f) to image (B, out_ch, H, W)."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        out_ch: int,
        z_channels: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _Middle(channels, dropout)
        stages = []  # built from the lowest resolution up, stored in the order of the levels
        for level, mult in reversed(list(enumerate(ch_mult))):
            attention = resolution // 2**level in attn_resolutions
            stage = _Level(channels, ch * mult, num_res_blocks + 1, dropout, attention)
            channels = ch * mult
            if level > 0:
                stage.upsample = _Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = group_norm(channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@dataclass
class Architecture:
    """Settings of an autoencoder's networks: the keys of `ddconfig`.

    Args:
        ch: Channels of the first level; a multiple of 32.
        ch_mult: Width of each level in multiples of `ch`; each level after the first halves the
            side.
        num_res_blocks: Residual blocks per level; the decoder has one more.
        z_channels: Channels of the encoder's output, before the 1x1 convolution to the latent.
        resolution: Side of a tile in pixels.
        in_channels: Channels of a tile.
        out_ch: Channels of a decoded tile.
        attn_resolutions: Sides in pixels of the levels with attention.
        dropout: Share of the features that training leaves out.
        double_z: Must be true: the encoder gives mean and log-variance.
        use_checkpoint: Recompute features in the backward pass: less memory, the same gradients.
    """

    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    resolution: int
    in_channels: int = 3
    out_ch: int = 3
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    double_z: bool = True
    use_checkpoint: bool = False


class AutoencoderKL(nn.Module):
    """Encoder, posterior and decoder.

    Args:
        ddconfig: Keys of `Architecture`.
        embed_dim: Channels of the latent.
    """

    def __init__(self, ddconfig: dict, embed_dim: int):
        super().__init__()
        config = self._checked(ddconfig)
        self.resolution = config["resolution"]
        self.downsampling = 2 ** (len(config["ch_mult"]) - 1)
        self.embed_dim = embed_dim
        out_ch, in_channels = config.pop("out_ch"), config.pop("in_channels")
        use_checkpoint = config.pop("use_checkpoint")
        self.encoder = Encoder(in_channels=in_channels, **config)
        self.decoder = Decoder(out_ch=out_ch, **config)
        self.quant_conv = nn.Conv2d(2 * config["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, config["z_channels"], 1)
        for module in self.modules():
            if isinstance(module, _Block):
                module.use_checkpoint = use_checkpoint

    @staticmethod
    def _checked(ddconfig: dict) -> dict:
        try:
            config = asdict(Architecture(**ddconfig))
        except TypeError as error:  # an unknown or a missing key
            raise UserError(f"ddconfig: {error}") from None
        if not config.pop("double_z"):
            raise UserError(
                "ddconfig.double_z=False: a KL autoencoder predicts mean and variance; set it to "
                "True"
            )
        factor = 2 ** (len(config["ch_mult"]) - 1)
        if config["resolution"] % factor:
            raise UserError(
                f"ddconfig.resolution={config['resolution']} must be a multiple of {factor}, "
                f"the down-sampling of ch_mult={list(config['ch_mult'])}"
            )
        return config

    @property
    def latent_size(self) -> int:
        """Height and width of the latent of an image of `resolution` pixels."""
        return self.resolution // self.downsampling

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive adversarial weight compares gradients."""
        return self.decoder.conv_out.weight

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of images (B, 3, H, W) in [-1, 1] over latents (B, embed_dim, H / f, W / f)."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, of unscaled latents."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, sample: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct `x` from a draw (or the mean) of its posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample else posterior.mode()
        return self.decode(z), posterior

    def fingerprint(self) -> str:
        """SHA-256 of the encoder's weights, hexadecimal.

        It identifies the latent space. Tuning the decoder does not change it; a diffusion model or
        a classifier of another latent space has another one.
        """
        return weights_digest([self.encoder, self.quant_conv])


def weights_digest(parts: Sequence[nn.Module]) -> str:
    """SHA-256 of the weights of networks, hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def psnr(x: Tensor, x_rec: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1] after clamping, the mean over images, dB."""
    mse = (x.clamp(-1, 1) - x_rec.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4.0 / mse.clamp(min=1e-10))).mean()  # images span 2
