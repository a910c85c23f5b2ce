"""Tar shards of an indexed corpus: the same tiles, readable by others, resumed, checked."""

import csv
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds
from test_index_corpus import picture, save

from ldm.cli import parse
from ldm.commands import index as index_corpus
from ldm.commands import shards as write_shards
from ldm.data.corpora import Corpora
from ldm.data.images import decode_tile
from ldm.data.index import CorpusIndex
from ldm.data.shards import NAME, CorpusShards, write_tar
from ldm.data.storage import LAYOUTS
from ldm.errors import UserError

SIZE = 41_000  # bytes; four shards of the corpus below


@pytest.fixture
def corpus(tmp_path):
    """Two patients in two classes, awkward names, and two tiles that the index leaves out."""
    root = tmp_path / "corpus"
    names = (
        "A/p0/1.png",
        "A/p0/1.jpg",
        "A/p0/x.1.png",
        "A/p0/x.2.png",
        "A/p0/x_2.png",
        "B/p1/1.png",
    )
    names += (
        "A/p0/" + 120 * "long" + ".png",
        "B/p1/ü.tif",
        "B/p1/9.WEBP",
        "B/p1/deep/1.png",
        "loose.png",
    )
    for i, name in enumerate(names):
        name = name.replace(120 * "long", 30 * "long")
        save(root / name, picture(i, 40))
    np.save(root / "B" / "p1" / "array.npy", picture(20, 40) / 255.0)
    (root / "white.txt").write_text("1")
    shutil.copy(root / "A" / "p0" / "1.png", root / "B" / "p1" / "copy.png")
    (root / "B" / "broken.png").write_text("hello")
    return root


def index_of(root, *options):
    out = root.parent / f"{root.name}.parquet"
    index_corpus.main([str(root), "--out", str(out), "--workers", "2", *options])
    return out


@pytest.fixture
def index(corpus):
    table = corpus.parent / "groups.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "group"))
        for path in sorted(corpus.rglob("*.*")):
            name = path.relative_to(corpus).as_posix()
            writer.writerow((name, name.split("/")[1] if "/" in name else "loose"))
    return index_of(corpus, "--group_csv", str(table))


def write(index, out, *options, size=SIZE):
    words = [str(index), "--out", str(out), "--size", str(size), "--workers", "2"]
    write_shards.main([*words, *map(str, options)])
    return CorpusIndex.read(out.with_name(f"{out.name}.parquet"))


def tiles_of(root, layout, index):
    """Pixels by hash of the pixels, with label and group, through the reader of training."""
    found = Corpora({"c": {"root": root, "layout": layout, "index": index}}, size=40, check=False)
    groups = [group.split("/", 1)[1] for group in found.groups]
    return {
        found.read(i).tobytes(): (found.labels[i], groups[i]) for i in range(len(found))
    }, CorpusIndex.read(index).tiles(0)


def test_training_reads_the_same_tiles_from_shards(corpus, index, tmp_path, capsys):
    out = tmp_path / "shards"
    made = write(index, out)
    assert len(list(out.glob("shard-*.tar"))) == 4 and "4 written" in capsys.readouterr().out
    for path in out.glob("*.tar"):
        alone = len(LAYOUTS["shards"].places(out, path.name)) == 1  # the array is larger by itself
        assert path.stat().st_size <= SIZE or alone
    before, old = tiles_of(corpus, "folder", index)
    after, new = tiles_of(out, "shards", made.path)
    assert before == after and len(after) == 12  # not the copy, not the broken one
    key = {old["path"][i]: (old["label"][i], old["group"][i]) for i in range(12)}
    stored = {
        new["path"][i].split("/", 1)[1]: (new["label"][i], new["group"][i]) for i in range(12)
    }
    # Labels and groups; a dot in a name would end the key, and keys must differ.
    assert stored["A/p0/x_1.png"] == key["A/p0/x.1.png"] == ("A", "p0")
    assert {"A/p0/x_2.png", "A/p0/x_2_2.png", "A/p0/1_2.png", "B/p1/9.webp"} <= set(stored)
    assert stored["loose.png"] == (None, "loose")
    assert sorted(stored.values(), key=str) == sorted(key.values(), key=str)


def test_the_index_of_the_shards_is_that_of_a_scan(index, tmp_path):
    """Offsets, hashes and sizes are what scripts/index_corpus.py finds in the shards."""
    made = write(index, tmp_path / "shards")
    again = CorpusIndex.read(index_of(tmp_path / "shards", "--layout", "shards"))
    ours, theirs = made.table.to_pylist(), again.table.to_pylist()
    for row, scanned in zip(ours, theirs, strict=True):
        labelled = row["label"] is not None or "/" not in row["path"].split("/", 1)[1]
        assert labelled
        assert {k: v for k, v in row.items() if k != "group"} == {
            k: v for k, v in scanned.items() if k != "group"
        }
    assert list(made.folders) == list(again.folders)


def test_webdataset_reads_them(index, tmp_path):
    write(index, tmp_path / "shards")
    files = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = list(wds.WebDataset(files, shardshuffle=False))
    assert len(samples) == 12 and len({sample["__key__"] for sample in samples}) == 12
    labels = [sample["cls"].decode() for sample in samples if "cls" in sample]
    assert sorted(labels) == ["A"] * 6 + ["B"] * 5
    png = next(sample for sample in samples if sample["__key__"] == "A/p0/1_2")
    assert np.array_equal(decode_tile(png["png"], "1.png"), picture(0, 40))


def test_same_bytes_again_and_without_metadata(index, tmp_path):
    write(index, tmp_path / "one")
    write(index, tmp_path / "other", "--workers", 1)
    for path in (tmp_path / "one").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
        with tarfile.open(path) as archive:
            assert {(m.mtime, m.uid, m.uname) for m in archive} == {(0, 0, "")}


def test_interrupted_then_resumed(index, tmp_path, monkeypatch, capsys):
    """What is whole is kept; what is torn is made again; nothing partial has a shard's name."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(index, whole)
    read, calls = CorpusShards._read, []

    def killed(self, row):
        calls.append(row)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return read(self, row)

    monkeypatch.setattr(CorpusShards, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        write(index, out, "--workers", 1)
    monkeypatch.setattr(CorpusShards, "_read", read)
    kept = sorted(out.glob("*.tar"))
    assert 1 <= len(kept) < 4 and not out.with_name("out.parquet").exists()
    assert not list(out.glob(".*"))
    (out / ".shard-000003.tar.part").write_bytes(b"of a run that was killed outright")
    times = {path: path.stat().st_mtime_ns for path in kept}
    capsys.readouterr()
    write(index, out)
    assert f"{len(kept)} were there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert [p.read_bytes() for p in sorted(out.glob("*.tar"))] == [
        p.read_bytes() for p in sorted(whole.glob("*.tar"))
    ]
    assert not list(out.glob(".*"))


def test_damaged_shards_are_written_again(index, tmp_path, capsys, caplog):
    out = tmp_path / "shards"
    write(index, out)
    contents = {path: path.read_bytes() for path in out.glob("*.tar")}
    cut, flipped = out / NAME.format(0), out / NAME.format(2)
    cut.write_bytes(contents[cut][:-11_000])
    place = LAYOUTS["shards"].places(out, flipped.name)[0]
    with flipped.open("r+b") as stream:
        stream.seek(place.offset + place.size // 2)
        stream.write(b"\xff\x00\xff\x00")
    capsys.readouterr()
    write(index, out)  # a look at the members finds the first only
    assert "1 written, 3 were there" in capsys.readouterr().out and str(cut) in caplog.text
    assert flipped.read_bytes() != contents[flipped]
    write(index, out, "--verify")
    assert "1 written, 3 were there" in capsys.readouterr().out and str(flipped) in caplog.text
    assert {path: path.read_bytes() for path in out.glob("*.tar")} == contents


def test_arrays_become_images(tmp_path, capsys):
    """The pixels that training sees, also of PanNuke's floats, with labels and rows as names."""
    root = tmp_path / "pannuke"
    for fold, scale in (("fold1", 1.0), ("fold2", 255.0)):
        (root / fold).mkdir(parents=True)
        tiles = np.stack([picture(i + int(scale), 24) for i in range(3)])
        np.save(root / fold / "images.npy", tiles / (255.0 / scale))
        np.save(root / fold / "types.npy", np.array(["Breast", "Colon", "Breast"]))
    index = index_of(root, "--layout", "array")
    made = write(index, tmp_path / "shards", size=6_000)
    before, old = tiles_of_size(root, "array", index)
    after, new = tiles_of_size(tmp_path / "shards", "shards", made.path)
    assert before == after and len(after) == 6 and sorted(old["label"]) == sorted(new["label"])
    names = [path.split("/", 1)[1] for path in new["path"]]
    assert "fold1/images.npy/000002.png" in names
    written = [path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")]
    write(index, tmp_path / "shards", "--verify", size=6_000)
    assert written == [path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")]
    assert CorpusIndex.read(made.path).table == made.table


def tiles_of_size(root, layout, index):
    found = Corpora({"c": {"root": root, "layout": layout, "index": index}}, size=24, check=False)
    return sorted(found.read(i).tobytes() for i in range(len(found))), CorpusIndex.read(
        index
    ).tiles(0)


def test_several_roots_share_shards(tmp_path):
    """Tiles of the same name, one per root; the corpus is mounted elsewhere than when scanned."""
    for i, name in enumerate(("one", "two")):
        save(tmp_path / name / "A" / "1.png", picture(i))
    index = tmp_path / "index.parquet"
    roots = [str(tmp_path / name) for name in ("one", "two")]
    index_corpus.main([*roots, "--out", str(index), "--workers", "1"])
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    made = write(index, tmp_path / "out", "--root", *(f"{root}-moved" for root in roots))
    assert made.tiles(0)["path"] == [f"{NAME.format(0)}/{i}/A/1.png" for i in (0, 1)]
    with pytest.raises(UserError, match="root.*one does not exist"):
        write(index, tmp_path / "out2")


def refused(words, *arguments, **options):
    with pytest.raises(UserError, match=words) as caught:
        write(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_refusals(corpus, index, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    refused("would replace", shutil.copy(index, tmp_path / "twin.parquet"), tmp_path / "twin")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused("was not made by this command .it has no shards.json", index, tmp_path / "other")
    refused("is a file", index, tmp_path / "groups.csv")
    write(index, out)
    refused("other settings .*size 41000 there, 50000 now", index, out, size=50_000)
    monkeypatch.setattr("ldm.files.free_space", lambda _: 1000)
    refused("its disk has 0.0 MB free", index, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.tar"))
    monkeypatch.undo()
    # A tile that changed without its time or size: the scan's sample would have to hit it.
    path = corpus / "A" / "p0" / "1.png"
    state, content = path.stat(), bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    refused("1.png is not what was indexed", index, tmp_path / "changed")
    assert not list((tmp_path / "changed").glob("*.tar"))
    path.unlink()
    refused("does not fit", index, tmp_path / "gone")


def test_sizes_and_dry_run(index, tmp_path, capsys):
    write_shards.main([str(index), "--out", str(tmp_path / "x"), "--dry-run"])
    assert "12 tiles in 1 shards" in capsys.readouterr().out and not (tmp_path / "x").exists()
    assert [write_shards.size_in_bytes(text) for text in ("1G", "1.5mb", "20")] == [
        10**9,
        1500000,
        20,
    ]
    for text in ("0", "1X", "-1G", "", "G"):
        with pytest.raises(UserError, match="size: .* is not a size"):
            parse(write_shards.Options, [str(index), "--out", "x", f"--size={text}"])


def test_write_tar_holds_members_of_any_name():
    stream = io.BytesIO()
    members = [("a.png", b"x" * 700), ("long/" * 40 + "b.png", b""), ("c/d.cls", b"y" * 512)]
    write_tar(stream, members)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        assert [(m.name, archive.extractfile(m).read()) for m in archive] == members
