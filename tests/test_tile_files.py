"""The list of image files under every set of tiles: order, classes, digests."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from ldm.data.tile_files import OVERVIEW, TileFiles
from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.files import write_png


@pytest.fixture
def root(tmp_path) -> Path:
    for number, name in enumerate(["B/b.png", "A/z.png", "A/deep/a.png", "B/copy.png"]):
        write_png(tmp_path / name, np.full((8, 8, 3), min(number, 2), np.uint8))
    (tmp_path / "B" / "copy.png").write_bytes((tmp_path / "B" / "b.png").read_bytes())
    return tmp_path


NAMES = ["A/deep/a.png", "A/z.png", "B/b.png", "B/copy.png"]


def test_order_and_classes_are_those_of_training(root):
    files = TileFiles.below(root)
    tiles = TileFolder(root, 8, labelled=True)
    assert files.names == tiles.relative_paths == NAMES and files.paths == tiles.paths
    assert files.labels == tiles.labels == [0, 0, 1, 1] and files.classes == tiles.classes
    assert files.class_names == ["A", "A", "B", "B"] and files.counts == {"A": 2, "B": 2}
    assert TileFiles.below(root, classes=["B", "A"]).names == [*NAMES[2:], *NAMES[:2]]
    plain = TileFiles.below(root, labelled=False)
    assert plain.names == NAMES and plain.labels == [-1] * 4
    assert plain.classes == plain.class_names == [] and plain.counts == {}


def test_digests_are_those_that_earlier_versions_recorded(root):
    files = TileFiles.below(root)
    hashes = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in NAMES]
    assert files.digests == hashes

    def of(lines) -> str:
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    pairs = list(zip(NAMES, hashes, strict=True))
    assert files.listing == of(f"{digest} {name}\n" for name, digest in pairs)
    assert files.digest == of(f"{name}\0{digest}\n" for name, digest in pairs)
    assert files.inclusion == of(f"{name} {digest}\n" for name, digest in pairs)
    other = TileFiles.below(root, classes=["B", "A"])
    assert other.digest == files.digest and other.listing != files.listing


def test_a_stamp_changes_with_the_files_and_with_nothing_else(root):
    files = TileFiles.below(root)
    stamp = files.stamp()
    (root / "notes.txt").touch()
    assert TileFiles.below(root).stamp() == stamp
    path = root / "A" / "z.png"
    state, content = os.stat(path), path.read_bytes()
    path.write_bytes(bytes(reversed(content)))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as large and as old as before
    assert files.stamp() != stamp


def test_selected_and_distinct_files(root):
    files = TileFiles.below(root)
    assert files.distinct().names == NAMES[:3]
    chosen = files.select([3, 0], "some")
    assert chosen.names == [NAMES[3], NAMES[0]] and chosen.labels == [1, 0]
    assert chosen.part == "some" and files.part == "all" and len(chosen) == 2
    for path in files.paths:
        path.write_bytes(b"")
    assert chosen.digests == [files.digests[3], files.digests[0]], "known, not read again"


def test_folders_with_or_without_classes(root):
    (root / OVERVIEW).touch()
    (root / "EMPTY").mkdir()
    assert TileFiles.if_classes(root, "fake").names == NAMES
    assert TileFiles.if_classes(root, "fake").classes == ["A", "B"]
    (root / "A" / OVERVIEW).touch()
    flat = TileFiles.if_classes(root / "B", "fake")
    assert flat.names == ["b.png", "copy.png"] and flat.classes == []
    with pytest.raises(UserError, match="fake: .*EMPTY has no images"):
        TileFiles.if_classes(root / "EMPTY", "fake")


def test_what_cannot_be_a_labelled_set(root):
    with pytest.raises(UserError, match=r"missing \['C'\], extra \['B'\]"):
        TileFiles.below(root, classes=["A", "C"])
    with pytest.raises(UserError, match="no class folders"):
        TileFiles.below(root / "B")
    with pytest.raises(UserError, match="does not exist"):
        TileFiles.below(root / "C")
    (root / "C").mkdir()
    with pytest.raises(UserError, match="class folder .*C has no images"):
        TileFiles.below(root)
