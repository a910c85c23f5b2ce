"""Training of the noisy-latent classifier that guides sampling (stage 2a of the method).

Letters: B batch, C channels, H W latent size, K classes, T training time steps.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePath
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoint import KEY, load_model, load_strictly
from ldm.config import instantiate_from_config
from ldm.data.latents import latent_sums, scale_from_sums
from ldm.diffusion import make_process
from ldm.diffusion.samplers import IndexedNoise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models.base import HistoModule
from ldm.models.diffusion import (
    LatentDiffusion,
    posterior_of,
    scale_record,
    scale_tensor,
    scale_text,
)
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.lr_schedule import LinearAnneal
from ldm.run import differences

QUARTERS = 4  # ranges of t whose validation accuracy is reported
SCALE_TOLERANCE = 0.05  # relative difference of latent scales that models bear
TEMPERATURES = (0.1, 10.0)  # least and largest that calibration gives
# Parameters of the encoder of a diffusion model's UNet.
SHARED_WITH_UNET = """image_size in_channels model_channels num_res_blocks attention_resolutions
    channel_mult conv_resample num_heads num_head_channels use_scale_shift_norm resblock_updown
    use_new_attention_order"""

# Least pixels -> width multipliers by level. From 128 as guided diffusion's classifiers (512: their
# first level is half as wide).
CHANNEL_MULT = {
    512: (1, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    0: (1, 2, 4),
}


def sample_time_steps(sampler: str, count: int, T: int, device: torch.device | str) -> Tensor:
    """Time steps (count,) int64, each uniform in [0, T).

    Args:
        sampler: "uniform" draws them independently; "stratified" draws one in each of `count` equal
            parts of [0, T), in random order, so that every batch covers the schedule and the loss
            varies less from step to step.
    """
    if sampler == "uniform":
        return torch.randint(T, (count,), device=device)
    assert sampler == "stratified", sampler
    part = torch.randperm(count, device=device) + torch.rand(count, device=device)
    # Rounding may carry the last part onto T itself.
    return (part * (T / count)).long().clamp(max=T - 1)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature that minimises the cross entropy of logits / temperature (Guo et al. 2017).

    The cross entropy is convex in 1 / temperature, so its slope there changes sign once; that place
    is found by bisection in log temperature, starting from 1, which is kept where the slope is 0.

    Args:
        logits: (N, K), finite.
        y: Labels, (N,) int64.

    Returns:
        A number within `TEMPERATURES`; its cross entropy is at most that of 1.
    """
    logits, y = logits.cpu().double(), y.cpu()

    def slope(log_temperature: float) -> float:
        """Derivative of the cross entropy in 1 / temperature: mean score minus that of y."""
        p = (logits / math.exp(log_temperature)).softmax(dim=1)  # (N, K)
        return float(((p * logits).sum(dim=1) - logits.gather(1, y[:, None])[:, 0]).mean())

    at_one = slope(0.0)
    if at_one == 0:
        return 1.0
    low, high = (0.0, math.log(TEMPERATURES[1])) if at_one > 0 else (math.log(TEMPERATURES[0]), 0.0)
    for _ in range(50):  # to the last digit of float64
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class LatentSpace:
    """What a classifier takes over from stage 1, so that it fits the diffusion model."""

    first_stage: AutoencoderNet  # the frozen autoencoder
    # Settings of the noise schedule or flow, see `ldm.diffusion.make_process`.
    schedule: dict[str, Any]
    # Latent scale, one or one per channel; None when the checkpoint does not know it (an
    # autoencoder's).
    scale_factor: float | list[float] | None

    @classmethod
    def load(cls, path: str, what: str = "`first_stage`") -> "LatentSpace":
        """Of a diffusion checkpoint, or of an autoencoder checkpoint with the paper's schedule."""
        model = load_model(path, ("diffusion", "autoencoder"), what=what)
        if model.kind == "diffusion":
            settings, scale = model.schedule.settings, scale_record(model.scale_factor)
            return cls(model.first_stage_model, settings, scale)
        return cls(model.net, NoiseSchedule().settings, None)

    def measured(self, tiles: Dataset) -> "LatentSpace":
        """With a scale of 1 / std over up to 2,048 of these tiles, where there is none yet."""
        if self.scale_factor is not None:
            return self
        chosen = torch.linspace(0, len(tiles) - 1, min(2048, len(tiles))).long().unique().tolist()
        sums = latent_sums(tiles, chosen, self.first_stage.encode)
        # Six digits, so that measuring it again on another machine gives the same number.
        return replace(self, scale_factor=float(f"{scale_from_sums(sums):.6g}"))


def default_channel_mult(pixels: int, latent_size: int) -> tuple[int, ...]:
    """Width multipliers by level for tiles of `pixels`.

    Levels are left out at the end where the latent cannot be halved so often.
    """
    levels = next(mult for least, mult in CHANNEL_MULT.items() if pixels >= least)
    while len(levels) > 1 and latent_size % 2 ** (len(levels) - 1):
        levels = levels[:-1]
    return levels


def attention_factors(resolutions: Sequence[int] | None, pixels: int, levels: int) -> list[int]:
    """Down-sampling factors of the latent at which there is attention.

    Args:
        resolutions: As guided diffusion counts them, `pixels` / factor. None for the paper's
            factors, 8 and 16, as far as there are such levels.
        levels: Number of levels; the factors are 1, 2, ... 2 ** (levels - 1).
    """
    factors = [2**level for level in range(levels)]
    if resolutions is None:
        return [factor for factor in (8, 16) if factor in factors] or factors[-1:]
    allowed = {pixels // factor: factor for factor in factors if pixels % factor == 0}
    unknown = [r for r in resolutions if r not in allowed]
    if unknown:
        raise UserError(
            f"classifier_attention_resolutions={','.join(map(str, resolutions))}: {unknown[0]} is "
            f"no level's resolution; choose among {', '.join(map(str, allowed))}"
        )
    return sorted(allowed[r] for r in resolutions)


def network_config(
    first_stage: AutoencoderNet,
    num_classes: int,
    width: int = 128,
    depth: int = 2,
    channel_mult: Sequence[int] | None = None,
    attention_resolutions: Sequence[int] | None = None,
    pool: str = "attention",
    resblock_updown: bool = True,
    use_scale_shift_norm: bool = True,
    dropout: float = 0.0,
    use_checkpoint: bool = False,
) -> dict[str, Any]:
    """target/params of the half UNet for latents of `first_stage`; defaults are the paper's.

    Args:
        width: Channels of the first level.
        depth: Residual blocks per level.
        channel_mult: Width of each level in multiples of `width`; None for `default_channel_mult`.
        attention_resolutions: See `attention_factors`.
        pool, use_checkpoint: See `ldm.modules.unet.EncoderUNetModel`.
    """
    pixels, size = first_stage.resolution, first_stage.latent_size
    channel_mult = list(channel_mult or default_channel_mult(pixels, size))
    params = {
        "image_size": size,
        "in_channels": first_stage.embed_dim,
        "model_channels": width,
        "out_channels": num_classes,
        "num_res_blocks": depth,
        "attention_resolutions": attention_factors(
            attention_resolutions, pixels, len(channel_mult)
        ),
        "dropout": dropout,
        "channel_mult": channel_mult,
        # Heads are 64 wide; every level is a multiple of `width`, which may be smaller.
        "num_head_channels": math.gcd(64, width),
        "use_scale_shift_norm": use_scale_shift_norm,
        "resblock_updown": resblock_updown,
        "pool": pool,
    }
    if use_checkpoint:
        params["use_checkpoint"] = True
    return {"target": "ldm.modules.unet.EncoderUNetModel", "params": params}


def network_config_of(
    diffusion: LatentDiffusion,
    num_classes: int,
    pool: str = "attention",
    dropout: float = 0.0,
    use_checkpoint: bool = False,
) -> dict[str, Any]:
    """target/params of the half UNet that is the encoder and middle of a diffusion model's.

    Args:
        pool, use_checkpoint: See `ldm.modules.unet.EncoderUNetModel`.
    """
    unet = diffusion.unet_config["params"]
    params = {name: unet[name] for name in SHARED_WITH_UNET.split() if name in unet}
    params |= {"out_channels": num_classes, "pool": pool, "dropout": dropout}
    # The blocks' heads must stay the UNet's, by number or by width; the pool is new.
    params["pool_head_channels"] = math.gcd(64, params["model_channels"])
    if use_checkpoint:
        params["use_checkpoint"] = True
    return {"target": "ldm.modules.unet.EncoderUNetModel", "params": params}


def start_from_unet(model: "NoisyLatentClassifier", diffusion: LatentDiffusion, where: str) -> None:
    """Copy the averaged weights of a diffusion model's encoder and middle into a classifier."""
    check_latents(model, "`first_stage`", diffusion, where, "leave `first_stage` out")
    unet = diffusion.network()
    for name in ("time_embed", "input_blocks", "middle_block"):
        state = getattr(unet, name).state_dict()
        load_strictly(getattr(model.net, name), state, f"{where}: {name}")


def start_from_classifier(
    model: "NoisyLatentClassifier", source: "NoisyLatentClassifier", where: str
) -> None:
    """Copy the weights of a classifier; a UserError if its classes or latents are others."""
    if source.classes != model.classes:
        raise UserError(f"{where} knows the classes {source.classes}, the data {model.classes}")
    if source.autoencoder_fingerprint != model.autoencoder_fingerprint:
        raise UserError(
            f"{where} was trained on latents of another autoencoder than `first_stage`; give its"
        )
    load_strictly(model.net, source.net.state_dict(), where)


def process_params(settings: dict[str, Any]) -> dict[str, Any]:
    """Parameters of `NoisyLatentClassifier` for a process of these settings.

    Schedules that earlier versions know are written as these wrote them.
    """
    known = {"timesteps", "linear_start", "linear_end"}
    if settings.keys() != known | {"name"}:
        return {"process": settings}
    return {"beta_schedule": settings["name"], **{name: settings[name] for name in known}}


class GuidingClassifier(HistoModule):
    """Classifier p(y | z_t, t) that guides sampling: what it fits, its validation and calibration.

    Args:
        autoencoder_fingerprint: Names the latent space.
        scale_factor: The latents are multiplied by it; the diffusion model's.
        process: Settings of the diffusion model's process, see `ldm.diffusion.make_process`.
        weight_decay: AdamW's.
        anneal_steps: The learning rate falls linearly to 0 over so many steps; None keeps it.

    Attributes:
        net: What is trained.
        temperature: Scalar buffer; logits / temperature are calibrated. Fitted at each validation
            to the logits that `val/accuracy` is made of, 1 before the first; a checkpoint holds
            that of the last validation before it. It takes no part in training.
    """

    kind = "classifier"
    noised = True
    net: nn.Module

    def __init__(
        self,
        autoencoder_fingerprint: str,
        scale_factor: float | list[float],
        process: dict,
        weight_decay: float,
        anneal_steps: int | None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.schedule = make_process(process)
        self.autoencoder_fingerprint = autoencoder_fingerprint
        self.weight_decay, self.anneal_steps = weight_decay, anneal_steps
        self.monitor = "val/accuracy"
        self.register_buffer("scale_factor", scale_tensor(scale_factor))
        self.register_buffer("temperature", torch.ones(()))
        self._validated: list[tuple[Tensor, Tensor]] = []  # logits (n, K) and labels (n,)

    def attach(self, diffusion: LatentDiffusion, where: str) -> None:
        """Take over what sampling shares with the diffusion model; some share nothing."""

    def logits_model(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(z_t (B, C, H, W), t (B,)) -> logits (B, K)."""
        return self.net

    def shared_model(self) -> nn.Module | None:
        """(z_t, t) -> noise (B, C, H, W) and logits (B, K) from one pass, where there is one."""
        return None

    @property
    def quarters(self) -> list[tuple[int, int]]:
        """The ranges [low, high) of t whose accuracy is reported."""
        T = self.schedule.T
        bounds = [q * T // QUARTERS for q in range(QUARTERS + 1)]
        return [(low, max(high, low + 1)) for low, high in pairwise(bounds)]

    @property
    def quarter_metrics(self) -> list[str]:
        return [f"val/accuracy_t{low}-{high - 1}" for low, high in self.quarters]

    def metrics(self) -> set[str]:
        calibration = {"val/temperature", "val/loss_calibrated"}
        accuracies = {"val/accuracy", "val/accuracy_clean", *self.quarter_metrics}
        return {"val/loss", *accuracies, *calibration}

    def configure_optimizers(self) -> dict[str, Any]:
        options = {"weight_decay": self.weight_decay, "fused": self.fused or None}
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.learning_rate, **options)
        if self.anneal_steps is None:
            return {"optimizer": optimizer}
        factor = LinearAnneal(self.anneal_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @staticmethod
    def fixed_settings(params: dict[str, Any]) -> dict[str, Any]:
        """Those of the parameters of a checkpoint that cannot change where a training goes on."""
        return params

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored, own = checkpoint[KEY]["model"]["params"], self.rebuild_config()["params"]
        if stored["autoencoder_fingerprint"] != self.autoencoder_fingerprint:
            raise UserError(
                "the checkpoint to resume was trained on latents of another autoencoder; "
                "give the same `first_stage`"
            )
        theirs, ours = self.fixed_settings(stored), self.fixed_settings(own)
        if different := differences({key: theirs.get(key) for key in ours}, ours):
            raise UserError(
                f"the checkpoint to resume holds another network ({'; '.join(different)}); "
                "give the options that it was started with"
            )

    def on_validation_epoch_start(self) -> None:
        self._validated.clear()

    def log_validation(
        self, clean_logits: Tensor, noisy_logits: Sequence[Tensor], y: Tensor
    ) -> None:
        """Log the scores of a batch.

        Args:
            clean_logits: (B, K) without noise at t = 0.
            noisy_logits: (B, K) in each quarter, see `validation_point`.
        """
        clean = _scores(clean_logits, y)
        quarters = [_scores(logits, y) for logits in noisy_logits]
        # What training sees decides which checkpoint is best, and is calibrated.
        seen = quarters if self.noised else [clean]
        seen_logits = noisy_logits if self.noised else [clean_logits]
        self._validated += [(logits, y) for logits in seen_logits]
        values = {
            "val/loss": sum(loss for loss, _ in seen) / len(seen),
            "val/accuracy": sum(accuracy for _, accuracy in seen) / len(seen),
        }
        self.log_dict(values, prog_bar=True, batch_size=len(y), sync_dist=True)
        accuracies = [accuracy for _, accuracy in quarters]
        ranges = dict(zip(self.quarter_metrics, accuracies, strict=True))
        ranges["val/accuracy_clean"] = clean[1]
        self.log_dict(ranges, batch_size=len(y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return  # a few tiles, before anything is learnt
        logits, y = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        # (ranks, N, K) from several ranks; every one then finds the same temperature.
        logits, y = self.all_gather(logits).flatten(0, -2), self.all_gather(y).flatten()
        self.temperature.fill_(fit_temperature(logits, y))
        calibrated = F.cross_entropy(logits / self.temperature, y)
        values = {"val/temperature": self.temperature, "val/loss_calibrated": calibrated}
        self.log_dict(values, sync_dist=True)

    def validation_point(
        self, names: Sequence[str], quarter: int, z_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Time step (B,) within a quarter of the process, and noise, for each image.

        Both follow from the image's name, so that the numbers of two evaluations compare, whatever
        the batch size, the number of ranks or the order.
        """
        low, high = self.quarters[quarter]
        keys = [zlib.crc32(name.encode()) for name in names]
        spread = [zlib.crc32(f"{quarter}/{name}".encode()) % (high - low) for name in names]
        t = torch.tensor([low + s for s in spread], device=z_0.device)  # (B,)
        return t, IndexedNoise(0, quarter, keys, z_0.shape[1:], z_0.device).initial()


def check_latents(
    diffusion: GuidingClassifier | LatentDiffusion,
    path: str | PurePath,
    other: GuidingClassifier | LatentDiffusion,
    where: str,
    remedy: str,
) -> None:
    """UserError unless `other` works on the latents of `diffusion`, the model at `path`."""
    if other.autoencoder_fingerprint != diffusion.autoencoder_fingerprint:
        raise UserError(
            f"{where} was trained on latents of another autoencoder than {path}; {remedy}"
        )
    ours, theirs = tuple(diffusion.latent_shape), tuple(other.latent_shape)
    if theirs != ours:
        raise UserError(f"{where} takes latents {theirs}, {path} makes {ours}; {remedy}")
    scale, other_scale = diffusion.scale_factor, other.scale_factor
    if ((other_scale / scale - 1).abs() > SCALE_TOLERANCE).any():
        raise UserError(
            f"{where} has latent scale {scale_text(other_scale)}, {path} has {scale_text(scale)} "
            f"(allowed: {SCALE_TOLERANCE:.0%} apart); {remedy}"
        )
    if other.schedule != diffusion.schedule:
        raise UserError(
            f"{where} was trained for {other.schedule}, {path} for {diffusion.schedule}; {remedy}"
        )


def tile_names(paths: Sequence[str]) -> list[str]:
    """CLASS/file of each path."""
    return ["/".join(PurePath(path).parts[-2:]) for path in paths]


class NoisyLatentClassifier(GuidingClassifier):
    """p(y | z_t, t): trained on latents of a frozen autoencoder with noise of the whole schedule.

    The autoencoder is not part of the checkpoint: its fingerprint and the latent scale are, and a
    sampler compares them with those of the diffusion model.

    Args:
        net_config: target/params of `ldm.modules.unet.EncoderUNetModel`; `out_channels` is K.
        timesteps, beta_schedule, linear_start, linear_end: The diffusion model's, see
            `ldm.diffusion.schedule.NoiseSchedule`; not used where there is a `process`.
        noised: Train on z_t with t over the whole schedule. False trains on clean latents at t = 0,
            as the code published with the paper does.
        t_sampler: "uniform" or "stratified", see `sample_time_steps`.
        microbatch: Images per forward pass; gradients accumulate over the batch. None for all.
        first_stage: The frozen autoencoder, needed to train.
        Others as `GuidingClassifier`.
    """

    def __init__(
        self,
        net_config: dict,
        autoencoder_fingerprint: str,
        scale_factor: float | list[float],
        timesteps: int = 1000,
        beta_schedule: str = "scaled_linear",
        linear_start: float = 0.0015,
        linear_end: float = 0.0155,
        process: dict | None = None,
        noised: bool = True,
        t_sampler: Literal["uniform", "stratified"] = "uniform",
        microbatch: int | None = None,
        weight_decay: float = 0.0,
        anneal_steps: int | None = None,
        first_stage: AutoencoderNet | None = None,
    ):
        if process is None:
            schedule = NoiseSchedule(beta_schedule, timesteps, linear_start, linear_end)
            process = schedule.settings
        super().__init__(autoencoder_fingerprint, scale_factor, process, weight_decay, anneal_steps)
        self.net_config = net_config
        self.noised = noised
        self.t_sampler = t_sampler
        self.microbatch = microbatch  # several backward passes per step, hence optimised by hand
        self.net = instantiate_from_config(net_config)
        self.outputs = net_config["params"]["out_channels"]
        self.latent_shape = (self.net.in_channels, self.net.image_size, self.net.image_size)
        if first_stage is not None:
            self._check_first_stage(first_stage)
        # Around nn.Module's bookkeeping: the frozen autoencoder stays out of the checkpoint.
        object.__setattr__(self, "first_stage", first_stage)

    def _check_first_stage(self, first_stage: AutoencoderNet) -> None:
        made = (first_stage.embed_dim, first_stage.latent_size, first_stage.latent_size)
        if made != self.latent_shape:
            ours, theirs = ("x".join(map(str, shape)) for shape in (self.latent_shape, made))
            raise UserError(
                f"the classifier takes latents of {ours}, the autoencoder makes {theirs}; give the "
                "network's in_channels and image_size the autoencoder's, or another autoencoder"
            )

    def rebuild_config(self) -> dict[str, Any]:
        params = {
            "net_config": self.net_config,
            "autoencoder_fingerprint": self.autoencoder_fingerprint,
            "scale_factor": scale_record(self.scale_factor),
            **process_params(self.schedule.settings),
            "noised": self.noised,
        }
        return {"target": "ldm.models.classifier.NoisyLatentClassifier", "params": params}

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        """As for any module; checkpoints from before calibration have temperature 1."""
        state_dict = {"temperature": torch.ones(()), **state_dict}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @staticmethod
    def fixed_settings(params: dict[str, Any]) -> dict[str, Any]:
        settings = dict(params["net_config"]["params"])
        settings.pop("use_checkpoint", None)  # the same network either way
        return settings

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Logits (B, K) of noisy latents (B, C, H, W) at time steps (B,)."""
        return self.net(z_t, t)

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], sample: bool = True) -> Tensor:
        """Scaled latents z_0 (B, C, H, W) of a batch, see `posterior_of`: a draw, or the mean."""
        posterior = posterior_of(batch, self.first_stage)
        return self.scale_factor * (posterior.sample() if sample else posterior.mode())

    # Training

    def setup(self, stage: str) -> None:
        assert self.first_stage is not None, "training needs first_stage"
        self.first_stage.to(self.trainer.strategy.root_device).eval().requires_grad_(False)

    def networks(self) -> list[nn.Module]:
        first_stage = [] if self.first_stage is None else [self.first_stage.encoder]
        return [self.net, *first_stage]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer, y = self.optimizers(), batch["label"]
        z_0 = self.latents(batch)  # (B, C, H, W)
        if self.noised:
            t = sample_time_steps(self.t_sampler, len(y), self.schedule.T, z_0.device)  # (B,)
            # Not like z_0, whose memory layout would decide which value gets which number.
            eps = self.draw(torch.randn, z_0.shape, dtype=z_0.dtype)
            z_t = self.schedule.q_sample(z_0, t, eps)
        else:
            t, z_t = torch.zeros_like(y), z_0
        loss, accuracy = self.accumulate(z_t, t, y, batch, batch_idx)
        optimizer.step()
        optimizer.zero_grad()
        if self.anneal_steps is not None:
            self.lr_schedulers().step()
        bar = {"train/loss": loss, "train/accuracy": accuracy}
        self.log_dict(bar, prog_bar=True, batch_size=len(y))
        self.log("train/grad_norm", self.gradient_norm, batch_size=len(y))

    def accumulate(
        self, z_t: Tensor, t: Tensor, y: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean cross entropy to the weights, micro-batch by micro-batch.

        Returns:
            Mean loss and accuracy of the batch.
        """
        size = self.microbatch or len(y)
        loss, hits = torch.zeros((), device=y.device), torch.zeros((), device=y.device)
        for start in range(0, len(y), size):
            part = slice(start, start + size)
            logits = self.net(z_t[part], t[part]).float()  # (b, K)
            # Summed, then divided by B: micro-batches of unequal size count by their images.
            part_loss = F.cross_entropy(logits, y[part], reduction="sum") / len(y)
            self.check_finite(part_loss, batch, batch_idx)
            self.manual_backward(part_loss)
            loss += part_loss.detach()
            hits += (logits.argmax(dim=1) == y[part]).sum()
        return loss, hits / len(y)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        y = batch["label"]
        z_0 = self.latents(batch, sample=False)
        names = tile_names(batch["path"])
        clean_logits = self.net(z_0, torch.zeros_like(y)).float()  # (B, K)
        noisy_logits = [self.noisy_logits(z_0, names, q) for q in range(QUARTERS)]
        self.log_validation(clean_logits, noisy_logits, y)

    def noisy_logits(self, z_0: Tensor, names: Sequence[str], quarter: int) -> Tensor:
        """Logits (B, K) at one t per image within a quarter of the schedule."""
        t, eps = self.validation_point(names, quarter, z_0)
        return self.net(self.schedule.q_sample(z_0, t, eps), t).float()


def _scores(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy."""
    return F.cross_entropy(logits, y), (logits.argmax(dim=1) == y).float().mean()
