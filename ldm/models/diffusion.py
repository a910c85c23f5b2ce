"""Training of the latent diffusion model (stage 1 of the method)."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import KEY
from ldm.config import instantiate_from_config
from ldm.data.latents import latent_sums, scale_from_sums
from ldm.diffusion.samplers import EpsFn, IndexedNoise, ddim
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.models.sharding import is_sharded, shard
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.ema import EMA

log = logging.getLogger(__name__)

LOSSES = {"l1": lambda error: error.abs(), "l2": lambda error: error.square()}
PARAMETERIZATIONS = ("eps", "v")
WEIGHTINGS = ("none", "min_snr")


class EpsFromV(nn.Module):
    """The noise predictor that a network of v is (Salimans & Ho 2022, appendix D).

    Args:
        net: (z_t (B, C, H, W), t (B,), y (B,) or None) -> v, (B, C, H, W).
        schedule: The one that `net` was trained with.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule):
        super().__init__()
        self.net = net
        self.schedule = schedule

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.schedule.eps_of_v(z_t, t, self.net(z_t, t, y))


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
        loss_type: "l1" (the paper's) or "l2", on what the network predicts.
        parameterization: What the network predicts: "eps", the noise, or "v" (Salimans & Ho 2022),
            see `ldm.diffusion.schedule.NoiseSchedule.v`. `eps_model` gives the noise either way.
        loss_weighting: "none", or "min_snr" (Hang et al. 2023), which multiplies the mean error of
            each image by `ldm.diffusion.schedule.NoiseSchedule.min_snr_weight` of its time step.
            The weights are those of the squared error, "l1" is multiplied by the same. Only what
            is minimised is weighted: what is logged as `loss_simple` is not.
        min_snr_gamma: Largest signal-to-noise ratio that counts, above 0.
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
        parameterization: str = "eps",
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
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
        if parameterization not in PARAMETERIZATIONS:
            raise UserError(
                f"model.params.parameterization={parameterization!r} must be one of "
                f"{', '.join(PARAMETERIZATIONS)}"
            )
        if loss_weighting not in WEIGHTINGS:
            raise UserError(
                f"model.params.loss_weighting={loss_weighting!r} must be one of "
                f"{', '.join(WEIGHTINGS)}"
            )
        if not min_snr_gamma > 0:
            raise UserError(f"model.params.min_snr_gamma={min_snr_gamma} must be above 0")
        if scale_factor is not None and not scale_factor > 0:
            raise UserError(
                f"model.params.scale_factor={scale_factor} must be above 0 (or null to measure it)"
            )
        self.schedule = NoiseSchedule(beta_schedule, timesteps, linear_start, linear_end)
        self.loss_type = loss_type
        self.parameterization = parameterization
        self.loss_weighting, self.min_snr_gamma = loss_weighting, min_snr_gamma
        self.latent_shape = (channels, image_size, image_size)
        self.unet_config = unet_config
        self.scheduler_config = scheduler_config
        self.scale_images = scale_images
        self.ema_decay = ema_decay
        self.weight_decay = weight_decay
        self.monitor = monitor
        self._sharded = False
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
            different = [k for k in stated if _lasting(stated[k]) != _lasting(own[k])]
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
            "parameterization": self.parameterization,
            "loss_weighting": self.loss_weighting,
            "min_snr_gamma": self.min_snr_gamma,
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.check_start(checkpoint[KEY]["model"]["params"], "the checkpoint to resume")

    def check_start(self, params: dict[str, Any], where: str) -> None:
        """UserError unless a network of these parameters predicts what this one does."""
        params = params.get("diffusion", params)  # a label adapter's are one level down
        theirs = params.get("parameterization", "eps")  # of checkpoints from before there was v
        if theirs != self.parameterization:
            raise UserError(
                f"{where} holds a network that predicts {theirs}, not {self.parameterization}; set "
                f"model.params.parameterization={theirs}"
            )

    # The latent space

    @torch.no_grad()
    def encode_first_stage(
        self, x: Tensor, generator: torch.Generator | None = None, sample: bool = True
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: a draw, or the mean."""
        return self.latents({"image": x}, generator, sample)

    @torch.no_grad()
    def latents(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | None = None,
        sample: bool = True,
    ) -> Tensor:
        """Scaled latents z_0 (B, C, h, w) of a batch, see `posterior_of`: a draw, or the mean."""
        posterior = posterior_of(batch, self.first_stage_model)
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
        first_stage = self.first_stage_model.to(device)
        dataset = self.trainer.datamodule.train_dataset
        # The same tiles whatever the number of ranks: every rank takes its share of them.
        count = min(self.scale_images, len(dataset))
        chosen = torch.linspace(0, len(dataset) - 1, count).long().unique().tolist()
        mine = chosen[self.trainer.global_rank :: self.trainer.world_size]
        sums = latent_sums(dataset, mine, lambda x: first_stage.encode(x.to(device)))
        sums = self.trainer.strategy.reduce(sums.to(device), reduce_op="sum")
        scale = scale_from_sums(sums)
        log.info("latent scale factor %.6f, from %d tiles", scale, len(chosen))
        return scale

    # Training

    def networks(self) -> list[nn.Module]:
        return [self.unet, self.first_stage_model.encoder]

    def configure_model(self) -> None:
        """Shard the UNet and its average where the strategy is `ldm.models.sharding`'s."""
        if not is_sharded(self) or self._sharded:
            return
        # Of two dimensions, `shard` would keep a whole network along the first.
        mesh = self.device_mesh["data_parallel"]
        shard(self.unet, mesh)
        if self.ema is not None:
            shard(self.ema.net, mesh)
        self._sharded = True

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=self.fused or None,
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
        super().on_before_optimizer_step(optimizer)
        self.log("train/grad_norm", self.gradient_norm)

    def eps_loss(
        self, eps_fn: nn.Module, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Mean error of the noise that `eps_fn` predicts, per image, (B,) (Ho et al. 2020, eq. 14).

        Args:
            eps_fn: See `eps_model`; whatever the network predicts, these losses compare.
        """
        error = eps_fn(self.schedule.q_sample(z_0, t, eps), t, y) - eps
        return LOSSES[self.loss_type](error.float()).mean(dim=(1, 2, 3))

    def training_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Per image, (B,) each: the loss to minimise, and `eps_loss` without gradient.

        The first is the weighted error of what the network predicts, see `loss_weighting`.
        """
        z_t = self.schedule.q_sample(z_0, t, eps)
        is_v = self.parameterization == "v"
        error = (self.unet(z_t, t, y) - (self.schedule.v(z_0, t, eps) if is_v else eps)).float()
        loss = LOSSES[self.loss_type](error).mean(dim=(1, 2, 3))
        # An error of v is one of eps times sqrt(alpha_bar_t), see `NoiseSchedule.eps_of_v`.
        eps_error = (self.schedule.signal(t, error) * error if is_v else error).detach()
        if self.loss_weighting == "min_snr":
            gamma = self.min_snr_gamma
            loss = self.schedule.min_snr_weight(t, loss, gamma, self.parameterization) * loss
        return loss, LOSSES[self.loss_type](eps_error).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def draw_training(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """z_0 (B, C, h, w) of a batch, its time steps t (B,) and noise eps, drawn by `draw`."""
        posterior = posterior_of(batch, self.first_stage_model)
        z_0 = self.scale_factor * posterior.sample(draw=partial(self.draw, torch.randn))
        t = self.draw(partial(torch.randint, self.schedule.T), (len(z_0),))
        return z_0, t, self.draw(torch.randn, z_0.shape, dtype=z_0.dtype)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        z_0, t, eps = self.draw_training(batch)
        losses, simple = self.training_losses(z_0, t, eps, self.labels(batch))
        loss = losses.mean()
        self.check_finite(loss, batch, batch_idx)
        self.log("train/loss_simple", simple.mean(), prog_bar=True, batch_size=len(z_0))
        if self.parameterization != "eps" or self.loss_weighting != "none":
            self.log("train/loss", loss.detach(), batch_size=len(z_0))  # what is minimised
        return loss

    def labels(self, batch: dict[str, Any]) -> Tensor | None:
        """What the noise predictor is told of this batch, (B,) int64; None: it knows no labels."""
        return None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same time steps and noise at every validation, so that the numbers compare.
        generator = torch.Generator().manual_seed(
            batch_idx * self.trainer.world_size + self.global_rank
        )
        z_0 = self.latents(batch, generator)
        t = torch.randint(self.schedule.T, (len(z_0),), generator=generator).to(z_0.device)
        eps = torch.randn(z_0.shape, generator=generator).to(z_0.device)
        values = self.validation_losses(z_0, t, eps, self.labels(batch))
        self.log_dict(values, prog_bar=True, batch_size=len(z_0), sync_dist=True)

    def validation_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """What a validation logs of one batch."""
        eps_fn = self.eps_model(use_ema=False)
        values = {"val/loss_simple": self.eps_loss(eps_fn, z_0, t, eps, y).mean()}
        if self.ema is not None:
            values["val/loss_simple_ema"] = self.eps_loss(self.eps_model(), z_0, t, eps, y).mean()
        return values

    # Sampling

    def network(self, use_ema: bool = True) -> nn.Module:
        """The network, with averaged weights where there are any.

        What it predicts is up to `parameterization`; `eps_model` is what to sample with.
        """
        return self.ema.net if use_ema and self.ema is not None else self.unet

    def eps_model(self, use_ema: bool = True) -> nn.Module:
        """The noise predictor eps(z_t, t), with averaged weights where there are any.

        The network itself, or an adapter around one that predicts v.
        """
        net = self.network(use_ema)
        return EpsFromV(net, self.schedule) if self.parameterization == "v" else net

    def preview_eps(self, count: int) -> EpsFn:
        """The noise predictor of the `count` samples that `log_images` shows."""
        return self.eps_model()

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs, reconstructions and samples of 50 DDIM steps, (count, 3, H, W) each.

        Cached latents have no inputs to show.
        """
        shown = {name: batch[name][:count] for name in ("image", "moments") if name in batch}
        z_0_real = self.latents(shown, sample=False)
        pairs = time_pairs(self.schedule.T, min(50, self.schedule.T))
        # The same noise every time, so that successive grids show the same images getting better.
        noise = IndexedNoise(0, -1, range(len(z_0_real)), self.latent_shape, self.device)
        eps_fn = self.preview_eps(len(z_0_real))
        z_0 = ddim(eps_fn, self.schedule, noise.initial(), pairs, eta=1.0, noise_fn=noise)
        inputs = {"inputs": shown["image"]} if "image" in shown else {}
        return {
            **inputs,
            "reconstructions": self.decode_first_stage(z_0_real),
            "samples": self.decode_first_stage(z_0),
        }


def _lasting(settings: Any) -> Any:
    """Settings of an architecture, without what concerns its training only."""
    if not isinstance(settings, dict):
        return settings
    return {key: value for key, value in settings.items() if key != "use_checkpoint"}


def posterior_of(batch: dict[str, Any], first_stage: AutoencoderNet) -> DiagonalGaussian:
    """Posterior over the latents of a batch, not yet scaled.

    The one place that tells images, `image` (B, 3, H, W) in [-1, 1], which are encoded, from cached
    latents, `moments` (B, 2C, h, w) (see `ldm.data.latents`), which were.
    """
    if "moments" in batch:
        return DiagonalGaussian(batch["moments"])
    return first_stage.encode(batch["image"])
