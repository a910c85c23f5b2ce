"""main.py end to end on tiny real models: training, resuming, errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from ranks import in_ranks

from ldm import progress
from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import train as main_py
from ldm.errors import Stopped, UserError
from ldm.models.callbacks import LastCheckpoint
from ldm.models.diffusion import LatentDiffusion
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.discriminator import NLayerDiscriminator
from ldm.run import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.tiles(tmp_path_factory.mktemp("data") / "train", per_class=6)


@pytest.fixture(scope="module")
def autoencoder_ckpt(tmp_path_factory) -> Path:
    return tiny.save(tiny.autoencoder(), tmp_path_factory.mktemp("models") / "autoencoder.ckpt")


def write_config(path: Path, data: Path, model: dict, labelled: bool = False, **trainer) -> Path:
    config = {
        "model": {"base_learning_rate": 1e-3, **model},
        "data": {
            "target": "ldm.data.datamodule.DataModuleFromConfig",
            "params": {
                "batch_size": 4,
                "num_workers": 0,
                "val_fraction": 0.2,
                "train": {
                    "target": "ldm.data.tiles.TileFolder",
                    "params": {
                        "root": str(data),
                        "size": tiny.PIXELS,
                        "labelled": labelled,
                        "augment": ["d4"],
                    },
                },
            },
        },
        "lightning": {
            "trainer": {"enable_progress_bar": False, "num_sanity_val_steps": 0, **trainer},
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def autoencoder_model(**loss) -> dict:
    loss = {
        "disc_start": 0,
        "disc_weight": 0.5,
        "perceptual_weight": 0.0,
        "kl_weight": 1e-4,
        **loss,
    }
    lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss}
    params = {"ddconfig": tiny.DDCONFIG, "embed_dim": 3, "lossconfig": lossconfig}
    params["monitor"] = "val/rec_loss"
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def diffusion_model(ckpt: Path, **params) -> dict:
    params = {
        "first_stage_ckpt": str(ckpt),
        "image_size": tiny.LATENT[1],
        "unet_config": {"target": "ldm.modules.unet.UNetModel", "params": tiny.UNET},
        "monitor": "val/loss_simple_ema",
        "ema_decay": 0.9,
        **params,
    }
    return {"target": "ldm.models.diffusion.LatentDiffusion", "params": params}


def decoder_model(ckpt: Path, **params) -> dict:
    params = {
        "autoencoder_ckpt": str(ckpt),
        "aux_arch": "resnet10t",
        "monitor": "val/aux_accuracy",
        **params,
    }
    return {"target": "ldm.models.auxiliary.DecoderFinetune", "params": params}


def run(config: Path, logdir: Path, name: str, steps: int, *more: str):
    argv = [
        "--base",
        str(config),
        "-t",
        "--logdir",
        str(logdir),
        "--name",
        name,
        "--max_steps",
        str(steps),
    ]
    return main_py.train(parse(main_py.Options, [*argv, "--precision", "32", *more]))


def weights(logdir: Path, name: str) -> dict:
    return read_checkpoint(logdir / name)["state_dict"]


def models(ckpt: Path) -> dict[str, tuple[dict, bool]]:
    return {
        "autoencoder": (autoencoder_model(disc_start=2), False),
        "diffusion": (diffusion_model(ckpt, scheduler_config=tiny.SCHEDULE), False),
        "decoder": (decoder_model(ckpt, aux_start=2), True),
    }


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion", "decoder"])
def test_resumed_equals_uninterrupted(kind, data, autoencoder_ckpt, tmp_path):
    """Train 6 = train 3, stop, train 3 more: weights, averages, scale, bit for bit (3 steps an
    epoch). Pictures change nothing."""
    model, labelled = models(autoencoder_ckpt)[kind]
    config = write_config(tmp_path / "c.yaml", data, model, labelled)
    run(config, tmp_path, "whole", 6)
    run(config, tmp_path, "halves", 3, *tiny.PICTURES)
    half = weights(tmp_path, "halves")
    pictures = {p.name for p in (tmp_path / "halves" / "images").iterdir()}
    names = ["inputs", "reconstructions", *([] if kind == "decoder" else ["samples"])]
    assert pictures == {f"{name}_00000003.png" for name in names}
    trainer, _ = run(config, tmp_path, "halves", 6)
    assert trainer.global_step == 6
    whole, halves = weights(tmp_path, "whole"), weights(tmp_path, "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert any(not torch.equal(half[k], halves[k]) for k in half)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_stops_between_steps(number, data, autoencoder_ckpt, tmp_path, monkeypatch):
    """A signal in the first of the two batches of step 3: the step is finished and saved, and the
    same command goes on to what an uninterrupted run has (an epoch has 3 batches, so 2 steps)."""
    accumulate = {"accumulate_grad_batches": 2}
    config = write_config(
        tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt), **accumulate
    )
    run(config, tmp_path, "whole", 4)
    batches, train_batch = [], LatentDiffusion.training_step

    def interrupted(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 4:
            os.kill(os.getpid(), number)
        return train_batch(self, batch, batch_idx)

    monkeypatch.setattr(LatentDiffusion, "training_step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step 3: .*last.ckpt"):
        run(config, tmp_path, "stopped", 4)
    assert len(batches) == 5 and signal.getsignal(number) == before
    assert read_checkpoint(tmp_path / "stopped")["global_step"] == 3
    trainer, _ = run(config, tmp_path, "stopped", 4)
    assert trainer.global_step == 4 and len(batches) == 6
    whole, stopped = weights(tmp_path, "whole"), weights(tmp_path, "stopped")
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)


def test_a_signal_before_the_first_step(data, autoencoder_ckpt, tmp_path, monkeypatch):
    """A preemption while the first validation runs: one step, then the checkpoint and status 75.

    Left to Lightning, the same signal interrupts the run without a checkpoint.
    """
    model = diffusion_model(autoencoder_ckpt)
    config = write_config(tmp_path / "c.yaml", data, model, num_sanity_val_steps=1)
    validate, calls = LatentDiffusion.validation_step, []

    def interrupted(self, batch, batch_idx):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(batch_idx)
        return validate(self, batch, batch_idx)

    monkeypatch.setattr(LatentDiffusion, "validation_step", interrupted)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 1: .*last.ckpt"):
        run(config, tmp_path, "stopped", 4)
    assert read_checkpoint(tmp_path / "stopped")["global_step"] == 1
    calls.clear()
    monkeypatch.setattr(LastCheckpoint, "on_sanity_check_start", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, "late", 4)
    assert not (tmp_path / "late" / "checkpoints").exists()


def test_autoencoder_trains_both_networks_and_counts_generator_steps(data, tmp_path):
    model = autoencoder_model(disc_start=3)
    config = write_config(tmp_path / "c.yaml", data, model, log_every_n_steps=1)
    run(config, tmp_path, "ae", 3)
    before = weights(tmp_path, "ae")
    trainer, model = run(config, tmp_path, "ae", 6)
    after = weights(tmp_path, "ae")
    assert trainer.global_step == 6, "a discriminator step is no step of its own"
    assert model.optimizers()[1].param_groups[0]["params"][0] is next(
        model.loss.discriminator.parameters()
    )
    for part in ("net.encoder", "net.decoder", "loss.discriminator"):
        keys = [k for k in before if k.startswith(part) and k.endswith("weight")]
        assert keys and all(not torch.equal(before[k], after[k]) for k in keys), part
    logged = {k for row in RunFolder(tmp_path / "ae").read_metrics() for k in row}
    expected = {"val/rec_loss", "val/psnr", "train/logits_real", "train/d_weight", "images_per_s"}
    assert expected <= logged


def test_discriminator_waits_for_its_start(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_start=100))
    torch.manual_seed(0)
    _, model = run(config, tmp_path, "ae", 2)
    assert model.optimizers()[1].state_dict()["state"] == {}


def test_accumulated_gradients_equal_a_larger_batch(data, tmp_path, monkeypatch):
    """Two batches of 4 make the step of one batch of 8: the loss is a mean over images.

    The posterior's mean stands in for its draws, which differ between one batch and two.
    """
    monkeypatch.setattr(DiagonalGaussian, "sample", lambda self, generator=None: self.mean)
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0))
    whole = weights_after(config, tmp_path, "whole", "data.params.batch_size=8")
    halves = weights_after(
        config, tmp_path, "halves", "lightning.trainer.accumulate_grad_batches=2"
    )
    other = weights_after(config, tmp_path, "other", "data.params.batch_size=4")

    def agreement(a: dict, b: dict) -> float:
        close = [((a[k] - b[k]).abs() < 1e-5).flatten() for k in a if k.startswith("net.")]
        return torch.cat(close).float().mean().item()

    # Adam's first step is the gradient's sign, so a gradient that is nearly 0 may differ.
    assert agreement(whole, halves) > 0.99
    assert agreement(whole, other) < 0.95, "half of the batch must not do"


def weights_after(config: Path, tmp_path: Path, name: str, override: str) -> dict:
    trainer, _ = run(config, tmp_path, name, 1, override)
    assert trainer.global_step == 1
    return weights(tmp_path, name)


def test_diffusion_checkpoint_rebuilds_the_model_alone(data, tmp_path):
    ckpt = tiny.save(tiny.autoencoder(), tmp_path / "first.ckpt")
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(ckpt))
    _, trained = run(config, tmp_path, "d", 2)
    fingerprint = trained.autoencoder_fingerprint
    ckpt.unlink()
    model = load_model(tmp_path / "d", "diffusion")
    assert model.autoencoder_fingerprint == fingerprint
    assert torch.equal(model.scale_factor, trained.scale_factor.cpu())
    x = torch.rand(2, 3, tiny.PIXELS, tiny.PIXELS) * 2 - 1
    z = model.latents({"image": x}, sample=False)
    assert z.shape == (2, *tiny.LATENT)
    torch.testing.assert_close(
        model.decode_first_stage(z),
        model.first_stage_model.decode(model.first_stage_model.encode(x).mode()),
    )


def test_further_checkpoints_are_kept_beside_last_and_best(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0))
    more = ["lightning.modelcheckpoint.params.every_n_train_steps=2"]
    run(config, tmp_path, "ae", 4, *more, "lightning.modelcheckpoint.params.save_top_k=-1")
    names = sorted(p.name for p in (tmp_path / "ae" / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]


def test_latent_scale_makes_unit_variance(data, autoencoder_ckpt, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt))
    trainer, model = run(config, tmp_path, "d", 1)
    tiles = trainer.datamodule.train_dataset
    x = torch.stack([tiles[i]["image"] for i in range(len(tiles))])
    z = model.latents({"image": x})
    assert z.std().item() == pytest.approx(1.0, abs=0.05)


def test_ema_follows_optimiser_steps_not_batches(
    data, autoencoder_ckpt, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(progress, "FIRST_SIGN", 1e-3)
    trainer = {"accumulate_grad_batches": 2, "enable_progress_bar": True}
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt), **trainer)
    caplog.set_level("INFO")
    trainer, model = run(config, tmp_path, "d", 3)
    assert trainer.global_step == 3 and model.ema.num_updates == 3
    # A log file says how far a training is and the time left, from before its first step's end on.
    assert "first step under way, 0 s, at least 00:00 left" in caplog.text
    assert "step 1 of 3, about 00:" in caplog.text
    assert "tf32 as PyTorch does, fused off" in caplog.text


def test_decoder_finetuning_keeps_the_latent_space(data, autoencoder_ckpt, tmp_path):
    config = write_config(
        tmp_path / "c.yaml", data, decoder_model(autoencoder_ckpt, aux_start=2), labelled=True
    )
    before = load_model(autoencoder_ckpt, "autoencoder")
    run(config, tmp_path, "f", 4)
    after = load_model(tmp_path / "f", "autoencoder")
    assert after.net.fingerprint() == before.net.fingerprint()
    assert not torch.equal(after.net.decoder.conv_out.weight, before.net.decoder.conv_out.weight)
    assert after.classes == tiny.CLASSES


def test_class_evidence_reaches_the_decoder_only_from_its_start(data, autoencoder_ckpt):
    batch = {
        "image": torch.rand(3, 3, tiny.PIXELS, tiny.PIXELS) * 2 - 1,
        "label": torch.arange(3),
        "path": ["a"] * 3,
    }
    module = main_py_module(autoencoder_ckpt, aux_start=0)
    later = main_py_module(autoencoder_ckpt, aux_start=1)
    gradients = []
    for m in (module, later):
        loss, _ = m._losses(batch, sample=False)
        loss.backward()
        gradients.append(m.net.decoder.conv_out.weight.grad)
    # With rec_weight 0 the only way to the decoder is the classifier's.
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None or gradients[1].abs().sum() == 0


def main_py_module(ckpt: Path, aux_start: int):
    from ldm.models.auxiliary import DecoderFinetune

    torch.manual_seed(0)
    module = DecoderFinetune(str(ckpt), aux_arch="resnet10t", aux_start=aux_start, rec_weight=0.0)
    module.use_classes(tiny.CLASSES)
    return module


def test_a_discriminator_fits_the_tiles(data, tmp_path):
    """By a closed form: the first depth that is refused is the first that cannot be computed."""
    tiles = torch.zeros(2, 3, tiny.PIXELS, tiny.PIXELS)
    NLayerDiscriminator(n_layers=3)(tiles)
    with pytest.raises(RuntimeError, match="Kernel size"):
        NLayerDiscriminator(n_layers=4)(tiles)
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_num_layers=4))
    with pytest.raises(UserError, match="needs tiles of 48 pixels, these have 32"):
        run(config, tmp_path, "ae", 1)
    assert not (tmp_path / "ae").exists()


def test_dry_run_says_what_would_be_trained(data, autoencoder_ckpt, tmp_path, capsys):
    config = write_config(
        tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt), accumulate_grad_batches=3
    )
    argv = [
        "--base",
        str(config),
        "--dry-run",
        "--logdir",
        str(tmp_path / "logs"),
        "--scale_lr",
        "True",
    ]
    assert main_py.train(parse(main_py.Options, [*argv, "--gpus", "0,1"])) is None
    out = capsys.readouterr().out
    assert "base_learning_rate: 0.001" in out and "2 x gpu" in out and "fused on" in out
    assert "batch        24" in out and "learning rate 0.024" in out  # 2 GPUs x 4 tiles x 3 batches
    assert "14 training tiles, 4 validation tiles" in out
    assert "parameters   unet:" in out
    assert not (tmp_path / "logs").exists()


def test_files_merge_left_to_right_and_overrides_win(data, autoencoder_ckpt, tmp_path):
    first = write_config(tmp_path / "a.yaml", data, diffusion_model(autoencoder_ckpt))
    (tmp_path / "b.yaml").write_text(
        "model: {base_learning_rate: 0.5}\ndata: {params: {batch_size: 2}}\n"
    )
    args = parse(
        main_py.Options,
        ["--base", str(first), str(tmp_path / "b.yaml"), "data.params.batch_size=3"],
    )
    config = main_py.load_configuration(args)
    assert (
        config["model"]["base_learning_rate"] == 0.5 and config["data"]["params"]["batch_size"] == 3
    )


def test_a_mistake_is_one_line_and_status_2(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model())
    words = ["--base", str(config), "-t", "--logdir", str(tmp_path / "logs")]
    result = subprocess.run(
        [sys.executable, "main.py", *words, "model.params.embed_dim=x"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "model.params.embed_dim" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "logs").exists()


BAD = {
    "no gpu": (["--gpus", "0,1"], "0 CUDA GPUs"),
    "gpus and devices": (["--gpus", "0,1", "--devices", "2"], "give one of them"),
    "bad gpus": (["--gpus", "a"], "`gpus` a"),
    "missing base": (["--base", "nowhere.yaml"], "nowhere.yaml"),
    "missing data": (["data.params.train.params.root=/nowhere"], "/nowhere"),
    "unknown key": (["model.params.embeding_dim=3"], "embed_dim"),
    "monitor without validation": (["data.params.val_fraction=0"], "needs validation tiles"),
    "monitor that is never logged": (["model.params.monitor=val/fid"], "never logged"),
    "name outside logdir": (["--name", "../x"], "must be a folder below logdir"),
    "resume of nothing": (["--resume", "/nowhere"], "no checkpoint"),
    "wrong checkpoint kind": (["model.params.ckpt_path=CLASSIFIER"], "kind classifier"),
    "tiles of another size": (["data.params.train.params.size=64"], "train.params.size=64"),
    "trainer": (["lightning.trainer.limit_val_batches=1.5"], "limit_val_batches"),
    "no loss": (["model.params.lossconfig=null"], "cannot train without a loss"),
    "fsdp of an autoencoder": (["--strategy", "fsdp"], "fsdp shards the diffusion UNet"),
}


@pytest.mark.skipif(
    torch.cuda.device_count() > 1, reason="some cases name GPUs that this machine must not have"
)
@pytest.mark.parametrize("mode", ["-t", "--dry-run"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, mode, data, autoencoder_ckpt, tmp_path):
    """A dry run finds what a start would find, but for devices, which may be elsewhere."""
    if (case, mode) == ("no gpu", "--dry-run"):
        return
    argv, words = BAD[case]
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model())
    if any("CLASSIFIER" in a for a in argv):
        model = tiny.diffusion(autoencoder_ckpt)
        path = tiny.save(tiny.classifier(model), tmp_path / "classifier.ckpt")
        argv = [a.replace("CLASSIFIER", str(path)) for a in argv]
    logs = tmp_path / "logs"
    with pytest.raises(UserError, match=words):
        main_py.train(
            parse(main_py.Options, ["--base", str(config), mode, "--logdir", str(logs), *argv])
        )
    assert not logs.exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["image_size=8", "unet_config.params.image_size=8"], "latents of 16"),
        (
            [
                "scheduler_config={target: ldm.modules.lr_schedule.WarmupCosine, params: "
                "{warm_up_steps: 9, total_steps: 2}}"
            ],
            "warm_up_steps=9 must be in",
        ),
    ],
)
def test_a_dry_run_looks_at_latents_and_schedules(
    overrides, words, data, autoencoder_ckpt, tmp_path
):
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt))
    overrides = [f"model.params.{override}" for override in overrides]
    argv = ["--base", str(config), "--dry-run", "--logdir", str(tmp_path / "logs"), *overrides]
    with pytest.raises(UserError, match=words):
        main_py.train(parse(main_py.Options, argv))
    assert not (tmp_path / "logs").exists()


def test_diffusion_without_an_autoencoder(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match="none.ckpt"):
        run(config, tmp_path, "d", 1)


def test_another_model_under_the_same_name_is_refused(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model())
    run(config, tmp_path, "ae", 1)
    with pytest.raises(UserError, match="another model section"):
        run(config, tmp_path, "ae", 2, "model.params.lossconfig.params.kl_weight=0.5")
    for damaged in (b"", b"a: [", b"3", b"[]", b"\xff", b"\0"):
        (tmp_path / "ae" / "configs" / "resolved.yaml").write_bytes(damaged)
        with pytest.raises(UserError, match=r"resolved\.yaml is missing or damaged"):
            run(config, tmp_path, "ae", 2)


def test_a_nan_stops_the_run_and_names_the_files(data, tmp_path):
    config = write_config(tmp_path / "c.yaml", data, autoencoder_model(disc_weight=0.0))
    with pytest.raises(UserError, match=r"the loss is inf at step 0.*\.png"):
        run(config, tmp_path, "ae", 5, "model.params.lossconfig.params.logvar_init=-1000")


def test_checkpoints_of_strangers_are_refused(tmp_path, autoencoder_ckpt):
    foreign, broken, hostile = (
        tmp_path / n for n in ("foreign.ckpt", "broken.ckpt", "hostile.ckpt")
    )
    torch.save({"state_dict": {}}, foreign)
    broken.write_bytes(autoencoder_ckpt.read_bytes()[:1000])
    payload = torch.load(autoencoder_ckpt, weights_only=True)
    payload["histodiffusion"]["model"] = {
        "target": "subprocess.Popen",
        "params": {"args": ["false"]},
    }
    torch.save(payload, hostile)
    for path, words in (
        (foreign, "not written by this toolkit"),
        (broken, "is no checkpoint|cannot be read"),
        (hostile, "subprocess"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(path, "autoencoder")
    payload = torch.load(autoencoder_ckpt, weights_only=True)
    payload["state_dict"].popitem()
    torch.save(payload, tmp_path / "short.ckpt")
    with pytest.raises(UserError, match="do not fit the model"):
        load_model(tmp_path / "short.ckpt", "autoencoder")


def test_two_processes_measure_the_scale_of_one(data, autoencoder_ckpt, tmp_path):
    """Each of two CPU ranks (gloo) encodes half of the tiles; the stored scale is that of all."""
    config = write_config(tmp_path / "c.yaml", data, diffusion_model(autoencoder_ckpt))
    run(config, tmp_path, "one", 1)
    argv = ["--base", str(config), "-t", "--logdir", str(tmp_path), "--name", "two"]
    assert in_ranks(2, main_py.main, [*argv, "--max_steps", "1", "--devices", "2"]) == [None] * 2
    one, two = weights(tmp_path, "one"), weights(tmp_path, "two")
    torch.testing.assert_close(one["scale_factor"], two["scale_factor"], rtol=1e-5, atol=0)
    assert two["ema.num_updates"] == 1
