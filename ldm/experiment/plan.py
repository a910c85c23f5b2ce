"""From the settings of an experiment to its rows and jobs: commands, and what each depends on."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ldm.checkpoint import checkpoint_path
from ldm.cli import existing_path, nearest
from ldm.errors import UserError
from ldm.experiment.inputs import Checkpoints, Split
from ldm.experiment.jobs import ROOT, Job, arguments, needed_by, show_path
from ldm.experiment.settings import Cells, Generator, Model, Settings, as_list

REAL = "real"  # key of the row without synthetic tiles
TILES = "tiles"  # job that makes procedural ones
VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
DATA_VARIABLE = "HISTO_DATA"


@dataclass
class Arm:
    """One row, as it is planned.

    Attributes:
        folders: Training folder (below OUT/data) of each seed.
        jobs: The job of each seed that trains and evaluates; baselines of colours have seed 0 only.
        other_jobs: Further jobs whose results stand in the row.
        wanted: Synthetic tiles, all classes together.
    """

    key: str
    label: str
    kind: str
    factors: dict[str, str | int] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
    jobs: dict[int, str] = field(default_factory=dict)
    other_jobs: list[str] = field(default_factory=list)
    wanted: int | None = None
    generator: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a job uses: the jobs before it, and digests of tiles and checkpoints from elsewhere."""

    after: tuple[str, ...] = ()
    data: str = ""

    def __add__(self, other: Needs) -> Needs:
        return Needs(tuple(dict.fromkeys(self.after + other.after)), self.data + other.data)


NOTHING = Needs()


class Plan:
    """Rows and jobs of an experiment.

    Attributes:
        rows: In the order of the table.
        other_jobs: Names of the jobs that no row needs.

    Raises:
        UserError: Tiles, checkpoints or options that are missing or wrong.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.out = Path(settings.out).expanduser().absolute()
        self.root = Path(settings.data.root).expanduser().absolute()
        self.jobs_folder = self.out / "jobs"
        self.checkpoints = Checkpoints(self.jobs_folder / "checkpoints.digests")
        self.rows: list[Arm] = []
        self.other_jobs: list[str] = []
        self._jobs: dict[str, Job] = {}
        names = (settings.data.unlabelled, settings.data.labelled, "val", "test")
        self._splits = {name: Split(self.root / name) for name in names}
        self._check_out()
        self._check_inputs()
        self._plan()

    @property
    def jobs(self) -> list[Job]:
        """All jobs, each after those that it needs."""
        return list(self._jobs.values())

    # Places

    @property
    def data(self) -> Path:
        """Links to the tiles, and the training folders that are made."""
        return self.out / "data"

    def samples(self, generator: str) -> Path:
        return self.out / "samples" / generator

    def features(self, generator: str) -> Path:
        return self.out / "features" / generator

    def copies(self, generator: str) -> Path:
        return self.out / "copies" / generator

    def results(self, row: str) -> Path:
        return self.out / "eval" / row

    def fidelity(self, row: str) -> Path:
        return self.out / "fidelity" / f"{row}.json"

    def model(self, name: str) -> Path:
        """The checkpoint of a model, whether or not it is trained yet."""
        model = self.settings.models[name]
        if model.run is not None:
            return Path(model.run).expanduser().absolute()
        return self.out / "models" / name / "checkpoints" / f"{model.checkpoint}.ckpt"

    def select_rows(self, patterns: Sequence[str]) -> list[Arm]:
        """The rows whose key fits a pattern such as `*-centroid-100`; all without patterns.

        Raises:
            UserError: A pattern fits none.
        """
        if not patterns:
            return self.rows
        keys = [row.key for row in self.rows]
        for pattern in patterns:
            if not fnmatch.filter(keys, pattern):
                raise UserError(f"`only` {pattern}: fits no row{nearest(pattern, keys)}")
        return [row for row in self.rows if any(fnmatch.fnmatch(row.key, p) for p in patterns)]

    def jobs_of(self, rows: Sequence[Arm]) -> list[Job]:
        """The jobs that these rows need; of all rows, those that none needs, too."""
        names = [name for row in rows for name in (*row.jobs.values(), *row.other_jobs)]
        names += self.other_jobs if len(rows) == len(self.rows) else []
        return needed_by(self.jobs, names)

    def prepare(self) -> None:
        """Make the folder of the jobs, and links to the tiles: OUT/data/SPLIT."""
        self.jobs_folder.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(parents=True, exist_ok=True)
        for name, split in self._splits.items():
            link, target = self.data / name, split.root
            if link.is_symlink() and Path(os.readlink(link)) == target:
                continue
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)

    # What is there

    def _check_out(self) -> None:
        """Check that the folder of the results is ours and holds no tiles of the user."""
        out = self.out
        if out.exists() and not out.is_dir():
            raise UserError(f"out {out} is a file; give a folder")
        ours = self.jobs_folder, out / "stages"  # the second one of a demo by version 0.1.0
        if out.is_dir() and any(out.iterdir()) and not any(path.is_dir() for path in ours):
            raise UserError(f"out {out} holds other files; give a new folder for the results")
        if self.settings.data.tiles is None and (out == self.root or self.root in out.parents):
            raise UserError(f"out {out} lies in data.root {self.root}; give a folder outside")

    def _check_inputs(self) -> None:
        """Check that everything from elsewhere is there.

        Raises:
            UserError: Something is missing; all that is missing, in one line.
        """
        settings, data = self.settings, self.settings.data
        checks: list[tuple] = [(self._check_tiles,)]  # a function and its arguments
        if data.groups is not None:
            checks.append((existing_path, data.groups, "data.groups", "file"))
        for name, model in settings.models.items():
            if model.run is not None:
                checks.append((checkpoint_path, self.model(name), f"models.{name}.run"))
            for path in as_list(model.config) if model.config is not None else ():
                checks.append((self._config_file, path, name))
        if settings.judge.run is not None:
            checks.append((existing_path, settings.judge.run, "judge.run"))
        problems = []
        for check, *values in checks:
            try:
                check(*values)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def _check_tiles(self) -> None:
        data = self.settings.data
        if data.tiles is None:
            existing_path(self.root, "data.root", "dir")
            for name, split in self._splits.items():
                existing_path(split.root, f"data.root: its folder {name}", "dir")
            self._check_classes()
        elif self.out not in self.root.parents:
            # They are removed when they have to be made anew.
            raise UserError(
                f"data.root {self.root} must lie in out {self.out} when data.tiles makes it; leave"
                " data.tiles out to use tiles of your own"
            )

    def _check_classes(self) -> None:
        """Check that the labelled splits have the same classes, and no split is empty."""
        data, splits = self.settings.data, self._splits
        if splits[data.unlabelled].is_empty:
            raise UserError(f"{splits[data.unlabelled].root} has no tiles; add some")
        known = splits[data.labelled].counts
        for split in (splits["val"], splits["test"]):
            if list(split.counts) != list(known):
                differ = ", ".join(sorted(set(split.counts) ^ set(known)))
                raise UserError(
                    f"{split.root} has other classes than {data.labelled} ({differ}); the names"
                    " of their class folders must be equal"
                )

    def _tiles(self, *splits: str) -> Needs:
        """What a job needs that reads these splits."""
        if self.settings.data.tiles is not None:
            return Needs((TILES,))
        return Needs(data=json.dumps({name: self._splits[name].identity for name in splits}))

    def _folder(self, name: str, key: str) -> tuple[Path, Needs]:
        """A split by its name, or a folder from elsewhere, and what a job needs that reads it."""
        if name in self._splits:
            return self.data / name, self._tiles(name)
        path = existing_path(name, key, "dir").absolute()
        return path, Needs(data=Split(path).identity)

    def _class_counts(self) -> dict[str, int]:
        """Labelled tiles by class; of procedural ones, which may not be there yet, as many."""
        tiles = self.settings.data.tiles
        if tiles is None:
            return self._splits[self.settings.data.labelled].counts
        from ldm.data.procedural import CLASSES

        return dict.fromkeys(tiles.get("classes") or CLASSES, int(tiles.get("train5", 6)))

    def _wanted(self, ratio: int) -> dict[str, int]:
        """Synthetic tiles of a ratio, by class, rounded as scripts/distance.py does."""
        return {name: (count * ratio + 50) // 100 for name, count in self._class_counts().items()}

    # Jobs

    def _add(
        self,
        name: str,
        title: str,
        script: str,
        options: dict[str, Any],
        output: tuple[Path, ...],
        needs: Needs,
        words: Sequence[str] = (),
        **more: Any,
    ) -> str:
        """Add a job, unless one of that name is there; returns the name.

        Args:
            words: Arguments after the options.
            more: Further attributes of `Job`.
        """
        if name not in self._jobs:
            command = (script, *arguments(options), *words)
            self._jobs[name] = Job(
                name, title, command, needs.after, output, data=needs.data, **more
            )
        return name

    def _plan(self) -> None:
        settings = self.settings
        if settings.data.tiles is not None:
            options = {"out": self.root, **settings.data.tiles}
            self._add(TILES, "procedural tiles", "scripts/make_tiles.py", options, (self.root,),
                      NOTHING, gpus=0, kind="tiles")  # fmt: skip
        baselines = [self._baseline(kind) for kind in settings.baselines.kinds]
        real = self._real_arm(None)
        networks = [self._real_arm(name) for name in settings.baselines.networks]
        synthetic = self._synthetic_arms()
        ceiling = settings.baselines.ceiling
        ceilings = [self._ceiling_arm(ratio) for ratio in (ceiling.ratios if ceiling else ())]
        self.rows = [*baselines, real, *networks, *synthetic, *ceilings]
        keys = [row.key for row in self.rows]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f"two rows are named {', '.join(twice)}; rename one of their parts")

    def _models(self, *names: str) -> Needs:
        """What a job needs that uses these models: those trained here, digests of the others."""
        after, digests = [], {}
        for name in names:
            model = self.settings.models[name]
            if model.run is None:
                after.append(self._training(name, model))
            else:
                path = checkpoint_path(self.model(name), f"models.{name}.run")
                digests[name] = self.checkpoints.digest(path)
        return Needs(tuple(after), json.dumps(digests) if digests else "")

    def _training(self, name: str, model: Model) -> str:
        data = self.settings.data
        given = {key: self.model(other) for key, other in model.needs.items()}
        common = {"name": name, "logdir": self.out / "models"}
        if model.config is not None:
            script, splits = "main.py", (data.unlabelled, data.labelled, "val")
            files = tuple(self._config_file(path, name) for path in as_list(model.config))
            options = {"base": files, "t": True, **common, **model.arguments}
            environment = {DATA_VARIABLE: show_path(self.data), **model.env}
            environment |= {key: show_path(path) for key, path in given.items()}
            for file in files:
                for variable in VARIABLE.findall(file.read_text()):
                    if variable in os.environ:  # its value decides the result, too
                        environment.setdefault(variable, os.environ[variable])
        else:
            script, splits, files = "classifier_train.py", (data.labelled, "val"), ()
            options = {"data_dir": self.data / data.labelled, "val_data_dir": self.data / "val"}
            options |= {**given, **common, **(model.classifier or {})}
            environment = dict(model.env)
        return self._add(
            f"train-{name}",
            model.label or f"training of {name}",
            script,
            options,
            (self.out / "models" / name,),
            self._tiles(*splits) + self._models(*model.needs.values()),
            model.overrides,
            files=files,
            environment=environment,
            kind="train",
            gpus=model.gpus,
        )

    def _config_file(self, path: Any, name: str) -> Path:
        for file in (ROOT / str(path), Path(str(path)).absolute()):
            if file.is_file():
                return file
        raise UserError(f"models.{name}.config: no file {path}; check the path")

    def _sampling(self, name: str, largest: int) -> str:
        """The job that makes the pool of a generator, for its largest ratio."""
        generator, sampling = self.settings.generators[name], self.settings.sampling
        wanted = self._wanted(largest)
        amounts = {c: math.ceil(max(1, n) * sampling.per_wanted) for c, n in wanted.items()}
        if generator.amount is not None:
            amounts = dict.fromkeys(wanted, generator.amount)
        if len(set(amounts.values())) == 1:
            amount: dict[str, Any] = {"n_samples": next(iter(amounts.values()))}
        else:
            amount = {"counts": ",".join(f"{c}={n}" for c, n in amounts.items())}
        options = {
            "resume": self.model(generator.diffusion),
            "classifier": generator.classifier and self.model(generator.classifier),
            "first_stage": generator.decoder and self.model(generator.decoder),
            **amount,
            "outdir": self.samples(name),
            **sampling.options,
            **generator.sampling,
        }
        models = filter(None, (generator.diffusion, generator.classifier, generator.decoder))
        title, output = f"sampling by {generator.label or name}", (self.samples(name),)
        return self._add(f"sample-{name}", title, "sample_diffusion.py", options, output,
                         self._models(*models), kind="sample", gpus=sampling.gpus)  # fmt: skip

    def _judge(self) -> tuple[dict[str, Any], Needs]:
        """The judge as an option (`weights` or `model`), and what a job needs that uses it."""
        judge = self.settings.judge
        if judge.run is not None:
            path = existing_path(judge.run, "judge.run").absolute()
            file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
            existing_path(file, "judge.run", "file")
            return {"weights": path}, Needs(data=self.checkpoints.digest(file))
        if judge.model is not None:
            return {"model": judge.model}, NOTHING
        seed = self.settings.evaluation.seeds[0] if judge.seed is None else judge.seed
        labelled = self.settings.data.labelled
        key, label, overrides = self._network(judge.network)
        job = self._evaluation(key, label, labelled, seed, overrides)
        return {"weights": self.results(key) / labelled / f"seed{seed}"}, Needs((job,))

    def _features(self, name: str, sample_job: str) -> str:
        """The job that makes the features of a generator's pool, by which its tiles are chosen."""
        labelled = self.settings.data.labelled
        judge, needs = self._judge()
        options = {
            "real": self.data / labelled,
            "synthetic": self.samples(name),
            "out": self.features(name),
            **judge,
            **self.settings.judge.options,
        }
        needs = self._tiles(labelled) + Needs((sample_job,)) + needs
        title, output = f"features and UMAP of {name}", (self.features(name),)
        return self._add(f"features-{name}", title, "scripts/vis.py", options, output, needs,
                         kind="features")  # fmt: skip

    def _selection(self, arm: Arm, folder: str, selection: str, ratio: int, seed: int) -> Needs:
        """What a job needs that uses the training folder of an arm; adds the job that makes it."""
        labelled, strategy = self.settings.data.labelled, self.settings.selection[selection]
        options: dict[str, Any] = {
            "real": self.data / labelled,
            "synthetic": self.samples(arm.generator),
            "features": self.features(arm.generator),
            "ratio": ratio,
            "strategy": strategy.strategy,
            "link": self.settings.link,
            "out": self.data / folder,
        }
        output = [self.data / folder]
        if strategy.strategy == "random":
            options["seed"] = seed
        if strategy.sheets and strategy.strategy != "random":
            output.append(self.out / "sheets" / arm.key)
            options["sheets"] = output[-1]
        else:
            options["no-sheets"] = True
        needs = self._tiles(labelled) + Needs((f"features-{arm.generator}",))
        title, options = f"selection of {folder}", {**options, **strategy.options}
        job = self._add(f"select-{folder}", title, "scripts/distance.py", options, tuple(output),
                        needs, kind="select", gpus=0)  # fmt: skip
        return Needs((job,))

    def _evaluation(
        self,
        key: str,
        label: str,
        folder: str,
        seed: int,
        overrides: dict[str, Any],
        needs: Needs = NOTHING,
    ) -> str:
        evaluation, data = self.settings.evaluation, self.settings.data
        options = {
            "data_path": self.data,
            "output_dir": folder,
            "logdir": self.results(key),
            **evaluation.arguments,
            **overrides,
        }
        return self._add(
            f"eval-{key}-seed{seed}",
            f"ViT on {label}, seed {seed}",
            "eval.py",
            options,
            (self.results(key) / folder / f"seed{seed}",),
            self._tiles(data.labelled, "val", "test") + needs,
            ("--seed", str(seed)),
            kind="eval",
            gpus=evaluation.gpus,
        )

    # Rows

    def _add_seeds(
        self,
        arm: Arm,
        folder: str,
        needs: Needs = NOTHING,
        seeds: Sequence[int] = (),
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Add a network for each seed (of the evaluation, if omitted), trained on a folder."""
        for seed in seeds or self.settings.evaluation.seeds:
            arm.folders[seed] = folder
            arm.jobs[seed] = self._evaluation(
                arm.key, arm.label, folder, seed, overrides or {}, needs
            )

    def _baseline(self, kind: str) -> Arm:
        data, results = self.settings.data, self.results(kind)
        arm = Arm(kind, kind.replace("_", " "), "baseline", folders={0: data.labelled})
        options = {
            "data_path": self.data,
            "output_dir": data.labelled,
            "kind": kind,
            "logdir": results.parent,
            **self.settings.baselines.options.get(kind, {}),
        }
        needs = self._tiles(data.labelled, "val", "test")
        arm.jobs[0] = self._add(f"baseline-{kind}", arm.label, "scripts/baselines.py", options,
                                (results,), needs, kind="baseline")  # fmt: skip
        return arm

    def _network(self, name: str | None) -> tuple[str, str, dict[str, Any]]:
        """Key, label and options of a network on the labelled tiles; None: that of all arms."""
        if name is None:
            return REAL, "real only", {}
        network = self.settings.baselines.networks[name]
        return name, network.label or name, network.arguments

    def _real_arm(self, name: str | None) -> Arm:
        key, label, overrides = self._network(name)
        arm = Arm(key, label, REAL if name is None else "baseline")
        self._add_seeds(arm, self.settings.data.labelled, overrides=overrides)
        return arm

    def combinations(self) -> list[tuple[str, str, int]]:
        """Generator, selection and ratio of all synthetic rows."""
        grid = self.settings.grid

        def cells(one: Cells) -> list[tuple[str, str, int]]:
            """All combinations of what is given, and of the whole grid where nothing is."""
            given = (
                (one.generator, grid.generators),
                (one.selection, grid.selection),
                (one.ratio, grid.ratios),
            )
            return list(product(*(known if v is None else as_list(v) for v, known in given)))

        without = {cell for one in grid.without for cell in cells(one)}
        found = [cell for cell in cells(Cells()) if cell not in without]
        return list(dict.fromkeys([*found, *(cell for one in grid.also for cell in cells(one))]))

    def _synthetic_arms(self) -> list[Arm]:
        arms, combinations = [], self.combinations()
        for name, generator in self.settings.generators.items():
            mine = [cell for cell in combinations if cell[0] == name]
            if not mine and generator.amount is None:
                continue
            sample_job = self._sampling(name, max((ratio for *_, ratio in mine), default=0))
            if not mine:
                self.other_jobs.append(sample_job)
                continue
            self._features(name, sample_job)
            copy_jobs = self._copy_check(name, sample_job)
            for _, selection, ratio in mine:
                arm = self._synthetic_arm(name, generator, selection, ratio)
                arm.other_jobs += copy_jobs
                arms.append(arm)
        return arms

    def _synthetic_arm(self, name: str, generator: Generator, selection: str, ratio: int) -> Arm:
        settings, key = self.settings, f"{name}-{selection}-{ratio}"
        factors = {
            "generator": name,
            "decoder": generator.decoder or "own",
            "guidance": _guidance({**settings.sampling.options, **generator.sampling}, generator),
            **{k: v if isinstance(v, int) else str(v) for k, v in generator.factors.items()},
            "selection": selection,
            "ratio": ratio,
        }
        label = f"{generator.label or name}, {selection} {ratio}%"
        arm = Arm(key, label, "synthetic", factors, generator=name)
        arm.wanted = sum(self._wanted(ratio).values())
        if not arm.wanted:
            raise UserError(f"ratio {ratio}: less than one tile per class; raise it")
        if settings.selection[selection].redraw:
            for seed in settings.evaluation.seeds:
                needs = self._selection(arm, f"{key}@{seed}", selection, ratio, seed)
                self._add_seeds(arm, f"{key}@{seed}", needs, [seed])
        else:
            self._add_seeds(arm, key, self._selection(arm, key, selection, ratio, 0))
        self._add_fidelity(arm)
        return arm

    def _add_fidelity(self, arm: Arm) -> None:
        """Add the fidelity of an arm: of its first draw, where there are several."""
        fidelity = self.settings.fidelity
        if fidelity is None:
            return
        folder, output = next(iter(arm.folders.values())), self.fidelity(arm.key)
        real, needs = self._folder(fidelity.real, "fidelity.real")
        needs += Needs((f"select-{folder}",))
        options = {"real": real, "fake": self.data / folder, "out": output, **fidelity.options}
        if fidelity.judge:
            judge, judged = self._judge()
            model = judge.get("model")
            options |= {"extractor": f"timm:{model}"} if model else judge
            needs += judged
        title = f"fidelity of {arm.key}"
        job = self._add(f"fidelity-{arm.key}", title, "scripts/fidelity.py", options, (output,),
                        needs, kind="fidelity")  # fmt: skip
        arm.other_jobs.append(job)

    def _copy_check(self, name: str, sample_job: str) -> list[str]:
        """The job that looks for copies in a generator's pool, if there is to be one."""
        copies, data = self.settings.copies, self.settings.data
        if copies is None:
            return []
        holdout, needs = self._folder(copies.holdout, "copies.holdout")
        needs += Needs((sample_job,)) + self._tiles(data.unlabelled)
        options = {
            "synthetic": self.samples(name),
            "train": self.data / data.unlabelled,
            "holdout": holdout,
            "out": self.copies(name),
            **copies.options,
        }
        if copies.judge:
            judge, judged = self._judge()
            options |= judge
            needs += judged
        title, output = f"copy check of {name}", (self.copies(name),)
        return [self._add(f"copies-{name}", title, "scripts/copy_check.py", options, output, needs,
                          kind="copies")]  # fmt: skip

    def _ceiling_arm(self, ratio: int) -> Arm:
        """Real tiles in place of synthetic ones."""
        data, key = self.settings.data, f"ceiling-{ratio}"
        options = {
            "data": self.data / data.unlabelled,
            "include": self.data / data.labelled,
            "ratio": ratio,
            "link": self.settings.link,
            "out": self.data / key,
            **self.settings.baselines.ceiling.options,
        }
        needs = self._tiles(data.unlabelled, data.labelled)
        job = self._add(f"subset-{key}", f"{ratio}% more real tiles", "scripts/make_subset.py",
                        options, (self.data / key,), needs, kind="subset", gpus=0)  # fmt: skip
        factors = {"selection": REAL, "ratio": ratio}
        arm = Arm(key, f"real tiles instead, {ratio}%", "ceiling", factors)
        self._add_seeds(arm, key, Needs((job,)))
        return arm


def _guidance(options: dict[str, Any], generator: Generator) -> str:
    """How a generator is guided, in words."""
    words = []
    if generator.classifier is not None:
        words.append(f"classifier {options.get('classifier_scale', 'default')}")
    if options.get("cfg_scale") is not None:
        words.append(f"labels {options['cfg_scale']}")
    return " and ".join(words) or "none"
