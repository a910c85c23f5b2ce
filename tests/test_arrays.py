"""Data sets as they are published, one file of arrays: read row by row, with their labels."""

import csv
import importlib
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import classifier_train
from ldm.checkpoint import write_checkpoint
from ldm.data import arrays
from ldm.data.arrays import open_arrays
from ldm.data.corpora import Corpora
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.images import read_tile
from ldm.data.index import CorpusIndex
from ldm.data.subset import Amount, Subset
from ldm.data.tile_files import TileFiles
from ldm.data.tiles import TileFolder, to_uint8
from ldm.errors import UserError
from ldm.models.vit import TileClassifier
from ldm.run import RunFolder
from ldm.synthesis.request import balance
from scripts import index_corpus, write_shards

SIZE = 12
TRAIN, VAL = 30, 7


def pictures(count: int, first: int = 0) -> np.ndarray:
    """Tiles that compress, but not to nothing."""
    rows = [np.random.default_rng(first + i).integers(0, 40, (SIZE, SIZE, 3)) for i in range(count)]
    return np.array(rows, np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % 11


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The same tiles as MedMNIST, PatchCamelyon and PanNuke publish them."""
    root = tmp_path_factory.mktemp("published")
    parts = {"train": (pictures(TRAIN), labels(TRAIN)), "val": (pictures(VAL, 100), labels(VAL))}
    medmnist = {}
    for part, (images, classes) in parts.items():
        medmnist |= {f"{part}_images": images, f"{part}_labels": classes[:, None].astype(np.uint8)}
        for kind, array in (("x", images), ("y", classes.reshape(-1, 1, 1, 1))):
            path = root / "pcam" / f"level_2_{part}_{kind}.h5"
            path.parent.mkdir(exist_ok=True)
            with h5py.File(path, "w") as file:
                file.create_dataset(kind, data=array, chunks=(1, *array.shape[1:]))
        fold = root / "pannuke" / part
        fold.mkdir(parents=True)
        np.save(fold / "images.npy", images.astype(np.float64) * 6)
        np.save(fold / "types.npy", np.array([f"{c:02d}" for c in classes]))
    np.savez_compressed(root / "pathmnist.npz", **medmnist)
    np.savez(root / "stored.npz", **medmnist)
    with h5py.File(root / "nested.hdf5", "w") as file:
        file["x_train"], file["y_train"] = parts["train"]
    return root


@pytest.mark.parametrize(
    ("root", "scale"),
    [
        ("pathmnist.npz/train", 1),
        ("stored.npz/train", 1),
        ("pcam/level_2_train_x.h5", 1),
        ("nested.hdf5/train", 1),
        ("pannuke/train", 6),
        ("pannuke/train/images.npy", 6),
    ],
)
def test_labelled_sets(published, root, scale):
    """A part of a file, a file, or a folder of files, is a corpus and a labelled set."""
    root = published / root
    corpus = Corpora({"x": {"root": str(root), "layout": "array"}}, SIZE, labelled=True)
    sets = [corpus] if root.is_dir() else [corpus, TileFolder(root, SIZE, labelled=True)]
    for data in sets:
        assert len(data) == TRAIN and data.classes == [f"{i:02d}" for i in range(11)]
        assert data.labels == labels(TRAIN).tolist()
        for i in (0, TRAIN - 1, 3, 4):
            assert np.array_equal(to_uint8(data[i]["image"]), pictures(TRAIN)[i] * scale)
            assert data[i]["path"] == data.path(i) and data.path(i).startswith(str(root))


def test_all_parts_of_a_file_and_all_files_of_a_folder(published):
    data = TileFolder(published / "pathmnist.npz", SIZE)
    assert len(data) == TRAIN + VAL and data.relative_paths[TRAIN] == "val/000000"
    nodes = {"x": {"root": str(published / "pcam"), "layout": "array"}}
    assert Corpora(nodes, SIZE).relative_paths[0] == "x/level_2_train_x.h5/000000"
    for name in ("pathmnist.npz/{}", "pcam/level_2_{}_x.h5"):
        roots = [str(published / name.format(part)) for part in ("train", "val")]
        nodes = [{"root": root, "size": SIZE} for root in roots]
        nodes = [{"target": "ldm.data.tiles.TileFolder", "params": node} for node in nodes]
        data = DataModuleFromConfig(4, *nodes, num_workers=2)
        assert len(data.val_dataset) == VAL
        images = torch.cat([batch["image"] for batch in data.train_dataloader()])
        assert len({image.numpy().tobytes() for image in images}) == TRAIN - TRAIN % 4


def test_grey_tiles_and_masks_beside_tiles(tmp_path):
    images = pictures(3)
    np.savez_compressed(
        tmp_path / "x.npz", train_images=images[..., 0], train_masks=images[..., :1]
    )
    data = TileFolder(tmp_path / "x.npz", SIZE)
    assert len(data) == 3 and data.relative_paths[0] == "train/000000"
    assert np.array_equal(to_uint8(data[2]["image"]), np.stack([images[2, ..., 0]] * 3, axis=2))


def test_compressed_rows_are_read_in_any_order(tmp_path, monkeypatch):
    """From the nearest place whose state is known, and in memory for a few rows only."""
    monkeypatch.setattr(arrays, "CHUNK", 512)
    images = pictures(4000)
    np.savez_compressed(tmp_path / "x.npz", images=images)
    rows = open_arrays(tmp_path / "x.npz")[""].rows
    monkeypatch.setattr(rows, "_every", 1 << 16)
    order = np.random.default_rng(0).permutation(len(images))[:200].tolist()
    for i in [0, 1, 2, 3999, 3998, *order, 3999]:
        assert np.array_equal(rows[i], images[i])
    places = [at for at, *_ in rows._states]
    assert len(places) == len(set(places)) and images.nbytes / len(places) < 2 << 16


def test_index_and_shards(published, tmp_path):
    """The index of a part holds its labels, and its shards are the same labelled set."""
    root, out = published / "pathmnist.npz" / "train", tmp_path / "x.parquet"
    index_corpus.main([str(root), "--out", str(out), "--layout", "array"])
    index = CorpusIndex.read(out)
    assert len(index.tiles(0)["path"]) == TRAIN and index.tiles(0)["label"][3] == "03"
    write_shards.main([str(out), "--out", str(tmp_path / "shards")])
    shards = {"root": str(tmp_path / "shards"), "index": str(tmp_path / "shards.parquet")}
    data = Corpora({"x": shards}, SIZE, labelled=True)
    assert data.labels == labels(TRAIN).tolist()
    assert np.array_equal(to_uint8(data[5]["image"]), pictures(TRAIN)[5])
    moved = shutil.copy(published / "stored.npz", tmp_path / "pathmnist.npz")
    with pytest.raises(UserError, match=r"does not fit .*bytes instead of"):
        index.check([Path(moved) / "train"])


def damaged(path: Path) -> Path:
    """The middle of the file overwritten, its end kept."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 400] = os.urandom(400)
    path.write_bytes(content)
    return path


def make_mistakes(root: Path, published: Path) -> None:
    """Files that are no sets of tiles, each named for what is wrong with it."""
    images = pictures(3)
    np.savez(root / "masks.npz", train_masks=images[..., 0])
    np.savez(root / "pickled.npz", images=np.array([{}, None], dtype=object))
    np.savez(root / "many.npz", images=images, labels=np.zeros((3, 14), int))
    np.savez(root / "few.npz", images=images, labels=np.zeros(2, int))
    np.savez(root / "deep.npz", images=images.astype(np.uint16))
    (root / "text.npz").write_text("hello")
    (root / "text.h5").write_text("hello")
    shutil.copy(published / "pathmnist.npz", root / "cut.npz")
    damaged(root / "cut.npz")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("masks.npz", r"shape \(3, 12, 12\) of train_masks must be"),
        ("pickled.npz", "hold no tiles"),
        ("many.npz", r"labels, int64 \(3, 14\), must be a number or a name for each of 3 tiles"),
        ("few.npz", "labels"),
        ("deep.npz", r"uint16 values, more than 8 bits; .*white\.txt"),
        ("text.npz", "no complete file of arrays"),
        ("text.h5", "no complete file of arrays"),
        ("cut.npz", "cut.npz"),
        ("cut.npz/test", "has no part test, only train, val"),
    ],
)
def test_mistakes_are_named(published, tmp_path, name, text):
    make_mistakes(tmp_path, published)
    with pytest.raises(UserError, match=text) as error:
        TileFolder(tmp_path / name, SIZE, labelled=name != "deep.npz")
    assert "\n" not in str(error.value)


def test_damaged_labels_are_named(published, tmp_path):
    """In a file of their own beside the tiles, of both kinds."""
    for name, beside in (("level_2_val_x.h5", "level_2_val_y.h5"), ("images.npy", "types.npy")):
        source = published / ("pcam" if "h5" in name else "pannuke/val")
        shutil.copy(source / name, tmp_path)
        (tmp_path / beside).write_bytes((source / beside).read_bytes()[:90])
        with pytest.raises(UserError, match=f"{name}: no complete file of arrays"):
            TileFolder(tmp_path / name, SIZE, labelled=True)


VIT = "--arch test_vit --patch_size 16 --input-size 32 --epochs 1 --device cpu --num_workers 0"
CPU = "--device cpu --batch_size 8"
NETWORK = "--features {vit} " + CPU
COMMANDS = {
    "eval": VIT + " --lr 0.05 --data_path {data} --subset train --logdir {out} --seeds 0",
    "scripts.baselines": "--data_path {data} --subset train --logdir {out}"
    " --kind colour_histogram,colour_mean",
    "scripts.make_subset": "--data {data}/train --per_class 3 --out {out}/subset",
    "scripts.distance": "--real {data}/train --synthetic {data}/val --ratio 50 --workers 0"
    " --out {out}/selected " + NETWORK,
    "scripts.fidelity": "--real {data}/train --fake {data}/val --out {out}/f.json " + NETWORK,
    "scripts.copy_check": "--synthetic {data}/val --train {data}/train --holdout {data}/test"
    " --quantile 0.05 --out {out}/copies",
    "scripts.cache_latents": "--model {models}/autoencoder.ckpt --data {data}/train --labelled"
    " --val_data {data}/val --workers 0 --out {out}/cache " + CPU,
    "scripts.guidance_sweep": "--model {models}/diffusion.ckpt --real {data}/test --judge {vit}"
    " --classifier {models}/classifier.ckpt --scales 0,3 --steps 2 -n 8 --out {out}/sweep " + CPU,
    "sample_diffusion": "-r {models}/diffusion.ckpt --classifier {models}/classifier.ckpt"
    " --start_from {data}/train -n 2 -c 4 --out {out}/samples " + CPU,
    "scripts.vis": "--real {data}/train --synthetic {data}/val --umap_neighbors 3 --workers 0"
    " --out {out}/vis " + NETWORK,
}
OWN = {"seconds", "train_seconds", "images_per_second", "free", "cores", "threads", "size"}
OWN |= {"images_per_s", "made", "start_from_sha256"}


def numbers(value, key=""):
    """The numbers in nested containers by their keys, without times."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in pairs:
            if name not in OWN:
                yield from numbers(item, f"{key}.{name}")
    elif isinstance(value, int | float):
        yield key, float(f"{value:.12g}")  # sums of rows in another order


def made(folder: Path) -> dict:
    """What the files in a folder say, but for what names the set: texts, numbers and pixels."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = dict(numbers(json.loads(path.read_text())))
        elif path.suffix == ".csv":
            rows = csv.DictReader(path.read_text().splitlines())
            kept = [{k: v for k, v in row.items() if k not in OWN} for row in rows]
            found[name] = path.name == "metrics.csv" or kept  # with speeds
        elif path.suffix == ".safetensors":  # rows in the order of the set
            found[name] = {key: sorted(value.tolist()) for key, value in load_file(path).items()}
        elif path.suffix == ".png":
            found[name] = read_tile(path).tolist()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """The same labelled sets in x.npz, and in folders as its rows are named; and a network."""
    root = tmp_path_factory.mktemp("both")
    arrays = {}
    for seed, (part, count) in enumerate({"train": 8, "val": 4, "test": 8}.items()):
        tiny.tiles(root / "drawn" / part, count, seed)
        files = TileFiles.below(root / "drawn" / part)
        order = np.random.default_rng(seed).permutation(len(files))
        arrays[f"{part}_images"] = np.stack([read_tile(files.paths[i]) for i in order])
        arrays[f"{part}_labels"] = np.array([[files.labels[i]] for i in order])
        for row, i in enumerate(order):
            target = root / "folders" / part / str(files.labels[i]) / f"{row:06d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files.paths[i], target)
    np.savez_compressed(root / "x.npz", **arrays)
    net = TileClassifier("test_vit", 3, tiny.PIXELS, patch_size=16)
    net.classes = ["0", "1", "2"]
    write_checkpoint(root / "vit.ckpt", tiny.vit_checkpoint(net))
    model = tiny.diffusion(tiny.save(tiny.autoencoder(), root / "autoencoder.ckpt"))
    tiny.save(model, root / "diffusion.ckpt")
    tiny.save(tiny.classifier(model, net.classes), root / "classifier.ckpt")
    return root


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if c == "scripts.vis" else []) for c in COMMANDS],
)
def test_commands_make_of_arrays_what_they_make_of_folders(both, tmp_path, command):
    results = []
    for data in ("folders", "x.npz"):
        out = tmp_path / data
        words = COMMANDS[command].format(
            data=both / data, out=out, vit=both / "vit.ckpt", models=both
        )
        importlib.import_module(command).main(words.split())
        results.append(made(out))
    assert results[0] and results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert results[1][name] == expected, name


def test_tiles_of_arrays_are_balanced_and_start_samples(both):
    assert balance(both / "x.npz/train", ["0", "1", "2"], ["0", "1", "2"], 2)["1"] == 2
    files = TileFiles.below(both / "x.npz")
    assert files.names[0].startswith("0/test_")
    assert len(files) == 60 and len({*files.digests}) == 60 and len(files.stamp()) == 64
    held = Subset.plan(both / "x.npz/train", Amount(per_class=2), include=both / "folders/train")
    assert len(held.held) == 24


@pytest.mark.parametrize("name", ["x.npz/none", "x.npz/val/0/000099.png", "x.npz/val/0/y.png"])
def test_rows_that_are_not_there(both, name):
    with pytest.raises(UserError, match="has no part none|has 12 tiles|No such file"):
        read_tile(both / name) if name.endswith("png") else TileFiles.below(both / name)


def test_a_link_may_name_an_array(published, tmp_path):
    """So that eval.py finds train, val and test in files of any name."""
    (tmp_path / "val").symlink_to(published / "pcam" / "level_2_val_x.h5")
    assert TileFiles.below(tmp_path / "val").classes == [f"{i}" for i in range(VAL)]


def test_the_classifier_trains_on_a_part_of_a_file(published, tmp_path):
    autoencoder = tiny.save(tiny.autoencoder(), tmp_path / "autoencoder.ckpt")
    argv = ["--first_stage", autoencoder, "--logdir", tmp_path, "--name", "run", "--gpus", 0]
    for option, part in (("--data_dir", "train"), ("--val_data_dir", "val")):
        argv += [option, published / "pathmnist.npz" / part]
    argv += ["--batch_size", 8, "--num_workers", 0, "--iterations", 2]
    argv += ["--classifier_width", 32, "--classifier_depth", 1, "--classifier_channel_mult", "1,1"]
    with pytest.raises(UserError, match="classes of train .* and validation"):
        classifier_train.main([str(word) for word in argv])
    argv[argv.index("--val_data_dir") + 1] = published / "stored.npz" / "train"
    classifier_train.main([str(word) for word in argv])
    assert RunFolder(tmp_path / "run").last.is_file()
