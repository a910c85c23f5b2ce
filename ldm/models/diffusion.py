"""Training of the latent diffusion model (stage 1 of the method)."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.data.tiles import Tiles
from ldm.diffusion.samplers import EpsFn, IndexedNoise, ddim
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.ema import EMA

log = logging.getLogger(__name__)

LOSSES = {"l1": lambda error: error.abs(), "l2": lambda error: error.square()}


class LatentDiffusion(HistoModule):
    """Unconditional diffusion in the latent space of a frozen autoencoder (Rombach et al. 2022).

    The latents are multiplied by `scale_factor` = 1 / std, where the deviation is taken over many
    tiles, spread over the whole corpus, by all ranks together. It is stored in the checkpoint.

    Args:
        unet_config: target/params of the noise predictor.
        first_stage_ckpt: Autoencoder checkpoint.
        first_stage_config: target/params of the autoencoder; `params.ckpt_path` is its checkpoint
            in published configurations. Not needed beside `first_stage_ckpt`.
        timesteps, beta_schedule, linear_start, linear_end: See
            `ldm.diffusion.schedule.NoiseSchedule`.
        loss_type: "l1" (the paper's) or "l2", on the predicted noise.
        image_size: Height and width of the latent.
        channels: Channels of the latent.
        scheduler_config: target/params of the learning-rate factor by step.
        scale_factor: Fixed scale; None to measure it.
        scale_images: Number of tiles to measure it on.
        use_ema, ema_decay: Moving average of the UNet's weights, per optimiser step.
        weight_decay: AdamW's.
        ckpt_path: Diffusion checkpoint to start from.
        monitor: Validation metric that chooses the best checkpoint.

    Raises:
        UserError: An autoencoder whose latent does not fit the UNet, and other wrong settings.
    """

    kind = "diffusion"
    conditional = False  # whether the noise predictor knows labels

    def __init__(
        self,
        unet_config: dict,
        first_stage_ckpt: str | None = None,
        first_stage_config: dict | None = None,
        timesteps: int = 1000,
        beta_schedule: str = "scaled_linear",
        linear_start: float = 0.0015,
        linear_end: float = 0.0155,
        loss_type: str = "l1",
        image_size: int = 64,
        channels: int = 3,
        scheduler_config: dict | None = None,
        scale_factor: float | None = None,
        scale_images: int = 2048,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        weight_decay: float = 0.01,
        ckpt_path: str | None = None,
        monitor: str | None = None,
    ):
        super().__init__()
        if loss_type not in LOSSES:
            raise UserError(
                f"model.params.loss_type={loss_type!r} must be one of {', '.join(LOSSES)}"
            )
        if scale_factor is not None and not scale_factor > 0:
            raise UserError(
                f"model.params.scale_factor={scale_factor} must be above 0 (or null to measure it)"
            )
        self.schedule = NoiseSchedule(beta_schedule, timesteps, linear_start, linear_end)
        self.loss_type = loss_type
        self.latent_shape = (channels, image_size, image_size)
        self.unet_config = unet_config
        self.scheduler_config = scheduler_config
        self.scale_images = scale_images
        self.ema_decay = ema_decay
        self.weight_decay = weight_decay
        self.monitor = monitor
        self.first_stage_model, self.first_stage_config = self._first_stage(
            first_stage_ckpt, first_stage_config
        )
        self.unet = instantiate_from_config(unet_config)
        if self.unet.num_classes is not None and not self.conditional:
            raise UserError(
                f"model.params.unet_config.params.num_classes={self.unet.num_classes}: "
                "pre-training is unconditional; remove it, classes come in through the classifier "
                "or ldm.models.label_adapter.LabelAdapter"
            )
        self._check_sizes()
        self.ema = EMA(self.unet, ema_decay) if use_ema else None
        # NaN until it is measured, so that a use before that cannot pass unseen.
        self.register_buffer(
            "scale_factor", torch.tensor(float("nan") if scale_factor is None else scale_factor)
        )
        if ckpt_path:
            self.start_from(ckpt_path)

    @staticmethod
    def _first_stage(ckpt: str | None, config: dict | None) -> tuple[AutoencoderNet, dict]:
        """The frozen autoencoder, and the configuration that rebuilds it without a file."""
        from ldm.checkpoint import load_model

        config = dict(config or {})
        params = dict(config.get("params") or {})
        ckpt = ckpt or params.pop("ckpt_path", None)
        if ckpt:
            module = load_model(ckpt, "autoencoder", what="model.params.first_stage_ckpt")
            stated = {k: params[k] for k in ("ddconfig", "embed_dim") if k in params}
            own = module.rebuild_config()["params"]
            different = [k for k in stated if stated[k] != own[k]]
            if different:
                raise UserError(
                    f"model.params.first_stage_config.params: {', '.join(different)} differs from "
                    f"what {ckpt} was trained with; leave first_stage_config out, the checkpoint "
                    "knows its architecture"
                )
        elif params:
            # Rebuilding from a diffusion checkpoint, whose weights follow.
            module = instantiate_from_config({"target": config["target"], "params": params})
        else:
            raise UserError(
                "model.params.first_stage_ckpt is not set: export HISTO_AUTOENCODER=CKPT or give "
                "model.params.first_stage_ckpt=CKPT"
            )
        return module.net.eval().requires_grad_(False), module.rebuild_config()

    def _check_sizes(self) -> None:
        first, (channels, size, _) = self.first_stage_model, self.latent_shape
        if first.embed_dim != channels:
            raise UserError(
                f"model.params.channels={channels}, but the autoencoder's latents have "
                f"{first.embed_dim}"
            )
        for name, value in (
            ("in_channels", self.unet.in_channels),
            ("out_channels", self.unet.out_channels),
        ):
            if value != channels:
                raise UserError(
                    f"model.params.unet_config.params.{name}={value} must be {channels}, as "
                    "model.params.channels"
                )
        if self.unet.image_size != size:
            raise UserError(
                f"model.params.unet_config.params.image_size={self.unet.image_size} must be "
                f"model.params.image_size={size}"
            )

    def rebuild_config(self) -> dict[str, Any]:
        channels, size, _ = self.latent_shape
        schedule = self.schedule.settings
        params = {
            "unet_config": self.unet_config,
            "first_stage_config": self.first_stage_config,
            "timesteps": schedule["timesteps"],
            "beta_schedule": schedule["name"],
            "linear_start": schedule["linear_start"],
            "linear_end": schedule["linear_end"],
            "loss_type": self.loss_type,
            "image_size": size,
            "channels": channels,
            "use_ema": self.ema is not None,
            "ema_decay": self.ema_decay,
        }
        return {"target": "ldm.models.diffusion.LatentDiffusion", "params": params}

    def metrics(self) -> set[str]:
        return {"val/loss_simple"} | ({"val/loss_simple_ema"} if self.ema is not None else set())

    @property
    def autoencoder_fingerprint(self) -> str:
        """Names the latent space, see `ldm.modules.autoencoder.AutoencoderKL.fingerprint`."""
        return self.first_stage_model.fingerprint()

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        self.first_stage_model.eval()
        return self

    # The latent space

    @torch.no_grad()
    def encode_first_stage(
        self, x: Tensor, generator: torch.Generator | None = None, sample: bool = True
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: a draw, or the mean."""
        posterior = self.first_stage_model.encode(x)
        return self.scale_factor * (posterior.sample(generator) if sample else posterior.mode())

    @torch.no_grad()
    def decode_first_stage(self, z_0: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, of scaled latents."""
        return self.first_stage_model.decode(z_0 / self.scale_factor)

    def replace_first_stage(self, path: str) -> None:
        """Decode with another autoencoder of the same latent space, one with a tuned decoder.

        Raises:
            UserError: Its encoder is another one.
        """
        from ldm.checkpoint import load_model

        other = load_model(path, "autoencoder", self.device, what="--first_stage").net
        if other.fingerprint() != self.autoencoder_fingerprint:
            raise UserError(
                f"--first_stage: {path} has another latent space than the diffusion model; give "
                "the autoencoder it was trained with, or one whose decoder was fine-tuned from that"
            )
        self.first_stage_model = other

    def on_fit_start(self) -> None:
        size = self.first_stage_model.latent_size
        if size != self.latent_shape[1]:
            raise UserError(
                f"model.params.image_size={self.latent_shape[1]}, but the autoencoder turns tiles "
                f"of {self.first_stage_model.resolution} pixels into latents of {size}"
            )
        if torch.isnan(self.scale_factor):
            self.scale_factor.fill_(self._measure_scale())

    def _measure_scale(self) -> float:
        device = self.trainer.strategy.root_device
        self.first_stage_model.to(device)
        dataset = self.trainer.datamodule.train_dataset
        if isinstance(dataset, Tiles):
            dataset = dataset.subset(range(len(dataset)), random=False)  # without augmentation
        # The same tiles whatever the number of ranks: every rank takes its share of them.
        count = min(self.scale_images, len(dataset))
        chosen = torch.linspace(0, len(dataset) - 1, count).long().unique().tolist()
        mine = chosen[self.trainer.global_rank :: self.trainer.world_size]
        sums = latent_sums(self.first_stage_model, dataset, mine, device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        scale = scale_from_sums(sums)
        log.info("latent scale factor %.6f, from %d tiles", scale, len(chosen))
        return scale

    # Training

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if self.scheduler_config is None:
            return {"optimizer": optimizer}
        factor = instantiate_from_config(self.scheduler_config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, with learning rates other than `learning_rate`."""
        return [{"params": list(self.unet.parameters())}]

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not per batch: with gradient accumulation there are fewer steps than batches.
        if self.ema is not None:
            self.ema.update(self.unet)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm(
            p.grad for p in self.unet.parameters() if p.grad is not None
        )
        self.log("train/grad_norm", norm)

    def eps_loss(
        self, net: nn.Module, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Mean error of the predicted noise per image, (B,) (Ho et al. 2020, eq. 14)."""
        error = net(self.schedule.q_sample(z_0, t, eps), t, y) - eps
        return LOSSES[self.loss_type](error.float()).mean(dim=(1, 2, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        z_0 = self.encode_first_stage(batch["image"])
        t = torch.randint(self.schedule.T, (len(z_0),), device=z_0.device)
        loss = self.eps_loss(self.unet, z_0, t, torch.randn_like(z_0), self.labels(batch)).mean()
        self.check_finite(loss, batch, batch_idx)
        self.log("train/loss_simple", loss.detach(), prog_bar=True, batch_size=len(z_0))
        return loss

    def labels(self, batch: dict[str, Any]) -> Tensor | None:
        """What the noise predictor is told of this batch, (B,) int64; None: it knows no labels."""
        return None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same time steps and noise at every validation, so that the numbers compare.
        generator = torch.Generator().manual_seed(
            batch_idx * self.trainer.world_size + self.global_rank
        )
        z_0 = self.encode_first_stage(batch["image"], generator)
        t = torch.randint(self.schedule.T, (len(z_0),), generator=generator).to(z_0.device)
        eps = torch.randn(z_0.shape, generator=generator).to(z_0.device)
        values = self.validation_losses(z_0, t, eps, self.labels(batch))
        self.log_dict(values, prog_bar=True, batch_size=len(z_0), sync_dist=True)

    def validation_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """What a validation logs of one batch."""
        values = {"val/loss_simple": self.eps_loss(self.unet, z_0, t, eps, y).mean()}
        if self.ema is not None:
            values["val/loss_simple_ema"] = self.eps_loss(self.ema, z_0, t, eps, y).mean()
        return values

    # Sampling

    def eps_model(self, use_ema: bool = True) -> nn.Module:
        """The noise predictor eps(z_t, t), with averaged weights where there are any."""
        return self.ema.net if use_ema and self.ema is not None else self.unet

    def preview_eps(self, count: int) -> EpsFn:
        """The noise predictor of the `count` samples that `log_images` shows."""
        return self.eps_model()

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs, reconstructions and samples of 50 DDIM steps, (count, 3, H, W) each."""
        x = batch["image"][:count]
        pairs = time_pairs(self.schedule.T, min(50, self.schedule.T))
        # The same noise every time, so that successive grids show the same images getting better.
        noise = IndexedNoise(0, -1, range(len(x)), self.latent_shape, self.device)
        eps_fn = self.preview_eps(len(x))
        z_0 = ddim(eps_fn, self.schedule, noise.initial(), pairs, eta=1.0, noise_fn=noise)
        reconstructions = self.decode_first_stage(self.encode_first_stage(x, sample=False))
        return {
            "inputs": x,
            "reconstructions": reconstructions,
            "samples": self.decode_first_stage(z_0),
        }


@torch.no_grad()
def latent_sums(
    net: AutoencoderNet, dataset, indices: list[int], device, batch_size: int = 32
) -> Tensor:
    """Count, sum and sum of squares of the latents of these tiles, (3,) float64 on `device`.

    Taken in expectation over the posterior, E[z^2] = mean^2 + var, so nothing is drawn and the sums
    do not depend on how the tiles are divided.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        x = torch.stack([dataset[i]["image"] for i in batch]).to(device)
        posterior = net.encode(x)
        mean, variance = posterior.mean.double().cpu(), posterior.logvar.double().exp().cpu()
        squares = mean.square() + variance
        sums += torch.stack([torch.tensor(float(mean.numel())), mean.sum(), squares.sum()])
    return sums.to(device)


def scale_from_sums(sums: Tensor) -> float:
    """1 / std of the latents behind `latent_sums`.

    Raises:
        UserError: The latents do not vary (an untrained or broken autoencoder).
    """
    count, total, squares = sums.cpu().tolist()
    variance = squares / count - (total / count) ** 2
    if not variance > 1e-12:
        raise UserError(
            f"the autoencoder's latents have variance {variance:.3g} over {int(count)} values, so "
            "they carry no image; train the autoencoder first, and check that the tiles differ"
        )
    return variance**-0.5
