"""The scan of a corpus: what it finds, what it writes, how it goes on, and when it is stale."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.data import images, scan
from ldm.data.images import read_tile
from ldm.data.index import CorpusIndex
from ldm.data.scan import journal_of, problems_of
from ldm.data.storage import LAYOUTS, find_files, read_place
from ldm.errors import UserError
from scripts import index_corpus

ROOT = Path(__file__).resolve().parents[1]


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def corpus(tmp_path):
    """Patients of two classes: eight good tiles in five formats, and six with a problem."""
    root = tmp_path / "corpus"
    extensions = ("png", "jpg", "tif", "webp", "png", "png", "png")
    for i, extension in enumerate(extensions):
        save(root / "AB"[i % 2] / f"p{i % 3}" / f"{i}.{extension}", picture(i))
    np.save(root / "A" / "p0" / "array.npy", picture(20) / 255.0)
    (root / "A" / "white.txt").write_text("1")
    shutil.copy(root / "A" / "p0" / "0.png", root / "B" / "p1" / "copy.png")
    whole = (root / "A" / "p0" / "0.png").read_bytes()
    (root / "B" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "B" / "text.png").write_text("hello")
    save(root / "B" / "small.png", picture(30, 8))
    Image.fromarray(np.full((16, 16), 4000, np.uint16)).save(root / "B" / "deep.tif")
    (root / "B" / ".hidden.png").write_text("not looked at")
    (root / "B" / "gone.png").symlink_to(root / "nowhere.png")
    return root


def run(*arguments) -> CorpusIndex:
    """Index in the folder above the first root."""
    out = Path(arguments[0]).parent / "index.parquet"
    index_corpus.main([*map(str, arguments), "--out", str(out), "--workers", "2"])
    return CorpusIndex.read(out)


def problems(index: CorpusIndex) -> dict[str, str]:
    with problems_of(index.path).open(newline="") as file:
        return {row["path"]: row["problem"] for row in csv.DictReader(file)}


def test_good_tiles_are_indexed_and_bad_ones_listed(corpus, capsys):
    index = run(corpus, "--min_size", 9, "--group_level", 2)
    tiles = index.tiles(0)
    files = [p.relative_to(corpus).as_posix() for p in sorted(corpus.rglob("p*/*"))]
    assert tiles["path"] == [file for file in files if "copy" not in file] and len(files) == 9
    assert tiles["label"] == [path.split("/")[0] for path in tiles["path"]]
    assert tiles["group"] == [path.split("/")[1] for path in tiles["path"]]
    assert tiles["size"] == [(corpus / path).stat().st_size for path in tiles["path"]]
    assert problems(index) == {
        "B/cut.png": "truncated",
        "B/deep.tif": "unsupported",
        "B/gone.png": "unreadable",
        "B/p1/copy.png": "duplicate",
        "B/small.png": "too small",
        "B/text.png": "unreadable",
    }
    rows = {row["path"]: row for row in index.table.to_pylist()}
    assert rows["B/p1/copy.png"]["reason"] == "same bytes as A/p0/0.png of root 0"
    assert rows["B/p1/copy.png"]["hash"] == rows["A/p0/0.png"]["hash"]
    assert (rows["B/small.png"]["width"], rows["A/p0/array.npy"]["height"]) == (8, 16)
    assert "2 unreadable, 1 truncated, 1 unsupported, 1 too small, 1 duplicate" in (
        capsys.readouterr().out
    )
    index.check([corpus])


def test_duplicates_may_be_kept(corpus):
    index = run(corpus, "--keep_duplicates")
    assert "B/p1/copy.png" in index.tiles(0)["path"] and "B/small.png" in index.tiles(0)["path"]
    assert problems(index)["B/p1/copy.png"] == "duplicate"
    (corpus / "A" / "p0" / "0.png").unlink()
    assert "B/p1/copy.png" not in problems(run(corpus))


def test_duplicates_across_roots_are_found(corpus, tmp_path, reads):
    save(tmp_path / "test" / "A" / "again.png", picture(0))
    save(tmp_path / "test" / "A" / "other.png", picture(99))
    run(corpus, "--min_size", 9)
    reads.clear()
    index = run(corpus, tmp_path / "test", "--min_size", 9)
    assert index.tiles(1)["path"] == ["A/other.png"] and len(reads) == 2
    swapped = run(tmp_path / "test", corpus, "--min_size", 9)
    assert len(reads) == 2 and swapped.tiles(0)["path"] == ["A/again.png", "A/other.png"]
    index.check([corpus, tmp_path / "test"])
    with pytest.raises(UserError, match="is of 2 roots, not 1"):
        index.check([corpus])


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files that are read from now on."""
    names: list[str] = []
    plain = scan.scan_file

    def counted(roots, layout, stamp):
        names.append(stamp[1])
        return plain(roots, layout, stamp)

    monkeypatch.setattr(scan, "scan_file", counted)
    return names


def test_a_second_scan_reads_only_what_changed(corpus, reads):
    first = run(corpus, "--min_size", 9)
    assert len(reads) == 14
    reads.clear()
    second = run(corpus, "--group_regex", r"^(\w)/")
    assert reads == []
    # Options are applied anew: the small tile is back, and there are groups.
    assert "B/small.png" in second.tiles(0)["path"] and set(second.tiles(0)["group"]) == {"A", "B"}
    save(corpus / "B" / "cut.png", picture(40))
    save(corpus / "A" / "new.png", picture(41))
    third = run(corpus, "--min_size", 9)
    assert sorted(reads) == ["A/new.png", "B/cut.png"]
    assert len(third.tiles(0)["path"]) == len(first.tiles(0)["path"]) + 2
    reads.clear()
    (corpus / "B" / "white.txt").write_text("65535")
    images.declared_white.cache_clear()  # as another process
    assert "B/deep.tif" in run(corpus).tiles(0)["path"] and reads == ["B/deep.tif"]


def test_an_interrupted_scan_goes_on(corpus, tmp_path, reads, monkeypatch):
    whole = run(corpus, "--min_size", 9).table
    out = tmp_path / "index.parquet"
    out.unlink()
    reads.clear()
    plain = scan._scan_tile

    def interrupted(root, layout, place):
        if len(reads) > 6:
            raise KeyboardInterrupt
        return plain(root, layout, place)

    monkeypatch.setattr(scan, "AHEAD", 1)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "_scan_tile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, "--min_size", 9)
    assert not out.exists()
    lines = journal_of(out).read_text().splitlines()
    done = len([line for line in lines if line.startswith("[")])
    assert 1 <= done <= 7
    # As a kill in the middle of a line leaves it.
    with journal_of(out).open("a") as stream:
        stream.write(lines[-1][:20])
    reads.clear()
    assert run(corpus, "--min_size", 9).table.equals(whole)
    assert len(reads) == 14 - done and not journal_of(out).exists()


def test_a_journal_of_another_layout_or_root_is_not_used(corpus, tmp_path, reads):
    journal = journal_of(tmp_path / "index.parquet")
    run(corpus)
    header = {"version": 1, "layout": "folder", "scanned": [str(corpus)]}
    rows = CorpusIndex.read(tmp_path / "index.parquet").table.to_pylist()
    entries = [[0, r["file"], r["file_size"], r["modified"], [r]] for r in rows]
    for other in ({"layout": "shards"}, {"scanned": ["elsewhere"]}, {}):
        (tmp_path / "index.parquet").unlink()
        journal.write_text("\n".join(map(json.dumps, [header | other, *entries])) + "\n")
        reads.clear()
        run(corpus)
        assert len(reads) == (14 if other else 0)


def stale(index: CorpusIndex, root: Path) -> str:
    with pytest.raises(UserError) as error:
        index.check([root])
    text = str(error.value)
    assert "\n" not in text and "index_corpus.py" in text and str(index.path) in text
    return text


def test_a_stale_index_is_noticed(corpus):
    index = run(corpus, "--min_size", 9)
    path = corpus / "A" / "p0" / "0.png"
    save(corpus / "A" / "p0" / "new.png", picture(50))
    assert "1 files were added" in stale(index, corpus) and "new.png" in stale(index, corpus)
    (corpus / "A" / "p0" / "new.png").rename(corpus / "A" / "p0" / ".new.png")
    index.check([corpus])  # nothing that counts is different, though the folder's time is
    save(corpus / "C" / "deep" / "new.png", picture(51))
    assert "C/deep/new.png" in stale(index, corpus) and "were added" in stale(index, corpus)
    shutil.rmtree(corpus / "C")
    content = path.read_bytes()
    path.unlink()
    assert "0.png" in stale(index, corpus) and "gone" in stale(index, corpus)
    path.write_bytes(content + b" ")
    assert "bytes instead of" in stale(index, corpus)
    path.write_bytes(content[:-1] + b"?")
    assert "another content" in stale(index, corpus)
    path.write_bytes(content)
    index.check([corpus])
    shutil.rmtree(corpus / "B" / "p0")
    assert "p0 is gone" in stale(index, corpus)


def test_a_corpus_may_move_but_not_be_another(corpus, tmp_path):
    index = run(corpus, "--min_size", 9)
    shutil.copytree(corpus, tmp_path / "moved", symlinks=True, copy_function=shutil.copyfile)
    index.check([tmp_path / "moved"])
    other = tmp_path / "other"
    save(other / "A" / "0.png", picture(60))
    assert "gone" in stale(index, other)
    assert "gone" in stale(index, tmp_path / "nowhere")


def test_a_hundred_tiles_are_not_all_looked_at(tmp_path):
    for i in range(100):
        save(tmp_path / "set" / f"{i:03d}.png", picture(i, 4))
    index = run(tmp_path / "set")
    looked = []
    plain = os.stat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **kw: looked.append(str(path)) or plain(path, **kw))
        index.check([tmp_path / "set"])
    assert 10 < len([path for path in looked if path.endswith(".png")]) <= 64
    assert any(p.endswith("000.png") for p in looked) and any(p.endswith("099.png") for p in looked)


# Arrays and shards


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format=kind)
    return stream.getvalue()


def test_arrays(tmp_path):
    images = np.stack([picture(i) for i in range(6)])
    stored = {"a": images, "b": (images + 0.0)[:3] + 1e-9, "c": (images / 255.0)[3:]}
    for name, array in stored.items():
        (tmp_path / "root" / name).mkdir(parents=True)
        np.save(tmp_path / "root" / name / "images.npy", array)
    np.save(tmp_path / "root" / "a" / "masks.npy", np.zeros(3))
    np.save(tmp_path / "root" / "a" / "types.npy", np.array(["Breast", "Colon"] * 3))
    index = run(tmp_path / "root", "--layout", "array", "--group_level", 1)
    tiles = index.tiles(0)
    assert len(tiles["path"]) == 12 and tiles["path"][7] == "b/images.npy/000001"
    assert tiles["label"][:2] == ["Breast", "Colon"] and tiles["group"][6] == "b"
    layout, root = LAYOUTS["array"], tmp_path / "root"
    places = [p for f in find_files(root, layout)[0] for p in layout.places(root, f)]
    for place, expected in zip(places, [*images, *images], strict=True):
        assert np.array_equal(read_place(root, layout, place), expected)
    index.check([root])


def test_a_bad_row_of_an_array_is_a_problem(tmp_path):
    array = np.stack([picture(i) for i in range(3)]).astype(np.float32)
    array[1, 0, 0, 0] = np.nan
    array[2, 0, 0, 0] = 300
    (tmp_path / "root").mkdir()
    np.save(tmp_path / "root" / "images.npy", array)
    index = run(tmp_path / "root", "--layout", "array")
    assert index.tiles(0)["path"] == ["images.npy/000000"]
    assert Counter(problems(index).values()) == {"unsupported": 2}


def test_shards(tmp_path):
    root = tmp_path / "root"
    members = {
        "__meta__": b"x",
        "TUM/0.png": encoded(picture(0)),
        "TUM/0.cls": b"tumour",
        "TUM/1.jpg": encoded(picture(1), "JPEG"),
        "2.png": b"hello",
        "3.txt": b"no tile",
    }
    write_shard(root / "x" / "000.tar", members)
    write_shard(root / "x" / "001.tar", {"4.png": encoded(picture(4))})
    write_shard(root / "none.tar", {"5.txt": b"no tile"})
    whole = (root / "x" / "001.tar").read_bytes()
    for name, kept in (("cut", 700), ("end", 1024 + 512), ("empty", 0)):
        (root / f"{name}.tar").write_bytes(whole[:kept])
    index = run(root, "--layout", "shards")
    tiles = index.tiles(0)
    assert tiles["path"] == ["x/000.tar/TUM/0.png", "x/000.tar/TUM/1.jpg", "x/001.tar/4.png"]
    assert tiles["label"] == ["tumour", "TUM", None]
    assert tiles["size"][0] == len(members["TUM/0.png"])
    expected = {"cut.tar", "empty.tar", "end.tar", "none.tar", "x/000.tar/2.png"}
    assert set(problems(index)) == expected and set(problems(index).values()) == {"unreadable"}
    index.check([root])
    write_shard(root / "x" / "001.tar", {"4.png": encoded(picture(5))})
    assert "001.tar" in stale(index, root)


def test_one_bad_file_is_named_when_there_is_no_index(tmp_path):
    (tmp_path / "images.npy").write_bytes(b"\x93NUMPY nonsense")
    with pytest.raises(UserError, match="images.npy: no complete file of arrays"):
        LAYOUTS["array"].places(tmp_path, "images.npy")
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(UserError, match=r"flat.npy: shape \(4,\) must be"):
        read_tile(tmp_path / "flat.npy")
    np.save(tmp_path / "many.npy", np.zeros((2, 4, 4, 3)))
    expected = "array of 2 tiles; give this file where a folder of tiles is meant, or read it as a "
    with pytest.raises(UserError, match=f"{expected}corpus with layout: array"):
        read_tile(tmp_path / "many.npy")
    np.save(tmp_path / "pickled.npy", np.array([{}, None], dtype=object))
    with pytest.raises(UserError, match=r"pickled.npy: unreadable"):
        read_tile(tmp_path / "pickled.npy")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "has no image files"),
        (["corpus", "--layout", "array"], "has no arrays"),
        (["corpus", "corpus"], "same folder twice"),
        (["corpus", "--min_size", "100"], "no tile is good"),
        (["corpus", "--group_level", "5"], "group_level=5"),
        (["corpus", "--group_regex", "("], "is no regular expression"),
    ],
)
def test_mistakes(corpus, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not Path("index.parquet").exists()


def test_an_index_is_called_parquet(corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"out.? .*\.csv: an index is a Parquet file; .* x\.parquet"
    ):
        index_corpus.main([str(corpus), "--out", str(tmp_path / "x.csv")])
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1nonsensePAR1"])
def test_a_file_that_is_no_index_is_named(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet was not written by"):
        CorpusIndex.read(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"y\.parquet does not exist"):
        CorpusIndex.read(tmp_path / "y.parquet")


def test_a_mistake_is_one_line_and_status_2(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: index_corpus.main([str(tmp_path / "none"), "--out", "x"]))
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    script = [sys.executable, str(ROOT / "scripts" / "index_corpus.py")]
    good = subprocess.run(
        [*script, str(corpus), "--out", str(tmp_path / "x.parquet")], capture_output=True, text=True
    )
    assert good.returncode == 0 and "14 of 14" in good.stderr, good.stderr
