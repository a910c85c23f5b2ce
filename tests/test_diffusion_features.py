"""Features of a diffusion model, as `--features diffusion:RUN@T` names them."""

from pathlib import Path

import pytest
import tiny
import torch

from ldm.checkpoint import load_model
from ldm.errors import UserError
from ldm.features.diffusion import NOISES
from ldm.features.source import parse_features


@pytest.fixture(scope="module", params=["eps", "flow"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    module = tiny.diffusion(autoencoder, parameterization=request.param)
    return tiny.save(module, folder / "diffusion.ckpt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    root = tiny.tiles(tmp_path_factory.mktemp("data") / "tiles", per_class=2)
    return sorted(root.rglob("*.png"))


def test_features_are_those_of_the_unet(model, files):
    """The mean over noises of each block's means and deviations, at one time after the other."""
    found = parse_features(f"diffusion:{model}@20,60/0,2").open("cpu").extract(files).features
    net = load_model(model, "diffusion")
    widths = net.network().feature_widths
    assert found.shape == (len(files), 2 * 2 * (widths[0] + widths[2]))
    one = parse_features(f"diffusion:{model}@60/0,2").open("cpu").extract(files).features
    torch.testing.assert_close(found[:, found.shape[1] // 2 :], one)
    assert NOISES > 1 and found.std(dim=0).max() > 0


def test_features_do_not_depend_on_the_batch(model, files):
    extractor = parse_features(f"diffusion:{model}@20").open("cpu")
    all_at_once = extractor.extract(files).features
    one_by_one = extractor.extract(files, batch_size=1).features
    torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-4, atol=1e-5)


def test_identity_names_what_decides_the_features(model):
    names = {parse_features(f"diffusion:{model}@{t}").open("cpu").identity for t in ("20", "60")}
    again = parse_features(f"diffusion:{model}@20").open("cpu").identity
    assert len(names) == 2 and again in names


@pytest.mark.parametrize("argument", ["", "RUN", "RUN@", "RUN@x", "@20", "RUN@20/x"])
def test_arguments_of_another_form(argument):
    with pytest.raises(UserError, match=r"diffusion:RUN@T"):
        parse_features(f"diffusion:{argument}").open("cpu")


def test_times_and_blocks_must_exist(model):
    with pytest.raises(UserError, match=r"must be in \[0, 1000\)"):
        parse_features(f"diffusion:{model}@1000").open("cpu")
    with pytest.raises(UserError, match="blocks are 0"):
        parse_features(f"diffusion:{model}@20/9").open("cpu")
