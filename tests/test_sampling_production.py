"""Sampling as production work: processes, restarts, manifest, card, shards, counts, speed."""

import csv
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import webdataset as wds
import yaml
from PIL import Image
from test_sample_diffusion import ROOT, assert_same, files, manifest, models, sample

import sample_diffusion
from ldm.data.tiles import read_tile, resize_tile
from ldm.devices import Devices, shared_devices
from ldm.errors import UserError
from ldm.models.label_adapter import LabelAdapter
from ldm.synthesis.folder import SampleFolder
from ldm.synthesis.guidance_log import GuidanceLog
from ldm.synthesis.models import load_models, make_settings
from ldm.synthesis.request import balance, choose_classes, parse_counts
from ldm.synthesis.settings import Sampling
from ldm.synthesis.synthesiser import Synthesiser

assert models  # the fixture


@pytest.fixture(scope="module")
def adapter(models):
    """A label adapter of the diffusion model, with an embedding that says something."""
    module = LabelAdapter(pretrained=str(models / "diffusion.ckpt"))
    module.use_classes(tiny.CLASSES)
    generator = torch.Generator().manual_seed(5)
    for net in (module.unet, module.ema.net):
        torch.nn.init.normal_(net.label_emb.weight, generator=generator)
    return tiny.save(module, models / "adapter.ckpt")


@pytest.fixture(scope="module")
def weak(models):
    """A diffusion model in the same latent space, with other weights."""
    module = tiny.diffusion(models / "autoencoder.ckpt")
    tiny.randomise(module.ema.net, 8)
    return tiny.save(module, models / "weak.ckpt")


def command(models, outdir, *options):
    """The command as a process of its own, not started yet."""
    argv = [sys.executable, str(ROOT / "sample_diffusion.py"), "-r", models / "diffusion.ckpt"]
    argv += ["--classifier", models / "classifier.ckpt", "--device", "cpu", "--outdir", outdir]
    return [str(word) for word in (*argv, *options)]


def journal_lines(outdir):
    return sum(path.read_text().count('{"rows"') for path in outdir.glob(".parts/*.jsonl"))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")
def test_killed_then_finished_by_two_processes(models, tmp_path):
    """SIGKILL between two batches; two processes with another batch size make the rest.

    All images have the bytes of an uninterrupted run of one process.
    """
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ["-n", 8, "-c", 3, "--classifier_scale", 30]
    process = subprocess.Popen(command(models, out, *options, "--batch_size", 1))
    deadline = time.monotonic() + 600  # a busy machine
    while journal_lines(out) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not through
    assert not (out / "manifest.csv").exists()
    # What else a killed run may leave: a torn line, parts of files, an image without its row.
    (journal,) = out.glob(".parts/*.jsonl")
    with journal.open("a") as stream:
        stream.write('{"rows": [{"class": "TUM", "ind')
    (out / "TUM").mkdir(exist_ok=True)
    (out / "TUM" / ".half.png.part").write_bytes(b"\x89PNG")
    (out / "TUM" / "000000.png").write_bytes(b"\x89PNG")
    (out / ".manifest.csv.a8b_c9de").write_text("class,")
    before = {path: path.stat().st_mtime_ns for path in out.glob("ADI/0*.png")}
    assert len(before) >= 3

    done = subprocess.run(
        command(models, out, *options, "--batch_size", 5, "--devices", 2),
        capture_output=True,
        text=True,
        check=True,
    )
    made = int(done.stdout.split()[0])
    assert made <= 24 - 3 and f"{24 - made} of 24 images are there already" in done.stderr
    shares = [path.read_text().count('"file"') for path in sorted(out.glob(".parts/*.jsonl"))[1:]]
    assert sorted(shares) == [made // 2, made - made // 2]
    sample_diffusion.main(command(models, whole, *options)[2:])
    assert_same(out, whole)
    for path in sorted(before)[:-1]:  # the last one may not have had its line
        assert path.stat().st_mtime_ns == before[path]
    assert {p.name for p in out.rglob(".*")} == {".parts", ".stages"}
    # Over both starts, all images are in guidance.csv, up to the order of summation.
    ours, theirs = (read_csv(folder / "guidance.csv") for folder in (out, whole))
    assert [row["images"] for row in ours] == ["24"] * 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("guidance_to_noise", "probability"):
            assert float(one[key]) == pytest.approx(float(other[key]), abs=2e-6)
    # The card tells of both starts.
    assert (out / "README.md").read_text().count("sample_diffusion.py -r ") == 2


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_threads_do_not_change_images(models, tmp_path, monkeypatch):
    """Sums that are divided among threads round differently, so there is one, for writing too."""
    seen = {}
    for name in ("latents", "images"):
        method = getattr(Synthesiser, name)

        def spy(self, *args, name=name, method=method):
            seen[name] = torch.get_num_threads()
            return method(self, *args)

        monkeypatch.setattr(Synthesiser, name, spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sample(models, tmp_path / "out", n=1, steps=1)
        assert torch.get_num_threads() == 3  # training in the same process keeps its own
    finally:
        torch.set_num_threads(before)
    assert seen == {"latents": 1, "images": 1}


def test_a_finished_run_does_nothing(models, tmp_path, monkeypatch, capsys, caplog):
    out = tmp_path / "out"
    caplog.set_level("INFO")
    sample(models, out, "--tar", 4, n=1, steps=1)
    assert "1 x cpu x 1 machines, precision 32, channels_last off, compile off" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def fail(*args):
        raise AssertionError("a model was evaluated")

    for name in ("latents", "images", "confidences"):
        monkeypatch.setattr(Synthesiser, name, fail)
    capsys.readouterr()
    assert sample(models, out, "--tar", 4, n=1, steps=1) == 0
    assert "nothing to do: all 3 images are in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # Whatever is derived and gone or damaged is made again, without a model.
    lost = files(out)
    for name in ("manifest.csv", "manifest.parquet", "README.md", "guidance.csv", "grid.png"):
        (out / name).unlink()
    (out / "shard-000000.tar").write_bytes(b"")
    sample(models, out, "--tar", 4, n=1, steps=1)
    assert files(out) == lost


def test_pictures_of_the_first_images_on_their_way(models, tmp_path):
    """They are the same in batches of any size, and end a grey level from the image: a step of DDIM
    ends with the little noise of time 0."""
    found = []
    for batch in (1, 4):
        out = tmp_path / str(batch)
        sample(models, out, "--batch_size", batch, n=2, steps=12)
        found.append({p.relative_to(out): p.read_bytes() for p in out.glob(".stages/*/*.png")})
    assert found[0] == found[1] and len(found[0]) == 8 * len(tiny.CLASSES)
    for name in tiny.CLASSES:
        files = sorted((out / ".stages" / name).iterdir(), key=lambda path: float(path.stem))
        last, image = (read_tile(p).astype(int) for p in (files[0], out / name / "000000.png"))
        assert abs(last - image).max() <= 1 < abs(read_tile(files[-1]).astype(int) - image).max()


def test_a_copied_folder_without_its_journal_goes_on(models, tmp_path):
    """rsync without hidden files: the manifest alone says what is there."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    sample(models, out, n=1, steps=1)
    for path in out.glob(".parts/*"):
        path.unlink()
    rows = manifest(out)
    sample(models, out, n=2, steps=1)
    assert [row for row in manifest(out) if row["index"] == "0"] == rows
    sample(models, whole, n=2, steps=1)
    assert_same(out, whole)


def test_manifest_types(models, tmp_path):
    out = tmp_path / "out"
    options = ["--guidance_interval", 100, 900, "--guidance_clip", 0.5, "--temperature", 2]
    sample(models, out, *options, "--eta", 0, n=1, steps=2)
    table = pq.read_table(out / "manifest.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["index"] == "int32" and kinds["prob"] == "double" and kinds["normalise"] == "bool"
    assert kinds["made"] == "timestamp[ms, tz=UTC]" and kinds["first_stage_sha256"] == "string"
    typed, text = table.to_pylist(), manifest(out)
    assert list(kinds) == list(text[0]) and len(typed) == len(text) == 3
    digest = hashlib.sha256((models / "classifier.ckpt").read_bytes()).hexdigest()
    now = datetime.datetime.now(datetime.UTC)
    for row, cells in zip(typed, text, strict=True):
        assert (row["interval_low"], row["interval_high"], row["clip"]) == (100, 900, 0.5)
        assert row["temperature"] == 2 and row["cfg_scale"] == row["autoguidance_scale"] == 1
        assert row["classifier_sha256"] == digest and row["autoguidance_sha256"] is None
        assert 0 < row["entropy"] <= np.log(3) + 1e-6
        assert now - datetime.timedelta(hours=1) < row["made"] <= now and row["seconds"] > 0
        assert cells["made"] == row["made"].strftime("%Y-%m-%dT%H:%M:%SZ")
        for key in ("prob", "entropy", "seconds", "eta", "index"):
            assert float(cells[key]) == row[key]
        assert cells["autoguidance_sha256"] == "" and cells["normalise"] == "False"


def test_card(models, tmp_path):
    out = tmp_path / "out"
    sample(
        models, out, "--counts", "TUM=2,0=1", "--first_stage", models / "autoencoder.ckpt", n=None
    )
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert "synthetic" in front["tags"] and front["size_categories"] == ["n<1K"]
    assert "All 3 images in this folder are synthetic" in text and "Not for diagnosis" in text
    for role in ("diffusion", "classifier", "autoencoder"):
        assert hashlib.sha256((models / f"{role}.ckpt").read_bytes()).hexdigest() in text
    rows = manifest(out)
    mean = np.mean([float(row["prob"]) for row in rows if row["class"] == "TUM"])
    assert f"| TUM | 2 | {mean:.3f} |" in text and "| LYM | 0 | not measured |" in text
    assert "| `steps` | 4 |" in text and f"torch {torch.__version__.split('+')[0]}" in text
    seed = "| not recorded | "  # the tiny checkpoints were made without one
    assert seed in text


def test_parts_make_all_images_between_them(models, tmp_path, capsys):
    """Each part makes its own images only, and touches nothing that another may be writing."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    sample(models, whole, "--classifier_scale", 20, n=3, steps=2)
    assert sample(models, out, "--classifier_scale", 20, "--part", "1/2", n=3, steps=2) == 0
    made = sorted(path.relative_to(out).as_posix() for path in out.glob("[!.]*/*.png"))
    wanted = [f"{name}/{index:06d}.png" for name in tiny.CLASSES for index in range(3)]
    assert made == wanted[1::2] and not (out / "manifest.csv").exists()
    (out / "ADI" / ".000001.png.part").write_bytes(b"of the other part")
    sample(models, out, "--classifier_scale", 20, "--part", "0/2", n=3, steps=2)
    assert (out / "ADI" / ".000001.png.part").exists()
    assert len(list(out.glob("*/0*.png"))) == 9 and not (out / "manifest.csv").exists()
    assert "5 images made, 0 were there" in capsys.readouterr().out
    sample(models, out, "--classifier_scale", 20, n=3, steps=2)
    assert "all 9 images" in capsys.readouterr().out
    assert_same(out, whole)


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "0/0", "-1/2"])
def test_parts_that_there_are_not(models, tmp_path, part):
    with pytest.raises(UserError, match="part.?: "):
        sample(models, tmp_path / "out", f"--part={part}")


def test_shards(models, tmp_path):
    """webdataset reads them back; the same images give the same bytes; the size may change."""
    one, other = tmp_path / "one", tmp_path / "other"
    sample(models, one, "--tar", 4, n=3, steps=1)
    sample(models, other, "--batch_size", 2, "--tar", 4, n=3, steps=1)
    shards = sorted(one.glob("shard-*.tar"))
    assert [path.name for path in shards] == [f"shard-00000{i}.tar" for i in range(3)]
    for path in shards:
        assert path.read_bytes() == (other / path.name).read_bytes()
    samples = list(wds.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert len(samples) == 9
    for found in samples:
        assert found["png"] == (one / f"{found['__key__']}.png").read_bytes()
        about = json.loads(found["json"])
        assert tiny.CLASSES.index(about["class"]) == int(found["cls"])
        assert f"{about['class']}/{about['index']:06d}" == found["__key__"]
    assert [found["cls"] for found in samples[:4]] == [b"0", b"1", b"2", b"0"]  # alternating
    sample(models, one, "--tar", 6, n=3, steps=1)
    assert len(list(one.glob("shard-*.tar"))) == 2
    # A training folder is still one: the shards are no class.
    folders = sorted(path.name for path in one.iterdir() if path.is_dir())
    assert folders == [".parts", ".stages", *tiny.CLASSES]


def test_out_size(models, tmp_path):
    """Shrunk by area, so that a check pattern does not become moire; recorded and compared."""
    sample(models, tmp_path / "own", "--classes", "ADI", n=1, steps=2)
    sample(models, tmp_path / "small", "--classes", "ADI", "--out_size", 20, n=1, steps=2)
    own, small = (read_tile(tmp_path / k / "ADI" / "000000.png") for k in ("own", "small"))
    assert small.shape == (20, 20, 3) and np.array_equal(small, resize_tile(own, 20))
    assert abs(small.mean() - own.mean()) < 1
    with pytest.raises(UserError, match="out_size None there, 20 now"):
        sample(models, tmp_path / "own", "--out_size", 20, n=1, steps=2)


def test_classes_and_counts():
    known = ["ADI", "LYM", "0", "TUM"]
    assert choose_classes("TUM, 1", known) == ["LYM", "TUM"]
    assert choose_classes("0", known) == ["0"]  # a name wins over an index
    assert parse_counts("3=2,ADI=5", known) == {"ADI": 5, "TUM": 2}
    for text, message in {
        "TUM,3": "TUM is given twice",
        "4": "unknown class '4'",
        "-1": "unknown class '-1'",
        "": "empty list",
    }.items():
        with pytest.raises(UserError, match=message):
            choose_classes(text, known)
    for text, message in {
        "ADI": "'ADI' must be CLASS=NUMBER",
        "ADI=0": "'ADI=0' must be",
        "ADI=" + "9" * 5000: "with a whole number from 1 to 1000000000",
        "9" * 5000 + "=1": "unknown class",
        "ADI=1.5": "'ADI=1.5' must be",
        "ADI=": "'ADI=' must be",
        "XXX=1": "unknown class 'XXX'",
        "ADI=1,ADI=2": "ADI is given twice",
        ",": "empty list",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_counts(text, known)


def test_balance(tmp_path):
    for name, count in {"ADI": 1, "LYM": 4, "TUM": 3}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    known = tiny.CLASSES
    assert balance(tmp_path, known, known) == {"ADI": 3, "TUM": 1}
    assert balance(tmp_path, known, known, 2) == {"ADI": 5, "LYM": 2, "TUM": 3}
    assert balance(tmp_path, ["TUM"], known) == {"TUM": 1}  # LYM is the largest all the same
    with pytest.raises(UserError, match="ADI, LYM, TUM, the model's ADI, XXX .different: LYM, T"):
        balance(tmp_path, ["ADI"], ["ADI", "XXX"])
    with pytest.raises(UserError, match="are balanced, with 4 images each"):
        balance(tmp_path, ["LYM"], known)
    with pytest.raises(UserError, match="does not exist"):
        balance(tmp_path / "missing", ["LYM"], known)


def test_balance_and_counts_sample_so_many(models, tmp_path):
    data = tiny.tiles(tmp_path / "data", 2)
    (data / "ADI" / "0_0.png").unlink()
    sample(models, tmp_path / "balance", "--balance", data, n=None, steps=1)
    sample(models, tmp_path / "counts", "--counts", "ADI=1", n=None, steps=1)
    for name in ("balance", "counts"):
        assert [row["file"] for row in manifest(tmp_path / name)] == ["ADI/000000.png"]


def latents(models, sampling, *, classifier=None, count=2, devices=None, **load):
    """z_0 of images 0, 1, ... of class 2, and the synthesiser."""
    path = load.pop("diffusion", models / "diffusion.ckpt")
    loaded = load_models(path, classifier and models / "classifier.ckpt", **load)
    synthesiser = Synthesiser(loaded, sampling, devices)
    return synthesiser.latents([2] * count, list(range(count))), synthesiser


def means(synthesiser):
    return list(synthesiser.guidance_log)


def test_classifier_guidance_options(models):
    """Each option changes the images, and the log shows that it does what it says."""

    def run(**options):
        base = {"scale": 3.0, "seed": 0, **options}
        return latents(models, Sampling("ddim", 3, 0.0, **base), classifier=True)

    plain, synthesiser = run()
    ratios = [row.guidance_to_noise for row in means(synthesiser)]
    for options in ({"guidance_on": "z_0"}, {"temperature": 2.0}, {"interval": (300, 400)}):
        changed, other = run(**options)
        assert (changed - plain).abs().max() > 1e-4, options
    assert [row.t for row in means(other)] == [334]
    # A gradient of logits / 2 is about half as long where p is about the same.
    _, other = run(temperature=2.0)
    assert means(other)[0].guidance_to_noise == pytest.approx(ratios[0] / 2, rel=0.1)
    _, other = run(scale=0.5, normalise=True)
    assert [row.guidance_to_noise for row in means(other)] == pytest.approx([0.5] * 3, rel=1e-5)
    _, other = run(scale=1e6, clip=0.25)
    assert [row.guidance_to_noise for row in means(other)] == pytest.approx([0.25] * 3, rel=1e-5)
    assert all(row.extrapolation_to_noise is None for row in means(other))


def test_networks_are_asked_only_where_they_act(models, adapter):
    """No classifier gradient at scale 0 or outside the interval; one network without guidance."""
    loaded = load_models(adapter, models / "classifier.ckpt")
    calls = {"classifier": [], "unet": []}
    loaded.classifier.net.register_forward_pre_hook(
        lambda module, inputs: calls["classifier"].append(int(inputs[1][0]))
    )
    loaded.diffusion.eps_model().register_forward_pre_hook(
        lambda module, inputs: calls["unet"].append(int(inputs[1][0]))
    )

    def evaluated(**options):
        for kind in calls.values():
            kind.clear()
        sampling = Sampling("ddim", 4, 0.0, **{"scale": 0.0, "seed": 0, **options})
        Synthesiser(loaded, sampling).latents([1], [0])
        return dict(calls)

    times = [751, 501, 251, 1]
    assert evaluated() == {"classifier": [], "unet": times}
    assert evaluated(scale=2.0, interval=(200, 600)) == {"classifier": [501, 251], "unet": times}
    assert evaluated(cfg_scale=2.0, interval=(200, 600)) == {
        "classifier": [],
        "unet": [751, 501, 501, 251, 251, 1],
    }


def test_classifier_free_guidance(models, adapter, tmp_path):
    """1 is the labelled prediction, 0 the one without label, which is the pre-trained model's."""

    def run(scale, **options):
        return latents(models, Sampling("ddim", 3, 0.0, 0.0, 0, cfg_scale=scale), **options)

    labelled, _ = run(1.0, diffusion=adapter)
    unlabelled, _ = run(0.0, diffusion=adapter)
    further, synthesiser = run(3.0, diffusion=adapter)
    pretrained, _ = run(1.0)
    assert torch.allclose(unlabelled, pretrained, atol=1e-5)
    assert (labelled - unlabelled).abs().max() > 1e-3
    assert (further - labelled).norm() > 0.5 * (labelled - unlabelled).norm()
    assert all(row.extrapolation_to_noise > 0 for row in means(synthesiser))
    assert all(row.guidance_to_noise is None for row in means(synthesiser))
    # On the command line the classes come from the adapter, with or without a classifier.
    options = ["-r", adapter, "--cfg_scale", 2]
    sample(models, tmp_path / "alone", *options, "--classes", "2", classifier=None, n=1, steps=2)
    sample(models, tmp_path / "both", *options, "--classifier_scale", 20, n=1, steps=2)
    (row,) = manifest(tmp_path / "alone")
    assert row["class"] == "TUM" and row["prob"] == "" and row["cfg_scale"] == "2.0"
    assert [row["class"] for row in manifest(tmp_path / "both")] == tiny.CLASSES
    steps = read_csv(tmp_path / "both" / "guidance.csv")
    assert all(float(row["guidance_to_noise"]) > 0 for row in steps)
    assert all(float(row["extrapolation_to_noise"]) > 0 for row in steps)
    alone, both = (read_tile(tmp_path / k / "TUM" / "000000.png") for k in ("alone", "both"))
    assert not np.array_equal(alone, both)


def test_autoguidance(models, adapter, weak, tmp_path):
    """weak + w (strong - weak), at the first step by hand; labels go to both of a pair."""
    sampling = Sampling("ddim", 1, 0.0, 0.0, 0, autoguidance_scale=2.5)
    z_0, synthesiser = latents(models, sampling, autoguidance_path=weak, count=1)
    loaded, t = synthesiser.models, torch.tensor([1])
    noise = torch.from_numpy(first_noise(0, 2))
    strong, weaker = (m.eps_model()(noise, t) for m in (loaded.diffusion, loaded.weak))
    expected = weaker + 2.5 * (strong - weaker)
    schedule, t_0 = loaded.diffusion.schedule, torch.tensor([0])
    by_hand = schedule.q_sample(schedule.predict_z_0(noise, t, expected), t_0, expected)
    assert torch.allclose(z_0, by_hand, atol=1e-4)
    with pytest.raises(UserError, match="itself; give an earlier one"):
        load_models(weak, autoguidance_path=weak)
    other = LabelAdapter(pretrained=str(models / "diffusion.ckpt"))
    other.use_classes(["A", "B"])
    path = tiny.save(other, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="autoguidance.? .* knows the classes .'A', 'B'.*ADI"):
        load_models(adapter, autoguidance_path=path)
    with pytest.raises(UserError, match="classifier.? .* knows the classes .*ADI.*'A', 'B'"):
        load_models(path, models / "classifier.ckpt")


def first_noise(seed, label):
    from ldm.diffusion.samplers import IndexedNoise

    return IndexedNoise(seed, label, [0], tiny.LATENT).initial().numpy()


def test_second_order_sampler(models, tmp_path):
    sample(models, tmp_path / "out", "--sampler", "dpm++2m", "--classes", "ADI", n=1, steps=3)
    (row,) = manifest(tmp_path / "out")
    assert (row["sampler"], row["eta"]) == ("dpm++2m", "0.0")


def test_speed_changes_little_and_is_recorded(models, tmp_path):
    sampling = Sampling("ddim", 1, 0.0, 30.0, 0)
    exact, _ = latents(models, sampling, classifier=True, count=1)
    for devices, most in (
        (Devices(channels_last=True), 1e-3),
        (Devices(precision="bf16-mixed"), 0.1),
    ):
        z_0, _ = latents(models, sampling, classifier=True, count=1, devices=devices)
        # bfloat16 has 8 bits, which large random weights make into a few per cent.
        assert z_0.dtype == torch.float32 and 0 < (z_0 - exact).abs().mean() < most
    sample(models, tmp_path / "out", "--classes", "ADI", n=1, steps=1)
    for options, text in {
        ("--precision", "bf16"): "precision 32 there, bf16 now",
        ("--channels_last",): "channels_last False there, True now",
        ("--compile",): "compile False there, True now",
    }.items():
        with pytest.raises(UserError, match=text):
            sample(models, tmp_path / "out", "--classes", "ADI", *options, n=1, steps=1)


@pytest.mark.slow
def test_compiled_networks_give_the_same_images(models):
    sampling = Sampling("ddim", 2, 0.0, 30.0, 0)
    exact, _ = latents(models, sampling, classifier=True)
    compiled, _ = latents(models, sampling, classifier=True, devices=Devices(compile=True))
    assert torch.allclose(compiled, exact, atol=1e-3)


def test_what_goes_wrong_while_writing_stops_the_run(models, tmp_path, monkeypatch):
    """The writer's thread hands its error over; what was written before is in the manifest."""
    write, out = SampleFolder.write_image, tmp_path / "out"

    def fail_late(self, name, index, image):
        if name == "LYM":
            raise UserError(f"no space left for {name}")
        return write(self, name, index, image)

    monkeypatch.setattr(SampleFolder, "write_image", fail_late)
    with pytest.raises(UserError, match="no space left for LYM"):
        sample(models, out, "--batch_size", 1, n=3, steps=1)
    assert [row["file"] for row in manifest(out)] == [f"ADI/{i:06d}.png" for i in range(3)]
    assert not (out / "TUM").exists()
    monkeypatch.undo()
    sample(models, out, n=3, steps=1)
    sample(models, tmp_path / "whole", n=3, steps=1)
    assert_same(out, tmp_path / "whole")


def log_of(**quantities):
    """A guidance log of two images at t = 900 and t = 500, from lists of means."""
    order = ("guidance_to_noise", "probability", "extrapolation_to_noise")
    columns = [quantities.get(name, [float("nan")] * 2) for name in order]
    log = GuidanceLog()
    sums = [[2 * value for value in row] for row in zip(*columns, strict=True)]
    log.add([900, 500], sums, 2)
    return log


def test_guidance_warnings():
    ddim, solver = Sampling("ddim", 2, 0.0, 1.0, 0), Sampling("dpm++2m", 2, 0.0, 1.0, 0)
    assert not list(log_of(guidance_to_noise=[0.1, 0.2]).warnings(ddim))
    assert not list(GuidanceLog().warnings(ddim))
    (line,) = log_of(guidance_to_noise=[0.01, 0.019]).warnings(ddim)
    assert "does almost nothing, at most 0.0190" in line and "t=500" in line and "raise" in line
    (line,) = log_of(guidance_to_noise=[1.5, 0.019]).warnings(ddim)
    assert "dominates, 1.50 times" in line and "t=900" in line
    assert "`classifier_scale`" in line and "`guidance_clip`" in line
    cfg = Sampling("ddim", 2, 0.0, 0.0, 0, cfg_scale=9.0)
    (line,) = log_of(extrapolation_to_noise=[2.0, 0.1]).warnings(cfg)
    assert line.startswith("`cfg_scale`: guidance dominates")
    (line,) = log_of(guidance_to_noise=[0.1, 0.5]).warnings(solver)
    assert "second-order solver" in line and "t=500" in line
    assert not list(log_of(guidance_to_noise=[0.1, 0.2]).warnings(solver))


def test_guidance_log_merges():
    log, both = log_of(guidance_to_noise=[1.0, 2.0]), GuidanceLog()
    for record in (log.record(), json.loads(json.dumps(log.record()))):
        both.merge(record)
    assert [tuple(row) for row in both] == [
        (900, 1.0, None, None, 4),
        (500, 2.0, None, None, 4),
    ]
    assert both.table().splitlines()[1] == "900,1.000000,,,4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-v", "--sampler", "ddim"), "--sampler: ddim: --vanilla_sample means ddpm"),
        (("--sampler", "dpm++2m", "-e", 1), "--eta: 1 belongs to DDIM"),
        (("--counts", "ADI=1"), "--counts: says how many of which class; leave -n out"),
        (("-n", 10**9), r"3,000,000,000 images: .*/out needs 12,288,000.0 MB, its disk has"),
        (("-n", 10**9, "--out_size", 256, "--part", "0/3"), r"needs 24,576,000.0 MB"),
        (("--balance", "missing"), "balance: missing does not exist"),
        (("--classifier_scale", 0, "--guidance_clip", 1), "--guidance_clip: does nothing"),
        (("--classifier_scale", 0, "--guidance_interval", 1, 2), "`guidance_interval` needs"),
        (("--guidance_norm", "--guidance_clip", 1), "--guidance_norm: makes guidance as long"),
        (("--guidance_clip", 0), "--guidance_clip: 0 must be above 0"),
        (("--autoguidance_scale", 2), "go together"),
        (("--autoguidance", "x", "--autoguidance_scale", 1), "1 is no guidance"),
        (("--cfg_scale", 2), "`cfg_scale` needs a model that takes labels"),
        (("--device", "cpu", "--devices", 4096), "`devices` 4096: there is no GPU to use here"),
        (("--device", "cpu:1", "--devices", 2), "leave its number out"),
        (("--device", "mps", "--devices", 2), "several processes need auto, cpu or cuda"),
    ],
)
def test_user_errors(models, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sample(models, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_contradictions(models, adapter, weak, tmp_path):
    for other in (["--classes", "ADI"], ["--balance", tmp_path]):
        with pytest.raises(
            UserError, match="counts: .* (leave [-`]*classes`? out|as [-`]*balance`? does)"
        ):
            sample(models, tmp_path / "out", "--counts", "ADI=1", *other, n=None)
    options = ["-r", adapter, "--cfg_scale", 2, "--autoguidance", weak, "--autoguidance_scale", 2]
    with pytest.raises(UserError, match="both extrapolate the same prediction"):
        sample(models, tmp_path / "out", *options)


@pytest.mark.parametrize("option", ["guidance_on", "guidance_clip", "temperature", "guidance_norm"])
def test_options_that_need_a_classifier(models, tmp_path, option):
    value = {"guidance_on": ["z_0"], "guidance_norm": []}.get(option, [1])
    with pytest.raises(UserError, match=f"{option}: needs [-`]*classifier`?"):
        sample(models, tmp_path / "out", f"--{option}", *value, classifier=None)


def test_a_terminal_is_seen_behind_redirections():
    """As in `srun --pty bash`: nohup python sample_diffusion.py < /dev/null > log."""
    words = [sys.executable, "-c", "from ldm.devices import has_terminal as h; print(h())"]
    quiet = f"import subprocess as s; print(s.run({words}, stdin=s.DEVNULL, stdout=s.PIPE).stdout)"
    done = subprocess.run(
        [sys.executable, "-c", f"import pty; pty.spawn([{words[0]!r}, '-c', {quiet!r}])"],
        capture_output=True,
        start_new_session=True,
    )
    assert b"True" in done.stdout
    assert b"False" in subprocess.run(words, capture_output=True, start_new_session=True).stdout


def test_processes_started_by_torchrun_or_srun(monkeypatch):
    """Their number is taken over, and a contradiction is an error."""
    monkeypatch.setattr("ldm.devices.has_terminal", lambda: False)
    assert shared_devices("cpu", None, None).ranks == 1
    for variables in (
        {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"},
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"},
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "6"}
        | {"SLURM_STEP_NUM_NODES": "3"},
    ):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            context.setattr(os, "cpu_count", lambda: 2)
            devices = shared_devices("cpu", None, None)
            assert (devices.count, devices.num_nodes) == (2, 3)
            with pytest.raises(UserError, match="devices.? 3: 2 processes were started"):
                shared_devices("cpu", 3, None)
            if "SLURM_STEP_ID" in variables:  # in a shell that srun --pty started
                context.setattr("ldm.devices.has_terminal", lambda: True)
                assert shared_devices("cpu", None, None).ranks == 1


def test_temperature_of_the_classifier_is_used(models, tmp_path):
    """auto takes the calibrated one; images and probabilities follow it."""
    loaded = load_models(models / "diffusion.ckpt", models / "classifier.ckpt")
    loaded.classifier.temperature.fill_(2.0)
    path = tiny.save(loaded.classifier, tmp_path / "calibrated.ckpt")
    options = ["--classes", "TUM", "--classifier_scale", 20]
    sample(models, tmp_path / "auto", *options, classifier=path, n=1, steps=2)
    sample(models, tmp_path / "given", *options, "--temperature", 2, n=1, steps=2)
    sample(models, tmp_path / "plain", *options, n=1, steps=2)
    auto, given, plain = (manifest(tmp_path / k)[0] for k in ("auto", "given", "plain"))
    assert auto["temperature"] == given["temperature"] == "2.0" and plain["temperature"] == "1.0"
    assert auto["prob"] == given["prob"] != plain["prob"]
    one, other = (tmp_path / k / "TUM" / "000000.png" for k in ("auto", "given"))
    assert one.read_bytes() == other.read_bytes()


def test_a_library_call_reports(models, tmp_path):
    """What a sweep uses: counts in, a report out, rows and means in the folder."""
    from ldm.synthesis.production import synthesise

    loaded = load_models(models / "diffusion.ckpt", models / "classifier.ckpt")
    sampling = Sampling("ddim", 2, 1.0, 5.0, 0)
    folder = SampleFolder(tmp_path / "out", make_settings(sampling, loaded), loaded.facts)
    report = synthesise(Synthesiser(loaded, sampling), folder, {"LYM": 2, "TUM": 1}, 8)
    assert (report.made, report.present) == (3, 0) and report.images_per_s > 0
    assert list(folder.rows) == [("LYM", 0), ("LYM", 1), ("TUM", 0)]
    assert [row.images for row in folder.guidance_log] == [3, 3]
    again = synthesise(Synthesiser(loaded, sampling), folder, {"LYM": 2}, 8)
    assert (again.made, again.present, again.images_per_s) == (0, 2, 0.0)
