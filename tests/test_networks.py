"""Networks in configurations beyond the reference numbers, and their errors."""

import itertools

import pytest
import torch

from ldm.config import load_configs
from ldm.errors import UserError
from ldm.modules.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.modules.blocks import timestep_embedding
from ldm.modules.unet import POOLS, EncoderUNetModel, UNetModel

UNET = dict(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1)
DDCONFIG = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=4, resolution=16)


def awaken(net: torch.nn.Module) -> torch.nn.Module:
    """Fill the zero-initialised layers, so that every part of the network shows in its output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().sum() == 0:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(batch: int = 2, channels: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, channels, size, size, generator=generator)
    return z, torch.randint(1000, (batch,), generator=generator)


OPTIONS = {
    "attention_resolutions": ([], [1, 2]),
    "use_scale_shift_norm": (False, True),
    "resblock_updown": (False, True),
    "conv_resample": (False, True),
    "use_new_attention_order": (False, True),
    "num_head_channels": (-1, 16),
}


@pytest.mark.parametrize("values", list(itertools.product(*OPTIONS.values()))[::5])
def test_every_option_builds_runs_and_matters(values):
    options = dict(zip(OPTIONS, values, strict=True))
    net = awaken(UNetModel(**UNET, channel_mult=(1, 2), num_heads=2, **options))
    z, t = inputs()
    out = net(z, t)
    assert out.shape == z.shape and out.isfinite().all()
    assert not torch.equal(out, net(z, t + 1)), "the time step must matter"
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_attention_orders_differ_by_a_permutation_only():
    torch.manual_seed(0)
    old = awaken(UNetModel(**UNET, channel_mult=(1,), attention_resolutions=[1], num_heads=2))
    new = UNetModel(
        **UNET,
        channel_mult=(1,),
        attention_resolutions=[1],
        num_heads=2,
        use_new_attention_order=True,
    )
    state = old.state_dict()
    for key, value in state.items():
        if ".qkv." in key:  # (heads, 3, D) -> (3, heads, D)
            shape = value.shape
            state[key] = value.view(2, 3, 16, -1).transpose(0, 1).reshape(shape)
    new.load_state_dict(state)
    torch.testing.assert_close(old(*inputs()), new(*inputs()))


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    options = dict(channel_mult=(1, 2), attention_resolutions=[2], num_heads=2)
    plain = awaken(UNetModel(**UNET, **options))
    saving = UNetModel(**UNET, **options, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    for net in (plain, saving):
        net(*inputs()).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_labels_enter_a_class_conditional_unet():
    net = awaken(UNetModel(**UNET, channel_mult=(1,), attention_resolutions=[], num_classes=3))
    z, t = inputs()
    assert not torch.equal(net(z, t, torch.tensor([0, 0])), net(z, t, torch.tensor([1, 1])))


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_pools(pool):
    net = awaken(
        EncoderUNetModel(
            **{**UNET, "out_channels": 5},
            channel_mult=(1, 2),
            attention_resolutions=[2],
            num_head_channels=16,
            pool=pool,
        )
    )
    z, t = inputs()
    logits = net(z, t)
    assert logits.shape == (2, 5)
    assert not torch.equal(logits, net(z, (t + 300) % 1000))


def test_paper_unet_has_the_published_number_of_parameters(monkeypatch):
    monkeypatch.setenv("HISTO_DATA", "unused")
    monkeypatch.setenv("HISTO_AUTOENCODER", "unused")
    config = load_configs(["configs/latent-diffusion/histo-ldm-kl-8.yaml"])
    with torch.device("meta"):
        net = UNetModel(**config.model.params.unet_config.params)
    assert sum(p.numel() for p in net.parameters()) == 294_963_459


def test_timestep_embedding_by_hand():
    # dim 4: frequencies 1 and 1/100; cosines first.
    t = torch.tensor([0, 2])
    expected = (
        torch.stack([torch.ones(2), torch.tensor([2.0, 0.02]).cos()]),
        torch.stack([torch.zeros(2), torch.tensor([2.0, 0.02]).sin()]),
    )
    torch.testing.assert_close(timestep_embedding(t, 4), torch.cat(expected, dim=1))
    assert timestep_embedding(t, 5).shape == (2, 5)


def test_networks_are_copied_and_pickled():
    import copy
    import pickle

    net = UNetModel(**UNET, channel_mult=(1,), attention_resolutions=[])
    assert pickle.loads(pickle.dumps(net)).image_size == copy.deepcopy(net).image_size == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_channels": 48}, "multiple of 32"),
        ({"num_heads": 5, "attention_resolutions": [1]}, "num_heads=5"),
        ({"num_head_channels": 7, "attention_resolutions": [1]}, "num_head_channels=7"),
        ({"image_size": 9, "channel_mult": (1, 2)}, "image_size=9"),
        ({"channel_mult": (0.3, 1)}, "multiple of 32"),
        ({"attention_resolutions": [3]}, r"attention_resolutions=\[3\]: .* the factors 1; choose"),
    ],
)
def test_unet_sizes_that_do_not_fit(change, words):
    options = {**UNET, "channel_mult": (1,), "attention_resolutions": [], **change}
    with pytest.raises(UserError, match=words):
        UNetModel(**options)


def test_a_first_level_of_part_of_the_width(caplog):
    """Guided diffusion at 512 pixels: the network begins and ends at the width of that level."""
    options = {**UNET, "model_channels": 64, "channel_mult": (0.5, 1), "attention_resolutions": [8]}
    net = awaken(UNetModel(**options))
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["input_blocks.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["output_blocks.3.0.in_layers.2.weight"] == (32, 64, 3, 3)
    assert shapes["out.2.weight"] == (3, 32, 3, 3) and shapes["time_embed.0.weight"] == (256, 64)
    assert net(*inputs()).isfinite().all()
    assert "the factors 1, 2 only" in caplog.text


def test_unknown_pool():
    with pytest.raises(UserError, match="pool='max'"):
        EncoderUNetModel(**UNET, channel_mult=(1,), attention_resolutions=[], pool="max")


# The autoencoder


@pytest.mark.parametrize("attn_resolutions", [[], [8], [16, 8]])
def test_autoencoder_shapes(attn_resolutions):
    net = AutoencoderKL({**DDCONFIG, "attn_resolutions": attn_resolutions}, embed_dim=2)
    x = torch.rand(2, 3, 16, 16)
    x_rec, posterior = net(x)
    assert posterior.mean.shape == (2, 2, 8, 8) and x_rec.shape == x.shape
    assert net.latent_size == 8
    attentions = [k for k in net.state_dict() if ".attn." in k and k.endswith("norm.weight")]
    assert len(attentions) == len(attn_resolutions) * (1 + 2)  # encoder blocks + decoder blocks


def test_posterior_by_hand():
    moments = torch.tensor([1.0, -2.0, 0.0, 2.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)  # means 1, -2; log-variances 0, 2
    expected = 0.5 * ((1 + 1 - 1 - 0) + (4 + torch.e**2 - 1 - 2))
    torch.testing.assert_close(posterior.kl(), torch.tensor([expected]))
    assert torch.equal(posterior.mode(), moments[:, :2])
    draws = [posterior.sample(torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    many = DiagonalGaussian(moments.expand(20_000, -1, -1, -1)).sample(
        torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(many.mean(0).flatten(), torch.tensor([1.0, -2.0]), atol=0.08, rtol=0)
    torch.testing.assert_close(
        many.std(0).flatten(), torch.tensor([1.0, torch.e]), atol=0.08, rtol=0
    )


def test_fingerprint_follows_the_encoder_only():
    torch.manual_seed(0)
    net = AutoencoderKL(DDCONFIG, embed_dim=2)
    before = net.fingerprint()
    with torch.no_grad():
        net.decoder.conv_out.bias += 1
    assert net.fingerprint() == before
    with torch.no_grad():
        net.encoder.conv_in.bias[0] += 1e-3
    assert net.fingerprint() != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chanels": 3}, "unexpected keyword argument 'chanels'"),
        ({"double_z": False}, "double_z"),
        ({"resolution": 15}, "resolution=15"),
        ({"ch": 20}, "multiple of 32"),
    ],
)
def test_autoencoder_settings_that_do_not_fit(change, words):
    with pytest.raises(UserError, match=words):
        AutoencoderKL({**DDCONFIG, **change}, embed_dim=2)


def test_autoencoder_names_missing_keys():
    with pytest.raises(UserError, match="missing 1 required positional argument: 'ch_mult'"):
        AutoencoderKL({k: v for k, v in DDCONFIG.items() if k != "ch_mult"}, embed_dim=2)
