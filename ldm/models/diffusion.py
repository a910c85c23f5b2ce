"""Training of the latent diffusion model (stage 1 of the method)."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import KEY, load_model, require_given
from ldm.config import instantiate_from_config
from ldm.data.latents import channel_sums, latent_sums, scale_from_sums
from ldm.diffusion.flow import RectifiedFlow
from ldm.diffusion.prediction import PREDICTIONS, NoisePredictor
from ldm.diffusion.samplers import EpsFn, IndexedNoise, sample
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.models.patch_pca import fit_first_stage
from ldm.models.sharding import is_sharded, shard
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.ema import EMA
from ldm.modules.patch_pca import PatchPCA

log = logging.getLogger(__name__)

LOSSES = {"l1": lambda error: error.abs(), "l2": lambda error: error.square()}


def _check_objective(parameterization: str, loss_weighting: str, rescale: bool) -> None:
    """Check that what the network predicts goes with weights of the loss and with the schedule."""
    if loss_weighting == "min_snr" and parameterization == "flow":
        raise UserError(
            "model.params.loss_weighting=min_snr weighs the steps of a noise schedule; a flow "
            "chooses its times by model.params.time_sampling: set loss_weighting=none"
        )
    if rescale and parameterization != "v":
        raise UserError(
            f"model.params.rescale_zero_terminal_snr=true needs parameterization=v, not "
            f"{parameterization}"
        )


class LatentDiffusion(HistoModule):
    """Unconditional diffusion in the latent space of a frozen autoencoder (Rombach et al. 2022).

    The latents are multiplied by `scale_factor` = 1 / std, where the deviation is taken over many
    tiles, spread over the whole corpus, by all ranks together. It is stored in the checkpoint.

    Args:
        unet_config: target/params of the noise predictor.
        first_stage_ckpt: Autoencoder checkpoint.
        first_stage_config: target/params of the autoencoder; `params.ckpt_path` is its checkpoint
            in published configurations. Not needed beside `first_stage_ckpt`.
        beta_schedule: "scaled_linear", "linear" or "cosine", see `name` of
            `ldm.diffusion.schedule.make_betas`.
        timesteps, linear_start, linear_end: See `ldm.diffusion.schedule.make_betas`.
        loss_type: "l1" (the paper's) or "l2", on what the network predicts.
        parameterization: What the network predicts, see `ldm.diffusion.prediction`: "eps", the
            noise, or "v" (Salimans & Ho 2022), both of a noise schedule; or "flow", the velocity of
            a rectified flow, for which `beta_schedule` and its ends say nothing. `eps_model` gives
            the noise whatever it is.
        rescale_zero_terminal_snr: See `ldm.diffusion.schedule.NoiseSchedule`; needs
            `parameterization: v`, as the noise says nothing of the image where there is only noise.
        time_sampling, time_mean, time_std: See `ldm.diffusion.flow.RectifiedFlow`.
        time_shift: How far times of a flow are moved towards noise, as there; "auto" is the side of
            the latent / 16, and at least 1.
        loss_weighting: "none", or "min_snr" (Hang et al. 2023), which multiplies the mean error of
            each image by `ldm.diffusion.schedule.NoiseSchedule.min_snr_weight` of its time step.
            The weights are those of the squared error, "l1" is multiplied by the same. Only what
            is minimised is weighted: what is logged as `loss_simple` is not.
        min_snr_gamma: Largest signal-to-noise ratio that counts, above 0.
        image_size: Height and width of the latent.
        channels: Channels of the latent.
        scheduler_config: target/params of the learning-rate factor by step.
        scale_factor: Fixed scale, one for all channels or one each; None to measure it.
        channel_scale: Measure a scale for each channel, so that every channel has unit deviation.
        scale_images: Number of tiles to measure it on.
        use_ema, ema_decay: Moving average of the UNet's weights, per optimiser step.
        weight_decay: Weight decay of AdamW.
        betas: Decay rates of the two moments of AdamW.
        ckpt_path: Diffusion checkpoint to start from.
        monitor: Validation metric that chooses the best checkpoint.
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
        rescale_zero_terminal_snr: bool = False,
        time_sampling: str = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float | Literal["auto"] = 1.0,
        loss_type: Literal["l1", "l2"] = "l1",
        parameterization: Literal["eps", "v", "flow"] = "eps",
        loss_weighting: Literal["none", "min_snr"] = "none",
        min_snr_gamma: float = 5.0,
        image_size: int = 64,
        channels: int = 3,
        scheduler_config: dict | None = None,
        scale_factor: float | list[float] | None = None,
        channel_scale: bool = False,
        scale_images: int = 2048,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        ckpt_path: str | None = None,
        monitor: str | None = None,
    ):
        super().__init__()
        _check_objective(parameterization, loss_weighting, rescale_zero_terminal_snr)
        if isinstance(scale_factor, list) and len(scale_factor) != channels:
            raise UserError(
                f"model.params.scale_factor has {len(scale_factor)} values for {channels} channels"
            )
        if parameterization == "flow":
            shift = max(1.0, image_size / 16) if time_shift == "auto" else time_shift
            self.schedule = RectifiedFlow(time_sampling, time_mean, time_std, shift, timesteps)
        else:
            self.schedule = NoiseSchedule(
                beta_schedule, timesteps, linear_start, linear_end, rescale_zero_terminal_snr
            )
        self.prediction = PREDICTIONS[parameterization](self.schedule)
        self.loss_type = loss_type
        self.parameterization = parameterization
        self.loss_weighting, self.min_snr_gamma = loss_weighting, min_snr_gamma
        self.latent_shape = (channels, image_size, image_size)
        self.unet_config = unet_config
        self.scheduler_config = scheduler_config
        self.scale_images = scale_images
        self.ema_decay = ema_decay
        self.weight_decay, self.betas = weight_decay, tuple(betas)
        self.monitor = monitor
        self._sharded = False
        self.first_stage_model, self.first_stage_config = self._first_stage(
            first_stage_ckpt, first_stage_config
        )
        self.unet = instantiate_from_config(unet_config)
        self._check_unet()
        self.ema = EMA(self.unet, ema_decay) if use_ema else None
        # NaN until it is measured, so that a use before that cannot pass unseen.
        unknown = [float("nan")] * channels if channel_scale else float("nan")
        scale = scale_tensor(unknown if scale_factor is None else scale_factor)
        self.register_buffer("scale_factor", scale)
        if ckpt_path:
            self.start_from(ckpt_path)

    @staticmethod
    def _first_stage(ckpt: str | None, config: dict | None) -> tuple[AutoencoderNet, dict]:
        """The frozen autoencoder, and the configuration that rebuilds it without a file."""
        config = dict(config or {})
        params = dict(config.get("params") or {})
        ckpt = ckpt or params.pop("ckpt_path", None)
        if not params:
            require_given(ckpt, "model.params.first_stage_ckpt", "HISTO_AUTOENCODER")
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
        else:
            # Rebuilding from a diffusion checkpoint, whose weights follow.
            module = instantiate_from_config({"target": config["target"], "params": params})
        return module.net.eval().requires_grad_(False), module.rebuild_config()

    def _check_unet(self) -> None:
        """Check that the UNet knows no labels, and that its sizes are those of the latent."""
        if self.unet.num_classes is not None and not self.conditional:
            raise UserError(
                f"model.params.unet_config.params.num_classes={self.unet.num_classes}: "
                "pre-training is unconditional; remove it, classes come in through the classifier "
                "or ldm.models.label_adapter.LabelAdapter"
            )
        first, (channels, size, _) = self.first_stage_model, self.latent_shape
        if first.embed_dim != channels:
            raise UserError(
                f"model.params.channels={channels}, but the autoencoder's latents have "
                f"{first.embed_dim}"
            )
        wanted = {"in_channels": channels, "out_channels": channels, "image_size": size}
        for name, value in wanted.items():
            if getattr(self.unet, name) != value:
                raise UserError(
                    f"model.params.unet_config.params.{name}={getattr(self.unet, name)} must be "
                    f"{value}, as model.params.{name.removeprefix('in_').removeprefix('out_')}"
                )

    def check_data(self, data: pl.LightningDataModule) -> None:
        first, size = self.first_stage_model, self.latent_shape[1]
        if first.latent_size != size:
            raise UserError(
                f"model.params.image_size={size}, but the autoencoder turns tiles of "
                f"{first.resolution} pixels into latents of {first.latent_size}"
            )
        if data.cache is not None and isinstance(first, PatchPCA) and not first.is_fitted:
            raise UserError(
                "model.params.first_stage_config: components are found on images, and data.params."
                "latents holds none; give model.params.first_stage_ckpt, whose latents were cached"
            )
        if self.scheduler_config is not None:
            instantiate_from_config(self.scheduler_config)
        self.tile_size = first.resolution
        super().check_data(data)

    def rebuild_config(self) -> dict[str, Any]:
        channels, size, _ = self.latent_shape
        process = dict(self.schedule.settings)
        name = process.pop("name")
        params = {
            "unet_config": self.unet_config,
            "first_stage_config": self.first_stage_config,
            **process,
            **({} if name == "flow" else {"beta_schedule": name}),
            "loss_type": self.loss_type,
            "parameterization": self.parameterization,
            "loss_weighting": self.loss_weighting,
            "min_snr_gamma": self.min_snr_gamma,
            "image_size": size,
            "channels": channels,
            **({"channel_scale": True} if self.scale_factor.ndim else {}),
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
    def latents(
        self, batch: dict[str, Any], generator: torch.Generator | None = None, sample: bool = True
    ) -> Tensor:
        """Scaled latents z_0 (B, C, h, w) of a batch, see `posterior_of`: a draw, or the mean."""
        posterior = posterior_of(batch, self.first_stage_model)
        return self.scale_factor * (posterior.sample(generator) if sample else posterior.mode())

    @torch.no_grad()
    def decode_first_stage(self, z_0: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, of scaled latents."""
        return self.first_stage_model.decode(z_0 / self.scale_factor)

    def replace_first_stage(self, path: str | Path) -> HistoModule:
        """Decode with the (tuned) autoencoder of a checkpoint, of the same latent space."""
        other = load_model(path, "autoencoder", self.device, what="`first_stage`")
        if other.net.fingerprint() != self.autoencoder_fingerprint:
            raise UserError(
                f"`first_stage`: {path} has another latent space than the diffusion model; give "
                "the autoencoder it was trained with, or one whose decoder was fine-tuned from that"
            )
        self.first_stage_model = other.net
        return other

    def on_fit_start(self) -> None:
        if isinstance(self.first_stage_model, PatchPCA) and not self.first_stage_model.is_fitted:
            fit_first_stage(self.first_stage_model, self.trainer)
        if torch.isnan(self.scale_factor).all():
            self.scale_factor.copy_(self._measure_scale())

    def _measure_scale(self) -> Tensor:
        device = self.trainer.strategy.root_device
        first_stage = self.first_stage_model.to(device)
        dataset = self.trainer.datamodule.train_dataset
        # The same tiles whatever the number of ranks: every rank takes its share of them.
        count = min(self.scale_images, len(dataset))
        chosen = torch.linspace(0, len(dataset) - 1, count).long().unique().tolist()
        mine = chosen[self.trainer.global_rank :: self.trainer.world_size]

        def encode(x: Tensor) -> DiagonalGaussian:
            return first_stage.encode(x.to(device))

        channels = self.scale_factor.ndim > 0
        if channels:
            sums = channel_sums(dataset, mine, encode, len(self.scale_factor))
        else:
            sums = latent_sums(dataset, mine, encode)
        sums = self.trainer.strategy.reduce(sums.to(device), reduce_op="sum")
        scales = [scale_from_sums(one) for one in (sums.unbind(dim=1) if channels else [sums])]
        scale = scale_tensor(scales if channels else scales[0])
        log.info("latent scale factor %s, from %d tiles", scale_text(scale), len(chosen))
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
            betas=self.betas,
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

    def simple_loss(
        self, net: nn.Module, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Mean error per image, (B,), that `loss_simple` logs (Ho et al. 2020, eq. 14).

        Of the noise where the process is a noise schedule, whatever the network predicts, so that
        these losses compare; of the velocity where it is a rectified flow.

        Args:
            net: See `network`.
        """
        z_t = self.schedule.q_sample(z_0, t, eps)
        error = self.prediction.validation_error(net(z_t, t, y), z_0, z_t, t, eps)
        return LOSSES[self.loss_type](error.float()).mean(dim=(1, 2, 3))

    def training_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Per image, (B,) each: the loss to minimise, and `simple_loss` without gradient.

        The first is the weighted error of what the network predicts, see `loss_weighting`.
        """
        z_t = self.schedule.q_sample(z_0, t, eps)
        error = (self.unet(z_t, t, y) - self.prediction.target(z_0, t, eps)).float()
        loss = LOSSES[self.loss_type](error).mean(dim=(1, 2, 3))
        simple = self.prediction.simple_error(t, error).detach()
        if self.loss_weighting == "min_snr":
            gamma = self.min_snr_gamma
            loss = self.schedule.min_snr_weight(t, loss, gamma, self.parameterization) * loss
        return loss, LOSSES[self.loss_type](simple).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def draw_training(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """z_0 (B, C, h, w) of a batch, its time steps t (B,) and noise eps, drawn by `draw`."""
        posterior = posterior_of(batch, self.first_stage_model)
        z_0 = self.scale_factor * posterior.sample(draw=partial(self.draw, torch.randn))
        t = self.schedule.draw_times(self.draw, len(z_0))
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
        drawn = self.schedule.draw_times(lambda fn, n: fn(n, generator=generator), len(z_0))
        t = drawn.to(z_0.device)
        eps = torch.randn(z_0.shape, generator=generator).to(z_0.device)
        values = self.validation_losses(z_0, t, eps, self.labels(batch))
        self.log_dict(values, prog_bar=True, batch_size=len(z_0), sync_dist=True)

    def validation_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """What a validation logs of one batch."""
        values = {"val/loss_simple": self.simple_loss(self.unet, z_0, t, eps, y).mean()}
        if self.ema is not None:
            loss = self.simple_loss(self.network(), z_0, t, eps, y).mean()
            values["val/loss_simple_ema"] = loss
        return values

    # Sampling

    def network(self, use_ema: bool = True) -> nn.Module:
        """The network, with averaged weights where there are any.

        What it predicts is up to `parameterization`; `eps_model` is what to sample with.
        """
        return self.ema.net if use_ema and self.ema is not None else self.unet

    def eps_model(self, use_ema: bool = True) -> nn.Module:
        """The noise predictor eps(z_t, t), with averaged weights where there are any.

        The network itself, or an adapter around one that predicts something else. One that knows
        labels also takes these, y (B,) int64 with -1 for none: eps(z_t, t, y).
        """
        net = self.network(use_ema)
        return net if self.parameterization == "eps" else NoisePredictor(net, self.prediction)

    def preview_eps(self, count: int) -> EpsFn:
        """The noise predictor of the `count` samples that `log_images` shows."""
        return self.eps_model()

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], count: int) -> dict[str, Tensor]:
        """Inputs, reconstructions and samples of 50 steps, (count, 3, H, W) each.

        Cached latents have no inputs to show.
        """
        shown = {name: batch[name][:count] for name in ("image", "moments") if name in batch}
        z_0_real = self.latents(shown, sample=False)
        pairs = self.schedule.time_pairs(min(50, self.schedule.T))
        # The same noise every time, so that successive grids show the same images getting better.
        noise = IndexedNoise(0, -1, range(len(z_0_real)), self.latent_shape, self.device)
        eps_fn = self.preview_eps(len(z_0_real))
        sampler = self.schedule.samplers[0]
        z_0 = sample(sampler, eps_fn, self.schedule, noise.initial(), pairs, 1.0, noise)
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


def scale_tensor(scale: float | list[float]) -> Tensor:
    """A latent scale as a tensor that multiplies latents: (), or (C, 1, 1) for one per channel."""
    return torch.tensor(scale).view(-1, 1, 1) if isinstance(scale, list) else torch.tensor(scale)


def scale_record(scale: Tensor) -> float | list[float]:
    """What `scale_tensor` makes the same latent scale of."""
    return scale.flatten().tolist() if scale.ndim else float(scale)


def scale_text(scale: Tensor) -> str:
    """A latent scale for people."""
    return ", ".join(f"{value:.4f}" for value in scale.flatten().tolist())
