"""Sampling of images by (class, index).

Letters: B batch, C channels, H W latent size, K classes, S sampler steps. An image depends on its
class, its index within the class, the models and the settings, and on nothing else: not on the
batch it was made in, nor on how many processes shared the work. On a CPU that is exact (see
`fixed_batches` and `ldm.devices.one_thread`); on a GPU, up to the rounding of kernels
chosen by batch size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.tiles import to_uint8
from ldm.devices import Devices
from ldm.diffusion.guidance import (
    classifier_guidance,
    classifier_log_prob_grad,
    extrapolate,
    shared_pass,
    z_0_log_prob_grad,
)
from ldm.diffusion.samplers import EpsFn, IndexedNoise, Step, sample
from ldm.errors import UserError
from ldm.models.classifier import GuidingClassifier
from ldm.models.diffusion import LatentDiffusion
from ldm.synthesis.guidance_log import GuidanceLog
from ldm.synthesis.models import Models
from ldm.synthesis.settings import Sampling

CPU_BATCH = 8  # images per forward pass on a CPU, see `fixed_batches`


def fixed_batches(fn: Callable, size: int = CPU_BATCH) -> Callable:
    """`fn` evaluated on parts of exactly `size` images, the last one padded with its first image.

    CPU kernels round differently for different batch sizes (convolutions of one image, matrix
    products), which shows as single grey levels here and there. With one batch size they see the
    same shapes always, and an image has the same bytes in any batch. Gradients pass through.

    Args:
        fn: Of tensors (B, ...), returning one such tensor or a tuple of them.
    """

    def evaluate(*batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = []
        for start in range(0, len(batch[0]), size):
            part = [x[start : start + size] for x in batch]
            count = len(part[0])
            if count < size:
                part = [torch.cat([x, x[:1].expand(size - count, *x.shape[1:])]) for x in part]
            result = fn(*part)
            alone = isinstance(result, Tensor)
            results.append([x[:count] for x in ((result,) if alone else result)])
        columns = tuple(torch.cat(column) for column in zip(*results, strict=True))
        return columns[0] if alone else columns

    return evaluate


def accelerated(
    fn: Callable, devices: Devices, device: torch.device, network: bool = True
) -> Callable:
    """`fn` of latents and more, run as `devices` says; its tensor or tensors become float32.

    Args:
        network: Whether it is one of the networks that are compiled, if any are.
    """
    call = torch.compile(fn) if devices.compile and network else fn

    def evaluate(z: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        if devices.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        with devices.autocast(device):
            result = call(z, *others)
        return result.float() if isinstance(result, Tensor) else tuple(x.float() for x in result)

    return evaluate


class Confidence(NamedTuple):
    """The classifier's opinion of a finished latent, at t = 0; None without a classifier."""

    prob: float | None = None  # p(y | z_0) of the wanted class
    # Of p(. | z_0), nats: 0 for a certain classifier, log K for one that guesses.
    entropy: float | None = None


class Synthesiser:
    """Samples images by (class, index).

    Args:
        models: On the device to use.
        sampling: What decides the images.
        devices: How the networks are run.

    Attributes:
        guidance_log: What guidance did at each time step, over all images so far.
    """

    def __init__(self, models: Models, sampling: Sampling, devices: Devices | None = None):
        self.models = models
        self.sampling = sampling
        self.devices = devices or Devices()
        process = models.diffusion.schedule
        if sampling.sampler not in process.samplers:
            raise UserError(
                f"sampler={sampling.sampler} does not suit the diffusion model "
                f"({type(process).__name__}); choose {' or '.join(process.samplers)}"
            )
        start = None if sampling.strength is None else sampling.strength * process.T
        self.pairs = process.time_pairs(sampling.steps, start)
        self.device = models.diffusion.scale_factor.device
        self.guidance_log = GuidanceLog()
        in_parts = fixed_batches if self.device.type == "cpu" else lambda fn: fn
        if self.devices.channels_last:
            for model in (models.diffusion, models.classifier, models.weak):
                if model is not None:
                    model.to(memory_format=torch.channels_last)
        self._eps = self._noise_predictor(models.diffusion)
        self._weak_eps = None if models.weak is None else self._noise_predictor(models.weak)
        self._classify = self._shared = None
        if models.classifier is not None:
            net = models.classifier.logits_model()
            self._classify = accelerated(net, self.devices, self.device)
            self._shared = self._shared_pass(models.classifier)
        self._predict = in_parts(self._guided)
        self._judge = in_parts(self._distribution)
        decode = models.diffusion.decode_first_stage
        self._decode = in_parts(accelerated(decode, self.devices, self.device, network=False))

    def _noise_predictor(
        self, model: LatentDiffusion
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """eps(z_t, t, y); a model without labels does not look at y."""
        net = model.eps_model(use_ema=self.sampling.ema)
        eps = accelerated(net, self.devices, self.device)
        return eps if model.conditional else lambda z_t, t, y: eps(z_t, t)

    def _shared_pass(self, classifier: GuidingClassifier) -> Callable | None:
        """Noise and logits from one pass of the UNet, where the classifier reads it."""
        shared = classifier.shared_model()
        if shared is None or self.sampling.guidance_on != "z_t" or self.sampling.scale == 0:
            return None
        if not self.sampling.ema:
            raise UserError("ema=False: the readout reads the averaged weights; leave `ema` out")
        return accelerated(shared, self.devices, self.device)

    def _guided(self, z_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Guided noise prediction, and what guidance did: (B, 3), NaN where it did not act.

        The three are |classifier guidance| / |eps|, p(y | .) and |extrapolation| / |eps|.
        """
        sampling, schedule = self.sampling, self.models.diffusion.schedule
        seen = torch.full((len(y), 3), float("nan"), device=z_t.device)

        def note(column: int) -> Callable[[Tensor, Tensor], None]:
            return lambda t, values: seen[:, column].copy_(values)

        def own(z_t: Tensor, t: Tensor) -> Tensor:
            return self._eps(z_t, t, y)

        def on_log_prob(t: Tensor, log_prob: Tensor) -> None:
            note(1)(t, log_prob.exp())

        temperature, gradient = sampling.temperature, None
        if self._shared is not None:
            own, gradient = shared_pass(
                self._shared, y, temperature, sampling.interval, on_log_prob
            )
        eps_fn: EpsFn = own
        if sampling.cfg_scale != 1:
            nothing = torch.full_like(y, -1)
            eps_fn = extrapolate(
                lambda z_t, t: self._eps(z_t, t, nothing),
                eps_fn,
                sampling.cfg_scale,
                sampling.interval,
                note(2),
            )
        if self._weak_eps is not None:
            eps_fn = extrapolate(
                lambda z_t, t: self._weak_eps(z_t, t, y),
                eps_fn,
                sampling.autoguidance_scale,
                sampling.interval,
                note(2),
            )
        if self._classify is not None and sampling.scale != 0:
            if sampling.guidance_on == "z_0":
                # Through the model's own prediction: extrapolating it would double the cost.
                gradient = z_0_log_prob_grad(
                    self._classify, own, schedule, y, temperature, on_log_prob
                )
            elif gradient is None:
                gradient = classifier_log_prob_grad(self._classify, y, temperature, on_log_prob)
            eps_fn = classifier_guidance(
                eps_fn,
                gradient,
                schedule,
                sampling.scale,
                sampling.interval,
                sampling.normalise,
                sampling.clip,
                note(0),
            )
        return eps_fn(z_t, t), seen

    def _distribution(self, z_0: Tensor) -> Tensor:
        """p(. | z_0) of the classifier at t = 0, (B, K)."""
        t = torch.zeros(len(z_0), dtype=torch.int64, device=z_0.device)
        return (self._classify(z_0, t) / self.sampling.temperature).softmax(dim=1)

    @torch.no_grad()
    def latents(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        on_step: Callable[[Step], None] | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Clean scaled latents (B, C, H, W) of images `indices` of classes `labels` (-1: no class).

        Args:
            sources: Clean scaled latents to start from where there is a `Sampling.strength`.

        Raises:
            UserError: The latents are not finite.
        """
        sampling, schedule = self.sampling, self.models.diffusion.schedule
        shape = self.models.diffusion.latent_shape
        noise = IndexedNoise(sampling.seed, labels, indices, shape, self.device)
        y = torch.tensor(labels, dtype=torch.int64, device=self.device)  # (B,)
        seen, times = [], []  # per evaluation, (B, 3) and ()

        def eps_fn(z_t: Tensor, t: Tensor) -> Tensor:
            eps_pred, done = self._predict(z_t, t, y)
            seen.append(done)
            times.append(t[0])
            return eps_pred

        z_T = noise.initial()
        assert (sources is None) == (sampling.strength is None)
        if sources is not None:
            t = schedule.times(self.pairs[0][0], len(labels), self.device)
            z_T = schedule.q_sample(sources.to(self.device), t, z_T)
        z_0 = sample(
            sampling.sampler,
            eps_fn,
            schedule,
            z_T,
            self.pairs,
            sampling.eta,
            noise,
            sampling.limit,
            on_step,
        )
        if not z_0.isfinite().all():
            raise UserError(
                f"sampling gave latents that are not finite (scale={sampling.scale:g}, "
                f"steps={sampling.steps}); lower `classifier_scale` or raise `custom_steps`"
            )
        # One transfer for all steps: asking at each would make a GPU wait.
        sums = torch.stack(seen).double().sum(dim=1).tolist()  # (S, 3)
        visited = [round(t, 3) for t in torch.stack(times).tolist()]
        self.guidance_log.add(visited, sums, len(labels))
        return z_0

    @torch.no_grad()
    def images(self, z_0: Tensor, detail: Tensor | None = None) -> np.ndarray:
        """Decoded tiles, uint8 (B, H, W, 3).

        Args:
            detail: Added to them, (B, 3, H, W).
        """
        x = self._decode(z_0)
        return to_uint8(x if detail is None else x + detail)

    @torch.no_grad()
    def confidences(self, z_0: Tensor, labels: Sequence[int]) -> list[Confidence]:
        """The classifier's opinion of each latent."""
        if self._classify is None:
            return [Confidence()] * len(labels)
        p = self._judge(z_0)  # (B, K)
        wanted = p.gather(1, torch.tensor(labels, device=p.device)[:, None])[:, 0].tolist()
        entropies = torch.special.entr(p).sum(dim=1).tolist()
        return [Confidence(*pair) for pair in zip(wanted, entropies, strict=True)]
