"""Devices, precision and arguments of a run."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from ldm import cli
from ldm.devices import Devices, cpu_computes_bf16, parse_gpus, training_devices, within_memory
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("0,1", [0, 1]), ("2", 2), ("0,", [0]), ("3,", [3]), ("-1", -1), ("1,0,2", [1, 0, 2])],
)
def test_gpus_mean_what_they_meant_in_lightning_1(text, meaning):
    assert parse_gpus(text) == meaning


@pytest.mark.parametrize("text", ["a", "0,0", ",", "-2", "1.5", "0,-1"])
def test_bad_gpus(text):
    with pytest.raises(UserError, match="gpus"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        ("0,1", None, Devices("gpu", [0, 1])),
        ("2", None, Devices("gpu", 2)),
        ("-1", None, Devices("gpu", 4)),
        ("0", None, Devices("cpu", 1)),
        (None, 3, Devices("gpu", 3)),
        (None, None, Devices("gpu", 1)),
    ],
)
def test_devices_where_there_are_four_gpus(monkeypatch, gpus, devices, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert training_devices(gpus, devices) == expected


@pytest.mark.parametrize(("gpus", "devices"), [("0,4", None), ("5", None), (None, 5), ("1", 1)])
def test_more_devices_than_there_are(monkeypatch, gpus, devices):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="(gpus|devices)"):
        training_devices(gpus, devices)


def test_a_count_of_devices(monkeypatch):
    assert Devices("gpu", [0, 3]).count == 2 and Devices("cpu", 3).count == 3


def test_worker_errors_become_one_line():
    error = UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n"
        '  File "x.py", line 1\nldm.errors.UserError: tile a.png cannot be read'
    )
    assert cli._one_line(error) == "tile a.png cannot be read"


@pytest.mark.parametrize(
    ("accelerator", "fast", "name", "expected"),
    [
        ("cpu", True, None, "32"),  # a seed gives the same numbers on every processor
        ("cpu", True, "auto", "bf16-mixed"),
        ("cpu", False, "auto", "32"),
        ("cpu", False, "bf16", "bf16-mixed"),
        ("cpu", True, "bf16-true", "bf16-true"),
        ("mps", True, "auto", "32"),
        ("gpu", True, None, "bf16-mixed"),
        ("gpu", False, None, "32"),
    ],
)
def test_precision_by_what_the_device_computes(
    monkeypatch, caplog, accelerator, fast, name, expected
):
    monkeypatch.setattr("ldm.devices.cpu_computes_bf16", lambda: fast)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: fast)
    assert Devices(accelerator).with_precision(name).precision == expected
    slow = accelerator == "cpu" and not fast and expected != "32"
    assert ["27 times" in record.getMessage() for record in caplog.records] == [True] * slow


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="known on Linux only")
def test_what_this_processor_computes():
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert cpu_computes_bf16() == known


@pytest.mark.parametrize(("batch", "remedy"), [(48, "try 24"), (1, "take a smaller network")])
def test_too_little_memory_names_the_batch_to_try(batch, remedy):
    expected = rf"^batch_size: {batch} .*out of memory. Tried to allocate 2 GiB\); {remedy}"
    with pytest.raises(UserError, match=expected), within_memory(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("devices", "fused", "expected"),
    [
        (Devices(), False, "32, channels_last off, compile off, tf32 as PyTorch does, fused off"),
        (Devices(compile=True, tf32=True), None, "32, channels_last off, compile on, tf32 on"),
        (
            Devices("gpu", 2, precision="bf16-mixed", channels_last=True, tf32=False),
            True,
            "bf16-mixed, channels_last on, compile off, tf32 off, fused on",
        ),
    ],
)
def test_all_that_decides_the_speed_is_told(devices, fused, expected):
    place = f"devices      {devices.count} x {devices.accelerator} x 1 machines, precision "
    assert devices.describe(fused) == place + expected


FAULTS = """
import resource
from ldm.devices import Devices
Devices("cpu").keep_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**26)  # 16,384 pages
before = faults()
for _ in range(4): bytearray(2**26)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of glibc")
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("HISTO_MALLOC", "", True),
        ("HISTO_MALLOC", "system", False),
        ("MALLOC_MMAP_THRESHOLD_", "1000000", False),
    ],
)
def test_freed_memory_is_kept_for_the_next_step(name, value, kept):
    words = [sys.executable, "-c", FAULTS]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, name: value})
    # What comes from the system again faults at each page.
    assert (int(done.stdout) < 1000) == kept, done.stderr
