"""Disturbs commands at random moments, and compares what they make with undisturbed runs.

    python tests/kills.py --kills 20 [COMMAND ...]
    python tests/kills.py --fills 5 [COMMAND ...]

prints a table, a row per command. With `--kills`, a command is killed (kill -9) so often, started
again each time, and once more to its end. With `--fills`, its disk, a small tmpfs, is filled up
under way: it must end with one line and status 2, and the same command goes on once there is room.

Every start is a fork of one process that has imported everything, so that it costs seconds; what is
killed is a process like any other.
"""

import argparse
import csv
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import pytorch_lightning as pl  # noqa: E402, F401  imported once, for all forks
import tiny  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from ldm import synthesis  # noqa: E402, F401
from ldm.checkpoint import write_checkpoint  # noqa: E402
from ldm.cli import run_command  # noqa: E402
from ldm.evaluation import runs  # noqa: E402
from ldm.files import file_sha256, is_temporary  # noqa: E402
from ldm.models.vit import TileClassifier  # noqa: E402
from ldm.run import RunFolder  # noqa: E402

UMASK = 0o027
SKIPPED_STATUS = 77
LATEST = 0.97  # share of the time of an undisturbed run at which it is disturbed at the latest
# What two runs of a command differ in: times, speeds, the history of starts.
VOLATILE = {"command", "started", "seconds", "made", "images_per_second", "images_per_s"}
VOLATILE |= {"last_start", "hardware", "modified", "train_seconds"}
VOLATILE |= {"current_score"}  # of the last save; Lightning does not restore it, and only shows it
SKIPPED = ("tensorboard/*", "metrics/*/*", "configs/start_*", ".parts/*", "README.md")


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        module: Its module, such as `eval` or `scripts.vis`.
        words: Its arguments; {site} is the folder of the inputs, {out} that of what it makes.
        skipped: Patterns of files that are not compared.
    """

    module: str
    words: str
    skipped: tuple[str, ...] = ()

    def arguments(self, site: Path, out: Path) -> list[str]:
        return [word.format(site=site, out=out) for word in self.words.split()]


TRAIN = "-t --logdir {out} --name run --precision 32 --max_steps 6"
TRAIN += " lightning.modelcheckpoint.params.every_n_train_steps=1"
VIT = "--arch test_vit --patch_size 16 --input-size 32 --epochs 3 --device cpu --num_workers 0"
VIT += " --lr 0.05"
PIXELS = "--batch_size 4 --device cpu"
COMMANDS = {
    "autoencoder (GAN, accumulation)": Command("main", f"--base {{site}}/autoencoder.yaml {TRAIN}"),
    "diffusion (EMA, accumulation)": Command("main", f"--base {{site}}/diffusion.yaml {TRAIN}"),
    "classifier": Command(
        "classifier_train",
        "--data_dir {site}/D/train --val_data_dir {site}/D/val --batch_size 6 --logdir {out}"
        " --first_stage {site}/diffusion.ckpt --name run --num_workers 0 --classifier_width 32"
        " --classifier_depth 1 --classifier_channel_mult 1,1 --lr 1e-3 --eval_interval 2"
        " --save_interval 2 --iterations 6 --precision 32",
    ),
    "cache_latents": Command(
        "scripts.cache_latents",
        "--model {site}/autoencoder.ckpt --data {site}/D/train --labelled --out {out}/cache"
        " --views 4 --augment d4 --shard_tiles 2 --val_fraction 0.2 --workers 0"
        " --batch_size 4 --device cpu",
    ),
    "index_corpus": Command(
        "scripts.index_corpus", "{site}/D/train --out {out}/index.parquet --workers 2"
    ),
    "write_shards": Command(
        "scripts.write_shards", "{site}/index.parquet --out {out}/shards --size 20K --workers 2"
    ),
    "make_subset": Command(
        "scripts.make_subset", "--data {site}/D/train --per_class 8 --out {out}/subset"
    ),
    "sample_diffusion": Command(
        "sample_diffusion",
        "-r {site}/diffusion.ckpt --classifier {site}/classifier.ckpt --out {out}/samples -n 4"
        f" -c 4 --tar 5 {PIXELS}",
        skipped=("guidance.csv",),  # what a killed batch measured is lost with it
    ),
    "vis (features)": Command(
        "scripts.vis",
        "--real {site}/D/train --synthetic {site}/fake --weights {site}/vit.ckpt --out {out}/vis"
        f" --workers 0 {PIXELS}",
    ),
    "distance (selection)": Command(
        "scripts.distance",
        "--real {site}/D/train --synthetic {site}/fake --features {site}/vit.ckpt --ratio 50"
        f" --out {{out}}/selected --cache {{out}}/features --workers 0 {PIXELS}",
    ),
    "eval": Command(
        "eval",
        f"{VIT} --lr 0.05 --data_path {{site}}/D --subset train --logdir {{out}} --seeds 0 1",
    ),
    "reproduce_table": Command(
        "scripts.reproduce_table",
        "--config {site}/table.yaml out={out} --only colour_mean ceiling-100",
        skipped=("jobs/*.log", "jobs/run.lock", "jobs/plan.json", ".snakemake/*/*"),
    ),
}


def prepare(site: Path) -> None:
    """Make what the commands read."""
    counts = {"D/train": 12, "D/val": 4, "D/test": 4, "fake": 8, "D/train5": 3}
    for seed, (name, count) in enumerate(counts.items()):
        tiny.tiles(site / name, count, seed)
    tiny.models(site)
    torch.manual_seed(0)
    net = TileClassifier("test_vit", 3, tiny.PIXELS, patch_size=16)
    net.classes = tiny.CLASSES
    write_checkpoint(site / "vit.ckpt", tiny.vit_checkpoint(net))
    from test_main import autoencoder_model, diffusion_model, write_config

    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    kinds = {
        "autoencoder": autoencoder_model(disc_start=4),
        "diffusion": diffusion_model(site / "autoencoder.ckpt"),
    }
    for name, model in kinds.items():
        path = write_config(site / f"{name}.yaml", site / "D/train", model, **trainer)
        config = yaml.safe_load(path.read_text())
        params = {"batch_frequency": 4, "max_images": 2}
        pictures = {"target": "ldm.models.callbacks.ImageLogger", "params": params}
        config["lightning"]["callbacks"] = {"pictures": pictures}
        path.write_text(yaml.safe_dump(config))
    from test_reproduce_table import SMALL

    from scripts import index_corpus

    table = {**SMALL, "data": {"root": f"{site}/D"}}
    files = {"pretrained": "diffusion", "guide": "classifier", "tuned": "autoencoder"}
    table["models"] = {name: {"run": f"{site}/{file}.ckpt"} for name, file in files.items()}
    table["evaluation"] = {**SMALL["evaluation"], "seeds": [0]}
    table["baselines"] = {"kinds": ["colour_mean"], "ceiling": {"ratios": [100]}}
    (site / "table.yaml").write_text(yaml.safe_dump(table))
    index_corpus.main([str(site / "D/train"), "--out", str(site / "index.parquet")])


# --- What a folder holds -------------------------------------------------------------------------


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as pairs of dotted key and value, without what is volatile."""
    if isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in pairs:
            if key not in VOLATILE:
                yield from flat(part, f"{name}.{key}")
    elif isinstance(value, torch.Tensor):
        yield name, (str(value.dtype), value.tolist())
    else:
        yield name, value


def content(path: Path) -> Any:
    """What a file says, without times and speeds."""
    if path.suffix == ".ckpt":
        return dict(flat(torch.load(path, weights_only=True)))
    if path.suffix == ".json":
        return dict(flat(json.loads(path.read_text())))
    if path.suffix == ".parquet":
        return dict(flat(pq.read_table(path).to_pydict()))
    if path.suffix == ".csv":
        return dict(flat(list(csv.DictReader(path.read_text().splitlines()))))
    if path.suffix == ".safetensors":
        return dict(flat(load_file(path)))
    if path.suffix == ".html":  # but for the time and the share of each job, and their order
        text = re.sub(r" *\b[\d.,]+( s| min| h|%</td>)", "", path.read_text())
        return dict(Counter(line.strip() for line in re.split(r"\n|</?pre>", text)))
    return file_sha256(path)


def facts(out: Path, skipped: tuple[str, ...]) -> dict[str, Any]:
    """What every file below a folder says, by its path."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    left_out = [pattern for pattern in (*SKIPPED, *skipped)]
    found = {
        str(path.relative_to(out)): content(path)
        for path in files
        if not any(path.match(pattern) for pattern in left_out)
    }
    for path in out.rglob("metrics"):  # of a training, over all its starts
        name, rows = str(path.relative_to(out)), RunFolder(path.parent).read_metrics()
        found[name] = dict(flat(sorted(rows, key=lambda row: (row["step"], sorted(row)))))
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In which files, and in which of their values, two folders differ."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name), theirs.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            found.append(f"{name}: {len(keys)} of {len(other)} values, such as {sorted(keys)[:3]}")
        else:
            found.append(
                f"{name}: {'missing' if one is None else 'more' if other is None else '!='}"
            )
    return found


# --- Running and disturbing ----------------------------------------------------------------------

Disturb = Callable[[int], None]  # takes the number of the process


def kill(pid: int) -> None:
    """End a process with its group, and half of the time with all below it, as a power cut does.

    What is left of the other half, processes with sessions of their own, has to notice.
    """
    below = psutil.Process(pid).children(recursive=True) if random.random() < 0.5 else []
    with suppress(ProcessLookupError):  # it has no group of its own yet
        os.killpg(pid, signal.SIGKILL)
    for number in (pid, *(process.pid for process in below)):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def in_fork(work: Callable[[], None], log: Path, moment: float = 0, disturb: Disturb = kill) -> int:
    """Run something in a process of its own, and disturb it once.

    Args:
        log: File that its output is added to.
        moment: Seconds after which it is disturbed, if it still runs; 0 for never.

    Returns:
        Its exit status; minus the number of the signal that ended it.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.umask(UMASK)
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if moment:
        end = time.monotonic() + moment
        while time.monotonic() < end:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        disturb(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass
class Trial:
    """A command that is disturbed.

    Attributes:
        name: Of `COMMANDS`.
        site: What the command reads.
        out: The folder that it makes.
        log: What it says, over all starts.
        expected: What an undisturbed run makes.
        seconds: How long that takes.
        count: How often the command has been disturbed.
        problems: What went wrong.
    """

    name: str
    site: Path
    out: Path
    log: Path
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]

    def start(self, moment: float = 0, disturb: Disturb = kill) -> int:
        """Start the command as `in_fork` does."""
        words, modules = self.command.arguments(self.site, self.out), self.log.with_name("modules")

        def work() -> None:
            runs.SAVE_SECONDS = 0.05  # a minute is longer than these runs take
            sys.argv = [f"{self.command.module.replace('.', '/')}.py", *words]
            module = importlib.import_module(self.command.module)
            try:
                run_command(lambda: module.main(words))
            finally:
                if not moment:
                    modules.write_text("\n".join(sys.modules))

        return in_fork(work, self.log, moment, disturb)

    def measure(self) -> bool:
        """Run it undisturbed; whether that worked."""
        began = time.monotonic()
        status = self.start()
        if status:
            self.problems.append(f"undisturbed: status {status}")
            return False
        self.seconds = time.monotonic() - began
        self.expected = facts(self.out, self.command.skipped)
        shutil.rmtree(self.out)
        # What it has imported is imported here, so that its further starts need not.
        for name in self.log.with_name("modules").read_text().split():
            if name != "__main__":
                with suppress(Exception):
                    importlib.import_module(name)
        return True

    def disturb_often(self, count: int, seed: int, disturb: Disturb, statuses: set[int]) -> None:
        """Disturb it `count` times at random moments, let it end, and compare.

        Args:
            statuses: With which it may end when it is disturbed.
        """
        rng = random.Random(f"{seed} {self.name}")
        while self.count < count and not self.problems:
            moment = rng.uniform(0.002, LATEST * self.seconds)
            began = time.monotonic()
            status = self.start(moment, disturb)
            if status == 0:  # it was through before: begin anew
                self.seconds = min(self.seconds, time.monotonic() - began)
                self.compare()
                shutil.rmtree(self.out)
            elif status in statuses:
                self.count += 1
            else:
                self.problems.append(f"start after {self.count} times: status {status}")
        if not self.problems:
            status = self.start()
            self.problems += [f"last start: status {status}"] if status else []
            self.compare()

    def compare(self) -> None:
        """Note what is wrong with the folder of a command that has ended."""
        found = differences(facts(self.out, self.command.skipped), self.expected)
        everything = [self.out, *self.out.rglob("*")]
        left = [path for path in (*everything, *self.out.parent.iterdir()) if is_temporary(path)]
        found += [f"left over: {path.name}" for path in left]
        found += [
            f"{path.relative_to(self.out)} is more open than the umask allows"
            for path in everything
            if not path.is_symlink() and path.stat().st_mode & UMASK
        ]
        self.problems += [f"after {self.count} times: {text}" for text in found]


def try_kills(trial: Trial, count: int, seed: int) -> None:
    """Kill a command `count` times."""
    if trial.measure():
        trial.disturb_often(count, seed, kill, {-signal.SIGKILL})


def try_fills(trial: Trial, count: int, seed: int) -> None:
    """Fill the disk of a command `count` times while it runs, and make room again."""
    disk = trial.out.parent
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"no file system can be mounted here: {done.stderr.strip()}", file=sys.stderr)
        sys.exit(SKIPPED_STATUS)
    filler = disk / "filler"

    def fill(pid: int) -> None:
        left = random.choice((0, 65536))  # bytes: a record has room, a checkpoint has none
        with filler.open("wb") as stream, suppress(OSError):
            while (free := shutil.disk_usage(disk).free - left) > 0:
                os.posix_fallocate(stream.fileno(), stream.seek(0, os.SEEK_END), free)
                stream.seek(0, os.SEEK_END)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        filler.unlink()

    try:
        if trial.measure():
            trial.disturb_often(count, seed, fill, {2})
        said = trial.log.read_text()
        if said.count(": error: ") != trial.count or "Traceback" in said:
            trial.problems.append(f"not one line for each of {trial.count} full disks")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commands", nargs="*", help="some of them, by the start of their names")
    parser.add_argument("--kills", type=int, help="how often each is killed")
    parser.add_argument("--fills", type=int, help="how often the disk of each is filled")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", help="new folder to work in, which stays")
    args = parser.parse_args()
    torch.set_num_threads(1)
    attempt, count = (try_fills, args.fills) if args.fills else (try_kills, args.kills or 20)
    names = [n for n in COMMANDS if not args.commands or n.startswith(tuple(args.commands))]
    bad = False
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        site, log = Path(folder, "site"), Path(folder, "log.txt")
        site.mkdir(parents=True)
        if in_fork(lambda: prepare(site), log):
            print(log.read_text())
            return 1
        for name in names:
            work = Path(folder, name.split()[0])
            (work / "disk").mkdir(parents=True)
            trial = Trial(name, site, work / "disk" / "out", work / "log.txt")
            attempt(trial, count, args.seed)
            bad |= bool(trial.problems)
            result = "; ".join(trial.problems) or "equal"
            print(f"| {name} | {trial.seconds:.1f} | {trial.count} | {result} |", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
