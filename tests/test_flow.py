"""Rectified flow: the process, its samplers, training and resuming; zero terminal SNR."""

import math
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from ldm.checkpoint import load_model, read_checkpoint
from ldm.diffusion import make_process
from ldm.diffusion.flow import LARGEST_S, RectifiedFlow
from ldm.diffusion.prediction import NoisePredictor, VelocityPrediction, VPrediction
from ldm.diffusion.samplers import ddim, sample
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models.diffusion import LatentDiffusion
from ldm.models.label_adapter import LabelAdapter
from ldm.modules.lr_schedule import WarmupCosine

FLOW = RectifiedFlow()


def latents(seed: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64, generator=generator)


def draw(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda fn, size: fn(size, generator=generator)


def test_a_place_on_the_line_by_hand():
    """s = 0.25: z_s = 0.75 * 2 + 0.25 * 6 = 3, the velocity is 6 - 2, and z_s knows both ends."""
    z_0, eps = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (2.0, 6.0))
    t = torch.tensor([250.0])
    z_s = FLOW.q_sample(z_0, t, eps)
    prediction = VelocityPrediction(FLOW)
    assert z_s.item() == pytest.approx(3.0)
    assert prediction.target(z_0, t, eps).item() == 4.0
    eps_pred = prediction.eps(z_s, t, torch.full_like(z_s, 4.0))
    assert eps_pred.item() == pytest.approx(6.0)
    assert FLOW.predict_z_0(z_s, t, eps_pred).item() == pytest.approx(2.0)


def test_times_of_training():
    """logit(s) is normal with the mean moved by log(shift); uniform times stay uniform at 1."""
    flow = RectifiedFlow(time_mean=-0.2, time_std=0.5, time_shift=1.5)
    s = flow.draw_times(draw(0), 40_000).double() / flow.T
    logit = (s / (1 - s)).log()
    assert logit.mean().item() == pytest.approx(-0.2 + math.log(1.5), abs=0.01)
    assert logit.std().item() == pytest.approx(0.5, abs=0.01)
    s = RectifiedFlow("uniform").draw_times(draw(1), 40_000) / 1000
    assert s.min() >= 0 and s.max() < 1 and s.mean().item() == pytest.approx(0.5, abs=0.01)
    # A shift of 3 moves the median 0.5 to 3 * 0.5 / (1 + 2 * 0.5) = 0.75.
    s = RectifiedFlow("uniform", time_shift=3.0).draw_times(draw(1), 40_000) / 1000
    assert s.median().item() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("shift", [1.0, 1.5])
def test_times_of_sampling(shift):
    flow = RectifiedFlow(time_shift=shift)
    pairs = flow.time_pairs(4)
    s = [shift * x / (1 + (shift - 1) * x) for x in (0.75, 0.5, 0.25)]
    expected = [1000 * LARGEST_S, *(1000 * x for x in s)]
    assert [t for t, _ in pairs] == pytest.approx(expected)
    assert [t for _, t in pairs] == pytest.approx([*expected[1:], 0])
    assert flow.time_pairs(3, start=600.0) == [
        (pytest.approx(600), pytest.approx(400)),
        (pytest.approx(400), pytest.approx(200)),
        (pytest.approx(200), 0),
    ]


class PerfectVelocity(nn.Module):
    """Knows z_0, so it predicts the velocity of any z_s."""

    def __init__(self, z_0: torch.Tensor):
        super().__init__()
        self.z_0 = z_0

    def forward(self, z_t, t, y=None):
        return (z_t - self.z_0) / FLOW.noise(t, z_t)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_perfect_velocity_returns_z_0(sampler, steps):
    z_0, z_T = latents(0), latents(1)
    eps_fn = NoisePredictor(PerfectVelocity(z_0), VelocityPrediction(FLOW))
    z = sample(sampler, eps_fn, FLOW, z_T, FLOW.time_pairs(steps))
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-9)


def test_euler_is_ddim_without_noise():
    """Both go to signal z_0 + noise eps of the next time."""
    net = lambda z, t: torch.tanh(z) * (1 + t.view(-1, 1, 1, 1) / 500)  # noqa: E731
    schedule, pairs = NoiseSchedule(), NoiseSchedule().time_pairs(5)
    expected = ddim(net, schedule, latents(1), pairs)
    torch.testing.assert_close(sample("euler", net, schedule, latents(1), pairs), expected)


def test_heun_is_of_second_order():
    """On a Gaussian of deviation 0.5 the flow is known: halving the step quarters the error."""
    sigma = 0.5

    def eps_fn(z, t):  # E[eps | z_s] where z_0 ~ N(0, sigma^2)
        s = FLOW.noise(t, z)
        return z * s / ((1 - s) ** 2 * sigma**2 + s**2)

    start, z_T = 900.0, latents(3)
    exact = z_T * sigma / math.sqrt(0.1**2 * sigma**2 + 0.9**2)
    errors = {}
    for sampler in ("euler", "heun"):
        for steps in (16, 32):
            z = sample(sampler, eps_fn, FLOW, z_T, FLOW.time_pairs(steps, start))
            errors[sampler, steps] = (z - exact).abs().mean().item()
    assert errors["euler", 16] / errors["euler", 32] == pytest.approx(2, rel=0.25)
    assert errors["heun", 16] / errors["heun", 32] > 3
    assert errors["heun", 16] < errors["euler", 32]


def test_a_limit_keeps_predictions_in_range():
    z_0 = 9 * torch.sign(latents(0))
    eps_fn = NoisePredictor(PerfectVelocity(z_0), VelocityPrediction(FLOW))
    z = sample("euler", eps_fn, FLOW, latents(1), FLOW.time_pairs(5), limit=5.0)
    torch.testing.assert_close(z, 5 * torch.sign(z_0), rtol=0, atol=1e-9)


def test_a_flow_is_rebuilt_from_its_settings():
    flow = RectifiedFlow("uniform", time_shift=2.0)
    assert make_process(flow.settings).settings == flow.settings
    schedule = NoiseSchedule(rescale_zero_terminal_snr=True)
    assert make_process(schedule.settings) == schedule and schedule != NoiseSchedule()
    assert flow != schedule


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"time_sampling": "cosine"}, "time_sampling='cosine' must be one of logit_normal"),
        ({"time_std": 0.0}, "time_std=0.0 must be above 0"),
        ({"time_shift": -1.0}, "time_shift=-1.0 must be above 0"),
        ({"loss_weighting": "min_snr"}, "set loss_weighting=none"),
        ({"rescale_zero_terminal_snr": True}, "needs parameterization=v, not flow"),
    ],
)
def test_bad_settings(autoencoder_ckpt, params, words):
    with pytest.raises(UserError, match=words):
        tiny.diffusion(autoencoder_ckpt, parameterization="flow", **params)


@pytest.fixture(scope="module")
def autoencoder_ckpt(tmp_path_factory) -> Path:
    return tiny.save(tiny.autoencoder(), tmp_path_factory.mktemp("models") / "autoencoder.ckpt")


def test_losses_of_a_flow_are_of_the_velocity(autoencoder_ckpt):
    model = tiny.diffusion(autoencoder_ckpt, parameterization="flow", loss_type="l2")
    generator = torch.Generator().manual_seed(7)
    z_0, eps = (torch.randn(3, *model.latent_shape, generator=generator) for _ in range(2))
    t = torch.tensor([10.0, 400.0, 990.0])
    s = (t / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        losses, simple = model.training_losses(z_0, t, eps)
        velocity = model.unet((1 - s) * z_0 + s * eps, t)
        values = model.validation_losses(z_0, t, eps, None)
    expected = (velocity - (eps - z_0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)
    assert torch.equal(losses, simple)
    torch.testing.assert_close(values["val/loss_simple"], expected.mean())
    assert values["val/loss_simple_ema"] != values["val/loss_simple"]


def test_a_checkpoint_of_a_flow(autoencoder_ckpt, tmp_path):
    model = tiny.diffusion(
        autoencoder_ckpt, parameterization="flow", time_mean=-0.2, time_shift="auto"
    )
    loaded = load_model(tiny.save(model, tmp_path / "flow.ckpt"), "diffusion")
    assert loaded.schedule.settings == model.schedule.settings
    assert loaded.schedule.time_shift == 1.0  # 16 x 16 latents
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([100.0, 900.0])
    with torch.no_grad():
        expected = z + (1 - t / 1000).view(-1, 1, 1, 1) * model.ema.net(z, t)
        torch.testing.assert_close(loaded.eps_model()(z, t), expected)
    with pytest.raises(UserError, match="predicts flow, not eps"):
        tiny.diffusion(autoencoder_ckpt, ckpt_path=str(tmp_path / "flow.ckpt"))


def test_zero_terminal_snr():
    """Lin et al. 2024, algorithm 1: the first step stays, the last shows nothing of the image."""
    plain, schedule = NoiseSchedule(), NoiseSchedule(rescale_zero_terminal_snr=True)
    assert plain.alphas_cumprod[-1].sqrt() > 0.02
    assert schedule.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-9)
    assert schedule.alphas_cumprod[-1] == 2.0**-26
    assert (schedule.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close((1 - schedule.betas).cumprod(0), schedule.alphas_cumprod)
    # Steps are counted from the noisy end.
    assert schedule.time_pairs(4) == [(999, 749), (749, 499), (499, 249), (249, -1)]


def test_sampling_with_zero_terminal_snr_starts_from_noise_alone():
    """In float32, where the small signal of the last step costs half of the digits."""
    schedule = NoiseSchedule(rescale_zero_terminal_snr=True)
    z_0 = latents(0).float() + 3  # a bright image, which the plain schedule would darken

    class PerfectV(nn.Module):
        def forward(self, z_t, t, y=None):
            # From z_0 alone where z_t is noise alone: v = -z_0.
            eps = schedule.predict_eps(z_t, t, z_0)
            return schedule.v(z_0, t, eps)

    eps_fn = NoisePredictor(PerfectV(), VPrediction(schedule))
    z = ddim(eps_fn, schedule, latents(1).float(), schedule.time_pairs(5))
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-2)


def test_a_scale_for_each_channel(autoencoder_ckpt):
    """Multiplies, is undone by decoding, and is rebuilt with the model."""
    model = tiny.diffusion(autoencoder_ckpt, scale_factor=[0.5, 1.0, 2.0], channel_scale=True)
    params = model.rebuild_config()["params"]
    assert params["channel_scale"] is True and model.scale_factor.shape == (3, 1, 1)
    again = LatentDiffusion(**params)
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, tiny.PIXELS, tiny.PIXELS) * 2 - 1
    z = again.latents({"image": x}, sample=False)
    plain = model.first_stage_model.encode(x).mode()
    torch.testing.assert_close(z[:, 2], 2 * plain[:, 2])
    torch.testing.assert_close(again.decode_first_stage(z), model.first_stage_model.decode(plain))


def test_a_number_of_scales_that_does_not_fit(autoencoder_ckpt):
    with pytest.raises(UserError, match="2 values for 3 channels"):
        tiny.diffusion(autoencoder_ckpt, scale_factor=[1.0, 2.0])


def test_draw_gives_each_rank_its_own_times():
    """`Process.draw_times` asks `draw` alone, so that ranks can share one sequence."""
    asked = []

    def record(fn, size):
        asked.append((fn.func if isinstance(fn, partial) else fn, size))
        return torch.zeros(size)

    FLOW.draw_times(record, 5)
    RectifiedFlow("uniform").draw_times(record, 5)
    NoiseSchedule().draw_times(record, 5)
    assert asked == [(torch.randn, (5,)), (torch.rand, (5,)), (torch.randint, (5,))]


def test_checkpoints_record_no_paths(autoencoder_ckpt, tmp_path):
    model = tiny.diffusion(autoencoder_ckpt, parameterization="flow")
    payload = read_checkpoint(tiny.save(model, tmp_path / "flow.ckpt"))
    assert str(tmp_path) not in str(payload["histodiffusion"])


def test_a_label_adapter_of_a_flow(autoencoder_ckpt, tmp_path):
    """Starts as the flow, stays one, and trains on its velocity."""
    path = tiny.save(tiny.diffusion(autoencoder_ckpt, parameterization="flow"), tmp_path / "f.ckpt")
    adapter = LabelAdapter(str(path))
    adapter.use_classes(tiny.CLASSES)
    z, t = torch.randn(3, *adapter.latent_shape), torch.tensor([100.0, 500.0, 900.0])
    y = torch.tensor([0, 1, -1])
    source = load_model(path, "diffusion")
    with torch.no_grad():
        assert torch.equal(adapter.eps_model()(z, t, y), source.eps_model()(z, t))
        values = adapter.validation_losses(z, t, torch.randn(z.shape), y.clamp(min=0))
    assert values["val/label_gain"] == 0
    loaded = load_model(tiny.save(adapter, tmp_path / "a.ckpt"), "diffusion")
    assert loaded.schedule.settings == source.schedule.settings and loaded.conditional


def test_a_flow_is_not_exported(autoencoder_ckpt, tmp_path):
    from ldm.exchange.diffusers_export import scheduler_settings

    model = tiny.diffusion(autoencoder_ckpt, parameterization="flow")
    with pytest.raises(UserError, match="cannot be exported"):
        scheduler_settings(model)
    model = tiny.diffusion(autoencoder_ckpt, parameterization="v", rescale_zero_terminal_snr=True)
    settings = scheduler_settings(model)
    assert settings["rescale_betas_zero_snr"] and settings["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (9, 1.0), (30, 1.0), (65, 0.55), (100, 0.1), (200, 0.1)]
)
def test_warm_up_plateau_and_cosine(step, expected):
    factor = WarmupCosine(warm_up_steps=10, total_steps=100, plateau=0.3, f_min=0.1)
    assert factor(step) == pytest.approx(expected)
