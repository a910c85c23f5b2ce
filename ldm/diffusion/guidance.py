"""Guidance: functions that wrap a noise predictor and give a guided noise predictor.

Classifier guidance (Dhariwal & Nichol 2021, algorithm 2) adds a classifier's gradient,

    eps_hat = eps(z_t, t) - sqrt(1 - alpha_bar_t) * scale * grad_z log p(y | .)

where the classifier gets z_t, or the clean latent predicted from it. Extrapolation goes
from a weaker prediction through a stronger one: classifier-free guidance (Ho & Salimans 2022) and
autoguidance (Karras et al. 2024). Every sampler can be guided, and wrappers can be nested.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process, any_within
from ldm.diffusion.samplers import EpsFn
from ldm.errors import UserError

GradFn = Callable[[Tensor, Tensor], Tensor]
ReportFn = Callable[[Tensor, Tensor], None]


def classifier_log_prob_grad(
    net: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    temperature: float = 1.0,
    on_log_prob: ReportFn | None = None,
) -> GradFn:
    """Gradient of log p(y | z_t, t) in z_t, for a network that gives logits.

    Args:
        net: (z_t (B, C, H, W), t (B,)) -> logits (B, K).
        y: Wanted classes, (B,) int64 in [0, K).
        temperature: Divisor of the logits; above 1 for an overconfident classifier.
        on_log_prob: Called with t (B,) and log p(y | z_t, t) (B,) at each evaluation.

    Returns:
        (z_t, t) -> gradient shaped like z_t; the images of a batch do not affect each other.

    Raises:
        UserError: The temperature is not above 0.
    """
    return _log_prob_grad(net, y, temperature, on_log_prob)


def z_0_log_prob_grad(
    net: Callable[[Tensor, Tensor], Tensor],
    eps_fn: EpsFn,
    schedule: Process,
    y: Tensor,
    temperature: float = 1.0,
    on_log_prob: ReportFn | None = None,
) -> GradFn:
    """Gradient in z_t of log p(y | z_0_pred(z_t), t = 0), for a classifier of clean latents.

    This is forward universal guidance (Bansal et al. 2023). The gradient runs through the noise
    predictor (Chung et al. 2023), which needs another forward and backward pass of it.

    Args:
        eps_fn: Noise predictor that gives z_0_pred; unguided, differentiable.
        Others as in `classifier_log_prob_grad`. `on_log_prob` gets the t of z_t.
    """

    def on_prediction(z_t: Tensor, t: Tensor) -> Tensor:
        z_0_pred = schedule.predict_z_0(z_t, t, eps_fn(z_t, t))
        return net(z_0_pred, torch.zeros_like(t))

    return _log_prob_grad(on_prediction, y, temperature, on_log_prob)


def shared_pass(
    eps_and_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    temperature: float = 1.0,
    interval: tuple[int, int] | None = None,
    on_log_prob: ReportFn | None = None,
) -> tuple[EpsFn, GradFn]:
    """A noise predictor and a classifier's gradient from one pass of their common network.

    In readout guidance (Luo et al. 2024) the classifier reads features of the noise predictor. The
    gradient can only be computed at the latents of the last prediction, as `classifier_guidance`
    does.

    Args:
        eps_and_logits: (z_t, t) -> eps, shaped like z_t, and logits (B, K).
        interval: Times at which the gradient will be needed, as in `classifier_guidance`; at
            others no graph is kept.
        Others as in `classifier_log_prob_grad`.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # z_t as given, its autograd leaf, logits

    def eps_fn(z_t: Tensor, t: Tensor) -> Tensor:
        kept.clear()
        if interval is not None and not any_within(t, interval):
            with torch.no_grad():
                return eps_and_logits(z_t, t)[0]
        with torch.enable_grad():
            leaf = z_t.detach().requires_grad_()
            eps_pred, logits = eps_and_logits(leaf, t)
        kept.append((z_t, leaf, logits))
        return eps_pred.detach()

    def grad(z_t: Tensor, t: Tensor) -> Tensor:
        (seen, leaf, logits), *_ = kept
        assert seen is z_t, "the gradient belongs to the last prediction"
        kept.clear()
        with torch.enable_grad():
            wanted = _wanted(logits, y, temperature)
            gradient = torch.autograd.grad(wanted.sum(), leaf)[0]
        if on_log_prob is not None:
            on_log_prob(t, wanted.detach()[:, 0])
        return gradient

    _check_temperature(temperature)
    return eps_fn, grad


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"temperature={temperature} of the classifier must be above 0")


def _wanted(logits: Tensor, y: Tensor, temperature: float) -> Tensor:
    """log p(y), (B, 1)."""
    log_p = (logits.float() / temperature).log_softmax(dim=1)
    return log_p.gather(1, y.view(-1, 1).to(logits.device))


def _log_prob_grad(
    logits_fn: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    temperature: float,
    on_log_prob: ReportFn | None,
) -> GradFn:
    _check_temperature(temperature)

    def grad(z_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            wanted = _wanted(logits_fn(z_t, t), y, temperature)
            gradient = torch.autograd.grad(wanted.sum(), z_t)[0]
        if on_log_prob is not None:
            on_log_prob(t, wanted.detach()[:, 0])
        return gradient

    return grad


def classifier_guidance(
    eps_fn: EpsFn,
    log_prob_grad: GradFn,
    schedule: Process,
    scale: float,
    interval: tuple[int, int] | None = None,
    normalise: bool = False,
    clip: float | None = None,
    on_ratio: ReportFn | None = None,
) -> EpsFn:
    """Guide a noise predictor in the direction of `log_prob_grad`.

    Args:
        scale: Guidance scale, one multiplication; 0 returns `eps_fn` itself.
        interval: Guide only if lo <= t <= hi (Kynkaanniemi et al. 2024); by default always.
            The classifier is not evaluated if no image is guided.
        normalise: Use the gradient's direction only: the guidance is `scale` times as long as eps,
            image by image. A gradient of 0 has no direction and does not guide.
        clip: Largest length of the guidance in multiples of that of eps, image by image.
        on_ratio: Called with t (B,) and |guidance| / |eps| (B,) at each evaluation, which shows
            whether the guidance is too weak or too strong.

    Raises:
        UserError: `clip` is not above 0.
    """
    if clip is not None and not clip > 0:
        raise UserError(f"clip={clip} of the guidance must be above 0 (None for no limit)")
    if scale == 0:
        return eps_fn

    def guidance(z_t: Tensor, t: Tensor, eps_pred: Tensor) -> Tensor:
        gradient = log_prob_grad(z_t, t)
        if normalise:
            shift = scale * _norm(eps_pred) * _direction(gradient)  # (B, C, H, W)
        else:
            shift = schedule.noise(t, z_t) * scale * gradient
        if clip is not None:
            longest = clip * _norm(eps_pred)  # (B, 1, 1, 1)
            shift = torch.where(_norm(shift) > longest, longest * _direction(shift), shift)
        return -shift

    return _guided(eps_fn, guidance, interval, on_ratio)


def extrapolate(
    weak_fn: EpsFn,
    strong_fn: EpsFn,
    scale: float,
    interval: tuple[int, int] | None = None,
    on_ratio: ReportFn | None = None,
) -> EpsFn:
    """weak + scale * (strong - weak), a prediction beyond the stronger of two.

    This is classifier-free guidance if `weak_fn` knows no label (Ho & Salimans 2022), and
    autoguidance if it is a worse version of the same model (Karras et al. 2024).

    Args:
        scale: 1 returns `strong_fn` itself; a larger one extrapolates.
        interval: Extrapolate only if lo <= t <= hi; at other times the prediction is the strong
            one, and the weak network is not evaluated.
        on_ratio: Called with t (B,) and |(scale - 1) (strong - weak)| / |strong| (B,).
    """
    if scale == 1:
        return strong_fn

    def guidance(z_t: Tensor, t: Tensor, eps_pred: Tensor) -> Tensor:
        return (scale - 1) * (eps_pred - weak_fn(z_t, t))

    return _guided(strong_fn, guidance, interval, on_ratio)


def _guided(
    eps_fn: EpsFn,
    guidance: Callable[[Tensor, Tensor, Tensor], Tensor],
    interval: tuple[int, int] | None,
    on_ratio: ReportFn | None,
) -> EpsFn:
    """eps + guidance(z_t, t, eps) for the images within the interval."""

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        eps_pred = eps_fn(z_t, t)
        if interval is not None:
            if not any_within(t, interval):
                return eps_pred
            inside = ((t >= interval[0]) & (t <= interval[1])).view(-1, 1, 1, 1)
        term = guidance(z_t, t, eps_pred)  # (B, C, H, W)
        if interval is not None:
            term = torch.where(inside, term, 0)
        if on_ratio is not None:
            on_ratio(t, (_norm(term) / _norm(eps_pred)).flatten())
        return eps_pred + term

    return guided


def _norm(x: Tensor) -> Tensor:
    """Length of each image, (B, 1, 1, 1), at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype).view(-1, 1, 1, 1)


def _direction(x: Tensor) -> Tensor:
    """Each image divided by its length, however small or large; 0 stays 0."""
    # Squares of a tiny gradient underflow, so its largest value is scaled to 1 first. The length is
    # then at least 1, except for an image of zeros.
    peak = x.abs().amax(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    x = x / torch.where(peak > 0, peak, 1)
    return x / _norm(x).clamp(min=1)
