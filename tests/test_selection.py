"""Selection: centroids, decisions, the random arm, training folders, and the two commands.

Tiles here are flat colours plus noise; the network is a small ViT with fixed random weights.
"""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import tiles as make_tiles

from ldm.checkpoint import write_checkpoint
from ldm.cli import run_command
from ldm.data.folders import PREFIX
from ldm.data.images import class_folders, list_images
from ldm.data.tile_files import TileFiles
from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.evaluation.sets import open_splits
from ldm.features.neighbours import centroid_distances
from ldm.features.sets import FeatureSet, cached_features, read_tensors
from ldm.features.source import parse_features
from ldm.features.weights import cached_weights
from ldm.files import lock_file
from ldm.models.vit import TileClassifier
from ldm.models.vit_settings import Settings
from ldm.selection.judge import Judged, read_judged
from ldm.selection.select import KINDS, USED, Selection, select, wanted_per_class
from ldm.selection.sheets import COLOURS, Sheets
from ldm.selection.strategies import at_random as by_chance
from ldm.selection.strategies import by_centroid
from scripts import distance, vis

ROOT = Path(__file__).resolve().parents[1]


# Centroids and decisions, by hand


def test_centroids_are_plain_means():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    real = FeatureSet(features, torch.tensor([0, 0, 1]), ["a", "b", "c"], CLASSES, "net", "tiles")
    # The mean of two unit vectors is shorter than one; it stays so.
    assert real.centroids.tolist() == [[0.5, 0.5], [pytest.approx(0.6), pytest.approx(0.8)]]


def test_class_without_images_has_no_centroid():
    with pytest.raises(UserError, match=r"\['B'\].*no images"):
        _ = on_a_line([("A/0", 1.0)]).centroids


def test_distance_is_the_mean_over_features():
    distances = centroid_distances(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    )
    assert distances.tolist() == [[0.5, 2.0]]  # (1 + 0) / 2 and (0 + 4) / 2


CLASSES = ["A", "B"]
CENTROIDS = torch.tensor([[0.0, 0.0], [4.0, 0.0]])


def on_a_line(rows: list[tuple[str, float]], classes=CLASSES, extractor="net", **more):
    """Images (class/name, x) on the line through the two centroids at 0 and 4."""
    features = FeatureSet(
        values=torch.tensor([[x, 0.0] for _, x in rows]),
        labels=torch.tensor([classes.index(file.split("/")[0]) for file, _ in rows]),
        files=[file for file, _ in rows],
        classes=list(classes),
        extractor=extractor,
        tiles="tiles",
        **more,
    )
    return features.in_order()


ROWS = [("A/far", 1.5), ("A/near", 0.5), ("A/wrong", 3.0), ("A/middle", 1.0), ("B/0", 4.5)]


def chosen(rows, wanted, make=by_centroid, fill=False) -> Selection:
    """Selection of images by `make(features, distances)`."""
    features = on_a_line(rows) if isinstance(rows, list) else rows
    distances = centroid_distances(features.values, CENTROIDS)
    return select(make(features, distances), features, distances.numpy(), wanted, fill)


def at_random(seed):
    return lambda features, distances: by_chance(features, seed)


def decided(selection) -> dict[str, tuple]:
    return dict(
        zip(selection.files, zip(selection.decisions, selection.ranks, strict=True), strict=True)
    )


def test_selection_by_hand():
    selection = chosen(ROWS, [2, 2])
    assert decided(selection) == {
        "A/near": ("accepted", 1),
        "A/middle": ("accepted", 2),
        "A/far": ("surplus", 3),
        "A/wrong": ("rejected", 0),
        "B/0": ("accepted", 1),
    }
    wrong = selection.files.index("A/wrong")
    assert selection.reasons[wrong] == "nearest centroid is B"
    assert selection.distances[wrong].tolist() == [4.5, 0.5]  # 9 / 2 and 1 / 2
    assert selection.scores[wrong] == -4.5
    assert selection.counts()["B"] == {
        "generated": 1,
        "rejected": 0,
        "surplus": 0,
        "accepted": 1,
        "wanted": 2,
        "shortfall": 1,  # reported, and not filled with what was rejected
        "filled": 0,
    }
    row = list(csv.DictReader(selection.to_csv().splitlines()))[wrong]
    assert row == {
        "class": "A", "file": "A/wrong", "decision": "rejected", "rank": "", "score": "-4.5",
        "nearest": "B", "own_distance": "4.5", "distance_A": "4.5", "distance_B": "0.5",
        "reason": "nearest centroid is B",
    }  # fmt: skip


def test_a_shortfall_is_filled_with_the_best_of_the_rejected():
    rows = [*ROWS, ("A/worse", 3.5), ("A/worst", 5.0)]
    selection = chosen(rows, [5, 1], fill=True)
    assert selection.used("A") == ["A/near", "A/middle", "A/far", "A/wrong", "A/worse"]
    assert [selection.ranks[i] for i in selection.of_class("A", "filled")] == [4, 5]
    filled = selection.reasons[selection.files.index("A/wrong")]
    assert filled == "fills a shortfall, though nearest centroid is B"
    assert decided(selection)["A/worst"] == ("rejected", 0)
    counts = selection.counts()["A"]
    assert (counts["accepted"], counts["shortfall"], counts["filled"]) == (3, 2, 2)
    assert sum(counts[kind] for kind in KINDS) == counts["generated"]
    # Only where candidates are too few.
    assert chosen(rows, [3, 1], fill=True).to_csv() == chosen(rows, [3, 1]).to_csv()


def test_order_of_images_does_not_matter():
    assert chosen(ROWS, [2, 2]).to_csv() == chosen(ROWS[::-1], [2, 2]).to_csv()
    by_chance = chosen(ROWS, [2, 1], at_random(3))
    assert by_chance.to_csv() == chosen(ROWS[::-1], [2, 1], at_random(3)).to_csv()


def test_equal_distances_rank_by_file_name():
    rows = [("A/2", 1.0), ("A/10", -1.0), ("A/1", 1.0)]
    selection = chosen(rows + [("B/0", 4.0)], [2, 1])
    assert selection.used("A") == ["A/1", "A/10"]


def test_image_between_two_centroids_is_rejected_for_either_class():
    selection = chosen([("A/0", 2.0), ("B/0", 2.0)], [1, 1])
    assert set(decided(selection).values()) == {("rejected", 0)}
    assert selection.reasons == ["another centroid is as near"] * 2


def test_random_arm():
    rows = [(f"{name}/{i}", float(i)) for name in CLASSES for i in range(40)]
    drawn = chosen(rows, [20, 20], at_random(0))
    assert drawn.used("A") == chosen(rows, [20, 20], at_random(0)).used("A")
    assert set(drawn.used("A")) != set(chosen(rows, [20, 20], at_random(1)).used("A"))
    # Classes are drawn independently.
    assert [f[2:] for f in drawn.used("A")] != [f[2:] for f in drawn.used("B")]
    assert drawn.used("A")[:5] == chosen(rows, [5, 5], at_random(0)).used("A")
    # Images that are nearer to another centroid take part: that is the point of a control.
    assert any(int(f[2:]) > 2 for f in drawn.used("A"))
    assert drawn.counts()["A"]["rejected"] == 0
    assert all(row["score"] == "" for row in csv.DictReader(drawn.to_csv().splitlines()))


def test_ratio_rounds_halves_up():
    assert wanted_per_class([10, 3, 1], 50) == [5, 2, 1]
    assert wanted_per_class([555], 300) == [1665]
    assert wanted_per_class([3, 200], 1) == [0, 2]
    with pytest.raises(UserError, match="ratio.? 10"):
        wanted_per_class([3, 4], 10)


def test_other_classes_or_networks_are_refused():
    real = on_a_line(ROWS)
    three = on_a_line(ROWS, ["A", "B", "C"])
    with pytest.raises(UserError, match=r"\['A', 'B', 'C'\].*\['A', 'B'\]"):
        Judged(real, three)
    with pytest.raises(UserError, match="different networks"):
        Judged(real, on_a_line(ROWS, extractor="other"))


# The commands


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Real and synthetic tiles, a ViT checkpoint, and what vis.py makes of them."""
    root = tmp_path_factory.mktemp("selection")
    torch.manual_seed(0)
    net = TileClassifier("vit_tiny", 3, input_size=32, patch_size=8)
    net.classes = ["ADI", "LYM", "TUM"]
    weights = root / "vit.ckpt"
    write_checkpoint(weights, tiny.vit_checkpoint(net))
    real = make_tiles(root / "D" / "train5", per_class=4, seed=0)
    fake = make_tiles(root / "fake", per_class=6, seed=1)
    # One image in the wrong folder, which has to be found out.
    (fake / "LYM" / "1_0.png").rename(fake / "TUM" / "1_wrong.png")
    out = root / "vis"
    command = ["--real", str(real), "--synthetic", str(fake), "--weights", str(weights)]
    threads = torch.get_num_threads()
    vis.main([*command, "--out", str(out), "--device", "cpu", "--num_workers", "0"])
    assert torch.get_num_threads() == threads  # numba would set it to the number of cores
    return {"root": root, "real": real, "fake": fake, "weights": weights, "vis": out}


def run_vis(folders, out: Path, *options: str) -> None:
    vis.main(
        ["--real", str(folders["real"]), "--synthetic", str(folders["fake"]), "--out", str(out)]
        + ["--weights", str(folders["weights"]), "--device", "cpu", *options]
    )


def run_distance(folders, out: Path, *options: str) -> None:
    distance.main(
        ["--real", str(folders["real"]), "--synthetic", str(folders["fake"]), "--out", str(out)]
        + ["--features", str(folders["vis"]), *options]
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_vis_writes_unit_features_centroids_and_picture(folders):
    out = folders["vis"]
    real = FeatureSet.load(out / "features_real.safetensors")
    assert real.values.shape == (12, 192)
    assert torch.allclose(real.values.norm(dim=1), torch.ones(12), atol=1e-6)
    assert real.classes == ["ADI", "LYM", "TUM"]
    assert real.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    centroids, facts = read_tensors(out / "centroids.safetensors", "histodiffusion centroids 1")
    assert torch.equal(centroids["centroids"][1], real.values[4:8].double().mean(0).float())
    assert (json.loads(facts["classes"]), facts["tiles"]) == (real.classes, real.tiles)
    rows = rows_of(out / "umap.csv")
    assert [row["set"] for row in rows] == ["real"] * 12 + ["synthetic"] * 18 + ["centroid"] * 3
    assert (out / "umap.png").read_bytes().startswith(b"\x89PNG")
    points = page_of(out / "umap.html")
    assert [p["kind"] for p in points] == [row["set"] for row in rows]
    assert [p["label"] for p in points] == [row["class"] for row in rows]
    # Every tile is in the page; centroids have none.
    assert [bool(p["picture"]) for p in points] == [True] * 30 + [False] * 3


def page_of(path: Path) -> list[dict]:
    """The points of an umap.html, which loads nothing from elsewhere."""
    text = path.read_text()
    outside = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.S)
    assert not re.search(r"src\s*=|https?:|@import|url\(", outside)
    found = re.search(r'<script type="application/json" id="points">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Numbers of tiles that a network has seen."""
    seen, original = [], TileClassifier.features_and_logits
    monkeypatch.setattr(
        TileClassifier,
        "features_and_logits",
        lambda self, x: seen.append(len(x)) or original(self, x),
    )
    return seen


def test_vis_gives_the_same_picture_of_the_same_features(folders, tmp_path, calls):
    for name in ("real", "synthetic"):
        shutil.copy(folders["vis"] / f"features_{name}.safetensors", tmp_path)
    run_vis(folders, tmp_path)
    assert calls == []
    for name in ("umap.csv", "umap.png"):
        assert (folders["vis"] / name).read_bytes() == (tmp_path / name).read_bytes()


def test_vis_reuses_features_of_unchanged_images_only(folders, tmp_path, calls):
    real, out = tmp_path / "real", tmp_path / "out"
    shutil.copytree(folders["real"], real)
    shutil.copytree(folders["vis"], out)
    (real / "ADI" / "0_0.png").write_bytes((real / "ADI" / "0_1.png").read_bytes())
    run_vis({**folders, "real": real}, out, "--batch_size", "5")
    # The real tiles again, by batches, and the synthetic ones, of which there are 18, not.
    assert sum(size for size in calls if size > 1) == 12
    before, after = (
        FeatureSet.load(folder / "features_real.safetensors") for folder in (folders["vis"], out)
    )
    # A matrix product may add in another order when the batch differs: a few units of float32.
    assert torch.allclose(before.values[1:], after.values[1:], atol=1e-6)
    assert torch.allclose(after.values[0], after.values[1], atol=1e-6)


def test_distance_rejects_the_misplaced_image(folders, tmp_path):
    out = tmp_path / "train5+fake100%"
    run_distance(folders, out, "--ratio", "100")
    rows = {row["file"]: row for row in rows_of(out / "selection.csv")}
    assert len(rows) == 18
    wrong = rows["TUM/1_wrong.png"]
    assert (wrong["decision"], wrong["nearest"], wrong["rank"]) == ("rejected", "LYM", "")
    assert float(wrong["own_distance"]) == float(wrong["distance_TUM"])
    assert float(wrong["distance_LYM"]) < float(wrong["distance_TUM"])
    accepted = [row for row in rows.values() if row["decision"] == "accepted"]
    assert {row["class"] for row in accepted} == {"ADI", "LYM", "TUM"}

    tiles = TileFolder(out, 32, labelled=True, classes=["ADI", "LYM", "TUM"])
    names = [Path(path).name for path in tiles.relative_paths]
    assert sum(name.startswith(PREFIX) for name in names) == len(accepted) == 12
    assert sum(not name.startswith(PREFIX) for name in names) == 12
    for row in accepted:
        folder, name = row["file"].split("/")
        copy = out / folder / f"{PREFIX}{name}"
        assert copy.read_bytes() == (folders["fake"] / row["file"]).read_bytes()
    record = json.loads((out / "selection.json").read_text())
    assert record["counts"]["TUM"]["generated"] == 7
    # Nothing is left over beside it.
    assert class_folders(tmp_path) == [out.name, f"{out.name}.sheets"]


def test_shortfall_is_reported_and_not_filled(folders, tmp_path, caplog):
    run_distance(folders, tmp_path / "out", "--per_class", "6")
    counts = json.loads((tmp_path / "out" / "selection.json").read_text())["counts"]
    assert counts["LYM"]["shortfall"] == 1  # five images are left of six
    assert counts["LYM"]["accepted"] == 5
    assert "LYM 1" in caplog.text
    assert len(list_images(tmp_path / "out" / "LYM")) == 4 + 5


def test_same_command_again_does_nothing_and_other_settings_are_refused(folders, tmp_path, capsys):
    out = tmp_path / "out"
    run_distance(folders, out, "--ratio", "50")
    before = {path: path.stat().st_mtime_ns for path in list_images(out)}
    run_distance(folders, out, "--ratio", "50")
    assert "there already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in list_images(out)}
    with pytest.raises(UserError, match="ratio 50 there, 100 now"):
        run_distance(folders, out, "--ratio", "100")
    with pytest.raises(UserError, match="not made by this command"):
        run_distance(folders, folders["root"] / "D", "--ratio", "100")


def test_every_strategy_and_network_of_the_command(folders, tmp_path, monkeypatch):
    """All from a checkpoint, whose features are computed once; the same as from vis.py's folder."""
    judge = ["--features", str(folders["weights"]), "--device", "cpu", "--num_workers", "0"]
    judge += ["--cache", str(tmp_path / "cache"), "--no-sheets", "--ratio", "50"]
    common = ["--real", str(folders["real"]), "--synthetic", str(folders["fake"])]
    make_manifest(folders["fake"])
    calls = []
    original = TileClassifier.features_and_logits
    monkeypatch.setattr(
        TileClassifier,
        "features_and_logits",
        lambda self, x: calls.append(len(x)) or original(self, x),
    )
    for strategy, options in {
        "centroid": [],
        "confidence": ["--fill"],
        "manifest": ["--confidence", "manifest"],
        "knn": ["--neighbors", "2"],
        "coverage": [],
        "random": ["--seed", "1"],
    }.items():
        name = "confidence" if strategy == "manifest" else strategy
        out = tmp_path / strategy
        distance.main([*common, *judge, "--out", str(out), "--strategy", name, *options])
        record = json.loads((out / "selection.json").read_text())
        assert record["settings"]["strategy"] == name
        assert record["judge"]["trained_on_real"] is None  # nothing says what it was trained on
        used = [row for row in rows_of(out / "selection.csv") if row["decision"] in USED]
        images = [path for path in list_images(out) if path.name.startswith(PREFIX)]
        assert len(used) == len(images) > 0
        if strategy == "confidence":  # an untrained judge needs its shortfalls filled
            assert {row["decision"] for row in used} >= {"filled"}
            assert len(used) == 6
    assert calls == [12, 18]  # computed once
    assert len(list((tmp_path / "cache").iterdir())) == 2
    run_distance(folders, tmp_path / "vis", "--ratio", "50", "--no-sheets")
    both = [(tmp_path / name / "selection.csv").read_text() for name in ("vis", "centroid")]
    assert both[0] == both[1]


def test_unlabelled_tiles_with_the_classes_that_a_judge_gives_them(folders, tmp_path, capsys):
    pool = tmp_path / "pool"
    # The tiles are named for their true classes, and the names of folders say nothing.
    for folder, name in (("LYM/deep", "ADI"), ("", "LYM"), ("ADI", "TUM")):
        (pool / folder).mkdir(parents=True, exist_ok=True)
        for path in list_images(folders["fake"] / name):
            true = "LYM" if "wrong" in path.name else name
            shutil.copyfile(path, pool / folder / f"{true}{path.name}")
    shutil.copyfile(path, pool / "again.png")
    shutil.copytree(folders["real"] / "ADI", pool / "labelled")
    out = tmp_path / "out"
    words = [
        "--real",
        str(folders["real"]),
        "--unlabelled",
        str(pool),
        "--features",
        "pixels",
        "--strategy",
        "confidence",
    ]
    words += ["--features", str(folders["weights"]), "--device", "cpu", "--no-sheets"]
    words += ["--val", str(folders["fake"]), "--cache", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="18 of its tiles are those of [-`]*val`?"):
        distance.main([*words, "--out", str(out)])
    words[words.index("--val") + 1] = str(make_tiles(tmp_path / "val", per_class=5, seed=9))
    distance.main([*words, "--per_class", "5", "--out", str(out)])
    rows = rows_of(out / "selection.csv")
    assert len(rows) == 18  # neither repeated nor labelled ones
    assert all(row["judged"] == row["class"] for row in rows)
    used = [row for row in rows if row["decision"] in USED]
    for row in used:
        assert float(row["score"]) == pytest.approx(float(row["confidence"]), abs=1e-6)
        copy = out / row["class"] / f"pseudo_{row['file'].replace('/', '_')}"
        assert copy.read_bytes() == (pool / row["file"]).read_bytes()
    assert len(list_images(out)) == 12 + len(used)
    assert all(Path(row["file"]).name.startswith(row["class"]) for row in used)
    judge = json.loads((out / "selection.json").read_text())["judge"]
    assert judge["val"]["accuracy"] == 1.0 and judge["agreement"] is None
    assert len(judge["val"]["networks"]) == 2 and judge["val"]["calibration_error"] < 0.5
    assert "judge on 15 tiles of --val: accuracy 1.000" in capsys.readouterr().out
    distance.main([*words, "--per_class", "5", "--out", str(out)])
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="`choose`: a classifier"):
        distance.main([*words, "--choose", "--out", str(tmp_path / "other")])
    # The same with labels that are spread over these tiles: another folder, by the same names.
    words += ["--spread", str(pool), "--per_class", "5", "--out"]
    with pytest.raises(UserError, match="spread_over"):
        distance.main([*words, str(out)])
    distance.main([*words, str(tmp_path / "spread")])
    record = json.loads((tmp_path / "spread" / "selection.json").read_text())
    assert record["judge"]["val"]["accuracy"] == 1.0
    assert record["settings"]["spread_over"]
    used = [row for row in rows_of(tmp_path / "spread/selection.csv") if row["decision"] in USED]
    assert used and all(Path(row["file"]).name.startswith(row["class"]) for row in used)


def test_the_network_that_tells_left_out_tiles_apart_is_chosen(folders, tmp_path):
    """Colours do; a network without training that sees a few grey levels does worse."""
    net = TileClassifier("vit_tiny", 2, input_size=32, patch_size=8)
    net.classes = ["other", "classes"]  # so that it is probed
    write_checkpoint(tmp_path / "blind.ckpt", tiny.vit_checkpoint(net))
    words = ["--real", str(folders["real"]), "--synthetic", str(folders["fake"]), "--no-sheets"]
    words += ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--ratio", "50", "--choose"]
    names = [str(tmp_path / "blind.ckpt"), "pixels"]
    identities = []
    for order in (names, names[::-1]):
        out = tmp_path / f"out{len(identities)}"
        distance.main([*words, "--features", *order, "--out", str(out)])
        judge = json.loads((out / "selection.json").read_text())["judge"]
        scores = {one["network"]: one["cross_entropy"] for one in judge["left_out"]}
        assert len(scores) == 2 and judge["network"] == min(scores, key=scores.get)
        identities.append(judge["identity"])
    assert identities[0] == identities[1]


def test_agreement_of_the_judge_with_the_wanted_classes(folders, tmp_path, capsys):
    words = ["--real", str(folders["real"]), "--synthetic", str(folders["fake"]), "--no-sheets"]
    words += ["--features", "pixels", "--cache", str(tmp_path / "cache"), "--ratio", "100"]
    distance.main([*words, "--strategy", "confidence", "--out", str(tmp_path / "out")])
    agreement = json.loads((tmp_path / "out" / "selection.json").read_text())["judge"]["agreement"]
    assert agreement["TUM"] == {"before": pytest.approx(6 / 7), "after": 1.0}
    assert "0.857" in capsys.readouterr().out


def make_manifest(fake: Path) -> None:
    lines = ["class,file,prob"]
    lines += [f"{p.parent.name},{p.parent.name}/{p.name},0.9" for p in list_images(fake)]
    (fake / "manifest.csv").write_text("\n".join(lines) + "\n")


def test_kept_features_serve_labelled_and_unlabelled_uses_of_the_same_tiles(
    folders, tmp_path, monkeypatch
):
    """One command may know the classes of a folder that another takes for a heap of tiles."""
    extractor = parse_features("pixels").open("cpu")
    labelled = TileFiles.below(folders["real"], True)
    heap = dataclasses.replace(labelled, classes=[], labels=[-1] * len(labelled.labels))
    first = cached_features(labelled, extractor, tmp_path / "kept")
    monkeypatch.setattr(FeatureSet, "compute", None)  # a call would be a TypeError
    for files in (heap, labelled):
        found = cached_features(files, extractor, tmp_path / "kept")
        assert torch.equal(found.values, first.values)
        assert (found.labels.tolist(), found.classes) == (files.labels, files.classes)


def test_features_that_another_process_computes_are_waited_for(folders, tmp_path, monkeypatch):
    extractor, cache = parse_features("pixels").open("cpu"), tmp_path / "kept.safetensors"
    files = TileFiles.below(folders["real"], True)
    known = FeatureSet.compute(files, extractor, 64, 0)
    monkeypatch.setattr(FeatureSet, "compute", None)  # a call would be a TypeError
    lock = tmp_path / ".kept.safetensors.lock"
    with ThreadPoolExecutor() as pool:
        with lock_file(lock):
            found = pool.submit(cached_features, files, extractor, cache)
            assert not wait([found], timeout=0.5).done
            known.save(cache)
        assert torch.equal(found.result(timeout=60).values, known.values)
    assert list(tmp_path.glob(".*")) == []


def test_features_of_a_timm_network(folders, tmp_path):
    import timm

    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "resnet18.pth")
    fake = tmp_path / "fake"
    shutil.copytree(folders["fake"], fake)
    distance.main(
        ["--real", str(folders["real"]), "--synthetic", str(fake), "--out", str(tmp_path / "out")]
        + ["--features", "timm:resnet18", "--pretrained_weights", str(tmp_path / "resnet18.pth")]
        + ["--input_size", "32", "--device", "cpu", "--ratio", "50", "--no-sheets"]
    )
    assert len(list((tmp_path / "fake.features").iterdir())) == 2  # where it is if none is named
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert record["judge"]["network"] == "resnet18 with resnet18.pth"


def test_warns_when_the_judge_is_no_independent_witness(folders, tmp_path, caplog):
    seed = tmp_path / "seed0"
    (seed / "checkpoints").mkdir(parents=True)
    shutil.copyfile(folders["weights"], seed / "checkpoints" / "best.ckpt")
    # What eval.py records of its training set, from its own function.
    make_tiles(folders["root"] / "D" / "val", per_class=1, seed=7)
    splits = open_splits(folders["root"] / "D", "train5", Settings(input_size=32))
    (seed / "result.json").write_text(json.dumps({"data": splits.identity}))
    options = ["--features", str(seed), "--ratio", "50", "--no-sheets", "--device", "cpu"]
    options += ["--cache", str(tmp_path / "cache"), "--downstream", str(folders["weights"])]
    real, fake = str(folders["real"]), str(folders["fake"])
    common = ["--real", real, "--synthetic", fake]
    distance.main([*common, *options, "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert record["downstream"]["is_the_judge"] and record["judge"]["trained_on_real"]
    assert "are the same network" in record["warnings"][0]
    assert "trained on the very tiles of `real`" in record["warnings"][1]
    assert all(warning in caplog.text for warning in record["warnings"])
    # Beside another network it is a second opinion.
    both = ["--features", "pixels", *options, "--strategy", "confidence"]
    distance.main([*common, *both, "--out", str(tmp_path / "both")])
    record = json.loads((tmp_path / "both" / "selection.json").read_text())
    assert record["judge"]["trained_on_real"] and len(record["warnings"]) == 1
    # Another network, trained on other tiles: no warning.
    torch.manual_seed(5)
    net = TileClassifier("vit_tiny", 3, input_size=32, patch_size=8)
    net.classes = ["ADI", "LYM", "TUM"]
    payload = tiny.vit_checkpoint(net)
    write_checkpoint(seed / "checkpoints" / "best.ckpt", payload)
    splits.identity["train"]["sha256"] = "0" * 64
    (seed / "result.json").write_text(json.dumps({"data": splits.identity}))
    distance.main([*common, *options, "--out", str(tmp_path / "out2")])
    record = json.loads((tmp_path / "out2" / "selection.json").read_text())
    assert record["judge"]["trained_on_real"] is False
    assert record["warnings"] == []


def test_contact_sheets(folders, tmp_path, capsys):
    out = tmp_path / "out"
    run_distance(folders, out, "--ratio", "50")
    sheets = tmp_path / "out.sheets"
    assert sorted(path.name for path in sheets.iterdir()) == ["ADI.png", "LYM.png", "TUM.png"]
    assert class_folders(out) == ["ADI", "LYM", "TUM"]
    with Image.open(sheets / "TUM.png") as image:
        colours = {colour for _, colour in image.getcolors(2**24)}
    for decision in ("accepted", "surplus", "rejected"):  # TUM has some of each
        assert COLOURS[decision] in colours
    assert COLOURS["filled"] not in colours
    before = (sheets / "LYM.png").read_bytes()
    (sheets / "LYM.png").unlink()
    csv_before = (out / "selection.csv").stat().st_mtime_ns
    run_distance(folders, out, "--ratio", "50")  # draws what is missing, makes nothing else anew
    assert (sheets / "LYM.png").read_bytes() == before
    assert (out / "selection.csv").stat().st_mtime_ns == csv_before
    assert "there already" in capsys.readouterr().out
    run_distance(folders, tmp_path / "none", "--ratio", "50", "--no-sheets")
    assert not (tmp_path / "none.sheets").exists()


def test_sheet_shows_the_right_images(folders, tmp_path):
    judged = read_judged(str(folders["vis"]), folders["fake"])
    distances = centroid_distances(judged.synthetic.values, judged.real.centroids)
    strategy = by_centroid(judged.synthetic, distances)
    selection = select(strategy, judged.synthetic, distances.numpy(), [2, 9, 2])
    sheets = Sheets(
        selection, judged.synthetic, judged.real, folders["fake"], folders["real"], strategy.score
    )
    best, border = ([selection.files[i] for i in rows] for rows in sheets.sections("TUM").values())
    assert best == selection.used("TUM")
    assert border[-1] == "TUM/1_wrong.png"  # the only one that is rejected, so it is not far off
    assert len({*best, *border}) == len(best) + len(border) == 7
    index, distance = sheets._neighbours([selection.files.index("TUM/1_wrong.png")])
    assert judged.real.files[index[0]].startswith("LYM/")  # where it belongs
    own = judged.synthetic.values[judged.synthetic.files.index("TUM/1_wrong.png")]
    assert distance[0] == pytest.approx((own - judged.real.values).norm(dim=1).min().item(), 1e-5)


def test_pictures_with_a_selection(folders, tmp_path):
    run_distance(folders, tmp_path / "made", "--ratio", "50")
    rows = rows_of(tmp_path / "made" / "selection.csv")
    out = tmp_path / "vis"
    shutil.copytree(folders["vis"], out)  # with its features
    run_vis(folders, out, "--selection", str(tmp_path / "made"), "--thumbnails", "10")
    points = rows_of(out / "umap.csv")
    assert {p["file"]: p["decision"] for p in points if p["set"] == "synthetic"} == {
        row["file"]: row["decision"] for row in rows
    }
    assert {p["decision"] for p in points if p["set"] != "synthetic"} == {""}
    before = {row["file"]: (row["x"], row["y"]) for row in rows_of(folders["vis"] / "umap.csv")}
    assert {p["file"]: (p["x"], p["y"]) for p in points} == before  # the plane is the same
    page = page_of(out / "umap.html")
    assert [p["kind"] for p in page] == [p["decision"] or p["set"] for p in points]
    assert [p["file"] for p in page] == [p["file"] for p in points]
    assert sum(bool(p["picture"]) for p in page) == 10
    chosen = str(tmp_path / "made" / "selection.csv")
    run_vis(folders, out, "--selection", chosen, "--thumbnails", "10")
    assert page_of(out / "umap.html") == page


def test_random_arm_of_the_command(folders, tmp_path):
    arms = []
    for name, options in {
        "closest": [],
        "seed0": ["--random"],
        "again": ["--random", "--seed", "0"],
        "seed1": ["--random", "--seed", "1"],
    }.items():
        run_distance(folders, tmp_path / name, "--ratio", "50", *options)
        rows = rows_of(tmp_path / name / "selection.csv")
        arms.append({row["file"] for row in rows if row["decision"] == "accepted"})
    assert all(len(files) == 6 for files in arms)
    assert arms[1] == arms[2]
    assert arms[1] != arms[3]
    assert arms[0] != arms[1]


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_links(folders, tmp_path, link):
    out = tmp_path / "out"
    run_distance(folders, out, "--ratio", "50", "--link", link)
    for copy in list_images(out):
        source = folders["real"] / copy.parent.name / copy.name
        if copy.name.startswith(PREFIX):
            source = folders["fake"] / copy.parent.name / copy.name.removeprefix(PREFIX)
        assert copy.is_symlink() == (link == "symbolic")
        assert os.path.samefile(copy, source)
    assert len(TileFolder(out, 32, labelled=True)) == 12 + 6


def test_failure_leaves_nothing(folders, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.data.folders.shutil.copyfile", fail)
    with pytest.raises(UserError, match="out cannot be written .No space"):
        run_distance(folders, tmp_path / "out", "--ratio", "50")
    assert class_folders(tmp_path) == ["out.sheets"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.sheets"]


def test_name_of_a_synthetic_image_among_the_real_ones(folders, tmp_path):
    real = make_tiles(tmp_path / "real", per_class=2)
    (real / "ADI" / "0_0.png").rename(real / "ADI" / f"{PREFIX}1_0.png")
    with pytest.raises(UserError, match=f"{PREFIX}1_0.png"):
        run_distance({**folders, "real": real}, tmp_path / "out", "--per_class", "6")
    assert not (tmp_path / "out").exists()


def test_images_made_anew_need_features_made_anew(folders, tmp_path):
    fake = make_tiles(tmp_path / "fake", per_class=6, seed=1)
    with pytest.raises(UserError, match="run scripts/vis.py again"):
        run_distance({**folders, "fake": fake}, tmp_path / "out", "--ratio", "50")


@pytest.mark.slow
def test_timm_network_with_local_weights(folders, tmp_path):
    import timm

    torch.manual_seed(1)
    net = timm.create_model("resnet18", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    vis.main(
        ["--real", str(folders["real"]), "--synthetic", str(folders["fake"]), "--device", "cpu"]
        + ["--model", "resnet18", "--pretrained_weights", str(tmp_path / "resnet18.pth")]
        + ["--input_size", "32", "--out", str(tmp_path / "vis"), "--umap_neighbors", "50"]
    )
    assert FeatureSet.load(tmp_path / "vis" / "features_real.safetensors").values.shape == (12, 512)


VIS = ["vis", "--real", "{real}", "--synthetic", "{fake}", "--out", "{new}", "--device", "cpu"]
DISTANCE = ["distance", "--real", "{real}", "--synthetic", "{fake}", "--out", "{new}"]
POOL = ["distance", "--real", "{real}", "--out", "{new}", "--features", "pixels"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (VIS, "--features: is missing"),
        ([*VIS, "--weights", "{fake}/none"], "nor an existing path"),
        ([*VIS, "--weights", "{fake}/ADI/1_0.png"], "is no checkpoint"),
        ([*VIS, "--model", "resnet19x"], "features timm:resnet19x: "),
        ([*VIS, "--model", "resnet18"], "nothing is downloaded"),
        (
            [*VIS, "--weights", "{weights}", "--input_size", "64"],
            "--input_size: belongs to --model",
        ),
        (
            [*VIS, "--weights", "{weights}", "--batch_size", "0"],
            "--batch_size: 0 must be",
        ),
        ([*VIS, "--weights", "{weights}", "--synthetic", "{two}"], "'LYM'"),
        (
            [*DISTANCE, "--features", "{real}"],
            "features_real.safetensors; make it with histodiffusion features",
        ),
        (
            [*DISTANCE, "--features", "{vis}", "--ratio", "50", "--per_class", "3"],
            "not allowed with",
        ),
        ([*DISTANCE, "--features", "{vis}", "--ratio", "0"], "--ratio: 0 must be at least 1"),
        ([*DISTANCE, "--features", "{vis}", "--seed", "1"], "belongs to --strategy random"),
        ([*DISTANCE, "--features", "{vis}", "--random", "--strategy", "knn"], "--random: not"),
        (
            [*DISTANCE, "--features", "{vis}", "--strategy", "best"],
            "--strategy: 'best' must be",
        ),
        ([*DISTANCE, "--features", "{vis}", "--neighbors", "2"], "belongs to --strategy knn"),
        (
            [*DISTANCE, "--features", "{vis}", "--confidence", "judge"],
            "belongs to --strategy confidence",
        ),
        ([*DISTANCE, "--features", "{vis}", "--random", "--fill"], "rejects nothing"),
        (
            [*DISTANCE, "--features", "{vis}", "--strategy", "knn", "--neighbors", "4"],
            "class ADI has 4 real tiles and needs at least 5",
        ),
        (
            [*DISTANCE, "--features", "{vis}", "--synthetic", "{bare}", "--strategy", "confidence"]
            + ["--confidence", "manifest"],
            "manifest.csv",
        ),
        ([*DISTANCE, "--features", "{vis}", "--ratio", "5"], "less than one image of the 4"),
        ([*DISTANCE, "--features", "{vis}", "--device", "cpu"], "--device: the features of"),
        (
            [*DISTANCE, "--features", "{weights}", "--pretrained_weights", "{weights}"],
            "features '{weights}' take no separate file of weights",
        ),
        ([*DISTANCE, "--features", "timm:resnet18"], "the weights are not on this machine"),
        ([*DISTANCE, "--features", "timm:resnet19x"], "features timm:resnet19x: "),
        ([*DISTANCE, "--features", "{vis}/none"], "nor an existing path"),
        ([*DISTANCE, "--features", "{real}/ADI/0_0.png"], "0_0.png cannot be read"),
        ([*DISTANCE, "--features", "{vis}", "--downstream", "{vis}/none"], "none does not exist"),
        (
            [*DISTANCE, "--features", "{vis}", "--downstream", "{vis}/umap.csv"],
            "`downstream`: {vis}/umap.csv",
        ),
        ([*DISTANCE, "--features", "{vis}", "--out", "{real}/new"], "lies in --real"),
        ([*DISTANCE, "--features", "{vis}", "--sheets", "{new}/sheets"], "lies in --out"),
        (
            [*DISTANCE, "--features", "{weights}", "--cache", "{fake}/cache"],
            "--cache {fake}/cache: lies in --synthetic",
        ),
        ([*VIS, "--weights", "{weights}", "--selection", "{vis}"], "no file {vis}/selection.csv"),
        (
            [*VIS, "--weights", "{weights}", "--selection", "{two}/foreign.csv"],
            "is not of the images in --synthetic",
        ),
        (
            [*VIS, "--weights", "{weights}", "--selection", "{vis}/umap.csv"],
            "has decisions ['']; known are ['accepted',",
        ),
        (
            [*VIS, "--weights", "{weights}", "--selection", "{real}/ADI/0_0.png"],
            "has no columns file and decision",
        ),
        ([*DISTANCE, "--features", "{vis}", "--real", "{two}"], "differ"),
        ([*DISTANCE, "--features", "pixels", "--unlabelled", "{two}"], "not allowed with"),
        ([*DISTANCE[:3], *DISTANCE[5:], "--features", "pixels"], "--synthetic: is missing"),
        ([*POOL, "--unlabelled", "{two}", "--features", "{vis}"], "--unlabelled: the features"),
        ([*POOL, "--unlabelled", "{two}/val"], "for measuring"),
        ([*POOL, "--unlabelled", "{real}"], "all its tiles are labelled"),
        ([*POOL, "--unlabelled", "{two}", "--choose"], "chooses among several"),
        ([*DISTANCE, "--features", "{vis}", "--features", "pixels"], "several: the features"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, monkeypatch, capfd, words, expected):
    two = tmp_path / "two"
    for name in ("ADI", "TUM"):
        (two / name).mkdir(parents=True)
        (two / name / "0.png").write_bytes((folders["real"] / name / "0_0.png").read_bytes())
    (two / "val").mkdir()
    (two / "foreign.csv").write_text("file,decision\nADI/none.png,accepted\n")
    bare = tmp_path / "bare"  # the very images, without a manifest
    shutil.copytree(folders["fake"], bare, ignore=shutil.ignore_patterns("manifest.csv"))
    monkeypatch.setattr("ldm.features.networks.cached_weights", lambda config: None)
    places = {**{k: str(v) for k, v in folders.items()}, "new": str(tmp_path / "new")}
    places |= {"two": two, "bare": bare}
    script, *options = [word.format(**places) for word in words]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: {"vis": vis, "distance": distance}[script].main(options))
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert expected.format(**places) in error
    assert not (tmp_path / "new").exists()


def test_help_works_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "distance.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "--synthetic" in result.stdout, result.stderr


def test_weights_are_found_in_the_cache_of_torch(tmp_path, monkeypatch):
    import timm

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = dataclasses.replace(timm.get_pretrained_cfg("resnet18"), hf_hub_id=None)
    assert cached_weights(config) is None
    path = tmp_path / "hub" / "checkpoints" / config.url.split("/")[-1]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert cached_weights(config) == path


def test_features_of_a_foreign_file(tmp_path):
    path = tmp_path / "features_real.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        FeatureSet.load(path)


@pytest.mark.parametrize("points", [3, 4, 7, 15, 20])
def test_picture_of_few_points(points):
    """With fewer than 16 it starts at random places."""
    from ldm.selection.projection import project

    features = np.random.default_rng(0).normal(size=(points, 8))
    plane = project(features, neighbors=15, min_dist=0.1, seed=0)
    assert plane.shape == (points, 2)
    assert np.isfinite(plane).all()
    assert np.array_equal(plane, project(features, neighbors=15, min_dist=0.1, seed=0))
