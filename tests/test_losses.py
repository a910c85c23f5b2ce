"""The autoencoder's loss, its discriminator and LPIPS; the moving average of weights."""

import copy

import pytest
import timm
import tiny
import torch
from torch import nn

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.perceptual import open_perceptual, read_backbone
from ldm.modules import losses
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.ema import EMA
from ldm.modules.losses import LPIPSWithDiscriminator, build_lpips


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory):
    """A file with the names and shapes of torchvision's VGG-16, random weights."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    features = vgg16(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in features.items()}, path)
    return path


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def posterior() -> DiagonalGaussian:
    return DiagonalGaussian(torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 4, 4))


def test_terms_by_hand():
    x, x_rec, q = images(0), images(1), posterior()
    loss_fn = LPIPSWithDiscriminator(
        disc_start=0,
        disc_weight=0,
        perceptual_weight=0,
        kl_weight=0.1,
        logvar_init=0.5,
        pixelloss_weight=2.0,
    )
    loss, log = loss_fn.generator_loss(x, x_rec, q, step=5)
    l1 = (x - x_rec).abs()
    nll = (2 * l1 / torch.e**0.5 + 0.5).sum() / 2
    torch.testing.assert_close(loss, nll + 0.1 * q.kl().mean())
    torch.testing.assert_close(log["rec_loss"], l1.mean())
    assert loss_fn.discriminator is None and not list(loss_fn.parameters())


def test_discriminator_starts_and_ramps():
    loss_fn = LPIPSWithDiscriminator(
        disc_start=10, disc_ramp=4, perceptual_weight=0, disc_factor=2.0
    )
    assert [loss_fn.disc_scale(s) for s in (0, 9, 10, 11, 13, 99)] == [0, 0, 0.5, 1.0, 2.0, 2.0]
    at_once = LPIPSWithDiscriminator(disc_start=10, perceptual_weight=0)
    assert [at_once.disc_scale(s) for s in (9, 10)] == [0, 1]


def test_adaptive_weight_balances_gradients_and_is_clamped():
    torch.manual_seed(0)
    last = nn.Conv2d(3, 3, 1)
    x, h = images(0), images(1)
    loss_fn = LPIPSWithDiscriminator(disc_start=0, perceptual_weight=0, disc_weight=0.5)
    x_rec = last(h)
    nll, g = (x - x_rec).abs().sum(), -loss_fn.discriminator(x_rec).mean()
    grads = [torch.autograd.grad(v, last.weight, retain_graph=True)[0].norm() for v in (nll, g)]
    expected = 0.5 * (grads[0] / (grads[1] + 1e-4)).clamp(0, 1e4)
    torch.testing.assert_close(loss_fn.adaptive_weight(nll, g, last.weight), expected)
    loss_fn.disc_adaptive_max = 3.0
    assert loss_fn.adaptive_weight(nll, g, last.weight) == 1.5


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_discriminator_loss_has_the_right_direction(name):
    real, fake = torch.full((4,), 2.0), torch.full((4,), -2.0)
    right, wrong = losses.D_LOSSES[name](real, fake), losses.D_LOSSES[name](fake, real)
    assert right < 0.2 < 2.0 < wrong


def test_lpips_is_a_distance_with_gradients(vgg_weights):
    loss_fn = LPIPSWithDiscriminator(disc_start=0, disc_weight=0)
    loss_fn.perceptual = open_perceptual("lpips", str(vgg_weights), 32)
    x, x_rec = images(0), images(1).requires_grad_(True)
    assert loss_fn.perceptual(x, x).abs().max() == 0
    loss, log = loss_fn.generator_loss(x, x_rec, posterior(), step=0)
    loss.backward()
    assert log["p_loss"] > 0 and x_rec.grad.abs().sum() > 0
    assert not any("perceptual" in k for k in loss_fn.state_dict()), (
        "frozen library weights are not saved"
    )


def test_lpips_takes_the_backbone_from_the_file(vgg_weights):
    state = torch.load(vgg_weights)
    net = build_lpips(read_backbone(str(vgg_weights))).net
    ours = {k.split(".", 1)[1]: v for k, v in net.state_dict().items()}
    assert len(ours) == 26  # 13 convolutions
    assert all(torch.equal(v, state[f"features.{k}"]) for k, v in ours.items())


def test_lpips_finds_torchvisions_cache(vgg_weights, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(vgg_weights.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert build_lpips(read_backbone(None))(images(0), images(1)).shape == (2, 1, 1, 1)


def test_lpips_without_weights_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"vgg16-397923af.*internet, run .*fetch_weights.py lpips.*perceptual_weight=0",
    ):
        AutoencoderKL(
            tiny.DDCONFIG,
            3,
            {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 0}},
        )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_timm_network_is_a_perceptual_distance(name, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    node = {"disc_start": 0, "disc_weight": 0, "perceptual_network": name}
    node |= {"perceptual_weights": str(path), "perceptual_weight": 1.0}
    target = "ldm.modules.losses.LPIPSWithDiscriminator"
    model = AutoencoderKL(tiny.DDCONFIG, 3, {"target": target, "params": node})
    x, x_rec = images(0), images(1).requires_grad_(True)
    assert model.loss.perceptual(x, x).abs().max() == 0
    assert model.loss.perceptual(x, x_rec).shape == (2, 1, 1, 1)
    loss, log = model.loss.generator_loss(x, x_rec, posterior(), step=0)
    loss.backward()
    assert 0 < log["p_loss"] < 4 and x_rec.grad.abs().sum() > 0
    assert "val/p_loss" in model.metrics()
    assert not any("perceptual" in name for name in model.state_dict())


def test_feature_distance_equals_its_equation():
    class Maps(nn.Module):
        def feature_maps(self, images):
            return [images, 3 * images[:, :2, ::2, ::2]]

    x, y = images(0), images(1)
    expected = 0
    for a, b in zip(Maps().feature_maps(x), Maps().feature_maps(y), strict=True):
        lengths = [(m**2).sum(dim=1, keepdim=True) ** 0.5 for m in (a, b)]
        expected += ((a / lengths[0] - b / lengths[1]) ** 2).sum(dim=1).mean(dim=(1, 2)) / 2
    torch.testing.assert_close(losses.FeatureDistance(Maps())(x, y).flatten(), expected)


@pytest.mark.parametrize(
    "network, weights, expected",
    [
        ("resnet19x", "vgg", "perceptual_network='resnet19x'.*nearest"),
        ("test_resnet", None, "perceptual_network='test_resnet' needs perceptual_weights=FILE"),
        ("test_resnet", "vgg", "perceptual_weights .*vgg16.*do not fit"),
    ],
)
def test_a_perceptual_network_that_cannot_be_loaded(network, weights, expected, vgg_weights):
    with pytest.raises(UserError, match=expected):
        open_perceptual(network, weights and str(vgg_weights), 32)


@pytest.mark.parametrize("content", [b"not weights", None])
def test_lpips_refuses_other_files(tmp_path, content):
    path = tmp_path / "vgg16.pth"
    if content is None:
        torch.save({"features.0.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="vgg16"):
        build_lpips(read_backbone(str(path)))


# Moving average


def test_ema_matches_its_closed_form():
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, decay=0.5)
    average = net.weight.item()
    for n, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0], start=1):
        net.weight.data.fill_(value)
        ema.update(net)
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert decay == 0.5
    assert ema.net.weight.item() == pytest.approx(average, rel=1e-6)


def test_ema_copies_buffers_and_survives_a_checkpoint():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ema = EMA(net, decay=0.9)
    net.train()(torch.randn(8, 4))
    ema.update(net)
    assert torch.equal(ema.net[1].running_mean, net[1].running_mean)
    assert not ema.train().net[1].training, "the average is only ever evaluated"
    other = EMA(copy.deepcopy(net), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.num_updates == 1 and torch.equal(other.net[0].weight, ema.net[0].weight)


def test_ema_refuses_a_decay_out_of_range():
    with pytest.raises(UserError, match="decay=1.0"):
        EMA(nn.Linear(1, 1), decay=1.0)
