"""Export to diffusers: the real library, loaded from the folder, computes what ours does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm.checkpoint import load_model
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.exchange import diffusers_export as exporting
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion import LatentDiffusion

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import export_diffusers
import import_checkpoint

diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is missing")

# The paper's options at a small width: five levels, attention at four, heads by number.
PAPER = {
    "image_size": 16,
    "model_channels": 32,
    "attention_resolutions": [1, 2, 4, 8],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2, 4, 4],
    "num_heads": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
NETWORKS = {
    "paper": PAPER,
    "heads by width": {
        **PAPER,
        "num_head_channels": 16,
        "channel_mult": [1, 2],
        "num_res_blocks": 2,
    },
    "added embedding, learned resampling": {
        "image_size": 16,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2, 3],
        "num_heads": 2,
    },
    "new order of attention, one width": {
        **tiny.UNET,
        "num_heads": 4,
        "use_new_attention_order": True,
    },
}


def model(folder: Path, unet: dict, ddconfig: dict | None = None, **params) -> Path:
    """A diffusion checkpoint with random weights everywhere."""
    first = AutoencoderKL({**tiny.DDCONFIG, **(ddconfig or {})}, embed_dim=3)
    tiny.randomise(first, 0)
    first = tiny.save(first, folder / "first.ckpt")
    module = LatentDiffusion(
        unet_config={
            "target": "ldm.modules.unet.UNetModel",
            "params": {"in_channels": 3, "out_channels": 3, **unet},
        },
        first_stage_ckpt=str(first),
        image_size=16,
        scale_factor=0.8,
        **params,
    )
    tiny.randomise(module.unet, 1)
    tiny.randomise(module.ema.net, 2)
    return tiny.save(module, folder / "diffusion.ckpt")


def load(folder: Path, **options):
    pipeline = diffusers.LDMPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def strangers_heads(folder: Path) -> str:
    """Heads of the UNet, in a process that cannot see this package."""
    code = (
        "import sys; sys.modules['ldm'] = None\n"
        "from diffusers import LDMPipeline\n"
        f"p = LDMPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print({a.heads for a in p.unet.modules() if type(a).__name__ == 'Attention'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.parent,
        env={"PATH": "", "HOME": str(folder.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr


def imported(folder: Path, kind: str, config: dict, out: Path):
    """What import_checkpoint.py makes of an exported folder."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"model": config}))
    argv = [folder, "--kind", kind, "--config", path, "--out", out]
    import_checkpoint.main([str(word) for word in argv])
    return load_model(out, kind)


def use_earlier_names(folder: Path) -> None:
    """Name the layers of attention as the library did when Stable Diffusion was published."""
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    for file in folder.glob("*/*.safetensors"):
        state = load_file(file)
        assert any(".to_q." in name for name in state)
        for now, before in names.items():
            state = {name.replace(now, before): value for name, value in state.items()}
        save_file(state, file)


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_equal_ours(name, tmp_path):
    """Networks, schedule and pipeline as read back by the library: DDIM images to 1e-4."""
    path = model(tmp_path, NETWORKS[name])
    out = tmp_path / "exported"
    export_diffusers.main(["--checkpoint", str(path), "--out", str(out)])
    with_code = (out / "unet" / "unet_heads.py").exists()
    assert with_code == (name == "paper" or name.startswith("added"))
    if name == "paper":
        assert strangers_heads(out) == "{8}"
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(out)
    pipeline = load(out, **({"trust_remote_code": True} if with_code else {}))
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)

    ours = load_model(path, "diffusion")
    z = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(5))
    for t in (0, 430, 999):
        with torch.no_grad():
            expected = ours.ema.net(z, torch.full((2,), t))
            found = pipeline.unet(z, t).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # The test can fail: the weights that were not asked for are others.
        assert (ours.unet(z, torch.full((2,), t)) - expected).abs().max() > 0.1

    with torch.no_grad():
        z_0 = ddim(ours.eps_model(), ours.schedule, z, time_pairs(1000, 5))
        images = (ours.decode_first_stage(z_0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    found = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=5,
        output_type="np",
    ).images
    assert images.std() > 0.05
    np.testing.assert_allclose(found, images, atol=1e-4)
    assert not list(tmp_path.glob(".exported*"))

    if name == "heads by width":
        use_earlier_names(out)
    back = imported(out, "diffusion", ours.record["model"], tmp_path / "back.ckpt")
    theirs, wanted = back.unet.state_dict(), ours.ema.net.state_dict()
    assert all(torch.equal(theirs[k], wanted[k]) for k in wanted)
    assert back.autoencoder_fingerprint == ours.autoencoder_fingerprint
    assert float(back.scale_factor) == pytest.approx(0.8)
    first = imported(out, "autoencoder", ours.record["model"], tmp_path / "vae.ckpt")
    assert first.net.fingerprint() == ours.autoencoder_fingerprint


def test_what_is_not_described_by_the_configuration_is_not_imported(tmp_path):
    path = model(tmp_path, tiny.UNET)
    record = load_model(path, "diffusion").record["model"]
    export_diffusers.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    params = record["params"]
    wider = {**params["unet_config"], "params": {**params["unet_config"]["params"]}}
    wider["params"]["model_channels"] = 64
    for changed, words in (
        ({"unet_config": wider}, "by the configuration"),
        ({"linear_end": 0.02}, "noise schedule is not"),
        ({"parameterization": "v"}, "prediction_type=epsilon"),
        ({"scale_factor": 0.5}, "the file holds 0.8"),
    ):
        config = {**record, "params": {**params, **changed}}
        with pytest.raises(UserError, match=words):
            imported(tmp_path / "out", "diffusion", config, tmp_path / "back.ckpt")
    with pytest.raises(UserError, match="holds no autoencoder of diffusers"):
        imported(tmp_path, "autoencoder", record, tmp_path / "back.ckpt")
    assert not (tmp_path / "back.ckpt").exists()


def test_eta_and_the_network_without_average(tmp_path):
    """The scheduler's step with noise is ours, for every S that divides T; v is known there."""
    path = model(tmp_path, tiny.UNET, parameterization="v")
    argv = ["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--use_ema", "False"]
    export_diffusers.main(argv)
    pipeline, ours = load(tmp_path / "out"), load_model(path, "diffusion")
    z = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(9, 2, *tiny.LATENT, generator=torch.Generator().manual_seed(6))
    for steps in (4, 8):
        with torch.no_grad():
            eps = ours.eps_model(use_ema=False)
            pairs = time_pairs(1000, steps)
            expected = ddim(eps, ours.schedule, z, pairs, eta=1.0, noise_fn=lambda j: noise[j])
            pipeline.scheduler.set_timesteps(steps)
            assert pipeline.scheduler.timesteps.tolist() == [t for t, _ in pairs]
            found = z
            for j, t in enumerate(pipeline.scheduler.timesteps):
                prediction = pipeline.unet(found, t).sample
                step = pipeline.scheduler.step
                found = step(prediction, t, found, eta=1.0, variance_noise=noise[j]).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_record(tmp_path):
    path = model(tmp_path, tiny.UNET)
    export_diffusers.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "histodiffusion.json").read_text())
    assert record["averaged_weights"] and record["record"]["kind"] == "diffusion"
    assert 0 <= record["largest_difference"] < exporting.TOLERANCE
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LDMPipeline.from_pretrained" in card and record["sha256"] in card
    with pytest.raises(UserError, match="exists"):
        export_diffusers.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])


def test_a_wrong_mapping_is_not_written(tmp_path, monkeypatch):
    """The heads of q, k and v in the other order: all shapes fit, the numbers do not."""
    path = model(tmp_path, {**tiny.UNET, "num_heads": 4})
    right = exporting._attention
    monkeypatch.setattr(exporting, "_attention", lambda *args: right(*args[:4], not args[4]))
    with pytest.raises(UserError, match="exported networks differ by"):
        export_diffusers.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diffusion.ckpt", "first.ckpt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_resample": False, "resblock_updown": False}, "conv_resample"),
        ({"num_heads": 2, "num_heads_upsample": 4}, "num_heads_upsample"),
        ({"channel_mult": [2, 2]}, "first multiplier"),
        ({"num_classes": 3}, "label adapter"),
    ],
)
def test_networks_that_the_library_does_not_have(change, words):
    with pytest.raises(UserError, match=words):
        exporting.unet_settings({**tiny.UNET, **change})


@pytest.mark.parametrize(
    ("ddconfig", "embed_dim", "words"),
    [({"attn_resolutions": [16]}, 3, "attn_resolutions"), ({"z_channels": 4}, 3, "one number")],
)
def test_autoencoders_that_the_library_does_not_have(ddconfig, embed_dim, words):
    with pytest.raises(UserError, match=words):
        exporting.vae_settings({**tiny.DDCONFIG, **ddconfig}, embed_dim, 1.0)
