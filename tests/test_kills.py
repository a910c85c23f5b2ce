"""Commands that are killed, or whose disk fills up, at random moments; see kills.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import COMMANDS, SKIPPED_STATUS

QUICK = ("index_corpus", "cache_latents", "diffusion")  # a table, a made folder, a training


def disturbed(*words: str) -> None:
    """Run kills.py: every command makes what it makes undisturbed, whatever the moment."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == SKIPPED_STATUS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_now_and_then():
    disturbed("--kills", "2", *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_many_moments(name):
    disturbed("--kills", "20", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_up_under_way(name):
    disturbed("--fills", "5", name)
