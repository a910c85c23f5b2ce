"""Samplers: published trajectories, oracles and properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.guidance import classifier_guidance
from ldm.diffusion.samplers import IndexedNoise, ddim, ddpm
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "ddim.npz")


def toy_eps(z_t, t):
    """The closed-form predictor of tests/golden/ddim.json."""
    return torch.tanh(z_t) * (0.3 + t.view(-1, 1, 1, 1) / 2000)


def latents(batch=2, seed=0):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def perfect_eps(schedule, z_0):
    return lambda z_t, t: schedule.predict_eps(z_t, t, z_0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("steps", [10, 50])
def test_golden_trajectories(golden, steps, eta, scale, dtype):
    assert json.loads((GOLDEN / "ddim.json").read_text())["T"] == 1000
    schedule = NoiseSchedule()
    noise = torch.tensor(golden[f"noise_{steps}"], dtype=dtype)
    eps_fn = classifier_guidance(toy_eps, lambda z, t: -(z - 1), schedule, scale)
    z_T = torch.tensor(golden["xT"], dtype=dtype)
    z_0 = ddim(eps_fn, schedule, z_T, time_pairs(1000, steps), eta, lambda j: noise[j])
    assert z_0.dtype == dtype
    # 1e-4 as the reference states; it agrees with a second implementation to 6e-5.
    expected = golden[f"x0_S{steps}_eta{eta}_scale{scale}"]
    np.testing.assert_allclose(z_0.numpy(), expected, rtol=0, atol=1e-4)


def test_every_golden_array_is_tested(golden):
    trajectories = {f"x0_S{s}_eta{e}_scale{g}" for s in (10, 50) for e in (0, 1) for g in (0, 1)}
    steps = {f"{name}_{s}" for name in ("noise", "timesteps") for s in (10, 50)}
    assert set(golden.files) == trajectories | steps | {"betas", "alphas_cumprod", "xT"}


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_perfect_predictor_returns_z_0(steps):
    schedule = NoiseSchedule()
    z_0 = latents().double()
    pairs = time_pairs(1000, steps, offset=0)  # ends at alpha_bar = 1
    z = ddim(perfect_eps(schedule, z_0), schedule, latents(seed=1).double(), pairs)
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_perfect_predictor_stays_on_its_path(steps):
    """At eta 0, z at every step is q_sample with the noise that z_T implies."""
    schedule = NoiseSchedule()
    z_0, eps = latents().double(), latents(seed=1).double()
    pairs = time_pairs(1000, steps)
    start = torch.full((2,), pairs[0][0])
    seen = []
    ddim(
        perfect_eps(schedule, z_0),
        schedule,
        schedule.q_sample(z_0, start, eps),
        pairs,
        on_step=seen.append,
    )
    assert [(s.j, s.t, s.t_prev) for s in seen] == [(j, *pair) for j, pair in enumerate(pairs)]
    for step in seen:
        expected = schedule.q_sample(z_0, torch.full((2,), step.t_prev), eps)
        torch.testing.assert_close(step.z, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(step.z_0_pred, z_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 9, 30, 100])
def test_ddim_eta_1_is_ddpm(name, steps):
    schedule = NoiseSchedule(name, 100)
    pairs = time_pairs(100, steps)
    noise = torch.randn(steps, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator())
    z_T = latents().double()
    z_ddim = ddim(toy_eps, schedule, z_T, pairs, 1.0, lambda j: noise[j])
    z_ddpm = ddpm(toy_eps, schedule, z_T, lambda j: noise[j], pairs)
    torch.testing.assert_close(z_ddim, z_ddpm, rtol=1e-9, atol=1e-9)


def test_ddpm_takes_every_step_by_default():
    schedule = NoiseSchedule(timesteps=20)
    seen, drawn = [], []

    def noise(j):
        drawn.append(j)
        return torch.zeros(2, 3, 4, 4)

    ddpm(toy_eps, schedule, latents(), noise, on_step=seen.append)
    assert [s.t for s in seen] == list(range(19, -1, -1))
    assert seen[-1].t_prev == -1
    assert drawn == list(range(19))  # the last step, onto clean latents, is without noise


def test_gaussian_data_keep_their_spread():
    """For data N(0, s2) the best predictor is linear; ancestral samples then tend to variance s2.

    The variance follows exactly from the linear recursion, so nothing is random here.
    """
    schedule, s2 = NoiseSchedule(), 0.25
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()

    def eps_fn(z_t, t):
        alpha_bar_t = schedule.alpha_bar(t, z_t)
        return (1 - alpha_bar_t).sqrt() / (alpha_bar_t * s2 + 1 - alpha_bar_t) * z_t

    errors = []
    for steps in (10, 50, 100, 1000):
        variance = 1.0
        for pair in time_pairs(1000, steps, offset=0):
            factor = ddpm(eps_fn, schedule, one, lambda j: zero, [pair]).item()
            added = ddpm(eps_fn, schedule, zero, lambda j: one, [pair]).item()
            variance = factor**2 * variance + added**2
        errors.append(abs(variance - s2) / s2)
    assert errors == sorted(errors, reverse=True)  # a coarse chain loses the posterior's own spread
    assert errors[-1] < 0.03


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range(eta):
    with pytest.raises(UserError, match=r"eta=.* must be in \[0, 1\]"):
        ddim(toy_eps, NoiseSchedule(), latents(), time_pairs(1000, 2), eta, lambda j: latents())


def test_noise_does_not_depend_on_the_batch():
    shape = (3, 4, 4)
    whole = IndexedNoise(7, 2, range(6), shape)
    for split in ([1] * 6, [4, 2], [3, 3]):
        start, parts = 0, []
        for size in split:
            parts.append(IndexedNoise(7, 2, range(start, start + size), shape))
            start += size
        assert torch.equal(torch.cat([p.initial() for p in parts]), whole.initial())
        # Out of order too: a draw has no history.
        for j in (3, 0):
            assert torch.equal(torch.cat([p(j) for p in parts]), whole(j))


def test_noise_streams_differ():
    def draw(seed, class_index, index, j):
        noise = IndexedNoise(seed, class_index, [index], (4,))
        return noise.initial() if j < 0 else noise(j)

    keys = [(s, c, i, j) for s in (0, 1) for c in (-1, 0, 1) for i in (0, 1) for j in (-1, 0, 1)]
    # Seeds that agree in 32 bits are still different seeds.
    keys += [(1 + 2**32, 0, 0, 0)]
    values = {tuple(draw(*key)[0].tolist()) for key in keys}
    assert len(values) == len(keys)


def test_torch_seeds_would_collide():
    """The bad version: torch's CPU generator keeps 32 bits of the seed."""
    generator = torch.Generator()
    first = torch.randn(4, generator=generator.manual_seed(1))
    second = torch.randn(4, generator=generator.manual_seed(1 + 2**32))
    assert torch.equal(first, second)


def test_mixed_classes_and_moments():
    shape = (3, 16, 16)
    mixed = IndexedNoise(0, [0, 1, 0], [0, 0, 1], shape).initial()
    assert torch.equal(mixed[1:2], IndexedNoise(0, 1, [0], shape).initial())
    assert torch.equal(mixed[[0, 2]], IndexedNoise(0, 0, [0, 1], shape).initial())
    many = IndexedNoise(0, 0, range(64), shape).initial()
    assert many.dtype == torch.float32
    # 49,152 values: standard error of the mean 0.0045, of the deviation 0.0032; four of each.
    assert abs(many.mean()) < 0.018 and abs(many.std() - 1) < 0.013
