"""Folders of runs and folders that commands make, and what is needed to repeat a run."""

import csv
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import CHECKOUT, is_temporary, remove_leftovers, write_json, write_text

log = logging.getLogger(__name__)

LOGGERS = ("tensorboard", "wandb")  # by name, beside the CSV files that are always written
TIME = "%Y-%m-%dT%H-%M-%S"  # of a start, in names of files and folders
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "albumentations", "timm", "numpy")


@functools.cache  # of the code that runs, which was read when the process began
def git_revision() -> str | None:
    """Commit of this checkout, with "+changes" when files differ; None outside a checkout."""

    def git(*words: str) -> str:
        options = {"cwd": CHECKOUT, "capture_output": True, "text": True}
        return subprocess.run(["git", *words], check=True, timeout=10, **options).stdout.strip()

    if CHECKOUT is None:  # a repository around an installed package would be the user's own
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in PACKAGES},
    }


def hardware() -> dict[str, Any]:
    """Processor, threads and accelerators of this machine."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = found.group(1).strip() if found else processor
    except OSError:
        pass  # not Linux; the platform's own word stays
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def provenance() -> dict[str, Any]:
    """Command, revision and versions of this process, for the record of what it makes."""
    return {"command": sys.argv, "revision": git_revision(), "versions": versions()}


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """What differs between recorded and present settings, in words, a text for each dotted key.

    A key without a value is one that is null, or has one of `defaults`, for records of earlier
    versions.
    """
    before = _flat({**(defaults or {}), **before})
    now = _flat(now)
    return [
        f"{key} {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(dict(settings))).items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


@dataclass(frozen=True)
class MadeFolder:
    """A folder that a command makes from settings, which a JSON file in it records.

    The same command, given again, finds its folder by `exists`: it goes on in it, or leaves it
    alone. A command with other settings, or whose folder holds anything else, is refused. Every
    command that makes a folder asks this class.
    """

    path: Path
    settings: Mapping[str, Any]  # what decides its content; values that JSON can hold
    record: str  # name of the JSON file
    key: str | None = "settings"  # of the settings in the record; None: the record is the settings
    name: str = "out"  # of the setting that names the folder, for errors

    def read(self) -> dict[str, Any] | None:
        """The content of the record; None where no command has begun the folder.

        Raises a UserError where a file is in the way, the folder holds other files, or its
        record is damaged.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"{self.name}={self.path} is a file; give a folder")
        file = self.path / self.record
        try:
            content = json.loads(file.read_text())
            known = content if self.key is None else content[self.key]
        except FileNotFoundError:
            if all(is_temporary(path) for path in self.path.iterdir()):
                return None
            raise UserError(
                f"{self.name}={self.path} exists and was not made by this command (it has no"
                f" {self.record}); give a new folder"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if not isinstance(known, dict):
            raise UserError(
                f"{file} is damaged or was not written by this command; give another {self.name},"
                f" or remove {self.path}"
            )
        return content

    def exists(self) -> bool:
        """Whether the folder has been made, or begun, with the same settings.

        It has not where nothing is in it but unfinished files of a killed process. Other
        settings are a UserError that names all of them; see also `read`.
        """
        content = self.read()
        if content is None:
            return False
        known = content if self.key is None else content[self.key]
        changed = differences(known, self.settings)
        if changed:
            raise UserError(
                f"{self.name}={self.path} was made with other settings ({'; '.join(changed)});"
                " give another folder, or remove it"
            )
        return True

    def begin(self, facts: Mapping[str, Any] | None = None, alone: bool = True) -> None:
        """Make the folder and its record, or keep those that an earlier start left.

        The record, with `facts` beside the settings, comes first, so that the folder of a
        process that is killed later is known. Unfinished files of killed processes are
        removed if no other process can be writing (`alone`).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / self.record).is_file():
            self.write_record(facts)
        if alone:
            remove_leftovers(self.path)

    def write_record(self, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the record with these facts beside the settings; returns its content."""
        assert facts is None or self.key is not None
        settings = dict(self.settings)
        content = settings if self.key is None else {self.key: settings, **(facts or {})}
        write_json(self.path / self.record, content)
        return content


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: checkpoints/, configs/, images/, and logs beside them."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def wandb_id(self) -> Path:
        return self.root / "wandb" / "run_id.txt"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @classmethod
    def find(
        cls, logdir: str, name: str | None, resume: str | None, stem: str, model: dict
    ) -> "tuple[RunFolder, Path | None]":
        """The folder of a run, and the checkpoint to go on from (None for a new run).

        A run is LOGDIR/NAME, which may contain slashes, or LOGDIR/TIME_STEM. A named run
        that exists goes on where it stopped, if its `model` section is the same. A
        UserError says that there is no checkpoint to resume from, that `name` leaves
        `logdir`, or that the model is another.
        """
        from omegaconf import OmegaConf
        from yaml import YAMLError

        if resume:
            return cls.of_resume(resume)
        run = cls(Path(logdir) / (name or f"{time.strftime(TIME)}_{stem}"))
        if Path(logdir).resolve() not in run.root.resolve().parents:
            raise UserError(f"name={name}: must be a folder below logdir={logdir}")
        if not run.last.is_file():
            return run, None
        written = run.configs / "resolved.yaml"
        try:
            known = OmegaConf.to_container(OmegaConf.load(written))["model"]
        except (OSError, ValueError, TypeError, LookupError, YAMLError):
            raise UserError(
                f"{written} is missing or damaged; give another name than {name}"
            ) from None
        if known != model:
            raise UserError(
                f"name={name}: {run.root} holds a run with another model section; give another "
                f"name, or repeat its command ({written} says how it was configured)"
            )
        log.info("%s exists: going on from its last checkpoint", run.root)
        return run, run.last

    @classmethod
    def of_resume(cls, target: str) -> tuple["RunFolder", Path]:
        """The run and the checkpoint that `target` means, a run folder or a checkpoint in one."""
        path = Path(target)
        checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        if not checkpoint.is_file():
            raise UserError(
                f"resume={target}: no checkpoint at {checkpoint}; give a run folder or a .ckpt file"
            )
        if checkpoint.parent.name != "checkpoints":
            raise UserError(
                f"resume={target}: a checkpoint to resume lies in RUN/checkpoints/; this one "
                "does not. A new run starts from its weights with init_from (classifier_train.py) "
                "or model.params.ckpt_path (main.py)"
            )
        return cls(checkpoint.parent.parent), checkpoint

    def read_metrics(self) -> list[dict[str, float]]:
        """What was logged over all starts of the run, one row (name to value) for each step.

        A start that goes on from a checkpoint repeats the steps after it, and its numbers count.
        """
        starts = sorted(
            self.root.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:])
        )
        rows: dict[float, dict[str, float]] = {}  # by step
        for path in starts:
            # A process that was killed may have left a part of a line at the end.
            lines = path.read_text().splitlines(keepends=True)
            read = list(csv.DictReader(line for line in lines if line.endswith("\n")))
            first = min((float(row["step"]) for row in read), default=math.inf)
            rows = {step: row for step, row in rows.items() if step <= first}
            for row in read:
                values = {name: float(value) for name, value in row.items() if value}
                rows.setdefault(values["step"], {}).update(values)
        return [rows[step] for step in sorted(rows)]

    def record(self, config: dict, seed: int) -> None:
        """Write the resolved configuration, command, versions, revision and hardware of a start."""
        from omegaconf import OmegaConf

        stamp = time.strftime(TIME)
        write_text(self.configs / "resolved.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        facts = {"started": stamp, "seed": seed, **provenance(), "hardware": hardware()}
        write_json(self.configs / f"start_{stamp}.json", facts)
