"""Every command of README.md and docs/ runs as it is written, on tiny tiles with tiny networks.

`test_documentation` collects the commands, so a new one is run by itself. All that is changed of
them: configurations have the sizes of `SMALL`, programs get `SHORTER` after their own arguments,
devices that are not at hand are left out, and folders at the root (/data) lie in the site.
`NOT_RUN` says which commands are not run, and why.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_foreign
import test_slides
import tiny
import torch
import yaml
from PIL import Image
from shells import ROOT, make_site, run
from test_documentation import DOCUMENTS, OF_PLACEHOLDERS, PLACEHOLDERS, Command, follow

from ldm import cli

# A pattern of document and words, and why such commands are not run. All are parsed nevertheless.
NOT_RUN = {
    r"docs/experiments/.*": "records of hours on tiles that are not part of this project",
    r"\S+ (make|conda|pip|wandb|module|cp|docker|apptainer) .*": "sets up a machine",
    r"\S+ histodiffusion --.*": "test_installed",
    r".* scripts/fetch_weights\.py .*": "needs the internet",
    r".* scripts/(demo|reproduce_table)\.py.*": "test_demo, test_experiment_jobs",
    r".* (dinov2|\S+\.dino|--finetune FILE|timm:NAME)( .*|$)": "needs weights of others",
    r".* scripts/import_checkpoint\.py model_010000\.pt .*": "the paper's size: test_foreign",
    r".* --peers diffusers monai.*": "MONAI is not installed",
    r".* (benchmarks/gpu\.py|--compile) .*": "needs a GPU: test_gpu",
}
# By the key of a number in a configuration, `vars` included.
SMALL = {
    "size": 32,
    "resolution": 32,
    "latent": 8,
    "ch": 32,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "num_heads": 2,
    "perceptual_weight": 0.0,
    "batch_size": 2,
    "num_workers": 0,
    "val_fraction": 0.2,
    "max_steps": 2,
    "aux_start": 1,
    "scale_images": 4,
    "limit_val_batches": 1,
}
# By the program: arguments that a command gets after its own.
SHORTER = {
    "main.py": "--max_steps 2",
    "classifier_train.py": "--iterations 2 --batch_size 3 --save_interval 1 --eval_interval 1 "
    "--workers 0 --image_size 32 --classifier_width 32 --classifier_depth 1 "
    "--classifier_channel_mult 1,1 --classifier_attention_resolutions 16",
    "--readout": "--iterations 2 --readout_draws 1 --workers 0",
    "eval.py": "--arch test_vit --patch_size 8 --input_size 32 --batch_size 4 --workers 0",
    "sample_diffusion.py": "-n 8 -c 2 --batch_size 8",
    "scripts/cache_latents.py": "--workers 0",
    "scripts/copy_check.py": "--quantile 0.2",
    "scripts/guidance_sweep.py": "-n 8 --steps 2 --batch_size 8",
    "scripts/index_corpus.py": "--min_size 32",
    "scripts/make_tiles.py": "--workers 1 --size 32 --train 12 --train5 4 --val 8 --test 4",
    "benchmarks": "--size demo --batch_size 1 --repeats 1 --min_run_time 0",
}
DEVICES = ("--gpus", "--devices", "--num_nodes")  # options that name machines or GPUs
# What a page may begin with, by what was made before; not given where the page itself makes it.
GIVEN = {
    "AUTOENCODER": "autoencoder",
    "CKPT": "autoencoder",
    "DIFFUSION": "diffusion",
    "RUN": "diffusion",
    "CLASSIFIER": "guide",
    "logs/autoencoder": "autoencoder",
    "logs/diffusion": "diffusion",
    "logs/ldm": "diffusion",
    "logs/eval/train5": "eval/train5",
    "OUT": "OUT",
    "OUT1": "OUT",
    "OUT2": "OUT",
    "D": "D",
    "D/train5+fake50%": "D/train5",
    "tiles": "D",
    "POOL": "D/train",
    "data/tiles": "D",
    "data/vgh": "D/train",
    "data/tcga": "D/train",  # its classes stand for patients
}


def shrunk(node, name: str = ""):
    """A configuration with the sizes of `SMALL`."""
    if isinstance(node, dict):
        # LPIPS, a part of a loss if nothing is said, needs weights of others.
        more = {"perceptual_weight": 0.0} if "disc_start" in node else {}
        return {key: shrunk(value, key) for key, value in node.items()} | more
    interpolated = isinstance(node, str) and node.startswith("${vars.")
    return SMALL[name] if name in SMALL and not interpolated else node


def make_workshop(folder: Path) -> Path:
    """A checkout with small configurations, whose python only records."""
    folder.mkdir()
    site = make_site(folder)
    (site / "ldm").symlink_to(ROOT / "ldm")
    (site / "configs").unlink()
    for path in (ROOT / "configs").rglob("*.yaml"):
        out = site / path.relative_to(ROOT)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(yaml.safe_dump(shrunk(yaml.safe_load(path.read_text())), sort_keys=False))
    return site


def adapted(command: Command, site: Path) -> tuple[list[str], dict[str, str]]:
    """The words and variables of a command on this machine."""

    def here(text: str) -> str:
        return re.sub(r"(?<![\w.])/(?=(data|scratch)/)", f"{site}/", text)

    words = [PLACEHOLDERS.get(word, here(word)) for word in command.words]
    if words[0] == cli.PROGRAM:  # by its published name
        words = [cli.COMMANDS[words[1]], *words[2:]]
    before = ["", *words]
    words = [w for w, b in zip(words, before, strict=False) if not {w, b} & {*DEVICES}]
    key = "benchmarks" if words[0] == "-m" else "--readout" if "--readout" in words else words[0]
    more = SHORTER.get(key, "").split()
    if words[0] == "eval.py":
        matched = "--match_steps" in words
        more += ["--match_steps", "2", "--validations", "1"] if matched else ["--epochs", "1"]
        more += ["--seeds", "0", "1"] if "--seeds" in words else []
    variables = OF_PLACEHOLDERS if "CONFIG" in command.words else command.variables
    return words + more, {name: here(value) for name, value in variables.items()}


def made(words: list[str]) -> str | None:
    """What a command makes, as it is written."""

    def value(*options: str) -> str | None:
        return next((words[words.index(name) + 1] for name in options if name in words), None)

    if words[0] == "eval.py":
        return f"{value('--logdir') or 'logs/eval'}/{value('--output_dir', '--subset')}"
    name = value("--name")
    return value("--out", "--outdir") or name and f"logs/{name}"


def run_all(commands: list[Command], site: Path) -> list[str]:
    """Run the commands of a page in order; the failures."""
    failures, ran, makers = [], set(), {}
    for command in commands:
        text = f"{command.where} {' '.join(command.words)}"
        words, variables = adapted(command, site)
        if any(re.fullmatch(pattern, text) for pattern in NOT_RUN) or tuple(words) in ran:
            continue
        ran.add(tuple(words))
        out = made(command.words)
        if out and makers.setdefault(out, command.where) != command.where:
            shutil.rmtree(site / out, ignore_errors=True)  # of another example
            makers[out] = command.where
        failure = run(words, site, variables)
        if failure:
            failures.append(f"{command.where}: {' '.join(words)}: {failure}")
    return failures


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Path:
    """Tiles and the runs that pages begin with, made by this project's commands."""
    site = make_workshop(tmp_path_factory.mktemp("given") / "site")
    autoencoder = "configs/autoencoder/autoencoder_histo_kl_64x64x3.yaml"
    for line in (
        f"scripts/make_tiles.py --out D --classes {' '.join(tiny.CLASSES)}",
        f"main.py --base {autoencoder} -t --name autoencoder",
        f"main.py --base {PLACEHOLDERS['CONFIG']} -t --name diffusion",
        "classifier_train.py --data_dir D/train5 --val_data_dir D/val --name guide",
        "eval.py --data_path D --output_dir train5",
        "sample_diffusion.py -r logs/diffusion --classifier logs/guide --outdir logs/OUT",
    ):
        variables = {"HISTO_DATA": "D/train", "HISTO_AUTOENCODER": "logs/autoencoder"}
        variables |= {"HISTO_FIRST_STAGE": "logs/diffusion"}
        words, variables = adapted(Command("", line.split(), variables), site)
        failure = run(words, site, variables)
        assert not failure, f"{line}: {failure}"
    (site / "D").rename(site / "logs" / "D")
    return site / "logs"


def equip(site: Path, given: Path, makes: set[str | None]) -> None:
    """Lay out what a page begins with, apart from what it makes itself."""
    for name, source in GIVEN.items():
        if name not in makes:
            ignored = shutil.ignore_patterns(*(Path(m).name for m in makes if m and m[:2] == "D/"))
            shutil.copytree(given / source, site / name, ignore=ignored)
    tiles = [path.relative_to(given / "D") for path in given.glob("D/*/*/*.png")]
    rows = [f"{Path(*tile.parts[1:])},{tile.stem[:10]}" for tile in tiles]
    (site / "slides.csv").write_text("path,group\n" + "\n".join(sorted(set(rows))))
    tiles = np.stack([np.asarray(Image.open(p)) for p in sorted(given.glob("D/train/*/*.png"))])
    (site / "data" / "pannuke").mkdir()
    np.save(site / "data" / "pannuke" / "images.npy", tiles)
    np.savez(site / "pathmnist_224.npz", train_images=tiles, train_labels=np.arange(len(tiles)) % 3)
    test_slides.write_slide(site / "SLIDES" / "slide.tif", levels=3)
    model = tiny.diffusion(tiny.save(tiny.autoencoder(), site / "tiny.ckpt"))
    for name, state in {
        "kl.ckpt": test_foreign.autoencoder_state(tiny.autoencoder()),
        "ldm.ckpt": test_foreign.diffusion_state(model),
    }.items():
        torch.save({"state_dict": state}, site / name)
    test_foreign.kl_yaml(site / "kl.yaml")
    test_foreign.ldm_yaml(site / "ldm.yaml")


@pytest.mark.parametrize(
    "last", ["sample_diffusion.py", pytest.param("eval.py", marks=pytest.mark.slow)]
)
def test_the_first_page_runs(last, tmp_path):
    """From an empty folder to synthetic tiles and, in the slow test, to their evaluation."""
    site = make_workshop(tmp_path / "page")
    commands = follow("README.md", site)
    end = max(i for i, command in enumerate(commands) if command.words[0] == last)
    failures = run_all(commands[: end + 1], site)
    assert (site / "out" / "manifest.csv").is_file()
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "README.md"])
def test_every_other_page_runs(document, given, tmp_path):
    site = make_workshop(tmp_path / "page")
    commands = follow(document, site)
    equip(site, given, {made(command.words) for command in commands})
    failures = run_all(commands, site)
    assert not failures, "\n".join(failures)


def test_every_reason_is_needed(tmp_path):
    """A line of `NOT_RUN` that fits no command is out of date."""
    texts = []
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / str(number)).mkdir()
        commands = follow(document, make_site(tmp_path / str(number)))
        texts += [f"{command.where} {' '.join(command.words)}" for command in commands]
    assert not [p for p in NOT_RUN if not any(re.fullmatch(p, text) for text in texts)]
