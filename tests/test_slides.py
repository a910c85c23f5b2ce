"""Whole-slide images as a corpus: which tiles are chosen, how they are read, and training."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from ldm.cli import parse
from ldm.commands import train as main_py
from ldm.data.corpora import Corpora
from ldm.data.index import CorpusIndex
from ldm.data.scan import page_of, problems_of
from ldm.data.tiles import to_uint8
from ldm.errors import UserError
from ldm.run import RunFolder
from scripts import index_corpus, write_shards

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64  # of a tile at level 0: 32 micrometres at 0.5 each
TISSUE = (slice(128, 640), slice(192, 960))  # rows, columns


def scene(blue: int) -> np.ndarray:
    """Glass, a black border, and tissue whose colour changes from tile to tile."""
    picture = np.full((768, 1152, 3), 243, np.uint8)
    picture[:64] = 12
    y, x = np.mgrid[:768, :1152]
    colours = np.stack([150 + y // 16, 60 + x // 16, blue + 0 * x], axis=2).astype(np.uint8)
    picture[TISSUE] = colours[TISSUE]
    return picture


def write_slide(path: Path, levels: int, blue: int = 170, micrometres: float | None = 0.5) -> Path:
    """A tiled TIFF; each further level has half the side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    if micrometres:
        options |= {"resolution": (1e4 / micrometres,) * 2, "resolutionunit": "CENTIMETER"}
    picture = scene(blue)
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            file.write(picture, subfiletype=int(level > 0), **options)
            height, width, _ = picture.shape
            halves = picture.reshape(height // 2, 2, width // 2, 2, 3)
            picture = np.rint(halves.mean(axis=(1, 3))).astype(np.uint8)
    return path


@pytest.fixture
def slides(tmp_path) -> Path:
    """A pyramid and a generic tiled TIFF, each in the folder of its class."""
    write_slide(tmp_path / "slides" / "A" / "pyramid.tif", levels=4)
    write_slide(tmp_path / "slides" / "B" / "flat.tiff", levels=1, blue=120)
    return tmp_path / "slides"


def index(slides: Path, *options: object) -> CorpusIndex:
    out = slides.parent / "index.parquet"
    argv = [slides, "--layout", "slides", "--out", out, "--tile_um", 32, "--pixels", 32, *options]
    index_corpus.main([str(argument) for argument in argv])
    return CorpusIndex.read(out)


def test_tiles_of_tissue_are_chosen_and_read_at_their_resolution(slides):
    made = index(slides)
    tiles = made.tiles(0)
    rows, columns = 512 // SIDE, 768 // SIDE
    assert len(tiles["path"]) == 2 * rows * columns
    assert tiles["path"][0] == "A/pyramid.tif/x000192_y000128_side64_px32"
    assert set(tiles["group"]) == {"A/pyramid.tif", "B/flat.tiff"} and set(tiles["label"]) == set(
        "AB"
    )
    nodes = {"x": {"root": str(slides), "index": str(made.path)}}
    data = Corpora(nodes, 32, labelled=True)
    assert data.classes == ["A", "B"] and set(data.groups) == {f"x/{g}" for g in tiles["group"]}
    for i in (0, 17, len(data) // 2, len(data) - 1):
        name = data.relative_paths[i].split("/")[-1].split("_")
        x, y = int(name[0][1:]), int(name[1][1:])
        expected = (
            scene(170 if i < 96 else 120)[y : y + SIDE, x : x + SIDE]
            .reshape(32, 2, 32, 2, 3)
            .mean(axis=(1, 3))
        )
        # Of the pyramid, level 1 as it is; of the other, level 0, resized with another filter.
        assert np.abs(to_uint8(data[i]["image"]) - expected).max() <= (0.5 if i < 96 else 8)


def test_a_page_shows_what_is_chosen_and_a_second_scan_reads_nothing(slides, capsys):
    made = index(slides)
    page = page_of(made.path).read_text()
    assert page.count("<img") == 2 and "A/pyramid.tif: 96 tiles" in page
    capsys.readouterr()
    index(slides)
    assert "2 files, 2 of them known" in capsys.readouterr().out
    fewer = index(slides, "--tissue", 1, "--tile_um", 48)
    assert "2 files, 0 of them known" in capsys.readouterr().out
    assert 0 < len(fewer.tiles(0)["path"]) < 96


def test_groups_may_be_patients(slides, tmp_path):
    assert set(index(slides, "--group_level", 1).tiles(0)["group"]) == {"A", "B"}
    (tmp_path / "patients.csv").write_text("path,group\nA/pyramid.tif,p1\nB/flat.tiff,p1\n")
    assert set(index(slides, "--group_csv", tmp_path / "patients.csv").tiles(0)["group"]) == {"p1"}


def test_slides_that_cannot_be_read_are_problems(slides):
    write_slide(slides / "unknown.tif", 1, blue=60, micrometres=None)
    write_slide(slides / "screen.tif", 1, blue=30, micrometres=352.8)  # 72 dpi
    tifffile.imwrite(
        slides / "tiny.tif",
        scene(0)[:64, :32],
        tile=(16, 16),
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
        photometric="rgb",
    )
    (slides / "text.svs").write_text("hello")
    whole = (slides / "A" / "pyramid.tif").read_bytes()
    (slides / "cut.tif").write_bytes(whole[: len(whole) // 3])
    made = index(slides)
    found = problems_of(made.path).read_text()
    bad = ("unknown.tif", "screen.tif", "text.svs", "cut.tif", "tiny.tif")
    assert all(name in found for name in bad) and "no tile in it" in found
    assert "give `mpp`" in found and len(set(made.tiles(0)["group"])) == 2
    assert len(set(index(slides, "--mpp", 0.5).tiles(0)["group"])) == 2 + 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--layout", "slides", "--pixels", "400"], "no tile is good"),
        (["--layout", "folder", "--mpp", "0.5"], "mpp: is for --layout slides"),
        (["--layout", "slides", "--tissue", "2"], "tissue"),
        (["--layout", "slides", "--tile_um", "nan"], "tile_um"),
    ],
)
def test_mistakes(slides, options, text):
    argv = [str(slides), "--out", str(slides.parent / "x.parquet"), "--tile_um", "32", *options]
    with pytest.raises((UserError, SystemExit)) as error:
        index_corpus.main(argv if "--mpp" not in options else [*argv[:3], *options])
    assert text in str(error.value)


def test_slides_need_an_index(slides):
    with pytest.raises(UserError, match="slides need an index"):
        Corpora({"x": {"root": str(slides), "layout": "slides"}}, 32)


def test_a_slide_becomes_shards_and_trains(slides, tmp_path, monkeypatch):
    made = index(slides)
    write_shards.main([str(made.path), "--out", str(tmp_path / "shards")])
    packed = Corpora({"x": {"root": str(tmp_path / "shards"), "layout": "shards"}}, 32)
    live = Corpora({"x": {"root": str(slides), "index": str(made.path)}}, 32)
    assert len(packed) == len(live)
    assert np.array_equal(to_uint8(packed[5]["image"]), to_uint8(live[5]["image"]))
    groups = CorpusIndex.read(tmp_path / "shards.parquet").tiles(0)["group"]
    assert set(groups) == {"A/pyramid.tif", "B/flat.tiff"}
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    for name, root in (("shards", tmp_path / "shards"), ("slides", slides)):
        (tmp_path / f"{name}.yaml").write_text(
            "data: {params: {validation: null, val_fraction: 0.4, train: {target:"
            " ldm.data.corpora.Corpora, params: {size: 48, corpora: {x: {root:"
            f" {root}, index: {tmp_path / ('shards' if name == 'shards' else 'index')}.parquet"
            "}}}}}}\n"
        )
        argv = ["--base", str(ROOT / "configs" / "demo" / "autoencoder.yaml")]
        argv += [str(tmp_path / f"{name}.yaml"), "-t", "--logdir", str(tmp_path / "logs")]
        argv += ["--name", name]
        argv += ["--max_steps", "3", "data.params.batch_size=2", "model.params.monitor=null"]
        argv += ["lightning.trainer.limit_val_batches=1", "lightning.callbacks.image_logger=null"]
        argv += ["lightning.trainer.enable_progress_bar=false", "data.params.num_workers=2"]
        main_py.train(parse(main_py.Options, argv))
        assert RunFolder(tmp_path / "logs" / name).last.is_file()
