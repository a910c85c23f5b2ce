"""Checkpoints that survive full disks and numbers that are not finite; loggers."""

import functools
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import pytorch_lightning as pl
import tiny
import torch
from test_files import limited
from test_main import (
    autoencoder_ckpt,  # noqa: F401  a fixture
    autoencoder_model,
    data,  # noqa: F401  a fixture
    diffusion_model,
    run,
    weights,
    write_config,
)

from ldm import files
from ldm.checkpoint import read_checkpoint, training_step_of, write_checkpoint
from ldm.cli import parse, run_command
from ldm.commands import classify as classifier_train
from ldm.config import load_configs, validate_config
from ldm.errors import Stopped, UserError
from ldm.models import callbacks
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.base import SKIPPED_STEPS
from ldm.models.classifier import NoisyLatentClassifier
from ldm.models.diffusion import LatentDiffusion
from ldm.run import RunFolder
from ldm.train import build_loggers

# --- Files ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_being_replaced_stays_until_the_new_one_is_complete(
    tmp_path, monkeypatch
):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"x": torch.zeros(1000), "global_step": 1})
    save, seen = torch.save, []

    def watched(payload, file):
        save(payload, file)
        seen.append(training_step_of(path))

    monkeypatch.setattr(torch, "save", watched)
    write_checkpoint(path, {"x": torch.ones(1000), "global_step": 2})
    assert seen == [1] and training_step_of(path) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(tmp_path, capfd):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"x": torch.zeros(10), "global_step": 1})
    payload = {"x": torch.zeros(100_000), "global_step": 2}
    limited(100_000, lambda: write_checkpoint(path, payload))
    message = capfd.readouterr().err
    assert f"{path} cannot be written" in message and "untouched" in message
    assert "\n" not in message
    assert training_step_of(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"], "no half file stays"

    # What the plain way leaves behind.
    def plain():
        try:
            torch.save(payload, path)
        except (OSError, RuntimeError):
            raise UserError("failed") from None

    limited(100_000, plain)
    assert training_step_of(path) is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system(small_disk):
    path = small_disk / "last.ckpt"
    write_checkpoint(path, {"x": torch.zeros(100_000), "global_step": 1})
    with pytest.raises(UserError, match="No space left.*last.ckpt|last.ckpt.*No space left"):
        write_checkpoint(path, {"x": torch.zeros(500_000), "global_step": 2})
    assert training_step_of(path) == 1
    with pytest.raises(UserError, match=r"last.ckpt needs 5\.0 MB, its disk has .* MB free"):
        files.require_space(path, 5_000_000)
    assert [p.name for p in small_disk.iterdir()] == ["last.ckpt"]


def test_saving_looks_at_the_free_space_first(tmp_path, monkeypatch):
    path, io = tmp_path / "last.ckpt", callbacks.CheckpointFiles()
    io.save_checkpoint({"x": torch.zeros(1000), "global_step": 1}, path)
    size = path.stat().st_size
    monkeypatch.setattr("ldm.files.free_space", lambda _: int(1.1 * size) - 1)
    with pytest.raises(UserError, match="needs 0.0 MB.*untouched"):
        io.save_checkpoint({"x": torch.zeros(1000), "global_step": 2}, path)
    assert training_step_of(path) == 1
    monkeypatch.setattr("ldm.files.free_space", lambda _: int(1.1 * size))
    io.save_checkpoint({"x": torch.zeros(1000), "global_step": 2}, path)
    assert training_step_of(path) == 2


def test_a_run_does_not_start_without_room(data, tmp_path, monkeypatch):  # noqa: F811
    model = autoencoder_model(disc_weight=0.0)
    config = write_config(tmp_path / "c.yaml", data, model)
    _, trained = run(config, tmp_path, "first", 1)
    # Weights and two moments of each; last, best and one that is being written.
    size = callbacks.expected_size(trained)
    real = (tmp_path / "first" / "checkpoints" / "last.ckpt").stat().st_size
    assert 0.8 * real < size < 1.1 * real
    monkeypatch.setattr("ldm.files.free_space", lambda _: int(3 * size))
    with pytest.raises(UserError, match="before the start: .*last.ckpt needs .* MB"):
        run(config, tmp_path, "second", 1)
    assert not (tmp_path / "second").exists()
    monkeypatch.setattr("ldm.files.free_space", lambda _: int(3.4 * size))
    run(config, tmp_path, "second", 1)


# --- Which checkpoints are kept ------------------------------------------------------------------


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_last_ones_are_kept(data, tmp_path):  # noqa: F811
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0))
    more = ["lightning.modelcheckpoint.params.every_n_train_steps=1"]
    run(config, tmp_path, "ae", 5, *more, "lightning.modelcheckpoint.params.keep_last=2")
    steps = ["step_00000004.ckpt", "step_00000005.ckpt"]
    assert kept(tmp_path / "ae") == ["best.ckpt", "last.ckpt", *steps]
    # Also over a restart.
    run(config, tmp_path, "ae", 7, *more, "lightning.modelcheckpoint.params.keep_last=2")
    steps = ["step_00000006.ckpt", "step_00000007.ckpt"]
    assert kept(tmp_path / "ae") == ["best.ckpt", "last.ckpt", *steps]


def test_the_best_ones_are_kept_with_a_monitor(data, tmp_path):  # noqa: F811
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(), val_check_interval=1)
    best = ["lightning.modelcheckpoint.params.monitor=val/rec_loss"]
    run(config, tmp_path, "ae", 6, *best, "lightning.modelcheckpoint.params.save_top_k=2")
    names = kept(tmp_path / "ae")
    assert names[-1] == "last.ckpt" and names[0] == "best.ckpt" and len(names) == 4
    rows = RunFolder(tmp_path / "ae").read_metrics()
    losses = {int(r["step"]) + 1: r["val/rec_loss"] for r in rows if "val/rec_loss" in r}
    steps = sorted(sorted(losses, key=losses.get)[:2])
    assert names[1:3] == [f"best_{step:08d}.ckpt" for step in steps]
    with pytest.raises(UserError, match="needs a monitor"):
        run(config, tmp_path, "b", 1, "lightning.modelcheckpoint.params.save_top_k=2")


# --- Validation and checkpoints ------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    tiny.tiles(root / "train", 4)
    tiny.tiles(root / "val", 2, seed=9)
    return tiny.models(root)


def classify(root: Path, logdir: Path, iterations: int, *more: str):
    argv = f"--data_dir {root / 'train'} --val_data_dir {root / 'val'} --batch_size 6"
    argv += f" --first_stage {root / 'diffusion.ckpt'} --logdir {logdir} --name c --num_workers 0"
    argv += " --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,1 --lr 1e-3"
    argv += f" --eval_interval 2 --save_interval 2 --iterations {iterations} --precision 32"
    return classifier_train.train(parse(classifier_train.Options, [*argv.split(), *more]))


def test_a_regular_checkpoint_comes_after_the_validation_of_its_step(
    labelled, tmp_path, monkeypatch
):
    """The temperature that a checkpoint holds was fitted to its own weights, also on resuming."""
    _, whole = classify(labelled, tmp_path / "whole", 4)
    expected = {step: temperature(tmp_path / "whole", step) for step in (2, 4)}
    assert expected[2] != 1 and expected[4] == float(whole.temperature)

    # Killed right after step 2, so that the run goes on from the regular checkpoint.
    class Killed(Exception):
        pass

    train_batch = NoisyLatentClassifier.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 2:
            raise Killed
        return train_batch(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(NoisyLatentClassifier, "training_step", killed)
        with pytest.raises(Killed):
            classify(labelled, tmp_path / "halves", 4)
    _, resumed = classify(labelled, tmp_path / "halves", 4)
    assert temperature(tmp_path / "halves", 2) == expected[2]
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)

    # Lightning's own order: the checkpoint of step 2 has not seen the validation of step 2.
    monkeypatch.setattr(callbacks, "validation_is_due", lambda trainer: False)
    classify(labelled, tmp_path / "early", 4)
    assert temperature(tmp_path / "early", 2) == 1


def temperature(logdir: Path, step: int) -> float:
    path = logdir / "c" / "checkpoints" / f"model_{step:06d}.ckpt"
    return float(read_checkpoint(path)["state_dict"]["temperature"])


def test_a_signal_at_a_step_with_a_validation_waits_for_it(labelled, tmp_path, monkeypatch):
    train_batch = NoisyLatentClassifier.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_batch(self, batch, batch_idx)

    monkeypatch.setattr(NoisyLatentClassifier, "training_step", interrupted)
    with pytest.raises(Stopped, match="after step 2"):
        classify(labelled, tmp_path, 4)
    payload = read_checkpoint(tmp_path / "c")
    assert payload["global_step"] == 2 and float(payload["state_dict"]["temperature"]) != 1


def test_a_run_that_was_stopped_after_its_last_validation_has_results(
    labelled, tmp_path, monkeypatch
):
    train_batch = NoisyLatentClassifier.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_batch(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(NoisyLatentClassifier, "training_step", interrupted)
        with pytest.raises(Stopped, match="after step 3"):
            classify(labelled, tmp_path, 3)
    classify(labelled, tmp_path, 3)
    classify(labelled, tmp_path / "whole", 3)
    results = [
        json.loads((f / "c" / "result.json").read_text()) for f in (tmp_path, tmp_path / "whole")
    ]
    assert results[0] == results[1] and results[0]["step"] == 3


# --- Numbers that are not finite -----------------------------------------------------------------


def spoiled(monkeypatch, kind: type, step: int, value: float = float("inf"), steps: int = 1):
    """Make the gradient of one weight `value` at `steps` steps from `step` on; the loss is fine."""

    def spoil(self):
        if step <= self.global_step < step + steps:
            net = self.unet if kind is LatentDiffusion else self.net
            for parameter in [p for p in net.parameters() if p.grad is not None][:1]:
                parameter.grad[0] = value

    monkeypatch.setattr(kind, "on_after_backward", spoil)


EVERY_STEP = "lightning.modelcheckpoint.params.every_n_train_steps=2"


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    kind,
    data,  # noqa: F811
    autoencoder_ckpt,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Of 2 x 4 accumulated tiles: the message names all, and the checkpoint to go on from."""
    is_diffusion = kind == "diffusion"
    model = diffusion_model(autoencoder_ckpt) if is_diffusion else autoencoder_model()
    config = write_config(tmp_path / "c.yaml", data, model, accumulate_grad_batches=2)
    spoiled(monkeypatch, LatentDiffusion if is_diffusion else AutoencoderKL, step=2)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path, "r", 5, EVERY_STEP)
    message = str(caught.value)
    last = tmp_path / "r" / "checkpoints" / "last.ckpt"
    assert "the gradient is inf at step 2" in message and "\n" not in message
    assert f"the last good checkpoint is {last}, of step 2" in message
    assert message.count(".png") == 8
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, "r").values())
    monkeypatch.undo()
    trainer, _ = run(config, tmp_path, "r", 5, EVERY_STEP)
    assert trainer.global_step == 5


def test_a_classifier_with_a_gradient_that_is_not_finite(labelled, tmp_path, monkeypatch):
    spoiled(monkeypatch, NoisyLatentClassifier, step=0, value=float("nan"))
    with pytest.raises(UserError, match="gradient is nan at step 0 .*there is no checkpoint yet"):
        classify(labelled, tmp_path, 2)
    monkeypatch.undo()
    spoiled(monkeypatch, NoisyLatentClassifier, step=3)
    with pytest.raises(UserError, match=r"gradient is inf at step 3 .*\.ckpt, of step 2"):
        classify(labelled, tmp_path, 4)


def test_float16_skips_steps_with_an_infinite_gradient_but_not_for_ever(
    data,  # noqa: F811
    autoencoder_ckpt,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    from pytorch_lightning.plugins import MixedPrecision

    class LossScaling(MixedPrecision):
        def autocast_context_manager(self):
            return nullcontext()  # float16 is slow on a CPU, and not what is tested

    config = write_config(tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt))
    init = pl.Trainer.__init__

    @functools.wraps(init)
    def with_scaler(self, *args, precision, plugins, **kwargs):
        # Lightning computes in bfloat16 on a CPU; torch scales losses there as well.
        scaler = torch.amp.GradScaler("cpu")
        plugins = [*plugins, LossScaling("16-mixed", "cpu", scaler=scaler)]
        init(self, *args, plugins=plugins, **kwargs)

    monkeypatch.setattr(pl.Trainer, "__init__", with_scaler)
    with monkeypatch.context() as patch:
        spoiled(patch, LatentDiffusion, step=1, steps=2)
        trainer, _ = run(config, tmp_path, "few", 4)
        assert trainer.global_step == 4
        assert trainer.precision_plugin.scaler.get_scale() == 65536 / 4
        assert all(torch.isfinite(v).all() for v in weights(tmp_path, "few").values())
    spoiled(monkeypatch, LatentDiffusion, step=1, steps=100)
    with pytest.raises(UserError, match=f"inf {SKIPPED_STEPS} times in a row at step "):
        run(config, tmp_path, "always", 100)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    module = tiny.autoencoder()
    path = tiny.save(module, tmp_path / "a.ckpt")
    good = path.read_bytes()
    with torch.no_grad():
        module.net.encoder.conv_in.weight[0] = float("nan")
    with pytest.raises(UserError, match="net.encoder.conv_in.weight is not finite"):
        tiny.save(module, path)
    assert path.read_bytes() == good


# --- Loggers -------------------------------------------------------------------------------------


def test_loggers_by_name(tmp_path):
    folder = RunFolder(tmp_path)
    names = [type(x).__name__ for x in build_loggers(None, folder)]
    assert names == ["TensorBoardLogger"]
    assert build_loggers([], folder) == []
    target = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"save_dir": "x"}}
    names = [type(x).__name__ for x in build_loggers(["tensorboard", target], folder)]
    assert names == ["TensorBoardLogger", "CSVLogger"]


def test_the_logger_of_a_configuration(data, tmp_path):  # noqa: F811
    config = write_config(
        tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0), log_every_n_steps=1
    )
    validate_config(load_configs([config], ["lightning.logger=[tensorboard,wandb]"]))
    run(config, tmp_path, "csv", 1, "lightning.logger=[]")
    assert not (tmp_path / "csv" / "tensorboard").exists()
    assert list((tmp_path / "csv").glob("metrics/*/metrics.csv"))
    run(config, tmp_path, "tb", 1, "lightning.logger=tensorboard")
    assert list((tmp_path / "tb" / "tensorboard").glob("events*"))


def test_the_logger_of_the_classifier(labelled, tmp_path):
    classify(labelled, tmp_path, 1, "--logger")
    assert not (tmp_path / "c" / "tensorboard").exists()
    assert list((tmp_path / "c").glob("metrics/*/metrics.csv"))
    parsed = parse(classifier_train.Options, ["--data_dir", "D"])
    assert list(parsed.logger) == ["tensorboard"]


def test_wandb_without_the_package(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0))
    with pytest.raises(UserError, match="pip install wandb"):
        run(config, tmp_path, "w", 1, "lightning.logger=wandb")
    assert not (tmp_path / "w").exists()


def test_wandb_offline(data, tmp_path, monkeypatch):  # noqa: F811
    """With the real package: one run over two starts, its numbers in the file that is synced."""
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = write_config(
        tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0), log_every_n_steps=1
    )
    import wandb

    identities = []
    for steps in (1, 2):
        run(config, tmp_path, "w", steps, "lightning.logger=wandb")
        identities.append(wandb.run.id)
        wandb.finish()
    folders = list((tmp_path / "w" / "wandb").glob("offline-run-*"))
    assert len(set(identities)) == 1 and len(folders) == 2
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*/files/media/images/**/*.png"))
    assert all(list(f.glob("*.wandb"))[0].stat().st_size > 0 for f in folders)


def test_one_line_and_status_2_for_a_full_disk(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def fails():
        files.require_space(tmp_path / "x.ckpt", 10**18)

    with pytest.raises(SystemExit) as status:
        run_command(fails)
    assert status.value.code == 2 and capsys.readouterr().err.count("\n") == 1
