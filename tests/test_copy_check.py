"""The copy check: search, statistics, planted copies, the report, and removal from a selection.

Tiles are procedural; slides differ between training, held-out and new tiles.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm.checkpoint import write_checkpoint
from ldm.cli import parse
from ldm.copies.search import nearest
from ldm.copies.statistics import (
    alarm_threshold,
    authenticity,
    copying_test,
    fewest_held_out,
    mann_whitney_z,
)
from ldm.data.images import list_images, read_tile
from ldm.data.procedural import render_tile
from ldm.data.stain import jitter_stains
from ldm.errors import UserError
from ldm.features import pixels
from ldm.features.sets import FeatureSet
from ldm.files import write_png
from ldm.models.vit import TileClassifier
from scripts import copy_check

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("LYM", "STR", "TUM")
SIZE = 48


# Statistics


def test_mann_whitney_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    generator = np.random.default_rng(0)
    for ties in (False, True):
        a, b = generator.normal(0, 1, 30), generator.normal(0.5, 1, 45)
        if ties:
            a, b = a.round(), b.round()
        z = mann_whitney_z(a, b)
        theirs = stats.mannwhitneyu(a, b, use_continuity=False, method="asymptotic").pvalue
        assert 2 * stats.norm.sf(abs(z)) == pytest.approx(theirs, rel=1e-9)
        assert z < 0  # a is the smaller
        assert mann_whitney_z(b, a) == pytest.approx(-z)
    assert mann_whitney_z(np.ones(5), np.ones(7)) == 0


def test_c_t_by_hand():
    # Cell 0: all 10 synthetic distances below all 10 held-out ones, U = 0. Cell 1: the reverse, but
    # twice as many held-out tiles. Cell 2: too few synthetic tiles.
    z = 50 / np.sqrt(10 * 10 / 12 * 21)
    z_1 = 100 / np.sqrt(10 * 20 / 12 * 31)
    synthetic = np.concatenate([np.arange(10), np.arange(100, 110), [0.0]])
    held_out = np.concatenate([np.arange(20, 30), np.arange(50, 70), np.arange(10)])
    cells = np.repeat([0, 1, 2], [10, 10, 1])
    held_out_cells = np.repeat([0, 1, 2], [10, 20, 10])
    test = copying_test(synthetic, cells, held_out, held_out_cells)
    assert test.c_t == pytest.approx((-10 * z + 20 * z_1) / 30)
    assert (test.cells, test.left_out, test.weight) == (2, 1, 30 / 40)
    assert copying_test(synthetic, cells, held_out[:5], held_out_cells[:5]).c_t is None


def test_authenticity_by_hand():
    assert authenticity(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0, 4.0])) == 0.25


def test_threshold_keeps_its_rate():
    assert alarm_threshold(np.arange(1.0, 100.0), 0.01) == 1  # 99 values allow 1 in 100
    assert alarm_threshold(np.arange(1.0, 200.0), 0.02) == 4
    for level in (0.01, 0.005, 0.03, 0.05):
        count = fewest_held_out(level)
        assert alarm_threshold(np.arange(1.0, count + 1), level) == 1
        assert int(level * count) == 0  # one fewer would be too few
    generator = np.random.default_rng(0)
    below = [
        (values[1] < alarm_threshold(values[2:], 0.05)) for values in generator.random((4000, 61))
    ]
    # Exactly 3 / 60 by exchangeability; five standard errors of 4,000 draws.
    assert np.mean(below) == pytest.approx(0.05, abs=0.0175)
    with pytest.raises(UserError, match="equal training tiles"):
        alarm_threshold(np.zeros(99), 0.01)


# Pixels and search


def test_orientations_are_eight_and_can_be_undone():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    views = pixels.oriented(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    views = [view.permute(1, 2, 0).numpy() for view in views]
    assert len({view.tobytes() for view in views}) == len(pixels.ORIENTATIONS) == 8
    assert np.array_equal(views[1], np.rot90(image))
    assert np.array_equal(views[6], np.rot90(image, 2)[:, ::-1])
    for orientation, view in enumerate(views):
        assert np.array_equal(pixels.turned_back(view, orientation), image)


def vector(image: np.ndarray) -> np.ndarray:
    return pixels.pixel_vector(image)[0].astype(np.float64)


def test_pixel_vectors_do_not_see_stain_but_structure():
    image, other = (render_tile("TUM", i, SIZE, 0) for i in (0, 50))
    own = vector(image)
    assert own.shape == (3 * pixels.SIDE**2,)
    assert np.linalg.norm(own) == pytest.approx(1, abs=1e-3)
    for scale in ((0.85, 1.15, 1), (1.2, 1.2, 1.2)):
        assert own @ vector(jitter_stains(image, np.array(scale))) > 0.99
    tinted = (image * np.array([0.9, 1, 0.95])).astype(np.uint8)
    assert own @ vector(tinted) > 0.99
    assert own @ vector(other) < 0.6
    wide = np.concatenate([other[:, :10], image, other[:, :10]], axis=1)
    assert own @ vector(wide) > 0.9999  # its centre square


def unit(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def test_search_is_exact_for_any_block_size():
    queries, train = unit((23, 8, 12), 0), unit((57, 12), 1)
    distances = (queries.double()[:, :, None] - train.double()).norm(dim=-1)  # (23, 8, 57)
    best = distances.amin(dim=1)
    for blocks in ((64, 8192), (5, 7), (1, 57)):
        found = nearest(queries, train, 9, lambda rows: rows, blocks=blocks)
        assert torch.equal(found.index, best.argmin(dim=1))
        assert torch.allclose(found.distance, best.amin(dim=1), atol=1e-6)
        assert torch.allclose(found.scale, best.sort(dim=1).values[:, 8], atol=1e-6)
        rows = torch.arange(23)
        assert torch.equal(found.orientation, distances[rows, :, found.index].argmin(dim=1))


def test_search_leaves_out_the_own_group_and_finds_copies_at_zero():
    train = unit((30, 12), 0)
    train[7] = train[3]
    groups = torch.arange(30) // 10
    alone = nearest(train, train, 1, lambda rows: rows[:, None], torch.arange(30), torch.arange(30))
    assert alone.index[3] == 7 and alone.distance[3] == 0
    apart = nearest(train, train, 1, lambda rows: rows[:, None], groups, groups)
    assert (groups[apart.index] != groups).all()
    assert apart.distance.min() > 0.1
    # As many equal training tiles as make the scale: no division by zero, and still a copy.
    crowd = train[:1].expand(10, -1)
    assert nearest(train[:1], crowd, 10, lambda rows: rows[:, None]).relative.tolist() == [0]


def test_search_without_orientations_misses_a_turned_copy():
    """What the eight orientations are for."""
    train = unit((40, 3 * pixels.SIDE**2), 0)
    turned = pixels.oriented_vectors(train[5:6])[:, 6]  # half a turn and a flip
    assert nearest(turned, train, 2, lambda rows: rows[:, None]).distance > 1
    found = nearest(turned, train, 2, pixels.oriented_vectors)
    assert (found.index.item(), found.distance.item(), found.orientation.item()) == (5, 0, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_search_on_a_gpu_agrees_with_the_cpu():
    queries, train = unit((70, 8, 48), 0), unit((9000, 48), 1)
    here, there = (
        nearest(queries, train, 10, lambda rows: rows, device=device) for device in ("cpu", "cuda")
    )
    assert torch.equal(here.index, there.index)
    assert torch.allclose(here.distance, there.distance, atol=1e-5)
    assert torch.allclose(here.scale, there.scale, atol=1e-4)


# The command


def write_tiles(folder: Path, first: int, per_class: int, names=CLASSES) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(first, first + per_class):
            write_png(folder / name / f"slide{i // 5:04d}_{i}.png", render_tile(name, i, SIZE, 0))
    return folder


def jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=75)
    return np.array(Image.open(stream))


COPIES = {
    "exact": lambda image: image,
    "flipped": lambda image: image[:, ::-1],
    "turned": lambda image: np.rot90(image),
    "compressed": jpeg,
    "stained": lambda image: jitter_stains(image, np.array([0.88, 1.12, 1.0])),
}


def plant(train: Path, synthetic: Path, each: int = 4) -> set[str]:
    """Add copies of training tiles, `each` of every kind; their names."""
    tiles = [path for name in CLASSES for path in list_images(train / name)]
    tiles = [tiles[i] for i in np.linspace(3, len(tiles) - 4, each * len(COPIES)).astype(int)]
    names = set()
    for i, (kind, alter) in enumerate(list(COPIES.items()) * each):
        folder = synthetic / tiles[i].parent.name
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"copy_{kind}_{i}.png", np.ascontiguousarray(alter(read_tile(tiles[i]))))
        names.add(f"{folder.name}/copy_{kind}_{i}.png")
    return names


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Training, held-out and synthetic tiles, copies among these, background everywhere; a ViT."""
    root = tmp_path_factory.mktemp("copies")
    train = write_tiles(root / "D" / "train", 0, 50)
    holdout = write_tiles(root / "D" / "val", 1000, 40)
    synthetic = write_tiles(root / "synthetic", 2000, 20)
    plant(train, synthetic)
    write_tiles(synthetic, 3000, 3, ["BACK"])
    for folder in (train, holdout):
        write_tiles(folder, 0 if folder is train else 1000, 5, ["BACK"])
    # Copies of a training tile, but of nothing: glass.
    background = read_tile(train / "BACK" / "slide0000_0.png")
    write_png(synthetic / "BACK" / "copy.png", background)
    torch.manual_seed(0)
    net = TileClassifier("test_vit", 3, input_size=32, patch_size=8)
    net.classes = list(CLASSES)
    weights = root / "vit.ckpt"
    write_checkpoint(weights, tiny.vit_checkpoint(net))
    paths = {"root": root, "train": train, "holdout": holdout, "synthetic": synthetic}
    paths |= {"weights": weights, "report": root / "report"}
    run(paths, "--weights", str(weights), "--quantile", "0.02")
    return paths


def run(sets: dict[str, Path], *options: str, **changed: Path) -> Path:
    folders = {**sets, **changed}
    arguments = ["--device", "cpu", "--sheet", "3", *options]
    for name in ("synthetic", "train", "holdout"):
        arguments += [f"--{name}", str(folders[name])]
    copy_check.main([*arguments, "--out", str(folders["report"])])
    return folders["report"]


def rows_of(report: Path) -> dict[str, dict[str, str]]:
    with (report / "copies.csv").open(newline="") as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


def report_of(report: Path) -> dict:
    return json.loads((report / "report.json").read_text())


def test_all_planted_copies_are_found_and_hardly_anything_else(sets):
    rows = rows_of(sets["report"])
    assert len(rows) == 3 * 20 + 20 + 4
    copies = {name for name in rows if "copy_" in name}
    flagged = {name for name, row in rows.items() if row["flagged"] == "yes"}
    assert len(copies) == 20 and copies <= flagged
    # Two measures at a quantile of 0.02 expect 2.4 of 60, and tiles of one slide are alike.
    assert len(flagged - copies) <= 10
    by_pixels = {name for name, row in rows.items() if "pixels" in row["reason"]}
    assert copies <= by_pixels  # without the network, too
    tiles = [path.relative_to(sets["train"]).as_posix() for path in list_images(sets["train"])]
    for name in copies:
        row = rows[name]
        original = Path(row["pixels_train"])
        assert original.as_posix() in tiles
        assert original.parent.name == row["class"]
        assert float(row["pixels_percentile"]) < 1
        if name.split("_")[1] in ("exact", "flipped", "turned"):
            assert float(row["pixels_distance"]) < 1e-3  # averages round with the orientation
            assert float(row["features_distance"]) < 1e-3  # so do batches of other sizes
            assert row["features_train"] == row["pixels_train"]
        if "_exact" in name:
            same = (sets["train"] / original).read_bytes()
            assert (sets["synthetic"] / name).read_bytes() == same
    assert {row["pixels_orientation"] for name, row in rows.items() if "_turned" in name} == {"270"}


def test_variations_are_compared_with_their_own_sources(sets, tmp_path):
    """A variation near to its source is flagged for it, one made of noise has no source."""
    synthetic = tmp_path / "synthetic"
    shutil.copytree(sets["synthetic"], synthetic)
    before = rows_of(sets["report"])
    near = next(name for name, row in before.items() if "_turned" in name)
    far, unknown, plain = [
        name for name, row in before.items() if "copy_" not in name and row["structure"] == "yes"
    ][-3:]
    source = before[near]["pixels_train"]
    lines = ["class,file,source", f"X,{near},elsewhere/{source}", f"X,{far},{source}"]
    lines += [f"X,{unknown},none.png", f"X,{plain},"]
    (synthetic / "manifest.csv").write_text("\n".join(lines) + "\n")
    report = run(sets, "--quantile", "0.02", synthetic=synthetic, report=tmp_path / "report")
    rows = rows_of(report)
    assert rows[near]["source"] == f"elsewhere/{source}"
    assert float(rows[near]["source_distance"]) < 1e-3
    assert float(rows[far]["source_distance"]) > float(rows[far]["pixels_distance"])
    assert (rows[unknown]["source"], rows[unknown]["source_distance"]) == ("none.png", "")
    assert (rows[plain]["source"], rows[plain]["source_distance"]) == ("", "")
    numbers = report_of(report)["variations"]
    assert (numbers["tiles"], numbers["source_compared"]) == (3, 2)
    assert (numbers["source_is_nearest"], numbers["flagged_for_their_source"]) == (1, 1)
    assert "3 of the tiles are variations" in (report / "report.md").read_text()
    assert "variations" not in report_of(sets["report"])


def test_background_is_no_copy(sets):
    rows = rows_of(sets["report"])
    background = {name for name, row in rows.items() if row["structure"] == "no"}
    assert "BACK/copy.png" in background
    assert all(name.startswith("BACK/") for name in background)
    assert all(rows[name]["flagged"] == "no" for name in background)
    tiles = report_of(sets["report"])["tiles"]
    assert tiles["synthetic"] == {
        "folder": str(sets["synthetic"]),
        "compared": 84 - len(background),
        "without_structure": len(background),
    }


def test_report_has_numbers_with_settings_and_pictures(sets):
    report, out = report_of(sets["report"]), sets["report"]
    assert set(report["spaces"]) == {"pixels", "features"}
    flagged = report["flagged"]
    assert flagged["all"]["flagged"] == sum(flagged[name]["flagged"] for name in CLASSES)
    assert flagged["all"]["expected_by_chance"] == pytest.approx(0.02 * flagged["all"]["tiles"])
    space = report["spaces"]["pixels"]
    assert space["synthetic"]["all"]["authenticity"] < space["held_out"]["authenticity"]
    assert space["synthetic"]["all"]["closer_than_any_held_out"] >= 20
    assert report["settings"]["network"] and report["versions"]["torch"]
    words = (out / "report.md").read_text()
    assert f"{flagged['all']['flagged']} of {flagged['all']['tiles']} synthetic tiles" in words
    assert "## In features" in words
    for name in ("suspicious.png", "histogram.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 300
            picture.load()


def test_same_command_again_gives_the_same_files_from_the_cache(sets, monkeypatch):
    def files() -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in sets["report"].iterdir() if path.suffix}
        report = json.loads(found["report.json"])
        del report["revision"]  # of the checkout, where someone may be working
        return {**found, "report.json": report}

    before = files()
    assert len(before) == 5
    calls = []
    original = TileClassifier.forward_features
    monkeypatch.setattr(
        TileClassifier,
        "forward_features",
        lambda self, x: calls.append(len(x)) or original(self, x),
    )
    monkeypatch.setattr(pixels, "pixel_vector", None)
    run(sets, "--weights", str(sets["weights"]), "--quantile", "0.02")
    assert before == files()
    assert set(calls) <= {1}  # building a network tries one black image
    monkeypatch.undo()
    # A damaged cache is made anew.
    cache = sets["report"] / "cache" / "synthetic_pixels.safetensors"
    before = FeatureSet.load(cache).values.clone()  # loaded values are those of the file
    cache.write_bytes(cache.read_bytes()[:100])
    run(sets, "--weights", str(sets["weights"]), "--quantile", "0.02")
    assert torch.equal(FeatureSet.load(cache).values, before)


def test_directions(sets, tmp_path):
    """A generator that copies against one that makes new tiles: held-out ones of other slides."""
    numbers = {}
    new = write_tiles(tmp_path / "new", 5000, 25)
    copier = tmp_path / "copier"
    plant(sets["train"], copier, each=12)
    for folder in (new, copier):
        report = run(sets, synthetic=folder, report=tmp_path / f"{folder.name}_report")
        numbers[folder.name] = report_of(report)["spaces"]["pixels"]
        assert list(report_of(report)["spaces"]) == ["pixels"]
        assert "in pixels only" in (report / "report.md").read_text()
    honest, copies = (numbers[name]["synthetic"]["all"] for name in ("new", "copier"))
    assert abs(honest["c_t"]) < 3  # a standard normal, about
    assert copies["c_t"] < -8
    assert honest["authenticity"] > 0.7
    assert honest["authenticity"] == pytest.approx(
        numbers["new"]["held_out"]["authenticity"], abs=0.12
    )
    assert copies["authenticity"] < 0.05
    assert copies["flagged"] == copies["tiles"] == 60
    assert honest["flagged"] <= 5  # 1 expected of 75
    assert set(numbers["new"]["synthetic"]) == {"all", *CLASSES}


def test_unlabelled_folder_has_no_classes(sets, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in list_images(sets["synthetic"] / "TUM"):
        (flat / path.name).write_bytes(path.read_bytes())
    report = run(sets, synthetic=flat, report=tmp_path / "report")
    assert list(report_of(report)["flagged"]) == ["all"]
    assert {row["class"] for row in rows_of(report).values()} == {""}


def test_tiles_of_one_group_are_not_each_others_neighbours(sets, tmp_path):
    """Overlapping tiles of a slide hide how far a training tile is from the next patient's."""
    train = tmp_path / "train"
    for path in list_images(sets["train"])[::4]:
        group = path.relative_to(sets["train"]).as_posix().replace("/", "-").removesuffix(".png")
        (train / group).mkdir(parents=True)
        write_png(train / group / "a.png", read_tile(path))
        write_png(train / group / "b.png", jpeg(read_tile(path)))
    values = []
    for options in ((), ("--group_regex", "^(.*)/")):
        report = run(sets, *options, train=train, report=tmp_path / f"report{len(options)}")
        values.append(report_of(report)["spaces"]["pixels"]["held_out"]["authenticity"])
    assert values[0] > 0.95 > values[1]


# Removal


@pytest.fixture
def training_folder(sets, tmp_path) -> Path:
    """As scripts/distance.py makes it: two copies and a new tile used, a copy not used."""
    folder = tmp_path / "train5+fake"
    copies = sorted(name for name in rows_of(sets["report"]) if "copy_" in name)
    new = next(name for name in rows_of(sets["report"]) if rows_of(sets["report"])[name]
               ["flagged"] == "no" and name.startswith("TUM/"))  # fmt: skip
    decisions = {copies[0]: "accepted", copies[1]: "filled", copies[2]: "surplus", new: "accepted"}
    lines = ["class,file,decision,rank,reason"]
    counts = {
        name: {"accepted": 0, "filled": 0, "surplus": 0, "wanted": 5, "shortfall": 5}
        for name in CLASSES
    }
    for name, decision in decisions.items():
        label, file = name.split("/")
        lines.append(f"{label},{name},{decision},1,as tests have it")
        counts[label][decision] += 1
        counts[label]["shortfall"] -= decision == "accepted"
        if decision != "surplus":
            target = folder / label / f"synthetic_{file}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((sets["synthetic"] / name).read_bytes())
    (folder / "LYM").mkdir(exist_ok=True)
    (folder / "LYM" / "real.png").write_bytes(
        (sets["holdout"] / "LYM" / "slide0200_1000.png").read_bytes()
    )
    (folder / "selection.csv").write_text("\n".join(lines) + "\n")
    record = {"settings": {"selection": "distance"}, "counts": counts, "command": []}
    (folder / "selection.json").write_text(json.dumps(record))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_removal_makes_a_new_folder(sets, training_folder, tmp_path, capsys):
    before = files_of(training_folder)
    new = tmp_path / "checked"
    options = ("--remove", str(training_folder), "--removed_to", str(new))
    # The report of before is of other settings: it is made anew elsewhere.
    run(sets, *options, report=tmp_path / "report")
    assert "2 tiles removed" in capsys.readouterr().out
    assert files_of(training_folder) == before
    after = files_of(new)
    gone = {name for name in before if name not in after}
    assert len(gone) == 2 and all("synthetic_copy_" in name for name in gone)
    for name in set(after) - {"selection.csv", "selection.json"}:
        assert after[name] == before[name]
    with (new / "selection.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["decision"] for row in rows] == ["removed", "removed", "surplus", "accepted"]
    assert rows[0]["reason"].startswith("copy check: pixels: relative distance")
    record, old = (json.loads((f / "selection.json").read_text()) for f in (new, training_folder))
    label = rows[0]["class"]
    assert record["counts"][label]["removed"] == sum(
        row["class"] == label and row["decision"] == "removed" for row in rows
    )
    assert record["counts"][label]["accepted"] == old["counts"][label]["accepted"] - 1
    assert record["counts"][label]["shortfall"] == old["counts"][label]["shortfall"] + 1
    assert sum(row.get("filled") for row in record["counts"].values()) == 0
    assert record["settings"]["selection"] == "distance"
    assert record["settings"]["copy_check"]["quantile"] == 0.01
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checked", "report", "train5+fake"]

    run(sets, *options, report=tmp_path / "report")
    assert "there already" in capsys.readouterr().out
    assert files_of(new) == after
    with pytest.raises(UserError, match="removed_to=.* made with other settings"):
        run(sets, *options, "--quantile", "0.02", report=tmp_path / "report")


def test_removal_refuses_what_it_does_not_know(sets, training_folder, tmp_path):
    options = ("--removed_to", str(tmp_path / "new"), "--remove")
    tile = next(training_folder.rglob("synthetic_copy_*"))
    tile.write_bytes(next(training_folder.rglob("real.png")).read_bytes())
    with pytest.raises(UserError, match=f"{tile.name} is not .* of [-`]*synthetic`?"):
        run(sets, *options, str(training_folder), report=tmp_path / "report")
    with pytest.raises(UserError, match="no training folder of scripts/distance.py"):
        run(sets, *options, str(sets["root"] / "D"), report=tmp_path / "report")
    (training_folder / "selection.json").write_text("{")
    with pytest.raises(UserError, match="no training folder of scripts/distance.py"):
        run(sets, *options, str(training_folder), report=tmp_path / "report")
    assert not (tmp_path / "report").exists() and not (tmp_path / "new").exists()


# Bad input


def test_bad_folders(sets, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("synthetic", "train", "holdout"):
        with pytest.raises(UserError, match="no images"):
            run(sets, **{name: tmp_path / "empty", "report": tmp_path / "report"})
        with pytest.raises(UserError, match=f"{name}.*does not exist"):
            run(sets, **{name: tmp_path / "missing", "report": tmp_path / "report"})
    with pytest.raises(UserError, match="synthetic.? .*: lies in [-`]*train`?"):
        run(sets, synthetic=sets["train"], report=tmp_path / "report")
    with pytest.raises(UserError, match="holdout.? .*: lies in [-`]*train`?"):
        run(sets, train=sets["root"] / "D", report=tmp_path / "report")
    with pytest.raises(UserError, match="out.? .*: lies in [-`]*train`?"):
        run(sets, report=sets["train"] / "report")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out.? .* is a file"):
        run(sets, report=tmp_path / "file")
    assert not (tmp_path / "report").exists()


def test_held_out_tiles_of_the_training_set_are_refused_by_name(sets, tmp_path):
    holdout = write_tiles(tmp_path / "holdout", 7000, 2)
    known = sets["train"] / "TUM" / "slide0000_3.png"
    (holdout / "TUM" / "renamed.png").write_bytes(known.read_bytes())
    with pytest.raises(
        UserError, match=r"1 of its 7 tiles are in [-`]*train`? .*TUM/renamed.png = TUM/sl"
    ):
        run(sets, holdout=holdout, report=tmp_path / "report")
    (holdout / "TUM" / "renamed.png").unlink()
    with pytest.raises(UserError, match="6 tiles with structure, 99 are needed"):
        run(sets, holdout=holdout, report=tmp_path / "report")
    with pytest.raises(UserError, match="3 of its 3 groups are in [-`]*train`?"):
        run(
            sets,
            "--group_regex",
            "^([A-Z]+)/",
            holdout=holdout,
            report=tmp_path / "report",
        )


def test_unreadable_images_and_empty_pictures(sets, tmp_path):
    synthetic = write_tiles(tmp_path / "synthetic", 8000, 2)
    whole = (synthetic / "TUM" / "slide1600_8000.png").read_bytes()
    (synthetic / "TUM" / "slide1600_8000.png").write_bytes(whole[:200])
    with pytest.raises(UserError, match="slide1600_8000.png: unreadable or truncated"):
        run(sets, synthetic=synthetic, report=tmp_path / "report")
    blank = tmp_path / "blank"
    blank.mkdir()
    write_png(blank / "0.png", np.full((32, 32, 3), 240, np.uint8))
    with pytest.raises(UserError, match="synthetic.? .*no tile has any structure"):
        run(sets, synthetic=blank, report=tmp_path / "report")
    few = write_tiles(tmp_path / "few", 9000, 5)
    with pytest.raises(UserError, match="train.? .*15 tiles with structure in 15 groups"):
        run(sets, train=few, report=tmp_path / "report")


def test_a_mistake_is_one_line_and_exit_status_2(sets):
    command = [sys.executable, ROOT / "scripts" / "copy_check.py", "--synthetic", "nowhere"]
    command += ["--train", sets["train"], "--holdout", sets["holdout"], "--out", "report"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "copy_check.py: error: --synthetic: nowhere does not exist; check the path\n"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantile", "0"], "--quantile: 0 must be in"),
        (["--remove", "x"], "--remove and --removed_to belong together"),
        (["--pretrained_weights", "x"], "--pretrained_weights: belongs to --model"),
        (["--weights", "x", "--model", "y"], "not allowed with"),
        (["--sheet", "0"], "--sheet: 0 must be in"),
    ],
)
def test_bad_options(options, message):
    needed = ["--synthetic", "a", "--train", "b", "--holdout", "c", "--out", "d"]
    with pytest.raises(UserError, match=message):
        parse(copy_check.Options, [*needed, *options])
