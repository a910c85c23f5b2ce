"""The first stage without training: patches on their principal components."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_main import run, write_config

from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import train as main_py
from ldm.errors import UserError
from ldm.models.patch_pca import PatchPCA as PatchPCAModule
from ldm.modules.patch_pca import PatchPCA


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.tiles(tmp_path_factory.mktemp("data") / "train", per_class=6)


def images(seed: int = 0, count: int = 6) -> torch.Tensor:
    """Smooth random images, so that patches have few strong components."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    x = torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic")
    return x + 0.05 * torch.randn(x.shape, generator=generator)


def fitted(x: torch.Tensor, **params) -> PatchPCA:
    net = PatchPCA(32, **params)
    patches = net.patches(x).movedim(1, -1).reshape(-1, 3 * net.downsampling**2).double()
    net.fit(len(patches), patches.sum(0), patches.T @ patches)
    return net


def test_all_components_are_an_exact_inverse():
    x = images()
    net = fitted(x, patch=2, components=12)
    torch.testing.assert_close(net(x)[0], x, rtol=0, atol=1e-5)


def test_decoding_is_the_projection_onto_the_components():
    """What is encoded again is the same latent, and no other 5 directions lose less."""
    x = images()
    net = fitted(x, patch=2, components=5)
    z = net.encode(x).mode()
    torch.testing.assert_close(net.encode(net.decode(z)).mode(), z, rtol=0, atol=1e-5)
    patches = net.patches(x).movedim(1, -1).reshape(-1, 12).double().numpy()
    centred = patches - patches.mean(0)
    least = (np.linalg.svd(centred, compute_uv=False)[5:] ** 2).sum() / x.numel()
    assert (net.decode(z) - x).square().mean().item() == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_deviations_of_the_latents(exponent):
    """Proportional to the component's own to the power of the exponent; mean square 1."""
    x = images(count=20)
    own = fitted(x, components=6, exponent=1.0).encode(x).mode().std(dim=(0, 2, 3))
    found = fitted(x, components=6, exponent=exponent).encode(x).mode().std(dim=(0, 2, 3))
    assert (own.diff() < 0).all() and own[0] > 3 * own[-1]
    expected = own**exponent
    torch.testing.assert_close(found, expected / expected.square().mean().sqrt(), rtol=1e-2, atol=0)


def test_signs_do_not_depend_on_the_decomposition():
    net = fitted(images(), components=6)
    basis = net.decoder.weight  # (D, C): columns are components, scaled by positive numbers
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"patch": 5}, "patch=5 must divide resolution=32"),
        ({"components": 49}, r"components=49 must be in \[1, 48\]"),
    ],
)
def test_bad_settings(params, words):
    with pytest.raises(UserError, match=words):
        PatchPCAModule(32, **params)


def test_tiles_that_do_not_vary():
    with pytest.raises(UserError, match="vary in fewer directions"):
        fitted(torch.zeros(4, 3, 32, 32), components=2)


def pca_node(**params) -> dict:
    params = {"resolution": tiny.PIXELS, "patch": 2, "components": 3, **params}
    return {"target": "ldm.models.patch_pca.PatchPCA", "params": params}


def flow_model(**params) -> dict:
    params = {
        "image_size": tiny.LATENT[1],
        "unet_config": {"target": "ldm.modules.unet.UNetModel", "params": tiny.UNET},
        "parameterization": "flow",
        "loss_type": "l2",
        "monitor": "val/loss_simple_ema",
        "ema_decay": 0.9,
        **params,
    }
    return {"target": "ldm.models.diffusion.LatentDiffusion", "params": params}


def test_a_flow_on_components_resumes_bit_for_bit(data, tmp_path):
    """Fitted when the run starts, and no more when it is resumed; the checkpoint holds it."""
    config = write_config(tmp_path / "c.yaml", data, flow_model(first_stage_config=pca_node()))
    run(config, tmp_path, "whole", 6)
    run(config, tmp_path, "halves", 3)
    run(config, tmp_path, "halves", 6)
    whole, halves = (read_checkpoint(tmp_path / n)["state_dict"] for n in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    model = load_model(tmp_path / "whole", "diffusion")
    assert model.first_stage_model.is_fitted
    assert float(model.scale_factor) == pytest.approx(1.0, abs=0.1)


def test_by_itself_and_as_the_first_stage_of_others(data, tmp_path):
    """main.py fits it; a diffusion model takes it as it takes an autoencoder."""
    limits = {"max_epochs": 1, "limit_train_batches": 1}
    node = pca_node()
    config = write_config(tmp_path / "p.yaml", data, node, **limits)
    argv = ["--base", str(config), "-t", "--logdir", str(tmp_path), "--name", "pca"]
    main_py.train(parse(main_py.Options, [*argv, "--precision", "32"]))
    own = load_model(tmp_path / "pca", "autoencoder")
    assert own.net.is_fitted
    model = flow_model(first_stage_ckpt=str(tmp_path / "pca"), channel_scale=True)
    run(write_config(tmp_path / "d.yaml", data, model), tmp_path, "flow", 1)
    trained = load_model(tmp_path / "flow", "diffusion")
    assert trained.autoencoder_fingerprint == own.net.fingerprint()
    assert trained.scale_factor.shape == (3, 1, 1)
    trained.replace_first_stage(str(tmp_path / "pca"))
    other = tiny.save(tiny.autoencoder(), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="another latent space"):
        trained.replace_first_stage(str(other))
