"""The whole method on a GPU, with tiny networks; `make gpu-test` runs it."""

import csv
import gc
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import ranks
import test_label_adapter
import test_readout
import tiny
import torch
from PIL import Image
from test_main import autoencoder_model, decoder_model, diffusion_model, run, weights, write_config
from test_scale import logged, train_and_tell

import eval as eval_py
import sample_diffusion
from ldm import train as training
from ldm.cli import parse, run_command
from ldm.commands import classify as classifier_train
from ldm.devices import Devices
from ldm.errors import UserError
from ldm.features.source import parse_features
from ldm.models.diffusion import LatentDiffusion
from ldm.models.readout import ReadoutClassifier
from ldm.models.vit import TileClassifier
from ldm.synthesis.models import load_models
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"
PRECISION = ("--precision", "bf16-mixed")
STEPS = 40
UNSEEN = ("lightning.trainer.check_val_every_n_epoch=100",)  # an epoch has two or three batches
QUIET = 1000  # batches between two entries of the log, which reads numbers from the GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled tiles, and checkpoints of each kind that belong together: KIND.ckpt."""
    folder = tmp_path_factory.mktemp("gpu")
    for seed, (name, count) in enumerate({"train": 16, "val": 4, "test": 4}.items()):
        tiny.tiles(folder / name, count, seed)
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    for kind in ("eps", "v", "flow"):
        model = tiny.diffusion(autoencoder, parameterization=kind)
        tiny.save(model, folder / f"{kind}.ckpt")
        readout = ReadoutClassifier.of(model, tiny.CLASSES, width=16)
        tiny.randomise(readout.net, 5)
        tiny.save(readout, folder / f"{kind}-readout.ckpt")
        process = model.schedule.settings
        tiny.save(tiny.classifier(model, process=process), folder / f"{kind}-classifier.ckpt")
    (folder / "diffusion.ckpt").symlink_to("eps.ckpt")  # the name that the label adapter is given
    return folder


# Every stage


def by_main(model: dict, labelled: bool = False):
    def train(folder: Path, logdir: Path, steps: int, log_every: int, *more: str):
        path = logdir / "c.yaml"
        config = write_config(path, folder / "train", model, labelled, log_every_n_steps=log_every)
        for name in ("first_stage_ckpt", "autoencoder_ckpt"):
            if name in model["params"]:
                more = (*more, f"model.params.{name}={folder / 'autoencoder.ckpt'}")
        return run(config, logdir, "run", steps, "data.params.batch_size=16", *UNSEEN, *more)

    return train


def by_label_adapter(folder: Path, logdir: Path, steps: int, log_every: int, *more: str):
    trainer = {"log_every_n_steps": log_every}
    config = test_label_adapter.write_config(logdir / "c.yaml", folder, trainer=trainer)
    return test_label_adapter.run(config, logdir, "run", steps, *UNSEEN, *more)


def by_classifier_train(folder: Path, logdir: Path, steps: int, log_every: int, *more: str):
    argv = ["--data_dir", folder / "train", "--val_data_dir", folder / "val", "--logdir", logdir]
    argv += ["--first_stage", folder / "eps.ckpt", "--name", "run", "--workers", 0, "--lr", 1e-3]
    argv += ["--classifier_width", 32, "--classifier_depth", 1, "--classifier_channel_mult", "1,1"]
    argv += ["--batch_size", 24, "--iterations", steps, "--log_interval", log_every]
    return classifier_train.train(parse(classifier_train.Options, [*map(str, [*argv, *more])]))


def by_readout(folder: Path, logdir: Path, steps: int, log_every: int, *more: str):
    options = ["--iterations", str(steps), "--log_interval", str(log_every), "--lr", "0.01"]
    return test_readout.train(folder, folder / "train", logdir, *options, "--name", "run", *more)


MODEL = Path("MODEL")
DIFFUSION = ("train/loss_simple",)
# How a stage is trained, and the losses that fall.
STAGES = {
    "autoencoder": (by_main(autoencoder_model(disc_weight=0.0)), ("train/rec_loss",)),
    "adversarial": (
        by_main(autoencoder_model(disc_start=20)),
        ("train/rec_loss", "train/nll_loss"),
    ),
    "eps": (by_main(diffusion_model(MODEL)), DIFFUSION),
    "v": (by_main(diffusion_model(MODEL, parameterization="v")), DIFFUSION),
    "min_snr": (by_main(diffusion_model(MODEL, loss_weighting="min_snr")), DIFFUSION),
    "flow": (by_main(diffusion_model(MODEL, parameterization="flow")), DIFFUSION),
    "decoder": (by_main(decoder_model(MODEL), labelled=True), ("train/rec_loss",)),
    "label_adapter": (by_label_adapter, DIFFUSION),
    "classifier": (by_classifier_train, ("train/loss",)),
    "readout": (by_readout, ("train/loss",)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_falls(stage, folder, tmp_path):
    train, losses = STAGES[stage]
    trainer, model = train(folder, tmp_path, STEPS, 1, *PRECISION)
    assert trainer.strategy.root_device.type == DEVICE
    assert trainer.precision == "bf16-mixed"
    assert {p.device.type for p in model.parameters()} <= {DEVICE, "cpu"}
    for name in losses:
        values = logged(tmp_path, "run", name)
        assert len(values) == STEPS
        assert sum(values[-10:]) < sum(values[:10]), (name, values)
    assert all(v.isfinite().all() for v in weights(tmp_path, "run").values())


def vit(folder: Path, logdir: Path, updates: int, validations: int):
    words = f"--arch test_vit --patch_size 16 --input-size {tiny.PIXELS} --num_workers 0 --lr 0.05"
    words += f" --match_steps {updates} --validations {validations} --precision bf16-mixed"
    paths = ["--data_path", folder, "--output_dir", "train", "--logdir", logdir]
    return eval_py.main([*words.split(), *map(str, paths)])


def test_the_loss_of_the_vit_falls(folder, tmp_path):
    """With mixup, the moving average and stochastic depth, and evaluated afterwards."""
    vit(folder, tmp_path, 20, 20)
    summary = json.loads((tmp_path / "train" / "summary.json").read_text())
    assert "accuracy" in json.dumps(summary)
    (path,) = tmp_path.rglob("metrics.csv")
    losses = [float(row["train_loss"]) for row in csv.DictReader(path.open())]
    assert sum(losses[-5:]) < sum(losses[:5]), losses


# Sampling and features


def sample(folder: Path, out: Path, kind: str, *more: str) -> int:
    argv = ["--model", folder / f"{kind}.ckpt", "--out", out, "-c", 5, "-n", 4, *more]
    return sample_diffusion.main([str(word) for word in argv])


def sampled(folder: Path, out: Path, kind: str, *more: str) -> list[dict]:
    assert sample(folder, out, kind, *more) == 0
    return list(csv.DictReader((out / "manifest.csv").open()))


@pytest.mark.parametrize(
    ("kind", "classifier", "options"),
    [
        ("eps", "classifier", "--eta 1 --classifier_scale 100"),
        ("v", "classifier", "--sampler dpm++2m --classifier_scale 2 --guidance_on z_0"),
        ("flow", "readout", "--classifier_scale 2 --channels_last"),
    ],
)
def test_guided_sampling(kind, classifier, options, folder, tmp_path):
    guide = ["--classifier", folder / f"{kind}-{classifier}.ckpt", "--precision", "bf16"]
    rows = sampled(folder, tmp_path / "out", kind, *guide, *options.split())
    assert len(rows) == 12
    free = sampled(folder, tmp_path / "free", kind, *guide, "--classifier_scale", "0")

    def wanted(rows: list[dict]) -> float:
        return sum(float(row["prob"]) for row in rows)

    assert wanted(rows) > wanted(free)


def synthesiser(folder: Path, kind: str, device: str, precision: str = "32", **settings):
    paths = folder / f"{kind}.ckpt", folder / f"{kind}-classifier.ckpt"
    settings = {"sampler": "ddim", "steps": 10, "eta": 1.0, "scale": 2.0, "seed": 0, **settings}
    speed = {name: settings.pop(name) for name in ("compile", "channels_last") if name in settings}
    devices = Devices("gpu" if device == "cuda" else "cpu", precision=precision, **speed)
    return Synthesiser(load_models(*paths, device=device), Sampling(**settings), devices)


@pytest.mark.parametrize(("kind", "sampler"), [("eps", "ddim"), ("v", "ddpm"), ("flow", "heun")])
def test_a_gpu_samples_what_a_cpu_samples(kind, sampler, folder):
    """Convolutions in full float32, so that only the order of sums differs; bfloat16 is near."""
    labels, indices = [0, 1, 2, 2], [0, 0, 0, 1]
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = [
            synthesiser(folder, kind, *where, sampler=sampler).latents(labels, indices).cpu()
            for where in (("cpu",), (DEVICE,), (DEVICE, "bf16-mixed"))
        ]
    errors = [float((z - found[0]).norm() / found[0].norm()) for z in found[1:]]
    assert errors[0] < 1e-3 and errors[1] < 0.1, errors


@pytest.mark.parametrize("name", ["diffusion:{}/eps.ckpt@20", "{}/vit.ckpt"])
def test_features_of_a_gpu_are_those_of_a_cpu(name, folder):
    if not (folder / "vit.ckpt").exists():
        net = TileClassifier("test_vit", 3, tiny.PIXELS, patch_size=16)
        net.classes = tiny.CLASSES
        torch.save(tiny.vit_checkpoint(net), folder / "vit.ckpt")
    source, paths = parse_features(name.format(folder)), sorted((folder / "val").rglob("*.png"))
    found = [source.open(device).extract(paths).features for device in ("cpu", DEVICE)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


# No waiting for the GPU


@pytest.fixture
def synchronising():
    """Makes a synchronisation an error (True) or not (False)."""

    def forbid(wanted: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if wanted else "default")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


class FiveSteps(pl.Callback):
    """Forbids synchronisation from the end of the second batch to that of the seventh."""

    def __init__(self, forbid):
        self.forbid, self.seen = forbid, 0

    def on_train_batch_end(self, *_) -> None:
        self.seen += 1
        if self.seen in (2, 7):
            self.forbid(self.seen == 2)

    def on_exception(self, *_) -> None:
        self.forbid(False)


@pytest.mark.parametrize("stage", [*STAGES, "vit"])
def test_training_steps_do_not_wait(stage, folder, tmp_path, monkeypatch, synchronising):
    watch, build = FiveSteps(synchronising), training.build_trainer

    def watched(model, run, devices, callbacks, *others):
        return build(model, run, devices, [*callbacks, watch], *others)

    monkeypatch.setattr(training, "build_trainer", watched)
    if stage == "vit":
        vit(folder, tmp_path, 8, 1)
    else:
        STAGES[stage][0](folder, tmp_path, 8, QUIET, *PRECISION)
    assert watch.seen == 8


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("eps", {}),
        ("eps", {"sampler": "ddpm", "guidance_on": "z_0", "interval": (100, 900)}),
        ("v", {"sampler": "dpm++2m", "normalise": True}),
        ("flow", {"sampler": "euler", "clip": 0.5}),
        ("flow", {"sampler": "heun", "limit": 3.0}),
    ],
)
def test_sampler_steps_do_not_wait(kind, settings, folder, synchronising):
    sampler = synthesiser(folder, kind, DEVICE, "bf16-mixed", **settings)

    def on_step(step) -> None:
        if step.j in (1, 6):
            synchronising(step.j == 1)

    assert sampler.latents([0, 1], [0, 1], on_step).isfinite().all()


def test_a_number_that_is_not_finite_reaches_no_checkpoint(folder, tmp_path, monkeypatch):
    """It is looked at some steps later, but before the next checkpoint."""

    def spoil(self) -> None:
        if self.global_step == 2:
            next(p.grad for p in self.unet.parameters() if p.grad is not None)[0] = torch.inf

    monkeypatch.setattr(LatentDiffusion, "on_after_backward", spoil)
    every = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    with pytest.raises(UserError, match=r"the gradient is inf at step 2 .*\.png.* of step 2"):
        STAGES["eps"][0](folder, tmp_path, 8, QUIET, every, *PRECISION)
    assert all(v.isfinite().all() for v in weights(tmp_path, "run").values())


# Going on, sharing, compiling, and too little memory


def test_a_resumed_run_goes_on(folder, tmp_path):
    """The losses after the interruption are those of a run without one, but for rounding."""
    train, (name,) = STAGES["eps"]
    losses = []
    for logdir, ends in ((tmp_path / "straight", [6]), (tmp_path / "stopped", [3, 6])):
        logdir.mkdir()
        for steps in ends:
            trainer, _ = train(folder, logdir, steps, 1)
        assert trainer.global_step == 6
        losses.append(logged(logdir, "run", name))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def in_one(command, *args):
    """What the command gives in two ranks on one device; NCCL would refuse that, gloo does not."""
    return ranks.in_ranks(2, command, *args, "--num_nodes", "2", apart=True)


def test_two_processes_train_on_one_gpu(folder, tmp_path):
    model = diffusion_model(folder / "autoencoder.ckpt")
    config = write_config(tmp_path / "c.yaml", folder / "train", model, log_every_n_steps=1)
    strategy = "lightning.strategy.target=pytorch_lightning.strategies.DDPStrategy"
    gloo = (strategy, "lightning.strategy.params.process_group_backend=gloo")
    alone = train_and_tell(config, tmp_path, "one", 3, "data.params.batch_size=8")
    both = in_one(train_and_tell, config, tmp_path, "two", 3, *gloo)
    mean = (both[0]["losses"] + both[1]["losses"]) / 2
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-2, atol=0)
    assert torch.equal(both[0]["average"], both[1]["average"])


def test_two_processes_sample_on_one_gpu(folder, tmp_path):
    """The same tiles, but for single grey levels."""
    one, two = tmp_path / "one", tmp_path / "two"
    sample(folder, one, "eps", "--eta", "0")
    assert in_one(sample, folder, two, "eps", "--eta", "0") == [0, 0]
    names = sorted(path.relative_to(one) for path in one.rglob("0*.png"))
    assert len(names) == 4
    for name in names:
        pixels = [torch.tensor(list(Image.open(root / name).tobytes())) for root in (one, two)]
        assert (pixels[0] - pixels[1]).abs().max() <= 3


@pytest.mark.parametrize("options", ["--compile", "--channels_last --fused true --tf32 True"])
def test_faster_options_give_the_same_losses(options, folder, tmp_path):
    train, (name,) = STAGES["eps"]
    small = [
        f"model.params.unet_config.params.{key}=[1]"
        for key in ("channel_mult", "attention_resolutions")
    ]
    found = []
    for word, more in (("plain", ()), ("fast", options.split())):
        (tmp_path / word).mkdir()
        train(folder, tmp_path / word, 4, 1, *small, *more)
        found.append(logged(tmp_path / word, "run", name))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_compiled_sampling(folder):
    plain, compiled = (
        synthesiser(folder, "eps", DEVICE, scale=0.0, compile=compile_).latents([0], [0]).cpu()
        for compile_ in (False, True)
    )
    assert (compiled - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.parametrize("command", ["train", "sample"])
def test_too_little_memory_is_one_line(command, folder, tmp_path, capsys):
    """The memory that a small batch takes, for a large one."""

    def work(batch: int, name: str):
        if command == "train":
            more = (f"data.params.batch_size={batch}", "--name", name)
            return STAGES["eps"][0](folder, tmp_path, 1, QUIET, *more)
        guide = ["--classifier", str(folder / "eps-classifier.ckpt"), "--batch_size", str(batch)]
        return sampled(folder, tmp_path / name, "eps", *guide, "-n", str(batch))

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work(1, "small")
    enough = torch.cuda.max_memory_reserved() / torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    capsys.readouterr()
    try:
        torch.cuda.set_per_process_memory_fraction(enough)
        with pytest.raises(SystemExit) as end:
            run_command(lambda: work(48, "large"), sample_diffusion.Options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert end.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert "batch_size: 48" in line and line.endswith("try 24")
