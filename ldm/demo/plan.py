"""The stages of the demo, from tiles to a table, as command lines of the entry points."""

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError
from ldm.run import RunFolder
from ldm.stages import ROOT, Runner, Stage, arguments, show_path

CONFIGS = ROOT / "configs" / "demo"
SETTINGS = "configs/demo/demo.yaml"
SPLITS = ("train", "train5", "val", "test")
REAL, SELECTED, RANDOM = "train5", "selected", "random"


def read_settings(overrides: Sequence[str] = (), fast: bool = False) -> dict[str, Any]:
    """The settings of configs/demo/demo.yaml, with overrides such as `sampling.scale=5`.

    Args:
        fast: Merge its `fast` section over the rest.

    Raises:
        UserError: An override that is malformed or names nothing that is there.
    """
    config = OmegaConf.load(ROOT / SETTINGS)
    quick = config.pop("fast")
    OmegaConf.set_struct(config, True)
    if fast:
        config = OmegaConf.merge(config, quick)
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or key.startswith("-"):
            raise UserError(f"{word}: overrides have the form section.key=value, see {SETTINGS}")
        try:
            before = OmegaConf.select(config, key, throw_on_missing=True)
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
            after = OmegaConf.select(config, key)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(f"{word}: {str(error).splitlines()[0]}; see {SETTINGS}") from None
        if before is None:
            raise UserError(f"{word}: there is no such setting; see {SETTINGS}")
        if _kind(before) not in ("text", _kind(after)):
            raise UserError(f"{word}: must be {_kind(before)}, as {before} in {SETTINGS}")
    return OmegaConf.to_container(config)


def _kind(value: Any) -> str:
    if isinstance(value, DictConfig):
        return "a section"
    if isinstance(value, ListConfig):
        return "a list"
    return "a number" if isinstance(value, int | float) else "text"


@dataclass(frozen=True)
class Arm:
    """One row of the table: a training folder and what eval.py made of it."""

    folder: str
    label: str


class Plan:
    """Where everything is and what is run.

    Args:
        out: Folder of all results.
        data: A user's folder with the four splits; None for procedural tiles.
        settings: See `read_settings`.

    Raises:
        UserError: Something is missing in `data`, or `out` holds other files.
    """

    def __init__(self, out: Path, data: Path | None, settings: dict[str, Any]):
        self.out = out.absolute()
        self.source = data.absolute() if data else None
        self.settings = settings
        self.size: int = OmegaConf.load(CONFIGS / "autoencoder.yaml").vars.size  # pixels
        self.stages = self.out / "stages"
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {out} is a file; give a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.stages.is_dir():
            raise UserError(f"--out {out} holds other files; give a new folder")
        if self.source is not None and self.out.is_relative_to(self.source):
            raise UserError(f"--out {out} lies in --data {data}; give a folder outside it")
        if self.source is None:
            self.labelled = settings["tiles"]["train5"]
            self.identity = ""
        else:
            self.labelled, self.identity = examine(self.source)
        self._choose_amounts()

    def _choose_amounts(self) -> None:
        """Images to sample per class, and the ratio that they allow."""
        sampling = self.settings["sampling"]
        self.ratio: int = self.settings["selection"]["ratio"]
        wanted = (self.labelled * self.ratio + 50) // 100
        self.per_class: int = sampling["per_wanted"] * max(1, wanted)
        if self.per_class > sampling["most_per_class"]:
            self.per_class = sampling["most_per_class"]
            affordable = self.per_class / sampling["per_wanted"]
            self.ratio = max(1, int(100 * affordable / self.labelled))

    # Places

    @property
    def data(self) -> Path:
        """The four splits (links) and the training folders that are made."""
        return self.out / "data"

    @property
    def autoencoder(self) -> RunFolder:
        return RunFolder(self.out / "autoencoder")

    @property
    def diffusion(self) -> RunFolder:
        return RunFolder(self.out / "diffusion")

    @property
    def classifier(self) -> RunFolder:
        return RunFolder(self.out / "classifier")

    @property
    def decoder(self) -> RunFolder:
        return RunFolder(self.out / "decoder")

    @property
    def guided(self) -> Path:
        return self.out / "samples" / "guided"

    @property
    def unguided(self) -> Path:
        return self.out / "samples" / "unguided"

    @property
    def features(self) -> Path:
        return self.out / "features"

    def training_folder(self, kind: str) -> str:
        """Name of a training folder, as eval.py takes it."""
        return REAL if kind == REAL else f"{REAL}+{kind}{self.ratio}%"

    @property
    def arms(self) -> list[Arm]:
        labels = {
            REAL: "real only",
            RANDOM: "real + random synthetic",
            SELECTED: "real + selected synthetic",
        }
        return [Arm(self.training_folder(kind), label) for kind, label in labels.items()]

    def selection(self, kind: str) -> dict[str, Any]:
        """selection.json of a training folder."""
        return read_json(self.data / self.training_folder(kind) / "selection.json")

    def summary(self, kind: str) -> dict[str, Any]:
        """summary.json of an evaluation."""
        return read_json(self.out / "eval" / self.training_folder(kind) / "summary.json")

    # Stages

    def execute(self, runner: Runner) -> None:
        """Run all stages but the report."""
        if self.source is None:
            runner.run(self.tiles_stage())
        self.link_splits()
        runner.run(self.training_stage("autoencoder", "autoencoder on unlabelled tiles", ()))
        runner.run(
            self.training_stage(
                "diffusion", "latent diffusion on unlabelled tiles", ("autoencoder",)
            )
        )
        runner.run(self.classifier_stage())
        runner.run(self.training_stage("decoder", "decoder tuned on few labels", ("autoencoder",)))
        runner.run(self.sampling_stage("unguided", self.unguided))
        runner.run(self.sampling_stage("guided", self.guided))
        runner.run(self.evaluation_stage(REAL, "ViT on real tiles"))
        runner.run(self.features_stage())
        for kind in (RANDOM, SELECTED):
            runner.run(self.selection_stage(kind))
        for kind in (RANDOM, SELECTED):
            runner.run(self.evaluation_stage(kind, f"ViT on real and {kind} tiles"))

    @property
    def count(self) -> int:
        """Number of stages, the report included."""
        return 13 + (self.source is None)

    def _on_tiles(self, *after: str) -> dict[str, Any]:
        """What a stage depends on that reads tiles."""
        if self.source is None:
            return {"after": ("tiles", *after)}
        return {"after": after, "data": self.identity}

    def tiles_stage(self) -> Stage:
        tiles = self.out / "tiles"
        options = arguments({"out": show_path(tiles), "size": self.size, **self.settings["tiles"]})

        def number() -> str:
            counts = self.settings["tiles"]
            total = sum(counts[split] for split in ("train", "val", "test"))
            return f"{total} tiles per class, {counts['train5']} of them labelled for training"

        return Stage(
            "tiles",
            f"procedural H&E tiles of {self.size} px",
            ("scripts/make_tiles.py", *options),
            output=(tiles,),
            number=number,
        )

    def link_splits(self) -> None:
        """OUT/data/SPLIT -> where its tiles are; training folders of other tiles go."""
        source = self.source or self.out / "tiles"
        links = {self.data / split: source / split for split in SPLITS}
        if all(link.is_symlink() and Path(os.readlink(link)) == to for link, to in links.items()):
            return
        if self.data.exists():
            shutil.rmtree(self.data)
        self.data.mkdir(parents=True)
        for link, target in links.items():
            link.symlink_to(target, target_is_directory=True)

    def training_stage(self, name: str, title: str, after: tuple[str, ...]) -> Stage:
        """A run of main.py with configs/demo/NAME.yaml."""
        config, run = CONFIGS / f"{name}.yaml", RunFolder(self.out / name)
        command = ["main.py", "--base", show_path(config), "-t", "--name", name]
        command += ["--logdir", show_path(self.out), *self.settings["overrides"][name]]
        environment = {"HISTO_DATA": show_path(self.data)}
        if after:
            environment["HISTO_AUTOENCODER"] = show_path(self.autoencoder.root)

        def number() -> str:
            values = last_metrics(run)
            if name == "autoencoder":
                return f"PSNR {values['val/psnr']:.1f} dB on val"
            if name == "diffusion":
                return f"loss {values['val/loss_simple_ema']:.3f} on val"
            return f"auxiliary accuracy {values['val/aux_accuracy']:.2f} on val"

        return Stage(
            name,
            title,
            tuple(command),
            **self._on_tiles(*after),
            output=(run.root,),
            files=(config,),
            environment=environment,
            number=number,
        )

    def classifier_stage(self) -> Stage:
        options = {
            "data_dir": show_path(self.data / REAL),
            "val_data_dir": show_path(self.data / "val"),
            "first_stage": show_path(self.diffusion.root),
            "name": "classifier",
            "logdir": show_path(self.out),
            **self.settings["classifier"],
        }

        def number() -> str:
            accuracy = read_json(self.classifier.root / "result.json")["last"]["val/accuracy"]
            return f"accuracy {accuracy:.2f} on val, over all noise levels"

        return Stage(
            "classifier",
            "noisy-latent classifier on few labels",
            ("classifier_train.py", *arguments(options)),
            **self._on_tiles("diffusion"),
            output=(self.classifier.root,),
            number=number,
        )

    def sampling_stage(self, name: str, outdir: Path) -> Stage:
        sampling, guided = self.settings["sampling"], name == "guided"
        options = {
            "resume": show_path(self.diffusion.root),
            "classifier": show_path(self.classifier.root),
            "first_stage": show_path(self.decoder.root),
            "classifier_scale": sampling["scale"] if guided else 0,
            "n_samples": self.per_class if guided else sampling["unguided"],
            "custom_steps": sampling["steps"],
            "eta": sampling["eta"],
            "batch_size": sampling["batch_size"],
            "outdir": show_path(outdir),
        }

        def number() -> str:
            return f"probability of the wanted class {mean_probability(outdir):.2f}"

        return Stage(
            name,
            f"sampling, {'guided to a class' if guided else 'without guidance'}",
            ("sample_diffusion.py", *arguments(options)),
            after=("diffusion", "classifier", "decoder"),
            output=(outdir,),
            number=number,
        )

    def evaluation_stage(self, kind: str, title: str) -> Stage:
        evaluation, folder = self.settings["evaluation"], self.training_folder(kind)
        images = count_images(self.data / folder)
        batch = min(int(evaluation["arguments"]["batch-size"]), images)
        options = {
            "data_path": show_path(self.data),
            "output_dir": folder,
            "logdir": show_path(self.out / "eval"),
            "input-size": self.size,
            "epochs": max(1, round(evaluation["steps"] / (images // batch))),
            **evaluation["arguments"],
        }
        words = [*arguments(options), "--seeds", *map(str, evaluation["seeds"])]

        def number() -> str:
            summary = self.summary(kind)
            accuracy, deviation = summary["mean"]["accuracy"], summary["std"]["accuracy"]
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            return f"accuracy {accuracy:.3f}{spread} on {summary['split']}"

        return Stage(
            f"vit_{kind}" if kind != REAL else "vit_real",
            title,
            ("eval.py", *words),
            **self._on_tiles(*(() if kind == REAL else (f"select_{kind}",))),
            output=(self.out / "eval" / folder,),
            number=number,
        )

    def features_stage(self) -> Stage:
        first_seed = self.settings["evaluation"]["seeds"][0]
        weights = self.out / "eval" / REAL / f"seed{first_seed}"
        options = {
            "real": show_path(self.data / REAL),
            "synthetic": show_path(self.guided),
            "weights": show_path(weights),
            "out": show_path(self.features),
            **self.settings["features"],
        }
        return Stage(
            "features",
            "features, centroids and UMAP",
            ("scripts/vis.py", *arguments(options)),
            **self._on_tiles("guided", "vit_real"),
            output=(self.features,),
            number=lambda: f"{len(read_csv(self.features / 'umap.csv'))} points",
        )

    def selection_stage(self, kind: str) -> Stage:
        out = self.data / self.training_folder(kind)
        options = {
            "real": show_path(self.data / REAL),
            "synthetic": show_path(self.guided),
            "features": show_path(self.features),
            "ratio": self.ratio,
            "out": show_path(out),
        }
        if kind == RANDOM:
            words = [*arguments(options), "--random", "--no-sheets"]
        else:
            words = arguments({**options, "sheets": show_path(self.out / "sheets")})

        def number() -> str:
            counts = self.selection(kind)["counts"].values()
            accepted, wanted = (sum(row[key] for row in counts) for key in ("accepted", "wanted"))
            return f"{accepted} of {wanted} wanted"

        titles = {RANDOM: "control arm, drawn at random", SELECTED: "selection by distance"}
        return Stage(
            f"select_{kind}",
            titles[kind],
            ("scripts/distance.py", *words),
            **self._on_tiles("features"),
            output=(out,),
            number=number,
        )


def examine(source: Path) -> tuple[int, str]:
    """Most labelled tiles of a class in a user's folder, and a digest of names, sizes and times.

    Raises:
        UserError: A split is missing or empty, or classes differ.
    """
    from ldm.data.tiles import TileFolder

    missing = [split for split in SPLITS if not (source / split).is_dir()]
    if missing:
        raise UserError(
            f"--data {source}: no folder {', '.join(missing)}; it must hold"
            " train, train5, val and test, each with class folders"
        )
    labelled = TileFolder(source / REAL, 1, labelled=True, check=False)
    digest = sha256()
    for split in SPLITS:
        classes = labelled.classes if split != "train" else None
        tiles = TileFolder(source / split, 1, split != "train", classes, check=False)
        for path, name in zip(tiles.paths, tiles.relative_paths, strict=True):
            status = path.stat()
            digest.update(f"{split}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    counts = [labelled.labels.count(label) for label in range(len(labelled.classes))]
    return max(counts), digest.hexdigest()


def count_images(folder: Path) -> int:
    """Images in the class folders of a training folder."""
    from ldm.data.images import list_images

    return len(list_images(folder))


def last_metrics(run: RunFolder) -> dict[str, float]:
    """The last value of everything that a run logged."""
    values: dict[str, float] = {}
    for row in run.read_metrics():
        values |= row
    return values


def mean_probability(samples: Path, name: str | None = None) -> float:
    """Mean probability of the wanted class, of all images in a manifest or of one class."""
    rows = read_csv(samples / "manifest.csv")
    return fmean(float(row["prob"]) for row in rows if name in (None, row["class"]))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
