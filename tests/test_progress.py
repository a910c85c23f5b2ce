"""Signs of life of a stage whose steps are slow."""

import io
import threading
import time

import pytest
import pytorch_lightning as pl
import torch

from ldm import progress
from ldm.models.callbacks import ProgressBar, TimeLeft
from ldm.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched():
    return any(thread.name == "first step" for thread in threading.enumerate())


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def by_hand(bar):
    """Advance the bar as a stage with steps of unequal sizes does."""
    with bar:
        yield
        bar.update()
        yield


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    ("advance", "options", "steps"),
    [
        (iter, {"iterable": range(2000)}, 2000),
        (by_hand, {"total": 2000}, 2000),
        (by_hand, {"total": 2000, "initial": 1000}, 1000),
        (by_hand, {"total": 20, "step": 0.01}, 2000),
        (by_hand, {"total": 4000, "step": 4}, 1000),
        (iter, {"iterable": range(2000), "delay": 0.1, "leave": False}, 2000),
    ],
)
def test_a_slow_first_step_tells_the_least_time_left(monkeypatch, stream, advance, options, steps):
    monkeypatch.setattr(progress, "FIRST_SIGN", 0.1)
    out = stream()
    monkeypatch.setattr("sys.stderr", out)

    def texts():
        return [text for text in out.getvalue().splitlines() if "first step under way" in text]

    stage = advance(Bar(file=out, **options))
    next(stage)
    wait_until(lambda: len(texts()) >= 2)  # after 0.1 and 0.2 s
    assert f"at least {Bar.format_interval(0.2 * (steps - 1))} left" in texts()[1]
    next(stage)  # the first step is done
    count = len(texts())
    wait_until(lambda: not watched())
    assert len(texts()) == count
    stage.close()


def make_trainer(folder, steps, *callbacks, **settings):
    """A trainer that keeps nothing."""
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )


class SlowStart(pl.LightningModule):
    """A training whose only step waits until it was said to be under way, and may fail then."""

    shown = ()

    def __init__(self, said, fails):
        super().__init__()
        self.weight, self.said, self.fails = torch.nn.Parameter(torch.ones(1)), said, fails

    def training_step(self, batch, number):
        wait_until(self.said)
        if self.fails:
            raise ValueError
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_progress_bar_on_a_terminal_tells_of_the_first_step(monkeypatch, capfd, tmp_path, fails):
    monkeypatch.setattr(progress, "FIRST_SIGN", 0.1)
    seen = []

    def said():
        seen.append(capfd.readouterr())
        return any("first step under way" in text for pair in seen for text in pair)

    trainer = make_trainer(tmp_path, 1, ProgressBar(), TimeLeft(live=True))
    try:
        trainer.fit(SlowStart(said, fails), torch.utils.data.DataLoader(range(4)))
    except ValueError:
        assert fails
    wait_until(lambda: not watched())


def fail(step):
    raise ValueError


@pytest.mark.parametrize(
    ("items", "step", "options"),
    [
        ([], fail, {}),
        ([1], fail, {}),
        ([1], lambda item: None, {}),
        ([1, 2], lambda item: item == 1 or wait_until(lambda: not watched()), {}),
        ([1], lambda item: watched() and fail(item), {"disable": True}),
    ],
)
def test_nothing_is_told_once_a_stage_is_over_failed_or_in_its_second_step(items, step, options):
    out = io.StringIO()
    try:
        for item in Bar(items, file=out, **options):
            step(item)
    except ValueError:
        assert step is fail
    wait_until(lambda: not watched())
    assert "under way" not in out.getvalue()


def test_a_delayed_bar_of_a_quick_stage_says_nothing():
    out = io.StringIO()
    assert list(Bar(range(5), file=out, delay=60, leave=False)) == list(range(5))
    assert out.getvalue() == ""


def test_a_log_file_has_lines_and_no_bars(monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    out = io.StringIO()
    for _ in Bar(range(3), "tiles", file=out, unit="tile"):
        time.sleep(0.15)
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and "|" not in out.getvalue()
    assert lines[0].startswith("tiles: 0 of 3 tile") and lines[-1].startswith("tiles: 3 of 3 tile")
    assert all(lines) and len(lines) == len(set(lines))


def test_a_log_file_is_told_steps_and_losses(tmp_path, caplog):
    class Shown(pl.LightningModule):
        shown = ("train/loss",)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch, number):
            self.log("train/loss", self.weight.sum())
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    trainer = make_trainer(tmp_path, 2, TimeLeft(), enable_progress_bar=False)
    with caplog.at_level("INFO"):
        trainer.fit(Shown(), torch.utils.data.DataLoader(range(4)))
    told = [
        record.getMessage() for record in caplog.records if "step 1 of 2" in record.getMessage()
    ]
    assert len(told) == 1 and told[0].endswith("train/loss 1")
