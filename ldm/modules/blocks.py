"""Blocks of the diffusion UNet and of the noisy-latent classifier.

Letters: B batch, C channels, H W spatial, E time embedding, N = H W tokens, D head width.

Architecture: Dhariwal & Nichol 2021 (appendix A), the UNet that latent diffusion (Rombach et al.
2022) and its published checkpoints use. Attributes that hold weights keep the names of those
checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError

GROUPS = 32


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of time steps (Vaswani et al. 2017; DDPM, Ho et al. 2020, appendix B).

    Maps (B,), integer or fractional, to (B, dim) float32: cosines first, then sines.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)[None]  # (B, dim/2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm over 32 groups; raises UserError if 32 does not divide the number of channels."""
    if channels % GROUPS:
        raise UserError(
            f"a layer of {channels} channels cannot be normalised in {GROUPS} groups; choose "
            "model_channels (or ch) and the channel multipliers so that every layer is a multiple "
            f"of {GROUPS}"
        )
    return nn.GroupNorm(GROUPS, channels, eps=eps)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all weights to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within heads, (B, heads, N, D) each, scale 1/sqrt(D), on fused kernels.

    The fused kernels need the values of a head side by side in memory. For other layouts PyTorch
    silently computes all N x N scores: at 64x64 positions seven times slower, with a gigabyte.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


class Pointwise(nn.Conv1d):
    """A convolution of width 1 over tokens with channels last, (B, N, C) to (B, N, C').

    It is computed as a matrix product, which is faster: on a CPU, PyTorch's convolution copies its
    input and makes a product for each image.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class Upsample(nn.Module):
    """Nearest-neighbour up-sampling by 2, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Down-sampling by 2: a strided 3x3 convolution if `use_conv`, else average pooling."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, H/2, W/2)


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding, optionally changing the resolution by 2.

    Args:
        channels: Input channels.
        emb_channels: Width E of the time embedding.
        use_scale_shift_norm: The embedding scales and shifts the normalised features ("adaptive
            group normalisation") instead of being added.
        up, down: Resample inside the residual branch and on the skip path (BigGAN blocks).
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        if up:
            self.resample = Upsample(channels, use_conv=False)
        elif down:
            self.resample = Downsample(channels, use_conv=False)
        else:
            self.resample = nn.Identity()
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        condition = self.emb_layers(emb)[:, :, None, None]  # (B, C or 2C, 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.out_layers[0](h), 1 + scale)  # in one pass
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection.

    Args:
        num_heads: Number of heads, used when `num_head_channels` is -1.
        num_head_channels: Width D of a head; the number of heads follows.
        use_new_attention_order: Layout of the 3C channels of `qkv` in published weights. False:
            heads outermost, (heads, 3, D); True: (3, heads, D).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        width = num_head_channels if num_head_channels != -1 else num_heads
        if width < 1 or channels % width:
            name = "num_heads" if num_head_channels == -1 else "num_head_channels"
            raise UserError(
                f"{name}={width} must be positive and divide the {channels} channels of an "
                "attention layer"
            )
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.use_checkpoint = use_checkpoint
        self.layout = (
            "b n (s h d) -> s b h n d" if use_new_attention_order else "b n (h s d) -> s b h n d"
        )
        self.norm = group_norm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zero_init(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(tokens), self.layout, s=3, h=self.num_heads)
        out = self.proj_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])


class AttentionPool2d(nn.Module):
    """Pool a feature map with one attention query, the mean of all positions (as in CLIP).

    Args:
        spatial_size: Height and width of the feature map; the positional embedding is made for it.
        embed_dim: Input channels C.
        num_head_channels: Width D of a head.
        output_dim: Width of the result.
    """

    def __init__(self, spatial_size: int, embed_dim: int, num_head_channels: int, output_dim: int):
        super().__init__()
        if num_head_channels < 1 or embed_dim % num_head_channels:
            raise UserError(
                f"num_head_channels={num_head_channels} must be positive and divide the "
                f"{embed_dim} channels "
                "of the attention pool"
            )
        self.num_heads = embed_dim // num_head_channels
        self.positional_embedding = nn.Parameter(
            torch.randn(embed_dim, spatial_size**2 + 1) / embed_dim**0.5
        )
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, output_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b c (h w)")
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # (B, C, 1 + N)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = rearrange(self.qkv_proj(x), "b (s h d) n -> s b h n d", s=3, h=self.num_heads)
        # Only the mean token is a query. The fused kernels are not used: for one query they split
        # keys among threads by place in the batch, on which an image's rounding would depend.
        scores = (q[:, :, :1] * k).sum(dim=-1, keepdim=True) * k.shape[-1] ** -0.5
        pooled = (scores.softmax(dim=2) * v).sum(dim=2, keepdim=True)  # (B, heads, 1, D)
        return self.c_proj(rearrange(pooled, "b h n d -> b (h d) n"))[:, :, 0]  # (B, output_dim)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the time embedding to the residual blocks in it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
