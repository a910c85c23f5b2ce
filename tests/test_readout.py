"""A classifier that reads the frozen diffusion UNet: training, guidance, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch

import sample_diffusion
from ldm.checkpoint import load_model, read_checkpoint
from ldm.cli import parse
from ldm.commands import classify as classifier_train
from ldm.data.tiles import TileFolder, read_tile, symmetry, to_tensor
from ldm.devices import Devices
from ldm.diffusion.guidance import classifier_log_prob_grad, shared_pass
from ldm.errors import UserError
from ldm.features.source import parse_features
from ldm.models.classifier import network_config_of, start_from_unet
from ldm.models.readout import FeatureMaker, ReadoutClassifier
from ldm.modules.unet import EncoderUNetModel, UNetModel
from ldm.synthesis.models import load_models
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser
from scripts import baselines

KINDS = ("eps", "v", "flow")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.tiles(tmp_path_factory.mktemp("data") / "train", per_class=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """KIND.ckpt, a diffusion model, and KIND-readout.ckpt, a fresh readout of it."""
    folder = tmp_path_factory.mktemp("models")
    autoencoder = tiny.save(tiny.autoencoder(), folder / "autoencoder.ckpt")
    for kind in KINDS:
        model = tiny.diffusion(autoencoder, parameterization=kind)
        tiny.save(model, folder / f"{kind}.ckpt")
        readout = ReadoutClassifier.of(model, tiny.CLASSES, width=16)
        tiny.randomise(readout.net, 5)
        tiny.save(readout, folder / f"{kind}-readout.ckpt")
    return folder


def train(models: Path, data: Path, logdir: Path, *more: str, kind: str = "flow"):
    argv = ["--readout", str(models / f"{kind}.ckpt"), "--data_dir", str(data)]
    argv += ["--logdir", str(logdir), "--name", "readout", "--logger", "--workers", "0"]
    argv += ["--readout_draws", "2", "--batch_size", "8", "--readout_width", "16"]
    argv += ["--precision", "32", "--val_fraction", "0.3", *more]
    return classifier_train.train(parse(classifier_train.Options, argv))


def test_training_reads_the_unet_and_keeps_no_copy(models, tmp_path):
    """Learns the classes of the tiny tiles; the checkpoint holds the readout alone."""
    # Of six validation tiles, the rounding of another release of torch decides about one or two.
    data, val = (tiny.tiles(tmp_path / f"{seed}", per_class=20, seed=seed) for seed in (0, 1))
    words = ["--val_data_dir", str(val), "--iterations", "300", "--lr", "0.01"]
    train(models, data, tmp_path, *words, "--readout_draws", "12")
    result = json.loads((tmp_path / "readout" / "result.json").read_text())
    assert result["last"]["val/accuracy_t0-249"] > 0.6  # 1/3 by chance; of all quarters less
    state = read_checkpoint(tmp_path / "readout")["state_dict"]
    assert not any("blocks" in name for name in state)
    size = sum(value.numel() for value in state.values())
    diffusion = load_model(models / "flow.ckpt", "diffusion")
    assert size < sum(p.numel() for p in diffusion.network().parameters()) / 4
    loaded = load_models(models / "flow.ckpt", tmp_path / "readout")
    assert loaded.classes == tiny.CLASSES


def test_resumed_equals_uninterrupted(models, data, tmp_path):
    for name, steps in (("whole", [6]), ("halves", [3, 6])):
        for count in steps:
            train(models, data, tmp_path / name, "--iterations", str(count), "--anneal_lr", "False")
    whole, halves = (
        read_checkpoint(tmp_path / name / "readout")["state_dict"] for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[k], halves[k]) for k in whole) and whole.keys() == halves.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_the_same_as_two(kind, models):
    """Noise and gradient of the shared pass are those of separate passes."""
    found = load_models(models / f"{kind}.ckpt", models / f"{kind}-readout.ckpt")
    readout, y = found.classifier, torch.tensor([0, 2])
    z_t = torch.randn(2, *readout.latent_shape, generator=torch.Generator().manual_seed(0))
    t = found.diffusion.schedule.times(400, 2, "cpu")
    eps_fn, grad = shared_pass(readout.shared_model(), y, 1.5)
    with torch.no_grad():
        expected = found.diffusion.eps_model()(z_t, t)
    torch.testing.assert_close(eps_fn(z_t, t), expected)
    apart = classifier_log_prob_grad(readout.logits_model(), y, 1.5)(z_t, t)
    assert apart.abs().max() > 1e-4
    torch.testing.assert_close(grad(z_t, t), apart)


@pytest.mark.parametrize("kind", KINDS)
def test_guided_sampling(kind, models):
    """Guidance moves the images, by the shared pass as by a classifier of its own."""
    found = load_models(models / f"{kind}.ckpt", models / f"{kind}-readout.ckpt")
    process = found.diffusion.schedule

    def latents(scale: float, on: str = "z_t", separate: bool = False):
        sampling = Sampling(process.samplers[0], 3, 0.0, scale, 0, interval=(0, 900))
        synthesiser = Synthesiser(found, sampling)
        if separate:
            synthesiser._shared = None
        return synthesiser.latents([0, 1], [0, 1])

    plain, guided = latents(0.0), latents(3.0)
    assert (guided - plain).abs().max() > 1e-3
    torch.testing.assert_close(guided, latents(3.0, separate=True), rtol=1e-3, atol=1e-4)


def test_another_unet_is_refused(models, tmp_path):
    other = load_model(models / "flow.ckpt", "diffusion")
    with torch.no_grad():
        other.ema.net.out[2].bias += 1e-3
    tiny.save(other, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="reads the features of another diffusion model"):
        load_models(tmp_path / "other.ckpt", models / "flow-readout.ckpt")


def test_raw_weights_are_refused(models):
    """The readout reads the average, so the raw network's noise cannot come from its pass."""
    found = load_models(models / "flow.ckpt", models / "flow-readout.ckpt")
    with pytest.raises(UserError, match="averaged weights"):
        Synthesiser(found, Sampling("euler", 3, 0.0, 2.0, 0, ema=False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classifier_width", "64"], "option of an encoder"),
        (["--readout_blocks", "0,9"], "up-blocks 1 to 4"),
        (["--devices", "2"], "one device"),
    ],
)
def test_bad_options(options, words, models, data, tmp_path):
    with pytest.raises((UserError, SystemExit)) as error:
        train(models, data, tmp_path, *options, "--dry-run")
    if isinstance(error.value, UserError):
        assert words in str(error.value)


def test_features_are_means_and_deviations_of_the_blocks():
    net = UNetModel(**tiny.UNET).eval()
    tiny.randomise(net, 1)
    z, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    seen = []
    hooks = [net.middle_block.register_forward_hook(lambda m, i, h: seen.append(h))]
    hooks.append(net.output_blocks[1].register_forward_hook(lambda m, i, h: seen.append(h)))
    with torch.no_grad():
        output, features = net.with_features(z, t, [0, 2])
    expected = [torch.cat([h.mean((2, 3)), h.std((2, 3))], 1) for h in seen]
    torch.testing.assert_close(features, torch.cat(expected, 1))
    assert torch.equal(output, net(z, t))
    assert features.shape[1] == 2 * (net.feature_widths[0] + net.feature_widths[2])


def test_features_do_not_depend_on_the_batch(models, data):
    """Draws are functions of the seed, so that a resumed training reads the same."""
    diffusion = load_model(models / "flow.ckpt", "diffusion")
    readout = ReadoutClassifier.of(diffusion, tiny.CLASSES)
    from ldm.data.tiles import TileFolder

    tiles = TileFolder(data, tiny.PIXELS, labelled=True, augment=["d4"])
    make = lambda: FeatureMaker(readout, diffusion, Devices(), 8).training(tiles, 2, 0)  # noqa: E731
    one, two = make(), make()
    for name in ("features", "t"):
        assert torch.equal(one.datasets[name], two.datasets[name])
    half = len(tiles)
    times = one.datasets["t"]
    assert not torch.equal(times[:half], times[half:])


@pytest.mark.parametrize(
    "heads", [{"num_heads": 4}, {"num_heads": 4, "num_head_channels": 16}, {"num_heads": 1}]
)
def test_an_encoder_started_from_a_unet_computes_what_it_computes(heads, tmp_path):
    """Input blocks and middle, equal to the bit: a UNet that counts heads stays one."""
    from ldm.models.diffusion import LatentDiffusion

    autoencoder = tiny.save(tiny.autoencoder(), tmp_path / "autoencoder.ckpt")
    unet = {**tiny.UNET, **heads}
    diffusion = LatentDiffusion(
        unet_config={"target": "ldm.modules.unet.UNetModel", "params": unet},
        first_stage_ckpt=str(autoencoder),
        image_size=16,
        scale_factor=0.8,
    ).eval()
    tiny.randomise(diffusion.ema.net, 3)
    model = tiny.classifier(diffusion, net_config=network_config_of(diffusion, 3))
    start_from_unet(model, diffusion, "--init_from")
    assert isinstance(model.net, EncoderUNetModel)
    seen = {}
    for name, net in (("unet", diffusion.network()), ("encoder", model.eval().net)):
        for i, block in enumerate([*net.input_blocks, net.middle_block]):
            block.register_forward_hook(lambda m, x, h, key=(name, i): seen.update({key: h}))
    z, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        diffusion.network()(z, t)
        model.net(z, t)
    count = len(seen) // 2
    assert count > 3
    for i in range(count):
        assert torch.equal(seen["unet", i], seen["encoder", i]), i


def test_init_from_trains_a_classifier_of_the_diffusion_models_latents(models, data, tmp_path):
    argv = ["--init_from", str(models / "flow.ckpt"), "--data_dir", str(data), "--name", "c"]
    argv += ["--logdir", str(tmp_path), "--logger", "--workers", "0", "--iterations", "2"]
    argv += ["--batch_size", "4", "--precision", "32"]
    _, model = classifier_train.train(parse(classifier_train.Options, argv))
    loaded = load_models(models / "flow.ckpt", tmp_path / "c")
    assert loaded.classifier.schedule == loaded.diffusion.schedule
    assert model.net.out_channels == 3


def sample(models: Path, out: Path, *more: str, kind: str = "flow") -> list[dict]:
    argv = [
        "--model",
        str(models / f"{kind}.ckpt"),
        "--out",
        str(out),
        "-c",
        "3",
        "--device",
        "cpu",
    ]
    argv += ["--classifier", str(models / f"{kind}-readout.ckpt"), *more]
    assert sample_diffusion.main(argv) == 0
    return list(csv.DictReader((out / "manifest.csv").open()))


def test_a_readout_is_asked_for_the_class_of_clean_tiles(models, data, tmp_path):
    """As features that are logits, and as a row of a table that nothing is fitted for."""
    name = f"guide:{models / 'flow-readout.ckpt'}@{models / 'flow.ckpt'}"
    tiles = TileFolder(data, tiny.PIXELS, labelled=True)
    found = parse_features(name).open("cpu").extract(tiles.paths, batch_size=5)
    loaded = load_models(models / "flow.ckpt", models / "flow-readout.ckpt")
    x = torch.stack([tiles[i]["image"] for i in range(len(tiles))])
    with torch.no_grad():
        z_0 = loaded.diffusion.latents({"image": x}, sample=False)
        t = torch.zeros(len(x), dtype=torch.int64)
        logits = loaded.classifier.logits_model()(z_0, t) / loaded.classifier.temperature
    torch.testing.assert_close(found.others["logits"], logits, rtol=1e-4, atol=1e-4)

    for split in ("train5", "val", "test"):
        (tmp_path / split).symlink_to(data)
    argv = ["--data_path", str(tmp_path), "--subset", "train5", "--kind", "classifier"]
    argv += ["--logdir", str(tmp_path / "logs"), "--workers", "0", "--device", "cpu"]
    baselines.main([*argv, "--features", name])
    summary = json.loads((tmp_path / "logs/classifier/train5/summary.json").read_text())
    right = (logits.argmax(dim=1) == torch.tensor(tiles.labels)).double().mean()
    assert summary["per_seed"][0]["test"]["accuracy"] == pytest.approx(float(right))
    for features, words in (
        (f"diffusion:{models / 'flow.ckpt'}@20", "is no classifier"),
        (f"guide:{models / 'flow-readout.ckpt'}", "give guide:CLASSIFIER@RUN"),
        (f"guide:{models / 'flow-readout.ckpt'}@{models / 'eps.ckpt'}", "flow-readout"),
    ):
        with pytest.raises(UserError, match=words):
            baselines.main([*argv, "--features", features])


def test_the_command_samples_a_flow_with_a_readout(models, tmp_path):
    rows = sample(models, tmp_path / "out", "-n", "1", "--latent_limit", "5")
    assert {row["sampler"] for row in rows} == {"euler"} and len(rows) == 3
    assert {row["interval_high"] for row in rows} == {"950"}
    assert {row["limit"] for row in rows} == {"5.0"} and {row["source"] for row in rows} == {""}
    with pytest.raises(UserError, match="does not suit"):
        sample(models, tmp_path / "other", "-n", "1", "--sampler", "ddim")


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_variations_of_labelled_tiles(kind, models, data, tmp_path):
    """Each starts from a tile of its own class; it is the same in any batch, and near its source
    where it is hardly noised."""
    more = ("-n", "2", "--start_from", str(data), "--classifier_scale", "0")
    rows = sample(models, tmp_path / "a", *more, "--strength", "0.5", kind=kind)
    assert all(row["source"].split("/")[0] == row["class"] for row in rows)
    assert {row["strength"] for row in rows} == {"0.5"}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "variations of real tiles" in card and "belongs to a patient" not in card
    assert len({row["source"] for row in rows}) == 6
    again = ("--batch_size", "8", "--classes", tiny.CLASSES[2])
    other = sample(models, tmp_path / "b", *more, *again, "--strength", "0.5", kind=kind)
    for row in other:
        a, b = (tmp_path / name / row["file"] for name in "ab")
        assert a.read_bytes() == b.read_bytes()
    assert len(other) == 2


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_variation_gets_the_detail_of_its_source(kind, models, data, tmp_path):
    """Hardly noised, it is its source; without the detail, what the first stage keeps of it."""
    more = ("-n", "7", "--start_from", str(data), "--classifier_scale", "0", "--strength", "0.01")
    distances = {}
    for detail in (None, 0.5, 1):
        out, given = tmp_path / f"{detail}", () if detail is None else ("--source_detail", detail)
        rows = sample(models, out, *more, *map(str, given), kind=kind)
        assert {row["source_detail"] for row in rows} == {"" if detail is None else f"{detail:.1f}"}
        assert ("its finest grain" in (out / "README.md").read_text()) == (detail is not None)
        distances[detail] = []
        for row in rows:
            # The seventh image of a class starts from its first tile again, flipped.
            tile = to_tensor(read_tile(data / row["source"]))
            tile = symmetry(tile, int(row["index"]) // 6)
            other = to_tensor(read_tile(out / row["file"]))
            distances[detail].append(float((tile - other).abs().mean()))
    for none, half, whole in zip(*distances.values(), strict=True):
        assert whole < 0.6 * half < 0.6 * none


def test_a_folder_of_before_the_detail_goes_on(models, data, tmp_path):
    """Its record and its manifest know of no `source_detail`."""
    more, out = ("--start_from", str(data), "--strength", "0.5"), tmp_path / "out"
    made = sample(models, out, "-n", "1", *more)
    settings = json.loads((out / "settings.json").read_text())
    del settings["images"]["source_detail"]
    (out / "settings.json").write_text(json.dumps(settings))
    with (out / "manifest.csv").open("w", newline="") as stream:
        columns = [key for key in made[0] if key != "source_detail"]
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    on = sample(models, out, "-n", "2", *more)
    assert [row for row in on if row["index"] == "0"] == made and len(on) == 6
    with pytest.raises(UserError, match="source_detail"):
        sample(models, out, "-n", "2", *more, "--source_detail", "1")


def test_variations_of_unlabelled_tiles(models, data, tmp_path):
    """The classifier says what each tile is; one it is sure of comes first."""
    flat = tmp_path / "pool"
    flat.mkdir()
    for path in data.glob("*/*.png"):
        (flat / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    from ldm.synthesis.sources import Sources

    found = load_models(models / "flow.ckpt", models / "flow-readout.ckpt")
    sources = Sources(flat, found.diffusion, found.classes, found.classifier)
    assert sum(len(files) for files in sources.by_class.values()) == 18
    sure = Sources(flat, found.diffusion, found.classes, found.classifier, least=0.9999999)
    with pytest.raises(UserError, match="no tile for"):
        sure.require(found.classes)
    with pytest.raises(UserError, match="unlabelled tiles need [-`]*classifier`?"):
        Sources(flat, found.diffusion, found.classes)


def test_tiles_for_measuring_are_no_sources(models, data, tmp_path):
    held = tmp_path / "val"
    data.rename(held)
    try:
        with pytest.raises(UserError, match="for measuring"):
            sample(models, tmp_path / "out", "--start_from", str(held))
    finally:
        held.rename(data)
