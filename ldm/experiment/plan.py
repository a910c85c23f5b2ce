"""From the settings of an experiment to its rows and jobs: commands, and what each depends on."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoint import checkpoint_path
from ldm.cli import existing_path
from ldm.errors import UserError
from ldm.experiment.inputs import Checkpoints, Split
from ldm.experiment.jobs import ROOT, Job, arguments, needed_by, show_path
from ldm.experiment.settings import Generator, Model, Settings, Strategy, as_list, nearest

REAL = "real"  # key of the row without synthetic tiles
TILES = "tiles"  # job that makes procedural ones
VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
DATA_VARIABLE = "HISTO_DATA"


@dataclass
class Arm:
    """One row, as it is planned.

    Attributes:
        folders: Training folder (below OUT/data) of each seed.
        jobs: Of each seed: the one that trains and evaluates. Colours have seed 0 alone.
        other_jobs: Those whose results stand in the row, too.
        results: Folder with the results of the jobs.
        wanted: Synthetic tiles, all classes together.
    """

    key: str
    label: str
    kind: str
    factors: dict[str, str | int] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
    jobs: dict[int, str] = field(default_factory=dict)
    other_jobs: list[str] = field(default_factory=list)
    results: Path | None = None
    wanted: int | None = None
    generator: str | None = None
    fidelity: Path | None = None


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
        self._check_out()
        self._check_inputs()
        self._splits = {name: Split(self.root / name) for name in self._split_names()}
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

    def sheets(self, key: str) -> Path:
        return self.out / "sheets" / key

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
                raise UserError(f"--only {pattern}: fits no row; {nearest(pattern, keys)}")
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
        for name in self._split_names():
            link, target = self.data / name, self.root / name
            if link.is_symlink() and Path(os.readlink(link)) == target:
                continue
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)

    # What is there

    def _split_names(self) -> list[str]:
        data = self.settings.data
        return list(dict.fromkeys([data.unlabelled, data.labelled, "val", "test"]))

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
        checks: list[Callable[[], Any]] = [self._check_tiles]
        if data.groups is not None:
            checks.append(partial(existing_path, data.groups, "data.groups", "file"))
        for name, model in settings.models.items():
            if model.run is not None:
                checks.append(partial(checkpoint_path, self.model(name), f"models.{name}.run"))
            for path in as_list(model.config) if model.config is not None else ():
                checks.append(partial(self._config_file, path, name))
        if settings.judge.run is not None:
            checks.append(partial(existing_path, settings.judge.run, "judge.run"))
        problems = []
        for check in checks:
            try:
                check()
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def _check_tiles(self) -> None:
        data = self.settings.data
        if data.tiles is None:
            existing_path(self.root, "data.root", "dir")
            for name in self._split_names():
                existing_path(self.root / name, f"data.root: its folder {name}", "dir")
            self._check_classes()
        elif self.out not in self.root.parents:
            # They are removed when they have to be made anew.
            raise UserError(
                f"data.root {self.root} must lie in out {self.out} when data.tiles makes it; leave"
                " data.tiles out to use tiles of your own"
            )

    def _check_classes(self) -> None:
        """Check that the labelled splits have the same classes, and no split is empty."""
        data = self.settings.data
        if Split(self.root / data.unlabelled).is_empty:
            raise UserError(f"{self.root / data.unlabelled} has no tiles; add some")
        known = Split(self.root / data.labelled).counts
        for name in ("val", "test"):
            found = Split(self.root / name).counts
            if list(found) != list(known):
                differ = ", ".join(sorted(set(found) ^ set(known)))
                raise UserError(
                    f"{self.root / name} has other classes than {data.labelled} ({differ}); the"
                    " names of their class folders must be equal"
                )

    def _on_tiles(self, *splits: str, after: Sequence[str] = ()) -> dict[str, Any]:
        """What a job depends on that reads these splits."""
        if self.settings.data.tiles is not None:
            return {"after": (TILES, *after)}
        facts = {name: self._splits[name].identity for name in splits}
        return {"after": tuple(after), "data": json.dumps(facts)}

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

    def _add(self, job: Job) -> str:
        self._jobs.setdefault(job.name, job)
        return job.name

    def _plan(self) -> None:
        settings = self.settings
        if settings.data.tiles is not None:
            self._add_tiles()
        baselines = [self._baseline(kind) for kind in settings.baselines.kinds]
        real = self._real_arm(None)
        networks = [self._real_arm(name) for name in settings.baselines.networks]
        synthetic = self._synthetic_arms()
        ceiling = self._ceiling_arms()
        self.rows = [*baselines, real, *networks, *synthetic, *ceiling]
        keys = [row.key for row in self.rows]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f"two rows are named {', '.join(twice)}; rename one of their parts")

    def _add_tiles(self) -> None:
        tiles = self.settings.data.tiles or {}
        command = ("scripts/make_tiles.py", *arguments({"out": show_path(self.root), **tiles}))
        self._add(
            Job(TILES, "procedural tiles", command, output=(self.root,), kind="tiles", gpus=0)
        )

    def _model_jobs(self, name: str) -> tuple[str, ...]:
        """The job that trains a model, in a tuple; empty for one from elsewhere."""
        model = self.settings.models[name]
        if model.run is not None:
            return ()
        if f"train-{name}" not in self._jobs:
            needed = [job for other in model.needs.values() for job in self._model_jobs(other)]
            make = self._training if model.config is not None else self._classifier
            self._add(make(name, model, needed))
        return (f"train-{name}",)

    def _used(self, *names: str) -> dict[str, str]:
        """Digests of the checkpoints from elsewhere among these models."""
        found = {}
        for name in names:
            model = self.settings.models[name]
            if model.run is not None:
                path = checkpoint_path(self.model(name), f"models.{name}.run")
                found[name] = self.checkpoints.digest(path)
        return found

    def _with_models(self, depends: dict[str, Any], *names: str) -> dict[str, Any]:
        """Adds the identity of models from elsewhere to what a job depends on."""
        used = self._used(*names)
        if not used:
            return depends
        return {**depends, "data": depends.get("data", "") + json.dumps(used)}

    def _training(self, name: str, model: Model, needed: list[str]) -> Job:
        files = [self._config_file(path, name) for path in as_list(model.config)]
        environment = {DATA_VARIABLE: show_path(self.data), **model.env}
        environment |= {key: show_path(self.model(o)) for key, o in model.needs.items()}
        for file in files:
            for variable in VARIABLE.findall(file.read_text()):
                # Its value decides the result, too.
                if variable not in environment and variable in os.environ:
                    environment[variable] = os.environ[variable]
        command = ["main.py", "--base", *map(show_path, files), "-t", "--name", name]
        command += ["--logdir", show_path(self.out / "models"), *arguments(model.arguments)]
        command += model.overrides
        data = self.settings.data
        on_tiles = self._on_tiles(data.unlabelled, data.labelled, "val", after=needed)
        return Job(
            f"train-{name}",
            model.label or f"training of {name}",
            tuple(command),
            **self._with_models(on_tiles, *model.needs.values()),
            output=(self.out / "models" / name,),
            files=tuple(files),
            environment=environment,
            kind="train",
            gpus=model.gpus,
        )

    def _config_file(self, path: Any, name: str) -> Path:
        for file in (ROOT / str(path), Path(str(path)).absolute()):
            if file.is_file():
                return file
        raise UserError(f"models.{name}.config: no file {path}; check the path")

    def _classifier(self, name: str, model: Model, needed: list[str]) -> Job:
        data, options = self.settings.data, dict(model.classifier or {})
        options = {
            "data_dir": show_path(self.data / data.labelled),
            "val_data_dir": show_path(self.data / "val"),
            **{key: show_path(self.model(other)) for key, other in model.needs.items()},
            "name": name,
            "logdir": show_path(self.out / "models"),
            **options,
        }

        on_tiles = self._on_tiles(data.labelled, "val", after=needed)
        return Job(
            f"train-{name}",
            model.label or f"training of {name}",
            ("classifier_train.py", *arguments(options)),
            **self._with_models(on_tiles, *model.needs.values()),
            output=(self.out / "models" / name,),
            environment=dict(model.env),
            kind="train",
            gpus=model.gpus,
        )

    def _sampling(self, name: str, largest: int) -> str:
        generator, sampling = self.settings.generators[name], self.settings.sampling
        models = [m for m in (generator.diffusion, generator.classifier, generator.decoder) if m]
        wanted = self._wanted(largest)
        amounts = {c: math.ceil(max(1, n) * sampling.per_wanted) for c, n in wanted.items()}
        if generator.amount is not None:
            amounts = dict.fromkeys(wanted, generator.amount)
        if len(set(amounts.values())) == 1:
            amount: dict[str, Any] = {"n_samples": next(iter(amounts.values()))}
        else:
            amount = {"counts": ",".join(f"{c}={n}" for c, n in amounts.items())}
        options = {
            "resume": show_path(self.model(generator.diffusion)),
            "classifier": generator.classifier and show_path(self.model(generator.classifier)),
            "first_stage": generator.decoder and show_path(self.model(generator.decoder)),
            **amount,
            "outdir": show_path(self.samples(name)),
            **sampling.options,
            **generator.sampling,
        }

        needed = dict.fromkeys(job for model in models for job in self._model_jobs(model))
        return self._add(
            Job(
                f"sample-{name}",
                f"sampling by {generator.label or name}",
                ("sample_diffusion.py", *arguments(options)),
                **self._with_models({"after": tuple(needed)}, *models),
                output=(self.samples(name),),
                kind="sample",
                gpus=sampling.gpus,
            )
        )

    def _judge(self) -> tuple[dict[str, str], tuple[str, ...], str]:
        """The judge as an option (`weights` or `model`), the jobs before it, and a digest of it."""
        judge = self.settings.judge
        if judge.run is not None:
            path = existing_path(judge.run, "judge.run").absolute()
            file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
            existing_path(file, "judge.run", "file")
            return {"weights": show_path(path)}, (), self.checkpoints.digest(file)
        if judge.model is not None:
            return {"model": judge.model}, (), ""
        seed = self.settings.evaluation.seeds[0] if judge.seed is None else judge.seed
        labelled = self.settings.data.labelled
        key, label, overrides = self._network(judge.network)
        job = self._evaluation(key, label, labelled, seed, overrides)
        weights = self.out / "eval" / key / labelled / f"seed{seed}"
        return {"weights": show_path(weights)}, (job,), ""

    def _judged(self, depends: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
        """The judge as an option, and `depends` of a job that uses it."""
        option, jobs, digest = self._judge()
        data = depends.get("data", "") + digest
        return option, {**depends, "after": (*depends["after"], *jobs), "data": data}

    def _feature_job(self, name: str, sample_job: str) -> str:
        labelled = self.settings.data.labelled
        judge, depends = self._judged(self._on_tiles(labelled, after=(sample_job,)))
        options = {
            "real": show_path(self.data / labelled),
            "synthetic": show_path(self.samples(name)),
            "out": show_path(self.features(name)),
            **judge,
            **self.settings.judge.options,
        }
        return self._add(
            Job(
                f"features-{name}",
                f"features and UMAP of {name}",
                ("scripts/vis.py", *arguments(options)),
                **depends,
                output=(self.features(name),),
                kind="features",
            )
        )

    def _selection(
        self, key: str, folder: str, generator: str, strategy: Strategy, ratio: int, seed: int
    ) -> str:
        labelled = self.settings.data.labelled
        options: dict[str, Any] = {
            "real": show_path(self.data / labelled),
            "synthetic": show_path(self.samples(generator)),
            "features": show_path(self.features(generator)),
            "ratio": ratio,
            "strategy": strategy.strategy,
            "link": self.settings.link,
            "out": show_path(self.data / folder),
        }
        output = [self.data / folder]
        if strategy.strategy == "random":
            options["seed"] = seed
        if strategy.sheets and strategy.strategy != "random":
            options["sheets"] = show_path(self.sheets(key))
            output.append(self.sheets(key))
        else:
            options["no-sheets"] = True
        options |= strategy.options

        return self._add(
            Job(
                f"select-{folder}",
                f"selection of {folder}",
                ("scripts/distance.py", *arguments(options)),
                **self._on_tiles(labelled, after=(f"features-{generator}",)),
                output=tuple(output),
                kind="select",
                gpus=0,
            )
        )

    def _evaluation(
        self,
        key: str,
        title: str,
        folder: str,
        seed: int,
        overrides: dict[str, Any],
        after: Sequence[str] = (),
    ) -> str:
        evaluation, data = self.settings.evaluation, self.settings.data
        logdir = self.out / "eval" / key
        options = {
            "data_path": show_path(self.data),
            "output_dir": folder,
            "logdir": show_path(logdir),
            **evaluation.arguments,
            **overrides,
        }
        words = ["eval.py", *arguments(options), "--seed", str(seed)]
        result = logdir / folder / f"seed{seed}"
        return self._add(
            Job(
                f"eval-{key}-seed{seed}",
                f"ViT on {title}, seed {seed}",
                tuple(words),
                **self._on_tiles(data.labelled, "val", "test", after=after),
                output=(result,),
                kind="eval",
                gpus=evaluation.gpus,
            )
        )

    # Rows

    def _baseline(self, kind: str) -> Arm:
        data, results = self.settings.data, self.out / "eval" / kind
        options = {
            "data_path": show_path(self.data),
            "output_dir": data.labelled,
            "kind": kind,
            "logdir": show_path(results.parent),
            **self.settings.baselines.options.get(kind, {}),
        }
        job = self._add(
            Job(
                f"baseline-{kind}",
                kind.replace("_", " "),
                ("scripts/baselines.py", *arguments(options)),
                **self._on_tiles(data.labelled, "val", "test"),
                output=(results,),
                kind="baseline",
            )
        )
        label = kind.replace("_", " ")
        folders = {0: data.labelled}
        return Arm(kind, label, "baseline", jobs={0: job}, folders=folders, results=results)

    def _network(self, name: str | None) -> tuple[str, str, dict[str, Any]]:
        """Key, label and options of a network on the labelled tiles; None: that of all arms."""
        if name is None:
            return REAL, "real only", {}
        network = self.settings.baselines.networks[name]
        return name, network.label or name, network.arguments

    def _real_arm(self, name: str | None) -> Arm:
        key, label, overrides = self._network(name)
        arm = Arm(key, label, REAL if name is None else "baseline")
        self._add_seeds(arm, self.settings.data.labelled, label, overrides)
        return arm

    def _add_seeds(
        self,
        arm: Arm,
        folder: str,
        title: str,
        overrides: dict[str, Any] | None = None,
        after: Sequence[str] = (),
    ) -> None:
        arm.results = self.out / "eval" / arm.key
        for seed in self.settings.evaluation.seeds:
            job = self._evaluation(arm.key, title, folder, seed, overrides or {}, after)
            arm.jobs[seed], arm.folders[seed] = job, folder

    def combinations(self) -> list[tuple[str, str, int]]:
        """Generator, selection and ratio of all synthetic rows."""
        grid = self.settings.grid

        def cells(one, default: bool = True) -> list[tuple[str, str, int]]:
            def names(value: Any, known: Sequence) -> list:
                return as_list(value) if value is not None else list(known)

            return [
                (generator, selection, ratio)
                for generator in names(one.generator, grid.generators)
                for selection in names(one.selection, grid.selection)
                for ratio in names(one.ratio, grid.ratios)
            ]

        without = {cell for one in grid.without for cell in cells(one)}
        found = [
            (generator, selection, ratio)
            for generator in grid.generators
            for selection in grid.selection
            for ratio in grid.ratios
        ]
        found = [cell for cell in found if cell not in without]
        return list(dict.fromkeys([*found, *(c for one in grid.also for c in cells(one))]))

    def _synthetic_arms(self) -> list[Arm]:
        arms, settings = [], self.settings
        combinations = self.combinations()
        for name, generator in settings.generators.items():
            mine = [cell for cell in combinations if cell[0] == name]
            if not mine and generator.amount is None:
                continue
            sample_job = self._sampling(name, max((ratio for *_, ratio in mine), default=0))
            if not mine:
                self.other_jobs.append(sample_job)
                continue
            self._feature_job(name, sample_job)
            copy_job = self._copy_job(name, sample_job)
            for _, selection, ratio in mine:
                arm = self._synthetic_arm(name, generator, selection, ratio)
                arm.other_jobs += [copy_job] if copy_job else []
                arms.append(arm)
        return arms

    def _synthetic_arm(self, name: str, generator: Generator, selection: str, ratio: int) -> Arm:
        settings, key = self.settings, f"{name}-{selection}-{ratio}"
        strategy = settings.selection[selection]
        label = f"{generator.label or name}, {selection} {ratio}%"
        factors = {
            "generator": name,
            "decoder": generator.decoder or "own",
            "guidance": _guidance({**settings.sampling.options, **generator.sampling}, generator),
            **{k: v if isinstance(v, int) else str(v) for k, v in generator.factors.items()},
            "selection": selection,
            "ratio": ratio,
        }
        arm = Arm(key, label, "synthetic", factors, generator=name)
        arm.wanted = sum(self._wanted(ratio).values())
        if not arm.wanted:
            raise UserError(f"ratio {ratio}: less than one tile per class; raise it")
        seeds = settings.evaluation.seeds
        for seed in seeds if strategy.redraw else seeds[:1]:
            folder = f"{key}@{seed}" if strategy.redraw else key
            first = seed if strategy.redraw else 0
            job = self._selection(key, folder, name, strategy, ratio, first)
            if strategy.redraw:
                arm.results = self.out / "eval" / key
                arm.jobs[seed] = self._evaluation(key, label, folder, seed, {}, (job,))
                arm.folders[seed] = folder
            else:
                self._add_seeds(arm, folder, label, after=(job,))
        self._add_fidelity(arm)
        return arm

    def _add_fidelity(self, arm: Arm) -> None:
        """Of the first draw, where there are several."""
        fidelity = self.settings.fidelity
        if fidelity is None:
            return
        folder = next(iter(arm.folders.values()))
        arm.fidelity = self.out / "fidelity" / f"{arm.key}.json"
        real, depends = self._folder(fidelity.real, "fidelity.real", (f"select-{folder}",))
        options = {
            "real": show_path(real),
            "fake": show_path(self.data / folder),
            "out": show_path(arm.fidelity),
            **fidelity.options,
        }
        if fidelity.judge:
            judge, depends = self._judged(depends)
            model = judge.get("model")
            options |= {"extractor": f"timm:{model}"} if model else judge
        job = Job(
            f"fidelity-{arm.key}",
            f"fidelity of {arm.key}",
            ("scripts/fidelity.py", *arguments(options)),
            **depends,
            output=(arm.fidelity,),
            kind="fidelity",
        )
        arm.other_jobs.append(self._add(job))

    def _copy_job(self, name: str, sample_job: str) -> str | None:
        copies = self.settings.copies
        if copies is None:
            return None
        data = self.settings.data
        holdout, depends = self._folder(copies.holdout, "copies.holdout", (sample_job,))
        train = self._on_tiles(data.unlabelled)
        depends["data"] = depends.get("data", "") + train.get("data", "")
        options = {
            "synthetic": show_path(self.samples(name)),
            "train": show_path(self.data / data.unlabelled),
            "holdout": show_path(holdout),
            "out": show_path(self.copies(name)),
            **copies.options,
        }
        if copies.judge:
            judge, depends = self._judged(depends)
            options |= judge

        return self._add(
            Job(
                f"copies-{name}",
                f"copy check of {name}",
                ("scripts/copy_check.py", *arguments(options)),
                **depends,
                output=(self.copies(name),),
                kind="copies",
            )
        )

    def _folder(self, name: str, key: str, after: Sequence[str]) -> tuple[Path, dict[str, Any]]:
        """A split by its name, or a folder from elsewhere, and what a job depends on with it."""
        if name in self._splits:
            return self.data / name, self._on_tiles(name, after=after)
        path = existing_path(name, key, "dir").absolute()
        return path, {"after": tuple(after), "data": Split(path).identity}

    def _ceiling_arms(self) -> list[Arm]:
        ceiling, data, arms = self.settings.baselines.ceiling, self.settings.data, []
        for ratio in ceiling.ratios if ceiling else ():
            key = f"ceiling-{ratio}"
            options = {
                "data": show_path(self.data / data.unlabelled),
                "include": show_path(self.data / data.labelled),
                "ratio": ratio,
                "link": self.settings.link,
                "out": show_path(self.data / key),
                **ceiling.options,
            }
            job = self._add(
                Job(
                    f"subset-{key}",
                    f"{ratio}% more real tiles",
                    ("scripts/make_subset.py", *arguments(options)),
                    **self._on_tiles(data.unlabelled, data.labelled),
                    output=(self.data / key,),
                    kind="select",
                    gpus=0,
                )
            )
            label = f"real tiles instead, {ratio}%"
            arm = Arm(key, label, "ceiling", {"selection": REAL, "ratio": ratio})
            self._add_seeds(arm, key, label, after=(job,))
            arms.append(arm)
        return arms

    def describe(self) -> dict[str, Any]:
        """The resolved settings."""
        return dataclasses.asdict(self.settings)


def _guidance(options: dict[str, Any], generator: Generator) -> str:
    """How a generator is guided, in words."""
    words = []
    if generator.classifier is not None:
        words.append(f"classifier {options.get('classifier_scale', 'default')}")
    if options.get("cfg_scale") is not None:
        words.append(f"labels {options['cfg_scale']}")
    return " and ".join(words) or "none"
