"""From the settings of an experiment to its rows and jobs: commands, and what each depends on."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Needs:
    """What a job uses.

    Attributes:
        after: Jobs before it.
        data: Digests of tiles and checkpoints from elsewhere.
    """

    after: tuple[str, ...] = ()
    data: str = ""

    def __add__(self, other: Needs) -> Needs:
        return Needs(tuple(dict.fromkeys(self.after + other.after)), self.data + other.data)


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
        command: tuple[str, dict[str, Any]],
        output: Path | tuple[Path, ...],
        needs: Needs,
        gpus: int = 1,
        **more: Any,
    ) -> str:
        """Add a job, unless one of that name is there; returns the name.

        Args:
            command: Script and options.
            more: Further attributes of `Job`.
        """
        script, options = command
        outputs = output if isinstance(output, tuple) else (output,)
        words = (script, *arguments(options), *more.pop("words", ()))
        more |= {"after": needs.after, "data": needs.data, "output": outputs, "gpus": gpus}
        self._jobs.setdefault(name, Job(name, title, words, **more))
        return name

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
        options = {"out": self.root, **(self.settings.data.tiles or {})}
        command = ("scripts/make_tiles.py", options)
        self._add(TILES, "procedural tiles", command, self.root, Needs(), gpus=0, kind="tiles")

    def _models(self, *names: str) -> Needs:
        """What a job needs that uses these models: those trained here, digests of the others."""
        after, digests = [], {}
        for name in names:
            model = self.settings.models[name]
            if model.run is not None:
                path = checkpoint_path(self.model(name), f"models.{name}.run")
                digests[name] = self.checkpoints.digest(path)
            else:
                make = self._training if model.config is not None else self._classifier
                after.append(make(name, model))
        return Needs(tuple(after), json.dumps(digests) if digests else "")

    def _training(self, name: str, model: Model) -> str:
        data = self.settings.data
        needs = self._tiles(data.unlabelled, data.labelled, "val")
        needs += self._models(*model.needs.values())
        files = tuple(self._config_file(path, name) for path in as_list(model.config))
        environment = {DATA_VARIABLE: show_path(self.data), **model.env}
        environment |= {key: show_path(self.model(o)) for key, o in model.needs.items()}
        for file in files:
            for variable in VARIABLE.findall(file.read_text()):
                # Its value decides the result, too.
                if variable not in environment and variable in os.environ:
                    environment[variable] = os.environ[variable]
        options = {"base": files, "t": True, "name": name, "logdir": self.out / "models"}
        return self._add(
            f"train-{name}",
            model.label or f"training of {name}",
            ("main.py", {**options, **model.arguments}),
            self.out / "models" / name,
            needs,
            model.gpus,
            words=model.overrides,
            files=files,
            environment=environment,
            kind="train",
        )

    def _config_file(self, path: Any, name: str) -> Path:
        for file in (ROOT / str(path), Path(str(path)).absolute()):
            if file.is_file():
                return file
        raise UserError(f"models.{name}.config: no file {path}; check the path")

    def _classifier(self, name: str, model: Model) -> str:
        data = self.settings.data
        options = {
            "data_dir": self.data / data.labelled,
            "val_data_dir": self.data / "val",
            **{key: self.model(other) for key, other in model.needs.items()},
            "name": name,
            "logdir": self.out / "models",
            **(model.classifier or {}),
        }
        return self._add(
            f"train-{name}",
            model.label or f"training of {name}",
            ("classifier_train.py", options),
            self.out / "models" / name,
            self._tiles(data.labelled, "val") + self._models(*model.needs.values()),
            model.gpus,
            environment=dict(model.env),
            kind="train",
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
            "resume": self.model(generator.diffusion),
            "classifier": generator.classifier and self.model(generator.classifier),
            "first_stage": generator.decoder and self.model(generator.decoder),
            **amount,
            "outdir": self.samples(name),
            **sampling.options,
            **generator.sampling,
        }
        return self._add(
            f"sample-{name}",
            f"sampling by {generator.label or name}",
            ("sample_diffusion.py", options),
            self.samples(name),
            self._models(*models),
            sampling.gpus,
            kind="sample",
        )

    def _judge(self) -> tuple[dict[str, Any], Needs]:
        """The judge as an option (`weights` or `model`), and what a job needs that uses it."""
        judge = self.settings.judge
        if judge.run is not None:
            path = existing_path(judge.run, "judge.run").absolute()
            file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
            existing_path(file, "judge.run", "file")
            return {"weights": path}, Needs(data=self.checkpoints.digest(file))
        if judge.model is not None:
            return {"model": judge.model}, Needs()
        seed = self.settings.evaluation.seeds[0] if judge.seed is None else judge.seed
        labelled = self.settings.data.labelled
        key, label, overrides = self._network(judge.network)
        job = self._evaluation(key, label, labelled, seed, overrides)
        return {"weights": self.out / "eval" / key / labelled / f"seed{seed}"}, Needs((job,))

    def _feature_job(self, name: str, sample_job: str) -> str:
        labelled = self.settings.data.labelled
        judge, needs = self._judge()
        options = {
            "real": self.data / labelled,
            "synthetic": self.samples(name),
            "out": self.features(name),
            **judge,
            **self.settings.judge.options,
        }
        return self._add(
            f"features-{name}",
            f"features and UMAP of {name}",
            ("scripts/vis.py", options),
            self.features(name),
            self._tiles(labelled) + Needs((sample_job,)) + needs,
            kind="features",
        )

    def _selection(
        self, key: str, folder: str, generator: str, strategy: Strategy, ratio: int, seed: int
    ) -> str:
        labelled = self.settings.data.labelled
        options: dict[str, Any] = {
            "real": self.data / labelled,
            "synthetic": self.samples(generator),
            "features": self.features(generator),
            "ratio": ratio,
            "strategy": strategy.strategy,
            "link": self.settings.link,
            "out": self.data / folder,
        }
        output = [self.data / folder]
        if strategy.strategy == "random":
            options["seed"] = seed
        if strategy.sheets and strategy.strategy != "random":
            options["sheets"] = self.sheets(key)
            output.append(self.sheets(key))
        else:
            options["no-sheets"] = True
        return self._add(
            f"select-{folder}",
            f"selection of {folder}",
            ("scripts/distance.py", {**options, **strategy.options}),
            tuple(output),
            self._tiles(labelled) + Needs((f"features-{generator}",)),
            gpus=0,
            kind="select",
        )

    def _evaluation(
        self,
        key: str,
        title: str,
        folder: str,
        seed: int,
        overrides: dict[str, Any],
        needs: Needs | None = None,
    ) -> str:
        evaluation, data = self.settings.evaluation, self.settings.data
        logdir = self.out / "eval" / key
        options = {
            "data_path": self.data,
            "output_dir": folder,
            "logdir": logdir,
            **evaluation.arguments,
            **overrides,
        }
        return self._add(
            f"eval-{key}-seed{seed}",
            f"ViT on {title}, seed {seed}",
            ("eval.py", options),
            logdir / folder / f"seed{seed}",
            self._tiles(data.labelled, "val", "test") + (needs or Needs()),
            evaluation.gpus,
            words=("--seed", str(seed)),
            kind="eval",
        )

    # Rows

    def _baseline(self, kind: str) -> Arm:
        data, results = self.settings.data, self.out / "eval" / kind
        label = kind.replace("_", " ")
        options = {
            "data_path": self.data,
            "output_dir": data.labelled,
            "kind": kind,
            "logdir": results.parent,
            **self.settings.baselines.options.get(kind, {}),
        }
        job = self._add(
            f"baseline-{kind}",
            label,
            ("scripts/baselines.py", options),
            results,
            self._tiles(data.labelled, "val", "test"),
            kind="baseline",
        )
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
        needs: Needs | None = None,
    ) -> None:
        arm.results = self.out / "eval" / arm.key
        for seed in self.settings.evaluation.seeds:
            job = self._evaluation(arm.key, title, folder, seed, overrides or {}, needs)
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
                arm.jobs[seed] = self._evaluation(key, label, folder, seed, {}, Needs((job,)))
                arm.folders[seed] = folder
            else:
                self._add_seeds(arm, folder, label, needs=Needs((job,)))
        self._add_fidelity(arm)
        return arm

    def _add_fidelity(self, arm: Arm) -> None:
        """Add the fidelity of an arm: of its first draw, where there are several."""
        fidelity = self.settings.fidelity
        if fidelity is None:
            return
        folder = next(iter(arm.folders.values()))
        arm.fidelity = self.out / "fidelity" / f"{arm.key}.json"
        real, needs = self._folder(fidelity.real, "fidelity.real")
        needs += Needs((f"select-{folder}",))
        options = {
            "real": real,
            "fake": self.data / folder,
            "out": arm.fidelity,
            **fidelity.options,
        }
        if fidelity.judge:
            judge, judged = self._judge()
            model = judge.get("model")
            options |= {"extractor": f"timm:{model}"} if model else judge
            needs += judged
        title = f"fidelity of {arm.key}"
        command = ("scripts/fidelity.py", options)
        job = self._add(f"fidelity-{arm.key}", title, command, arm.fidelity, needs, kind="fidelity")
        arm.other_jobs.append(job)

    def _copy_job(self, name: str, sample_job: str) -> str | None:
        copies, data = self.settings.copies, self.settings.data
        if copies is None:
            return None
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
        command = ("scripts/copy_check.py", options)
        title = f"copy check of {name}"
        return self._add(f"copies-{name}", title, command, self.copies(name), needs, kind="copies")

    def _ceiling_arms(self) -> list[Arm]:
        ceiling, data, arms = self.settings.baselines.ceiling, self.settings.data, []
        for ratio in ceiling.ratios if ceiling else ():
            key = f"ceiling-{ratio}"
            options = {
                "data": self.data / data.unlabelled,
                "include": self.data / data.labelled,
                "ratio": ratio,
                "link": self.settings.link,
                "out": self.data / key,
                **ceiling.options,
            }
            job = self._add(
                f"subset-{key}",
                f"{ratio}% more real tiles",
                ("scripts/make_subset.py", options),
                self.data / key,
                self._tiles(data.unlabelled, data.labelled),
                gpus=0,
                kind="subset",
            )
            label = f"real tiles instead, {ratio}%"
            arm = Arm(key, label, "ceiling", {"selection": REAL, "ratio": ratio})
            self._add_seeds(arm, key, label, needs=Needs((job,)))
            arms.append(arm)
        return arms

    def describe(self) -> dict[str, Any]:
        """The resolved settings."""
        return self.settings.model_dump()


def _guidance(options: dict[str, Any], generator: Generator) -> str:
    """How a generator is guided, in words."""
    words = []
    if generator.classifier is not None:
        words.append(f"classifier {options.get('classifier_scale', 'default')}")
    if options.get("cfg_scale") is not None:
        words.append(f"labels {options['cfg_scale']}")
    return " and ".join(words) or "none"
