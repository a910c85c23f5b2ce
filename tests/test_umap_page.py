"""The interactive picture: its data, its thumbnails, and that nothing in a name can break it."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import COLOURS, tiles

from ldm.errors import UserError
from ldm.selection.projection import Points, by_decision
from ldm.selection.umap_page import choose_evenly, render

CLASSES = list(COLOURS)


def points(kind: str, per_class: list[int], prefix: str = "") -> Points:
    labels = [k for k, n in enumerate(per_class) for _ in range(n)]
    files = [f"{CLASSES[k]}/{prefix}{i}.png" for k, n in enumerate(per_class) for i in range(n)]
    xy = np.random.default_rng(len(labels)).normal(size=(len(labels), 2))
    return Points(kind, labels, files if kind != "centroid" else (), xy)


def points_of(text: str) -> list[dict]:
    """Kind, class, file and picture of each point in a page."""
    found = re.search(r'<script type="application/json" id="points">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


def test_thumbnails_are_the_tiles_of_their_points(tmp_path):
    real, fake = tiles(tmp_path / "real", 3), tiles(tmp_path / "fake", 4, seed=1)
    groups = [
        points("real", [3, 3, 3], "0_"),
        points("synthetic", [4, 4, 4], "1_"),
        points("centroid", [1, 1, 1]),
    ]
    roots = {"real": real, "synthetic": fake}
    text = render(groups, CLASSES, roots, 100, "A < B")
    assert "<title>A &lt; B</title>" in text
    data = points_of(text)
    assert [bool(point["picture"]) for point in data] == [True] * 21 + [False] * 3
    for i in (0, 8, 9, 20):
        point = data[i]
        head, _, body = point["picture"].partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(body))) as image:
            assert image.size == (32, 32)
            seen = np.asarray(image.convert("RGB"), dtype=float)
        with Image.open(roots[point["kind"]] / point["file"]) as image:
            written = np.asarray(image, dtype=float)
        # Lossy, yet it is this tile: its colour is the class's, and so is its pattern.
        assert abs(seen.mean((0, 1)) - written.mean((0, 1))).max() < 4
        assert np.corrcoef(seen.mean(2).ravel(), written.mean(2).ravel())[0, 1] > 0.8
        assert abs(seen.mean((0, 1)) - np.array(COLOURS[point["label"]])).max() < 15
    number = re.compile(r'"p\d+"')  # bokeh counts the parts of all pages of a process
    assert number.sub("", render(groups, CLASSES, roots, 100, "A < B")) == number.sub("", text)
    assert "8 of 21 tiles are in this file" in (few := render(groups, CLASSES, roots, 8, ""))
    assert sum(bool(point["picture"]) for point in points_of(few)) == 8
    none = points_of(render(groups, CLASSES, roots, 0, ""))
    assert not any(point["picture"] for point in none)
    (fake / "TUM" / "1_3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"TUM/1_3.png: unreadable"):
        render(groups, CLASSES, roots, 100, "")


def test_thumbnails_are_chosen_evenly():
    groups = [points("real", [100, 2, 50]), points("accepted", [0, 30, 0])]
    chosen = choose_evenly(groups, 62)
    assert chosen == sorted(set(chosen)) and len(chosen) == 62
    counts = [sum(a <= i < b for i in chosen) for a, b in [(0, 100), (100, 102), (102, 152)]]
    assert counts == [20, 2, 20]
    assert sum(i >= 152 for i in chosen) == 20
    assert {0, 99} <= set(chosen)  # spread from the first to the last
    assert choose_evenly(groups, 1000) == list(range(182))
    assert choose_evenly(groups, 0) == []
    assert len(choose_evenly(groups, 3)) <= 3


def test_names_cannot_end_the_script(tmp_path):
    evil = "</script><script>alert(1)</script>"
    group = Points("real", [0, 0, 0], [f"A/{evil}", "A/b", "A/c"], np.zeros((3, 2)))
    text = render([group], [evil], {"real": tmp_path}, 0, evil)
    plain = render([group], ["A"], {"real": tmp_path}, 0, "plain")
    assert text.count("</script>") == plain.count("</script>") and "<script>alert" not in text
    assert (points_of(text)[0]["file"], points_of(text)[0]["label"]) == (f"A/{evil}", evil)


def test_synthetic_points_by_decision():
    decisions = {"a": "rejected", "b": "accepted", "c": "rejected", "d": "surplus", "e": "removed"}
    xy = np.arange(10.0).reshape(5, 2)
    groups = by_decision([0, 1, 2, 0, 1], ["a", "b", "c", "d", "e"], xy, decisions)
    assert [(g.kind, g.files) for g in groups] == [
        ("accepted", ["b"]),
        ("surplus", ["d"]),
        ("rejected", ["a", "c"]),
        ("removed", ["e"]),
    ]
    assert groups[2].xy.tolist() == [[0, 1], [4, 5]]
    assert groups[2].labels == [0, 2]
