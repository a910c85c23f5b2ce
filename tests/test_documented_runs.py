"""The commands of the documentation run, in order, on tiny procedural tiles with tiny models.

Configurations are the published ones with the sizes of `SMALLER`; commands get the arguments of
`SHORTER` after their own. Nothing else of a command is changed but the places of its data.
"""

import csv
import importlib
import multiprocessing
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf
from shells import ENTRY_POINTS, ROOT, make_site
from test_documentation import DOCUMENTS, follow

from ldm.cli import run_command

pytestmark = pytest.mark.slow

# Documents and commands that are not run here, and why. Their words are checked nevertheless.
NOT_RUN = {
    r"docs/cluster\.md.*": "jobs of a SLURM cluster, which tests/slurm/run.sh sets up",
    r"docs/experiments/.*": "the record of hours; the commands are those of docs/synthesis.md",
    r"docs/table\.md.*": "whole tables: test_table_jobs runs one, tests/slurm/table.sh another",
    r".* (make|conda|pip|wandb|module|cp) .*": "sets up an environment",
    r".* scripts/fetch_weights\.py .*": "needs the internet",
    r".* scripts/demo\.py.*": "test_demo runs it",
    r".* scripts/reproduce_table\.py .*": "test_table_jobs runs a table",
    r".* (dinov2|\S*\.dino|--finetune FILE).*": "needs pre-trained weights",
    r".* scripts/import_checkpoint\.py .*": "needs checkpoints of other code",
    r".* --peers diffusers monai.*": "MONAI is an optional package",
    r".* --compile .*": "is meant for a GPU; compiling takes minutes on a CPU",
    r".*configs/data/pretraining\.yaml.*": "three corpora of 256 px; test_corpora has smaller ones",
}
# By the target of a model: sizes that train in seconds.
SMALLER = {
    "ldm.models.autoencoder.AutoencoderKL": {
        "embed_dim": 3,
        "ddconfig": tiny.DDCONFIG,
        "lossconfig": {"params": {"perceptual_weight": 0.0}},
    },
    "ldm.models.diffusion.LatentDiffusion": {
        "image_size": tiny.LATENT[1],
        "channels": 3,
        "unet_config": {"params": tiny.UNET},
    },
    "ldm.models.auxiliary.DecoderFinetune": {"aux_start": 1, "perceptual_weight": 0.0},
}
# By the program: arguments that a command gets after its own.
SHORTER = {
    "main.py": "--max_steps 2 data.params.batch_size=2 data.params.num_workers=0 "
    "data.params.val_fraction=0.2 lightning.trainer.limit_val_batches=1",
    "classifier_train.py": "--iterations 2 --batch_size 3 --image_size 32 --classifier_width 32 "
    "--classifier_depth 1 --classifier_channel_mult 1,1 --save_interval 1 --eval_interval 1 "
    "--classifier_attention_resolutions 16 --num_workers 0",
    "eval.py": "--arch test_vit --patch_size 8 --input-size 32 --batch-size 4 --num_workers 0",
    "sample_diffusion.py": "-n 8 -c 2",
    "scripts/guidance_sweep.py": "-n 8 --steps 2 --batch_size 8",
    "scripts/cache_latents.py": "--num_workers 0",
    "scripts/vis.py": "--num_workers 0",
    "scripts/index_corpus.py": "--min_size 32",
    "scripts/make_subset.py": "--out subset",  # D/train5 is there
    "benchmarks": "--size demo --batch_size 1 --repeats 1 --min_run_time 0",
}
DEVICES = ("--gpus", "--devices", "--num_nodes")  # of machines that are not at hand


def why_not(where: str, words: list[str]) -> str | None:
    """Why a command is not run; None where it is."""
    command = f"{where} {' '.join(words)}"
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def shortened(words: list[str], workshop: Path) -> list[str]:
    """The words of a command with fewer steps, without devices, and its data in the workshop."""
    result = []
    for word in words:
        if result and result[-1] in DEVICES:
            result.pop()
        else:
            result.append(re.sub(r"(^|=)/(?=data/|scratch/)", rf"\1{workshop}/", word))
    program = "benchmarks" if words[0] == "-m" else words[0]
    more = SHORTER.get(program, "").split()
    if program == "eval.py":
        matched = "--match_steps" in words
        more += ["--match_steps", "2", "--validations", "1"] if matched else ["--epochs", "1"]
        more += [] if "--seeds" not in words else ["--seeds", "0", "1"]
    return result + more


def write_configs(folder: Path) -> None:
    """The published configurations, with the sizes of `SMALLER`."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        config = OmegaConf.load(path)
        target = OmegaConf.select(config, "model.target")
        if target in SMALLER:
            for key, value in SMALLER[target].items():
                old = OmegaConf.select(config, f"model.params.{key}")
                merged = key == "lossconfig" and old is not None
                config.model.params[key] = OmegaConf.merge(old, value) if merged else value
            if "unet_config" in config.model.params:
                config.model.params.unet_config.target = "ldm.modules.unet.UNetModel"
        if "vars" in config and "size" in config.vars:
            config.vars.size = tiny.PIXELS
        text = re.sub(r"\bsize: (256|64)\b", f"size: {tiny.PIXELS}", OmegaConf.to_yaml(config))
        out = folder / path.relative_to(ROOT / "configs")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A checkout with small configurations, tiles in D and the models that commands begin with."""
    root = tmp_path_factory.mktemp("workshop")
    for name in ("benchmarks", "scripts", "ldm", *ENTRY_POINTS):
        (root / name).symlink_to(ROOT / name)
    write_configs(root / "configs")
    counts = f"--size {tiny.PIXELS} --train 12 --train5 4 --val 6 --test 4".split()
    words = ["scripts/make_tiles.py", "--out", "D", *counts, "--classes", *tiny.CLASSES]
    assert not run(root, words, {})
    models = tiny.models(root)
    (root / "logs").mkdir(exist_ok=True)
    links = {"AUTOENCODER": "autoencoder", "DIFFUSION": "diffusion", "CLASSIFIER": "classifier"}
    for name, stem in links.items():
        shutil.copy(models / f"{stem}.ckpt", root / name)
    for path, source in {
        "logs/autoencoder": "AUTOENCODER",
        "logs/diffusion": "DIFFUSION",
        "logs/ldm": "DIFFUSION",
        "CKPT": "AUTOENCODER",
        "CONFIG": "configs/latent-diffusion/histo-ldm-kl-8.yaml",
        "data/tiles": "D",
        "data/tcga": "D/train",
        "data/lc25000": "D/train",
    }.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).symlink_to(root / source)
    with open(root / "slides.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "slide"])
        for tile in sorted((root / "D").rglob("*.png")):
            name = tile.relative_to(root / "D")
            rows.writerow([str(Path(*name.parts[1:])), tile.stem.split("_")[0]])
    return root


def call(words: list[str], folder: Path, variables: dict[str, str], log: Path) -> None:
    """Be the process of a command: its output goes to a file, its status is that of the process."""
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("HISTO_")]:
        del os.environ[name]
    os.environ.update(variables)
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    module, *argv = words[1:] if words[0] == "-m" else words
    entry = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    sys.argv = [module, *argv]
    run_command(partial(entry.main, argv))


def run(workshop: Path, words: list[str], variables: dict[str, str]) -> str:
    """Run a command in the workshop; what it says where it fails."""
    places = {k: re.sub(r"^/(?=data/)", f"{workshop}/", v) for k, v in variables.items()}
    log = workshop / "log"
    # Forked by a server that has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytorch_lightning", "timm", "main", "eval"])
    process = context.Process(target=call, args=(words, workshop, places, log))
    process.start()
    process.join()
    lines = log.read_text().strip().splitlines()[-3:] if log.exists() else []
    return "" if process.exitcode == 0 else f"status {process.exitcode}: {' | '.join(lines)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run(document, workshop, tmp_path):
    commands = follow(document, make_site(tmp_path))
    wrong, ran = [], set()
    for command in commands:
        words = shortened(command.words, workshop)
        key = " ".join(words)
        if why_not(command.where, command.words) or key in ran:
            continue
        ran.add(key)
        variables = command.variables
        if "latents" not in key and "HISTO_DATA" in variables and "/train" not in key:
            variables = variables | {"HISTO_DATA": str(workshop / "D")}
        failure = run(workshop, words, variables)
        if failure:
            wrong.append(f"{command.where}: {key}: {failure}")
    assert not wrong, "\n".join(wrong)


def test_every_reason_is_needed():
    """A line of `NOT_RUN` that fits no command is out of date."""
    import tempfile

    commands = []
    for document in DOCUMENTS:
        with tempfile.TemporaryDirectory() as folder:
            commands += follow(document, make_site(Path(folder)))
    texts = [f"{command.where} {' '.join(command.words)}" for command in commands]
    unused = [p for p in NOT_RUN if not any(re.fullmatch(p, text) for text in texts)]
    assert not unused
