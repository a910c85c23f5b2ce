"""A run that was stopped, killed or prolonged goes on as if nothing had happened."""

import os
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import tiny
import torch
from pytorch_lightning.callbacks import EarlyStopping

from ldm.checkpoint import read_checkpoint
from ldm.data.datamodule import DataModuleFromConfig
from ldm.devices import Devices
from ldm.errors import Stopped
from ldm.models.base import HistoModule
from ldm.run import RunFolder
from ldm.train import checkpoint_callbacks, fit

SCORES = (0.4, 0.3, 0.35, 0.25, 0.3, 0.2, 0.5, 0.1)  # of the validations, in turn


class Line(HistoModule):
    """Trains a few numbers; its validations find `SCORES`, whatever it has learnt."""

    kind = "autoencoder"

    accumulate_grad_batches = 1  # `fit` sets it, where the model steps by itself

    def __init__(self, manual: bool):
        super().__init__()
        self.automatic_optimization = not manual
        self.monitor = "val/score"
        self.net = torch.nn.Linear(3, 1)
        for weight in self.net.parameters():
            torch.nn.init.ones_(weight)
        self.validations = torch.nn.Buffer(torch.zeros((), dtype=torch.int64))

    def rebuild_config(self) -> dict:
        return {"target": "tests.Line", "params": {}}

    def metrics(self) -> set[str]:
        return {"val/score"}

    def training_step(self, batch, batch_idx):
        x = batch["image"].mean((2, 3))
        loss = (self.net(x + torch.randn_like(x)) - x.sum(1, keepdim=True)).square().mean()
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
                self.optimizers().step()
                self.optimizers().zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/score", SCORES[int(self.validations)])
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    return tiny.tiles(tmp_path_factory.mktemp("data") / "train", per_class=4, pixels=8)


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    """Ends a run in the batch after so many batches, as a kill does: nothing is tidied up."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx >= self.batches:
            raise Killed


def train(tiles: Path, root: Path, *more, every: int = 1, manual: bool = False, **settings):
    """Train `Line` in `root` as the commands do; three batches an epoch. Goes on if it exists."""
    train_node = {
        "target": "ldm.data.tiles.TileFolder",
        "params": {"root": str(tiles), "size": 8, "labelled": True},
    }
    data = DataModuleFromConfig(3, train_node, num_workers=0, val_fraction=0.25)
    run, model = RunFolder(root), Line(manual)
    model.seed = 0
    has_validation = settings.get("limit_val_batches") != 0
    if not has_validation:
        model.monitor = None
    node = {"params": {"every_n_train_steps": every}}
    callbacks = [*checkpoint_callbacks(run, model, has_validation, node), *more]
    settings = {"max_epochs": -1, "num_sanity_val_steps": 0, **settings}
    settings = {"enable_progress_bar": False, "log_every_n_steps": 1, **settings}
    checkpoint = run.last if run.last.is_file() else None
    return fit(
        model, data, run, Devices(), checkpoint=checkpoint, callbacks=callbacks, settings=settings
    )


def logged(root: Path) -> list[dict[str, float]]:
    """The metrics of a run, but for its speed."""
    rows = RunFolder(root).read_metrics()
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def state_of(root: Path) -> dict:
    """What `last.ckpt` holds, but for paths."""
    payload = read_checkpoint(root)
    progress = payload["loops"]["fit_loop"]
    names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")
    states = {name.partition("{")[0]: state for name, state in payload["callbacks"].items()}
    states = {name: states.get(name) for name in ("EarlyStopping", "ModelCheckpoint")}
    return {
        "weights": {name: value.tolist() for name, value in payload["state_dict"].items()},
        "optimizer": payload["optimizer_states"][0]["state"][0]["exp_avg"].tolist(),
        "stopping": states["EarlyStopping"],
        "best": states["ModelCheckpoint"] and states["ModelCheckpoint"]["best_model_score"],
        "progress": {name: progress[name] for name in names},
        "epoch": payload["epoch"],
        "step": payload["global_step"],
    }


EPOCH, EVERY_2, NEVER = (
    {},
    {"val_check_interval": 2, "check_val_every_n_epoch": None},
    {"limit_val_batches": 0},
)
STEPS = 7


class Signal(KillAt):
    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx >= self.batches:
            os.kill(os.getpid(), signal.SIGUSR1)


class SignalThenKill(Signal):
    def on_validation_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx >= self.batches:
            raise Killed


@pytest.mark.parametrize(
    ("how", "accumulated", "validation"),
    [
        ("kill", 1, EPOCH),
        ("kill manual", 2, EPOCH),
        ("kill", 1, EVERY_2),
        ("kill", 2, EPOCH),
        ("kill", 2, NEVER),
        ("signal", 1, EVERY_2),
        ("signal", 2, EPOCH),
        ("signal and kill", 1, EVERY_2),
        ("signal and kill", 2, EPOCH),
        ("prolong", 1, EPOCH),
        ("prolong", 1, EVERY_2),
        ("prolong", 2, EPOCH),
        ("prolong", 2, NEVER),
        ("epochs", 1, EPOCH),
        ("epochs", 2, NEVER),
    ],
)
def test_a_run_that_goes_on_equals_one_that_was_never_stopped(
    how, accumulated, validation, tiles, tmp_path
):
    """Weights, optimiser, what callbacks know, counters of epochs and batches, and metrics.

    Each time the run is stopped its folder is moved, and `last.ckpt` knows the best score so far.
    """
    settings = {**validation, "accumulate_grad_batches": accumulated}

    def go(root: Path, end: int = STEPS, *more, every: int = 1) -> None:
        if validation is not NEVER:
            more = (EarlyStopping("val/score", patience=9), *more)
        limit = {"max_steps": -1, "max_epochs": end} if how == "epochs" else {"max_steps": end}
        train(tiles, root, *more, every=every, manual="manual" in how, **limit, **settings)

    go(tmp_path / "whole")
    root = tmp_path / "run0"
    for stop in (2, 3, 4, 6):
        if how == "signal and kill":
            with pytest.raises((Stopped, Killed)):
                go(root, STEPS, SignalThenKill(stop), every=100)
        elif "kill" in how:
            with pytest.raises(Killed):
                go(root, STEPS, KillAt(stop))
        elif how == "signal":
            with pytest.raises(Stopped, match="stopped by SIGUSR1 after step"):
                go(root, STEPS, Signal(stop), every=100)
        else:
            go(root, stop, every=100)
        if validation is not NEVER:
            found = SCORES[: read_checkpoint(root)["state_dict"]["validations"]]
            best = state_of(root)["best"]
            assert best is None if not found else float(best) == pytest.approx(min(found))
        root = root.rename(tmp_path / f"run{stop}")
    go(root)
    assert state_of(root) == state_of(tmp_path / "whole")
    assert logged(root) == logged(tmp_path / "whole")
    if validation is not NEVER:
        names = (run / "checkpoints" / "best.ckpt" for run in (root, tmp_path / "whole"))
        ours, wanted = (read_checkpoint(name)["global_step"] for name in names)
        assert ours == wanted


def test_a_run_that_stops_early_leaves_its_last_step(tiles, tmp_path):
    train(tiles, tmp_path, EarlyStopping("val/score", patience=1), every=100)
    payload = read_checkpoint(tmp_path)
    assert payload["global_step"] == 9  # the third validation is the first that is no better
    assert (
        payload["callbacks"]["EarlyStopping{'monitor': 'val/score', 'mode': 'min'}"]["wait_count"]
        == 1
    )


def test_metrics_of_several_starts(tmp_path):
    """Steps that were done again count once, and half a line of a killed process not at all."""
    starts = ["step,a,b\n0,1,\n1,2,\n1,,5\n2,3,\n3,4,\n4,5", "step,a\n2,7\n", ""]
    for version, text in enumerate(starts):
        path = tmp_path / "metrics" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    rows = [{"step": 0, "a": 1}, {"step": 1, "a": 2, "b": 5}, {"step": 2, "a": 7}]
    assert RunFolder(tmp_path).read_metrics() == rows
