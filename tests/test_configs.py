"""Every YAML under configs/ is valid and trains one step, shrunk in batch and data only."""

from pathlib import Path

import pytest
import tiny

import main as main_py
from ldm.config import load_configs, resolve, validate_config
from ldm.run import RunFolder

ROOT = Path(main_py.__file__).parent
TRAINING = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "configs").rglob("*.yaml")
    if "\nmodel:" in p.read_text()
)
PAPER_SIZED = ("configs/autoencoder/", "configs/latent-diffusion/")


def test_there_are_as_many_as_expected():
    assert len(TRAINING) == 13


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    for name in ("HISTO_AUTOENCODER", "HISTO_DIFFUSION"):
        monkeypatch.setenv(name, str(tmp_path / "none.ckpt"))
    monkeypatch.setenv("HISTO_LC25000", str(tmp_path / "lc25000"))
    for folder in ("train", "train5", "val", "lc25000"):
        tiny.tiles(tmp_path / folder, per_class=2, pixels=64)
    return tmp_path


@pytest.mark.parametrize("path", TRAINING)
def test_valid(path, environment):
    validate_config(resolve(load_configs([ROOT / path])))


@pytest.mark.parametrize("path", [p for p in TRAINING if not p.startswith(PAPER_SIZED)])
def test_trains_one_step(path, environment, monkeypatch):
    folder = path.rsplit("/", 1)[0]
    small = ["data.params.batch_size=2", "lightning.trainer.limit_val_batches=1"]

    def train(config: str, name: str) -> None:
        argv = ["--base", str(ROOT / config), "-t", "--logdir", str(environment / "logs")]
        argv += ["--name", name, "--max_steps", "1", "lightning.trainer.enable_progress_bar=false"]
        main_py.train(main_py.parse_arguments([*argv, *small]))

    alone = ("autoencoder.yaml", "flow.yaml", "patch_pca.yaml")
    if not path.endswith(alone):
        train(f"{folder}/autoencoder.yaml", "autoencoder")
        monkeypatch.setenv("HISTO_AUTOENCODER", str(environment / "logs" / "autoencoder"))
    if path.endswith("label_adapter.yaml"):
        train(f"{folder}/diffusion.yaml", "diffusion")
        monkeypatch.setenv("HISTO_DIFFUSION", str(environment / "logs" / "diffusion"))
    train(path, "run")
    assert RunFolder(environment / "logs" / "run").last.is_file()


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
        main_py.train(main_py.parse_arguments(argv))
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
