"""A run's folder and provenance: where files go, and what is needed to repeat the run."""

import csv
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

log = logging.getLogger(__name__)

LOGGERS = ("tensorboard", "wandb")  # by name, beside the CSV files that are always written
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "albumentations", "timm", "numpy")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def git_revision() -> str | None:
    """Commit of this checkout, with "+changes" when files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() + ("+changes" if status.stdout.strip() else "")


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
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


@dataclass(frozen=True)
class RunFolder:
    """Where one run writes: checkpoints/, configs/, images/, logs beside them."""

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
    def images(self) -> Path:
        return self.root / "images"

    @classmethod
    def choose(cls, logdir: str, name: str | None, stem: str) -> "RunFolder":
        """LOGDIR/NAME, or LOGDIR/TIME_STEM when the run has no name.

        Args:
            name: May contain slashes; must stay below `logdir`.
            stem: Name of the configuration, for an unnamed run.

        Raises:
            UserError: `name` leaves `logdir`.
        """
        label = name or f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{stem}"
        root = Path(logdir) / label
        if Path(logdir).resolve() not in root.resolve().parents:
            raise UserError(f"--name {name}: must be a folder below --logdir {logdir}")
        return cls(root)

    @classmethod
    def find(
        cls, logdir: str, name: str | None, resume: str | None, stem: str, model: dict
    ) -> "tuple[RunFolder, Path | None]":
        """The folder of a run, and the checkpoint to go on from (None for a new run).

        A named run that exists goes on where it stopped, if its `model` section is the same.

        Raises:
            UserError: There is nothing to resume, or another model under this name.
        """
        from omegaconf import OmegaConf

        if resume:
            return cls.of_resume(resume)
        run = cls.choose(logdir, name, stem)
        if not run.last.is_file():
            return run, None
        written = run.configs / "resolved.yaml"
        if OmegaConf.to_container(OmegaConf.load(written))["model"] != model:
            raise UserError(
                f"--name {name}: {run.root} holds a run with another model section; give another "
                f"name, or repeat its command ({written} says how it was configured)"
            )
        log.info("%s exists: going on from its last checkpoint", run.root)
        return run, run.last

    @classmethod
    def of_resume(cls, target: str) -> tuple["RunFolder", Path]:
        """The run and the checkpoint that `--resume TARGET` means."""
        path = Path(target)
        checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        if not checkpoint.is_file():
            raise UserError(
                f"--resume {target}: no checkpoint at {checkpoint}; give a run folder or a .ckpt "
                "file"
            )
        if checkpoint.parent.name != "checkpoints":
            raise UserError(
                f"--resume {target}: a checkpoint to resume lies in RUN/checkpoints/; this one "
                "does not"
            )
        return cls(checkpoint.parent.parent), checkpoint

    def read_metrics(self) -> list[dict[str, float]]:
        """What was logged over all starts of the run: name to value, per logged step."""
        starts = sorted(
            self.root.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:])
        )
        rows = []
        for path in starts:
            with path.open(newline="") as file:
                rows += [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        return rows

    def record(self, config: dict, seed: int) -> None:
        """Write the resolved configuration, command, versions, revision and hardware of a start."""
        from omegaconf import OmegaConf

        stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
        write_text(self.configs / "resolved.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        facts = {
            "started": stamp,
            "command": sys.argv,
            "seed": seed,
            "revision": git_revision(),
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(self.configs / f"start_{stamp}.json", facts)
