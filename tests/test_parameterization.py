"""What the network predicts, eps or v, and how its loss is weighted."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from ldm.checkpoint import KEY, load_model, read_checkpoint, write_checkpoint
from ldm.diffusion.prediction import NoisePredictor, VPrediction
from ldm.diffusion.samplers import ddim, ddpm, dpm_solver_pp_2m
from ldm.diffusion.schedule import NoiseSchedule, time_pairs
from ldm.errors import UserError
from ldm.models.diffusion import LatentDiffusion
from ldm.models.label_adapter import LabelAdapter
from ldm.synthesis.models import load_models
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def autoencoder_ckpt(tmp_path_factory) -> Path:
    return tiny.save(tiny.autoencoder(), tmp_path_factory.mktemp("models") / "autoencoder.ckpt")


def latents(seed: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64, generator=generator)


class PerfectV(nn.Module):
    """Knows z_0, so it predicts the v of any z_t."""

    def __init__(self, z_0):
        super().__init__()
        self.z_0 = z_0

    def forward(self, z_t, t, y=None):
        return SCHEDULE.v(self.z_0, t, SCHEDULE.predict_eps(z_t, t, self.z_0))


def test_v_by_hand():
    """T = 1 with beta 0.36, so alpha_bar 0.64: v = 0.8 eps - 0.6 z_0, z_t = 0.8 z_0 + 0.6 eps."""
    schedule, t = NoiseSchedule("linear", 1, 0.36, 0.36), torch.zeros(1, dtype=torch.long)
    z_0, eps = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (2.0, 5.0))
    v, z_t = schedule.v(z_0, t, eps), schedule.q_sample(z_0, t, eps)
    assert v.item() == pytest.approx(2.8) and z_t.item() == pytest.approx(4.6)
    assert schedule.eps_of_v(z_t, t, v).item() == pytest.approx(5.0)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_eps_of_v_inverts_v(t):
    z_0, eps, t = latents(0), latents(1), torch.full((2,), t)
    z_t = SCHEDULE.q_sample(z_0, t, eps)
    found = SCHEDULE.eps_of_v(z_t, t, SCHEDULE.v(z_0, t, eps))
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm"])
def test_a_perfect_v_returns_z_0(sampler, steps):
    z_0, z_T = latents(0), latents(1)
    eps_fn, pairs = (
        NoisePredictor(PerfectV(z_0), VPrediction(SCHEDULE)),
        time_pairs(1000, steps, offset=0),
    )
    if sampler == "ddim":
        z = ddim(eps_fn, SCHEDULE, z_T, pairs)
    elif sampler == "ddpm":
        z = ddpm(eps_fn, SCHEDULE, z_T, lambda j: latents(2 + j), pairs)
    else:
        z = dpm_solver_pp_2m(eps_fn, SCHEDULE, z_T, pairs)
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-9)


def test_v_taken_for_eps_would_be_seen():
    z_0, z_T, pairs = latents(0), latents(1), time_pairs(1000, 7)
    for eps_fn, right in (
        (NoisePredictor(PerfectV(z_0), VPrediction(SCHEDULE)), True),
        (PerfectV(z_0), False),
    ):
        seen = []
        ddim(eps_fn, SCHEDULE, z_T, pairs, on_step=seen.append)
        errors = [(step.z_0_pred - z_0).abs().max() for step in seen]
        assert max(errors) < 1e-9 if right else errors[0] > 1


@pytest.mark.parametrize(
    ("predicted", "expected"),
    # beta 0.1 at the first step, so alpha_bar 0.9 and SNR 9; then 0.9 * 0.5 = 0.45, SNR 9/11.
    [("eps", [5 / 9, 1.0]), ("v", [5 / 10, (9 / 11) / (20 / 11)])],
)
def test_min_snr_weights_by_hand(predicted, expected):
    schedule, t = NoiseSchedule("linear", 2, 0.1, 0.5), torch.tensor([0, 1])
    like = torch.zeros(2, dtype=torch.float64)
    weights = schedule.min_snr_weight(t, like, 5.0, predicted)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_min_snr_weighs_the_same_error_of_z_0_alike():
    """An error d of z_0 is one of eps and of v; their weighted squares are min(SNR, gamma) d^2."""
    t = torch.tensor([0, 30, 300, 900])
    d, like = latents(3, 4), torch.zeros(4, dtype=torch.float64)
    z_t, z_0 = latents(4, 4), latents(5, 4)
    found = {}
    for name in ("eps", "v"):
        eps = [SCHEDULE.predict_eps(z_t, t, z) for z in (z_0, z_0 + d)]
        values = (
            eps
            if name == "eps"
            else [SCHEDULE.v(z, t, e) for z, e in zip((z_0, z_0 + d), eps, strict=True)]
        )
        squares = (values[1] - values[0]).square().mean(dim=(1, 2, 3))
        found[name] = SCHEDULE.min_snr_weight(t, like, 5.0, name) * squares
    snr = SCHEDULE.alphas_cumprod[t] / (1 - SCHEDULE.alphas_cumprod[t])
    expected = snr.clamp(max=5) * d.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found["eps"], expected)
    torch.testing.assert_close(found["v"], expected)


def batch_of(model: LatentDiffusion, seed: int = 7):
    generator = torch.Generator().manual_seed(seed)
    z_0, eps = (torch.randn(4, *model.latent_shape, generator=generator) for _ in range(2))
    return z_0, torch.tensor([0, 100, 500, 999]), eps


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_training_losses(autoencoder_ckpt, parameterization, weighting, loss_type):
    """What is minimised is the weighted error of the prediction; what is logged is that of eps."""
    model = tiny.diffusion(
        autoencoder_ckpt,
        parameterization=parameterization,
        loss_weighting=weighting,
        min_snr_gamma=3.0,
        loss_type=loss_type,
    )
    z_0, t, eps = batch_of(model)
    with torch.no_grad():
        losses, simple = model.training_losses(z_0, t, eps)
        torch.testing.assert_close(
            simple, model.simple_loss(model.network(use_ema=False), z_0, t, eps)
        )
        z_t = model.schedule.q_sample(z_0, t, eps)
        alpha_bar = model.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        target = eps
        if parameterization == "v":
            target = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0
        error = (model.unet(z_t, t) - target).flatten(1)
    expected = (error.abs() if loss_type == "l1" else error.square()).mean(dim=1)
    if weighting == "min_snr":
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        least = snr.clamp(max=3.0)
        expected = expected * least / (snr + 1 if parameterization == "v" else snr)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    if (parameterization, weighting) == ("eps", "none"):
        assert torch.equal(losses, simple)


def test_a_checkpoint_knows_what_it_predicts(autoencoder_ckpt, tmp_path):
    model = tiny.diffusion(
        autoencoder_ckpt, parameterization="v", loss_weighting="min_snr", min_snr_gamma=3.0
    )
    loaded = load_model(tiny.save(model, tmp_path / "v.ckpt"), "diffusion")
    assert loaded.parameterization == "v"
    assert (loaded.loss_weighting, loaded.min_snr_gamma) == ("min_snr", 3.0)
    z_t, t, _ = batch_of(model)
    for use_ema, net in ((True, model.ema.net), (False, model.unet)):
        alpha_bar = model.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        with torch.no_grad():
            eps = alpha_bar.sqrt() * net(z_t, t) + (1 - alpha_bar).sqrt() * z_t
            torch.testing.assert_close(loaded.eps_model(use_ema)(z_t, t), eps)


def test_a_checkpoint_from_before_v_predicts_eps(autoencoder_ckpt, tmp_path):
    path = tiny.save(tiny.diffusion(autoencoder_ckpt), tmp_path / "new.ckpt")
    payload = read_checkpoint(path)
    for name in ("parameterization", "loss_weighting", "min_snr_gamma"):
        del payload[KEY]["model"]["params"][name]
    write_checkpoint(tmp_path / "old.ckpt", payload)
    model = load_model(tmp_path / "old.ckpt", "diffusion")
    assert model.parameterization == "eps" and model.eps_model() is model.ema.net


@pytest.fixture(scope="module")
def v_models(tmp_path_factory, autoencoder_ckpt) -> Path:
    """diffusion.ckpt that predicts v, weak.ckpt with other weights, classifier.ckpt."""
    folder = tmp_path_factory.mktemp("v")
    model = tiny.diffusion(autoencoder_ckpt, parameterization="v")
    tiny.save(model, folder / "diffusion.ckpt")
    tiny.save(tiny.classifier(model), folder / "classifier.ckpt")
    weak = tiny.diffusion(autoencoder_ckpt)  # an eps model may be the weaker of the two
    tiny.randomise(weak.ema.net, 9)
    tiny.save(weak, folder / "weak.ckpt")
    return folder


@pytest.mark.parametrize("on", ["z_t", "z_0"])
def test_guidance_and_autoguidance_of_a_v_model(v_models, on):
    """The synthesiser's prediction is that of an eps model whose eps follows from v by hand."""
    models = load_models(
        v_models / "diffusion.ckpt",
        v_models / "classifier.ckpt",
        autoguidance_path=v_models / "weak.ckpt",
    )
    sampling = Sampling("ddim", 3, 0.0, seed=0, scale=2.0, autoguidance_scale=1.5, guidance_on=on)
    found = Synthesiser(models, sampling).latents([0, 1], [0, 1])
    by_hand = copy.deepcopy(models.diffusion)
    by_hand.parameterization = "eps"

    class Eps(nn.Module):
        def forward(self, z_t, t, y=None):
            alpha_bar = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1)
            v = models.diffusion.ema.net(z_t, t)
            return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * z_t

    by_hand.ema.net = Eps()
    others = load_models(
        v_models / "diffusion.ckpt",
        v_models / "classifier.ckpt",
        autoguidance_path=v_models / "weak.ckpt",
    )
    expected = Synthesiser(type(others)(by_hand, others.classifier, others.weak), sampling).latents(
        [0, 1], [0, 1]
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # The bad version: the network's v taken for eps.
    by_hand.ema.net = models.diffusion.ema.net
    wrong = Synthesiser(type(others)(by_hand, others.classifier, others.weak), sampling)
    assert (wrong.latents([0, 1], [0, 1]) - expected).abs().max() > 0.1


def test_a_label_adapter_of_a_v_model(v_models, tmp_path):
    source = load_model(v_models / "diffusion.ckpt", "diffusion")
    adapter = LabelAdapter(str(v_models / "diffusion.ckpt"))
    adapter.use_classes(tiny.CLASSES)
    z_t, t, _ = batch_of(source)
    y = torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        expected = source.eps_model()(z_t, t)
        assert torch.equal(adapter.eps_model()(z_t, t, y), expected)  # embeddings start at 0
        tiny.randomise(adapter.ema.net.label_emb, 1)
        with_label = adapter.eps_model()(z_t, t, y)
        assert not torch.equal(with_label[:3], expected[:3])
        loaded = load_model(tiny.save(adapter, tmp_path / "adapter.ckpt"), "diffusion")
        assert loaded.parameterization == "v"
        assert torch.equal(loaded.eps_model()(z_t, t, y), with_label)


def test_log_images_and_validation_take_eps(autoencoder_ckpt):
    """A v model whose weights are those of a perfect one has no loss and shows what it knows."""
    model = tiny.diffusion(autoencoder_ckpt, parameterization="v").eval()
    z_0, t, eps = batch_of(model)
    model.unet = PerfectV(z_0)
    model.ema.net = PerfectV(z_0)
    values = model.validation_losses(z_0, t, eps, None)
    assert set(values) == {"val/loss_simple", "val/loss_simple_ema"}
    assert all(value < 1e-3 for value in values.values())
    x = torch.rand(4, 3, tiny.PIXELS, tiny.PIXELS) * 2 - 1
    shown = model.log_images({"image": x}, 4)["samples"]
    # The last of 50 steps ends at alpha_bar_0 = 0.9985, where eta 1 leaves a little noise.
    clean = model.decode_first_stage(z_0)
    assert (shown - clean).abs().mean() < 0.2 * clean.std()


def test_weights_of_the_other_parameterization_are_refused(autoencoder_ckpt, v_models):
    """To go on from, and to start from: the shapes fit, so nothing else would notice."""
    model = tiny.diffusion(autoencoder_ckpt)
    payload = read_checkpoint(v_models / "diffusion.ckpt")
    words = "predicts v, not eps; set model.params.parameterization=v"
    with pytest.raises(UserError, match=words):
        model.on_load_checkpoint(payload)
    with pytest.raises(UserError, match=words):
        tiny.diffusion(autoencoder_ckpt, ckpt_path=str(v_models / "diffusion.ckpt"))
    model = tiny.diffusion(
        autoencoder_ckpt, parameterization="v", ckpt_path=str(v_models / "diffusion.ckpt")
    )
    model.on_load_checkpoint(payload)
