"""Procedural tiles: deterministic, stained by Beer-Lambert, and neither trivial nor hopeless."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ldm.data import procedural, tileset
from ldm.data.images import list_images
from ldm.data.procedural import (
    CLASSES,
    TILES_PER_SLIDE,
    Field,
    Noise,
    Nuclei,
    _paint,
    make_slide,
    render_tile,
)
from ldm.data.stain import (
    EOSIN,
    HAEMATOXYLIN,
    from_density,
    jitter_stains,
    optical_density,
    stain_matrix,
)
from ldm.data.tiles import TileFolder
from ldm.data.tileset import few_labels, make_tileset
from ldm.errors import UserError
from scripts.make_tiles import main

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_tiles.py"


# --- stains ------------------------------------------------------------------------------------


def test_densities_of_stains_add_and_light_multiplies():
    stains = stain_matrix()
    np.testing.assert_allclose(np.linalg.norm(stains, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(stains[2] @ stains[:2].T, 0, atol=1e-12)
    np.testing.assert_allclose(stains[0], HAEMATOXYLIN / np.linalg.norm(HAEMATOXYLIN))
    np.testing.assert_allclose(stains[1], EOSIN / np.linalg.norm(EOSIN))
    one, two = 0.7 * stains[0], 0.4 * stains[1]
    product = from_density(one) / 255 * from_density(two)
    np.testing.assert_allclose(from_density(one + two), product, atol=1)
    # Worked by hand: 255 exp(-0.7 * 0.650 / 0.9998) = 161.8, and eosin hardly touches red.
    assert from_density(one)[0] == 162
    assert from_density(two).tolist() == [248, 171, 244]


def test_density_round_trip_over_all_levels():
    levels = np.arange(256, dtype=np.uint8)
    back = from_density(optical_density(levels))
    assert back[0] <= 1  # black has no finite density
    assert np.array_equal(back[1:], levels[1:])
    assert optical_density(np.uint8([255])) == 0


def test_jitter_scales_the_amount_of_one_stain():
    stains = stain_matrix()
    amounts = np.array([[[0.8, 0.3, 0.0], [0.2, 0.6, 0.02]]])
    image = from_density(amounts @ stains)
    np.testing.assert_array_equal(jitter_stains(image, np.ones(3)), image)
    more = optical_density(jitter_stains(image, np.array([1.25, 1, 1]))) @ np.linalg.inv(stains)
    # One grey level is up to 0.01 in density here.
    np.testing.assert_allclose(more, amounts * [1.25, 1, 1], atol=0.02)
    white = np.full((1, 1, 3), 255, np.uint8)
    assert (jitter_stains(white, np.array([2.0, 2.0, 2.0])) == 255).all()


# --- building blocks ---------------------------------------------------------------------------


def test_noise_is_smooth_with_unit_variance():
    x, y = np.meshgrid(np.arange(0, 60, 0.1, np.float32), np.arange(0, 60, 0.1, np.float32))
    values = [Noise(np.random.default_rng(i), 2.0)(x, y) for i in range(4)]
    assert abs(np.mean(values)) < 0.1
    assert 0.85 < np.std(values) < 1.15
    step = np.abs(np.diff(values[0], axis=1)).max()  # steepest slope is 1.5 per lattice step
    assert step < 0.5


def test_painted_nuclei_have_the_area_of_their_ellipse():
    rng = np.random.default_rng(0)
    field = Field(128, 1.0, rng)
    centre = np.array([[-30.0, -20.0], [30.0, 25.0]])
    nuclei = Nuclei(centre, a=12.0, b=[5.0, 8.0], angle=[0.0, 0.7], level=[1.0, 0.5], uneven=0.0)
    cover, level = _paint(field, nuclei)
    left = slice(None), slice(None, 64)
    right = slice(None), slice(64, None)
    assert cover[left].sum() == pytest.approx(np.pi * 12 * 5, rel=0.03)
    assert cover[right].sum() == pytest.approx(np.pi * 12 * 8, rel=0.03)
    assert level[left].max() == pytest.approx(1.0)
    assert level[right].max() == pytest.approx(0.5)
    rows, columns = np.nonzero(cover[left] > 0.5)
    assert np.ptp(columns) > 2 * np.ptp(rows)  # axis a lies along x
    assert columns.mean() - 63.5 == pytest.approx(-30, abs=0.2)
    assert rows.mean() - 63.5 == pytest.approx(-20, abs=0.2)


def test_nuclei_outside_are_cut_off_and_none_are_allowed():
    field = Field(32, 1.0, np.random.default_rng(0))
    for centre in (np.zeros((0, 2)), np.array([[500.0, 0.0]])):
        cover, level = _paint(field, Nuclei(centre, a=4.0, b=3.0))
        assert cover.max() == level.max() == 0


# --- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_tiles_are_deterministic_and_differ(name):
    tile = render_tile(name, 3, 64, seed=1)
    assert tile.shape == (64, 64, 3)
    assert tile.dtype == np.uint8
    assert np.array_equal(tile, render_tile(name, 3, 64, seed=1))
    for other in (render_tile(name, 4, 64, seed=1), render_tile(name, 3, 64, seed=2)):
        assert not np.array_equal(tile, other)


# Mean red, green, blue of tile 7 of each class (64 px, seed 0) in version 1, rounded. When a
# deliberate change of the pictures moves them, raise procedural.VERSION and print them anew.
GOLDEN_MEANS = {
    "ADI": [225, 185, 218],
    "BACK": [237, 228, 236],
    "DEB": [213, 150, 205],
    "LYM": [174, 147, 191],
    "MUC": [215, 198, 217],
    "MUS": [194, 107, 180],
    "NORM": [195, 130, 191],
    "STR": [204, 140, 196],
    "TUM": [175, 128, 184],
}


def test_pictures_are_those_of_this_version():
    assert procedural.VERSION == 1
    found = {n: render_tile(n, 7).mean((0, 1)).round().astype(int).tolist() for n in CLASSES}
    for name in CLASSES:
        # Last digits of exp and cos differ between processors; the pictures do not.
        np.testing.assert_allclose(found[name], GOLDEN_MEANS[name], atol=1)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("index", [0, 12])
def test_the_field_of_view_does_not_depend_on_the_size(name, index):
    """A small tile is the large one seen with fewer pixels."""
    large = cv2.resize(render_tile(name, index, 256), (64, 64), interpolation=cv2.INTER_AREA)
    small = render_tile(name, index, 64)
    large, small = large.astype(float), small.astype(float)
    assert np.abs(large.mean((0, 1)) - small.mean((0, 1))).max() < 4
    if name != "BACK":  # where there is little but camera noise to compare
        assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("size", "classes"), [(32, CLASSES), (99, CLASSES), (512, ["TUM"])])
def test_sizes(size, classes):
    for name in classes:
        assert render_tile(name, 0, size).shape == (size, size, 3)


def test_a_slide_has_one_stain_in_all_classes():
    slides = [make_slide(i) for i in range(40)]
    spread = np.std([s.strength for s in slides], axis=0)
    assert (spread > 0.1).all()
    for s in slides:
        assert np.linalg.norm(s.eosin) == pytest.approx(1)
        # Haematoxylin absorbs red, eosin green.
        assert s.haematoxylin[0] > s.eosin[0] + 0.2
        assert s.eosin[1] == s.eosin.max()
    # Within a slide the colour of glass varies less than between slides.
    glass = np.array([render_tile("BACK", i).mean((0, 1)) for i in range(20 * TILES_PER_SLIDE)])
    glass = glass.reshape(20, TILES_PER_SLIDE, 3)
    assert glass.std(axis=1).mean() < 0.6 * glass.mean(axis=1).std(axis=0).mean()


@pytest.fixture(scope="module")
def sets():
    """(tiles, labels) of 40 training and 30 test tiles per class, on different slides."""

    def make(first: int, count: int):
        tiles = [render_tile(n, first + i) for n in CLASSES for i in range(count)]
        return np.stack(tiles), np.repeat(np.arange(len(CLASSES)), count)

    return make(0, 40), make(50_000, 30)


def texture(tiles: np.ndarray) -> np.ndarray:
    """Mean, deviation, and differences at several distances, of each tile."""
    grey = tiles.mean(-1)
    columns = [tiles.mean((1, 2)), tiles.std((1, 2))]
    for d in (1, 2, 4, 8):
        columns.append(np.abs(grey[:, d:] - grey[:, :-d]).mean((1, 2))[:, None])
        columns.append(np.abs(grey[:, :, d:] - grey[:, :, :-d]).mean((1, 2))[:, None])
    return np.concatenate(columns, axis=1)


def accuracy(sets, feature, classes=None) -> float:
    """Of the 5 nearest training tiles by a standardised feature."""
    (train, train_y), (test, test_y) = sets
    if classes is not None:
        kept = [np.isin(y, [CLASSES.index(c) for c in classes]) for y in (train_y, test_y)]
        train, train_y, test, test_y = (
            train[kept[0]],
            train_y[kept[0]],
            test[kept[1]],
            test_y[kept[1]],
        )
    a, b = feature(train), feature(test)
    mean, std = a.mean(0), a.std(0)
    a, b = (a - mean) / std, (b - mean) / std
    nearest = ((b[:, None] - a[None]) ** 2).sum(-1).argsort(1)[:, :5]
    votes = np.apply_along_axis(np.bincount, 1, train_y[nearest], minlength=len(CLASSES))
    return float((votes.argmax(1) == test_y).mean())


def test_classes_can_be_told_apart_but_not_by_mean_colour(sets):
    colour = accuracy(sets, lambda tiles: tiles.mean((1, 2)))
    with_texture = accuracy(sets, texture)
    assert 0.3 < colour < 0.7
    assert colour + 0.08 < with_texture < 0.92


@pytest.mark.parametrize("pair", [("STR", "MUS"), ("NORM", "TUM"), ("MUC", "DEB")])
def test_similar_tissues_are_confusable(sets, pair):
    assert 0.55 < accuracy(sets, texture, pair) < 0.97


# --- folders -----------------------------------------------------------------------------------

SMALL = {"size": 32, "train": 7, "train5": 2, "val": 2, "test": 3, "classes": ["STR", "ADI"]}


def command(out, *extra: str) -> list[str]:
    counts = [f"--{k}={SMALL[k]}" for k in ("size", "train", "train5", "val", "test")]
    return ["--out", str(out), *counts, "--classes", *SMALL["classes"], *extra]


def test_folder_layout_and_disjoint_slides(tmp_path, capsys):
    main(command(tmp_path / "set"))
    assert "28 files written" in capsys.readouterr().out
    slides = {}
    for split in ("train", "val", "test"):
        data = TileFolder(tmp_path / "set" / split, 32, labelled=True)
        assert data.classes == ["ADI", "STR"]
        assert len(data) == 2 * SMALL[split]
        slides[split] = {path.name.split("_")[0] for path in data.paths}
    assert len(slides["train"]) == 2
    assert not slides["train"] & slides["val"]
    assert not slides["test"] & (slides["train"] | slides["val"])
    few = list_images(tmp_path / "set" / "train5")
    assert len(few) == 4
    for path in few:
        assert (
            path.read_bytes()
            == (path.parents[2] / "train" / path.parent.name / path.name).read_bytes()
        )


def test_a_split_does_not_depend_on_the_size_of_the_others(tmp_path):
    for name, train in (("a", 5), ("b", 9)):
        make_tileset(tmp_path / name, **{**SMALL, "train": train, "workers": 2})
    for path in list_images(tmp_path / "a" / "test") + list_images(tmp_path / "a" / "train"):
        twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == twin.read_bytes()


def test_few_labels_are_spread():
    assert few_labels(60, 6) == [0, 10, 20, 30, 40, 50]
    assert few_labels(7, 7) == list(range(7))
    assert few_labels(5, 0) == []


def test_resuming_writes_what_is_missing_and_nothing_else(tmp_path):
    out = tmp_path / "set"
    assert make_tileset(out, **SMALL) == 28
    before = {path: path.read_bytes() for path in list_images(out)}
    stamps = {path: path.stat().st_mtime_ns for path in before}
    assert make_tileset(out, **SMALL) == 0
    gone = [out / "train" / "ADI" / "slide00000_000001.png", out / "train5" / "STR"]
    gone[0].unlink()
    shutil.rmtree(gone[1])
    assert make_tileset(out, **SMALL) == 3
    assert {path: path.read_bytes() for path in list_images(out)} == before
    kept = [p for p in before if p != gone[0] and p.parent != gone[1]]
    assert all(p.stat().st_mtime_ns == stamps[p] for p in kept)


def test_a_pool_gives_the_same_files(tmp_path, monkeypatch):
    make_tileset(tmp_path / "one", **SMALL)
    monkeypatch.setattr(tileset, "POOL_FROM", 1)
    make_tileset(tmp_path / "two", **SMALL, workers=2)
    for path in list_images(tmp_path / "one"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 64}, "size 32 there, 64 now"),
        ({"seed": 4}, "seed 0 there, 4 now"),
        ({"test": 4}, "test 3 there, 4 now"),
    ],
)
def test_another_data_set_is_not_mixed_in(tmp_path, change, text):
    make_tileset(tmp_path / "set", **SMALL)
    with pytest.raises(UserError) as error:
        make_tileset(tmp_path / "set", **{**SMALL, **change})
    assert text in str(error.value)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "slides.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by this command"):
        make_tileset(tmp_path, **SMALL)
    with pytest.raises(UserError, match="is a file"):
        make_tileset(tmp_path / "slides.txt", **SMALL)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tiles.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        make_tileset(tmp_path / "set", **SMALL)
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--classes", "ADI", "ADI"], "distinct names"),
        (["--classes", "LUNG"], "classes=LUNG"),
        (["--train5", "8"], "train5=8 must be in [0, 7]"),
        (["--val", "60000"], "val=60000"),
        (["--size", "16"], "16 must be in [32, 512]"),
        (["--train", "many"], "'many' is not a whole number"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, capsys, arguments, text):
    with pytest.raises((UserError, SystemExit)) as error:
        main(command(tmp_path / "set", *arguments))
    assert text in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "set").exists()


def test_an_error_is_one_line_and_status_2(tmp_path):
    (tmp_path / "mine.txt").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, *command(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"make_tiles.py: error: out={tmp_path} exists")
    assert done.stderr.count("\n") == 1


def test_the_record_names_every_setting(tmp_path):
    make_tileset(tmp_path / "set", **SMALL)
    record = json.loads((tmp_path / "set" / "tiles.json").read_text())
    assert record == {**SMALL, "seed": 0, "version": procedural.VERSION}
