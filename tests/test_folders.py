"""What a command may write where: classes named by files of others, folders inside its inputs."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import tiny
import torch

import eval as evaluate
import main as main_py
import sample_diffusion
from ldm.checkpoint import KEY, load_model, read_checkpoint, write_checkpoint
from ldm.data.index import CorpusIndex, index_table
from ldm.data.latents import MANIFEST, VERSION, LatentCache
from ldm.data.shards import write_tar
from ldm.data.storage import LAYOUTS
from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.features.sets import FeatureSet
from ldm.files import require_class_names
from ldm.selection.judge import read_judged
from scripts import (
    cache_latents,
    copy_check,
    distance,
    fidelity,
    guidance_sweep,
    import_checkpoint,
    index_corpus,
    make_subset,
    vis,
    write_shards,
)

ESCAPE = "../ESC"

# --- Names of classes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ADI", "0", "Bile-duct", "G3 (tumour)", "腺癌", "a.b", "~", "a:b"]
)
def test_names_that_a_folder_may_have(name, tmp_path):
    require_class_names([name, "other"], "here")
    (tmp_path / name).mkdir()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ESCAPE,
        ".hidden",
        "/tmp",
        "a/b",
        "a\\b",
        "a\nb",
        "a\0b",
        "\x1b",
        "\udc80",
        "x" * 201,
    ],
)
def test_names_that_no_folder_may_have(name):
    with pytest.raises(UserError, match="here: class name .* cannot name a folder") as caught:
        require_class_names(["ADI", name], "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, "AB", ["A", 1], {"A": 1}, ["A", "A"]])
def test_what_is_no_list_of_names(names):
    with pytest.raises(UserError, match="here: classes="):
        require_class_names(names, "here")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Models, labelled tiles, and an index of them."""
    folder = tiny.models(tmp_path_factory.mktemp("site"))
    for seed, name in enumerate(("train", "val", "fake")):
        tiny.tiles(folder / name, 2, seed)
    index_corpus.main([str(folder / "train"), "--out", str(folder / "train.parquet")])
    return folder


def of_checkpoint(site, folder):
    payload = read_checkpoint(site / "classifier.ckpt")
    payload[KEY]["classes"] = ["ADI", ESCAPE, "TUM"]
    write_checkpoint(folder / "c.ckpt", payload)
    load_model(folder / "c.ckpt", "classifier")


def of_import(site, folder):
    words = f"{site}/classifier.ckpt --kind classifier --autoencoder {site}/diffusion.ckpt"
    words += f" --out {folder}/c.ckpt --classes ADI,{ESCAPE},TUM"
    import_checkpoint.main(words.split())


def shard(folder, *members):
    with (folder / "s.tar").open("wb") as stream:
        write_tar(stream, [(name, content) for name, content in members])
    LAYOUTS["shards"].places(folder, "s.tar")


def of_label_file(site, folder):
    shard(folder, ("A/x.png", b"png"), ("A/x.cls", ESCAPE.encode()))


def of_tar_member(site, folder):
    shard(folder, ("A\\B/x.png", b"png"))


def of_array(site, folder):
    np.save(folder / "images.npy", np.zeros((1, 4, 4, 3), np.uint8))
    np.save(folder / "types.npy", np.array([ESCAPE]))
    LAYOUTS["array"].places(folder, "images.npy")


def of_index(site, folder):
    index = CorpusIndex.read(site / "train.parquet")
    rows = index.table.to_pylist()
    rows[0]["label"] = ESCAPE
    changed = CorpusIndex(folder / "i.parquet", "folder", [""], [{}], index_table(rows))
    changed.write()
    CorpusIndex.read(changed.path)


def of_cache(site, folder):
    settings = {"classes": ["ADI", ESCAPE], "splits": {}}
    manifest = {"version": VERSION, "complete": True, "settings": settings, "statistics": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    LatentCache.read(folder)


def of_features(site, folder):
    label = torch.zeros(1, dtype=torch.int64)
    FeatureSet(torch.ones(1, 2), label, ["x"], [ESCAPE], "n", "t").save(folder / "f.safetensors")
    FeatureSet.load(folder / "f.safetensors")


def of_folder(site, folder):
    tiny.tiles(folder / "D", 1)
    (folder / "D" / "ADI").rename(folder / "D" / "A\nB")
    TileFiles.below(folder / "D")


@pytest.mark.parametrize(
    "enter",
    [of_checkpoint, of_import, of_label_file, of_tar_member, of_array, of_index, of_cache]
    + [of_features, of_folder],
)
def test_a_class_that_leaves_its_folder_enters_nowhere(enter, site, tmp_path):
    with pytest.raises(UserError, match="class name .* cannot name a folder"):
        enter(site, tmp_path)


@pytest.mark.parametrize("name", ["A/../../x.png", "../x.png", "/etc/x.png"])
def test_members_and_tiles_that_leave_their_place(name, site, tmp_path):
    with pytest.raises(UserError, match="leaves the shard"):
        shard(tmp_path, (name, b"png"))
    index = CorpusIndex.read(site / "train.parquet")
    rows = index.table.to_pylist()
    rows[0]["path"] = name
    changed = CorpusIndex(tmp_path / "i.parquet", "folder", [""], [{}], index_table(rows))
    changed.write()
    with pytest.raises(UserError, match="x.png lies outside of its root"):
        CorpusIndex.read(changed.path)


def test_a_tar_of_a_folder_that_was_packed_from_within(tmp_path):
    """`tar cf s.tar .` names its members ./A/x.png; their class is A."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        entry = tarfile.TarInfo("./A/x.png")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"png"))
    (place,) = LAYOUTS["shards"].places(tmp_path, "s.tar")
    assert place.label == "A" and place.path == "s.tar/./A/x.png"


def test_nothing_is_written_beside_the_folder_of_samples(site, tmp_path):
    """A foreign checkpoint, then a foreign journal, in a folder that was passed on."""
    out = tmp_path / "deep" / "out"
    words = f"-r {site}/diffusion.ckpt --classifier {site}/classifier.ckpt -c 1 -n 1 --device cpu"
    sample_diffusion.main([*words.split(), "--out", str(out)])
    (journal,) = out.glob(".parts/*.jsonl")
    lines = journal.read_text().splitlines()
    row = json.loads(lines[1])["rows"][0]
    (tmp_path / "deep" / "ESC").mkdir()
    (tmp_path / "deep" / "ESC" / "000000.png").touch()
    for change in (
        {"class": ESCAPE, "file": f"{ESCAPE}/000000.png"},
        {"file": "../ESC/000000.png"},
    ):
        lines.append(json.dumps({"rows": [row | change], "guidance": []}))
    journal.write_text("\n".join(lines) + "\n")
    sample_diffusion.main([*words.split(), "--out", str(out), "--tar", "9"])
    assert "ESC" not in (out / "manifest.csv").read_text()
    with tarfile.open(out / "shard-000000.tar") as archive:
        assert not any("ESC" in name for name in archive.getnames())


def test_features_that_name_other_files_are_refused(site, tmp_path):
    """What they name is copied into a training folder."""
    torch.manual_seed(0)
    sets = {}
    for kind, name in (("real", "train"), ("synthetic", "fake")):
        files = TileFiles.below(site / name)
        values = torch.nn.functional.normalize(torch.rand(len(files), 4), dim=1)
        labels = torch.tensor(files.labels)
        sets[kind] = FeatureSet(values, labels, files.names, files.classes, "net", files.digest)
        sets[kind].save(tmp_path / f"features_{kind}.safetensors")
    assert len(read_judged(str(tmp_path), site / "fake").synthetic.files) == 6
    sets["synthetic"].files[0] = "ADI/../../../x.png"
    sets["synthetic"].save(tmp_path / "features_synthetic.safetensors")
    with pytest.raises(UserError, match="its images are not those of"):
        read_judged(str(tmp_path), site / "fake")


# --- Folders inside inputs -----------------------------------------------------------------------

REAL = "--real {s}/train --synthetic {s}/fake"
MODELS = "-r {s}/diffusion.ckpt --classifier {s}/classifier.ckpt"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (vis, f"{REAL} --weights {{s}}/classifier.ckpt --out {{s}}/fake/VIS"),
        (vis, f"{REAL} --weights {{s}}/classifier.ckpt --out {{s}}/train/ADI"),
        (distance, f"{REAL} --features {{s}} --out {{s}}/train/new"),
        (make_subset, "--data {s}/train --per_class 1 --out {s}/train/new"),
        (copy_check, "--synthetic {s}/fake --train {s}/train --holdout {s}/val --out {s}/fake/R"),
        (fidelity, "--real {s}/train --fake {s}/fake --out {s}/fake/ADI/f.json"),
        (guidance_sweep, f"{MODELS} --judge {{s}} --real {{s}}/val --out {{s}}/val/sweep"),
        (index_corpus, "{s}/train --out {s}/train/index.parquet"),
        (write_shards, "{s}/train.parquet --out {s}/train/shards"),
        (cache_latents, "-r {s}/autoencoder.ckpt --data {s}/train --out {s}/train/cache"),
        (sample_diffusion, f"{MODELS} --balance {{s}}/train --out {{s}}/train/new"),
        (evaluate, "--data_path {s} --subset train --logdir {s}/val/logs --device cpu"),
        (main_py, "-b {s}/c.yaml -t --name x --max_steps 1 --logdir {s}/train/logs"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_nothing_is_made_in_a_folder_of_tiles(module, words, site):
    data = {"target": "ldm.data.tiles.TileFolder"}
    data["params"] = {"root": str(site / "train"), "size": tiny.PIXELS}
    params = {"ddconfig": tiny.DDCONFIG, "embed_dim": 3}
    params["lossconfig"] = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": 0, "perceptual_weight": 0.0},
    }
    config = {
        "model": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "base_learning_rate": 1e-3,
            "params": params,
        },
        "data": {
            "target": "ldm.data.datamodule.DataModuleFromConfig",
            "params": {"batch_size": 2, "num_workers": 0, "train": data},
        },
    }
    (site / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
    before = sorted(site.rglob("*"))
    with pytest.raises(UserError, match=r"lies in .*; give a place outside it") as caught:
        module.main(words.format(s=site).split())
    assert "\n" not in str(caught.value) and sorted(site.rglob("*")) == before
