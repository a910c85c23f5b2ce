"""Corpora: every storage gives the same tiles, weights are exact, and mistakes are named."""

import io
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from ldm.cli import parse
from ldm.commands import train as main_py
from ldm.config import load_configs, resolve, validate_config
from ldm.data import storage, tile_files, tiles
from ldm.data.corpora import Corpora
from ldm.data.datamodule import DataModuleFromConfig, ResumableSampler
from ldm.data.images import list_images
from ldm.data.scan import index_corpora
from ldm.data.tiles import TileFolder, to_uint8
from ldm.errors import UserError
from ldm.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16
LAYOUTS = {"files": "folder", "arrays": "array", "shards": "shards"}  # by folder


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> Path:
    """The same twelve tiles of four patients and two classes as files, arrays and shards."""
    root = tmp_path_factory.mktemp("stored")
    shards = {0: [], 1: []}
    for i in range(12):
        name = f"{'AB'[i % 2]}/p{i // 3}/{i:02d}"
        path = root / "files" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
        shards[i % 2].append({"__key__": name, "png": path.read_bytes(), "cls": "AB"[i % 2]})
    for number, samples in shards.items():
        (root / "shards").mkdir(exist_ok=True)
        with wds.TarWriter(str(root / "shards" / f"{number}.tar")) as writer:
            for sample in samples:
                writer.write(sample)
        (root / "arrays" / f"fold{number}").mkdir(parents=True)
        images = np.stack([picture(i) for i in range(number, 12, 2)])
        np.save(root / "arrays" / f"fold{number}" / "images.npy", images.astype(np.float64))
        np.save(root / "arrays" / f"fold{number}" / "types.npy", np.array(["AB"[number]] * 6))
    for name, layout in LAYOUTS.items():
        grouping = (lambda path: path.split("/")[-2]) if layout != "array" else None
        index_corpora([root / name], root / f"{name}.parquet", layout, grouping=grouping)
    return root


def node(stored: Path, name: str, indexed: bool = False, **settings) -> dict:
    index = {"index": str(stored / f"{name}.parquet")} if indexed else {}
    return {"root": str(stored / name), "layout": LAYOUTS[name], **index, **settings}


def several(stored: Path, **options) -> Corpora:
    """24 tiles: the files, and the shards with their index."""
    nodes = {"f": node(stored, "files"), "s": node(stored, "shards", indexed=True)}
    return Corpora(nodes, SIZE, **options)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_storage_gives_the_same_tiles(stored, name, indexed):
    data = Corpora({"x": node(stored, name, indexed)}, SIZE, labelled=True)
    images = {to_uint8(data[i]["image"]).tobytes(): data[i]["label"] for i in range(len(data))}
    assert images == {picture(i).tobytes(): i % 2 for i in range(12)}
    assert data.classes == ["A", "B"] and len(set(data.relative_paths)) == 12
    first = data[0]
    assert first["path"].startswith(str(stored / name)) and first["image"].dtype == torch.float32
    assert data.relative_paths[0].startswith("x/")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_index_knows_the_layout(stored, name):
    settings = node(stored, name, indexed=True)
    spared = {key: value for key, value in settings.items() if key != "layout"}
    data, expected = Corpora({"x": spared}, SIZE), Corpora({"x": settings}, SIZE)
    assert data.relative_paths == expected.relative_paths
    assert torch.equal(data[0]["image"], expected[0]["image"])


def test_shards_are_what_webdataset_reads(stored):
    urls = [str(path) for path in sorted((stored / "shards").glob("*.tar"))]
    theirs = {
        sample["__key__"]: (sample["png"], sample["cls"].decode())
        for sample in wds.WebDataset(urls, shardshuffle=False)
    }
    layout, root = storage.LAYOUTS["shards"], stored / "shards"
    ours = {
        place.path.split("/", 1)[1].removesuffix(".png"): (layout.content(root, place), place.label)
        for file in storage.find_files(root, layout)[0]
        for place in layout.places(root, file)
    }
    assert ours == theirs and len(ours) == 12


def test_corpora_are_joined_in_order(stored):
    data = several(stored)
    assert len(data) == data.pass_length() == 24 and set(data.labels) == {-1}
    assert [path[0] for path in data.relative_paths] == ["f"] * 12 + ["s"] * 12
    patients = [f"s/{path.split('/')[-2]}" for path in data.relative_paths[12:]]
    assert data.groups[12:] == patients
    assert data.groups[0] == data.relative_paths[0]  # nothing tells the group of these
    part = data.subset([20, 3])
    assert part.relative_paths == [data.relative_paths[i] for i in (20, 3)]
    assert torch.equal(part[0]["image"], data[20]["image"])
    assert torch.equal(part[1]["image"], data[3]["image"])
    assert np.array_equal(part.drawn(0, 0), [1, 0])  # by corpus, to be shuffled by the sampler


def test_an_index_spares_the_walk_and_the_headers(stored, monkeypatch):
    nodes = {name: node(stored, name, indexed=True) for name in LAYOUTS}

    def fail(*arguments):
        raise AssertionError("walked")

    monkeypatch.setattr(tiles, "find_files", fail)
    monkeypatch.setattr(tile_files, "list_images", fail)
    monkeypatch.setattr(tarfile, "open", fail)
    assert len(Corpora(nodes, SIZE)) == 36
    assert len(TileFolder(stored / "files", SIZE, index=stored / "files.parquet")) == 12
    with pytest.raises(AssertionError, match="walked"):
        TileFolder(stored / "files", SIZE)


# Weights


@pytest.mark.parametrize("weight", [0.05, 0.25, 0.5, 1, 1.5, 2, 3.3])
def test_a_pass_draws_by_weight_and_all_tiles_alike(stored, weight):
    data = Corpora({"x": node(stored, "files", weight=weight)}, SIZE)
    passes = [data.drawn(7, epoch) for epoch in range(24)]
    size = max(1, round(12 * weight))
    assert data.pass_length() == size and {len(drawn) for drawn in passes} == {size}
    for drawn in passes:
        counts = Counter(drawn.tolist())
        assert max(counts.values()) <= int(np.ceil(weight))
        if weight >= 1:
            assert min(counts[i] for i in range(12)) >= int(weight) - (weight % 1 > 0)
    drawn = np.concatenate(passes)
    for end in (size * 3, size * 7, size * 24):  # at any time, no tile is two draws ahead
        counts = np.bincount(drawn[:end], minlength=12)
        assert counts.max() - counts.min() <= 1


def test_weight_one_is_every_tile_once(stored):
    data = several(stored)
    assert all(np.array_equal(data.drawn(3, epoch), np.arange(24)) for epoch in range(3))


def test_draws_depend_on_seed_pass_and_name_only(stored):
    alone = Corpora({"x": node(stored, "files", weight=0.5)}, SIZE)
    other = Corpora({"y": node(stored, "files", weight=0.5)}, SIZE)
    both = Corpora({"s": node(stored, "shards"), "x": node(stored, "files", weight=0.5)}, SIZE)
    first = alone.drawn(0, 0)
    assert np.array_equal(first, alone.drawn(0, 0))
    assert np.array_equal(both.drawn(0, 0)[12:] - 12, first)
    # Six of twelve: each of these would be equal by chance once in 924 times.
    for drawn in (alone.drawn(1, 0), alone.drawn(0, 2), other.drawn(0, 0)):
        assert not np.array_equal(first, drawn)
    assert sorted([*first, *alone.drawn(0, 1)]) == list(range(12))


def test_ranks_share_a_weighted_pass_and_a_resumed_run_goes_on(stored):
    nodes = {"f": node(stored, "files", weight=2.5), "s": node(stored, "shards", weight=0.5)}
    data = Corpora(nodes, SIZE, augment=["d4", "stain"])
    whole = list(ResumableSampler(data, 4, 5))
    assert len(whole) == 36 and len(set(whole)) == 36  # a tile that comes twice has two seeds
    assert Counter(i for i, _ in whole if i >= 12).total() == 6
    ranks = [list(ResumableSampler(data, 4, 5, num_replicas=3, rank=rank)) for rank in range(3)]
    assert sorted(pair for rank in ranks for pair in rank) == sorted(whole)
    sampler = ResumableSampler(data, 4, 5)
    sampler.set_epoch(1)
    endless = whole + list(sampler)
    for position in (1, 4, 8, 9):
        window = list(ResumableSampler(data, 4, 5, position=lambda p=position: p))
        assert window == endless[4 * position :][:36]


# In the data module


def module(stored: Path, workers: int = 0, **params) -> DataModuleFromConfig:
    nodes = {"f": node(stored, "files"), "s": node(stored, "shards", indexed=True, weight=2)}
    train = {
        "target": "ldm.data.corpora.Corpora",
        "params": {"corpora": nodes, "size": 8, **params},
    }
    return DataModuleFromConfig(4, train=train, num_workers=workers, val_fraction=0.2)


def test_batches_do_not_depend_on_workers(stored):
    def batches(workers: int) -> torch.Tensor:
        data = module(stored, workers, augment=["d4", "stain"], crop="random")
        torch.manual_seed(workers)
        return torch.cat([batch["image"] for batch in data.train_dataloader()])

    assert torch.equal(batches(0), batches(2))


def test_a_pickled_corpus_reads_the_same(stored):
    data = several(stored)
    data[13]  # leaves a shard open
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[13]["image"], data[13]["image"])


def test_groups_of_an_index_are_held_out_together(stored):
    data = module(stored)
    train, held = data.train_dataset, data.val_dataset
    assert len(train) + len(held) == 24 and train.pass_length() > len(train)
    assert not {g for g in train.groups if g[0] == "s"} & {g for g in held.groups if g[0] == "s"}
    folder = {"target": "ldm.data.tiles.TileFolder"}
    folder["params"] = {"root": str(stored / "files"), "size": 8}
    folder["params"]["index"] = str(stored / "files.parquet")
    data = DataModuleFromConfig(4, train=folder, val_fraction=0.2)
    assert len(data.val_dataset) == 3 and len(set(data.val_dataset.groups)) == 1
    assert not set(data.val_dataset.groups) & set(data.train_dataset.groups)


# TileFolder with an index


def test_an_indexed_folder_is_the_walked_one(stored):
    for options in ({}, {"labelled": True}, {"labelled": True, "classes": ["B", "A"]}):
        walked = TileFolder(stored / "files", SIZE, **options)
        indexed = TileFolder(stored / "files", SIZE, index=stored / "files.parquet", **options)
        assert indexed.paths == walked.paths == [Path(path) for path in map(walked.path, range(12))]
        assert indexed.labels == walked.labels and indexed.classes == walked.classes
        assert indexed.relative_paths == walked.relative_paths
        assert walked.groups is None
        assert indexed.groups == [path.split("/")[1] for path in walked.relative_paths]


def test_an_index_leaves_bad_tiles_out(tmp_path):
    for name in ("A/0.png", "B/1.png", "loose.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(len(name))).save(tmp_path / "set" / name)
    Image.fromarray(picture(1)).save(tmp_path / "set" / "B" / "2.png")
    (tmp_path / "set" / "A" / "bad.png").write_text("hello")
    index = tmp_path / "index.parquet"
    index_corpora([tmp_path / "set"], index)
    data = TileFolder(tmp_path / "set", SIZE, labelled=True, index=index)
    # 0.png and 1.png hold the same picture.
    assert data.relative_paths == ["A/0.png", "B/2.png"] == data.groups
    Image.fromarray(picture(2)).save(tmp_path / "set" / "A" / "3.png")
    with pytest.raises(UserError, match=r"does not fit .*added.*3\.png"):
        TileFolder(tmp_path / "set", SIZE, index=index)


# Preprocessing and augmentation


def test_preprocessing_comes_first_and_resolution_may_be_kept(stored):
    centre = {"target": "albumentations.CenterCrop", "params": {"height": 8, "width": 8}}
    cut = several(stored, preprocess=[centre], resize=False)
    with pytest.raises(UserError, match="8 x 8 pixels are fewer than size=16"):
        cut[0]
    data = Corpora({"f": node(stored, "files")}, 8, preprocess=[centre])
    whole = Corpora({"f": node(stored, "files")}, SIZE)
    assert torch.equal(data[5]["image"], whole[5]["image"][:, 4:12, 4:12])
    kept = Corpora({"f": node(stored, "files")}, 8, crop="random", resize=False)
    windows = whole[5]["image"].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
    seen = set()
    for seed in range(5):
        image = kept[5, seed]["image"]
        seen |= {tuple(at.tolist()) for at in (windows == image).flatten(2).all(-1).nonzero()}
    assert len(seen) > 2  # each is a window of the tile, at several places


def test_augmentation_from_yaml_follows_the_seed(stored):
    rotate = {"target": "albumentations.Rotate", "params": {"limit": [10, 60], "p": 1.0}}
    jitter = {"target": "ldm.data.tiles.StainJitter", "params": {"strength": 0.5}}
    data = several(stored, augment=["d4", rotate, jitter])
    assert data.is_random and torch.equal(data[1, 3]["image"], data[1, 3]["image"])
    assert not torch.equal(data[1, 3]["image"], data[1, 4]["image"])
    plain = several(stored)
    assert not torch.equal(data[1, 3]["image"], plain[1]["image"])

    def change(strength: float) -> float:
        jitter = {"target": "ldm.data.tiles.StainJitter", "params": {"strength": strength}}
        data = several(stored, augment=[jitter])
        return sum(float((data[1, s]["image"] - plain[1]["image"]).abs().mean()) for s in range(8))

    assert change(0.5) > 3 * change(0.05) > 0


def a(target: str, **params) -> dict:
    return {"target": target, "params": params}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"augment": [a("albumentations.Rotate", limit="x")]}, "augment[0]: albumentations.Rotate"),
        ({"augment": ["d4", a("albumentations.Rotate", limt=1)]}, "did you mean limit?"),
        ({"augment": [a("albumentations.Rotat")]}, "unknown target albumentations.Rotat"),
        ({"augment": [a("os.system")]}, "give a mapping with target: albumentations.NAME"),
        ({"augment": [a("albumentations.Resize", height=4, width=4)]}, "must leave a tile of 16"),
        (
            {"augment": [a("albumentations.RandomCrop", height=99, width=9)]},
            "fails on a tile of 16",
        ),
        ({"augment": [a("albumentations.Compose", transforms=[])]}, "no single transform"),
        (
            {"augment": [a("ldm.data.tiles.StainJitter", strength=2)]},
            "StainJitter: params.strength: 2 must be",
        ),
        ({"augment": ["d5"]}, "augment=['d5']"),
        ({"preprocess": [a("albumentations.Rotate")]}, "Rotate may not come before the crop"),
        (
            {"preprocess": [a("albumentations.CenterCrop", height=8, width=8, p=0.5)]},
            "must not be random here",
        ),
        (
            {"preprocess": [a("albumentations.PadIfNeeded", min_height=20, position="random")]},
            "must not be random here",
        ),
        (
            {"preprocess": [a("albumentations.SmallestMaxSize", max_size=[20, 30])]},
            "must not be random here",
        ),
        ({"preprocess": [a("albumentations.CenterCrop", height=99, width=9)]}, "preprocess: Crop"),
    ],
)
def test_bad_transforms(stored, options, text):
    with pytest.raises(UserError) as error:
        several(stored, **options)[0]
    assert text in str(error.value) and "\n" not in str(error.value)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layout": "zip"}, "corpora.x.layout: 'zip' must be one of folder, array, shards"),
        ({"weight": -1}, "corpora.x.weight: -1 must be above 0"),
        ({"weight": 0}, "corpora.x.weight: 0"),
        ({"weight": float("nan")}, "corpora.x.weight: nan"),
        ({"weight": "2"}, "corpora.x.weight: '2'"),
        ({"root": None}, "corpora.x.root: None"),
        ({"root": []}, "corpora.x.root: []"),
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"root": "empty"}, "has no image files"),
        ({"root": "empty", "layout": "shards"}, "has no tar shards"),
        ({"wieght": 2}, "corpora.x.wieght: unknown name"),
        ({"index": "none.parquet"}, "none.parquet does not exist"),
        ({"index": "shards.parquet", "layout": "folder"}, "is of layout shards, not folder"),
        ({"index": "shards.parquet"}, "does not fit files"),
        ({"root": "arrays", "index": "files.parquet"}, "does not fit arrays"),
        ({"root": ["files", "files"], "index": "files.parquet"}, "is of 1 roots, not 2"),
        ({"root": "hollow", "layout": "shards"}, "corpus hollow: its tar shards hold no tiles"),
        ({"root": "corrupt", "layout": "shards"}, "cut.tar: not a complete tar file"),
        ({"root": "bad"}, "bad.png: unreadable or truncated image"),
    ],
)
def test_bad_corpora(stored, tmp_path, monkeypatch, settings, text):
    monkeypatch.chdir(tmp_path)
    for name in ("files", "arrays", "files.parquet", "shards.parquet"):
        Path(name).symlink_to(stored / name)
    Path("empty").mkdir()
    Path("corrupt").mkdir()
    Path("corrupt/cut.tar").write_bytes((stored / "shards" / "0.tar").read_bytes()[:3000])
    Path("hollow").mkdir()
    tarfile.open("hollow/x.tar", "w").close()
    Path("bad").mkdir()
    Path("bad/bad.png").write_text("hello")
    with pytest.raises(UserError) as error:
        Corpora({"x": {"root": "files", **settings}}, SIZE)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "options", "text"),
    [
        ({}, {}, "corpora: no corpus is given"),
        ({"x": None}, {}, "corpora: no corpus is given"),
        ({"x": "files"}, {}, "corpora.x='files' must be a mapping"),
        ({"x/y": {"root": "files"}}, {}, "without slashes"),
        ({"x": {"root": "files"}}, {"classes": ["A"]}, "classes need labelled=true"),
        (
            {"x": {"root": "files"}},
            {"labelled": True, "classes": ["A"]},
            "classes ['A', 'B'] differ from the classes ['A']",
        ),
        ({"x": {"root": "files/A/p0"}}, {"labelled": True}, "no class is known of x/00.png"),
    ],
)
def test_bad_settings(stored, monkeypatch, nodes, options, text):
    monkeypatch.chdir(stored)
    with pytest.raises(UserError) as error:
        Corpora(nodes, SIZE, **options)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_shrank_is_named(stored, tmp_path):
    whole = (stored / "shards" / "1.tar").read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.tar").write_bytes(whole)
    data = Corpora({"x": {"root": str(tmp_path / "set"), "layout": "shards"}}, SIZE, check=False)
    with (tmp_path / "set" / "x.tar").open("r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(UserError, match=r"x\.tar/B/.*the shard is cut short"):
        [data[i] for i in range(len(data))]


# Configurations


# Cached latents are for other models; tests/test_latents.py trains with them.
DATA_CONFIGS = sorted(
    path for path in (ROOT / "configs" / "data").glob("*.yaml") if path.stem != "latents"
)


def test_there_are_as_many_as_expected():
    assert len(DATA_CONFIGS) == 3


@pytest.fixture
def environment(stored, tmp_path, monkeypatch):
    for name in ("HISTO_VGH", "HISTO_TCGA_BRCA"):
        monkeypatch.setenv(name, str(stored / "files"))
    monkeypatch.setenv("HISTO_PANNUKE", str(stored / "arrays"))
    monkeypatch.setenv("HISTO_SHARDS", str(stored / "shards"))
    monkeypatch.setenv("HISTO_SHARDS_INDEX", str(stored / "shards.parquet"))
    monkeypatch.setenv("HISTO_DATA", str(tmp_path / "data"))
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i, path in enumerate(list_images(stored / "files")[:4]):
            (tmp_path / "data" / split / f"{i}.png").symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("path", DATA_CONFIGS, ids=lambda path: path.stem)
def test_data_configs_go_over_a_training_configuration_and_train(path, environment):
    base = ROOT / "configs" / "autoencoder" / "autoencoder_histo_kl_64x64x3.yaml"
    validate_config(resolve(load_configs([base, path])))
    argv = ["--base", str(ROOT / "configs" / "demo" / "autoencoder.yaml"), str(path), "-t"]
    argv += ["--logdir", str(environment), "--name", "run", "--max_steps", "1"]
    argv += ["data.params.train.params.size=48", "data.params.batch_size=2"]
    argv += ["lightning.trainer.limit_val_batches=0", "lightning.callbacks.image_logger=null"]
    argv += ["lightning.trainer.enable_progress_bar=false", "model.params.monitor=null"]
    main_py.train(parse(main_py.Options, argv))
    run = RunFolder(environment / "run")
    assert run.last.is_file()
    params = load_configs([run.configs / "resolved.yaml"]).data.params.train.params
    assert "root" not in params or path.stem == "augmentation"


def test_a_corpus_is_left_out_by_an_override(environment):
    override = "data.params.train.params.corpora.pannuke=null"
    config = resolve(load_configs([ROOT / "configs" / "data" / "pretraining.yaml"], [override]))
    data = Corpora(**config["data"]["params"]["train"]["params"])
    assert len(data) == 24 and {path.split("/")[0] for path in data.relative_paths} == {
        "vgh",
        "tcga_brca",
    }


def test_shards_read_back_what_was_encoded_in_any_format(tmp_path):
    samples = {"a.webp": ("WEBP", {"lossless": True, "exact": True}), "b.tif": ("TIFF", {})}
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "x.tar", "w") as archive:
        for i, (name, (kind, options)) in enumerate(samples.items()):
            stream = io.BytesIO()
            Image.fromarray(picture(i)).save(stream, format=kind, **options)
            info = tarfile.TarInfo(name)
            info.size = stream.tell()
            stream.seek(0)
            archive.addfile(info, stream)
    data = Corpora({"x": {"root": str(tmp_path / "set"), "layout": "shards"}}, SIZE)
    assert [np.array_equal(to_uint8(data[i]["image"]), picture(i)) for i in range(2)] == [True] * 2
