"""Devices without a GPU: what is computed on PyTorch's `meta` device stays there.

Its tensors have shapes and no numbers. Whatever mixes them with tensors of the CPU, or asks for a
number, would fail on a GPU or make it wait.
"""

import ast
import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path

import pytest
import pytorch_lightning as pl
import test_eval
import tiny
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torchvision.models.vgg import cfgs, make_layers

from ldm import train as training
from ldm.checkpoint import load_model
from ldm.data.latents import channel_sums, latent_sums
from ldm.devices import Devices
from ldm.diffusion import guidance, make_process
from ldm.diffusion.samplers import sample
from ldm.evaluation.fidelity import fidelity
from ldm.features.extractor import Extractor
from ldm.features.neighbours import centroid_distances, nearest, neighbour_distances
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.auxiliary import DecoderFinetune
from ldm.models.classifier import NoisyLatentClassifier
from ldm.models.diffusion import LatentDiffusion
from ldm.models.label_adapter import LabelAdapter
from ldm.models.readout import ReadoutClassifier
from ldm.models.vit import TileClassifier
from ldm.models.vit_settings import Settings
from ldm.models.vit_training import Course, VitTraining
from ldm.modules.autoencoder import AttnBlock, ResnetBlock
from ldm.modules.autoencoder import AutoencoderKL as AutoencoderNet
from ldm.modules.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from ldm.modules.discriminator import NLayerDiscriminator
from ldm.modules.losses import PerceptualLoss, build_lpips
from ldm.modules.patch_pca import PatchPCA
from ldm.modules.readout import Readout
from ldm.modules.unet import POOLS, EncoderUNetModel, UNetModel
from ldm.run import RunFolder

ROOT = Path(training.__file__).parents[1]
BATCH = 4
META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
asks_for_a_driver = pytest.mark.skipif(
    torch.__version__.startswith("2.6.") and not torch.cuda.is_available(),
    reason="tensors without memory of torch 2.6 ask for a CUDA driver",
)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices.

    By itself `meta` refuses elementwise operations and whatever needs a number, but lets matrix
    products, convolutions and indices pass. A scalar of the CPU may go with any tensor, as in CUDA.

    Args:
        copies: Whether tensors may be copied to the device. A GPU waits for that, too, unless their
            memory is pinned.
    """

    def __init__(self, copies: bool = False):
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        is_copy = func.overloadpacket in COPIES
        if not (is_copy and self.copies):
            devices = {x.device.type for x in tensors if x.ndim or is_copy}
            assert len(devices) < 2, f"{func} on {' and '.join(sorted(devices))}"
        return result


# Networks


def unet(**changes) -> UNetModel:
    return UNetModel(**{**tiny.UNET, **changes})


def half_unet(**changes) -> EncoderUNetModel:
    return EncoderUNetModel(**{**tiny.UNET, "out_channels": 3, **changes})


def latents(count: int = BATCH) -> Tensor:
    return torch.randn(count, *tiny.LATENT, device=META)


def images(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, tiny.PIXELS, tiny.PIXELS, device=META)


def steps(count: int = BATCH) -> Tensor:
    return torch.randint(1000, (count,), device=META)


def attentive_autoencoder() -> AutoencoderNet:
    return AutoencoderNet({**tiny.DDCONFIG, "attn_resolutions": [16]}, 3)


NETWORKS = {
    "UNet": (unet, lambda: (latents(), steps())),
    "UNet with labels": (
        lambda: unet(num_classes=3, resblock_updown=False, use_scale_shift_norm=False),
        lambda: (latents(), steps(), torch.randint(-1, 3, (BATCH,), device=META)),
    ),
    "UNet recomputed": (
        lambda: unet(use_checkpoint=True, use_new_attention_order=True, num_head_channels=16),
        lambda: (latents(), steps()),
    ),
    **{
        f"half UNet {pool}": (
            lambda pool=pool: half_unet(pool=pool, num_head_channels=16),
            lambda: (latents(), steps()),
        )
        for pool in POOLS
    },
    "autoencoder": (attentive_autoencoder, lambda: (images(),)),
    "discriminator": (lambda: NLayerDiscriminator(3, n_layers=3), lambda: (images(),)),
    "readout": (
        lambda: Readout(features=8, classes=3),
        lambda: (torch.randn(BATCH, 8, device=META), steps()),
    ),
    "ViT": (
        lambda: TileClassifier(num_classes=3, **test_eval.NETWORK),
        lambda: (torch.zeros(BATCH, 3, tiny.PIXELS, tiny.PIXELS, dtype=torch.uint8, device=META),),
    ),
}


def results(found) -> Tensor:
    found = found[0] if isinstance(found, tuple) else found
    return found.square().mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_stay_on_their_device(name):
    build, inputs = NETWORKS[name]
    with META:
        net = build()
    with OneDevice():
        results(net(*inputs())).backward()
    assert all(p.grad is None or p.grad.device == META for p in net.parameters())


class TableOnTheCPU(torch.nn.Module):
    """A broken copy of a time embedding: its table is no buffer and does not follow the module."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(1000, 8)

    def forward(self, t: Tensor) -> Tensor:
        return self.table[t]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda: TableOnTheCPU().to(META)(steps()), "index"),
        (lambda: torch.nn.Linear(4, 2)(torch.randn(1, 4, device=META)), "t|mm"),
        (lambda: torch.nn.Embedding(3, 2, device=META)(torch.zeros(1).long()), "embedding"),
        (lambda: latents() + torch.randn(tiny.LATENT), "meta"),
        (lambda: latents() * torch.tensor(2.0, device=META).item(), "item"),
        (lambda: latents().isfinite().all() or None, "item"),
        (lambda: torch.zeros(BATCH, device="cpu").to(META), "_to_copy"),
        (lambda: latents()[steps(1) > 3], "nonzero"),
        (lambda: latents().cpu(), "copy|data"),
    ],
)
def test_a_broken_copy_is_caught(broken: Callable, words):
    with OneDevice(), pytest.raises(Exception, match=words):
        broken()


# Training


class Noted:
    """Keeps the numbers that a step would look at, which `meta` does not have."""

    def __init__(self):
        self.numbers: list[Tensor] = []

    def add(self, number: Tensor, use: Callable[[float], None]) -> None:
        assert number.device == META and number.numel() == 1 and callable(use)
        self.numbers.append(number)

    def settle(self, wait: bool = True) -> None:
        pass


class Anywhere(CPUAccelerator):
    """Lets a process of the CPU train on another device."""

    def setup_device(self, device: torch.device) -> None:
        pass


class OnMeta(SingleDeviceStrategy):
    """Trains on `meta`, from which nothing can be brought back."""

    def __init__(self):
        super().__init__(META, Anywhere())

    def teardown(self) -> None:
        # Lightning would bring all that was logged to the CPU.
        self.lightning_module.trainer._results.clear()
        self.lightning_module.trainer._logger_connector.reset_metrics()


class Watch(pl.Callback):
    """Refuses two devices in every batch after the first, which fills tables and caches."""

    def __init__(self):
        self.mode, self.batches = ExitStack(), 0

    def on_train_batch_start(self, *_) -> None:
        if self.batches:
            self.mode.enter_context(OneDevice())

    def on_train_batch_end(self, *_) -> None:
        self.mode.close()
        self.batches += 1

    def on_exception(self, *_) -> None:
        self.mode.close()


def train(model: pl.LightningModule, item: dict, folder: Path, count: int = 2) -> Watch:
    """The trainer of every stage, on `meta`: batches of an item for so many steps."""
    model.learning_rate, model.seed, model.arrivals, watch = 1e-3, 0, Noted(), Watch()
    model.on_fit_start = lambda: None  # asks once whether the latent scale is known
    settings = {
        "accelerator": "auto",
        "strategy": OnMeta(),
        "max_steps": count,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 100,
    }
    run, args = RunFolder(folder), ([watch], settings, False)
    trainer = training.build_trainer(model, run, Devices(), *args)
    trainer.fit(model, repeat(default_collate([item] * BATCH)))
    assert watch.batches == count == trainer.global_step
    assert model.arrivals.numbers
    devices = {tensor.device for tensor in model.state_dict().values()}
    assert devices == {META}
    return watch


def item(**others) -> dict:
    image = torch.zeros(3, tiny.PIXELS, tiny.PIXELS)
    return {"image": image, "label": 1, "path": "a.png", **others}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meta")
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    tiny.save(tiny.diffusion(autoencoder), folder / "diffusion.ckpt")
    return folder


def autoencoder_module(perceptual_weight: float = 0.0, **loss) -> AutoencoderKL:
    params = {"disc_start": 0, "perceptual_weight": 0.0, "kl_weight": 1e-4, **loss}
    node = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}
    model = AutoencoderKL(tiny.DDCONFIG, 3, node)
    if perceptual_weight > 0:
        model.loss.perceptual_weight = perceptual_weight
        with META:
            state = make_layers(cfgs["D"]).state_dict()
            lpips = build_lpips({f"features.{name}": value for name, value in state.items()})
            model.loss.perceptual = PerceptualLoss(lpips)
    return model


@pytest.mark.parametrize("loss", [{"disc_ramp": 2}, {"disc_weight": 0.0, "perceptual_weight": 1.0}])
def test_training_an_autoencoder_stays_on_its_device(loss, tmp_path):
    model = autoencoder_module(**loss)
    model.gradient_clip_val, model.gradient_clip_algorithm = 1.0, "norm"
    train(model, item(), tmp_path)


@pytest.mark.parametrize(
    "params",
    [
        {"scheduler_config": tiny.SCHEDULE, "loss_weighting": "min_snr", "loss_type": "l2"},
        {"parameterization": "v", "rescale_zero_terminal_snr": True, "use_ema": False},
        {"parameterization": "flow", "time_shift": "auto"},
        {"parameterization": "flow", "time_sampling": "uniform"},
    ],
)
def test_training_a_diffusion_model_stays_on_its_device(params, folder, tmp_path):
    train(tiny.diffusion(folder / "autoencoder.ckpt", **params), item(), tmp_path)


def test_training_on_cached_latents_stays_on_its_device(folder, tmp_path):
    model = tiny.diffusion(folder / "autoencoder.ckpt")
    moments = torch.zeros(2 * tiny.LATENT[0], *tiny.LATENT[1:])
    train(model, {"moments": moments, "label": 0, "path": "a.png"}, tmp_path)


def test_training_a_label_adapter_stays_on_its_device(folder, tmp_path):
    model = LabelAdapter(pretrained=str(folder / "diffusion.ckpt"), tune="embedding")
    model.use_classes(tiny.CLASSES)
    train(model, item(), tmp_path)


def test_training_a_decoder_stays_on_its_device(folder, tmp_path):
    model = DecoderFinetune(str(folder / "autoencoder.ckpt"), aux_arch="resnet10t", aux_start=1)
    model.use_classes(tiny.CLASSES)
    train(model, item(), tmp_path)


@pytest.mark.parametrize(
    "params",
    [
        {"t_sampler": "uniform", "anneal_steps": 10},
        {"t_sampler": "stratified", "microbatch": 2},
    ],
)
def test_training_a_classifier_stays_on_its_device(params, folder, tmp_path):
    diffusion = load_model(folder / "diffusion.ckpt", "diffusion")
    first_stage = diffusion.first_stage_model
    model = tiny.classifier(diffusion, first_stage=first_stage, **params)
    assert isinstance(model, NoisyLatentClassifier)
    train(model, item(), tmp_path)


def test_training_a_readout_stays_on_its_device(folder, tmp_path):
    diffusion = load_model(folder / "diffusion.ckpt", "diffusion")
    model = ReadoutClassifier.of(diffusion, tiny.CLASSES, width=16, anneal_steps=10)
    features = torch.zeros(model.head_settings["features"])
    train(model, {"features": features, "t": 3.0, "label": 1, "path": "a.png"}, tmp_path)


@pytest.mark.parametrize("options", [{}, {"mixup": 0, "cutmix": 0, "clip_grad": 1.0}])
def test_training_a_vit_stays_on_its_device(options, tmp_path):
    settings = Settings(**test_eval.NETWORK, batch_size=BATCH, epochs=1, **options)
    net = TileClassifier(num_classes=3, drop_path=0.1, **test_eval.NETWORK)
    net.classes = tiny.CLASSES
    train(VitTraining(net, settings, Course(BATCH, 2, (1,)), 0, None), item(), tmp_path)


def test_a_step_that_waits_is_caught(folder, tmp_path, monkeypatch):
    """A broken copy of the loss check, as it was: it asks the device for the loss."""

    def check_finite(self, loss, batch, batch_idx):
        assert torch.isfinite(loss).all()

    monkeypatch.setattr(LatentDiffusion, "check_finite", check_finite)
    with pytest.raises(RuntimeError, match="item"):
        train(tiny.diffusion(folder / "autoencoder.ckpt"), item(), tmp_path)


# Sampling and features


@functools.cache
def on_meta(build: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    with META:
        return build(channel_mult=[1], attention_resolutions=[1]).eval()


KINDS = ("none", "z_t", "z_0", "shared", "labels", "weak")


def guided(kind: str, process, interval) -> Callable[[Tensor, Tensor], Tensor]:
    """A noise predictor on `meta` that is guided in this way."""
    net = other = on_meta(unet)
    classify, y = on_meta(half_unet), torch.zeros(BATCH, dtype=torch.int64, device=META)
    note, scale = (lambda t, value: value.to(META)), 2.0
    if kind == "none":
        return net
    if kind in ("labels", "weak"):
        return guidance.extrapolate(other, net, scale, interval, note)
    if kind == "shared":
        eps_fn, gradient = guidance.shared_pass(
            lambda z, t: (net(z, t), classify(z, t)), y, interval=interval, on_log_prob=note
        )
    elif kind == "z_t":
        eps_fn, gradient = net, guidance.classifier_log_prob_grad(classify, y, 1.5, note)
    else:
        eps_fn, gradient = net, guidance.z_0_log_prob_grad(classify, net, process, y, 1.0, note)
    options = {"normalise": kind == "shared", "clip": 1.0, "on_ratio": note}
    return guidance.classifier_guidance(eps_fn, gradient, process, scale, interval, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++2m", "euler", "heun"])
def test_samplers_stay_on_their_device(name, kind):
    """A step (of heun two) of each with each guidance; times are known, so nothing is asked."""
    process = make_process({"name": "flow" if name in ("euler", "heun") else "scaled_linear"})
    limit = 3.0 if process.samplers[0] == "euler" else None
    interval = None if kind == "z_0" else (0, 900)
    eps_fn, seen = guided(kind, process, interval), []
    process.signal(steps(1), latents()), process.noise(steps(1), latents())  # fills the tables

    def noise(j: int) -> Tensor:
        return latents()

    count = 2 if name == "heun" else 1
    pairs, options = process.time_pairs(count), {"limit": limit, "on_step": seen.append}
    with OneDevice(), torch.no_grad():
        z = sample(name, eps_fn, process, latents(), pairs, 1.0, noise, **options)
    assert len(seen) == count and z.device == META and z.shape == (BATCH, *tiny.LATENT)


def test_features_and_neighbours_stay_on_their_device():
    vit, net = TileClassifier(num_classes=3, **test_eval.NETWORK).to(META).eval(), on_meta(unet)
    with OneDevice():
        x, logits = vit.features_and_logits(images(9))
        _, features = net.with_features(latents(9), steps(9), [0, 1])
        found = (*nearest(x, x[:4]), neighbour_distances(x, 2), centroid_distances(x, x[:3]))
    assert {tensor.device for tensor in (logits, features, *found)} == {META}


# A GPU that is only described: FakeTensor computes shapes and strides as CUDA does

# Loses channels_last on a GPU before PyTorch 2.15, whose kernel knows the plain layout only. The
# block around it gives the layout back; torch.compile replaces the kernel by one that keeps it.
PLAIN_ON_CUDA = {"GroupNorm"}
BLOCKS = (ResBlock, AttentionBlock, Upsample, Downsample, ResnetBlock, AttnBlock) + (
    torch.nn.Conv2d,
    torch.nn.GroupNorm,
    torch.nn.SiLU,
)


@contextmanager
def described_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


@contextmanager
def half_precision(enabled: bool):
    """Autocast as on a GPU, which torch.autocast leaves out where there is none.

    In float16: for the kernels of bfloat16 PyTorch asks the GPU, and both take the same layouts.
    """
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


class ResBlockInPlainLayout(ResBlock):
    """A broken copy: it gives its features back in the plain layout."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x, emb).contiguous()


def broken_unet() -> UNetModel:
    net = unet()
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.__class__ = ResBlockInPlainLayout
    return net


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("build", "losing"),
    [
        (unet, set()),
        (half_unet, set()),
        (attentive_autoencoder, set()),
        (broken_unet, {"ResBlockInPlainLayout"}),
    ],
)
@asks_for_a_driver
def test_every_block_keeps_channels_last(build, losing, autocast):
    """Also in autocast, in which products and convolutions, and nothing else, compute in half."""
    lost, seen, halves = set(), set(), set()

    def look(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        ours = [x for x in (inputs[0], output) if x.ndim == 4]
        name = type(module).__name__
        seen.add(name)
        if [x.is_contiguous(memory_format=torch.channels_last) for x in ours] == [True, False]:
            lost.add(name)
        if output.dtype == torch.float16 and inputs[0].dtype == torch.float32:
            halves.add(name)

    with described_gpu(), half_precision(autocast):
        net = build()
        for module in net.modules():
            if isinstance(module, (*BLOCKS, torch.nn.Linear)):
                module.register_forward_hook(look)
        x = torch.randn(BATCH, 3, tiny.LATENT[1], tiny.LATENT[1])
        x = x.contiguous(memory_format=torch.channels_last)
        net(x) if build is attentive_autoencoder else net(x, torch.arange(BATCH))
    assert len(seen) >= 4 and lost - PLAIN_ON_CUDA == losing, (seen, lost)
    assert ("Conv2d" in halves) == autocast and not halves & {"GroupNorm", "SiLU"}


@pytest.mark.parametrize("count", [20, 40])  # of fewer and of more images than features
@asks_for_a_driver
def test_features_come_to_the_cpu_where_a_fidelity_is_summed(count, tmp_path):
    """It is summed in NumPy; a broken copy, whose features stay on the device, is refused."""
    tiny.tiles(tmp_path, 1, 0)
    with described_gpu():
        net = torch.nn.Conv2d(3, 32, tiny.PIXELS)
        extractor = Extractor(
            name="net",
            network="net",
            identity="",
            transform=lambda tile: torch.from_numpy(tile).permute(2, 0, 1) / 255,
            forward=lambda x: {"features": net(x).flatten(1)},
            device=torch.device("cuda"),
            preprocessing="none",
        )
        found = extractor.extract(sorted(tmp_path.rglob("*.png")))
    assert found.features.device.type == "cpu" and len(found.features) == 3
    with pytest.raises(Exception, match="numpy|item"):
        fidelity(*torch.zeros(2, count, 32, device=META))


@asks_for_a_driver
def test_a_latent_scale_is_summed_on_the_cpu():
    with FakeTensorMode():
        with torch.device("cuda"):
            net = AutoencoderNet(tiny.DDCONFIG, 3)
        tiles = [{"image": torch.randn(3, tiny.PIXELS, tiny.PIXELS)}] * 3
        sums = (latent_sums, lambda *args: channel_sums(*args, 3))
        found = [sum_(tiles, [0, 2], lambda x: net.encode(x.to("cuda"))) for sum_ in sums]
    assert [x.device.type for x in found] == ["cpu", "cpu"]


@asks_for_a_driver
def test_principal_components_stay_on_a_gpu():
    with described_gpu():
        net = PatchPCA(tiny.PIXELS)
        images, posterior = net(torch.randn(2, 3, tiny.PIXELS, tiny.PIXELS))
    assert images.device.type == posterior.mean.device.type == "cuda"


# Code for CUDA alone, by function, and why it is not left to PyTorch.
PINNED = "a GPU copies pinned memory beside its work"
OPTIONS = "devices are options of a command: which there are, and which is meant"
FOR_CUDA = {
    "ldm/data/caching.py: _encode": PINNED,
    "ldm/data/datamodule.py: DataModuleFromConfig._loader": PINNED,
    "ldm/diffusion/samplers.py: IndexedNoise._draw": PINNED,
    "ldm/evaluation/training.py: make_loader": PINNED,
    "ldm/models/readout.py: FeatureData.train_dataloader": PINNED,
    "ldm/devices.py: Devices._computes_bf16": OPTIONS,
    "ldm/devices.py: Devices.device": OPTIONS,
    "ldm/devices.py: one_device": OPTIONS,
    "ldm/devices.py: resolve_device": OPTIONS,
    "ldm/devices.py: shared_devices": OPTIONS,
    "ldm/devices.py: training_devices": OPTIONS,
    "ldm/devices.py: Arrivals.add": "only CUDA tells by an event that a copy has arrived",
    "ldm/run.py: hardware": "names of GPUs, for the record of a run",
    "ldm/synthesis/production.py: _start": "name of the GPU, for the record of a folder",
    "ldm/synthesis/production.py: Writer.__init__": "a stream of its own decodes beside sampling",
    "ldm/synthesis/production.py: Writer._write": "as above",
}


def for_cuda(root: Path = ROOT) -> set[str]:
    """FILE: FUNCTION of everything that asks for CUDA."""
    found = set()

    def visit(node: ast.AST, path: str, scope: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        asks = isinstance(node, ast.Attribute) and node.attr == "cuda"
        if asks or (isinstance(node, ast.Constant) and str(node.value).startswith("cuda")):
            found.add(f"{path}: {scope}")
        for child in ast.iter_child_nodes(node):
            visit(child, path, scope)

    for path in [*root.glob("*.py"), *root.glob("ldm/**/*.py"), *root.glob("scripts/*.py")]:
        visit(ast.parse(path.read_text()), str(path.relative_to(root)), "")
    return found


def test_code_for_cuda_alone_is_listed(tmp_path):
    assert for_cuda() == FOR_CUDA.keys()
    (tmp_path / "ldm").mkdir()
    code = "class A:\n    def f(self, x):\n        {}\ndef g(x):\n    return x\n"
    for number, line in enumerate(("x.cuda()", "torch.cuda.synchronize()", "x.to('cuda:1')")):
        (tmp_path / "ldm" / f"{number}.py").write_text(code.format(line))
    assert for_cuda(tmp_path) == {f"ldm/{number}.py: A.f" for number in range(3)}
