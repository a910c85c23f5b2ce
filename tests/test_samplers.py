"""Samplers: published trajectories, oracles and properties."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from ldm.diffusion.guidance import classifier_guidance
from ldm.diffusion.samplers import IndexedNoise, ddim, ddpm, dpm_solver_pp_2m
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError
from ldm.modules.unet import UNetModel

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

    eps_fn = gaussian_eps(schedule, s2)
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


# Against diffusers' schedulers, whose tables are float32 and ours float64: measured, they agree to
# 1e-5 of latents of about 1.
BETAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0155,
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def net():
    """A tiny UNet as a noise predictor of about unit variance, in float64."""
    net = UNetModel(**tiny.UNET)
    tiny.randomise(net, 1)
    net.double().eval().requires_grad_(False)
    scale = 1 / net(start(), torch.tensor([500, 500])).std()
    return lambda z_t, t: scale * net(z_t, t)


def start(seed=0):
    """Start (seed 0) and noise of step seed - 1, drawn as diffusers draws from a generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)


def run_diffusers(scheduler, net, z, **options):
    """The scheduler's own loop over its own list of time steps."""
    for j, t in enumerate(scheduler.timesteps.tolist()):
        step_options = {key: value(j) for key, value in options.items()}
        z = scheduler.step(net(z, torch.full((len(z),), t)), t, z, **step_options).prev_sample
    return z


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [4, 7, 20])
def test_ddim_is_diffusers_ddim(net, steps, eta):
    """At 7 steps, which do not divide 1000, on diffusers' list: it spaces by 1000 // 7, we do not.

    Its previous step is t - 1000 // S whatever its list says, so no other list can be walked.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    pairs = list(zip(times, [*times[1:], 0], strict=True))
    if 1000 % steps == 0:
        assert pairs == time_pairs(1000, steps)
    noise = [start(seed=j + 1) for j in range(steps)]
    theirs = run_diffusers(
        scheduler, net, start(), eta=lambda j: eta, variance_noise=lambda j: noise[j]
    )
    ours = ddim(net, NoiseSchedule(), start(), pairs, eta, lambda j: noise[j])
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [4, 7, 20])
def test_ddpm_is_diffusers_ddpm(net, steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    pairs = time_pairs(1000, steps, offset=0)  # diffusers' chain ends at alpha_bar = 1
    scheduler.set_timesteps(timesteps=[t for t, _ in pairs])
    # It draws its noise itself, from a generator: seeded for each step, as ours is.
    theirs = run_diffusers(
        scheduler, net, start(), generator=lambda j: torch.Generator().manual_seed(j + 1)
    )
    ours = ddpm(net, NoiseSchedule(), start(), lambda j: start(seed=j + 1), pairs)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("offset, final", [(1, "sigma_min"), (0, "zero")])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_dpm_solver_is_diffusers_dpm_solver(net, steps, offset, final):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        euler_at_final=True,
        final_sigmas_type=final,
    )
    pairs = time_pairs(1000, steps, offset)
    scheduler.set_timesteps(timesteps=[t for t, _ in pairs])
    theirs = run_diffusers(scheduler, net, start())
    ours = dpm_solver_pp_2m(net, NoiseSchedule(), start(), pairs)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def gaussian_eps(schedule, variance):
    """The best predictor for data N(0, variance)."""

    def eps_fn(z_t, t):
        alpha_bar_t = schedule.alpha_bar(t, z_t)
        return (1 - alpha_bar_t).sqrt() / (alpha_bar_t * variance + 1 - alpha_bar_t) * z_t

    return eps_fn


def test_order_of_convergence():
    """Gaussian data: along the probability flow z_t stays in proportion to its deviation.

    Halving the steps halves the error of DDIM and quarters that of DPM-Solver++(2M).
    """
    schedule, variance = NoiseSchedule(), 0.25
    first, last = 900, 100
    alpha_bar = schedule.alphas_cumprod
    deviation = (alpha_bar * variance + 1 - alpha_bar).sqrt()
    exact = (deviation[last] / deviation[first]).item()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    orders = {}
    for sampler in (ddim, dpm_solver_pp_2m):
        errors = []
        for stride in (40, 20, 10):
            times = range(first, last - 1, -stride)
            pairs = list(pairwise(times))
            z = sampler(gaussian_eps(schedule, variance), schedule, one, pairs)
            errors.append(abs(z.item() - exact))
        orders[sampler] = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[ddim] == pytest.approx([1, 1], abs=0.1)
    assert orders[dpm_solver_pp_2m] == pytest.approx([2, 2], abs=0.2)


@pytest.mark.parametrize("steps", [1, 2])
def test_dpm_solver_of_first_order_is_ddim(steps):
    """Neither the first nor the last step has a prediction to extrapolate from."""
    pairs = time_pairs(1000, steps)
    z_T = latents().double()
    expected = ddim(toy_eps, NoiseSchedule(), z_T, pairs)
    actual = dpm_solver_pp_2m(toy_eps, NoiseSchedule(), z_T, pairs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_dpm_solver_with_a_perfect_predictor(steps):
    """It returns z_0, reports every step, and leaves type and start alone."""
    schedule = NoiseSchedule()
    z_0, z_T = latents(), latents(seed=1)
    before, seen = z_T.clone(), []
    pairs = time_pairs(1000, steps, offset=0)
    z = dpm_solver_pp_2m(perfect_eps(schedule, z_0), schedule, z_T, pairs, seen.append)
    # float32: eps of nearly pure noise is right to 1e-7 and divided by sqrt(alpha_bar) = 0.02.
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-4)
    assert [(s.j, s.t, s.t_prev) for s in seen] == [(j, *pair) for j, pair in enumerate(pairs)]
    assert seen[-1].z is z and z.dtype == torch.float32
    assert torch.equal(z_T, before)


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
