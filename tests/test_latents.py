"""Cached latents: making them, and training from them, on tiny real models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cache_latents

from ldm.checkpoint import load_model, read_checkpoint, write_checkpoint
from ldm.cli import _one_line, parse
from ldm.commands import classify as classifier_train
from ldm.commands import train as main_py
from ldm.config import instantiate_from_config
from ldm.data.caching import CachePlan, Views, make_cache
from ldm.data.datamodule import DataModuleFromConfig, ResumableSampler
from ldm.data.latents import LatentCache, latent_sums, scale_from_sums
from ldm.data.tiles import TileFolder, symmetry
from ldm.devices import Ranks
from ldm.errors import UserError
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiles (train, val), models of one latent space, and an autoencoder of another."""
    folder = tiny.models(tmp_path_factory.mktemp("latents"))
    tiny.tiles(folder / "train", per_class=8)
    tiny.tiles(folder / "val", per_class=4, seed=1)
    tiny.save(tiny.autoencoder(seed=5), folder / "other.ckpt")
    # A start whose predictions depend on the latents: those of a fresh UNet are 0. The scale is
    # left to be measured.
    start = read_checkpoint(folder / "diffusion.ckpt")
    start["state_dict"]["scale_factor"].fill_(float("nan"))
    write_checkpoint(folder / "start.ckpt", start)
    return folder


def cache(folder: Path, out: Path, *options, data=("train",), r="autoencoder.ckpt") -> LatentCache:
    """Run the command in this process; the cache it leaves."""
    paths = [folder / name for name in data]
    argv = ["-r", folder / r, "--data", *paths, "--out", out, "--num_workers", 0, *options]
    cache_latents.main([str(word) for word in argv])
    return LatentCache.read(out)


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    """Labelled tiles without augmentation, float32, in files of five tiles."""
    options = ["--val_data", folder / "val", "--labelled", "--dtype", "float32"]
    cache(folder, folder / "plain", *options, "--shard_tiles", 5)
    return folder / "plain"


def config(folder: Path, path: Path, model: dict | None = None, **train) -> Path:
    """A training configuration of a tiny diffusion model, on the tiles of `folder`."""
    params = {
        "first_stage_ckpt": str(folder / "autoencoder.ckpt"),
        "image_size": tiny.LATENT[1],
        "unet_config": {"target": "ldm.modules.unet.UNetModel", "params": tiny.UNET},
        "monitor": "val/loss_simple_ema",
        "ema_decay": 0.9,
        "ckpt_path": str(folder / "start.ckpt"),
    }
    model = model or {"target": "ldm.models.diffusion.LatentDiffusion", "params": params}

    def tiles(name: str, **more) -> dict:
        settings = {"root": str(folder / name), "size": tiny.PIXELS, "labelled": True, **more}
        return {"target": "ldm.data.tiles.TileFolder", "params": settings}

    data = {"batch_size": 4, "num_workers": 0, "train": tiles("train", **train)}
    tree = {
        "model": {"base_learning_rate": 1e-3, **model},
        "data": {
            "target": "ldm.data.datamodule.DataModuleFromConfig",
            "params": {**data, "validation": tiles("val")},
        },
        "lightning": {
            "trainer": {
                "enable_progress_bar": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "val_check_interval": 3,
            },
        },
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, logdir: Path, name: str, steps: int, *more: str):
    argv = ["--base", str(config), "-t", "--logdir", str(logdir), "--name", name]
    argv += ["--max_steps", str(steps), "--gpus", "0", "--precision", "32", *more]
    return main_py.train(parse(main_py.Options, argv))


def logged(run: Path, *names: str) -> dict[str, list[float]]:
    rows = RunFolder(run).read_metrics()
    return {name: [row[name] for row in rows if name in row] for name in names}


# What is stored


def test_moments_are_those_of_the_tiles(folder, plain):
    """In order, with labels and paths, for both splits."""
    made = LatentCache.read(plain)
    net = load_model(folder / "autoencoder.ckpt", "autoencoder").net
    assert made.settings["autoencoder"] == net.fingerprint()
    for part, name in ((made.train, "train"), (made.validation, "val")):
        tiles = TileFolder(folder / name, tiny.PIXELS, labelled=True)
        assert part.relative_paths == tiles.relative_paths and part.labels == tiles.labels
        assert part.classes == tiny.CLASSES and len(part) == len(tiles)
        x = torch.stack([tiles[i]["image"] for i in range(len(tiles))])
        with torch.no_grad():
            posterior = net.encode(x)
        items = [part[i] for i in range(len(part))]
        stored = DiagonalGaussian(torch.stack([item["moments"] for item in items]))
        # Another batch size is another order of summation in convolutions, no more.
        torch.testing.assert_close(stored.mean, posterior.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stored.logvar, posterior.logvar, rtol=1e-5, atol=1e-5)
        assert [item["path"] for item in items] == [tiles.path(i) for i in range(len(tiles))]
    assert not torch.equal(made.train[0]["moments"], made.train[1]["moments"])


def test_scale_is_that_of_the_tiles(folder, plain):
    """Computed from the cache, from images, and by training on any number of tiles."""
    made = LatentCache.read(plain).train
    tiles = TileFolder(folder / "train", tiny.PIXELS)
    net = load_model(folder / "autoencoder.ckpt", "autoencoder").net
    for indices in (range(24), range(0, 24, 5)):
        expected = scale_from_sums(latent_sums(tiles, list(indices), net.encode))
        assert scale_from_sums(latent_sums(made, indices, net.encode)) == pytest.approx(
            expected, rel=1e-6
        )
    manifest = json.loads((plain / "manifest.json").read_text())
    assert manifest["statistics"]["tiles"] == 24
    whole = scale_from_sums(latent_sums(tiles, list(range(24)), net.encode))
    assert manifest["statistics"]["scale_factor"] == pytest.approx(whole, rel=1e-6)


def test_float16_keeps_the_statistics_and_rounds_the_rest(folder, plain, tmp_path):
    half = cache(folder, tmp_path / "half", "--val_data", folder / "val", "--labelled")
    full = LatentCache.read(plain)
    # 11 significant bits: half a unit in the last place, relative, for values that are not tiny.
    a, b = (torch.stack([c.train[i]["moments"] for i in range(24)]) for c in (half, full))
    assert a.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=2**-11, atol=2e-6)  # other batches, too
    assert half.statistics["scale_factor"] == pytest.approx(
        full.statistics["scale_factor"], rel=1e-6
    )
    size = sum(p.stat().st_size for p in (tmp_path / "half").rglob("*.safetensors"))
    assert size < 0.52 * sum(p.stat().st_size for p in plain.rglob("*.safetensors"))


def test_views_are_the_eight_symmetries_once(folder, tmp_path):
    options = ["--augment", "d4", "--views", 8, "--dtype", "float32", "--val_fraction", 0.2]
    made = cache(folder, tmp_path / "c", *options)
    net = load_model(folder / "autoencoder.ckpt", "autoencoder").net
    tile = TileFolder(folder / "train", tiny.PIXELS)
    index = tile.relative_paths.index(made.train.relative_paths[3])
    x = tile[index]["image"]
    with torch.no_grad():
        expected = net.encode(torch.stack([symmetry(x, k) for k in range(8)]).contiguous()).mean
    stored = torch.stack([torch.from_numpy(made.train.moments(3, v)[:3].copy()) for v in range(8)])
    distance = (stored[:, None] - expected[None]).abs().amax(dim=(2, 3, 4))  # (view, symmetry)
    match = distance < 1e-4
    assert match.sum(dim=0).eq(1).all() and match.sum(dim=1).eq(1).all()
    assert match[0, 0], "view 0 is the tile itself"
    assert made.validation.shards.views == 1
    # A seed chooses the view, and every view is chosen.
    views = {made.train[3, seed]["moments"].numpy().tobytes() for seed in range(8)}
    assert len(views) == 8
    assert torch.equal(made.train[3, 5]["moments"], made.train[3, 5]["moments"])
    torch.manual_seed(0)
    assert len({made.train[3]["moments"].numpy().tobytes() for _ in range(50)}) > 4


def test_other_views_follow_from_seed_and_name(folder):
    tiles = TileFolder(folder / "train", tiny.PIXELS, augment=["d4", "stain"])
    one, same, other = Views(tiles, 1), Views(tiles, 1), Views(tiles, 2)
    assert torch.equal(one[4, 0], TileFolder(folder / "train", tiny.PIXELS)[4]["image"])
    assert torch.equal(one[4, 2], same[4, 2])
    assert not torch.equal(one[4, 2], other[4, 2]) and not torch.equal(one[4, 2], one[4, 3])
    moved = Views(tiles.subset([4]), 1)
    assert torch.equal(one[4, 2], moved[0, 2]), "other tiles do not change a tile's views"
    few = Views(TileFolder(folder / "train", tiny.PIXELS, augment=["d4"]), 1)
    assert len({few[4, v].numpy().tobytes() for v in range(4)}) == 4


def corpora(folder: Path, **lung) -> dict:
    lung = {"root": str(folder / "val"), "weight": 2.5, **lung}
    return {
        "corpora": {"colon": {"root": str(folder / "train"), "weight": 0.5}, "lung": lung},
        "size": tiny.PIXELS,
    }


def test_order_is_that_of_the_images(folder, tmp_path):
    """Weights of corpora, hold-out and shuffling: the same tiles in the same batches."""
    node = {"target": "ldm.data.corpora.Corpora", "params": corpora(folder)}
    params = {"batch_size": 4, "num_workers": 0, "train": node, "val_fraction": 0.2, "seed": 3}
    target = "ldm.data.datamodule.DataModuleFromConfig"
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"data": {"target": target, "params": params}}))
    out = tmp_path / "c"
    argv = ["-r", folder / "autoencoder.ckpt", "--data", path, "--out", out, "--num_workers", 0]
    cache_latents.main([str(word) for word in argv])
    images = DataModuleFromConfig(**params)
    latents = DataModuleFromConfig(batch_size=4, num_workers=0, seed=3, latents=str(out))
    for one, other in (
        (images.train_dataset, latents.train_dataset),
        (images.val_dataset, latents.val_dataset),
    ):
        assert one.relative_paths == other.relative_paths and one.groups == other.groups
    assert (
        latents.train_dataset.pass_length()
        == images.train_dataset.pass_length()
        != len(latents.train_dataset)
    )
    for epoch in (0, 1):
        orders = []
        for data in (images, latents):
            sampler = ResumableSampler(data.train_dataset, 4, seed=3, num_replicas=2, rank=1)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert orders[0] == orders[1] and isinstance(orders[1][0], tuple)


# Training


def test_training_has_the_losses_of_training_from_images(folder, plain, tmp_path):
    """Step by step and in validation, with the same latent scale; pictures are written too."""
    path = config(folder, tmp_path / "c.yaml")
    names = ("train/loss_simple", "val/loss_simple", "val/loss_simple_ema", "train/grad_norm")
    _, one = train(path, tmp_path, "images", 6)
    # The folders of the tiles are not looked at.
    nowhere = [f"data.params.{name}.params.root=/nowhere" for name in ("train", "validation")]
    pictures = (f"data.params.latents={plain}", *nowhere, *tiny.PICTURES)
    _, other = train(path, tmp_path, "latents", 6, *pictures)
    assert float(other.scale_factor) == pytest.approx(float(one.scale_factor), rel=1e-6)
    a, b = (logged(tmp_path / name, *names) for name in ("images", "latents"))
    assert len(a["train/loss_simple"]) == 6 and len(a["val/loss_simple"]) == 2
    for name in names:
        # The latents differ in the last bits only: the encoder ran on other batches.
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    pictures = {p.name.split("_0")[0] for p in (tmp_path / "latents" / "images").iterdir()}
    assert pictures == {"reconstructions", "samples"}

    # Rounded to 16 bits (11 significant), losses agree to 1e-4; another order of tiles does not.
    half = tmp_path / "half"
    cache(folder, half, "--val_data", folder / "val", "--labelled")
    train(path, tmp_path, "half", 3, f"data.params.latents={half}")
    rounded = logged(tmp_path / "half", "train/loss_simple")["train/loss_simple"]
    np.testing.assert_allclose(rounded, a["train/loss_simple"][:3], rtol=1e-4)
    train(path, tmp_path, "seed", 3, f"data.params.latents={plain}", "data.params.seed=1")
    shuffled = logged(tmp_path / "seed", "train/loss_simple")["train/loss_simple"]
    assert np.abs(np.divide(shuffled, a["train/loss_simple"][:3]) - 1).max() > 0.01


def test_resumed_training_equals_uninterrupted_bit_for_bit(folder, tmp_path):
    made = cache(
        folder, tmp_path / "c", "--augment", "d4", "--views", 3, "--val_data", folder / "val"
    )
    path = config(folder, tmp_path / "c.yaml")
    more = [f"data.params.latents={made.root}", "lightning.callbacks.image_logger=null"]
    train(path, tmp_path, "whole", 8, *more)
    train(path, tmp_path, "parts", 5, *more)
    train(path, tmp_path, "parts", 8, *more, "data.params.num_workers=1")
    one, other = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_label_adapter_trains_on_a_cache(folder, plain, tmp_path):
    params = {"pretrained": str(folder / "diffusion.ckpt"), "tune": "all", "ema_decay": 0.9}
    model = {"target": "ldm.models.label_adapter.LabelAdapter", "params": params}
    path = config(folder, tmp_path / "c.yaml", model)
    names = ("train/loss_simple", "val/label_gain")
    train(path, tmp_path, "images", 3)
    train(path, tmp_path, "latents", 3, f"data.params.latents={plain}")
    a, b = (logged(tmp_path / name, *names) for name in ("images", "latents"))
    np.testing.assert_allclose(b[names[0]], a[names[0]], rtol=1e-5)
    assert a[names[1]][0] and b[names[1]] == pytest.approx(a[names[1]], rel=0.01)
    assert load_model(tmp_path / "latents", "diffusion").classes == tiny.CLASSES


def classify(folder: Path, logdir: Path, *options):
    argv = ["--first_stage", folder / "diffusion.ckpt", "--logdir", logdir, "--name", "run"]
    argv += ["--batch_size", 8, "--num_workers", 0, "--lr", 1e-3, "--gpus", 0, "--iterations", 6]
    argv += ["--eval_interval", 3, "--log_interval", 1, "--classifier_width", 32]
    argv += ["--classifier_depth", 1, "--classifier_channel_mult", "1,1", *options]
    return classifier_train.train(parse(classifier_train.Options, [str(word) for word in argv]))


def test_classifier_has_the_losses_of_training_from_images(folder, plain, tmp_path):
    images = ["--data_dir", folder / "train", "--val_data_dir", folder / "val", "--augment", "none"]
    classify(folder, tmp_path / "images", *images)
    _, model = classify(folder, tmp_path / "latents", "--latents", plain)
    assert model.classes == tiny.CLASSES
    names = ("train/loss", "train/grad_norm", "val/loss", "val/accuracy", "val/temperature")
    a, b = (logged(tmp_path / name / "run", *names) for name in ("images", "latents"))
    assert len(a["train/loss"]) == 6 and len(a["val/loss"]) == 2
    for name in names:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)


def test_classifier_measures_the_scale_from_the_cache(folder, plain, tmp_path):
    options = ["--dry-run", "--first_stage", folder / "autoencoder.ckpt"]
    assert classify(folder, tmp_path, "--latents", plain, *options) is None
    argv = ["--first_stage", str(folder / "autoencoder.ckpt"), "--latents", str(plain)]
    argv += ["--logdir", str(tmp_path), "--gpus", "0", "--iterations", "1", "--batch_size", "4"]
    argv += ["--classifier_width", "32", "--classifier_depth", "1", "--num_workers", "0"]
    argv += ["--classifier_channel_mult", "1,1"]
    _, model = classifier_train.train(parse(classifier_train.Options, argv))
    scale = LatentCache.read(plain).statistics["scale_factor"]
    assert float(model.scale_factor) == pytest.approx(scale, rel=1e-5)


def test_the_configuration_that_needs_no_tiles(folder, plain, tmp_path, monkeypatch, capsys):
    path = config(folder, tmp_path / "c.yaml")
    path.write_text(path.read_text().replace(str(folder / "train"), "${oc.env:HISTO_NOWHERE}"))
    monkeypatch.setenv("HISTO_LATENTS", str(plain))
    argv = ["--base", str(path), str(ROOT / "configs/data/latents.yaml"), "--dry-run"]
    main_py.train(parse(main_py.Options, argv))
    assert "24 training tiles, 12 validation tiles" in capsys.readouterr().out
    with pytest.raises(UserError, match="HISTO_NOWHERE"):
        main_py.train(parse(main_py.Options, ["--base", str(path), "--dry-run"]))


@pytest.mark.parametrize("kind", ["autoencoder", "decoder"])
def test_models_that_need_images_refuse_a_cache(folder, plain, tmp_path, kind):
    if kind == "decoder":
        params = {"autoencoder_ckpt": str(folder / "autoencoder.ckpt"), "aux_arch": "resnet10t"}
        model = {"target": "ldm.models.auxiliary.DecoderFinetune", "params": params}
    else:
        params = {"ddconfig": tiny.DDCONFIG, "embed_dim": 3}
        loss = {"disc_start": 0, "perceptual_weight": 0.0}
        params["lossconfig"] = {
            "target": "ldm.modules.losses.LPIPSWithDiscriminator",
            "params": loss,
        }
        model = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    path = config(folder, tmp_path / "c.yaml", model)
    with pytest.raises(UserError, match="holds no images, and .* trains on images"):
        train(path, tmp_path, "run", 1, f"data.params.latents={plain}")
    assert not (tmp_path / "run").exists()


# Refusals


def test_a_cache_of_another_autoencoder_is_refused(folder, tmp_path):
    options = ["--val_data", folder / "val", "--labelled"]
    other = cache(folder, tmp_path / "other", *options, r="other.ckpt")
    path = config(folder, tmp_path / "c.yaml")
    with pytest.raises(UserError, match="made by another autoencoder"):
        train(path, tmp_path, "run", 1, f"data.params.latents={other.root}")
    with pytest.raises(UserError, match="latents.?: .* made by another autoencoder"):
        classify(folder, tmp_path, "--latents", other.root)
    assert not (tmp_path / "run").exists()
    # The same latent space with another decoder is no other one.
    tuned = load_model(folder / "autoencoder.ckpt", "autoencoder")
    with torch.no_grad():
        tuned.net.decoder.conv_out.weight.mul_(1.5)
    ckpt = tiny.save(tuned, tmp_path / "tuned.ckpt")
    made = cache(folder, tmp_path / "tuned", *options, r=ckpt)
    train(path, tmp_path, "run", 1, f"data.params.latents={made.root}")


def test_unlabelled_caches_and_other_classes_are_refused(folder, plain, tmp_path):
    unlabelled = cache(folder, tmp_path / "u", "--val_fraction", 0.2)
    with pytest.raises(UserError, match="no labels"):
        classify(folder, tmp_path, "--latents", unlabelled.root)
    params = {"pretrained": str(folder / "diffusion.ckpt")}
    adapter = {"target": "ldm.models.label_adapter.LabelAdapter", "params": params}
    path = config(folder, tmp_path / "c.yaml", adapter)
    with pytest.raises(UserError, match="needs labelled tiles"):
        train(path, tmp_path, "run", 1, f"data.params.latents={unlabelled.root}")
    without = cache(folder, tmp_path / "w", "--labelled", "--val_fraction", 0)
    assert without.validation is None
    with pytest.raises(UserError, match="holds no validation tiles"):
        classify(folder, tmp_path, "--latents", without.root)

    # A run on other classes is not gone on with.
    classify(folder, tmp_path, "--latents", plain)
    renamed = shutil.copytree(folder / "train", tmp_path / "renamed")
    (renamed / "ADI").rename(renamed / "MUC")
    val = shutil.copytree(folder / "val", tmp_path / "renamed_val")
    (val / "ADI").rename(val / "MUC")
    other = cache(folder, tmp_path / "o", "--labelled", "--val_data", val, data=[renamed])
    with pytest.raises(UserError, match="was trained on the classes .*ADI.*, the data has .*MUC"):
        classify(folder, tmp_path, "--latents", other.root, "--iterations", 8)


@pytest.mark.parametrize("option", ["--data_dir", "--val_data_dir", "--augment"])
def test_a_classifier_takes_tiles_or_latents(folder, plain, tmp_path, option):
    value = "d4" if option == "--augment" else folder / "train"
    with pytest.raises(UserError, match=f"{option}: "):
        classify(folder, tmp_path, "--latents", plain, option, value)


def damage(path: Path, how: str) -> str:
    """Damage a cache; what the message must say."""
    shard = path / "train" / "000001.safetensors"
    content = shard.read_bytes()
    if how == "missing":
        shard.unlink()
        return "000001.safetensors is missing"
    if how == "short":
        shard.write_bytes(content[:-100])
        return "000001.safetensors is damaged"
    if how == "empty":
        shard.write_bytes(b"")
        return r"000001.safetensors is damaged \(0 bytes\)"
    if how == "shape":
        arrays = load_file(shard)
        save_file({**arrays, "moments": arrays["moments"][:-1]}, shard)
        return "000001.safetensors is damaged .its moments are F32"
    if how == "table":
        (path / "train.parquet").write_bytes(b"PAR1")
        return "train.parquet is damaged"
    if how == "page":  # what the end of the file says of its pages does not fit
        table = path / "train.parquet"
        table.write_bytes(b"\xff\xfe\x00" + table.read_bytes())
        return "train.parquet is damaged"
    if how == "manifest":
        (path / "manifest.json").write_text("{")
        return "manifest.json is damaged"
    if how == "unfinished":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
        return "is unfinished; run scripts/cache_latents.py again"
    assert how == "none"
    (path / "manifest.json").unlink()
    return "holds no manifest.json"


@pytest.mark.parametrize(
    "how", ["missing", "short", "empty", "shape", "table", "page", "manifest", "unfinished", "none"]
)
def test_damage_is_found_at_the_start(plain, tmp_path, how):
    copy = shutil.copytree(plain, tmp_path / "c")
    message = damage(copy, how)
    with pytest.raises(UserError, match=message) as error:
        DataModuleFromConfig(4, latents=str(copy)).setup()
    assert "\n" not in str(error.value)


def test_a_changed_byte_is_found_when_it_is_read(plain, tmp_path):
    """Also within a loader process, whose traceback a command leaves out."""
    copy = shutil.copytree(plain, tmp_path / "c")
    shard = copy / "train" / "000002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    data = LatentCache.read(copy).train
    with pytest.raises(UserError, match=r"000002.safetensors is damaged \(checksum of .*png\)"):
        [data[i] for i in range(len(data))]
    loader = DataModuleFromConfig(4, latents=str(copy), num_workers=1).train_dataloader()
    with pytest.raises(UserError) as error:
        list(loader)
    line = _one_line(error.value)
    assert line.startswith(str(shard)) and "is damaged (checksum" in line and "\n" not in line


# Making it


def test_killed_caching_goes_on(folder, tmp_path):
    """What is finished stays as it is; the result is that of a run in one go."""
    options = ["--labelled", "--val_data", folder / "val", "--shard_tiles", 4]
    whole = cache(folder, tmp_path / "whole", *options)
    out = tmp_path / "parts"
    torn = tmp_path / "torn"
    shutil.copytree(folder / "train", torn)
    victim = sorted((torn / "LYM").iterdir())[4]  # tile 12 of 24, in the fourth file
    content = victim.read_bytes()

    # A process that dies in the middle leaves what it has finished and no part of a file.
    with pytest.MonkeyPatch.context() as patch:
        from ldm.data import caching

        write, written = caching._write_shard, []

        def dying(shards, number, *more):
            if len(written) == 3:
                raise KeyboardInterrupt
            write(shards, number, *more)
            written.append(shards.path(number))

        patch.setattr(caching, "_write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            cache(folder, out, *options, data=[torn])
    times = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.safetensors"))}
    assert sorted(times) == sorted(written) and len(times) == 3
    with pytest.raises(UserError, match="is unfinished"):
        LatentCache.read(out)

    # A tile that went bad meanwhile is named; put back, the same command goes on.
    victim.write_bytes(content[:60])
    with pytest.raises(UserError, match=victim.name):
        cache(folder, out, *options, data=[torn])
    victim.write_bytes(content)
    made = cache(folder, out, *options, data=[torn])
    for path, time in times.items():
        assert path.stat().st_mtime_ns == time
    assert made.statistics == whole.statistics
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        other = out / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()
    assert [p for p in out.rglob(".*")] == []


@pytest.mark.parametrize("writes", [0, 1, 2, 4, "last"])
def test_caching_that_was_killed_while_it_wrote_goes_on(folder, plain, tmp_path, writes):
    """kill -9 leaves half a file under another name: it must not be in the way, nor stay."""
    options = ["--val_data", folder / "val", "--labelled", "--dtype", "float32"]
    options += ["--shard_tiles", 5]
    files = len([path for path in plain.rglob("*") if path.is_file()])
    replace, written = os.replace, []

    class Killed(BaseException):
        pass

    def dying(source, target):
        if len(written) == (files if writes == "last" else writes):
            half = Path(source).read_bytes()[:9]
            # The names of this version and of an earlier one.
            for ending in ("0123456789abcdef.part", "a8b_c9de"):
                Path(target).with_name(f".{Path(target).name}.{ending}").write_bytes(half)
            raise Killed
        replace(source, target)
        written.append(target)

    out = tmp_path / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            cache(folder, out, *options)
    assert len(list(out.rglob(".*"))) == 2
    cache(folder, out, *options)
    assert list(out.rglob(".*")) == []
    for path in plain.rglob("*.safetensors"):
        assert (out / path.relative_to(plain)).read_bytes() == path.read_bytes()


def test_a_deleted_file_is_made_again(folder, plain, tmp_path, capsys):
    copy = shutil.copytree(plain, tmp_path / "c")
    shard = copy / "train" / "000002.safetensors"
    shard.write_bytes(b"x" * 20)
    options = ["--val_data", folder / "val", "--labelled", "--dtype", "float32"]
    options += ["--shard_tiles", 5]
    with pytest.raises(UserError, match="000002.safetensors is damaged .* delete it and run"):
        cache(folder, copy, *options)
    shard.unlink()
    cache(folder, copy, *options)
    assert shard.read_bytes() == (plain / "train" / "000002.safetensors").read_bytes()
    assert capsys.readouterr().out.startswith("5 latents")
    cache(folder, copy, *options)
    assert capsys.readouterr().out.startswith("nothing to do")


def test_processes_share_the_files(folder, plain, tmp_path):
    """The second of two makes every second file, as one process would have made it."""
    node = yaml.safe_load(config(folder, tmp_path / "c.yaml").read_text())["data"]
    net = load_model(folder / "autoencoder.ckpt", "autoencoder").net
    out = tmp_path / "c"
    plan = CachePlan(
        out,
        net,
        instantiate_from_config(node),
        dtype="float32",
        shard_tiles=5,
    )
    make_cache(plan, torch.device("cpu"), Ranks(1, 2), workers=0)
    made = sorted(path.relative_to(out) for path in out.rglob("*.safetensors"))
    assert made == sorted(path.relative_to(plain) for path in plain.rglob("*.safetensors"))[1::2]
    assert all((out / path).read_bytes() == (plain / path).read_bytes() for path in made)
    assert not (out / "manifest.json").exists(), "the first one writes it"


@pytest.mark.slow
def test_two_processes_make_the_same_files(folder, plain, tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, ROOT / "scripts" / "cache_latents.py", "--out", out]
    command += ["-r", folder / "diffusion.ckpt", "--data", folder / "train", "--shard_tiles", 5]
    command += ["--val_data", folder / "val", "--labelled", "--dtype", "float32"]
    command += ["--device", "cpu", "--devices", 2, "--num_workers", 0]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("36 latents")
    names = sorted(path.relative_to(plain) for path in plain.rglob("*.safetensors"))
    assert len(names) == 8
    for name in names:
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert LatentCache.read(out).statistics == LatentCache.read(plain).statistics


def test_dry_run_says_what_it_takes_and_writes_nothing(folder, tmp_path, capsys):
    options = ["--labelled", "--augment", "d4", "--views", "4", "--val_fraction", "0.25"]
    argv = ["-r", str(folder / "autoencoder.ckpt"), "--data", str(folder / "train")]
    cache_latents.main([*argv, "--out", str(tmp_path / "c"), "--dry-run", *options])
    text = capsys.readouterr().out
    assert "train        18 tiles x 4 views (augmented: d4)" in text
    assert "validation   6 tiles x 1 views" in text and "3x16x16" in text
    # (18 x 4 + 6) views of 2 x 3 x 16 x 16 numbers of 2 bytes, two sums and a checksum.
    assert f"{78 * (3072 + 20) / 2**20:.2f} MiB" in text
    assert not (tmp_path / "c").exists()


def test_too_little_disk_is_found_before(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.files.free_space", lambda _: 1000)
    with pytest.raises(UserError, match=r"needs 0\.1 MB, its disk has 0\.0 MB free"):
        cache(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_yaml_files_say_what_is_cached(folder, tmp_path, monkeypatch):
    """The data section as training would build it, without the rest of what training needs."""
    path = config(folder, tmp_path / "c.yaml", augment=["d4"], cache=True)
    text = path.read_text().replace(str(folder / "autoencoder.ckpt"), "${oc.env:HISTO_NOWHERE}")
    path.write_text(text.replace(str(folder / "train"), "${oc.env:HISTO_TILES}"))
    monkeypatch.setenv("HISTO_TILES", str(folder / "train"))
    options = ["--views", 2, "data.params.validation=null", "data.params.val_fraction=0.25"]
    made = cache(folder, tmp_path / "c", *options, data=[path])
    node = yaml.safe_load(config(folder, tmp_path / "d.yaml", augment=["d4"]).read_text())["data"]
    node["params"] |= {"validation": None, "val_fraction": 0.25, "seed": 23}
    data = instantiate_from_config(node)
    assert made.train.relative_paths == data.train_dataset.relative_paths
    assert made.validation.relative_paths == data.val_dataset.relative_paths
    assert made.train.shards.views == 2 and made.settings["splits"]["train"]["augment"] == ["d4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views", 2], "no augmentation, so all views are alike"),
        (["--views", 9, "--augment", "d4"], r"augment=\[d4\] has 8 views"),
        (["--augment", "d4"], "--augment d4 needs --views above 1"),
        (["--val_data", "VAL", "--val_fraction", 0.1], "leave it out with --val_data"),
        (["data.params.seed=1"], "overrides go with YAML files"),
        (["--val_data", "/nowhere"], "--val_data: /nowhere does not exist"),
    ],
)
def test_bad_options(folder, tmp_path, options, message):
    options = [folder / "val" if word == "VAL" else word for word in options]
    with pytest.raises(UserError, match=message):
        cache(folder, tmp_path / "c", *options)
    assert not (tmp_path / "c").exists()


def test_bad_data(folder, plain, tmp_path):
    path = config(folder, tmp_path / "c.yaml")
    out = tmp_path / "c"
    with pytest.raises(UserError, match="not both"):
        cache(folder, out, data=["train", path])
    with pytest.raises(UserError, match="labelled.? goes with folders"):
        cache(folder, out, "--labelled", data=[path])
    with pytest.raises(UserError, match=r"train has tiles of size=16, the autoencoder works on 32"):
        cache(folder, out, "data.params.train.params.size=16", data=[path])
    with pytest.raises(UserError, match="holds a model of kind classifier"):
        cache(folder, out, r="classifier.ckpt")
    with pytest.raises(UserError, match="other settings .dtype float32 there, float16 now.;"):
        cache(folder, plain, "--val_data", folder / "val", "--labelled", "--shard_tiles", 5)
    options = ["--val_data", folder / "val", "--labelled", "--shard_tiles", 5]
    with pytest.raises(UserError, match="other settings .autoencoder "):
        cache(folder, plain, *options, "--dtype", "float32", r="other.ckpt")
    with pytest.raises(UserError, match="splits.train.tiles 24 there, 12 now"):
        cache(folder, plain, *options, "--dtype", "float32", data=["val"])
    with pytest.raises(UserError, match="exists and was not made by this command"):
        cache(folder, folder / "val")
    (path := tmp_path / "model.yaml").write_text("model: {target: x}\n")
    with pytest.raises(UserError, match="no section data"):
        cache(folder, out, data=[path])
    assert not out.exists()


def test_values_that_float16_cannot_hold_are_refused(folder, tmp_path):
    large = load_model(folder / "autoencoder.ckpt", "autoencoder")
    with torch.no_grad():
        large.net.quant_conv.weight.mul_(1e7)
    ckpt = tiny.save(large, tmp_path / "large.ckpt")
    with pytest.raises(UserError, match="which float16 cannot hold; use dtype=float32"):
        cache(folder, tmp_path / "c", r=ckpt)


def test_bf16_on_a_cpu(folder, plain, tmp_path):
    """Encoding and training in bf16 give nearly the same latents, and losses."""
    options = ["--val_data", folder / "val", "--labelled", "--precision", "bf16"]
    made = cache(folder, tmp_path / "c", *options)
    full = LatentCache.read(plain)
    a, b = (torch.stack([c.train[i]["moments"][:3] for i in range(24)]) for c in (made, full))
    assert 0 < (a - b).abs().mean() < 0.03 * b.abs().mean()
    path = config(folder, tmp_path / "c.yaml")
    more = [f"data.params.latents={made.root}", "lightning.callbacks.image_logger=null"]
    train(path, tmp_path, "run", 2, *more, "--precision", "bf16-mixed")
    train(path, tmp_path, "full", 2, *more)
    a, b = (logged(tmp_path / n, "train/loss_simple")["train/loss_simple"] for n in ("run", "full"))
    np.testing.assert_allclose(a, b, rtol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_nearly_the_same_latents(folder, plain, tmp_path):
    options = ["--val_data", folder / "val", "--labelled", "--dtype", "float32"]
    exact = cache(folder, tmp_path / "32", *options, "--device", "cuda", "--precision", "32")
    fast = cache(
        folder, tmp_path / "16", *options, "--device", "cuda", "--precision", "bf16",
        "--channels_last", "--num_workers", 2,
    )  # fmt: skip
    full = LatentCache.read(plain)
    a, b, c = (torch.stack([x.train[i]["moments"][:3] for i in range(24)]) for x in
               (exact, fast, full))  # fmt: skip
    # TF32 has 10 bits, bf16 has 8.
    assert (a - c).abs().mean() < 0.005 * c.abs().mean()
    assert (b - c).abs().mean() < 0.03 * c.abs().mean()
