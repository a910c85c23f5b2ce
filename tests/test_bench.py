"""scripts/bench.py: what it measures, and that both sides compute the same."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch

from ldm.data.tiles import to_uint8
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.synthesis import Models, Speed
from ldm.synthesis.bench import SIZES, bench_sampling, diffusers_pipeline, random_models
from scripts import bench


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.models(tmp_path_factory.mktemp("models"))


def test_both_sides_make_the_same_images(checkpoints):
    """The pipeline around our networks gives our images, so the times compare."""
    model = tiny.diffusion(checkpoints / "autoencoder.ckpt").eval().requires_grad_(False)
    pipeline = diffusers_pipeline(Models(model), Speed())
    theirs = pipeline(
        2, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    z_T = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z_0 = ddim(model.eps_model(), model.schedule, z_T, time_pairs(1000, 4))
        ours = to_uint8(model.decode_first_stage(z_0))
    # float32 through two formulas of one step, then rounded to grey levels.
    assert np.abs(ours - 255 * theirs).max() < 1


def test_the_line(checkpoints, capsys):
    options = [
        "-r",
        checkpoints / "diffusion.ckpt",
        "--classifier",
        checkpoints / "classifier.ckpt",
    ]
    options += ["-c", 2, "--batch_size", 1, "--repeats", 2, "--device", "cpu"]
    assert bench.main(["sample", *map(str, options)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["shape"] == [1, *tiny.LATENT] and result["dtype"] == "float32"
    assert result["device"] == "cpu" and result["steps"] == 2 and result["repeats"] == 2
    assert {"torch", "diffusers", "python"} <= result["versions"].keys()
    assert result["peak_memory_mib"]["process"] > 100
    for name in ("ours", "diffusers", "guided"):
        rate = result[f"{name}_images_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert result["ours_over_diffusers"]["min"] > 0
    # A half UNet forward and backward beside a UNet forward is not free.
    assert result["guided_time_over_unguided"]["median"] > 1


def test_without_a_classifier(checkpoints):
    model = tiny.diffusion(checkpoints / "autoencoder.ckpt").eval().requires_grad_(False)
    result = bench_sampling(Models(model), 1, 1, 1)
    assert "guided_images_per_s" not in result and "guided_time_over_unguided" not in result


def test_random_models_have_the_sizes_of_the_configurations():
    models = random_models("demo", torch.device("cpu"))
    assert models.diffusion.latent_shape == (3, 12, 12)
    assert models.classifier.latent_shape == (3, 12, 12) and len(models.classes) == 9
    with torch.device("meta"):
        paper = random_models("paper", torch.device("meta"))
    count = sum(p.numel() for p in paper.diffusion.unet.parameters())
    assert count == 294_963_459 and paper.diffusion.latent_shape == (3, 64, 64)
    assert set(SIZES) == set(bench.SIZES)


def test_diffusers_is_missing(checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="diffusers, which is not installed; python -m pip"):
        bench.main(["sample", "-r", str(checkpoints / "diffusion.ckpt"), "--device", "cpu"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "demo", "-r", "x"], "--size makes networks with fresh weights"),
        (["--classifier", "x"], "give -r too"),
        (["-r", "missing.ckpt"], "no file missing.ckpt"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        bench.main(["sample", *options])


def test_usage_errors(capsys):
    for words in ([], ["fly"], ["sample", "-c", "0"], ["sample", "--size", "huge"]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(words)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
