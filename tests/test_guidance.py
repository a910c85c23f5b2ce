"""Guidance against analytic gradients, finite differences and its own definitions."""

import pytest
import torch

from ldm.diffusion.guidance import (
    classifier_guidance,
    classifier_log_prob_grad,
    extrapolate,
    z_0_log_prob_grad,
)
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError


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


def must_not_run(*args):
    raise AssertionError("this network must not be evaluated")


def lengths(x):
    return x.flatten(1).norm(dim=1)


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
    for options in ({}, {"normalise": True}, {"clip": 0.5}):
        for scale in (0, 0.0):
            assert classifier_guidance(toy_eps, must_not_run, schedule, scale, **options) is toy_eps


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
    gradient = classifier_log_prob_grad(net, y, on_log_prob=lambda *args: seen.append(args))(z, t)
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


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_temperature_divides_the_logits(temperature):
    """grad log softmax(W z / T)_y = (W_y - sum_k p_k(T) W_k) / T."""
    net, z, y = LinearClassifier(), latents(), torch.tensor([0, 1, 2, 3, 1])
    t, seen = torch.full((5,), 10), []
    grad_fn = classifier_log_prob_grad(
        net, y, temperature, lambda t, log_prob: seen.append(log_prob)
    )
    gradient = grad_fn(z, t)
    p = (net(z, t) / temperature).softmax(1)
    expected = ((net.weight[y] - p @ net.weight) / temperature).view_as(z)
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0], p.detach()[torch.arange(5), y].log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_out_of_range(temperature):
    y = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="temperature=.* must be above 0"):
        classifier_log_prob_grad(LinearClassifier(), y, temperature)
    with pytest.raises(UserError, match="temperature=.* must be above 0"):
        z_0_log_prob_grad(LinearClassifier(), toy_eps, NoiseSchedule(), y, temperature)


def test_z_0_gradient_by_hand():
    """With eps = a z, z_0_pred = c z: the chain rule gives c times the gradient at z_0_pred."""
    schedule, net, z = NoiseSchedule(), LinearClassifier(), latents()
    y, t, a = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 10, 100, 500, 981]), 0.3
    seen = []
    with torch.no_grad():
        gradient = z_0_log_prob_grad(
            net, lambda z_t, t: a * z_t, schedule, y, on_log_prob=lambda *args: seen.append(args)
        )(z, t)
    alpha_bar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    factor = (1 - a * (1 - alpha_bar).sqrt()) / alpha_bar.sqrt()
    at_z_0 = classifier_log_prob_grad(net, y)(factor * z, torch.zeros_like(t))
    torch.testing.assert_close(gradient, factor * at_z_0, rtol=1e-4, atol=1e-5)
    assert not gradient.requires_grad
    ((t_seen, log_prob),) = seen
    assert torch.equal(t_seen, t)  # the step of the sampler, not the classifier's 0
    expected = net(factor * z, t).log_softmax(1)[torch.arange(5), y]
    torch.testing.assert_close(log_prob, expected.detach(), rtol=1e-4, atol=1e-5)


def test_z_0_gradient_is_a_finite_difference():
    """Through a network that is not linear, in float64; the classifier is asked at t = 0."""
    schedule, net = NoiseSchedule(), LinearClassifier().double()
    z, y, t = latents(2).double(), torch.tensor([2, 0]), torch.tensor([400, 50])

    def logits(z_0, t):
        assert (t == 0).all()
        return torch.tanh(0.3 * net(z_0, t))

    def log_prob(z_t):
        z_0 = schedule.predict_z_0(z_t, t, toy_eps(z_t, t))
        scores = logits(z_0, torch.zeros_like(t)).log_softmax(1)
        return scores[torch.arange(2), y].sum().item()

    gradient = z_0_log_prob_grad(logits, toy_eps, schedule, y)(z, t)
    h = 1e-3  # float32 log probabilities inside: errors of 1e-7 / h and of h^2
    for k in (0, 17, 47):
        for b in (0, 1):
            step = torch.zeros_like(z)
            step[b].view(-1)[k] = h
            difference = (log_prob(z + step) - log_prob(z - step)) / (2 * h)
            assert gradient[b].flatten()[k].item() == pytest.approx(difference, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("size", [1e-40, 1e-3, 1e30])
def test_normalised_guidance_has_the_length_of_eps(size):
    """Whatever the gradient's size, also where its squares leave float32, and for each image."""
    schedule, z, t = NoiseSchedule(), latents(4), torch.full((4,), 300)
    gradient = size * latents(4, seed=2) * torch.tensor([1, 2, 30, 0]).view(-1, 1, 1, 1)
    guided = classifier_guidance(toy_eps, lambda z, t: gradient, schedule, 0.7, normalise=True)
    shift = toy_eps(z, t) - guided(z, t)
    expected = 0.7 * lengths(toy_eps(z, t)) * torch.tensor([1, 1, 1, 0])
    torch.testing.assert_close(lengths(shift), expected, rtol=1e-5, atol=0)
    # 1e-40 is denormal: a few digits are left.
    cosine = torch.cosine_similarity(shift[:3].flatten(1), (gradient[:3] / size).flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3), rtol=0, atol=1e-4)


def test_clipped_guidance_is_no_longer_than_told():
    schedule, z, t = NoiseSchedule(), latents(4), torch.full((4,), 300)
    gradient = latents(4, seed=2) * torch.tensor([0.01, 10, 1e30, 0]).view(-1, 1, 1, 1)

    def shift(**options):
        guided = classifier_guidance(toy_eps, lambda z, t: gradient, schedule, 2.0, **options)
        return toy_eps(z, t) - guided(z, t)

    free, clipped = shift(), shift(clip=0.5)
    assert torch.equal(clipped[[0, 3]], free[[0, 3]])  # short ones are left alone, bit for bit
    limit = 0.5 * lengths(toy_eps(z, t))
    torch.testing.assert_close(lengths(clipped)[1:3], limit[1:3], rtol=1e-5, atol=0)
    cosine = torch.cosine_similarity(clipped[1:3].flatten(1), latents(4, seed=2)[1:3].flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2), rtol=0, atol=1e-5)
    both = shift(normalise=True, clip=0.5)
    expected = limit * torch.tensor([1, 1, 1, 0])
    torch.testing.assert_close(lengths(both), expected, rtol=1e-5, atol=0)
    assert torch.equal(shift(normalise=True, clip=2.5), shift(normalise=True))


@pytest.mark.parametrize("clip", [0, -0.5, float("nan")])
def test_clip_out_of_range(clip):
    with pytest.raises(UserError, match="clip=.* must be above 0"):
        classifier_guidance(toy_eps, toy_eps, NoiseSchedule(), 1.0, clip=clip)


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"clip": 0.3}])
@pytest.mark.parametrize("on_z_0", [False, True])
def test_guided_images_do_not_depend_on_their_neighbours(options, on_z_0):
    """Bit for bit: a batch of the same image beside others has the same result for it."""
    schedule, net, z = NoiseSchedule(), LinearClassifier(), latents()
    y, t = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 10, 100, 500, 981])

    def guided(z, y):
        if on_z_0:
            grad_fn = z_0_log_prob_grad(net, toy_eps, schedule, y)
        else:
            grad_fn = classifier_log_prob_grad(net, y)
        return classifier_guidance(toy_eps, grad_fn, schedule, 1.5, **options)(z, t)

    whole = guided(z, y)
    others = 100 * latents(seed=9)
    for i in range(5):
        mixed, labels = others.clone(), y.flip(0)
        mixed[i], labels[i] = z[i], y[i]
        assert torch.equal(guided(mixed, labels)[i], whole[i])


def test_extrapolation():
    z, t = latents(3), torch.tensor([1, 500, 981])
    weak, strong = toy_eps, lambda z_t, t: 0.5 * z_t
    for scale in (-1.0, 0.0, 0.5, 3.0):
        expected = weak(z, t) + scale * (strong(z, t) - weak(z, t))
        actual = extrapolate(weak, strong, scale)(z, t)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert extrapolate(must_not_run, strong, 1) is strong
    assert extrapolate(must_not_run, strong, 1.0) is strong


def test_extrapolation_interval_and_ratio():
    z, calls, ratios = latents(4), [], []

    def weak(z_t, t):
        calls.append(t.tolist())
        return torch.zeros_like(z_t)

    eps_fn = extrapolate(
        weak, toy_eps, 3.0, (100, 200), on_ratio=lambda t, ratio: ratios.append(ratio.tolist())
    )
    outside = torch.tensor([0, 99, 201, 999])
    assert torch.equal(eps_fn(z, outside), toy_eps(z, outside))
    assert calls == [] and ratios == []
    mixed = torch.tensor([99, 100, 200, 201])
    expected = toy_eps(z, mixed) * torch.tensor([1, 3, 3, 1]).view(-1, 1, 1, 1)
    torch.testing.assert_close(eps_fn(z, mixed), expected, rtol=0, atol=1e-6)
    assert calls == [mixed.tolist()]
    assert ratios == [pytest.approx([0, 2, 2, 0], rel=1e-6)]


def test_an_interval_without_guidance_hides_what_is_not_finite():
    """Outside the interval not even a broken gradient shows."""
    schedule, z, t = NoiseSchedule(), latents(2), torch.tensor([50, 150])
    guided = classifier_guidance(
        toy_eps, lambda z, t: z * float("nan"), schedule, 1.0, interval=(100, 200)
    )(z, t)
    assert torch.equal(guided[0], toy_eps(z, t)[0]) and guided[1].isnan().all()


def test_extrapolation_and_classifier_guidance_nest():
    schedule, z, t = NoiseSchedule(), latents(2), torch.tensor([300, 301])
    inner = extrapolate(toy_eps, lambda z_t, t: 0.5 * z_t, 2.0)
    outer = classifier_guidance(inner, lambda z, t: torch.ones_like(z), schedule, 3.0)
    expected = inner(z, t) - 3 * schedule.noise(t, z)
    torch.testing.assert_close(outer(z, t), expected, rtol=0, atol=1e-6)
