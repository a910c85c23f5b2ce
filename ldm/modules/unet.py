"""The diffusion UNet and the noisy-latent classifier, which is its half, from the same blocks.

Letters: B batch, C channels, H W spatial (of the latent), K classes, E width of the time embedding.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)

log = logging.getLogger(__name__)

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


class _Encoder(nn.Module):
    """Common part of both networks: time embedding, down-sampling path and middle."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float,
        channel_mult: Sequence[float],
        conv_resample: bool,
        use_checkpoint: bool,
        num_heads: int,
        num_head_channels: int,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
    ):
        super().__init__()
        if image_size % 2 ** (len(channel_mult) - 1):
            raise UserError(
                f"image_size={image_size} (of the latent) must be a multiple of "
                f"{2 ** (len(channel_mult) - 1)}, as channel_mult has {len(channel_mult)} levels; "
                "use fewer levels or larger tiles"
            )
        _require_levels(attention_resolutions, len(channel_mult))
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        res_block = self._res_block = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )
        attention = self._attention = partial(
            AttentionBlock,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        # A first level narrower than `model_channels` (guided diffusion at 512 pixels) starts with
        # its own width; a wider one starts with `model_channels`, as in latent diffusion.
        channels = int(min(1, channel_mult[0]) * model_channels)
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))]
        )
        self._widths = [channels]  # width of every input block's output, for the skip connections
        factor = 1  # down-sampling factor, the unit of attention_resolutions
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, out_channels=int(mult * model_channels))]
                channels = int(mult * model_channels)
                if factor in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self._widths.append(channels)
            if level < len(channel_mult) - 1:
                down = (
                    res_block(channels, down=True)
                    if resblock_updown
                    else Downsample(channels, conv_resample)
                )
                self.input_blocks.append(TimestepEmbedSequential(down))
                self._widths.append(channels)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            res_block(channels), attention(channels), res_block(channels)
        )
        self._channels, self._factor = channels, factor

    def _embed(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))  # (B, E)


def _require_levels(attention_resolutions: Sequence[int], levels: int) -> None:
    """Check the down-sampling factors of attention.

    Factors of levels that a small network lacks only give a warning: published configurations have
    them.

    Raises:
        UserError: A factor is no power of two, so that no level can have it.
    """
    factors = [2**level for level in range(levels)]
    known = ", ".join(map(str, factors))
    said = (
        f"attention_resolutions={list(attention_resolutions)}: the levels have the factors {known}"
    )
    if any(factor < 1 or factor & (factor - 1) for factor in attention_resolutions):
        raise UserError(f"{said}; choose among them")
    if set(attention_resolutions) - set(factors):
        log.warning("%s only; there is no attention at others", said)


class UNetModel(_Encoder):
    """Noise predictor eps(z_t, t) (Dhariwal & Nichol 2021; Rombach et al. 2022).

    Args:
        image_size: Height and width of the latent; must be a multiple of 2 ** (levels - 1).
        in_channels, out_channels: Channels of the latent.
        model_channels: Channels of the first level; a multiple of 32.
        num_res_blocks: Residual blocks per level; the up-sampling path has one more.
        dropout: Share of the features that training leaves out.
        attention_resolutions: Down-sampling factors of the levels with attention (1 = full
            resolution).
        channel_mult: Width of each level in multiples (or parts) of `model_channels`.
        conv_resample: Learned resampling between levels; unused with `resblock_updown`.
        num_heads, num_head_channels: Number of heads; width of a head, which replaces the number
            unless it is -1.
        num_heads_upsample: Number of heads on the up-sampling path; -1 for `num_heads`.
        use_scale_shift_norm: The time scales and shifts features, instead of being added to them.
        resblock_updown: Resample in residual blocks.
        use_new_attention_order: Split query, key and value before the heads; the same weights then
            have another meaning.
        num_classes: Number of labels whose embedding is added to that of the time, see
            `add_labels`; None for no labels.
        use_checkpoint: Recompute activations in the backward pass: less memory, the same gradients.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            use_checkpoint,
            num_heads,
            num_head_channels,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.out_channels = out_channels
        self.num_classes = None
        if num_classes is not None:
            self.add_labels(num_classes)
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        channels, factor, widths = self._channels, self._factor, list(self._widths)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                width = int(mult * model_channels)
                layers = [self._res_block(channels + widths.pop(), out_channels=width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(self._attention(channels, num_heads=heads))
                if level > 0 and i == num_res_blocks:
                    up = (
                        self._res_block(channels, up=True)
                        if resblock_updown
                        else Upsample(channels, conv_resample)
                    )
                    layers.append(up)
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def add_labels(self, num_classes: int) -> None:
        """Embed labels from now on; the embedding starts at 0, so predictions do not change."""
        self.num_classes = num_classes
        self.label_emb = zero_init(nn.Embedding(num_classes, 4 * self.model_channels))

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in `z_t`.

        Args:
            z_t: Noisy latents, (B, C, H, W).
            t: Time steps, (B,) int64 in [0, T).
            y: Labels, (B,) int64, for a network with `num_classes`. -1 (or None for all) means no
                label: no embedding is added.
        """
        return self._pass(z_t, t, y, ())[0]

    def with_features(
        self, z_t: Tensor, t: Tensor, blocks: Sequence[int], y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise and give features of some blocks.

        Args:
            blocks: 0 for the middle, 1, 2, ... for the up-blocks in the order of use, see
                `feature_widths`.
            Others as in `forward`.

        Returns:
            (B, out_channels, H, W), and (B, D): block by block, the mean over space of every
            channel, then the deviations.
        """
        output, features = self._pass(z_t, t, y, blocks)
        return output, torch.cat(features, dim=1)

    @property
    def feature_widths(self) -> list[int]:
        """Channels of the middle and of each up-block; each gives twice as many features."""
        blocks = [self.middle_block[-1], *(block[0] for block in self.output_blocks)]
        return [block.out_layers[-1].out_channels for block in blocks]

    def _pass(
        self, z_t: Tensor, t: Tensor, y: Tensor | None, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        emb = self._embed(t, z_t.dtype)
        if y is not None:
            assert self.num_classes is not None, "labels need num_classes"
            emb = emb + torch.where((y >= 0)[:, None], self.label_emb(y.clamp(min=0)), 0)
        h, skips, features = z_t, [], []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        if 0 in blocks:
            features.append(_over_space(h))
        for number, block in enumerate(self.output_blocks, start=1):
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if number in blocks:
                features.append(_over_space(h))
        return self.out(h), features  # (B, out_channels, H, W)


def _over_space(h: Tensor) -> Tensor:
    """Mean and deviation over H and W of every channel, (B, 2C) float32."""
    h = h.float()
    return torch.cat([h.mean(dim=(2, 3)), h.std(dim=(2, 3))], dim=1)


class EncoderUNetModel(_Encoder):
    """Classifier p(y | z_t, t) of noisy latents: the down-sampling half of the UNet, and a pool.

    Args: as for `UNetModel`, and
        out_channels: Number of classes K.
        pool: "attention" (needs `num_head_channels` or `pool_head_channels`), "adaptive" (mean),
            "spatial" or "spatial_v2" (means of every block's output, then two linear layers).
        pool_head_channels: Width of a head of the attention pool; None for `num_head_channels`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        pool_head_channels: int | None = None,
    ):
        if pool not in POOLS:
            raise UserError(f"pool={pool!r} must be one of {', '.join(POOLS)}")
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            use_checkpoint,
            num_heads,
            num_head_channels,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.out_channels = out_channels
        self.pool = pool
        channels = self._channels
        all_widths = sum(self._widths) + channels
        if pool == "adaptive":
            self.out = nn.Sequential(
                group_norm(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                zero_init(nn.Conv2d(channels, out_channels, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            head = AttentionPool2d(
                image_size // self._factor,
                channels,
                num_head_channels if pool_head_channels is None else pool_head_channels,
                out_channels,
            )
            self.out = nn.Sequential(group_norm(channels), nn.SiLU(), head)
        elif pool == "spatial":
            self.out = nn.Sequential(
                nn.Linear(all_widths, 2048), nn.ReLU(), nn.Linear(2048, out_channels)
            )
        else:
            self.out = nn.Sequential(
                nn.Linear(all_widths, 2048),
                group_norm(2048),
                nn.SiLU(),
                nn.Linear(2048, out_channels),
            )

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Logits (B, K) of the classes, from noisy latents (B, C, H, W) and time steps (B,)."""
        emb = self._embed(t, z_t.dtype)
        by_level = self.pool.startswith("spatial")
        h, means = z_t, []
        for block in self.input_blocks:
            h = block(h, emb)
            if by_level:
                means.append(h.mean(dim=(2, 3)))
        h = self.middle_block(h, emb)
        if by_level:
            return self.out(torch.cat([*means, h.mean(dim=(2, 3))], dim=-1))
        return self.out(h)
