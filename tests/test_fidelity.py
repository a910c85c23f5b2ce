"""Fidelity: directions, closed forms, agreement with torch-fidelity, extractors, the command.

Networks have random weights that the tests make; a ViT of 32 pixels where the network is no matter.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from tiny import tiles as make_tiles
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ldm.checkpoint import load_model, write_checkpoint
from ldm.cli import run_command
from ldm.data.tile_files import TileFiles
from ldm.data.tiles import to_tensor
from ldm.errors import UserError
from ldm.evaluation.fidelity import (
    KID_SUBSETS,
    count_warnings,
    fidelity,
    frechet_distance,
    kid_subset_size,
    measure,
)
from ldm.features.sets import FeatureSet
from ldm.features.source import VIT, FeatureSource, parse_features
from ldm.models.vit import TileClassifier
from scripts import fidelity as command


def load_extractor(network, weights=None, device="cpu"):
    return parse_features(str(network), weights).open(device)


def normal(count: int, seed: int, shift: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + spread * torch.randn(count, 4, generator=generator)


def test_the_same_distribution_is_close_and_a_shifted_one_is_not():
    same = fidelity(normal(1000, 0), normal(1000, 1))
    shifted = fidelity(normal(1000, 0), normal(1000, 1, shift=3.0))
    assert same["frechet_distance"] < 0.1 and abs(same["kernel_distance"]) < 0.2
    assert same["precision"] > 0.8 and same["recall"] > 0.8
    # Two Gaussians of one covariance: the squared distance of their means, 4 x 9.
    assert shifted["frechet_distance"] == pytest.approx(36, rel=0.05)
    assert shifted["kernel_distance"] > 10 and shifted["precision"] < 0.1


def test_a_collapsed_set_has_low_recall_but_keeps_precision():
    collapsed = fidelity(normal(600, 0), normal(600, 1, spread=0.1))
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.2


def test_real_and_synthetic_are_not_interchangeable():
    narrow, wide = normal(500, 0, spread=0.1), normal(500, 1)
    assert fidelity(real=wide, synthetic=narrow)["recall"] < 0.2
    assert fidelity(real=narrow, synthetic=wide)["precision"] < 0.2


def test_order_does_not_matter_for_the_closed_forms():
    real, synthetic = normal(200, 0), normal(200, 1, shift=0.5)
    shuffled = synthetic[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    first, second = fidelity(real, synthetic), fidelity(real, shuffled)
    for name in ("frechet_distance", "precision", "recall"):
        assert first[name] == pytest.approx(second[name], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("real", "synthetic"),
    [(normal(7, 0), normal(50, 1)), (normal(50, 0), normal(50, 1)[:, :3])],
)
def test_sets_that_do_not_compare(real, synthetic):
    with pytest.raises(AssertionError):
        fidelity(real, synthetic)


def through_torch_fidelity(first: torch.Tensor, second: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(f) for f in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(("n", "m"), [(9, 9), (9, 300), (300, 9), (50, 51), (300, 300)])
def test_frechet_distance_is_torch_fidelitys_for_any_number_of_images(n, m):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    first = torch.randn(n, 50, generator=generator, dtype=torch.float64) @ mixing
    second = torch.randn(m, 50, generator=generator, dtype=torch.float64) + 1
    assert frechet_distance(first, second) == pytest.approx(
        through_torch_fidelity(first, second), rel=1e-6
    )


def test_frechet_distance_of_a_small_set_to_itself_is_zero():
    few = 10 * torch.randn(20, 500, generator=torch.Generator().manual_seed(0)).double()
    assert abs(frechet_distance(few, few)) < 1e-8
    # Rounding errors in 480 eigenvalues that are 0, under a square root:
    assert abs(through_torch_fidelity(few, few)) > 1e-6


def test_measure_of_too_few_images_is_null_with_the_reason():
    found = measure(normal(7, 0), normal(50, 1))
    assert found["fid"] is found["kid"] is found["recall"] is None
    assert found["images_real"] == 7 and "7 real, 50 fake" in found["reason"]


# Extractors


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Weights of torch-fidelity's Inception: its names and shapes, random values."""
    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            pass

    net = Unfilled("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    path = empty.with_name("inception.pth")
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        "real": make_tiles(root / "real", per_class=12, seed=0),
        "fake": make_tiles(root / "fake", per_class=10, seed=1),
    }


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = TileClassifier("vit_tiny", 3, input_size=32, patch_size=8)
    net.classes = ["ADI", "LYM", "TUM"]
    path = tmp_path_factory.mktemp("vit") / "vit.ckpt"
    write_checkpoint(path, tiny.vit_checkpoint(net))
    return path


def run(tmp_path: Path, real, *fakes, weights=None, options: tuple = ()) -> dict | list:
    """The JSON that the command writes."""
    out = tmp_path / "fidelity.json"
    words = ["--out", out, "--device", "cpu", "--num_workers", 0, *options]
    words += [] if real is None else ["--real", real]
    words += [] if weights is None else ["--weights", weights]
    words += ["--fake", *fakes] if fakes else []
    command.main([str(word) for word in words])
    return json.loads(out.read_text())


def test_inception_agrees_with_torch_fidelity(inception_file, tile_sets, tmp_path):
    real, fake = tmp_path / "real", tmp_path / "fake"
    for target, source, count in ((real, "real", 5), (fake, "fake", 4)):
        for name in ("ADI", "LYM"):
            (target / name).mkdir(parents=True)
            for path in sorted((tile_sets[source] / name).iterdir())[:count]:
                shutil.copy(path, target / name)
    options = ("--extractor", "inception", "--batch_size", 5)
    ours = run(tmp_path, real, fake, weights=inception_file, options=options)
    theirs = calculate_metrics(
        input1=str(fake),
        input2=str(real),
        cuda=False,
        batch_size=4,
        fid=False,  # a root of 2048 x 2048; its arithmetic is compared above
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(10, 8),
        rng_seed=0,
        samples_find_deep=True,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    overall = ours["overall"]
    # Theirs is single precision.
    assert overall["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert overall["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    for name in ("precision", "recall"):
        assert overall[name] == pytest.approx(theirs[name], abs=1e-6)
    assert overall["fid"] > 1e-3  # random weights see something
    assert ours["extractor"]["features"] == 2048
    assert "299" in ours["extractor"]["preprocessing"]


def test_missing_weights_say_where_from_and_where_to(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_extractor("inception")
    message = str(caught.value)
    assert "\n" not in message and "python scripts/fetch_weights.py inception" in message
    assert "https://github.com/toshas/torch-fidelity/releases" in message
    assert str(tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05") in message
    monkeypatch.setattr("ldm.features.weights.cached_weights", lambda config: None)
    with pytest.raises(UserError, match=r"fetch_weights.py dinov2_base"):
        load_extractor("dinov2_base")


class Planted:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_that_carry_code_are_not_run(tmp_path):
    evil, trace = tmp_path / "evil.pth", tmp_path / "trace"
    with evil.open("wb") as file:
        pickle.dump(Planted(trace), file, protocol=2)
    with pytest.raises(UserError, match="evil.pth"):
        load_extractor("inception", evil)
    assert not trace.exists()
    with pytest.raises(Exception, match=r".*"):  # what torch-fidelity makes of it by itself
        FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(evil))
    assert trace.exists()


def test_inception_takes_tiles_of_several_sizes(inception_file, tmp_path):
    extractor = load_extractor("inception", inception_file)
    generator = np.random.default_rng(0)
    paths = []
    for i, side in enumerate((40, 64, 40)):  # 0 and 2 pass together, 1 alone
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(paths[-1])
    together, _, sizes = extractor.extract(paths, 3, 0)
    alone = torch.cat([extractor.extract([path], 1, 0).features for path in paths])
    assert sizes == [(40, 40), (64, 64), (40, 40)]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_dinov2_sees_the_whole_tile_at_224_pixels(tile_sets, tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # of 518 pixels
    # Meta's own files have a mask token and the name of the teacher's position embedding.
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**published.state_dict(), "mask_token": torch.zeros(1, 384)}, path)
    extractor = load_extractor("dinov2", path)
    tile = next((tile_sets["real"] / "ADI").iterdir())
    values = extractor.extract([tile], 1, 0).features

    net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    state = timm.models.vision_transformer.checkpoint_filter_fn(published.state_dict(), net)
    net.load_state_dict(state)
    with Image.open(tile) as image:
        pixels = np.array(image.resize((224, 224), Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(values, net(x), rtol=1e-3, atol=1e-4)


def test_a_local_vit_of_timm_sees_what_timm_would_show_it(tile_sets, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    extractor = load_extractor("timm:test_vit", tmp_path / "vit.pth")
    tile = next((tile_sets["real"] / "LYM").iterdir())
    config = timm.data.resolve_model_data_config(net) | {"crop_pct": 0.875, "crop_mode": "center"}
    transform = timm.data.create_transform(**config)
    with Image.open(tile) as image, torch.no_grad():
        expected = net(transform(image.convert("RGB"))[None])
    torch.testing.assert_close(
        extractor.extract([tile], 1, 0).features, expected, rtol=1e-3, atol=1e-4
    )
    assert str(config["input_size"][1]) in extractor.preprocessing


def test_features_of_a_run_are_those_of_the_selection_before_their_length_is_taken(vit, tile_sets):
    files = TileFiles.below(tile_sets["real"], True)
    extractor = load_extractor(vit)
    raw = FeatureSet.compute(files, extractor, 7, 0, raw=True)
    theirs = FeatureSet.compute(files, FeatureSource(VIT, str(vit)).open("cpu"), 16, 0)
    torch.testing.assert_close(torch.nn.functional.normalize(raw.values, dim=1), theirs.values)


def test_features_of_a_run_that_is_not_finished_are_those_of_its_last_checkpoint(vit, tmp_path):
    (tmp_path / "seed0" / "checkpoints").mkdir(parents=True)
    shutil.copy(vit, tmp_path / "seed0" / "checkpoints" / "last.ckpt")
    assert load_extractor(tmp_path / "seed0").identity == load_extractor(vit).identity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_those_of_the_cpu(inception_file, vit, tile_sets):
    paths = TileFiles.below(tile_sets["real"], True).paths[:4]
    for kind, weights in (("inception", inception_file), (vit, None)):
        cpu, cuda = (
            load_extractor(kind, weights, name).extract(paths, 4, 0).features
            for name in ("cpu", "cuda")
        )
        # TF32 would be off by about a thousandth.
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-4 * float(cpu.abs().max()))


# The command


def distort(source: Path, target: Path, change) -> Path:
    """A copy of class folders, every tile changed by `change(array, generator)`."""
    generator = np.random.default_rng(0)
    for path in sorted(source.rglob("*.png")):
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            changed = change(np.array(image).astype(float), generator)
        Image.fromarray(changed.clip(0, 255).astype(np.uint8)).save(new)
    return target


def test_directions(tile_sets, vit, tmp_path):
    real, same = tile_sets["real"], tile_sets["fake"]
    noisy = distort(same, tmp_path / "noisy", lambda x, g: x + g.normal(0, 90, x.shape))
    collapsed = tmp_path / "collapsed"
    for name in ("ADI", "LYM", "TUM"):  # one real tile again and again
        (collapsed / name).mkdir(parents=True)
        for i in range(10):
            shutil.copy(real / name / "0_0.png", collapsed / name / f"{i}.png")
    shuffled = tmp_path / "shuffled"  # the same tiles, each class's in the next one's folder
    for name, other in (("ADI", "LYM"), ("LYM", "TUM"), ("TUM", "ADI")):
        shutil.copytree(same / name, shuffled / other)
    results = run(tmp_path, real, same, noisy, collapsed, shuffled, real, weights=vit)
    good, noise, one, mixed, itself = (r["overall"] for r in results)
    by_class = [r["per_class"]["ADI"] for r in results]

    assert itself["fid"] == pytest.approx(0, abs=1e-6 * good["fid"] + 1e-9)
    assert itself["precision"] == itself["recall"] == 1
    assert "both sets are the same files" in results[4]["warnings"]
    assert noise["fid"] > 3 * good["fid"]
    assert by_class[1]["kid"] > by_class[0]["kid"] + 3 * by_class[0]["kid_std"]
    assert noise["precision"] < 0.2 < 0.5 < good["precision"]
    assert one["recall"] < 0.1 < 0.5 < good["recall"] and one["precision"] == 1
    # Wrong labels leave the whole as it is, which is why there are values per class.
    assert mixed["fid"] == pytest.approx(good["fid"], rel=1e-6)
    assert by_class[3]["fid"] > 3 * by_class[0]["fid"]
    assert by_class[3]["precision"] < 0.2 < by_class[0]["precision"]


def test_neither_batch_size_nor_file_order_matters(tile_sets, vit, tmp_path):
    reordered = tmp_path / "reordered"
    for path in (tile_sets["fake"]).rglob("*.png"):
        new = reordered / path.parent.name / f"{999 - int(path.stem.split('_')[1])}.png"
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    one, other = (
        run(tmp_path, tile_sets["real"], tile_sets["fake"], reordered, weights=vit,
            options=("--batch_size", size))
        for size in (1, 13)
    )  # fmt: skip
    for name in ("fid", "kid", "kid_std", "precision", "recall"):
        for a, b in zip(one, other, strict=True):
            assert a["overall"][name] == pytest.approx(b["overall"][name], rel=1e-4, abs=1e-7)
        if not name.startswith("kid"):  # subsets are drawn by position
            first, second = (r["overall"][name] for r in one)
            assert first == pytest.approx(second, rel=1e-6)
    first, second = (r["overall"] for r in one)
    assert abs(first["kid"] - second["kid"]) < first["kid_std"]


def test_what_stands_beside_the_values(tile_sets, vit, tmp_path, capsys, caplog):
    fakes = (tile_sets["fake"], tile_sets["real"])
    results = run(tmp_path, tile_sets["real"], *fakes, weights=vit)
    printed = capsys.readouterr().out
    assert [r["fake"]["dir"] for r in results] == [str(path) for path in fakes]
    assert printed.count(f"| {fakes[0]} |") == 1 + 3  # a row over all tiles, one per class
    assert "| all | 36 / 30 |" in printed and "pre-processing: shorter side to 36" in printed
    result = results[0]
    assert result["real"]["sha256"] == TileFiles.below(tile_sets["real"]).listing
    assert result["real"]["images"] == 36 and result["fake"]["pixels"] == {"32x32": 30}
    assert list(result["per_class"]) == ["ADI", "LYM", "TUM"]
    assert len(result["extractor"]["weights_sha256"]) == 64
    assert any("FID is biased" in w and "read KID" in w for w in result["warnings"])
    assert "FID is biased" in caplog.text


def test_a_set_of_2000_images_is_not_warned_of():
    found = {**measure(normal(9, 0), normal(9, 1)), "images_real": 2000, "images_fake": 2000}
    assert count_warnings(found, {}) == []
    (warning,) = count_warnings({**found, "images_real": 1999}, {})
    assert "all tiles 1999" in warning


def test_missing_small_and_foreign_classes(tile_sets, vit, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(tile_sets["fake"] / "ADI", part / "ADI")
    (part / "LYM").mkdir()
    for path in sorted((tile_sets["fake"] / "LYM").iterdir())[:7]:
        shutil.copy(path, part / "LYM")
    result = run(tmp_path, tile_sets["real"], part, weights=vit)
    assert result["per_class"]["TUM"]["images_fake"] == 0
    assert result["per_class"]["TUM"]["fid"] is result["per_class"]["LYM"]["fid"] is None
    assert "12 real, 7 fake" in result["per_class"]["LYM"]["reason"]
    assert result["per_class"]["ADI"]["fid"] > 0
    text = " ".join(result["warnings"])
    assert "no values of LYM" in text and "classes are mixed otherwise" in text
    (part / "LYM").rename(part / "lym")
    with pytest.raises(UserError, match=r"\['lym'\] are not among"):
        run(tmp_path, tile_sets["real"], part, weights=vit)


def test_folders_of_samples_of_training_and_without_classes(tile_sets, vit, tmp_path):
    samples = tmp_path / "samples"
    shutil.copytree(tile_sets["fake"], samples)
    (samples / "manifest.csv").write_text("file\n")
    shutil.copy(tile_sets["real"] / "ADI" / "0_0.png", samples / "grid.png")
    plain = tmp_path / "plain"
    plain.mkdir()
    training = tmp_path / "training"
    shutil.copytree(tile_sets["real"], training)
    for path in tile_sets["fake"].rglob("*.png"):
        shutil.copy(path, plain / f"{path.parent.name}_{path.name}")
        shutil.copy(path, training / path.parent.name / f"synthetic_{path.name}")
    for name in ("selection.csv", "selection.json"):
        (training / name).write_text("")
    fakes = (tile_sets["fake"], samples, training, plain)
    base, *others = run(tmp_path, tile_sets["real"], *fakes, weights=vit)
    for other in others:
        assert other["overall"]["images_fake"] == 30
        assert other["overall"]["fid"] == pytest.approx(base["overall"]["fid"], rel=1e-6)
    assert [r["per_class"] for r in others[:2]] == [base["per_class"]] * 2
    assert others[1]["fake"]["part"] == "synthetic"
    assert others[2]["per_class"] == {}
    assert any("no class folders" in w for w in others[2]["warnings"])
    reverse = run(tmp_path, training, tile_sets["fake"], weights=vit)
    assert reverse["real"]["images"] == 36 and reverse["real"]["part"] == "real"


def test_sizes_and_formats_that_differ_are_said(tile_sets, vit, tmp_path):
    small = tmp_path / "small"
    for path in tile_sets["fake"].rglob("*.png"):
        new = small / path.parent.name / f"{path.stem}.jpg"
        new.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((24, 24)).save(new)
    text = " ".join(run(tmp_path, tile_sets["real"], small, weights=vit)["warnings"])
    assert "32x32 real, 24x24 fake" in text and "png real, jpg fake" in text


def test_a_network_that_was_trained_on_the_real_tiles_is_said(tile_sets, vit, tmp_path):
    seed = tmp_path / "seed0"
    (seed / "checkpoints").mkdir(parents=True)
    shutil.copy(vit, seed / "checkpoints" / "best.ckpt")
    sha256 = TileFiles.below(tile_sets["real"]).listing
    (seed / "result.json").write_text(json.dumps({"data": {"train": {"sha256": sha256}}}))
    sets = (tile_sets["real"], tile_sets["fake"])
    seen, unseen = run(tmp_path, *sets, weights=seed), run(tmp_path, *sets[::-1], weights=seed)
    assert any("trained on the very tiles" in w for w in seen["warnings"])
    assert not any("trained on the very tiles" in w for w in unseen["warnings"])


def test_reference_file_is_read_when_it_belongs_and_refused_when_not(tile_sets, vit, tmp_path):
    real, stats = tmp_path / "real", tmp_path / "real.safetensors"
    shutil.copytree(tile_sets["real"], real)
    options = ("--stats", stats)
    plain = run(tmp_path, real, tile_sets["fake"], weights=vit)
    made = run(tmp_path, real, tile_sets["fake"], weights=vit, options=options)
    assert made["overall"] == plain["overall"] and stats.is_file()
    before = stats.read_bytes()
    again = run(tmp_path, real, tile_sets["fake"], weights=vit, options=options)
    assert again["overall"] == made["overall"] and again["per_class"] == made["per_class"]
    victim = real / "TUM" / "0_3.png"
    os.utime(victim)  # a new time, the same content: still known
    run(tmp_path, real, tile_sets["fake"], weights=vit, options=options)
    assert stats.read_bytes() == before

    torch.manual_seed(1)
    net = TileClassifier("vit_tiny", 3, input_size=32, patch_size=8)
    net.classes = ["ADI", "LYM", "TUM"]
    other = tmp_path / "other.ckpt"
    write_checkpoint(other, tiny.vit_checkpoint(net))
    with pytest.raises(UserError, match=r"another extractor.*[-`]*overwrite`?"):
        run(tmp_path, real, tile_sets["fake"], weights=other, options=options)
    with pytest.raises(UserError, match="another extractor"):
        run(tmp_path, None, tile_sets["fake"], weights=other, options=options)
    assert stats.read_bytes() == before

    shutil.rmtree(real)  # the file stands in for the tiles, wherever they are
    alone = run(tmp_path, None, tile_sets["fake"], weights=vit, options=options)
    assert alone["overall"] == made["overall"] and alone["real"]["sha256"] == made["real"]["sha256"]

    shutil.copytree(tile_sets["fake"], real)
    with pytest.raises(UserError, match="other images"):
        run(tmp_path, real, tile_sets["fake"], weights=vit, options=options)
    run(tmp_path, real, tile_sets["fake"], weights=vit, options=(*options, "--overwrite"))
    assert stats.read_bytes() != before


def test_reference_file_notices_tiles_replaced_with_their_times_kept(tile_sets, vit, tmp_path):
    # Arrays have equal sizes, and unpacking an archive sets times back.
    real, stats = tmp_path / "real", tmp_path / "real.safetensors"
    for path in tile_sets["real"].rglob("*.png"):
        (real / path.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            np.save(real / path.parent.name / f"{path.stem}.npy", np.array(image))

    def listing() -> list:
        found = [(p, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(real.rglob("*.npy"))]
        return found

    run(tmp_path, real, tile_sets["fake"], weights=vit, options=("--stats", stats))
    before = listing()
    path, size, time = before[5]
    np.save(path, 255 - np.load(path))
    os.utime(path, ns=(time, time))
    assert listing() == before  # what a check of names, sizes and times sees
    with pytest.raises(UserError, match="other images"):
        run(tmp_path, real, tile_sets["fake"], weights=vit, options=("--stats", stats))


def test_reconstructions_beside_their_tiles(tile_sets, vit, tmp_path, capsys):
    """Against reconstructions that are made here and measured as a set of files."""
    autoencoder = tiny.save(tiny.autoencoder(), tmp_path / "autoencoder.ckpt")
    diffusion = tiny.save(tiny.diffusion(autoencoder), tmp_path / "diffusion.ckpt")
    net, folder, errors = load_model(autoencoder, "autoencoder").net, tmp_path / "made", []
    for path in sorted(tile_sets["real"].rglob("*.png")):
        x = to_tensor(np.asarray(Image.open(path)))[None]
        x_rec = net.decode(net.encode(x).mode()).clamp(-1, 1)
        errors.append(10 * torch.log10(4 / (x - x_rec).square().mean()))
        tile = ((x_rec[0] + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        target = folder / path.relative_to(tile_sets["real"])
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(target)
    options = ("--reconstruct", autoencoder, diffusion)
    files, *found = run(tmp_path, tile_sets["real"], folder, weights=vit, options=options)
    for record, model in zip(found, (autoencoder, diffusion), strict=True):
        for name in ("fid", "kid", "precision", "recall"):
            assert record["overall"][name] == pytest.approx(files["overall"][name], rel=1e-4)
        assert record["reconstruction"]["psnr"] == pytest.approx(float(torch.stack(errors).mean()))
        assert 0 < record["reconstruction"]["feature_distance"] < 1
        assert record["fake"]["dir"] == f"{tile_sets['real']} by {model}"
        assert not any("same files" in warning for warning in record["warnings"])
    assert "PSNR" in capsys.readouterr().out
    alone = run(tmp_path, tile_sets["real"], weights=vit, options=("--reconstruct", autoencoder))
    assert alone["overall"] == found[0]["overall"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--real", "{real}"], "--fake: is missing; give it, or --reconstruct"),
        (["--reconstruct", "{vit}", "--stats", "{vit}"], "--reconstruct: belongs to --real"),
        (["--real", "{real}", "--reconstruct", "{vit}", "--weights", "{vit}"], "--reconstruct: "),
        (["--real", "{none}", "--fake", "{fake}"], "--real: {none} does not exist"),
        (["--real", "{real}", "--fake", "{fake}", "{none}"], "--fake: {none} does not exist"),
        (["--real", "{real}", "--fake", "{empty}"], "--fake: {empty} has no images"),
        (["--fake", "{fake}"], "--real: is needed without --stats"),
        (["--fake", "{fake}", "--stats", "{none}"], "--stats (without --real): {none}"),
        (["--real", "{real}", "--fake", "{fake}", "--overwrite"], "--overwrite: belongs to"),
        (["--real", "{real}", "--fake", "{fake}", "--extractor", "clip"], "'clip': neither a"),
        (["--real", "{real}", "--fake", "{fake}", "--extractor", "vit"], "give --weights RUN"),
        (["--real", "{real}", "--fake", "{fake}", "--extractor", "timm:no"], "no is neither"),
        (["--real", "{real}", "--fake", "{fake}", "--weights", "{none}"], "--weights: {none}"),
        (
            ["--real", "{real}", "--fake", "{fake}", "--weights", "{vit}", "--stats", "{vit}"],
            "`stats` {vit}: not a file that histodiffusion fidelity",
        ),
        (
            ["--real", "{real}", "--fake", "{fake}", "--weights", "{vit}", "--extractor", "dinov2"],
            "weights {vit}: the weights do not fit",
        ),
        (
            ["--real", "{real}", "--fake", "{fake}", "--weights", "{vit}", "--extractor",
             "inception"],
            "no weights of torch-fidelity's Inception",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tile_sets, vit, tmp_path, capfd, words, expected):
    (tmp_path / "empty").mkdir()
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "vit": vit, **tile_sets}
    options = [word.format(**places) for word in words]
    out = tmp_path / "fidelity.json"
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command.main([*options, "--out", str(out), "--device", "cpu"]))
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1, error
    assert expected.format(**places) in error
    assert not out.exists()


def test_a_broken_tile_is_named_and_nothing_is_written(tile_sets, vit, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "fidelity.json"
    shutil.copytree(tile_sets["real"] / "ADI", plain)
    stats = tmp_path / "plain.safetensors"
    options = ("--stats", stats)
    found = run(tmp_path, plain, tile_sets["fake"], weights=vit, options=options)
    assert (
        run(tmp_path, None, tile_sets["fake"], weights=vit, options=options)["overall"]
        == (found["overall"])
    )
    out.unlink()
    stats.unlink()
    whole = (plain / "0_3.png").read_bytes()
    (plain / "0_3.png").write_bytes(whole[: len(whole) // 2])
    for workers in (0, 1):  # an error of a loader process comes as a long text
        words = ["--real", plain, "--fake", tile_sets["fake"], "--weights", vit, "--out", out]
        words += ["--stats", stats, "--num_workers", workers, "--device", "cpu"]
        with pytest.raises(UserError, match="0_3.png: unreadable or truncated image"):
            command.main([str(word) for word in words])
    assert not out.exists() and not stats.exists()
