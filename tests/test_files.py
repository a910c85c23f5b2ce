"""How files and folders reach the disk: permissions, threads, a full disk, what a kill leaves."""

import errno
import os
import resource
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import files
from ldm.checkpoint import write_checkpoint
from ldm.data.folders import build_folder
from ldm.errors import UserError


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_of_files_and_folders_follow_the_umask(umask, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("a")
    source.chmod(0o600)
    files.write_json(tmp_path / "new" / "a.json", {})
    files.write_png(tmp_path / "new" / "a.png", np.zeros((2, 2, 3), np.uint8))
    write_checkpoint(tmp_path / "new" / "a.ckpt", {"global_step": 1})
    build_folder(tmp_path / "built", {"A/a.txt": source}, {"note.txt": "b"})
    for path in [tmp_path / "new", tmp_path / "built", tmp_path / "built" / "A"]:
        assert permissions(path) == 0o777 & ~umask, path
    written = [*(tmp_path / "new").iterdir(), *(p for p in (tmp_path / "built").rglob("*.txt"))]
    assert len(written) == 5
    for path in written:
        assert permissions(path) == 0o666 & ~umask, path


def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    """It belongs to all threads: while one writes tiles, another's file must stay private."""

    def touched(mask: int) -> int:
        raise AssertionError(f"umask was set to {mask:o}")

    tile = np.zeros((8, 8, 3), np.uint8)
    before = os.umask(0o077)
    try:
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            patch.setattr(os, "umask", touched)
            stop = threading.Event()

            def write_tiles() -> None:
                number = 0
                while not stop.is_set() or number == 0:
                    files.write_png(tmp_path / "tiles" / f"{number}.png", tile)
                    number += 1

            writer = pool.submit(write_tiles)
            others = [tmp_path / f"{number}.txt" for number in range(200)]
            for path in others:
                path.write_text("of another thread")
            stop.set()
            writer.result()
    finally:
        os.umask(before)
    assert {permissions(path) for path in others} == {0o600}


def test_threads_that_write_the_same_file_leave_one_of_their_contents(tmp_path):
    path = tmp_path / "a.bin"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.write_bytes(path, content), contents * 4))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_or_folder(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        raise RuntimeError
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "a.txt").write_text("new")
        assert not (tmp_path / "folder").exists()
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def limited(size: int, write) -> None:
    """Call `write` in a child whose files may not grow beyond `size` bytes, as on a full disk."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write()
        except UserError as error:
            os.write(2, str(error).encode())
            status = 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


@pytest.mark.parametrize("write", [files.write_bytes, lambda p, c: files.write_text(p, c.decode())])
def test_a_full_disk_leaves_the_old_file(write, tmp_path, capfd):
    """A limit on the size of files stands for the disk; in a child, since it cannot be raised."""
    path = tmp_path / "a.txt"
    write(path, b"old")
    limited(1000, lambda: write(path, b"x" * 100_000))
    message = capfd.readouterr().err
    assert str(path) in message and "untouched" in message and "\n" not in message
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_this_and_of_earlier_versions_are_removed_and_nothing_else(tmp_path):
    left = [".last.ckpt.0123456789abcdef.part", ".last.ckpt.a8b_c9de", ".a1b2c3d4.png.part"]
    left += [
        ".000001.png.part",
        ".shard-000000.tar.part",
        ".tiles.json.part",
        ".manifest.json.abcdefgh",
    ]
    left += [".train.parquet.abcdefgh", ".000000.safetensors.abcdefgh", ".README.md.abcdefgh"]
    kept = [
        "last.ckpt",
        ".corpus.parquet.scan",
        ".gitignore",
        ".notes.json",
        "a.part",
        ".x.json.original.bak",
    ]
    for name in left + kept:
        (tmp_path / name).write_bytes(b"")
    folder = files.temporary_path(tmp_path / "train5")
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert {path.name for path in files.remove_leftovers(tmp_path)} == {*left, folder.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_leftovers_of_a_target_lie_beside_it(tmp_path):
    """Of a killed command that made a folder (half a copy), or a file among those of others."""
    ours = [files.temporary_path(tmp_path / name) for name in ("train5", "a.json")]
    ours[0].mkdir()
    (ours[0] / "a.txt").write_text("half")
    ours[1].write_text("half")
    others = [files.temporary_path(tmp_path / "train50"), tmp_path / ".train5.features"]
    for path in others:
        path.write_text("of another command, which may be running")
    assert files.remove_leftovers(tmp_path / "a.json") == [ours[1]]
    with files.atomic_folder(tmp_path / "train5"):
        assert not ours[0].exists()
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "train5"])


def entries_of(path: Path) -> list:
    found: list = []
    files.read_journal(path, lambda entry: found.append(entry["n"]))
    return found


def test_a_journal_loses_its_torn_last_line_and_names_damaged_ones(tmp_path, caplog):
    path = tmp_path / "new" / "j.jsonl"
    for start in range(2):
        with files.Journal(path) as journal:
            for number in range(2):
                journal.add({"n": 10 * start + number})
        with path.open("a") as stream:
            stream.write('{"n": 99')  # killed
        assert entries_of(path) == [0, 1, 10, 11][: 2 * start + 2]
    assert not caplog.records
    lines = path.read_bytes().splitlines()[:4]
    damaged = [b'{"n": 2', b"\xff\0", b"[]", b'{"m": 3}', b"", b'"n"']
    path.write_bytes(b"\n".join([*lines[:2], *damaged, *lines[2:]]) + b"\n")
    assert entries_of(path) == [0, 1, 10, 11]
    named = [record.getMessage() for record in caplog.records]
    assert [f"line {n} is damaged" in text for n, text in zip((3, 4, 5, 6, 8), named, strict=True)]


def test_a_journal_on_a_full_disk_keeps_whole_lines(tmp_path, capfd):
    """The system writes a part of a line first, and says that the disk is full only then."""
    path = tmp_path / "j.jsonl"

    def fill() -> None:
        with files.Journal(path) as journal:
            for number in range(1000):
                journal.add({"n": number})

    limited(1000, fill)
    message = capfd.readouterr().err
    assert f"{path} cannot be written" in message and "\n" not in message
    content = path.read_bytes()
    assert 980 < len(content) <= 1000 and content.endswith(b"\n")
    with files.Journal(path) as journal:
        journal.add({"n": -1})
    assert entries_of(path) == [*range(content.count(b"\n")), -1]


def test_a_png_holds_the_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    files.write_png(tmp_path / "a" / "b.png", pixels)
    with Image.open(tmp_path / "a" / "b.png") as image:
        assert image.format == "PNG" and np.array_equal(np.array(image), pixels)


def test_a_place_that_knows_no_locks(tmp_path, monkeypatch):
    """Who would wait goes on without the lock; who must not wait is told."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.lock_file(tmp_path / "lock", wait=True) as lock:
        assert lock is None
    with pytest.raises(OSError, match="not implemented"), files.lock_file(tmp_path / "lock"):
        pass
