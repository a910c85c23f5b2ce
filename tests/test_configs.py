"""Every YAML under configs/ is valid and trains one step, shrunk in batch and data only."""

import functools
import re
from pathlib import Path

import pytest
import tiny

from ldm.cli import parse, run_command
from ldm.commands import train as main_py
from ldm.config import load_configs, resolve, validate_config
from ldm.errors import Problems
from ldm.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]
TRAINING = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "configs").rglob("*.yaml")
    if "\n  target: ldm.models." in p.read_text()  # not those that are merged over others
)
FOLDERS = ("train", "train5", "val", "lc25000")
PAPER_SIZED = ("configs/autoencoder/", "configs/latent-diffusion/")


def test_there_are_as_many_as_expected():
    assert len(TRAINING) == 13


def set_variables(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Where the tiles of configurations are, and no models."""
    patch.setenv("HISTO_DATA", str(root))
    for name in ("HISTO_AUTOENCODER", "HISTO_DIFFUSION"):
        patch.setenv(name, str(root / "none.ckpt"))
    patch.setenv("HISTO_LC25000", str(root / "lc25000"))


@pytest.fixture
def variables(monkeypatch, tmp_path):
    set_variables(monkeypatch, tmp_path)


@pytest.fixture
def environment(variables, tmp_path):
    for folder in FOLDERS:
        tiny.tiles(tmp_path / folder, per_class=2, pixels=64)
    return tmp_path


BAD = ["x", -5, 1e30, float("nan"), True]
# Values that are none to complain of: a duration, a word that the model looks at, a mean.
ALLOWED = (("x", "val_check_interval"), ("x", "time_shift"), (-5, "time_mean"))
NOT_ZERO = re.compile(
    r"(accumulate_grad_batches|base_learning_rate|batch_frequency|batch_size|ch|ch_mult|channel_mult"
    r"|channels|cycle_lengths|embed_dim|every_n_train_steps|image_size|in_channels|max_images"
    r"|model_channels|out_ch|out_channels|patch|resolution|size|timesteps"
    r"|z_channels)$"
)


def numbers(tree: dict, path: str = "") -> dict[str, float | list]:
    """The numbers and lists of numbers in a configuration, by dotted path."""
    found = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            found |= numbers(value, where)
        elif isinstance(first, int | float) and not isinstance(first, bool):
            found[where] = value
    return found


@pytest.mark.parametrize("bad", [*BAD, 0], ids=str)
@pytest.mark.parametrize("path", TRAINING)
def test_every_number_has_a_type_and_a_range(path, bad, variables):
    """All wrong ones are reported together, each by its name; as it stands, none is wrong."""
    config = resolve(load_configs([ROOT / path]))
    validate_config(config)
    config["lightning"].setdefault("trainer", {})["accumulate_grad_batches"] = 1
    params = {"every_n_train_steps": 10}
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    config["lightning"]["modelcheckpoint"] = {"target": target, "params": params}
    places = {
        where: value
        for where, value in numbers({k: v for k, v in config.items() if k != "vars"}).items()
        if (bad, where.rsplit(".")[-1]) not in ALLOWED
        and (bad != 0 or NOT_ZERO.match(where.rsplit(".")[-1]))
    }
    assert len(places) > 5 or bad == 0
    for where, value in places.items():
        *parents, last = where.split(".")
        node = config
        for key in parents:
            node = node[key]
        node[last] = [bad, *value[1:]] if isinstance(value, list) else bad
    with pytest.raises(Problems) as error:
        validate_config(config)
    assert error.value.found.keys() == places.keys()


@pytest.mark.parametrize(
    "override",
    [
        "lightning.callbacks.image_logger.params.batch_frequency=0",
        "model.params.ddconfig.ch=-4",
        "model.params.ddconfig.ch_mult=abc",
        "model.params.ddconfig.ch_mult=[]",
        "model.params.embed_dim=0",
        "lightning.modelcheckpoint.params.every_n_train_steps=0",
        "lightning.trainer.accumulate_grad_batches=-2",
        "model.base_learning_rate=1e30",
    ],
)
def test_a_wrong_number_is_one_line_before_anything_is_made(override, environment, capsys):
    before = sorted(environment.rglob("*"))
    words = ["--base", str(ROOT / "configs/demo/autoencoder.yaml"), "-t", override]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main_py.main([*words, "--logdir", str(environment / "logs")]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert f"{override.partition('=')[0]}: " in said
    assert sorted(environment.rglob("*")) == before


@pytest.fixture(scope="module")
def train_once(tmp_path_factory):
    """Trains a configuration one step, and before that what it starts from, each of them once."""
    root = tmp_path_factory.mktemp("configs")
    for folder in FOLDERS:
        tiny.tiles(root / folder, per_class=2, pixels=64)

    @functools.cache
    def train(path: str) -> Path:
        folder, _, name = path.rpartition("/")
        needed = {}
        if name not in ("autoencoder.yaml", "flow.yaml", "patch_pca.yaml"):
            needed["HISTO_AUTOENCODER"] = train(f"{folder}/autoencoder.yaml")
        if name == "label_adapter.yaml":
            needed["HISTO_DIFFUSION"] = train(f"{folder}/diffusion.yaml")
        run = root / "logs" / path.removesuffix(".yaml")
        argv = ["--base", str(ROOT / path), "-t", "--logdir", str(root / "logs"), "--max_steps"]
        argv += ["1", "--name", str(run.relative_to(root / "logs")), "data.params.batch_size=2"]
        argv += ["lightning.trainer.limit_val_batches=1"]
        argv += ["lightning.trainer.enable_progress_bar=false"]
        with pytest.MonkeyPatch.context() as patch:
            set_variables(patch, root)
            for variable, start in needed.items():
                patch.setenv(variable, str(start))
            main_py.train(parse(main_py.Options, argv))
        return run

    return train


@pytest.mark.parametrize("path", [p for p in TRAINING if not p.startswith(PAPER_SIZED)])
def test_trains_one_step(path, train_once):
    assert RunFolder(train_once(path)).last.is_file()


@pytest.mark.slow
def test_paper_sized_configs_train_one_step(environment, monkeypatch):
    """The paper's networks at full size, one tile per step, without LPIPS (no weights here)."""

    def train(config: str, name: str, *more: str) -> None:
        argv = ["--base", str(ROOT / "configs" / config), "-t", "--name", name, "--max_steps", "1"]
        argv += ["--logdir", str(environment / "logs"), *more, "data.params.batch_size=1"]
        argv += ["data.params.num_workers=0", "lightning.trainer.limit_val_batches=1"]
        argv += [
            "lightning.callbacks.image_logger=null",
            "lightning.trainer.num_sanity_val_steps=0",
        ]
        main_py.train(parse(main_py.Options, argv))
        assert RunFolder(environment / "logs" / name).last.is_file()

    # The discriminator at once, so that both networks take part.
    loss = "model.params.lossconfig.params"
    off = [f"{loss}.perceptual_weight=0", f"{loss}.disc_start=0"]
    train("autoencoder/autoencoder_histo_kl_64x64x3.yaml", "autoencoder", *off)
    monkeypatch.setenv("HISTO_AUTOENCODER", str(environment / "logs" / "autoencoder"))
    train("latent-diffusion/histo-ldm-kl-8.yaml", "diffusion", "model.params.scale_images=2")
    monkeypatch.setenv("HISTO_DIFFUSION", str(environment / "logs" / "diffusion"))
    train("latent-diffusion/histo-ldm-kl-8-label-adapter.yaml", "adapter")
    train("autoencoder/decoder_finetune.yaml", "decoder", "model.params.perceptual_weight=0")
