"""`import ldm` as a notebook uses it, and the notebook of the documentation."""

import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny
import torch
from nbclient import NotebookClient

import ldm
import sample_diffusion
from ldm.data.tiles import read_tile, to_tensor
from ldm.errors import UserError
from ldm.models.vit import TileClassifier

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Models and labelled tiles, in the places where the demo leaves its own."""
    root = tmp_path_factory.mktemp("site")
    for seed, (split, count) in enumerate({"train5": 4, "val": 2, "test": 3}.items()):
        tiny.tiles(root / "data" / split, count, seed)
    tiny.models(root)
    for name in ("autoencoder", "diffusion", "classifier"):
        folder = root / "models" / name / "checkpoints"
        folder.mkdir(parents=True)
        (root / f"{name}.ckpt").rename(folder / "last.ckpt")
    return root


@pytest.fixture(scope="module")
def run(site):
    models = site / "models"
    return ldm.load(models / "diffusion", classifier=models / "classifier", device="cpu")


@pytest.fixture(scope="module")
def real(site, run):
    return run.features(site / "data" / "train5")


def test_importing_is_light_and_names_are_listed():
    code = "import sys, ldm; print('torch' in sys.modules, [n for n in dir(ldm) if n == 'load'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False ['load']\n"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ldm.lod


@pytest.mark.parametrize(
    "options",
    [
        {"classifier_scale": 3.0},
        {"sampler": "dpm++2m", "classifier_scale": 0.0, "seed": 7, "batch_size": 2},
        {"start_from": "train5", "strength": 0.5},
    ],
)
def test_samples_are_those_of_the_command(site, run, tmp_path, options):
    """The bytes of the files, whatever the batch size; classes one after the other."""
    options = {"custom_steps": 4, **options}
    if "start_from" in options:
        options["start_from"] = str(site / "data" / options["start_from"])
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    models = [
        f"--{role}={site / 'models' / name}"
        for role, name in (("model", "diffusion"), ("classifier", "classifier"))
    ]
    argv += [*models, "-n", "3", "--classes", "LYM,TUM", "--out", str(tmp_path / "out")]
    assert sample_diffusion.main([*argv, "--device", "cpu"]) == 0
    tiles = run.sample("LYM,TUM", 3, **options)
    files = sorted((tmp_path / "out").glob("*/*.png"))
    assert np.array_equal(tiles, np.stack([read_tile(path) for path in files]))


def test_tiles_are_paths_arrays_or_tensors(site, run):
    """All three give the same latents and features."""
    folder = site / "data" / "test"
    paths = sorted(folder.glob("*/*.png"))
    arrays = np.stack([read_tile(path) for path in paths])
    floats = torch.stack([to_tensor(one) for one in arrays])
    expected, described = run.encode(folder), run.features(folder)
    assert expected.shape == (9, *tiny.LATENT)
    for tiles in (arrays, torch.from_numpy(arrays), floats):
        assert torch.equal(run.encode(tiles), expected)
    found = run.features(arrays, [path.parent.name for path in paths])
    assert torch.equal(found.values, described.values)
    assert found.class_names == described.class_names
    plain = ldm.load(site / "models" / "autoencoder", device="cpu")
    scale = 0.8  # of tiny.diffusion
    torch.testing.assert_close(plain.encode(arrays) * scale, expected)
    shown = [one.astype(int) for one in (plain.decode(plain.encode(arrays)), run.decode(expected))]
    assert abs(shown[0] - shown[1]).max() <= 1  # the scale is divided out again, and rounded


@pytest.mark.parametrize("strategy", ["centroid", "confidence", "knn", "coverage", "random"])
def test_the_best_of_real_tiles_are_their_own(site, run, real, strategy):
    """Labelled tiles with one under a wrong name: all strategies but chance leave it out."""
    arrays = np.stack([read_tile(path) for path in _paths(site, "test")])
    labels = ["ADI"] * 3 + ["LYM"] * 3 + ["TUM"] * 2 + ["ADI"]
    rows = ldm.select(run.features(arrays, labels), real, 4, strategy).tolist()
    assert len(set(rows)) == len(rows) and (8 in rows) == (strategy == "random")
    assert [labels[row] for row in rows] == sorted(labels[row] for row in rows)


def _paths(site: Path, split: str) -> list[Path]:
    return sorted((site / "data" / split).glob("*/*.png"))


def test_a_probe_of_a_few_labels(site, run, real):
    probe = ldm.fit_probe(real)
    test = run.features(site / "data" / "test")
    assert probe.predict(test) == test.class_names
    np.testing.assert_allclose(probe.probabilities(test).sum(axis=1), 1)
    with pytest.raises(UserError, match="another network"):
        probe.predict(run.features(site / "data" / "test", at=20))
    pool = tiny.tiles(site / "pool", 20, seed=7)
    spread = ldm.fit_probe(real, run.features(pool))
    right = [a == b for a, b in zip(spread.predict(test), test.class_names, strict=True)]
    assert sum(right) > len(right) / 2  # chance is a third
    assert not np.allclose(spread.probabilities(test), probe.probabilities(test))


def test_a_classifier_of_eval_describes_tiles(site, tmp_path):
    net = TileClassifier("vit_tiny", 3, input_size=32, patch_size=16)
    net.classes = tiny.CLASSES
    tiny.write_checkpoint(tmp_path / "checkpoints" / "best.ckpt", tiny.vit_checkpoint(net))
    found = ldm.load(tmp_path, device="cpu").features(site / "data" / "test")
    assert found.logits.shape == (9, 3) and found.classes == tiny.CLASSES


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, site: ldm.load(site / "nothing"), "`run`: no file"),
        (lambda run, site: ldm.load(site / "models" / "classifier"), "kind classifier"),
        (lambda run, site: ldm.load(site / "models" / "autoencoder", classifer="x"), "classifer"),
        (lambda run, site: run.sample("TUMOR"), "TUMOR"),
        (lambda run, site: run.sample("TUM", 0), "n_samples"),
        (lambda run, site: run.sample("TUM", scale=3), "scale"),
        (lambda run, site: run.sample("TUM", eta=2.0), "eta"),
        (lambda run, site: run.sample("TUM", out="x"), "`out` is no option"),
        (lambda run, site: run.encode(np.zeros((2, 8, 8))), r"uint8 \(N, H, W, 3\)"),
        (lambda run, site: run.encode(site / "nothing"), "`tiles`"),
        (lambda run, site: run.features(np.zeros((2, 8, 8, 3), np.uint8), ["TUM"]), "1 names of 2"),
        (lambda run, site: run.features(np.zeros((1, 8, 8, 3), np.uint8), "X"), "unknown"),
        (lambda run, site: run.features(site / "data" / "test", "TUM"), "`labels` are for arrays"),
        (
            lambda run, site: ldm.fit_probe(run.features(np.zeros((1, 8, 8, 3), np.uint8))),
            "`real` tiles have no labels",
        ),
        (
            lambda run, site: ldm.select(*[run.features(site / "data" / "test")] * 2, 1, "best"),
            "`strategy` 'best'",
        ),
        (
            lambda run, site: ldm.select(*[run.features(site / "data" / "test")] * 2, 0),
            "per_class=0",
        ),
        (lambda run, site: ldm.train_classifier(site, "train5", epoch=1), "epoch"),
    ],
)
def test_mistakes_are_one_line(site, run, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(run, site)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_notebook_runs(kernel, site, monkeypatch):
    """Every cell, on tiny models; the outputs that it is published with are small."""
    root = site / f"quickstart{kernel}"
    root.mkdir()
    for name, target in {
        "tiles": "data",
        "flow": "models/diffusion",
        "readout": "models/classifier",
    }.items():
        (root / name).symlink_to(site / target)
    monkeypatch.setenv("HISTO_QUICKSTART", str(root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(site / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    published = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert NOTEBOOK.stat().st_size < 300_000
    assert any("image/png" in output.get("data", {}) for output in published)
    assert not any(output.output_type == "error" for output in published)
    if kernel:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": site}}).execute()
        return
    names: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, str(NOTEBOOK), "exec"), names)
    assert list(names["summary"]["per_seed"]) and names["label"] == "TUM"
