"""Checkpoints of other code: files with its exact names, made from our networks' weights."""

import os
import random
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from ldm.checkpoint import KEY, load_model, read_checkpoint, training_step_of
from ldm.cli import parse
from ldm.commands import classify as classifier_train
from ldm.errors import UserError
from ldm.models.classifier import network_config
from ldm.modules.unet import EncoderUNetModel

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import import_checkpoint

LDM = "ldm.models.diffusion.ddpm.LatentDiffusion"
KL = "ldm.models.autoencoder.AutoencoderKL"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """autoencoder.ckpt, diffusion.ckpt and classifier.ckpt of ours."""
    return tiny.models(tmp_path_factory.mktemp("ours"))


def autoencoder_state(module) -> dict:
    """As AutoencoderKL of latent diffusion saves it: no prefix, and the loss's weights."""
    state = {k.removeprefix("net."): v for k, v in module.state_dict().items()}
    state |= {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
        "loss.discriminator.main.0.bias": torch.zeros(8),
    }
    return state


def diffusion_state(model, ema: bool = True, first_stage: bool = True) -> dict:
    """As LatentDiffusion saves it: DiffusionWrapper, LitEma (names without dots), tables."""
    schedule, state = model.schedule, {}
    for name, value in model.unet.state_dict().items():
        state[f"model.diffusion_model.{name}"] = value
    if ema:
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(41, dtype=torch.int)
        for name, value in model.ema.net.state_dict().items():
            state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = value
    for name in ("betas", "alphas_cumprod"):
        state[name] = getattr(schedule, name).float()
    state["sqrt_alphas_cumprod"] = schedule.alphas_cumprod.sqrt().float()
    if first_stage:
        for name, value in model.first_stage_model.state_dict().items():
            state[f"first_stage_model.{name}"] = value
    state["scale_factor"] = model.scale_factor
    return state


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def lightning_1(state: dict, path: Path, hostile: Path | None = None) -> Path:
    """A file of Lightning 1: classes as keys of the callbacks, OmegaConf in the settings."""
    payload = {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}}],
        "hyper_parameters": OmegaConf.create({"a": [1, {"b": 2}], "c": None}),
    }
    if hostile is not None:
        payload["hostile"] = Hostile(hostile)
    torch.save(payload, path)
    return path


def write_yaml(path: Path, target: str, params: dict) -> Path:
    model = {"base_learning_rate": 4.5e-6, "target": target, "params": params}
    # The rest of a published file asks for what is not here: data, and an environment variable.
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 4, "train": {"target": "ldm.data.histo.HistoTrain"}},
    }
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    return path


def kl_yaml(path: Path, **ddconfig) -> Path:
    ddconfig = {**tiny.DDCONFIG, "double_z": True, "attn_resolutions": [], **ddconfig}
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 50001}}
    params = {"monitor": "val/rec_loss", "embed_dim": 3, "lossconfig": loss, "ddconfig": ddconfig}
    return write_yaml(path, KL, params)


def ldm_yaml(path: Path, first_stage: bool = True, **more) -> Path:
    config = {
        "target": KL,
        "params": {
            "embed_dim": 3,
            "ckpt_path": "${oc.env:NO_SUCH_VARIABLE}",
            "ddconfig": {**tiny.DDCONFIG, "double_z": True},
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "num_timesteps_cond": 1,
        "timesteps": 1000,
        "loss_type": "l1",
        "first_stage_key": "image",
        "cond_stage_config": "__is_unconditional__",
        "image_size": tiny.LATENT[1],
        "channels": 3,
        "scale_by_std": True,
        "monitor": "val/loss_simple_ema",
        "unet_config": {"target": UNET, "params": {**tiny.UNET, "use_fp16": False}},
        **({"first_stage_config": config} if first_stage else {}),
        **more,
    }
    return write_yaml(path, LDM, params)


def convert(*argv) -> None:
    import_checkpoint.main([str(word) for word in argv])


X = torch.linspace(-1, 1, 2 * 3 * tiny.PIXELS**2).view(2, 3, tiny.PIXELS, tiny.PIXELS)
Z = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
T = torch.tensor([3, 700])


def test_an_autoencoder_of_latent_diffusion(ours, tmp_path, caplog):
    model = load_model(ours / "autoencoder.ckpt", "autoencoder")
    file = lightning_1(autoencoder_state(model), tmp_path / "f.ckpt")
    config, out = kl_yaml(tmp_path / "c.yaml"), tmp_path / "out.ckpt"
    common = [file, "--kind", "autoencoder", "--config", config, "--out", out]
    with pytest.raises(UserError, match="allow_pickle, which"):
        convert(*common)
    assert not out.exists()
    with caplog.at_level("INFO"):
        convert(*common, "--allow_pickle")
    text = caplog.text
    assert "could run any code" in text and "model_checkpoint.ModelCheckpoint" in text
    assert f"used         {len(model.state_dict())} tensors" in text
    assert "not used     loss.* (3)" in text and "missing      none" in text
    imported = load_model(out, "autoencoder")
    assert torch.equal(imported.net.decode(Z), model.net.decode(Z))
    assert torch.equal(imported.net.encode(X).mean, model.net.encode(X).mean)
    payload = read_checkpoint(out)
    assert payload["global_step"] == 1234 and len(payload[KEY]["source"]["unused"]) == 3
    with pytest.raises(UserError, match="exists"):
        convert(*common, "--allow_pickle")


def test_objects_in_a_pickle_are_never_built(ours, tmp_path):
    model = load_model(ours / "autoencoder.ckpt", "autoencoder")
    made = tmp_path / "made"
    file = lightning_1(autoencoder_state(model), tmp_path / "f.ckpt", hostile=made)
    config, out = kl_yaml(tmp_path / "c.yaml"), tmp_path / "out.ckpt"
    convert(file, "--kind", "autoencoder", "--config", config, "--out", out, "--allow_pickle")
    assert out.exists() and not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "the plain way runs what the file asks for"


@pytest.mark.parametrize("ema", [True, False])
def test_a_diffusion_model_of_latent_diffusion(ema, ours, tmp_path, caplog):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    torch.save({"state_dict": diffusion_state(model, ema)}, tmp_path / "f.ckpt")
    config, out = ldm_yaml(tmp_path / "c.yaml"), tmp_path / "out.ckpt"
    with caplog.at_level("INFO"):
        convert(tmp_path / "f.ckpt", "--kind", "diffusion", "--config", config, "--out", out)
    assert "not used     sqrt_alphas_cumprod" in caplog.text
    assert ("no averaged weights" in caplog.text) == (not ema)
    imported = load_model(out, "diffusion")
    assert torch.equal(imported.unet(Z, T), model.unet(Z, T))
    expected = model.ema.net if ema else model.unet
    assert torch.equal(imported.eps_model()(Z, T), expected(Z, T))
    assert torch.equal(imported.decode_first_stage(Z), model.decode_first_stage(Z))
    assert imported.schedule == model.schedule
    assert not ema or (imported.ema.num_updates == 41 and imported.ema.decay == 0.9999)


def renamed(state: dict, before: str, now: str) -> dict:
    return {now + k.removeprefix(before): v for k, v in state.items() if k.startswith(before)}


def cast(state: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


PREFIX = "model.diffusion_model."
VARIANTS = {
    "compiled": lambda s: {"state_dict": renamed(s, "", "_orig_mod.")},
    "distributed and compiled": lambda s: {"state_dict": renamed(s, "", "module._orig_mod.")},
    "parts compiled": lambda s: {
        **s,
        **renamed(s, PREFIX, f"{PREFIX}_orig_mod."),
        **renamed(s, "model_ema.diffusion_model", "model_ema.diffusion_model_orig_mod"),
        **renamed(s, "first_stage_model.", "first_stage_model._orig_mod."),
    },
    "float16": lambda s: {"state_dict": cast(s, torch.float16)},
    "bfloat16": lambda s: cast(s, torch.bfloat16),
    "only averages": lambda s: {k: v for k, v in s.items() if not k.startswith(PREFIX)},
    "entry ema": lambda s: {"model": {k: 0 * v for k, v in s.items()}, "ema": s},
    "entry params_ema": lambda s: {"params_ema": s},
    "bare UNet": lambda s: {
        **renamed(s, PREFIX, ""),
        **{k: v for k, v in s.items() if not k.startswith(("model.", "model_ema."))},
    },
    "safetensors": lambda s: s,
    "flat.safetensors": lambda s: renamed(s, "", "state_dict."),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_to_store_the_same_weights(variant, ours, tmp_path):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    content = VARIANTS[variant](diffusion_state(model))
    file = tmp_path / ("f.safetensors" if variant.endswith("safetensors") else "f.ckpt")
    if variant.endswith("safetensors"):
        save_file({k: v.clone().contiguous() for k, v in content.items()}, file)
    else:
        torch.save(content, file)
    config, out = ldm_yaml(tmp_path / "c.yaml", ema_decay=0.99), tmp_path / "out.ckpt"
    convert(file, "--kind", "diffusion", "--config", config, "--out", out)
    imported = load_model(out, "diffusion")
    rounded = {"float16": 1e-2, "bfloat16": 1e-1}.get(variant, 0.0)
    unet = model.ema.net if variant == "only averages" else model.unet
    average = model.unet if variant == "bare UNet" else model.ema.net
    with torch.no_grad():
        for ours_, theirs in ((imported.unet, unet), (imported.eps_model(), average)):
            difference = (ours_(Z, T) - theirs(Z, T)).abs().max()
            assert difference <= rounded * theirs(Z, T).abs().max()
    assert float(imported.scale_factor) == pytest.approx(0.8, rel=rounded or 1e-7)
    if imported.ema is not None:  # 0.9999 is 1 in half precision
        assert imported.ema.decay == (0.99 if rounded else 0.9999)


def test_the_autoencoder_of_a_conditional_model(ours, tmp_path):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    torch.save(diffusion_state(model), tmp_path / "f.ckpt")
    more = {"conditioning_key": "crossattn", "cond_stage_config": {"target": "x.CLIP"}}
    config, out = ldm_yaml(tmp_path / "c.yaml", **more), tmp_path / "out.ckpt"
    convert(tmp_path / "f.ckpt", "--kind", "autoencoder", "--config", config, "--out", out)
    assert load_model(out, "autoencoder").net.fingerprint() == model.autoencoder_fingerprint


def test_a_first_stage_from_a_diffusion_file_and_beside_one(ours, tmp_path):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    torch.save({"state_dict": diffusion_state(model)}, tmp_path / "whole.ckpt")
    torch.save({"state_dict": diffusion_state(model, first_stage=False)}, tmp_path / "unet.ckpt")
    config = ldm_yaml(tmp_path / "c.yaml")
    first = tmp_path / "first.ckpt"
    convert(tmp_path / "whole.ckpt", "--kind", "autoencoder", "--config", config, "--out", first)
    assert load_model(first, "autoencoder").net.fingerprint() == model.autoencoder_fingerprint

    file, out = tmp_path / "unet.ckpt", tmp_path / "out.ckpt"
    common = [file, "--kind", "diffusion", "--config", config, "--out", out]
    with pytest.raises(UserError, match="holds no autoencoder"):
        convert(*common)
    convert(*common, "--autoencoder", first)
    imported = load_model(out, "diffusion")
    assert torch.equal(imported.decode_first_stage(Z), model.decode_first_stage(Z))
    other = tiny.save(tiny.autoencoder(seed=5), tmp_path / "other.ckpt")
    common = [tmp_path / "whole.ckpt", *common[1:-1], tmp_path / "out2.ckpt"]
    with pytest.raises(UserError, match="is not the autoencoder in the file"):
        convert(*common, "--autoencoder", other)


def test_the_latent_scale(ours, tmp_path):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    state = diffusion_state(model)
    torch.save({"state_dict": state}, tmp_path / "with.ckpt")
    del state["scale_factor"]
    torch.save({"state_dict": state}, tmp_path / "without.ckpt")
    measured = ldm_yaml(tmp_path / "c.yaml")
    stated = ldm_yaml(tmp_path / "d.yaml", scale_by_std=False, scale_factor=0.18215)
    silent = ldm_yaml(tmp_path / "e.yaml", scale_by_std=False)
    out = tmp_path / "out.ckpt"

    def scale(file: str, config: Path, *more: str) -> float:
        out.unlink(missing_ok=True)
        argv = [tmp_path / file, "--kind", "diffusion", "--config", config, "--out", out]
        convert(*argv, *more)
        return float(load_model(out, "diffusion").scale_factor)

    assert scale("with.ckpt", measured) == pytest.approx(0.8)
    assert scale("without.ckpt", stated) == pytest.approx(0.18215)
    assert scale("without.ckpt", silent) == 1 and scale("with.ckpt", silent) == pytest.approx(0.8)
    assert scale("without.ckpt", measured, "--scale_factor", "0.5") == pytest.approx(0.5)
    with pytest.raises(UserError, match="give scale_factor"):
        scale("without.ckpt", measured)
    with pytest.raises(UserError, match="the file holds 0.8"):
        scale("with.ckpt", measured, "--scale_factor", "0.5")
    with pytest.raises(UserError, match=r"config: .*scale_factor=0.18215: the file holds 0.8"):
        scale("with.ckpt", stated)
    torch.save({**state, "scale_factor": torch.tensor(torch.nan)}, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match="scale_factor=nan must be positive"):
        scale("nan.ckpt", measured)


def test_what_does_not_fit_is_refused(ours, tmp_path):
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    state = diffusion_state(model)
    torch.save({"state_dict": state}, tmp_path / "f.ckpt")
    out = tmp_path / "out.ckpt"

    def attempt(config: Path, file: str = "f.ckpt", *more: str) -> None:
        convert(tmp_path / file, "--kind", "diffusion", "--config", config, "--out", out, *more)

    with pytest.raises(UserError, match="noise schedule is not.*0.0015 .*correct timesteps"):
        attempt(ldm_yaml(tmp_path / "a.yaml", linear_start=0.00085, linear_end=0.012))
    unet = {"target": UNET, "params": {**tiny.UNET, "model_channels": 64}}
    with pytest.raises(UserError, match="UNet: .* other shapes.*time_embed"):
        attempt(ldm_yaml(tmp_path / "b.yaml", unet_config=unet))
    good = ldm_yaml(tmp_path / "c.yaml")
    value = state.pop("model.diffusion_model.out.2.bias")
    torch.save({**state, "model.diffusion_model.out.2.bias": value / 0}, tmp_path / "h.ckpt")
    with pytest.raises(
        UserError, match=r"UNet: model\.diffusion_model\.out\.2\.bias has values .*NaN"
    ):
        attempt(good, "h.ckpt")
    torch.save({"state_dict": state}, tmp_path / "g.ckpt")
    with pytest.raises(UserError, match=r"1 weights are missing.*diffusion_model\.out\.2\.bias"):
        attempt(good, "g.ckpt")
    assert not out.exists()
    attempt(good, "g.ckpt", "--allow_missing")
    assert read_checkpoint(out)[KEY]["source"]["missing"] == ["model.diffusion_model.out.2.bias"]
    out.unlink()
    conditional = ldm_yaml(tmp_path / "d.yaml", conditioning_key="crossattn")
    with pytest.raises(UserError, match="conditioning_key"):
        attempt(conditional)
    with pytest.raises(UserError, match="needed is a LatentDiffusion"):
        attempt(kl_yaml(tmp_path / "e.yaml"))
    with pytest.raises(UserError, match="can be used as it is"):
        convert(ours / "diffusion.ckpt", "--kind", "diffusion", "--config", good, "--out", out)


@pytest.mark.parametrize("content", [b"text", b"", b"\x80\x04K\x01."])
def test_no_checkpoint_at_all(content, tmp_path):
    (tmp_path / "f.ckpt").write_bytes(content)
    config = kl_yaml(tmp_path / "c.yaml")
    argv = [tmp_path / "f.ckpt", "--kind", "autoencoder", "--config", config, "--out"]
    for more in ([], ["--allow_pickle"]):
        with pytest.raises(UserError, match=r"f.ckpt .*; give .*") as caught:
            convert(*argv, tmp_path / "out.ckpt", *more)
        assert not re.search(r"\(\d*\)", str(caught.value))  # an opcode is no reason


def test_a_published_classifier(ours, tmp_path, caplog):
    """`model_010000.pt` is the bare state of the half UNet."""
    model = load_model(ours / "classifier.ckpt", "classifier")
    torch.save(model.net.state_dict(), tmp_path / "model_010000.pt")
    target = "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel"
    config = write_yaml(tmp_path / "c.yaml", target, model.net_config["params"])
    argv = [tmp_path / "model_010000.pt", "--kind", "classifier", "--config", config]
    argv += ["--autoencoder", ours / "diffusion.ckpt", "--out", tmp_path / "out.ckpt"]
    convert(*argv, "--classes", "A,B,C")
    imported = load_model(tmp_path / "out.ckpt", "classifier")
    assert torch.equal(imported(Z, T), model(Z, T))
    assert imported.classes == ["A", "B", "C"] and imported.noised is False
    assert float(imported.scale_factor) == pytest.approx(0.8)
    assert imported.autoencoder_fingerprint == model.autoencoder_fingerprint
    (tmp_path / "out.ckpt").unlink()
    with pytest.raises(UserError, match="classes: 2 names"):
        convert(*argv, "--classes", "A,B")
    with pytest.raises(UserError, match="must differ"):
        convert(*argv, "--classes", "A,A,B")


def test_a_classifier_of_latents_of_another_size(ours, tmp_path):
    net = {**load_model(ours / "classifier.ckpt", "classifier").net_config["params"]}
    net |= {"image_size": 8, "pool": "spatial"}  # the weights do not depend on the size
    torch.save(EncoderUNetModel(**net).state_dict(), tmp_path / "m.pt")
    config = write_yaml(tmp_path / "c.yaml", "ldm.modules.unet.EncoderUNetModel", net)
    argv = [tmp_path / "m.pt", "--kind", "classifier", "--config", config, "--classes", "A,B,C"]
    argv += ["--autoencoder", ours / "diffusion.ckpt", "--out", tmp_path / "out.ckpt"]
    with pytest.raises(UserError, match="latents of 3x8x8, the autoencoder makes 3x16x16"):
        convert(*argv)
    assert not (tmp_path / "out.ckpt").exists()


def test_training_starts_from_an_imported_classifier(ours, tmp_path, monkeypatch):
    source = load_model(ours / "classifier.ckpt", "classifier")
    file = ours / "classifier.ckpt"
    tiles = tiny.tiles(tmp_path / "tiles", 4)
    argv = f"--data_dir {tiles} --first_stage {ours / 'diffusion.ckpt'} --iterations 1 --lr 0"
    argv += f" --logdir {tmp_path} --name c --num_workers 0 --batch_size 3 --precision 32"
    argv = [*argv.split(), "--init_from"]
    _, model = classifier_train.train(parse(classifier_train.Options, [*argv, str(file)]))
    ours_, theirs = model.net.state_dict(), source.net.state_dict()
    assert all(torch.equal(ours_[k], theirs[k]) for k in theirs)
    other = tiny.classifier(load_model(ours / "diffusion.ckpt", "diffusion"), ["A", "B", "C"])
    argv.append(str(tiny.save(other, tmp_path / "other.ckpt")))
    with pytest.raises(UserError, match=r"init_from.* knows the classes \['A', 'B', 'C'\]"):
        classifier_train.train(parse(classifier_train.Options, [*argv, "--dry_run"]))


def test_the_published_classifier_needs_no_configuration(ours, tmp_path):
    """Width 128, two blocks per level, attention pooling: what classifier_train.py builds."""
    model = load_model(ours / "diffusion.ckpt", "diffusion")
    net = EncoderUNetModel(**network_config(model.first_stage_model, 3)["params"])
    torch.save(net.state_dict(), tmp_path / "model_010000.pt")
    argv = [tmp_path / "model_010000.pt", "--kind", "classifier", "--classes", "A,B,C"]
    argv += ["--autoencoder", ours / "diffusion.ckpt", "--out", tmp_path / "out.ckpt"]
    convert(*argv)
    stored = read_checkpoint(tmp_path / "out.ckpt")["state_dict"]
    assert all(torch.equal(stored[f"net.{k}"], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (KEY, "text"),
        (KEY, {}),
        (KEY, {"model": {}}),
        (KEY, {"classes": 3}),
        (KEY, {"format": None}),
        (KEY, {"seed": "a"}),
        (KEY, {"revision": 5}),
        ("state_dict", None),
        ("state_dict", {1: torch.zeros(1)}),
    ],
)
def test_a_damaged_record(entry, value, ours, tmp_path):
    payload = read_checkpoint(ours / "autoencoder.ckpt")
    whole = isinstance(value, dict) and value and entry == KEY
    payload[entry] = {**payload[entry], **value} if whole else value
    torch.save(payload, tmp_path / "f.ckpt")
    with pytest.raises(UserError, match=r"f\.ckpt is damaged"):
        load_model(tmp_path / "f.ckpt", "autoencoder")


def test_a_record_that_does_not_fit_names_its_file(ours, tmp_path):
    payload = read_checkpoint(ours / "autoencoder.ckpt")
    payload[KEY]["model"]["params"] = [1]
    torch.save(payload, tmp_path / "f.ckpt")
    with pytest.raises(UserError, match=r"`model`: .*f\.ckpt: .*params: \[1\] must be a mapping"):
        load_model(tmp_path / "f.ckpt", "autoencoder", what="`model`")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file(seed, ours, tmp_path):
    """Cut short, or with a few wrong bytes where the names and numbers of its tensors stand."""
    rng, path = random.Random(seed), tmp_path / "f.ckpt"
    content = bytearray((ours / "autoencoder.ckpt").read_bytes())
    if seed % 4:
        for place in rng.sample(range(6000), 20):
            content[place] = rng.randrange(256)
    else:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)
    training_step_of(path)
    try:
        load_model(path, "autoencoder")
    except UserError as error:
        assert str(path) in str(error)


def test_a_model_that_was_saved_compiled(ours, tmp_path):
    payload = read_checkpoint(ours / "autoencoder.ckpt")
    state = {f"_orig_mod.{name}": value for name, value in payload["state_dict"].items()}
    torch.save({**payload, "state_dict": state}, tmp_path / "f.ckpt")
    found = load_model(tmp_path / "f.ckpt", "autoencoder").state_dict()
    assert all(torch.equal(found[name], value) for name, value in payload["state_dict"].items())


def test_a_checkpoint_whose_weights_are_not_finite_is_not_loaded(ours, tmp_path):
    """Guidance by such a classifier would fail only after sampling has begun."""
    payload = read_checkpoint(ours / "classifier.ckpt")
    payload["state_dict"]["net.time_embed.0.bias"][3] = torch.inf
    torch.save(payload, tmp_path / "f.ckpt")
    with pytest.raises(UserError, match=r"f\.ckpt: net\.time_embed\.0\.bias has values .*finite"):
        load_model(tmp_path / "f.ckpt", "classifier")


def test_class_names_for_another_number_of_outputs(ours, tmp_path):
    payload = read_checkpoint(ours / "classifier.ckpt")
    payload[KEY]["classes"] = tiny.CLASSES[:2]
    torch.save(payload, tmp_path / "f.ckpt")
    with pytest.raises(UserError, match=r"f\.ckpt is damaged: its network knows 3 classes"):
        load_model(tmp_path / "f.ckpt", "classifier")


def test_files_of_other_code_name_the_command_that_imports_them(tmp_path):
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "f.ckpt")
    with pytest.raises(UserError, match="import_checkpoint.py"):
        load_model(tmp_path / "f.ckpt", "autoencoder", what="model.params.first_stage_ckpt")
    torch.save({"state_dict": {}, "callbacks": {ModelCheckpoint: 1}}, tmp_path / "g.ckpt")
    with pytest.raises(UserError, match="import_checkpoint.py"):
        load_model(tmp_path / "g.ckpt", "autoencoder", what="model.params.ckpt_path")


@pytest.mark.parametrize(
    "argv",
    [
        ["f", "--kind", "diffusion", "--out", "o"],
        ["f", "--kind", "classifier", "--out", "o"],
        ["f", "--kind", "autoencoder", "--config", "c", "--out", "o", "--scale_factor", "1"],
        ["f", "--kind", "vqvae", "--out", "o"],
    ],
)
def test_arguments(argv):
    with pytest.raises(UserError):
        parse(import_checkpoint.Options, argv)
