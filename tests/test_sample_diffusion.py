"""sample_diffusion.py, on tiny real models."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample_diffusion
from ldm.checkpoint import KEY, load_model
from ldm.cli import run_command
from ldm.devices import one_thread
from ldm.diffusion.samplers import IndexedNoise, ddim
from ldm.diffusion.schedule import time_pairs
from ldm.errors import UserError
from ldm.synthesis.folder import COLUMNS
from ldm.synthesis.models import Models, load_models
from ldm.synthesis.settings import UNCONDITIONAL, Sampling
from ldm.synthesis.synthesiser import Synthesiser, fixed_batches

ROOT = Path(sample_diffusion.__file__).parent


@pytest.fixture(autouse=True)
def in_one_thread():
    """The library computes as the command does, in one thread, whatever earlier tests have set.

    With two threads sums are rounded in another order, and one of these images differs by a grey
    level.
    """
    with one_thread(torch.device("cpu")):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of an autoencoder, a diffusion model on it, and a classifier for both."""
    return tiny.models(tmp_path_factory.mktemp("models"))


def sample(models, outdir, *options, classifier="classifier.ckpt", n=2, steps=4):
    """Run the command in this process; without `classifier`, unconditionally."""
    argv = ["-r", str(models / "diffusion.ckpt"), "-c", str(steps)]
    argv += [] if n is None else ["-n", str(n)]
    argv += ["--outdir", str(outdir), "--device", "cpu"]
    if classifier:
        argv += ["--classifier", str(models / classifier)]
    return sample_diffusion.main([*argv, *map(str, options)])


def files(outdir):
    """Contents by name, without the journal."""
    return {
        path.relative_to(outdir).as_posix(): path.read_bytes()
        for path in sorted(outdir.rglob("*"))
        if path.is_file() and path.parent.name != ".parts"
    }


def manifest(outdir):
    with (outdir / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same(found, expected):
    """Two folders hold the same images, and say the same of them but when they were made."""
    ours, theirs = files(found), files(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".png") or name == "settings.json":
            assert ours[name] == theirs[name], name
    for one, other in zip(manifest(found), manifest(expected), strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k not in ("made", "seconds")} == {
            k: v for k, v in other.items() if k not in ("made", "seconds")
        }


def test_images_do_not_depend_on_the_batch_size(models, tmp_path):
    folders = []
    for batch_size in (1, 3, 8):
        folders.append(tmp_path / str(batch_size))
        sample(
            models, folders[-1], "--classifier_scale", 20, "--batch_size", batch_size, n=3, steps=2
        )
    for other in folders[1:]:
        assert_same(other, folders[0])
    first = files(folders[0])
    images = [name for name in first if name.endswith(".png") and not name.startswith(".stages")]
    assert len(images) == 9 + 1  # and the grid
    # The images are not all alike, or this would prove nothing.
    assert len({first[name] for name in images}) == len(images)


def test_fixed_batches():
    """Every call sees one shape; values and gradients are those of the plain function."""
    sizes = []

    def fn(x, t):
        sizes.append(len(x))
        return (x * x).sum(dim=1) * t

    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    t = torch.arange(11.0)
    plain = x.clone().requires_grad_()
    fn(plain, t).sum().backward()
    sizes.clear()
    parts = x.clone().requires_grad_()
    y = fixed_batches(fn, 4)(parts, t)
    y.sum().backward()
    assert sizes == [4, 4, 4]
    assert torch.equal(y, fn(x, t)) and torch.equal(parts.grad, plain.grad)


def test_outputs(models, tmp_path):
    out = tmp_path / "out"
    sample(models, out, "--eta", 0.5, "--seed", 7, "--classifier_scale", 2)
    rows = manifest(out)
    assert [(row["class"], int(row["index"])) for row in rows] == [
        (name, i) for name in tiny.CLASSES for i in range(2)
    ]
    loaded = load_models(models / "diffusion.ckpt", models / "classifier.ckpt")
    synthesiser = Synthesiser(loaded, Sampling("ddim", 4, 0.5, 2.0, 7))
    for row in rows:
        assert row["file"] == f"{row['class']}/{int(row['index']):06d}.png"
        settings = {k: row[k] for k in ("seed", "sampler", "steps", "eta", "scale")}
        expected = {"seed": "7", "sampler": "ddim", "steps": "4", "eta": "0.5", "scale": "2.0"}
        assert settings == expected
        # The file and its probability again, from the library.
        label = tiny.CLASSES.index(row["class"])
        z_0 = synthesiser.latents([label], [int(row["index"])])
        image = np.asarray(Image.open(out / row["file"])).astype(int)
        assert np.abs(image - synthesiser.images(z_0)[0]).max() == 0
        logits = loaded.classifier.net(z_0, torch.zeros(1, dtype=torch.int64))
        p = logits.softmax(1)[0]
        assert float(row["prob"]) == pytest.approx(p[label].item(), abs=2e-6)
        assert float(row["entropy"]) == pytest.approx(-(p * p.log()).sum().item(), abs=2e-6)
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (3 * 34 - 2, 2 * 34 - 2, 3)
    lym = np.asarray(Image.open(out / "LYM/000001.png"))
    assert np.array_equal(grid[34:66, 34:66], lym)
    settings = json.loads((out / "settings.json").read_text())["images"]
    assert settings["classes"] == tiny.CLASSES and settings["seed"] == 7
    with (out / "guidance.csv").open() as stream:
        steps = list(csv.DictReader(stream))
    assert [int(step["t"]) for step in steps] == [t for t, _ in time_pairs(1000, 4)]
    assert all(float(step["guidance_to_noise"]) > 0 for step in steps)
    assert {step["images"] for step in steps} == {"6"}


def test_unconditional(models, tmp_path):
    out = tmp_path / "out"
    sample(models, out, "--eta", 0, "--batch_size", 2, classifier=None, n=11)
    rows = manifest(out)
    assert [row["file"] for row in rows] == [f"{UNCONDITIONAL}/{i:06d}.png" for i in range(11)]
    assert {row["prob"] for row in rows} == {""} and {row["scale"] for row in rows} == {"0.0"}
    assert np.asarray(Image.open(out / "grid.png")).shape[:2] == (2 * 34 - 2, 8 * 34 - 2)
    assert not (out / "guidance.csv").exists()
    # The averaged weights, and noise by index, as the library says.
    model = load_model(models / "diffusion.ckpt", "diffusion")
    noise = IndexedNoise(0, -1, [10], tiny.LATENT)
    z_0 = ddim(model.ema.net, model.schedule, noise.initial(), time_pairs(1000, 4))
    expected = Synthesiser(Models(model), Sampling("ddim", 4, 0.0, 0.0, 0)).images(z_0)[0]
    assert np.array_equal(np.asarray(Image.open(out / rows[10]["file"])), expected)


def test_scale_0_is_unguided(models, tmp_path):
    """Scale 0 gives the images of the diffusion model alone, from the noise of that class."""
    sample(models, tmp_path / "zero", "--classifier_scale", 0, "--classes", "TUM")
    sample(models, tmp_path / "guided", "--classifier_scale", 50, "--classes", "TUM")
    unguided = Synthesiser(load_models(models / "diffusion.ckpt"), Sampling("ddim", 4, 1.0, 0.0, 0))
    images = unguided.images(unguided.latents([2, 2], [0, 1]))
    for i in range(2):
        zero = np.asarray(Image.open(tmp_path / "zero" / "TUM" / f"{i:06d}.png"))
        guided = np.asarray(Image.open(tmp_path / "guided" / "TUM" / f"{i:06d}.png"))
        assert np.array_equal(zero, images[i])
        assert not np.array_equal(zero, guided)


def test_guidance_raises_the_probability(models, tmp_path):
    probability = []
    for scale in (0, 1000):
        sample(models, tmp_path / str(scale), "--classifier_scale", scale, n=4, steps=10)
        rows = manifest(tmp_path / str(scale))
        probability.append(np.array([float(row["prob"]) for row in rows]))
    # The tiny networks are random, so the effect is small, but it is there in every class.
    unguided, guided = (values.reshape(3, 4).mean(axis=1) for values in probability)
    assert (guided > unguided + 0.002).all()


def test_vanilla_sampling(models, tmp_path):
    """DDPM on a subsequence of steps is DDIM at eta 1; on its own it takes all steps."""
    sample(models, tmp_path / "ddpm", "--vanilla_sample", classifier=None)
    sample(models, tmp_path / "ddim", classifier=None)
    for i in range(2):
        a, b = (
            np.asarray(Image.open(tmp_path / k / UNCONDITIONAL / f"{i:06d}.png")).astype(int)
            for k in ("ddpm", "ddim")
        )
        assert abs(a - b).max() <= 1  # two ways to round the same number
    assert manifest(tmp_path / "ddpm")[0]["sampler"] == "ddpm"


def test_vanilla_sampling_takes_all_steps(tmp_path):
    autoencoder = tiny.save(tiny.autoencoder(), tmp_path / "autoencoder.ckpt")
    tiny.save(tiny.diffusion(autoencoder, timesteps=12), tmp_path / "diffusion.ckpt")
    out = tmp_path / "out"
    argv = ["-r", str(tmp_path / "diffusion.ckpt"), "-v", "-n", "1", "-l", str(out)]
    sample_diffusion.main([*argv, "--device", "cpu"])
    assert manifest(out)[0]["steps"] == "12"


def test_classes_and_growing_n(models, tmp_path):
    """A folder grows class by class and image by image into the one made at once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sample(models, whole, n=3)
    sample(models, parts, "--classes", "TUM", n=1)
    assert [row["file"] for row in manifest(parts)] == ["TUM/000000.png"]
    sample(models, parts, "--classes", "TUM,ADI", n=2)
    sample(models, parts, n=3)
    assert_same(parts, whole)


def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    sample(models, whole, "--batch_size", 2)
    images = Synthesiser.images
    calls = []

    def stop(self, z_0, *detail):
        if len(z_0) > 1:  # others are the first tile on its way
            calls.append(len(z_0))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images(self, z_0, *detail)

    monkeypatch.setattr(Synthesiser, "images", stop)
    with pytest.raises(KeyboardInterrupt):
        sample(models, out, "--batch_size", 2)
    assert len(manifest(out)) == 4  # rows for what exists
    before = {name: (out / name).stat().st_mtime_ns for name in files(out) if "0000" in name}
    # A picture without its row (a crash in between) is made again; a deleted one too.
    (out / "TUM").mkdir(exist_ok=True)
    (out / "TUM" / "000000.png").write_bytes(b"not a picture")
    (out / "LYM" / "000001.png").unlink()
    calls[:] = [0] * 10
    sample(models, out, "--batch_size", 2)
    assert_same(out, whole)
    kept = before.keys() - {"LYM/000001.png"}
    assert len(kept) == 3
    assert all((out / name).stat().st_mtime_ns == before[name] for name in kept)
    # Complete: nothing left to do.
    calls.clear()
    sample(models, out, "--batch_size", 2)
    assert calls == []


@pytest.mark.parametrize(
    "change",
    [("--seed", 1), ("--eta", 0), ("--classifier_scale", 3), ("-c", 5), ("--ema", "False")],
)
def test_other_settings_need_another_folder(models, tmp_path, change):
    sample(models, tmp_path / "out", n=1)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="other settings .*give another folder"):
        sample(models, tmp_path / "out", *change, n=1)
    assert files(tmp_path / "out") == before


def test_default_folder(models, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes((models / "diffusion.ckpt").read_bytes())
    argv = ["-r", str(tmp_path / "run"), "-n", "1", "-c", "2", "--device", "cpu"]
    sample_diffusion.main(argv)
    name = "ddim2-eta1-scale0-seed0"
    assert (tmp_path / "run" / "samples" / name / UNCONDITIONAL / "000000.png").is_file()


def test_tuned_decoder(models, tmp_path):
    """--first_stage replaces the decoder, and only with the same encoder."""
    tuned = tiny.autoencoder()
    with torch.no_grad():
        tuned.net.decoder.conv_out.bias += 0.5
    tuned.classes = tiny.CLASSES
    path = tiny.save(tuned, tmp_path / "tuned.ckpt")
    sample(models, tmp_path / "own", "--classes", "ADI", n=1)
    sample(models, tmp_path / "tuned", "--classes", "ADI", "--first_stage", path, n=1)
    own, changed = (
        np.asarray(Image.open(tmp_path / k / "ADI" / "000000.png")).astype(int)
        for k in ("own", "tuned")
    )
    inside = (own < 190) & (own > 0)
    # 0.5 of an image that spans 2 is 63.75 of 255 levels.
    assert abs((changed - own)[inside] - 63.75).max() < 1.5

    other = tiny.save(tiny.autoencoder(seed=9), tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="first_stage.?: .*another latent space"):
        sample(models, tmp_path / "out", "--first_stage", other)
    tuned.classes = ["A", "B", "C"]
    path = tiny.save(tuned, tmp_path / "classes.ckpt")
    with pytest.raises(UserError, match=r"tuned on classes \['A', 'B', 'C'\]"):
        sample(models, tmp_path / "out", "--first_stage", path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder_fingerprint": "0" * 64}, "latents of another autoencoder"),
        ({"scale_factor": 0.8 * 1.06}, r"latent scale 0\.8480, .* has 0\.8000"),
        ({"linear_end": 0.02}, "was trained for NoiseSchedule"),
        ({"timesteps": 500}, "was trained for NoiseSchedule"),
    ],
)
def test_a_classifier_that_does_not_fit(models, tmp_path, change, message):
    diffusion = load_model(models / "diffusion.ckpt", "diffusion")
    path = tiny.save(tiny.classifier(diffusion, **change), tmp_path / "classifier.ckpt")
    with pytest.raises(UserError, match=message):
        sample(models, tmp_path / "out", classifier=path)
    assert not (tmp_path / "out").exists()


def test_a_scale_within_tolerance_is_accepted(models, tmp_path):
    diffusion = load_model(models / "diffusion.ckpt", "diffusion")
    module = tiny.classifier(diffusion, scale_factor=0.8 * 1.04)
    path = tiny.save(module, tmp_path / "classifier.ckpt")
    sample(models, tmp_path / "out", "--classes", "ADI", classifier=path, n=1, steps=1)
    assert len(manifest(tmp_path / "out")) == 1


def test_latent_shape_must_fit(models, tmp_path):
    diffusion = load_model(models / "diffusion.ckpt", "diffusion")
    module = tiny.classifier(diffusion)
    net = {**module.net_config, "params": {**module.net_config["params"], "image_size": 8}}
    path = tiny.save(tiny.classifier(diffusion, net_config=net), tmp_path / "classifier.ckpt")
    with pytest.raises(UserError, match=r"takes latents \(3, 8, 8\)"):
        sample(models, tmp_path / "out", classifier=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "TUM,XXX"), "unknown class 'XXX'; the model knows 0=ADI, 1=LYM, 2=TUM"),
        (("--classes", ","), "empty list"),
        (("-c", 1001), r"`custom_steps` 1001 must be in \[1, 1000\]"),
        (("-v", "-e", 0.5), "--eta: 0.5 belongs to DDIM"),
        (("--guidance_interval", 5, 4), "LOW must not be above HIGH"),
        (("--classifier", "missing.ckpt"), "`classifier`: no file missing.ckpt"),
        (("-r", "missing.ckpt"), "`model`: no file missing.ckpt"),
        (("--device", "abacus"), "`device` abacus"),
    ],
)
def test_user_errors(models, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sample(models, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [("--classes", "TUM"), ("--classifier_scale", "3"), ("--guidance_interval", "0", "9")],
)
def test_options_that_need_a_classifier(models, tmp_path, options):
    with pytest.raises(UserError, match=f"{options[0][2:]}`?:? needs .*classifier"):
        sample(models, tmp_path / "out", *options, classifier=None)


def test_a_classifier_without_classes(models, tmp_path):
    payload = torch.load(models / "classifier.ckpt", weights_only=True)
    payload[KEY]["classes"] = None
    torch.save(payload, tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="none.ckpt is damaged: it names no classes"):
        sample(models, tmp_path / "out", classifier=tmp_path / "none.ckpt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("temperature", [0.0, math.nan])
def test_a_classifier_without_a_temperature(models, tmp_path, temperature):
    payload = torch.load(models / "classifier.ckpt", weights_only=True)
    payload["state_dict"]["temperature"] = torch.tensor(temperature)
    torch.save(payload, tmp_path / "cold.ckpt")
    with pytest.raises(UserError, match="cold.ckpt has the temperature"):
        sample(models, tmp_path / "out", classifier=tmp_path / "cold.ckpt")
    assert not (tmp_path / "out").exists()


def test_wrong_kinds(models, tmp_path):
    swapped = {
        "--model": "classifier.ckpt",
        "--classifier": "diffusion.ckpt",
        "--first_stage": "classifier.ckpt",
    }
    for option, name in swapped.items():
        with pytest.raises(UserError, match=f"{option[2:]}`: .*holds a model of kind"):
            sample(models, tmp_path / "out", option, models / name)


def test_damaged_lines_of_a_journal_are_made_again(models, tmp_path):
    out = tmp_path / "out"
    options = ("--classes", "ADI")
    sample(models, out, *options, n=1, steps=1)
    (path,) = out.glob(".parts/*.jsonl")
    start, batch = map(json.loads, path.read_text().splitlines())
    wrong = [(start, "run", value) for value in (5, {}, start["run"] | {"versions": None})]
    row = batch["rows"][0]
    for change in ({"prob": "abc"}, {"source": ["x"]}, {"index": -1}):
        wrong.append((batch, "rows", [row | change]))
    wrong.append((batch, "rows", [{k: v for k, v in row.items() if k != "entropy"}]))
    wrong.append((batch, "rows", [row, row | {"class": "NONE"}]))
    wrong += [(batch, "guidance", value) for value in ([[1, 2]], [["a", 1, 2, 3, 4]])]
    for line, key, value in wrong:
        lines = [line | {key: value} if one is line else one for one in (start, batch)]
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        for made in (out / "manifest.csv", *out.glob(".parts/*.jsonl")):
            if made != path:
                made.unlink()
        sample(models, out, *options, n=1, steps=1)
        assert [row["file"] for row in manifest(out)] == ["ADI/000000.png"], value
        remade = len(list(out.glob(".parts/*.jsonl"))) == 2
        assert remade == (line is batch), value


def test_folders_that_are_not_ours(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    sample(models, out, "--classes", "ADI", n=1, steps=1)  # an empty folder is fine
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by this command .it has no settings.json"):
        sample(models, tmp_path / "other")
    with pytest.raises(UserError, match="is a file"):
        sample(models, tmp_path / "other" / "notes.txt")
    (out / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns"):
        sample(models, out, "--classes", "ADI", n=1, steps=1)
    columns = ",".join(COLUMNS).encode() + b"\n"
    for line in (b"ADI,one,ADI/000000.png\n", b"\xff\xfe\n", b"ADI,0,ADI/000001.png\n", b'"'):
        (out / "manifest.csv").write_bytes(columns + line)
        with pytest.raises(UserError, match="manifest.csv is damaged .*; remove it"):
            sample(models, out, "--classes", "ADI", n=1, steps=1)
    (out / "manifest.csv").unlink()
    sample(models, out, "--classes", "ADI", n=1, steps=1)
    assert [row["file"] for row in manifest(out)] == ["ADI/000000.png"]
    (out / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        sample(models, out, "--classes", "ADI", n=1, steps=1)


def test_latents_that_are_not_finite(models):
    loaded = load_models(models / "diffusion.ckpt", models / "classifier.ckpt")
    synthesiser = Synthesiser(loaded, Sampling("ddim", 4, 1.0, float("inf"), 0))
    with pytest.raises(UserError, match="not finite.*lower [-`]*classifier_scale`?"):
        synthesiser.latents([0], [0])


def test_guidance_interval(models, tmp_path):
    sample(models, tmp_path / "out", "--guidance_interval", 100, 600, "--classes", "ADI", n=1)
    lines = (tmp_path / "out" / "guidance.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["501", "251"]


@pytest.mark.parametrize("wrong", [("-n", "0"), ("-e", "2"), ("--batch_size", "x"), ("-c", "0")])
def test_a_wrong_option_is_one_line_and_status_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sample_diffusion.main(["-r", "x", *wrong]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and wrong[0] in said


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "sample_diffusion.py"), "-r", "x", "-n", "0"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1 and "-n" in failed.stderr
