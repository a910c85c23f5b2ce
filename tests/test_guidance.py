"""Classifier guidance against analytic gradients."""

import pytest
import torch

from ldm.diffusion.guidance import classifier_guidance, classifier_log_prob_grad
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, time_pairs


class LinearClassifier(torch.nn.Module):
    """logits = W z: grad_z log p(y | z) = W_y - sum_k p_k W_k."""

    def __init__(self, classes=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(classes, 48, generator=generator))

    def forward(self, z, t):
        return z.flatten(1) @ self.weight.T


def latents(batch=5, seed=1):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def toy_eps(z_t, t):
    return torch.tanh(z_t)


def test_gradient_of_a_linear_classifier():
    net, z, y = LinearClassifier(), latents(), torch.tensor([0, 1, 2, 3, 1])
    t = torch.full((5,), 10)
    with torch.no_grad():  # as inside a sampler
        grad = classifier_log_prob_grad(net, y)(z, t)
    p = net(z, t).softmax(1)
    expected = (net.weight[y] - p @ net.weight).view_as(z)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)
    assert not grad.requires_grad and net.weight.grad is None


def test_guided_eps():
    schedule, z, y = NoiseSchedule(), latents(), torch.tensor([0, 1, 2, 3, 1])
    t = torch.tensor([1, 10, 100, 500, 981])
    grad_fn = classifier_log_prob_grad(LinearClassifier(), y)
    guided = classifier_guidance(toy_eps, grad_fn, schedule, 2.5)(z, t)
    deviation = (1 - schedule.alphas_cumprod[t]).sqrt().float().view(-1, 1, 1, 1)
    expected = toy_eps(z, t) - deviation * 2.5 * grad_fn(z, t)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5)


def test_scale_0_is_unguided_bit_for_bit():
    schedule = NoiseSchedule()

    def fail(z, t):
        raise AssertionError("the classifier must not run")

    assert classifier_guidance(toy_eps, fail, schedule, 0) is toy_eps
    assert classifier_guidance(toy_eps, fail, schedule, 0.0) is toy_eps


def test_guidance_raises_the_wanted_probability():
    """Direction: towards the wanted class, more so at a larger scale, away at a negative one."""
    schedule, net = NoiseSchedule(), LinearClassifier()
    y = torch.tensor([0, 1, 2, 3, 1])
    pairs = time_pairs(1000, 20)
    probability = []
    for scale in (-0.1, 0, 0.1, 1):
        grad_fn = classifier_log_prob_grad(net, y)
        z = ddim(classifier_guidance(toy_eps, grad_fn, schedule, scale), schedule, latents(), pairs)
        log_prob = net(z, torch.zeros(5)).log_softmax(1)
        probability.append(log_prob.gather(1, y[:, None]).mean().item())
    assert probability == sorted(probability)
    assert probability[-1] > -0.05 > probability[1]


def test_interval():
    schedule = NoiseSchedule()
    calls = []

    def grad_fn(z, t):
        calls.append(int(t[0]))
        return torch.ones_like(z)

    guided = classifier_guidance(toy_eps, grad_fn, schedule, 1.0, interval=(100, 200))
    z = latents(4)
    t = torch.tensor([99, 100, 200, 201])
    changed = (guided(z, t) != toy_eps(z, t)).flatten(1).all(1)
    assert changed.tolist() == [False, True, True, False]
    calls.clear()
    outside = torch.full((4,), 300)
    assert torch.equal(guided(z, outside), toy_eps(z, outside))
    assert calls == []  # steps outside cost no classifier evaluation


def test_ratio_is_reported():
    schedule = NoiseSchedule()
    ratios = []
    guided = classifier_guidance(
        lambda z, t: torch.ones_like(z),
        lambda z, t: torch.ones_like(z),
        schedule,
        3.0,
        on_ratio=lambda t, ratio: ratios.append((t.tolist(), ratio.tolist())),
    )
    guided(latents(2), torch.tensor([500, 500]))
    expected = 3 * (1 - schedule.alphas_cumprod[500].item()) ** 0.5
    assert ratios == [([500, 500], pytest.approx([expected] * 2, rel=1e-6))]


def test_log_probability_is_reported():
    net, z, y = LinearClassifier(), latents(), torch.tensor([0, 1, 2, 3, 1])
    t, seen = torch.full((5,), 10), []
    silent = classifier_log_prob_grad(net, y)(z, t)
    gradient = classifier_log_prob_grad(net, y, lambda *args: seen.append(args))(z, t)
    assert torch.equal(gradient, silent)
    ((t_seen, log_prob),) = seen
    expected = net(z, t).log_softmax(1)[torch.arange(5), y]
    torch.testing.assert_close(log_prob, expected.detach(), rtol=0, atol=1e-6)
    assert torch.equal(t_seen, t) and not log_prob.requires_grad


def test_each_image_has_its_own_gradient():
    net, z, y = LinearClassifier(), latents(), torch.tensor([0, 1, 2, 3, 1])
    t = torch.full((5,), 10)
    whole = classifier_log_prob_grad(net, y)(z, t)
    for i in range(5):
        one = classifier_log_prob_grad(net, y[i : i + 1])(z[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one, rtol=0, atol=1e-6)
