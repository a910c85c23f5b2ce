"""Labels for a pre-trained diffusion model: the network, its training, its checkpoints."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import train as main_py
from ldm.diffusion.guidance import extrapolate
from ldm.diffusion.samplers import IndexedNoise, ddim
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.models.label_adapter import LabelAdapter
from ldm.run import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled tiles, an autoencoder and a pre-trained diffusion model."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.tiles(folder / "train", per_class=8)
    tiny.tiles(folder / "val", per_class=4, seed=1)
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    tiny.save(tiny.diffusion(autoencoder), folder / "diffusion.ckpt")
    return folder


@pytest.fixture
def source(folder):
    return load_model(folder / "diffusion.ckpt", "diffusion")


def build(folder, **params) -> LabelAdapter:
    """An adapter that knows its classes, as training starts with it."""
    model = LabelAdapter(str(folder / "diffusion.ckpt"), **params)
    model.use_classes(tiny.CLASSES)
    return model


def with_random_labels(model: LabelAdapter, seed: int = 5) -> LabelAdapter:
    """What training would do to the embedding, of the averaged weights too."""
    generator = torch.Generator().manual_seed(seed)
    for net in (model.unet, model.ema.net):
        with torch.no_grad():
            net.label_emb.weight.normal_(generator=generator)
    return model.eval()


def inputs(count=4):
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(count, *tiny.LATENT, generator=generator)
    return z_t, torch.randint(1000, (count,), generator=generator)


# The network


@pytest.mark.parametrize("pretrained_ema", [True, False])
@torch.no_grad()
def test_it_starts_as_the_pre_trained_model_bit_for_bit(folder, source, pretrained_ema):
    model = build(folder, pretrained_ema=pretrained_ema).eval()
    z_t, t = inputs()
    expected = source.eps_model(use_ema=pretrained_ema)(z_t, t)
    assert not torch.equal(expected, source.eps_model(use_ema=not pretrained_ema)(z_t, t))
    for use_ema in (True, False):
        assert torch.equal(model.eps_model(use_ema)(z_t, t), expected)
        for y in ([0, 1, 2, 0], [-1, -1, -1, -1], [-1, 2, -1, 1]):
            assert torch.equal(model.eps_model(use_ema)(z_t, t, torch.tensor(y)), expected)
    assert model.autoencoder_fingerprint == source.autoencoder_fingerprint
    assert model.scale_factor == source.scale_factor and model.schedule == source.schedule
    assert model.latent_shape == source.latent_shape
    assert model.conditional and not source.conditional


@torch.no_grad()
def test_no_label_adds_nothing(folder, source):
    """Also once the embedding is trained, and beside images with a label."""
    model = with_random_labels(build(folder))
    z_t, t = inputs()
    unconditional = source.eps_model()(z_t, t)
    labelled = model.eps_model()(z_t, t, torch.tensor([0, 1, 2, 1]))
    mixed = model.eps_model()(z_t, t, torch.tensor([-1, 1, -1, 1]))
    assert torch.equal(model.eps_model()(z_t, t), unconditional)
    assert torch.equal(mixed[[0, 2]], unconditional[[0, 2]])
    assert torch.equal(mixed[[1, 3]], labelled[[1, 3]])
    assert (labelled != unconditional).flatten(1).any(1).all()
    other = model.eps_model()(z_t, t, torch.tensor([1, 2, 0, 2]))
    assert (labelled != other).flatten(1).any(1).all()


@torch.no_grad()
def test_classifier_free_guidance(folder):
    """Scale 1 is the plain conditional model, 0 the unconditional one; images are finite."""
    model = with_random_labels(build(folder))
    y, z_T = torch.tensor([0, 2]), IndexedNoise(0, [0, 2], [0, 0], tiny.LATENT).initial()
    pairs = time_pairs(1000, 4)

    def sample(scale):
        def strong(z_t, t):
            return model.eps_model()(z_t, t, y)

        return ddim(extrapolate(model.eps_model(), strong, scale), model.schedule, z_T, pairs)

    conditional = ddim(lambda z_t, t: model.eps_model()(z_t, t, y), model.schedule, z_T, pairs)
    assert torch.equal(sample(1.0), conditional)
    unconditional = ddim(model.eps_model(), model.schedule, z_T, pairs)
    torch.testing.assert_close(sample(0.0), unconditional, rtol=1e-3, atol=1e-3)
    assert sample(3.0).isfinite().all() and not torch.equal(sample(3.0), conditional)


def test_labels_are_dropped_in_training_only(folder):
    model = build(folder, label_dropout=0.25)
    y = torch.arange(4000) % 3
    torch.manual_seed(0)
    seen = model.train().labels({"label": y})
    kept = seen >= 0
    assert torch.equal(seen[kept], y[kept]) and (seen[~kept] == -1).all()
    # 4,000 draws: standard error 0.007, four of them.
    assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.028)
    assert torch.equal(model.eval().labels({"label": y}), y)
    assert torch.equal(build(folder, label_dropout=0).train().labels({"label": y}), y)


@pytest.mark.parametrize("tune", ["embedding", "all"])
def test_what_is_tuned_at_which_rate(folder, tune):
    model = build(folder, tune=tune, embedding_rate=5.0)
    model.learning_rate = 1e-3
    rates = {}
    for group in model.configure_optimizers()["optimizer"].param_groups:
        rates |= {id(p): group["lr"] for p in group["params"]}
    assert rates.pop(id(model.unet.label_emb.weight)) == 5e-3
    names = {name for name, p in model.named_parameters() if id(p) in rates}
    expected = {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    expected.remove("unet.label_emb.weight")
    assert names == (expected if tune == "all" else set())
    assert set(rates.values()) == ({1e-3} if tune == "all" else set())
    frozen = {name for name, p in model.unet.named_parameters() if not p.requires_grad}
    assert frozen == (set() if tune == "all" else {name[5:] for name in expected})


def test_label_gain_is_the_loss_that_the_label_saves(folder):
    model = with_random_labels(build(folder))
    z_0, t = inputs()
    eps, y = torch.randn_like(z_0), torch.tensor([0, 1, 2, 0])
    z_t = model.schedule.q_sample(z_0, t, eps)
    averaged = model.validation_losses(z_0, t, eps, y)
    average, model.ema = model.ema.net, None
    plain = model.validation_losses(z_0, t, eps, y)
    for net, values, name in (
        (average, averaged, "val/loss_simple_ema"),
        (model.unet, plain, "val/loss_simple"),
    ):
        with_label, without = ((net(z_t, t, k) - eps).abs().mean() for k in (y, None))
        torch.testing.assert_close(values["val/label_gain"], without - with_label)
        torch.testing.assert_close(values[name], with_label)


def test_training_the_embedding_makes_the_label_matter(folder):
    """On one batch at fixed t and noise: the loss falls with the label, and stays without it."""
    model = build(folder, tune="embedding", use_ema=False, label_dropout=0)
    z_0, t = inputs()
    eps, y = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 3
    model.learning_rate = 0.003
    optimizer = model.configure_optimizers()["optimizer"]
    before = model.validation_losses(z_0, t, eps, y)
    assert before["val/label_gain"] == 0
    for _ in range(5):
        optimizer.zero_grad()
        model.simple_loss(model.unet, z_0, t, eps, y).mean().backward()
        optimizer.step()
    after = model.validation_losses(z_0, t, eps, y)
    assert after["val/label_gain"] > 1e-3
    without = after["val/label_gain"] + after["val/loss_simple"]
    torch.testing.assert_close(without, before["val/loss_simple"])
    wrong = model.validation_losses(z_0, t, eps, (y + 1) % 3)
    assert wrong["val/label_gain"] < after["val/label_gain"]


# Training with main.py


def write_config(
    path: Path, folder: Path, labelled: bool = True, trainer=None, callbacks=None, **params
) -> Path:
    def tiles(name):
        node = {"root": str(folder / name), "size": tiny.PIXELS, "labelled": labelled}
        return {"target": "ldm.data.tiles.TileFolder", "params": node}

    params = {
        "pretrained": str(folder / "diffusion.ckpt"),
        "tune": "all",
        "ema_decay": 0.9,
        "monitor": "val/loss_simple_ema",
        **params,
    }
    data = {"batch_size": 8, "num_workers": 0, "train": tiles("train"), "validation": tiles("val")}
    trainer = {"enable_progress_bar": False, "num_sanity_val_steps": 0, **(trainer or {})}
    config = {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.label_adapter.LabelAdapter",
            "params": params,
        },
        "data": {"target": "ldm.data.datamodule.DataModuleFromConfig", "params": data},
        "lightning": {"callbacks": callbacks or {}, "trainer": trainer},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path, logdir: Path, name: str, steps: int, *more: str):
    argv = ["--base", str(config), "-t", "--logdir", str(logdir), "--name", name]
    argv += ["--max_steps", str(steps), "--precision", "32", *more]
    return main_py.train(parse(main_py.Options, argv))


def weights(logdir: Path, name: str) -> dict:
    return read_checkpoint(logdir / name)["state_dict"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of 6 steps, whose folder tests only read."""
    logdir = tmp_path_factory.mktemp("logs")
    images = {"target": "ldm.models.callbacks.ImageLogger", "params": {"batch_frequency": 100}}
    config = write_config(logdir / "c.yaml", folder, callbacks={"image_logger": images})
    _, model = run(config, logdir, "run", 6)
    return logdir / "run", model


def test_the_checkpoint_alone_gives_the_model(trained):
    root, model = trained
    loaded = load_model(root, "diffusion")
    assert type(loaded) is LabelAdapter and loaded.conditional
    assert loaded.classes == tiny.CLASSES
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    z_t, t = inputs()
    y = torch.tensor([0, 1, 2, -1])
    for use_ema in (True, False):
        eps = loaded.eps_model(use_ema)(z_t, t, y)
        assert torch.equal(eps, model.eval().eps_model(use_ema)(z_t, t, y))
    assert (root / "images" / "samples_00000006.png").is_file()
    assert (root / "checkpoints" / "best.ckpt").is_file()
    logged = {name for row in RunFolder(root).read_metrics() for name in row}
    assert model.metrics() == {"val/loss_simple", "val/loss_simple_ema", "val/label_gain"} <= logged


def test_resumed_with_accumulation_equals_uninterrupted(folder, tmp_path):
    trainer = {"accumulate_grad_batches": 2}
    config = write_config(tmp_path / "c.yaml", folder, trainer=trainer)
    trainer, model = run(config, tmp_path, "whole", 4)
    assert trainer.global_step == 4 and model.ema.num_updates == 4
    run(config, tmp_path, "halves", 2)
    half = weights(tmp_path, "halves")
    run(config, tmp_path, "halves", 4)
    whole, halves = weights(tmp_path, "whole"), weights(tmp_path, "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert not torch.equal(half["unet.label_emb.weight"], halves["unet.label_emb.weight"])


def test_tuning_the_embedding_leaves_the_network(folder, source, tmp_path):
    config = write_config(
        tmp_path / "c.yaml", folder, tune="embedding", use_ema=False, monitor=None
    )
    run(config, tmp_path, "e", 2)
    model = load_model(tmp_path / "e", "diffusion")
    assert model.ema is None and model.unet.label_emb.weight.abs().min() > 0
    z_t, t = inputs()
    assert torch.equal(model.eps_model()(z_t, t), source.eps_model()(z_t, t))


# Mistakes


def bad(folder, tmp_path, words, *more, **params):
    config = write_config(tmp_path / "c.yaml", folder, **params)
    with pytest.raises(UserError, match=words):
        run(config, tmp_path / "logs", "bad", 1, *more)
    assert not (tmp_path / "logs").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"label_dropout": 1.0}, r"label_dropout: 1.0 must be in \[0, 1\)"),
        ({"pretrained": None}, "pretrained is not set: export HISTO_DIFFUSION"),
        ({"pretrained": "nowhere.ckpt"}, "model.params.pretrained: no file nowhere.ckpt"),
        ({"labelled": False}, "needs labelled tiles: set data.params.train.params.labelled=true"),
        ({"monitor": "val/label_gian"}, "val/label_gian.*never logged.*val/label_gain"),
    ],
)
def test_bad_settings(folder, tmp_path, params, words):
    bad(folder, tmp_path, words, **params)


def test_a_pre_trained_model_of_another_kind(folder, trained, tmp_path):
    pretrained = str(folder / "autoencoder.ckpt")
    bad(
        folder,
        tmp_path,
        "pretrained: .*kind autoencoder; needed is diffusion",
        pretrained=pretrained,
    )
    bad(folder, tmp_path, "is a label adapter already", pretrained=str(trained[0]))


def test_other_classes_are_refused_on_resume(folder, tmp_path):
    """As many classes under another name: the weights would fit."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    config = write_config(tmp_path / "c.yaml", data)
    run(config, tmp_path, "run", 1)
    before = (tmp_path / "run" / "configs" / "resolved.yaml").stat().st_mtime_ns
    for split in ("train", "val"):
        (data / split / "TUM").rename(data / split / "STR")
    with pytest.raises(UserError, match="trained on the classes .*TUM.*the data has .*STR"):
        run(config, tmp_path, "run", 2)
    assert (tmp_path / "run" / "configs" / "resolved.yaml").stat().st_mtime_ns == before


def test_pre_training_stays_unconditional(folder):
    from ldm.models.diffusion import LatentDiffusion

    node = {"target": "ldm.modules.unet.UNetModel", "params": {**tiny.UNET, "num_classes": 3}}
    with pytest.raises(
        UserError, match="num_classes=3: pre-training is unconditional.*LabelAdapter"
    ):
        LatentDiffusion(
            node, first_stage_ckpt=str(folder / "autoencoder.ckpt"), image_size=tiny.LATENT[1]
        )
