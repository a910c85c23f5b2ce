"""The noisy-latent classifier and classifier_train.py, on tiny real models."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F

from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import classify as classifier_train
from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.models.classifier import (
    TEMPERATURES,
    LatentSpace,
    attention_factors,
    default_channel_mult,
    fit_temperature,
    network_config,
    sample_time_steps,
)
from ldm.modules.unet import EncoderUNetModel

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "--iterations": "300000",
    "--anneal_lr": "True",
    "--batch_size": "32",
    "--lr": "5e-5",
    "--save_interval": "10000",
    "--weight_decay": "0.05",
    "--image_size": "256",
    "--classifier_attention_resolutions": "32,16",
    "--classifier_depth": "2",
    "--classifier_width": "128",
    "--classifier_pool": "attention",
    "--classifier_resblock_updown": "True",
    "--classifier_use_scale_shift_norm": "True",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Labelled tiles (train, val) and checkpoints of an autoencoder and a diffusion model."""
    folder = tmp_path_factory.mktemp("data")
    tiny.tiles(folder / "train", per_class=8, seed=0)
    tiny.tiles(folder / "val", per_class=4, seed=1)
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    tiny.save(tiny.diffusion(autoencoder), folder / "diffusion.ckpt")
    return folder


def arguments(data, logdir, *options, first_stage="diffusion.ckpt"):
    argv = ["--data_dir", data / "train", "--val_data_dir", data / "val"]
    argv += ["--first_stage", data / first_stage, "--logdir", logdir, "--name", "run"]
    argv += ["--batch_size", 8, "--num_workers", 0, "--lr", 1e-3, "--devices", 1]
    argv += ["--classifier_width", 32, "--classifier_depth", 1, "--classifier_channel_mult", "1,1"]
    return [str(word) for word in [*argv, *options]]


def train(data, logdir, *options, **kwargs):
    """Run the command in this process, on the CPU."""
    argv = [*arguments(data, logdir, *options, **kwargs), "--gpus", "0"]
    argv.remove("--devices")
    argv.remove("1")
    return classifier_train.train(parse(classifier_train.Options, argv))


@pytest.fixture
def classifier(data):
    return tiny.classifier(load_model(data / "diffusion.ckpt", "diffusion"))


# The network


def paper_autoencoder():
    return SimpleNamespace(resolution=256, latent_size=64, embed_dim=3)


def test_the_published_network():
    config = network_config(paper_autoencoder(), 9, attention_resolutions=[32, 16])
    assert config == network_config(paper_autoencoder(), 9)
    assert config["params"]["channel_mult"] == [1, 1, 2, 2, 4, 4]
    assert config["params"]["attention_resolutions"] == [8, 16]
    assert config["params"]["num_head_channels"] == 64
    with torch.device("meta"):
        net = EncoderUNetModel(**config["params"])
    assert net.out[2].positional_embedding.shape == (512, 2 * 2 + 1)  # attention pool of 2x2
    attended = [i for i, block in enumerate(net.input_blocks) if len(block) == 2]
    # Three blocks per level (two residual, one down): levels 3 and 4 are factors 8 and 16.
    assert attended == [10, 11, 13, 14]


@pytest.mark.parametrize(
    ("pixels", "latent", "expected"),
    [
        (512, 128, (1, 1, 1, 2, 2, 4, 4)),
        (256, 64, (1, 1, 2, 2, 4, 4)),
        (224, 56, (1, 1, 2, 3)),
        (128, 32, (1, 1, 2, 3, 4)),
        (64, 16, (1, 2, 3, 4)),
        (32, 16, (1, 2, 4)),
        (30, 15, (1,)),
    ],
)
def test_default_channel_mult(pixels, latent, expected):
    assert default_channel_mult(pixels, latent) == expected
    assert latent % 2 ** (len(expected) - 1) == 0


def test_attention_factors():
    assert attention_factors([32, 16], 256, 6) == [8, 16]
    assert attention_factors([16, 32, 64], 256, 6) == [4, 8, 16]
    assert attention_factors(None, 64, 4) == [8]
    assert attention_factors(None, 32, 3) == [4]  # no level of factor 8: the last one
    with pytest.raises(UserError, match=r"=32,20: 20 is no level's.*256, 128, 64, 32, 16, 8"):
        attention_factors([32, 20], 256, 6)


# Time steps, noise, gradients


@pytest.mark.parametrize("T", [1, 7, 1000])
def test_time_steps(T):
    torch.manual_seed(0)
    for sampler in ("uniform", "stratified"):
        t = sample_time_steps(sampler, 64, T, "cpu")
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    t = sample_time_steps("stratified", 10, 1000, "cpu")
    assert sorted((t // 100).tolist()) == list(range(10))  # one in each tenth
    assert t.tolist() != sorted(t.tolist())  # in random order
    many = torch.cat([sample_time_steps("stratified", 8, 1000, "cpu") for _ in range(2000)])
    # Uniform: 16,000 values of deviation 288.7 in strata; the mean is within 10 of 499.5.
    assert abs(many.float().mean() - 499.5) < 10


def batch_of(classifier, count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_t = torch.randn(count, *classifier.latent_shape, generator=generator)
    t = torch.randint(1000, (count,), generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return z_t, t, y


def gradient(classifier, microbatch, monkeypatch):
    z_t, t, y = batch_of(classifier)
    monkeypatch.setattr(classifier, "manual_backward", lambda loss: loss.backward())
    classifier.microbatch = microbatch
    classifier.net.zero_grad()
    result = classifier.accumulate(z_t, t, y, {"path": ["x"] * len(y)}, 0)
    return result, torch.cat([p.grad.flatten() for p in classifier.net.parameters()])


@pytest.mark.parametrize("microbatch", [1, 3, 4, 8, 100])
def test_microbatches_add_up(classifier, monkeypatch, microbatch):
    (loss, accuracy), grad = gradient(classifier, None, monkeypatch)
    (micro_loss, micro_accuracy), micro_grad = gradient(classifier, microbatch, monkeypatch)
    # Float32 sums in another order.
    torch.testing.assert_close(micro_grad, grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(micro_loss, loss)
    assert micro_accuracy == accuracy
    z_t, t, y = batch_of(classifier)
    torch.testing.assert_close(loss, F.cross_entropy(classifier(z_t, t), y).detach())


def test_mean_of_microbatch_means_would_be_wrong(classifier):
    """The bad version: parts of 3, 3 and 2 images weighted alike."""
    z_t, t, y = batch_of(classifier)
    with torch.no_grad():
        logits = classifier(z_t, t)
        parts = [F.cross_entropy(logits[i : i + 3], y[i : i + 3]) for i in (0, 3, 6)]
        assert abs(sum(parts) / 3 - F.cross_entropy(logits, y)) > 1e-4


def test_validation_noise_follows_the_name(classifier):
    """The same t and noise in any batch and order, and a t in the quarter asked for."""
    seen = []

    def net(z_t, t):
        seen.append((z_t, t))
        return torch.zeros(len(t), 3)

    classifier.net = torch.nn.Identity()
    classifier.net.forward = net
    z_0, names = torch.randn(6, 3, 16, 16), [f"TUM/{i}.png" for i in range(6)]
    for quarter, (low, high) in enumerate([(0, 250), (250, 500), (500, 750), (750, 1000)]):
        seen.clear()
        classifier.noisy_logits(z_0, names, quarter)
        for i in (5, 2):
            classifier.noisy_logits(z_0[i : i + 1], names[i : i + 1], quarter)
        (z_t, t), (z_5, t_5), (z_2, t_2) = seen
        assert ((low <= t) & (t < high)).all() and len(set(t.tolist())) > 1
        assert torch.equal(z_t[[5, 2]], torch.cat([z_5, z_2]))
        assert t[[5, 2]].tolist() == [t_5.item(), t_2.item()]


def test_non_finite_loss_stops(classifier):
    z_t, t, y = batch_of(classifier)
    with pytest.raises(UserError, match="nan at step 0, batch 3 .*files: a.png"):
        classifier.accumulate(z_t * float("nan"), t, y, {"path": ["a.png"] * 8}, 3)


# Checkpoints


def test_round_trip(classifier, data, tmp_path):
    path = tiny.save(classifier, tmp_path / "classifier.ckpt")
    assert not [k for k in read_checkpoint(path)["state_dict"] if "first_stage" in k]
    loaded = load_model(path, "classifier")
    z_t, t, _ = batch_of(classifier)
    with torch.no_grad():
        assert torch.equal(loaded(z_t, t), classifier.eval()(z_t, t))
    assert loaded.classes == tiny.CLASSES
    assert loaded.schedule == classifier.schedule
    assert float(loaded.scale_factor) == pytest.approx(0.8)
    fingerprint = load_model(data / "diffusion.ckpt", "diffusion").autoencoder_fingerprint
    assert loaded.autoencoder_fingerprint == fingerprint


def test_latent_space(data, tmp_path):
    """A diffusion model brings scale and schedule; an autoencoder's scale is measured."""
    autoencoder = data / "autoencoder.ckpt"
    path = tiny.save(tiny.diffusion(autoencoder, 0.37, timesteps=100), tmp_path / "d.ckpt")
    space = LatentSpace.load(str(path))
    assert space.scale_factor == pytest.approx(0.37) and space.schedule["timesteps"] == 100
    assert space.measured(None) is space

    tiles = TileFolder(data / "train", tiny.PIXELS, labelled=True)
    space = LatentSpace.load(str(autoencoder))
    assert space.scale_factor is None and space.schedule["timesteps"] == 1000
    scale = space.measured(tiles).scale_factor
    x = torch.stack([tiles[i]["image"] for i in range(len(tiles))])
    with torch.no_grad():
        posterior = space.first_stage.encode(x)
    spread = (posterior.mean.var(correction=0) + posterior.std.square().mean()).sqrt()
    # One draw of 18,432 values against the exact variance: 1% is far beyond its error.
    assert scale == pytest.approx(1 / spread.item(), rel=0.01)
    assert space.measured(tiles).scale_factor == scale


def test_checkpoints_without_a_temperature_have_1(classifier, tmp_path):
    """Those written before there was calibration; anything else must still be there."""
    path = tiny.save(classifier, tmp_path / "classifier.ckpt")
    payload = torch.load(path, weights_only=True)
    payload["state_dict"].pop("temperature")
    torch.save(payload, path)
    assert load_model(path, "classifier").temperature == 1
    payload["state_dict"].pop("scale_factor")
    torch.save(payload, path)
    with pytest.raises(UserError, match="do not fit the model.*scale_factor"):
        load_model(path, "classifier")
    classifier.temperature.fill_(2.5)
    assert load_model(tiny.save(classifier, path), "classifier").temperature == 2.5


# Calibration


def drawn(spread=2.0, count=4000, classes=4, seed=0):
    """Logits, and labels drawn from their softmax: calibrated as they are."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_temperature_of_calibrated_logits_is_1():
    # 4,000 labels; the standard error of the slope in 1 / T is about 0.02.
    assert fit_temperature(*drawn()) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_temperature_follows_the_scale_of_the_logits(factor):
    """Overconfident logits get a temperature above 1, timid ones below."""
    logits, y = drawn()
    temperature = fit_temperature(logits, y)
    assert fit_temperature(factor * logits, y) == pytest.approx(factor * temperature, rel=1e-6)


@pytest.mark.parametrize("factor", [0.01, 0.2, 1, 7, 1000])
def test_calibration_never_raises_the_loss(factor):
    """It is the least over a fine grid between the bounds, 1 included."""
    logits, y = drawn(count=50, seed=1)
    logits = factor * logits.double()
    least, most = TEMPERATURES
    temperature = fit_temperature(logits, y)
    assert least <= temperature <= most
    loss = F.cross_entropy(logits / temperature, y)
    grid = torch.logspace(math.log10(least), math.log10(most), 201)
    losses = torch.stack([F.cross_entropy(logits / t, y) for t in [1.0, *grid.tolist()]])
    assert loss <= losses.min() + 1e-9


def test_temperature_of_the_extremes():
    """Never wrong, always wrong, and no opinion."""
    logits, _ = drawn(count=50)
    least, most = TEMPERATURES
    assert fit_temperature(logits, logits.argmax(1)) == pytest.approx(least)
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(most)
    assert fit_temperature(torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 0])) == 1


# The command

RUN = ["--iterations", 60, "--save_interval", 30, "--eval_interval", 30, "--microbatch", 5]
RUN += ["--lr", 3e-3]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of 60 steps, whose folder tests only read."""
    logdir = tmp_path_factory.mktemp("logs")
    trainer, model = train(data, logdir, *RUN)
    return logdir / "run", trainer, model


def test_training_learns(trained):
    run, _, _ = trained
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == 60
    quarters = [v for k, v in result["last"].items() if k.startswith("val/accuracy_t")]
    assert len(quarters) == 4
    # A short run on 24 tiles: better than the 1/3 of chance where there is little noise, and better
    # there than where there is nothing but noise.
    assert quarters[0] > 0.6 and quarters[0] > quarters[3]
    assert result["last"]["val/accuracy"] == pytest.approx(sum(quarters) / 4, abs=1e-6)
    assert result["best"]["val/accuracy"] >= result["last"]["val/accuracy"]


def test_run_folder(trained):
    run, trainer, model = trained
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "model_000030.ckpt", "model_000060.ckpt"]
    loaded = load_model(run, "classifier")
    assert loaded.classes == tiny.CLASSES
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].cpu()), name
    header = next(run.glob("metrics/*/metrics.csv")).read_text().splitlines()[0].split(",")
    assert {*model.metrics(), "train/loss", "train/grad_norm", "images_per_s"} <= set(header)
    assert (run / "configs" / "resolved.yaml").is_file()
    # Annealed to zero by the last step.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_the_temperature_of_the_validation_set(trained, data):
    """It calibrates the noisy logits of all quarters, and is in the checkpoints and the result."""
    run, _, model = trained
    best = load_model(run / "checkpoints" / "best.ckpt", "classifier")
    object.__setattr__(best, "first_stage", model.first_stage)
    tiles = TileFolder(data / "val", tiny.PIXELS, labelled=True)
    z_0 = best.latents({"image": torch.stack([tile["image"] for tile in tiles])}, sample=False)
    with torch.no_grad():
        logits = [best.noisy_logits(z_0, tiles.relative_paths, q) for q in range(4)]
    y = torch.tensor(tiles.labels).repeat(4)
    expected = fit_temperature(torch.cat(logits), y)
    assert best.temperature.item() == pytest.approx(expected, rel=1e-4)
    result = json.loads((run / "result.json").read_text())
    assert result["best"]["temperature"] == best.temperature.item()
    last = load_model(run, "classifier").temperature.item()
    assert result["last"]["val/temperature"] == pytest.approx(last)
    assert last != 1 and result["last"]["val/loss_calibrated"] < result["last"]["val/loss"]


@pytest.mark.slow
def test_two_ranks_find_the_temperature_of_one(data, tmp_path):
    """Each of two CPU ranks (gloo) validates half of the tiles; a rate of 0 keeps the weights."""
    options = ["--iterations", 1, "--eval_interval", 1, "--lr", 0]
    argv = arguments(data, tmp_path / "two", *options)
    argv[argv.index("--devices") + 1] = "2"
    command = [sys.executable, str(ROOT / "classifier_train.py"), *argv]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    train(data, tmp_path / "one", *options)
    one, two = (load_model(tmp_path / name / "run", "classifier") for name in ("one", "two"))
    assert one.temperature != 1
    assert torch.equal(one.net.out[2].positional_embedding, two.net.out[2].positional_embedding)
    # The same logits but for the rounding of batches of other sizes.
    torch.testing.assert_close(one.temperature, two.temperature, rtol=1e-4, atol=0)
    results = [
        json.loads((tmp_path / n / "run" / "result.json").read_text()) for n in ("one", "two")
    ]
    losses = [result["last"]["val/loss_calibrated"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_stage_stays_frozen(trained, data):
    _, _, model = trained
    before = load_model(data / "diffusion.ckpt", "diffusion").first_stage_model
    assert model.first_stage.fingerprint() == before.fingerprint()
    assert all(p.grad is None for p in model.first_stage.parameters())
    assert not model.first_stage.training


def test_resumed_equals_uninterrupted(trained, data, tmp_path):
    run, _, _ = trained
    copy = tmp_path / "run" / "checkpoints"
    copy.mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "model_000030.ckpt", copy / "model_000030.ckpt")
    train(data, tmp_path, *RUN, "--resume_checkpoint", copy / "model_000030.ckpt")
    whole = read_checkpoint(run)["state_dict"]
    resumed = read_checkpoint(tmp_path / "run")["state_dict"]
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_resume_must_fit(trained, data, tmp_path):
    run, _, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    resume = [*RUN, "--resume", copy]
    other = tiny.save(tiny.autoencoder(seed=5), tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="latents of another autoencoder"):
        train(data, tmp_path, *resume, first_stage=other)
    with pytest.raises(UserError, match=r"another network \(.*model_channels 32 there, 64 now"):
        train(data, tmp_path, *resume, "--classifier_width", 64)
    with pytest.raises(UserError, match="holds a run with another model"):
        train(data, tmp_path, *RUN, "--classifier_width", 64)
    resolved = Path("configs", "resolved.yaml")
    assert (copy / resolved).read_text() == (run / resolved).read_text()


def test_published_behaviour(data, tmp_path):
    """--noised False sees t = 0 and clean latents only, and is chosen by its accuracy there."""
    options = ["--iterations", 6, "--eval_interval", 6, "--noised", "False"]
    _, model = train(data, tmp_path, *options, "--schedule_sampler", "stratified")
    seen = []
    hook = model.net.register_forward_hook(lambda net, inputs, output: seen.append(inputs))
    batch = {"image": torch.randn(4, 3, 32, 32), "label": torch.zeros(4).long(), "path": ["a"] * 4}
    model.accumulate = lambda z_t, t, y, batch, index: seen.append((z_t, t)) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.training_step(batch, 0)
    hook.remove()
    ((z_t, t),) = seen
    assert t.tolist() == [0] * 4
    # A draw of the posterior without noise of the schedule.
    assert (z_t - model.latents({"image": batch["image"]}, sample=False)).std() < 2 * float(
        model.scale_factor
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())["last"]
    assert result["val/accuracy"] == result["val/accuracy_clean"]
    assert load_model(tmp_path / "run", "classifier").noised is False


def test_held_out_share_and_early_stop(data, tmp_path):
    argv = arguments(data, tmp_path, "--iterations", 50, "--eval_interval", 1, "--patience", 1)
    argv += ["--lr", "0", "--val_fraction", "0.25", "--augment", "none"]
    argv.remove("--val_data_dir")
    argv.remove(str(data / "val"))
    trainer, _ = classifier_train.train(parse(classifier_train.Options, argv))
    assert len(trainer.datamodule.val_dataset) == 6 and len(trainer.datamodule.train_dataset) == 18
    assert trainer.global_step == 2  # a rate of 0 never improves


def test_published_command_line(tmp_path, capsys):
    """The flags of the paper's repository, as written, on tiles of 256 pixels."""
    autoencoder = tiny.AutoencoderKL(
        ddconfig={
            "ch": 32,
            "ch_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "z_channels": 3,
            "resolution": 256,
        },
        embed_dim=3,
    )
    tiny.save(autoencoder, tmp_path / "autoencoder.ckpt")
    tiny.tiles(tmp_path / "D", per_class=1, pixels=256)
    tiny.tiles(tmp_path / "V", per_class=1, pixels=256)
    argv = ["--data_dir", str(tmp_path / "D"), "--val_data_dir", str(tmp_path / "V")]
    argv += [word for option in PUBLISHED.items() for word in option]
    argv += ["--first_stage", str(tmp_path / "autoencoder.ckpt"), "--dry-run"]
    assert classifier_train.main(argv) is None
    shown = capsys.readouterr().out
    assert "latents      3x64x64" in shown and "annealed to 0 over 300,000 steps" in shown
    assert not (tmp_path / "logs").exists()


def test_first_stage_from_the_environment(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_FIRST_STAGE", str(data / "diffusion.ckpt"))
    args = parse(classifier_train.Options, ["--data_dir", str(data / "train")])
    assert args.first_stage == str(data / "diffusion.ckpt")
    monkeypatch.delenv("HISTO_FIRST_STAGE")
    args = parse(classifier_train.Options, ["--data_dir", str(data / "train")])
    with pytest.raises(UserError, match="first_stage.? is missing.*HISTO_FIRST_STAGE"):
        classifier_train.train(args)


def test_user_errors(data, tmp_path, classifier):
    with pytest.raises(UserError, match="image_size.? 64: .* works on tiles of 32 pixels"):
        train(data, tmp_path, "--image_size", 64)
    with pytest.raises(UserError, match="classifier_attention_resolutions=5"):
        train(data, tmp_path, "--classifier_attention_resolutions", 5)
    with pytest.raises(UserError, match="pool='mean'"):
        train(data, tmp_path, "--classifier_pool", "mean")
    path = tiny.save(classifier, tmp_path / "classifier.ckpt")
    with pytest.raises(UserError, match="first_stage.?: .*kind classifier; needed is diffusion"):
        train(data, tmp_path, first_stage=path)
    shutil.copytree(data / "val", tmp_path / "val")
    (tmp_path / "val" / "TUM").rename(tmp_path / "val" / "STR")
    with pytest.raises(UserError, match="STR"):
        train(data, tmp_path, "--val_data_dir", tmp_path / "val")
    with pytest.raises(UserError, match="data_dir: .*does not exist"):
        train(data, tmp_path, "--data_dir", tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--schedule_sampler", "loss-second-moment"],
        ["--microbatch", "0"],
        ["--iterations", "0"],
        ["--classifier_channel_mult", "1,x"],
        ["--noised", "maybe"],
    ],
)
def test_bad_options(options):
    with pytest.raises(UserError, match=options[0]):
        parse(classifier_train.Options, ["--data_dir", "x", *options])
