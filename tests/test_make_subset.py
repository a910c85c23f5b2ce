"""Few-label subsets: by class, spread over groups, by seed, and no group on two sides."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.data.images import list_images
from ldm.data.subset import REST, SUBSET, UNUSED, Amount, Labelled, draw
from ldm.errors import UserError
from scripts import make_subset

ROOT = Path(__file__).resolve().parents[1]


def labelled(sizes: dict[str, dict[str, int]]) -> list[Labelled]:
    """Tiles by class and group: {class: {group: tiles}}."""
    return [
        Labelled(f"{name}/{group}_{i}.png", group)
        for name, groups in sizes.items()
        for group, count in groups.items()
        for i in range(count)
    ]


def both(number: int) -> dict[str, int]:
    return {"A": number, "B": number}


def chosen(tiles: list[Labelled], decisions: list[str], kind: str = SUBSET) -> list[Labelled]:
    return [tile for tile, decision in zip(tiles, decisions, strict=True) if decision == kind]


TILES = labelled(
    {
        "A": {"p1": 20, "p2": 3, "p3": 3, "p4": 4},
        "B": {"p1": 2, "p2": 8, "p5": 10, "p6": 20},
    }
)


def test_the_wanted_number_comes_of_every_class_and_of_many_groups():
    decisions = draw(TILES, both(8), seed=0, by_group=False)
    assert set(decisions) == {SUBSET, REST}
    taken = chosen(TILES, decisions)
    assert Counter(tile.label for tile in taken) == {"A": 8, "B": 8}
    # In turn: eight tiles of four groups are two of each, though p1 has two thirds of class A.
    of_group = Counter((tile.label, tile.group) for tile in taken)
    assert set(of_group.values()) == {2} and len(of_group) == 8


def test_a_small_group_gives_what_it_has():
    taken = chosen(TILES, draw(TILES, both(12), seed=1, by_group=False))
    of_group = Counter(tile.group for tile in taken if tile.label == "B")
    assert of_group["p1"] == 2 and sum(of_group.values()) == 12
    assert max(of_group.values()) - min(n for g, n in of_group.items() if g != "p1") <= 1


def test_the_seed_decides_and_the_order_of_tiles_does_not():
    def files(tiles: list[Labelled], seed: int) -> set[str]:
        return {tile.file for tile in chosen(tiles, draw(tiles, both(5), seed, by_group=False))}

    assert files(TILES, 0) == files(TILES[::-1], 0)
    assert len({frozenset(files(TILES, seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("seed", range(6))
def test_by_group_no_group_is_on_both_sides(seed):
    decisions = draw(TILES, both(3), seed, by_group=True)
    groups = {
        kind: {tile.group for tile in chosen(TILES, decisions, kind)}
        for kind in (SUBSET, REST, UNUSED)
    }
    assert not groups[SUBSET] & groups[REST] and not groups[UNUSED] & groups[REST]
    assert Counter(tile.label for tile in chosen(TILES, decisions)) == {"A": 3, "B": 3}
    # The plain draw of the same size does split groups, or this test could not fail.
    plain = draw(TILES, both(3), seed, by_group=False)
    assert {t.group for t in chosen(TILES, plain)} & {t.group for t in chosen(TILES, plain, REST)}


def test_a_fraction_is_of_each_class():
    tiles = labelled({"A": {"p1": 150}, "B": {"p1": 50}})
    assert Amount(0.1).wanted(tiles, {}) == {"A": 15, "B": 5}
    assert Amount(0.0001).wanted(tiles, {}) == {"A": 1, "B": 1}
    taken = chosen(tiles, draw(tiles, {"A": 60, "B": 60}, 0, False))
    assert Counter(tile.label for tile in taken) == {"A": 60, "B": 50}  # B has no more


# The command


@pytest.fixture
def data(tmp_path):
    """Two classes of six tiles each, from three patients that both classes share."""
    for k, name in enumerate(("ADI", "TUM")):
        for i in range(6):
            path = tmp_path / "train" / name / f"patient{i // 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 40 * k + i, np.uint8)).save(path)
    return tmp_path / "train"


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "subset.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(data: Path, out: Path, *more: str) -> None:
    make_subset.main(["--data", str(data), "--out", str(out), *more])


@pytest.mark.parametrize("link", ["copy", "hard", "symbolic"])
def test_command(data, tmp_path, link, capsys):
    out = tmp_path / "train5"
    run(data, out, "--per_class", "2", "--group_level", "2", "--by_group", "--link", link)
    files = [path.relative_to(out).as_posix() for path in list_images(out)]
    table = rows(out)
    assert sorted(files) == sorted(row["file"] for row in table if row["decision"] == SUBSET)
    assert len(files) == 4 and len(table) == 12
    assert all((out / file).read_bytes() == (data / file).read_bytes() for file in files)
    linked = [(out / file).is_symlink() or (out / file).stat().st_nlink > 1 for file in files]
    assert all(linked) == any(linked) == (link != "copy")
    sides = defaultdict(set)
    for row in table:
        sides[row["group"]].add(row["decision"])
    assert all(len(kinds & {SUBSET, REST}) == 1 for kinds in sides.values())
    printed = capsys.readouterr().out
    assert "4 of 12 tiles" in printed and "groups" in printed
    record = json.loads((out / "subset.json").read_text())
    assert record["counts"]["ADI"]["subset"] == 2 and record["settings"]["seed"] == 0

    before = os.stat(out).st_mtime_ns
    run(data, out, "--per_class", "2", "--group_level", "2", "--by_group", "--link", link)
    assert "there already" in capsys.readouterr().out and os.stat(out).st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        run(data, out, "--per_class", "2", "--seed", "1")


def test_groups_come_from_a_table_or_a_pattern(data, tmp_path):
    table = tmp_path / "groups.csv"
    files = [path.relative_to(data).as_posix() for path in list_images(data)]
    lines = [f"train,{file},S{file.split('/')[1][-1]}\n" for file in files]
    table.write_text("".join(["split,file,slide\n", *lines, f"val,{files[0]},another\n"]))
    run(
        data, tmp_path / "a", "--fraction", "0.34", "--group_csv", str(table),
        "--group_column", "slide", "--group_rows", "split=train",
    )  # fmt: skip
    run(data, tmp_path / "b", "--fraction", "0.34", "--group_regex", r"patient(\d)")
    assert {row["group"] for row in rows(tmp_path / "a")} == {"S0", "S1", "S2"}
    assert {row["group"] for row in rows(tmp_path / "b")} == {"0", "1", "2"}
    assert len(list_images(tmp_path / "a")) == len(list_images(tmp_path / "b")) == 4


def included(tmp_path, data, files):
    """A folder of some tiles of `data`, under other names."""
    for file in files:
        target = tmp_path / "labelled" / file.split("/")[0] / f"mine_{Path(file).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / file, target)
    return tmp_path / "labelled"


FEW = ["ADI/patient0/0.png", "ADI/patient0/1.png", "TUM/patient1/2.png", "TUM/patient1/3.png"]


@pytest.mark.parametrize(
    "amount", [("--ratio", "100"), ("--per_class", "4"), ("--fraction", "0.6")]
)
def test_a_ceiling_has_the_labelled_tiles_and_as_many_others(data, tmp_path, amount, capsys):
    few, out = included(tmp_path, data, FEW), tmp_path / "ceiling"
    run(data, out, *amount, "--include", str(few), "--group_level", "2")
    assert "4 tiles of" in capsys.readouterr().out
    contents = [path.read_bytes() for path in list_images(out)]
    assert len(contents) == 8 == len(set(contents)), "twice as many, and none of them twice"
    assert {path.read_bytes() for path in list_images(few)} <= set(contents)
    record = json.loads((out / "subset.json").read_text())
    assert record["included"] == record["drawn"] == {"ADI": 2, "TUM": 2}
    # Patients that gave nothing yet come first.
    drawn = [r["file"] for r in rows(out) if r["decision"] == SUBSET and r["file"] not in FEW]
    assert Counter(file.rsplit("/", 1)[0] for file in drawn) == {
        "ADI/patient1": 1, "ADI/patient2": 1, "TUM/patient0": 1, "TUM/patient2": 1
    }  # fmt: skip
    # The bad version, without --include: some of its tiles are those that are there already.
    run(data, tmp_path / "bad", "--per_class", "4", "--group_level", "2")
    bad = {path.read_bytes() for path in list_images(tmp_path / "bad")}
    assert len(bad - {path.read_bytes() for path in list_images(few)}) < 8
    shutil.copy(data / "ADI/patient2/5.png", few / "ADI/mine_0.png")
    with pytest.raises(UserError, match="other settings"):
        run(data, out, *amount, "--include", str(few), "--group_level", "2")


def test_a_ceiling_by_group_keeps_groups_on_one_side(data, tmp_path):
    few, out = included(tmp_path, data, FEW[:1] + FEW[2:3]), tmp_path / "ceiling"
    more = ("--ratio", "100", "--group_level", "2", "--by_group")
    run(data, out, *more, "--include", str(few))
    sides = defaultdict(set)
    for row in rows(out):
        sides[row["group"]].add(row["decision"])
    assert all(len(kinds & {SUBSET, REST}) == 1 for kinds in sides.values())
    # Tiles of the patients that are in the subset anyway, so one patient is left for the rest.
    assert sides["patient2"] == {REST} and len(list_images(out)) == 4


def test_files_of_one_name_and_other_contents_are_both_kept(data, tmp_path):
    few, out = tmp_path / "labelled", tmp_path / "ceiling"
    for name in ("ADI", "TUM"):
        for i in range(6):
            path = few / name / f"patient{i // 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 200 + i, np.uint8)).save(path)
    run(data, out, "--ratio", "100", "--include", str(few))
    names = [path.name for path in list_images(out)]
    assert len(names) == 24 and sum(name.startswith("more_") for name in names) == 12


def test_what_is_missing_of_a_ceiling_is_reported(data, tmp_path, caplog):
    few = included(tmp_path, data, FEW)
    run(data, tmp_path / "out", "--ratio", "300", "--include", str(few))
    assert "fewer tiles than wanted: ADI 4 of 6, TUM 4 of 6" in caplog.text
    with pytest.raises(UserError, match="lies in [-`]*include`?"):
        run(data, few / "more", "--ratio", "100", "--include", str(few))
    with pytest.raises(UserError, match=r"differ from the classes .*TUM"):
        shutil.rmtree(few / "TUM")
        run(data, tmp_path / "other", "--ratio", "100", "--include", str(few))


def test_what_is_missing_is_reported(data, tmp_path, caplog):
    run(data, tmp_path / "all", "--per_class", "7")
    assert "fewer tiles than wanted: ADI 6 of 7, TUM 6 of 7" in caplog.text
    assert "no tile is left" in caplog.text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--by_group"], "--by_group"),
        (["--group_level", "3"], "group_level=3"),
        (["--group_regex", "patient"], "needs parentheses"),
        (["--group_regex", "(nurse)"], "does not match ADI/patient0/0.png"),
        (["--group_csv", "none.csv"], "none.csv does not exist"),
        (["--group_csv", "empty.csv"], "must have path (or file) and group"),
        (["--group_csv", "short.csv"], "has no group for ADI/patient0/1.png"),
        (["--group_csv", "twice.csv"], "a.png is in group x and in y"),
        (["--group_csv", "twice.csv", "--group_rows", "split=1"], "group_rows='split=1': write"),
        (["--group_csv", "twice.csv", "--group_rows", "path"], "group_rows='path': write"),
        (["--out", "train/sub"], "lies in --data"),
        (["--out", "other"], "was not made by this command"),
        (["--data", "empty"], "no class folders"),
        (["--data", "none"], "does not exist"),
    ],
)
def test_mistakes(data, tmp_path, monkeypatch, more, text):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "other"):
        os.mkdir(name)
    Path("other/file").touch()
    Path("empty.csv").touch()
    Path("short.csv").write_text("path,group\nADI/patient0/0.png,x\n")
    Path("twice.csv").write_text("path,group\na.png,x\na.png,y\n")
    with pytest.raises(UserError) as error:
        run(data, tmp_path / "out", "--per_class", "2", *more)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_and_status_2(data, tmp_path, capsys):
    words = ["--data", str(data), "--out", str(tmp_path / "out")]
    for more in (
        ["--fraction", "0"],
        ["--fraction", "1.5"],
        ["--ratio", "100"],
        [],
        ["--per_class", "1", "--by_group"],
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda more=more: make_subset.main([*words, *more]))
        assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    script = [sys.executable, str(ROOT / "scripts" / "make_subset.py")]
    assert subprocess.run([*script, *words, "--per_class", "1"]).returncode == 0
