"""Classifier guidance (Dhariwal & Nichol 2021, algorithm 2) as a wrapper around a noise predictor.

    eps_hat = eps(z_t, t) - sqrt(1 - alpha_bar_t) * scale * grad_z log p(y | z_t, t)

The wrapper is itself a noise predictor, so every sampler can be guided.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.samplers import EpsFn
from ldm.diffusion.schedule import NoiseSchedule

GradFn = Callable[[Tensor, Tensor], Tensor]


def classifier_log_prob_grad(
    net: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    on_log_prob: Callable[[Tensor, Tensor], None] | None = None,
) -> GradFn:
    """Gradient of log p(y | z_t, t) in z_t, for a network that gives logits.

    Args:
        net: (z_t (B, C, H, W), t (B,)) -> logits (B, K).
        y: Wanted classes, (B,) int64 in [0, K).
        on_log_prob: Called with t (B,) and log p(y | z_t, t) (B,) at each evaluation.

    Returns:
        (z_t, t) -> gradient shaped like z_t; each image's gradient is its own.
    """

    def grad(z_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            log_prob = net(z_t, t).float().log_softmax(dim=1)  # (B, K)
            wanted = log_prob.gather(1, y.view(-1, 1).to(z_t.device))  # (B, 1)
            gradient = torch.autograd.grad(wanted.sum(), z_t)[0]
        if on_log_prob is not None:
            on_log_prob(t, wanted.detach()[:, 0])
        return gradient

    return grad


def classifier_guidance(
    eps_fn: EpsFn,
    log_prob_grad: GradFn,
    schedule: NoiseSchedule,
    scale: float,
    interval: tuple[int, int] | None = None,
    on_ratio: Callable[[Tensor, Tensor], None] | None = None,
) -> EpsFn:
    """The noise predictor guided towards what `log_prob_grad` ascends.

    Args:
        scale: Guidance scale, one multiplication; 0 returns `eps_fn` itself.
        interval: Guide only where lo <= t <= hi (Kynkaanniemi et al. 2024); everywhere by default.
        on_ratio: Called with t (B,) and |guidance| / |eps| (B,) at each evaluation: whether
            guidance does nothing or drowns the noise predictor.
    """
    if scale == 0:
        return eps_fn

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        eps_pred = eps_fn(z_t, t)
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])  # (B,)
            if not inside.any():
                return eps_pred
        shift = schedule.noise(t, z_t) * scale * log_prob_grad(z_t, t)  # (B, C, H, W)
        if interval is not None:
            shift = shift * inside.view(-1, 1, 1, 1)
        if on_ratio is not None:
            ratio = shift.flatten(1).norm(dim=1) / eps_pred.flatten(1).norm(dim=1)  # (B,)
            on_ratio(t, ratio)
        return eps_pred - shift

    return guided
