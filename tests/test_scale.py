"""Several processes, memory and speed: the same training, divided, smaller or faster."""

import zlib
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from test_main import (
    autoencoder_model,
    diffusion_model,
    run,
    weights,
    write_config,
)

import main as main_py
from ldm import devices as devices_module
from ldm import train as training
from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import classify as classifier_train
from ldm.commands import train
from ldm.devices import Devices, follow_layout, training_devices
from ldm.errors import UserError
from ldm.models.diffusion import LatentDiffusion
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.unet import EncoderUNetModel, UNetModel
from ldm.run import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.tiles(tmp_path_factory.mktemp("data") / "train", per_class=8)


@pytest.fixture(scope="module")
def autoencoder_ckpt(tmp_path_factory) -> Path:
    return tiny.save(tiny.autoencoder(), tmp_path_factory.mktemp("models") / "autoencoder.ckpt")


@pytest.fixture(scope="module")
def config(data, autoencoder_ckpt, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    model = diffusion_model(autoencoder_ckpt)
    return write_config(folder / "c.yaml", data, model, log_every_n_steps=1)


def logged(logdir: Path, name: str, key: str) -> list[float]:
    return [row[key] for row in RunFolder(logdir / name).read_metrics() if key in row]


# Several processes

STEPS = 4  # of 8 images: two passes over 16 of the 19 training tiles


def train_and_tell(config: Path, logdir: Path, name: str, steps: int, *more: str) -> dict:
    """Train on this rank; what it saw and what it has then."""
    seen, means, step = [], [], LatentDiffusion.training_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        seen.extend(batch["path"])
        means.append(float(loss.detach()))
        return loss

    LatentDiffusion.training_step = training_step
    try:
        _, model = run(config, logdir, name, steps, *more)
    finally:
        LatentDiffusion.training_step = step
    parameters = [*model.unet.parameters(), *model.ema.net.parameters()]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return {
        "seen": seen,
        "losses": torch.tensor(means),
        "scale": float(model.scale_factor),
        "average": torch.cat([p.detach().flatten() for p in local[len(local) // 2 :]]),
        "held": sum(p.numel() for p in local) / 2,
    }


@pytest.fixture(scope="module")
def one(config, tmp_path_factory) -> tuple[dict, Path]:
    logdir = tmp_path_factory.mktemp("one")
    told = train_and_tell(config, logdir, "one", STEPS, "data.params.batch_size=8")
    return told, logdir


def test_two_processes_train_as_one_does(one, config, tmp_path):
    """Two ranks with batches of 4 (gloo) and one process with batches of 8: the same tiles, time
    steps and noise, hence the same losses; each tile once per pass; equal scale and average."""
    alone, logdir = one
    both = ranks.in_ranks(2, train_and_tell, config, tmp_path, "two", STEPS, "--devices", "2")
    mean = (both[0]["losses"] + both[1]["losses"]) / 2
    # Sums of floats in another order; Adam makes a full step of a gradient that is nearly 0.
    torch.testing.assert_close(mean[:1], alone["losses"][:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-3, atol=0)
    apart = (both[0]["losses"] - both[1]["losses"]).abs()
    assert apart.max() > 1e-2, "so that other images or noise would be seen"
    for first in (0, 8):
        tiles = [tile for rank in both for tile in rank["seen"][first : first + 8]]
        assert len(set(tiles)) == 16
        assert set(tiles) == set(alone["seen"][2 * first : 2 * first + 16])
    assert both[0]["scale"] == both[1]["scale"] == pytest.approx(alone["scale"], rel=1e-5)
    assert torch.equal(both[0]["average"], both[1]["average"])
    torch.testing.assert_close(both[0]["average"], alone["average"], rtol=0, atol=2e-3)
    assert read_checkpoint(tmp_path / "two")["state_dict"]["ema.num_updates"] == STEPS


@pytest.mark.skipif(
    torch.__version__.startswith("2.6.") and not torch.cuda.is_available(),
    reason="torch 2.6 shards on GPUs only",
)
def test_sharded_training(one, config, tmp_path):
    """fsdp on two ranks: each holds half of the UNet, losses are those of one process, also of a
    run that was resumed, and the checkpoint is one file like any other."""
    alone, logdir = one
    more = ("--devices", "2", "--strategy", "fsdp")
    drawn = (*more, *tiny.PICTURES)  # all ranks draw pictures together
    first = ranks.in_ranks(2, train_and_tell, config, tmp_path, "fsdp", STEPS // 2, *drawn)
    second = ranks.in_ranks(2, train_and_tell, config, tmp_path, "fsdp", STEPS, *more)
    both = [torch.cat([a["losses"], b["losses"]]) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close((both[0] + both[1]) / 2, alone["losses"], rtol=1e-3, atol=0)
    assert first[0]["held"] + first[1]["held"] == alone["held"]
    assert max(first[0]["held"], first[1]["held"]) < 0.6 * alone["held"]
    sharded, whole = weights(tmp_path, "fsdp"), weights(logdir, "one")
    assert sharded.keys() == whole.keys()
    for name, value in whole.items():
        assert type(sharded[name]) is torch.Tensor
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=4e-3)
    assert sharded["ema.num_updates"] == STEPS
    model = load_model(tmp_path / "fsdp", "diffusion")
    assert torch.equal(model.ema.net.out[2].weight, sharded["ema.net.out.2.weight"])
    # One process goes on where two stopped, but shards do not go on where one process stopped.
    run(config, tmp_path, "fsdp", STEPS + 1)
    assert read_checkpoint(tmp_path / "fsdp")["global_step"] == STEPS + 1
    with pytest.raises(
        AssertionError, match="UserError: [-`]*strategy`? fsdp: .*written without it"
    ):
        ranks.in_ranks(2, train_and_tell, config, tmp_path, "fsdp", STEPS + 2, *more)


@pytest.mark.parametrize(
    ("devices", "configured", "words"),
    [
        (Devices(strategy="deepspeed"), None, "deepspeed: .*use .?strategy. fsdp"),
        (Devices(), "deepspeed_stage_2", "deepspeed: .*use .?strategy. fsdp"),
        (Devices(strategy="ddp"), "fsdp", ".strategy. ddp and .*trainer.strategy=fsdp both"),
        (Devices(strategy="fsdp"), None, "give `devices`"),
        (Devices("cpu", 2, precision="16-mixed"), "fsdp", "must be 32 or bf16-mixed"),
        (Devices("cpu", 2, compile=True), "fsdp", "fsdp: `compile`"),
        (Devices("cpu", 2, channels_last=True), "fsdp", "fsdp: `channels_last`"),
    ],
)
def test_strategies_that_do_not_go_together(autoencoder_ckpt, devices, configured, words):
    with pytest.raises(UserError, match=words):
        training.choose_strategy(configured, devices, tiny.diffusion(autoencoder_ckpt))


def test_strategies(autoencoder_ckpt):
    diffusion, autoencoder = tiny.diffusion(autoencoder_ckpt), tiny.autoencoder()

    def chosen(configured=None, strategy="auto", model=diffusion, count=2):
        return training.choose_strategy(configured, Devices("cpu", count, strategy=strategy), model)

    assert chosen() == chosen("ddp") == chosen(strategy="ddp") == "ddp"
    assert chosen(count=1) == chosen("ddp", count=1) == "auto"
    unused = "ddp_find_unused_parameters_true"
    assert chosen(model=autoencoder) == chosen("ddp", model=autoencoder) == unused
    assert chosen("ddp_notebook") == "ddp_notebook"
    assert type(chosen("fsdp")).__name__ == "ShardedStrategy"
    with pytest.raises(UserError, match="AutoencoderKL has none"):
        chosen("fsdp", model=autoencoder)


def test_a_strategy_that_lightning_does_not_know(config, tmp_path):
    with pytest.raises(UserError, match="lightning.trainer: .*nonsense"):
        run(config, tmp_path, "x", 1, "lightning.trainer.strategy=nonsense")


def test_more_processes_than_cores(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert training_devices(None, 2) == Devices("cpu", 2)
    with pytest.raises(UserError, match="devices.? 3: there is no GPU to use here, and 2 CPU"):
        training_devices(None, 3)


@pytest.mark.parametrize(
    ("argv", "settings", "expected"),
    [
        ([], {"devices": 2}, (None, 2, 1)),
        ([], {"devices": [1, 3], "num_nodes": 2}, ("1,3,", None, 2)),
        ([], {"devices": [2]}, ("2,", None, 1)),
        ([], {"devices": -1}, ("-1", None, 1)),
        ([], {"devices": "auto"}, (None, None, 1)),
        (["--gpus", "2"], {"devices": 4}, ("2", None, 1)),
        (["--devices", "2", "--num_nodes", "3"], {"devices": 4, "num_nodes": 2}, (None, 2, 3)),
    ],
)
def test_devices_of_the_configuration(argv, settings, expected):
    """They are counted in the batch and checked as those of the command, which come first."""
    args = parse(main_py.Options, argv)
    args = train.configured_devices(args, settings)
    assert (args.gpus, args.devices, args.num_nodes) == expected and not settings


# Accumulation and clipping


def test_accumulated_batches_make_the_gradient_of_a_larger_one(config, tmp_path, monkeypatch):
    """Noise and time steps by image, since batches of another size draw others."""

    def draw_training(self, batch):
        names = ["/".join(Path(path).parts[-2:]) for path in batch["path"]]
        keys = [zlib.crc32(name.encode()) for name in names]
        generators = [torch.Generator().manual_seed(key) for key in keys]
        posterior = self.first_stage_model.encode(batch["image"])
        noise = [torch.randn(self.latent_shape, generator=g) for g in generators]
        t = torch.tensor([key % self.schedule.T for key in keys])
        return self.scale_factor * posterior.mode(), t, torch.stack(noise)

    monkeypatch.setattr(LatentDiffusion, "draw_training", draw_training)
    accumulate = "lightning.trainer.accumulate_grad_batches=2"
    run(config, tmp_path, "whole", 1, "data.params.batch_size=8")
    run(config, tmp_path, "halves", 1, accumulate)
    run(config, tmp_path, "half", 1)
    norms = {n: logged(tmp_path, n, "train/grad_norm")[0] for n in ("whole", "halves", "half")}
    assert norms["halves"] == pytest.approx(norms["whole"], rel=1e-4)
    assert norms["half"] != pytest.approx(norms["whole"], rel=1e-2)


def first_moments(logdir: Path, name: str, beta: float) -> list[float]:
    """Norm of the gradient that each optimiser's first step used: exp_avg is (1 - beta) of it."""
    states = read_checkpoint(logdir / name)["optimizer_states"]
    averages = [[s["exp_avg"] for s in state["state"].values()] for state in states]
    return [float(torch.nn.utils.get_total_norm(a)) / (1 - beta) for a in averages]


CLIP = "lightning.trainer.gradient_clip_val=0.01"


def test_clipping_of_the_diffusion_model(config, tmp_path):
    run(config, tmp_path, "clipped", 1, CLIP)
    assert first_moments(tmp_path, "clipped", 0.9) == pytest.approx([0.01], rel=1e-3)
    assert logged(tmp_path, "clipped", "train/grad_norm")[0] > 0.1, "of the gradient as it was"


def test_clipping_of_both_optimisers_of_the_autoencoder(data, tmp_path):
    model = autoencoder_model()
    config = write_config(tmp_path / "c.yaml", data, model, log_every_n_steps=1)
    for name, more in (("free", []), ("clipped", [CLIP])):
        run(config, tmp_path, name, 1, "lightning.trainer.accumulate_grad_batches=2", *more)
    assert min(first_moments(tmp_path, "free", 0.5)) > 0.02
    assert first_moments(tmp_path, "clipped", 0.5) == pytest.approx([0.01, 0.01], rel=1e-3)


# Memory


def autoencoder_net(use_checkpoint: bool) -> AutoencoderNet:
    settings = {**tiny.DDCONFIG, "attn_resolutions": [16], "dropout": 0.1}
    return AutoencoderNet({**settings, "use_checkpoint": use_checkpoint}, 3)


def half_unet(use_checkpoint: bool) -> EncoderUNetModel:
    settings = {**tiny.UNET, "out_channels": 2, "dropout": 0.1}
    return EncoderUNetModel(**settings, use_checkpoint=use_checkpoint)


def unet(use_checkpoint: bool) -> UNetModel:
    return UNetModel(**{**tiny.UNET, "dropout": 0.1}, use_checkpoint=use_checkpoint)


@pytest.mark.parametrize("build", [unet, half_unet, autoencoder_net])
def test_recomputed_features_give_the_same_gradients_with_less_memory(build):
    """Exactly the same, dropout included; names of weights too."""
    found = {}
    for use_checkpoint in (False, True):
        net = build(use_checkpoint).train()
        tiny.randomise(net, 0)
        torch.manual_seed(0)
        saved: dict[int, int] = {}
        owned = {p.data_ptr() for p in net.parameters()}

        def keep(tensor, saved=saved, owned=owned):
            if tensor.data_ptr() not in owned:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if build is autoencoder_net:
                loss = net(torch.randn(2, 3, tiny.PIXELS, tiny.PIXELS))[0].square().mean()
            else:
                loss = net(torch.randn(2, *tiny.LATENT), torch.tensor([3, 900])).square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        found[use_checkpoint] = gradients, sum(saved.values())
    plain, recomputed = found[False][0], found[True][0]
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert found[True][1] < 0.5 * found[False][1]


# Speed


@pytest.mark.slow
def test_compiled_training(config, tmp_path, monkeypatch):
    """The same losses, the same names in the checkpoint; with and without, a run goes on."""
    monkeypatch.setattr(devices_module, "BACKEND", "aot_eager")  # traced, but not made into C++
    compiled, call = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: (compiled.append(type(self).__name__), call(self, **options)),
    )
    run(config, tmp_path, "plain", 2)
    assert not compiled
    run(config, tmp_path, "compiled", 2, "--compile")
    assert compiled == ["UNetModel", "Encoder"]
    assert weights(tmp_path, "compiled").keys() == weights(tmp_path, "plain").keys()
    for name in ("plain", "compiled"):
        run(config, tmp_path, name, 3, *(["--compile"] if name == "plain" else []))
    plain, other = (logged(tmp_path, name, "train/loss_simple") for name in ("plain", "compiled"))
    assert len(plain) == 3
    assert plain == pytest.approx(other, rel=1e-3)


def test_channels_last_and_fused_training(config, tmp_path):
    """The same losses but for rounding; a run changes its layout when it is resumed."""
    run(config, tmp_path, "plain", 2)
    options = ["--channels_last", "--fused", "true"]
    trainer_, model = run(config, tmp_path, "fast", 2, *options)
    assert trainer_.optimizers[0].param_groups[0]["fused"] is True
    assert model.unet.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert (
        model.autoencoder_fingerprint
        == load_model(tmp_path / "plain", "diffusion").autoencoder_fingerprint
    )
    run(config, tmp_path, "plain", 4, *options)
    run(config, tmp_path, "fast", 4, "--fused", "true")
    plain, fast = (logged(tmp_path, name, "train/loss_simple") for name in ("plain", "fast"))
    assert len(plain) == 4
    assert fast == pytest.approx(plain, rel=1e-3)


def test_options_of_the_classifier(data, autoencoder_ckpt, tmp_path):
    """The same losses with features recomputed, channels last and fused steps; resumed without."""
    first_stage = tiny.save(tiny.diffusion(autoencoder_ckpt), tmp_path / "diffusion.ckpt")
    argv = ["--data_dir", data, "--val_data_dir", data, "--first_stage", first_stage]
    argv += ["--batch_size", 8, "--num_workers", 0, "--lr", 1e-3, "--log_interval", 1]
    argv += ["--classifier_width", 32, "--classifier_depth", 1, "--classifier_channel_mult", "1,1"]
    argv += ["--logdir", tmp_path, "--gpus", 0, "--eval_interval", 2, "--anneal_lr", "False"]

    def train(*options):
        words = [str(word) for word in [*argv, *options]]
        return classifier_train.train(parse(classifier_train.Options, words))

    train("--name", "plain", "--iterations", 2)
    options = ["--classifier_use_checkpoint", "True", "--channels_last", "--fused", "true"]
    trainer_, model = train("--name", "fast", "--iterations", 2, *options)
    assert trainer_.optimizers[0].param_groups[0]["fused"] is True
    assert model.net.middle_block[0].use_checkpoint
    train("--resume", tmp_path / "fast", "--iterations", 3)
    train("--resume", tmp_path / "plain", "--iterations", 3, *options)
    plain, fast = (logged(tmp_path, name, "train/loss") for name in ("plain", "fast"))
    assert len(plain) == 3
    assert fast == pytest.approx(plain, rel=1e-3)


def test_states_in_another_layout_are_not_mixed_up():
    """A fused step on the CPU walks through memory: without `follow_layout`, through the wrong."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)
    found = {}
    for name in ("steady", "followed", "mixed up"):
        p = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            if i and name != "steady":
                p.data = p.data.to(memory_format=torch.channels_last)
                if name == "followed":
                    follow_layout(optimizer)
            p.grad = torch.empty_like(p).copy_(gradient)
            optimizer.step()
        found[name] = p.detach()
    torch.testing.assert_close(found["followed"], found["steady"])
    assert (found["mixed up"] - found["steady"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("fused", "accelerator", "precision", "clips", "expected"),
    [
        ("auto", "gpu", "bf16-mixed", False, True),
        ("auto", "gpu", "32", True, True),
        ("auto", "gpu", "bf16-mixed", True, False),
        ("auto", "gpu", "16-mixed", False, False),
        ("auto", "cpu", "32", False, False),
        ("true", "cpu", "32", True, True),
        ("false", "gpu", "32", False, False),
    ],
)
def test_where_optimisers_are_fused(fused, accelerator, precision, clips, expected):
    devices = Devices(accelerator, fused=fused, precision=precision)
    assert devices.fuses(clips) is expected


@pytest.mark.parametrize(("precision", "clips"), [("16-mixed", False), ("bf16-mixed", True)])
def test_fused_where_it_cannot_be(precision, clips):
    with pytest.raises(UserError, match="fused.? true does not go with"):
        Devices("gpu", fused="true", precision=precision).fuses(clips)


def test_tf32(autoencoder_ckpt):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    model = tiny.diffusion(autoencoder_ckpt)
    try:
        Devices(tf32=True).prepare(model, [])
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        Devices().prepare(model, [])
        assert torch.get_float32_matmul_precision() == "high", "as it is, when not given"
        Devices(tf32=False).prepare(model, [])
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
