"""Folders that commands make: gone on with, left alone, or refused with what differs."""

import json

import pytest

from ldm.errors import UserError
from ldm.run import MadeFolder, differences

SETTINGS = {"seed": 0, "classes": ["A", "B"], "splits": {"train": {"tiles": 5}}, "clip": None}


def made(path, **changes) -> MadeFolder:
    return MadeFolder(path, {**SETTINGS, **changes}, "record.json", name="outdir")


@pytest.mark.parametrize("key", ["settings", None])
def test_a_folder_is_free_then_begun_then_known(key, tmp_path):
    folder = MadeFolder(tmp_path / "out", SETTINGS, "record.json", key)
    assert not folder.exists()
    folder.begin()
    assert folder.exists() and MadeFolder(tmp_path / "out", SETTINGS, "record.json", key).exists()
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record == (SETTINGS if key is None else {"settings": SETTINGS})


def test_a_later_start_keeps_the_record_and_clears_leftovers(tmp_path):
    folder = made(tmp_path)
    folder.begin({"models": 1})
    left = tmp_path / ".a.png.0123456789abcdef.part"
    left.touch()
    folder.begin({"models": 2}, alone=False)
    assert left.exists()
    folder.begin({"models": 2})
    assert not left.exists() and folder.read() == {"settings": SETTINGS, "models": 1}
    assert (
        folder.write_record({"models": 2}) == folder.read() == {"settings": SETTINGS, "models": 2}
    )


def test_what_a_killed_process_left_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".record.json.a8b_c9de").touch()
    assert not made(tmp_path).exists()


def test_other_settings_are_named_key_by_key(tmp_path):
    made(tmp_path).begin()
    other = made(tmp_path, seed=1, splits={"train": {"tiles": 5, "views": 8}}, clip=0.5)
    with pytest.raises(UserError) as caught:
        other.exists()
    message = str(caught.value)
    assert message.startswith(f"outdir={tmp_path} was made with other settings (")
    for change in ("clip None there, 0.5 now", "seed 0 there, 1 now"):
        assert change in message
    assert "splits.train.views None there, 8 now" in message
    assert "classes" not in message and "tiles" not in message and "\n" not in message


@pytest.mark.parametrize("content", ["{", "[]", '"a"', '{"settings": 1}', '{"other": {}}'])
def test_a_damaged_record_is_refused(content, tmp_path):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json is damaged"):
        made(tmp_path).exists()
    assert (tmp_path / "record.json").read_text() == content


def test_other_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and was not made by this command"):
        made(tmp_path).exists()
    with pytest.raises(UserError, match="notes.txt is a file"):
        made(tmp_path / "notes.txt").exists()


def test_an_option_that_came_later_has_its_default():
    before, now = {"lr": 1e-3}, {"lr": 1e-3, "ema": 0.99}
    assert differences(before, now) == ["ema None there, 0.99 now"]
    assert differences(before, now, {"ema": 0.99, "lr": 5}) == []


def test_values_are_compared_as_json_gives_them_back_and_long_ones_are_cut():
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    (change,) = differences({"sha256": "a" * 64}, {"sha256": "b" * 64})
    assert change == "sha256 aaaaaaaaaaaa... there, bbbbbbbbbbbb... now"
