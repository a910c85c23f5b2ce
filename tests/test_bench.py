"""benchmarks/: what they measure, and that all libraries compute the same."""

import json
import mmap
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import encode, gpu, loading, sample, train
from benchmarks.common import (
    STATUS,
    Ready,
    compared,
    compete,
    peak_memory,
    prepare,
    restart_peak,
    spread,
)
from benchmarks.networks import (
    FILES,
    Execution,
    Networks,
    autoencoder_flops,
    build_autoencoder,
    build_unet,
    count,
    count_flops,
    unet_flops,
)
from ldm.cli import parse
from ldm.data.tiles import to_uint8
from ldm.devices import one_device
from ldm.diffusion.samplers import IndexedNoise
from ldm.errors import UserError
from ldm.exchange.diffusers_export import build_pipeline, unet_state
from ldm.modules import autoencoder
from ldm.modules.autoencoder import AttnBlock
from ldm.modules.blocks import AttentionBlock
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

SIZES = ("demo", "small", "paper")
CPU = torch.device("cpu")
EXECUTION = Execution()
TINY = Networks(tiny.UNET, tiny.DDCONFIG, 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    return {kind: loading.make_source(folder, kind, TINY, 4, 2) for kind in loading.KINDS}


# What is measured


def test_operations_are_counted():
    def convolution(backward: bool) -> int:
        def run():
            y = nn.Conv2d(3, 8, 3, padding=1)(torch.empty(2, 3, 10, 10))
            if backward:
                y.sum().backward()

        return count_flops(run)

    # Two per multiply-add; the backward pass has one product for the weights (x wants none).
    one = 2 * 2 * 10 * 10 * 8 * 3 * 9
    assert convolution(backward=False) == one and convolution(backward=True) == 2 * one
    # qkv and out: 4 C^2 N multiply-adds; attention: 2 C N^2, in kernels fused elsewhere.
    run = lambda: AttentionBlock(64, num_heads=4)(torch.empty(1, 64, 8, 8))  # noqa: E731
    assert count_flops(run) == 2 * (4 * 64**2 * 64 + 2 * 64 * 64**2)


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of a process is known on Linux only")
def test_peak_memory_is_that_since_the_restart():

    def touched(mib: int) -> mmap.mmap:
        """Memory that is certainly new."""
        block = mmap.mmap(-1, mib * 2**20)
        np.frombuffer(block, np.uint8).fill(1)
        return block

    restart_peak(CPU)
    base = peak_memory(CPU)
    touched(128).close()  # while it is built
    assert 100 < peak_memory(CPU) - base < 250
    restart_peak(CPU)
    touched(32).close()
    assert 20 < peak_memory(CPU) - base < 100


def test_a_turn_reports_the_parts_of_a_step():
    calls = []

    def step(lap):
        calls.append(lap)
        lap("first")
        lap("second")

    turn = prepare(lambda: Ready(step, 7, 9), CPU, 0.001)()
    assert set(turn["seconds"]) == {"total", "cpu", "first", "second"}
    assert turn["parameters"] == 7 and turn["flops"] == 9 and len(calls) > 2


def test_ratios_are_of_the_same_turn():
    def turns(*totals: float) -> list[dict]:
        return [
            {"seconds": {"total": s, "cpu": 2 * s}, "memory": s, "parameters": 1, "flops": 6e9}
            for s in totals
        ]

    result = compared({"a": turns(1.0, 2.0, 4.0), "b": turns(2.0, 8.0, 2.0)}, [("a", "b")], 6)
    assert result["images_per_s"]["a"] == {"median": 3.0, "min": 1.5, "max": 6.0}
    # 2/1, 8/2 and 2/4. The medians, 2 and 2, would say 1.
    assert result["images_per_s_ratio"]["a_over_b"] == {"median": 2.0, "min": 0.5, "max": 4.0}
    assert result["images_per_cpu_s_ratio"]["a_over_b"]["median"] == 2.0
    assert result["peak_memory_mib"] == {"a": 4.0, "b": 8.0}
    assert result["peak_memory_ratio"] == {"a_over_b": 0.5}
    assert result["gflop_per_image"]["a"] == 1.0 and result["tflop_per_s"]["a"] == 0.003
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def refuse() -> Ready:
    raise UserError("there is no such thing")


def end() -> Ready:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "message"),
    [(refuse, "x: there is no such thing"), (end, "x: its process was killed")],
)
def test_an_error_of_a_contestant_is_told_in_one_line(build, message, monkeypatch):
    # A new process finds this module by its name.
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{Path().resolve()}")
    args = parse(encode.Options, ["--repeats", "1", "--min_run_time", "0"])
    with pytest.raises(UserError, match=message):
        compete({"x": build}, CPU, args)


# The networks


def test_sizes_are_known_everywhere():
    assert set(SIZES) == set(FILES) == set(sample.CLASSIFIERS)


@pytest.mark.parametrize("size", SIZES)
def test_diffusers_networks_are_of_the_same_size(size):
    networks = Networks.of(size)
    with torch.device("meta"):
        ours, theirs = (count(build_unet(x, networks.unet)[0]) for x in ("ours", "diffusers"))
        first, second = (count(build_autoencoder(x, networks)[0]) for x in ("ours", "diffusers"))
    assert ours == theirs and first == second
    assert size != "paper" or ours == 294_963_459
    assert unet_flops("ours", networks, 1) == unet_flops("diffusers", networks, 1)
    assert autoencoder_flops("ours", networks, 1) == autoencoder_flops("diffusers", networks, 1)


def test_monai_network_is_of_about_the_same_size():
    pytest.importorskip("monai", reason="the optional package monai is missing")
    networks = Networks.of("paper")
    with torch.device("meta"):
        size = count(build_unet("monai", networks.unet)[0])
    assert 0.93 < size / 294_963_459 < 1
    flops = [unet_flops(library, networks, 1, train=True) for library in ("ours", "monai")]
    assert 0.95 < flops[1] / flops[0] < 1.05


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used")
@pytest.mark.parametrize("block", [AttentionBlock(64, num_heads=4), AttnBlock(64)])
def test_attention_runs_on_fused_kernels(block, monkeypatch):
    x = torch.randn(1, 64, 8, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = block(x)  # an error where it cannot be used
    if isinstance(block, AttentionBlock):
        return  # its values lie beside one another as they are
    # Channels-first features were handed over with a stride, and all scores were made.
    monkeypatch.setattr(autoencoder, "attend", nn.functional.scaled_dot_product_attention)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="stride"),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        block(x)
    torch.testing.assert_close(block(x), fused)


@pytest.mark.parametrize("compiled", [True, False])
def test_networks_are_compiled_where_wanted(compiled):
    for library in ("ours", "diffusers"):
        net, _ = build_autoencoder(library, TINY)
        Execution(compile=compiled).maybe_compile(net.encoder)
        assert (net.encoder._compiled_call_impl is not None) == compiled


# Training


def trained(library: str, source: loading.Source, monkeypatch, weights: dict | None = None):
    """Weights of the noise predictor before and after a step of plain gradient descent."""
    nets = []

    def sgd(parameters, *args, **kwargs):
        # AdamW's first step is the gradient's sign, which rounding decides where it is nearly 0.
        return torch.optim.SGD(parameters, 1.0)

    def built(*args):
        net, predict = build_unet(*args)
        nets.append(net)
        return net, predict

    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    monkeypatch.setattr("benchmarks.networks.build_unet", built)
    ready = train.build(library, TINY, EXECUTION, source.batches)
    net = nets[0]  # others were built to count operations
    if weights is not None:
        net.load_state_dict(weights)
    before = {name: p.detach().clone() for name, p in net.state_dict().items()}
    torch.manual_seed(5)
    parts = []
    ready.step(parts.append)
    assert parts == ["data", "encode", "forward", "backward", "optimiser"]
    return net, before


def test_both_libraries_train_alike(sources, monkeypatch):
    """From the same weights, on the same batch and noise, a step does the same to the weights."""
    ours, before = trained("ours", sources["latents"], monkeypatch)
    weights = build_unet("ours", tiny.UNET)[0]
    weights.load_state_dict(before)
    start = unet_state(weights, tiny.UNET)
    theirs, _ = trained("diffusers", sources["latents"], monkeypatch, start)
    expected, moved = unet_state(ours, tiny.UNET), 0.0
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-2  # well above the tolerance


def test_training_from_images_encodes_them(sources):
    from_images = train.build("ours", TINY, EXECUTION, sources["png"].batches)
    from_latents = train.build("ours", TINY, EXECUTION, sources["latents"].batches)
    assert from_images.flops > from_latents.flops
    from_images.step(lambda part: None)


# Sampling


CLASSIFIER = {"width": 32, "depth": 1, "channel_mult": (1, 1)}


def test_sampling():
    guides = {"": None, "guided_": CLASSIFIER}
    ready = {
        guided + library: sample.build(library, EXECUTION, 1, TINY, 2, classifier)
        for guided, classifier in guides.items()
        for library in ("ours", "diffusers")
    }
    for one in ready.values():
        one.step(lambda part: None)
    flops = {arm: one.flops for arm, one in ready.items()}
    assert flops["guided_ours"] > flops["ours"] == flops["diffusers"]
    assert flops["guided_ours"] == flops["guided_diffusers"]
    assert len({one.parameters for one in ready.values()}) == 1


def test_guidance_of_diffusers_is_ours():
    """The plain loop around diffusers' networks gives the images that our sampler gives."""
    models = sample.random_models(TINY, CLASSIFIER)
    devices = one_device("cpu")
    ours = Synthesiser(models, Sampling("ddim", 4, eta=0.0, scale=1.0, seed=0), devices)
    z_T = IndexedNoise(0, [0, 0], range(2), tiny.LATENT, CPU).initial()
    pipeline = build_pipeline(models.diffusion)
    with torch.no_grad():
        images = sample.guided_images(pipeline, models.classifier.logits_model(), z_T, 4)
    expected = ours.images(ours.latents([0, 0], range(2)))
    assert np.abs(to_uint8(images).astype(int) - expected).max() <= 1  # rounding to levels


def test_random_models_have_the_sizes_of_the_configurations():
    models = sample.random_models(Networks.of("demo"), sample.CLASSIFIERS["demo"])
    assert models.diffusion.latent_shape == (3, 12, 12)
    assert models.classifier.latent_shape == (3, 12, 12) and len(models.classes) == 9


# On a GPU


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", 1)
    monkeypatch.setattr(gpu, "BLOCK", 100)


def gpu_lines(tmp_path, *titles, networks=TINY, tasks=(), seconds=900.0, compiled=False):
    """Status and results of the GPU's benchmark, with tiny networks on the CPU."""
    args = gpu.Options(train_batch=2, autoencoder_batch=2, sample_batch=2, custom_steps=2)
    known = gpu.tasks_of(networks, CLASSIFIER, args)
    tasks = [*tasks, *(task for task in known if task.title in titles)]
    # There is time for those that are compiled alone, or for the others.
    times = {"seconds": 1e6, "compilation": -1e6} if compiled else {"compilation": 1e6}
    tasks = [replace(task, **times) for task in tasks]
    until, out = time.monotonic() + seconds, tmp_path / "gpu.json"
    status = gpu.measure_all(networks, tasks, ["diffusers"], CPU, until, 0.05, out, side=64)
    return status, json.loads(out.read_text())


def test_what_the_time_allows_is_measured(tmp_path, capsys):
    status, result = gpu_lines(tmp_path, "training step")
    peak, parts, *lines = result["lines"]
    assert status == 0 and peak["tflop_per_s"] > 0 and parts["ms"]["norm bf16"] > 0
    eager = [line for line in lines if not line["compile"]]
    assert len(eager) == 6 and all("skipped" in line for line in lines if line["compile"])
    for line in eager:
        assert line["images_per_s"] > 0 and line["share_of_peak"] > 0
        shares = list(line["kernels"].values())
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.001
        assert shares or line["seconds"] >= gpu.LONG  # on a machine that does much else
    for ours, theirs in zip(eager[::2], eager[1::2], strict=True):
        assert (ours["library"], theirs["library"]) == ("ours", "diffusers")
        assert ours["gflop_per_image"] == theirs["gflop_per_image"] > 0
        assert ours["parameters"] == theirs["parameters"]
    for summary in result["summaries"]:
        fastest = {lib: 0.0 for lib in summary["best"]}
        for line in eager:
            if line["task"] == summary["task"]:
                rate = max(fastest[line["library"]], line["images_per_s"])
                fastest[line["library"]] = rate
        assert {lib: line["images_per_s"] for lib, line in summary["best"].items()} == fastest
        ratio = fastest["ours"] / fastest["diffusers"]
        assert summary["ours_over"]["diffusers"] == pytest.approx(ratio, rel=1e-3)
    # The machine, each line, and a summary of each task: what its choices gave.
    _, *printed, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert printed == result["lines"]
    rates = {line["channels_last"]: line["images_per_s"] for line in eager[:3:2]}
    gain = summary["choices"]["channels_last"]
    assert gain == pytest.approx(rates[True] / rates[False], rel=1e-3)
    assert summary["choices"].keys() == {"channels_last", "search"}


def test_compiled_lines_are_made_ready_side_by_side(tmp_path, monkeypatch):
    """In processes of their own, which here compile nothing; one that fails leaves the others."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    networks = Networks(tiny.UNET, {**tiny.DDCONFIG, "attn_resolutions": [tiny.PIXELS]}, 3)
    status, result = gpu_lines(tmp_path, "autoencoder step", networks=networks, compiled=True)
    ours, theirs, *others = result["lines"][2:]
    assert status == 1 and ours["images_per_s"] > 0 and ours["first_step_s"] > 0
    assert "attn_resolutions" in theirs["failed"] and all("skipped" in line for line in others)


def test_kernels_are_told_apart():
    """Names as profiles of Hopper GPUs hold them."""
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_2_64x3": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash": "attention",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>": "layout",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize": "product",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "product",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>": "norm",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>": "optimiser",
        "triton_red_fused__to_copy_native_group_norm_silu_7": "compiled",
        "Memcpy HtoD (Pinned -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "elementwise",
        "void other_kernel<float>": "void other_kernel",
    }
    assert {name: gpu.kind_of(name) for name in names} == names


@pytest.mark.parametrize(("flash", "cudnn", "chosen"), [(1, 2, True), (2, 1, False), (1, None, 0)])
def test_the_faster_kernel_of_attention_is_used(flash, cudnn, chosen, monkeypatch):
    monkeypatch.setenv(gpu.FLASH, "")  # so that it is as it was afterwards
    monkeypatch.delenv(gpu.FLASH)
    ms = {"attention flash": flash} | ({} if cudnn is None else {"attention cudnn": cudnn})
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        gpu.choose_attention(ms)
        assert (gpu.FLASH in os.environ) == chosen
        assert torch.backends.cuda.cudnn_sdp_enabled() == (before and not chosen)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_line_that_fails_leaves_the_others(tmp_path):
    """diffusers has no such autoencoder."""
    networks = Networks(tiny.UNET, {**tiny.DDCONFIG, "attn_resolutions": [tiny.PIXELS]}, 3)
    status, result = gpu_lines(tmp_path, "autoencoder step", networks=networks)
    failed = [line for line in result["lines"] if "failed" in line]
    assert status == 1 and {line["library"] for line in failed} == {"diffusers"}
    assert all("attn_resolutions" in line["failed"] for line in failed)


def test_no_line_begins_without_the_time_for_it(tmp_path):
    status, result = gpu_lines(tmp_path, "training step", "guided sampling", seconds=0.5)
    assert status == 0 and all("skipped" in line for line in result["lines"][2:])


def test_a_batch_is_halved_until_it_fits(tmp_path):
    def build(library, execution, batch_size):
        if batch_size > 3:
            raise torch.OutOfMemoryError
        return Ready(lambda lap: None, 1, 10)

    _, result = gpu_lines(tmp_path, tasks=[gpu.Task("small", build, 12, 1, 1)])
    assert {line.get("batch_size", 3) for line in result["lines"][2:]} == {3}


# The data path


def test_sources_are_what_training_reads(sources):
    for kind in ("webp", "shards"):
        batch = next(sources[kind].batches())
        assert batch["image"].shape == (2, 3, tiny.PIXELS, tiny.PIXELS)
    batch = next(sources["latents"].batches())
    assert batch["moments"].shape == (2, 6, *tiny.LATENT[1:])
    assert loading.cpu_milliseconds(sources["png"], 0.001).keys() == {
        "decode",
        "transform",
        "collate",
    }


# The commands


def result_of(command, capsys, *words) -> dict:
    command.main([str(word) for word in [*words, "--repeats", 2, "--min_run_time", 0.001]])
    result = json.loads(capsys.readouterr().out)  # one line, and nothing else
    assert {"date", "hardware", "revision"} <= result.keys()
    assert {"torch", "python"} <= result["versions"].keys()
    return result


@pytest.mark.slow
def test_encode_line(capsys):
    result = result_of(encode, capsys, "--size", "demo", "--batch_size", 2, "--precision", "bf16")
    assert result["shape"] == [2, 3, 48, 48] and result["dtype"] == "bfloat16 autocast"
    assert result["images_per_s"].keys() == {"ours", "diffusers"}
    assert result["images_per_s_ratio"].keys() == {"ours_over_diffusers"}
    assert result["gflop_per_image"]["ours"] == result["gflop_per_image"]["diffusers"] > 0
    assert result["parameters"]["ours"] == result["parameters"]["diffusers"]
    assert result["versions"]["diffusers"]
    # The features of two images and the weights, not the libraries.
    assert not STATUS.exists() or 0.1 < result["peak_memory_mib"]["ours"] < 150


def test_loading_line(capsys):
    words = ("--size", "demo", "--batch_size", 2, "--tiles", 4, "--workers", 0)
    result = result_of(loading, capsys, *words, "--kinds", "png", "jpeg", "latents", "--needed", 50)
    kinds = {"png", "jpeg", "latents"}
    assert result["images_per_s"]["0"].keys() == kinds == result["cpu_ms_per_image"].keys()
    assert result["cpu_ms_per_image"]["latents"].keys() == {"read", "collate"}
    assert result["bytes_per_tile"]["png"] > result["bytes_per_tile"]["jpeg"] > 0
    rate = result["images_per_s"]["0"]["png"]["median"]
    assert result["share_of_needed"]["png"] == pytest.approx(rate / 50, rel=1e-3)


@pytest.mark.slow
def test_train_and_sample_lines(capsys):
    words = ("--size", "demo", "--batch_size", 1)
    result = result_of(train, capsys, *words, "--from", "latents", "images")
    arms = {f"{lib}_from_{s}" for lib in ("ours", "diffusers") for s in ("latents", "images")}
    assert result["images_per_s"].keys() == arms and result["shape"] == [1, 3, 12, 12]
    assert "ours_from_latents_over_ours_from_images" in result["images_per_s_ratio"]
    assert "ours_from_images_over_diffusers_from_images" in result["images_per_s_ratio"]
    flops = result["gflop_per_image"]
    assert flops["ours_from_images"] > flops["ours_from_latents"] == flops["diffusers_from_latents"]
    result = result_of(sample, capsys, *words, "-c", 2, "--peers")
    assert result["images_per_s_ratio"].keys() == {"guided_over_ours"}


def test_usage_errors():
    for command, words, name in (
        (sample, ["-c", "0"], "--custom_steps"),
        (sample, ["--size", "huge"], "--size"),
        (sample, ["--peers", "monai"], "--peers"),
        (train, ["--from", "dreams"], "--sources"),
        (loading, ["--kinds", "gif"], "--kinds"),
        (loading, ["--needed", "0"], "--needed"),
    ):
        with pytest.raises(UserError, match=name):
            parse(command.Options, words)
    with pytest.raises(UserError):
        encode.main(["--device", "abacus"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="CUDA"):
            gpu.main([])
