"""Noise schedules and time steps: exact facts."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.schedule import NoiseSchedule, make_betas, time_pairs
from ldm.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "ddim.npz")


def test_golden_schedule(golden):
    settings = json.loads((GOLDEN / "ddim.json").read_text())
    schedule = NoiseSchedule(
        timesteps=settings["T"],
        linear_start=settings["linear_start"],
        linear_end=settings["linear_end"],
    )
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.betas.numpy(), golden["betas"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        schedule.alphas_cumprod.numpy(), golden["alphas_cumprod"], rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("steps", [10, 50])
def test_golden_time_steps(golden, steps):
    pairs = time_pairs(1000, steps)
    assert [t for t, _ in reversed(pairs)] == golden[f"timesteps_{steps}"].tolist()
    assert pairs[-1] == (1, 0)  # the published final alpha is alphas_cumprod[0]


def test_hand_worked_betas():
    # sqrt(0.01) = 0.1, sqrt(0.09) = 0.3: the middle of the roots is 0.2, of the betas 0.05.
    assert make_betas("scaled_linear", 3, 0.01, 0.09).tolist() == pytest.approx([0.01, 0.04, 0.09])
    assert make_betas("linear", 3, 0.01, 0.09).tolist() == pytest.approx([0.01, 0.05, 0.09])
    schedule = NoiseSchedule("linear", 3, 0.01, 0.09)
    expected = [0.99, 0.99 * 0.95, 0.99 * 0.95 * 0.91]
    assert schedule.alphas_cumprod.tolist() == pytest.approx(expected)


def test_cosine_follows_its_equation():
    schedule = NoiseSchedule("cosine", 1000)
    f = [np.cos((i / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(1001)]
    # Below the clipped end, alpha_bar is f(t)/f(0) itself.
    np.testing.assert_allclose(
        schedule.alphas_cumprod[:990].numpy(), np.array(f[1:991]) / f[0], rtol=1e-10
    )
    assert schedule.betas.max() == 0.999
    assert (schedule.alphas_cumprod > 0).all()


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("timesteps", [1, 2, 1000])
def test_every_schedule_is_a_schedule(name, timesteps):
    schedule = NoiseSchedule(name, timesteps)
    assert schedule.betas.shape == (timesteps,)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_round_trip_and_clean_end():
    schedule = NoiseSchedule()
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, 4, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 500, 999])
    z_t = schedule.q_sample(z_0, t, eps)
    # float32: at t = 999 z_t is divided by sqrt(alpha_bar) = 0.03, at t = 0 by sqrt(0.0015) = 0.04.
    torch.testing.assert_close(schedule.predict_z_0(z_t, t, eps), z_0, rtol=0, atol=2e-5)
    torch.testing.assert_close(schedule.predict_eps(z_t, t, z_0), eps, rtol=0, atol=2e-5)
    clean = torch.full((4,), -1)
    assert torch.equal(schedule.q_sample(z_0, clean, eps), z_0)
    assert torch.equal(schedule.predict_z_0(z_0, clean, eps), z_0)
    assert schedule.alpha_bar(clean, z_0).shape == (4, 1, 1, 1)
    assert (schedule.alpha_bar(clean, z_0) == 1).all()


def test_roots_are_taken_in_float64():
    schedule = NoiseSchedule("linear", 1000, 1e-8, 0.02)
    t, like = torch.tensor([0]), torch.zeros(1, 1, 1, 1)
    exact = 1e-8**0.5
    assert schedule.noise(t, like).item() == pytest.approx(exact, rel=1e-6)
    naive = (1 - schedule.alpha_bar(t, like)).sqrt().item()  # what float32 tables would give
    assert abs(naive - exact) / exact > 0.1


def test_gathered_types():
    schedule = NoiseSchedule()
    t = torch.tensor([3, 4])
    for dtype, expected in [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ]:
        assert schedule.alpha_bar(t, torch.zeros(2, 1, 1, 1, dtype=dtype)).dtype == expected


def test_equality_is_by_value():
    assert NoiseSchedule() == NoiseSchedule(**NoiseSchedule().settings)
    assert NoiseSchedule() != NoiseSchedule(linear_end=0.02)
    assert NoiseSchedule() != NoiseSchedule(timesteps=10)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_number_of_steps(T, offset):
    for steps in range(1, T + 1):
        pairs = time_pairs(T, steps, offset)
        times = [t for t, _ in pairs]
        assert len(pairs) == len(set(times)) == steps
        assert times == sorted(times, reverse=True)
        assert all(0 <= t < T for t in times)
        assert [t_prev for _, t_prev in pairs[:-1]] == times[1:]
        assert pairs[-1][1] == times[-1] - 1 >= -1


def test_every_number_of_steps_of_the_paper():
    for steps in range(1, 1001):
        pairs = time_pairs(1000, steps)
        assert len({t for t, _ in pairs}) == steps
        assert max(t for t, _ in pairs) < 1000
        assert min(t_prev for _, t_prev in pairs) == (-1 if steps == 1000 else 0)


def test_hand_worked_pairs():
    # floor(k * 10 / 4) = 0, 2, 5, 7
    assert time_pairs(10, 4) == [(8, 6), (6, 3), (3, 1), (1, 0)]
    assert time_pairs(10, 4, offset=0) == [(7, 5), (5, 2), (2, 0), (0, -1)]
    assert time_pairs(3, 3) == [(2, 1), (1, 0), (0, -1)]


def test_stride_arithmetic_would_be_wrong():
    """The bad version: t_prev = t - T // S, wrong where S does not divide T."""
    bad = [(t, t - 1000 // 30) for t, _ in time_pairs(1000, 30)]
    assert bad != time_pairs(1000, 30)
    assert any(a[1] != b[0] for a, b in itertools.pairwise(bad))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(UserError, match=rf"steps={steps} must be in \[1, 1000\]"):
        time_pairs(1000, steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sigmoid"},
        {"timesteps": 0},
        {"linear_start": 0.0},
        {"linear_start": 0.1, "linear_end": 0.01},
        {"linear_end": 1.0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(UserError, match="schedule=|timesteps=|linear_start="):
        NoiseSchedule(**settings)
