"""scripts/bench.py: what it measures, and that all sides compute the same."""

import json
import mmap
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.bench import networks as bench_networks
from ldm.bench import training as bench_training
from ldm.bench.contest import LESS, _serve, compared, compete
from ldm.bench.encoding import Encoder
from ldm.bench.loading import PREFETCH, Reading, Source, make_sources, milliseconds_by_part
from ldm.bench.measure import PeakMemory, Stopwatch, count_flops, spread
from ldm.bench.networks import LIBRARIES, SIZES, Networks, build_unet, count, require, unet_flops
from ldm.bench.sampling import Sampler, Weights, random_models
from ldm.bench.training import Execution, Training
from ldm.checkpoint import load_model
from ldm.data.tiles import to_uint8
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.exchange.diffusers_export import unet_state
from ldm.modules import autoencoder, blocks
from ldm.modules.autoencoder import AttnBlock
from ldm.modules.blocks import AttentionBlock
from ldm.modules.unet import EncoderUNetModel
from scripts import bench

CPU = torch.device("cpu")
TINY = Networks(tiny.UNET, tiny.DDCONFIG, 3, "tiny")
EXECUTION = Execution(CPU)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(TINY, tmp_path_factory.mktemp("tiles"), bench.KINDS, 2, 4)


@pytest.fixture
def tiny_size(tmp_path, monkeypatch):
    """The size "demo" is a tiny one."""
    diffusion, autoencoder = tmp_path / "diffusion.yaml", tmp_path / "autoencoder.yaml"
    first = {"model": {"params": {"ddconfig": tiny.DDCONFIG, "embed_dim": 3}}}
    second = {"model": {"params": {"unet_config": {"params": tiny.UNET}}}}
    OmegaConf.save(OmegaConf.create(first), autoencoder)
    OmegaConf.save(OmegaConf.create(second), diffusion)
    classifier = {"width": 32, "depth": 1, "channel_mult": (1, 1)}
    monkeypatch.setitem(SIZES, "demo", (autoencoder, diffusion, classifier))


def line(capsys, *words) -> dict:
    assert bench.main([str(word) for word in words]) == 0
    (text,) = capsys.readouterr().out.splitlines()
    result = json.loads(text)
    assert {"date", "hardware", "revision"} <= result.keys()
    assert {"torch", "python"} <= result["versions"].keys()
    return result


# What is measured


def test_operations_are_counted():
    with torch.device("meta"):
        layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.empty(2, 3, 10, 10)
        # Two per multiply-add; the backward pass takes one product for the weights (x wants none).
        one = 2 * 2 * 10 * 10 * 8 * 3 * 9
        assert count_flops(lambda: layer(x)) == one
        assert count_flops(lambda: layer(x).sum().backward()) == 2 * one
        # qkv and out: 4 C^2 N multiply-adds; attention: 2 C N^2, in kernels fused elsewhere.
        block, x = AttentionBlock(64, num_heads=4), torch.empty(1, 64, 8, 8)
        assert count_flops(lambda: block(x)) == 2 * (4 * 64**2 * 64 + 2 * 64 * 64**2)
    layer, x = nn.Linear(5, 7), torch.ones(3, 5)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 5 * 7


def test_stopwatch_tells_parts_apart():
    watch = Stopwatch(CPU)
    for _ in range(2):
        time.sleep(0.02)
        watch.lap("long")
        watch.lap("short")
    seconds = watch.seconds()
    assert list(seconds) == ["total", "cpu", "long", "short"]
    assert seconds["long"] >= 0.04 and seconds["short"] < seconds["long"]
    assert seconds["total"] >= seconds["long"] + seconds["short"]
    assert seconds["cpu"] < seconds["long"]  # a sleeping process takes no processor time


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be restarted off Linux")
def test_peak_memory_is_that_of_the_run():

    def touched(mib: int) -> mmap.mmap:
        """Memory that is new for certain."""
        block = mmap.mmap(-1, mib * 2**20)
        np.frombuffer(block, np.uint8).fill(1)
        return block

    memory = PeakMemory(CPU)
    passing = touched(128)  # while it is built
    assert 100 < memory.mib() < 250
    passing.close()
    memory.restart()
    kept = touched(32)
    assert 20 < memory.mib() < 100
    kept.close()
    assert 20 < memory.mib() < 100


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


# The contest


@dataclass
class Clockwork:
    """A contestant whose times are known."""

    name: str
    times: list[float]
    log: list
    device: torch.device = CPU

    def load(self):
        self.log.append(f"load {self.name}")

    def build(self):
        self.facts = {"parameters": 1, "flops": 6e9}
        self._left = iter(self.times)
        return self

    def run(self):
        self.log.append(self.name)
        seconds = next(self._left)
        return {"total": seconds, "cpu": 2 * seconds, "part": seconds / 2}


def test_contestants_take_turns():
    log = []
    a, b = Clockwork("a", [9.0, 1.0, 2.0, 4.0], log), Clockwork("b", [9.0, 2.0, 8.0, 2.0], log)
    standings = compete({"a": a, "b": b}, 3, "none")
    assert log == ["load a", "load b", *"abababab"]  # the first two warm up
    result = compared(standings, [("a", "b")], 6)
    assert result["images_per_s"]["a"] == {"median": 3.0, "min": 1.5, "max": 6.0}
    # Of the same turn: 2/1, 8/2, 2/4. Medians over medians would say 1.
    assert result["images_per_s_ratio"]["a_over_b"] == {"median": 2.0, "min": 0.5, "max": 4.0}
    assert result["images_per_cpu_s_ratio"]["a_over_b"]["median"] == 2.0
    assert result["seconds"]["a"] == {"total": 2.0, "cpu": 4.0, "part": 1.0}
    assert result["gflop_per_image"]["a"] == 1.0 and result["tflop_per_s"]["a"] == 0.003
    assert "peak_memory_mib" not in result  # that of a shared process says nothing


@dataclass
class Ends:
    """A contestant that ends as told."""

    how: str
    device: torch.device = CPU

    def load(self):
        pass

    def build(self):
        if self.how == "user":
            raise UserError("there is no such thing")
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes(monkeypatch):
    """One process each: their numbers come back, and their ends are told in one line."""
    # A new process finds this module by its name.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    contestants = {"ours": Encoder("ours", TINY, 1, EXECUTION, 1)}
    standings = compete(contestants, 1, "turn")
    result = compared(standings, [], 1)
    assert result["seconds"]["ours"]["total"] > 0
    # The features of one image and the weights, not the libraries.
    assert 0.1 < result["peak_memory_mib"]["ours"] < 100
    with pytest.raises(UserError) as caught:
        compete({"x": Ends("killed")}, 1)
    assert str(caught.value) == (
        f"the process of x ended with status -9 (killed, as for too much memory); {LESS}"
    )


def test_a_process_tells_its_error():
    here, there = multiprocessing.Pipe()
    _serve(there, Ends("user"))
    assert here.recv() == (False, "there is no such thing")


# The networks


@pytest.mark.parametrize("size", SIZES)
def test_diffusers_networks_are_of_the_same_size(size):
    networks = Networks.of(size)
    with torch.device("meta"):
        ours, theirs = (count(build_unet(lib, networks.unet)[0]) for lib in LIBRARIES[:2])
    assert ours == theirs
    assert size != "paper" or ours == 294_963_459
    flops = [unet_flops(lib, networks.unet, 1, train=False) for lib in LIBRARIES[:2]]
    assert flops[0] == flops[1]


def test_monai_network_is_of_about_the_same_size():
    pytest.importorskip("monai", reason="the optional package monai is missing")
    networks = Networks.of("paper")
    with torch.device("meta"):
        size = count(build_unet("monai", networks.unet)[0])
    assert 0.93 < size / 294_963_459 < 1
    flops = [unet_flops(lib, networks.unet, 1, train=True) for lib in ("ours", "monai")]
    assert 0.95 < flops[1] / flops[0] < 1.05


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used")
@pytest.mark.parametrize("block", [AttentionBlock(64, num_heads=4), AttnBlock(64)])
def test_attention_runs_on_fused_kernels(block, monkeypatch):
    """Channels-first features were handed over with a stride, and all scores were made."""
    x = torch.randn(1, 64, 8, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = block(x)  # an error where it cannot be used
    for module in (blocks, autoencoder):
        monkeypatch.setattr(module, "attend", nn.functional.scaled_dot_product_attention)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="stride"),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        block(x)
    torch.testing.assert_close(block(x), fused)


def test_random_models_have_the_sizes_of_the_configurations():
    models = random_models(Networks.of("demo"))
    assert models.diffusion.latent_shape == (3, 12, 12)
    assert models.classifier.latent_shape == (3, 12, 12) and len(models.classes) == 9
    assert set(SIZES) == set(bench.SIZES)


# Training


def trained(library: str, source: Source, weights: dict | None = None):
    """The runner after one step of plain gradient descent."""
    runner = Training(library, TINY, source, EXECUTION, 1).build()
    if weights is not None:
        runner._net.load_state_dict(weights)
    before = {name: p.detach().clone() for name, p in runner._net.state_dict().items()}
    # AdamW's first step is the gradient's sign, which rounding decides where it is nearly 0.
    runner._optimizer = torch.optim.SGD(runner._net.parameters(), 1.0)
    torch.manual_seed(5)
    assert set(runner.run()) == {
        "total",
        "cpu",
        "data",
        "encode",
        "forward",
        "backward",
        "optimiser",
    }
    return runner, before


def test_both_sides_train_alike(sources):
    """From the same weights, on the same batch and noise, a step does the same to the weights."""
    ours, before = trained("ours", sources["latents"])
    weights = build_unet("ours", tiny.UNET)[0]
    weights.load_state_dict(before)
    theirs, _ = trained("diffusers", sources["latents"], unet_state(weights, tiny.UNET))
    expected, moved = unet_state(ours._net, tiny.UNET), 0.0
    for name, value in theirs._net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
        moved = max(moved, float((value - unet_state(weights, tiny.UNET)[name]).abs().max()))
    assert moved > 1e-2  # well above the tolerance


@pytest.mark.parametrize("library", LIBRARIES[:2])
def test_compiled_contestants_run_compiled(sources, monkeypatch, library):
    """The noise predictor and the encoder of every side, however they are called."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(bench_training, "BACKEND", backend)
    torch.compiler.reset()
    z_t, t, x = (
        torch.zeros(1, *tiny.LATENT),
        torch.zeros(1).long(),
        torch.zeros(1, 3, tiny.PIXELS, tiny.PIXELS),
    )
    for compiled in (True, False):
        graphs.clear()
        execution = replace(EXECUTION, compile=compiled)
        runner = Training(library, TINY, sources["png"], execution, 1).build()
        with torch.no_grad():
            runner._predict(z_t, t)
            predicting = len(graphs)
            runner._encode(x)
        assert (predicting > 0, len(graphs) > predicting) == (compiled, compiled)


def test_train_line(tiny_size, capsys):
    words = ("train", "--size", "demo", "--processes", "none", "--batch_size", 2, "--steps", 1)
    result = line(capsys, *words, "--repeats", 1, "--from", "latents", "images")
    arms = {f"{lib}_from_{s}" for lib in ("ours", "diffusers") for s in ("latents", "images")}
    assert result["images_per_s"].keys() == arms and result["shape"] == [2, *tiny.LATENT]
    assert "ours_from_latents_over_ours_from_images" in result["images_per_s_ratio"]
    assert "ours_from_images_over_diffusers_from_images" in result["images_per_s_ratio"]
    for arm in arms:
        parts = result["seconds"][arm]
        whole = sum(parts[p] for p in ("data", "encode", "forward", "backward", "optimiser"))
        # What it takes to return belongs to no part; numbers are rounded.
        assert 0.5 < whole / parts["total"] < 1.005
    flops, parameters = result["gflop_per_image"], result["parameters"]
    assert flops["ours_from_images"] > flops["ours_from_latents"] == flops["diffusers_from_latents"]
    assert parameters["ours_from_latents"] == parameters["diffusers_from_latents"]
    assert result["versions"]["diffusers"] and "peak_memory_mib" not in result


def test_ours_alone(tiny_size, capsys):
    words = ("train", "--size", "demo", "--processes", "none", "--batch_size", 1, "--steps", 1)
    result = line(
        capsys, *words, "--repeats", 1, "--peers", "--precision", "bf16", "--fused", "true"
    )
    assert result["images_per_s"].keys() == {"ours"} and result["images_per_s_ratio"] == {}
    assert result["dtype"] == "bfloat16 autocast" and result["fused"]
    assert "diffusers" not in result["versions"]


# Sampling


def test_both_sides_make_the_same_images(checkpoints):
    """diffusers' networks and loop give our images, so the times compare."""
    weights = Weights(diffusion=checkpoints / "diffusion.ckpt")
    theirs = Sampler("diffusers", weights, 2, 4, EXECUTION).build()
    model = load_model(checkpoints / "diffusion.ckpt", "diffusion").eval()
    z_T = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z_0 = ddim(model.eps_model(), model.schedule, z_T, time_pairs(1000, 4))
        ours = to_uint8(model.decode_first_stage(z_0))
        images = theirs.images(theirs.latents(z_T))
    # float32 through two formulas of one step, then rounded to grey levels.
    assert np.abs(ours - 255 * images).max() < 1
    # As the library's own pipeline does it.
    theirs.pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    piped = theirs.pipeline(2, generator, num_inference_steps=4, output_type="np").images
    assert np.abs(images - piped).max() < 1e-4


def test_sample_line(checkpoints, capsys, monkeypatch):
    calls = []
    forward = EncoderUNetModel.forward
    monkeypatch.setattr(
        EncoderUNetModel, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    options = [
        "-r",
        checkpoints / "diffusion.ckpt",
        "--classifier",
        checkpoints / "classifier.ckpt",
    ]
    options += ["-c", 2, "--batch_size", 1, "--repeats", 2, "--device", "cpu"]
    result = line(capsys, "sample", *options, "--processes", "none")
    assert result["shape"] == [1, *tiny.LATENT] and result["dtype"] == "float32"
    assert result["image"] == [tiny.PIXELS] * 2
    assert result["device"] == "cpu" and result["steps"] == 2 and result["repeats"] == 2
    for name in ("ours", "diffusers", "guided"):
        rate = result["images_per_s"][name]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert set(result["seconds"][name]) == {"total", "cpu", "steps", "decode"}
    assert result["images_per_s_ratio"]["ours_over_diffusers"]["min"] > 0
    assert result["images_per_cpu_s_ratio"]["guided_over_ours"]["min"] > 0
    assert len(calls) == 2 * (1 + 2)  # the steps of the warm-up and of two repeats, guided alone


def test_sample_without_classifier_and_images(checkpoints, capsys):
    words = ("-r", checkpoints / "diffusion.ckpt", "-c", 1, "--batch_size", 1, "--repeats", 1)
    result = line(capsys, "sample", *words, "--no_decode", "--peers", "--processes", "none")
    assert result["images_per_s"].keys() == {"ours"} and result["image"] is None
    assert "decode" not in result["seconds"]["ours"]


# Encoding


def test_encode_line(tiny_size, capsys):
    words = ("encode", "--size", "demo", "--batch_size", 1, "--steps", 1, "--repeats", 1)
    result = line(capsys, *words, "--processes", "none")
    assert result["shape"] == [1, 3, tiny.PIXELS, tiny.PIXELS]
    assert result["images_per_s"].keys() == {"ours", "diffusers"}
    assert result["gflop_per_image"]["ours"] == result["gflop_per_image"]["diffusers"] > 0
    assert result["parameters"]["ours"] == result["parameters"]["diffusers"]


# The data path


def test_data_line(tiny_size, capsys):
    words = ("data", "--size", "demo", "--batch_size", 2, "--batches", 1, "--repeats", 2)
    result = line(capsys, *words, "--tiles", 4, "--workers", 0, "--needed", 1e6)
    assert result["images_per_s"].keys() == set(bench.KINDS)
    assert result["bytes_per_tile"]["png"] > result["bytes_per_tile"]["jpeg"] > 0
    assert result["latents_over"].keys() == {"png", "jpeg", "webp"}
    assert result["cpu_ms_per_image"]["png"].keys() == {"decode", "transform", "collate"}
    assert result["cpu_ms_per_image"]["latents"].keys() == {"read", "collate"}
    for kind in bench.KINDS:
        rate = result["images_per_s"][kind]["0"]["median"]
        assert result["share_of_needed"][kind] == pytest.approx(rate / 1e6, rel=1e-3)
        cores = sum(result["cpu_ms_per_image"][kind].values()) * 1e3
        assert result["cores_needed"][kind] == pytest.approx(cores, rel=1e-3)


def test_what_was_prepared_meanwhile_is_no_speed(sources):
    """Before the clock starts, as many batches are taken as the workers may hold."""
    reader = Reading(replace(sources["png"], workers=2), 3).build()
    taken = []

    def batches():
        while True:
            # Those that were ready take no time.
            time.sleep(0.0 if len(taken) < 2 * PREFETCH else 0.02)
            taken.append(0)
            yield {}

    reader._stream = batches()
    assert reader.run()["total"] >= 3 * 0.02 and len(taken) == 2 * PREFETCH + 1 + 3


def test_sources_are_what_training_reads(sources):
    batch = next(sources["webp"].batches())
    assert batch["image"].shape == (2, 3, tiny.PIXELS, tiny.PIXELS)
    batch = next(sources["latents"].batches())
    assert batch["moments"].shape == (2, 6, *tiny.LATENT[1:])
    assert all(value >= 0 for value in milliseconds_by_part(sources["png"], 4, 1).values())


# Mistakes


def test_a_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="diffusers, which is not installed; python -m pip"):
        bench.main(["sample", "--device", "cpu"])
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UserError, match="monai, which is not installed.*leave it out: --peers$"):
        require(["monai"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "demo", "-r", "x"], "--size makes networks with fresh weights"),
        (["--classifier", "x"], "give -r too"),
        (["-r", "missing.ckpt"], "no file missing.ckpt"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        bench.main(["sample", *options, "--processes", "none"])


def test_usage_errors(capsys):
    for words in (
        [],
        ["fly"],
        ["sample", "-c", "0"],
        ["sample", "--size", "huge"],
        ["sample", "--peers", "monai"],
        ["train", "--from", "dreams"],
        ["data", "--kinds", "gif"],
        ["data", "--needed", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            bench.main(words)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_commands_on_record_parse():
    guide = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
    text = re.sub(r"\\\n\s*", "", guide.read_text() + bench.__doc__)
    commands = re.findall(r"^    (?:\w+=\w+ )?python scripts/bench\.py (.*)$", text, re.MULTILINE)
    assert len(commands) > 8
    parsed = [bench.parse_arguments(shlex.split(c, comments=True)) for c in commands]
    assert {args.bench for args in parsed} == {"train", "sample", "encode", "data"}
    on_gpu = [a for a in parsed if a.bench != "data" and a.compile and a.precision == "bf16"]
    assert any(a.bench == "train" and a.size == "paper" and a.peers for a in on_gpu)


def test_constants_of_the_command_are_those_of_the_modules():
    from ldm.bench import contest, loading, training

    assert bench.PEERS == bench_networks.PEERS and bench.KINDS == loading.KINDS
    assert bench.SOURCES == training.SOURCES and bench.PROCESSES == contest.PROCESSES
