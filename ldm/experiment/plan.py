"""From the settings of an experiment to its rows and jobs: commands, and what each depends on."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.checkpoint import checkpoint_path
from ldm.cli import existing_path, nearest
from ldm.errors import UserError
from ldm.experiment.inputs import Checkpoints, Split
from ldm.experiment.jobs import Job, arguments, needed_by, show_path
from ldm.experiment.settings import Cells, Generator, Model, Options, Settings, as_list

REAL = "real"  # key of the row without synthetic tiles
PSEUDO = "pseudo"  # kind of rows with real tiles that a judge labelled
TILES = "tiles"  # job that makes procedural ones
PLACE = re.compile(r"\{([\w-]+)\}")
VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
DATA_VARIABLE = "HISTO_DATA"


@dataclass
class Arm:
    """One row, as it is planned."""

    key: str
    label: str
    kind: str
    factors: dict[str, str | int] = field(default_factory=dict)
    # Training folder (below OUT/data) of each seed.
    folders: dict[int, str] = field(default_factory=dict)
    places: dict[int, Path] = field(default_factory=dict)  # folder of each seed's results
    # The job of each seed that trains and evaluates; baselines of colours have seed 0 only.
    jobs: dict[int, str] = field(default_factory=dict)
    # Further jobs whose results stand in the row.
    other_jobs: list[str] = field(default_factory=list)
    wanted: int | None = None  # synthetic tiles, all classes together
    generator: str | None = None  # its pool, of the first draw of labels where there are several
    first: str | None = None  # key of the row's part that belongs to the first of several draws


@dataclass(frozen=True)
class Needs:
    """What a job uses: the jobs before it, and digests of tiles and checkpoints from elsewhere."""

    after: tuple[str, ...] = ()
    data: str = ""

    def __add__(self, other: Needs) -> Needs:
        return Needs(tuple(dict.fromkeys(self.after + other.after)), self.data + other.data)


NOTHING = Needs()


@dataclass(frozen=True)
class Draw:
    """The labelled tiles that rows are planned for."""

    labelled: str  # their folder, below `data`
    seeds: list[int]  # of the networks of an arm
    per_class: int | None = None  # None where they are not drawn
    part: str = ""  # end of the names of all that belongs to this draw
    seed: Options = field(default_factory=dict)  # an option of what is made for each draw

    @classmethod
    def of(cls, per_class: int, seed: int) -> Draw:
        """A draw by the seed that is that of the networks, too."""
        part = f"@{per_class}-{seed}"
        return cls(f"labels{part}", [seed], per_class, part, {"seed": seed})


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
        self._chosen: set[str] = set()  # folders whose selection is being planned
        # The one that is planned.
        self._draw = Draw(settings.data.labelled, settings.evaluation.seeds)
        names = [settings.data.unlabelled, "val", "test"]
        if settings.draws is None:
            names.insert(1, settings.data.labelled)
        self._splits = {name: Split(self.root / name) for name in names}
        self._check_out()
        self._check_inputs()
        self._plan()

    @property
    def jobs(self) -> list[Job]:
        """All jobs, each after those that it needs."""
        return list(self._jobs.values())

    def _depends_on_labels(self, name: str) -> bool:
        """Whether a model is trained anew for every draw of labels."""
        model = self.settings.models[name]
        others = model.needs.values()
        return model.classifier is not None or any(self._depends_on_labels(one) for one in others)

    # Places

    @property
    def data(self) -> Path:
        """Links to the tiles, and the training folders that are made."""
        return self.out / "data"

    @property
    def _kept(self) -> Path:
        """Features of networks, which selections and probes share."""
        return self.out / "features" / "kept"

    def model(self, name: str) -> Path:
        """The checkpoint of a model, whether or not it is trained yet."""
        model = self.settings.models[name]
        if model.run is not None:
            return Path(model.run).expanduser().absolute()
        folder = self.out / "models" / self._model_name(name)
        return folder / "checkpoints" / f"{model.checkpoint}.ckpt"

    def _model_name(self, name: str) -> str:
        return name + self._draw.part if self._depends_on_labels(name) else name

    def select_rows(self, patterns: Sequence[str]) -> list[Arm]:
        """The rows whose key fits a pattern such as `*-centroid-100`; all without patterns."""
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
        """Check that everything from elsewhere is there; all that is missing is one UserError."""
        settings, data = self.settings, self.settings.data
        checks: list[tuple] = [(self._check_tiles,)]  # a function and its arguments
        if data.groups is not None:
            checks.append((existing_path, data.groups, "data.groups", "file"))
        for name, model in settings.models.items():
            if model.run is not None:
                checks.append((checkpoint_path, self.model(name), f"models.{name}.run"))
            for path in as_list(model.config) if model.config is not None else ():
                checks.append((existing_path, path, f"models.{name}.config", "file"))
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
        labelled = data.labelled if data.labelled in splits else data.unlabelled
        known = splits[labelled].counts
        for split in (splits["val"], splits["test"]):
            if list(split.counts) != list(known):
                differ = ", ".join(sorted(set(split.counts) ^ set(known)))
                raise UserError(
                    f"{split.root} has other classes than {labelled} ({differ}); the names"
                    " of their class folders must be equal"
                )

    def _tiles(self, *splits: str) -> Needs:
        """What a job needs that reads these splits."""
        drawn = NOTHING
        if self._draw.part and self._draw.labelled in splits:
            drawn = Needs((f"subset-{self._draw.labelled}",))
            splits = tuple(name for name in splits if name != self._draw.labelled)
        if self.settings.data.tiles is not None:
            return drawn + Needs((TILES,))
        known = {name: self._splits[name].identity for name in splits}
        return drawn + Needs(data=json.dumps(known) if known else "")

    def _folder(self, name: str, key: str) -> tuple[Path, Needs]:
        """A split by its name, or a folder from elsewhere, and what a job needs that reads it."""
        if name in self._splits:
            return self.data / name, self._tiles(name)
        path = existing_path(name, key, "dir").absolute()
        return path, Needs(data=Split(path).identity)

    def _class_counts(self) -> dict[str, int]:
        """Labelled tiles by class; of procedural ones, which may not be there yet, as many."""
        data, draw = self.settings.data, self._draw
        if data.tiles is None:
            counts = self._splits[data.unlabelled if draw.part else data.labelled].counts
        else:
            from ldm.data.procedural import CLASSES

            names = data.tiles.get("classes") or CLASSES
            counts = dict.fromkeys(names, int(data.tiles.get("train5", 6)))
        return dict.fromkeys(counts, draw.per_class) if draw.part else counts

    def _wanted(self, ratio: int) -> dict[str, int]:
        """Synthetic tiles of a ratio, by class, rounded as scripts/distance.py does."""
        return {name: (count * ratio + 50) // 100 for name, count in self._class_counts().items()}

    # Jobs

    def _add(
        self,
        name: str,
        title: str,
        verb: str,
        options: dict[str, Any],
        output: Sequence[Path],
        needs: Needs,
        words: Sequence[str] = (),
        **more: Any,
    ) -> str:
        """Add a job, unless one of that name is there; returns the name. `words` come last."""
        if name not in self._jobs:
            command, output = (verb, *arguments(options), *words), tuple(output)
            self._jobs[name] = Job(
                name, title, command, needs.after, output, data=needs.data, **more
            )
        return name

    def _plan(self) -> None:
        settings = self.settings
        if settings.data.tiles is not None:
            options = {"out": self.root, **settings.data.tiles}
            self._add(TILES, "procedural tiles", "tiles", options, [self.root],
                      NOTHING, gpus=0)  # fmt: skip
        if settings.draws is None:
            self.rows = self._arms()
        else:
            undrawn = self._draw
            for number in settings.draws.per_class:
                arms: dict[str, Arm] = {}
                for seed in settings.evaluation.seeds:
                    self._draw = Draw.of(number, seed)
                    self._draw_labels()
                    for arm in self._arms():
                        _add_draw(arms, arm, self._draw)
                self._draw = undrawn
                self.rows += arms.values()
        keys = [row.key for row in self.rows]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f"two rows are named {', '.join(twice)}; rename one of their parts")

    def _arms(self) -> list[Arm]:
        baselines = self.settings.baselines
        ceiling = baselines.ceiling
        return [
            *(self._baseline(kind, kind) for kind in baselines.kinds),
            *(self._probe(name) for name in baselines.probes),
            self._real_arm(None),
            *(self._real_arm(name) for name in baselines.networks),
            *self._synthetic_arms(),
            *(self._ceiling_arm(ratio) for ratio in (ceiling.ratios if ceiling else ())),
        ]

    def _draw_labels(self) -> None:
        draw, unlabelled = self._draw, self.settings.data.unlabelled
        out = self.data / draw.labelled
        options = {
            "data": self.data / unlabelled,
            "per_class": draw.per_class,
            **draw.seed,
            "link": self.settings.link,
            "out": out,
            **self.settings.draws.options,
        }
        title = f"{draw.per_class} labelled tiles per class, draw {draw.seeds[0]}"
        self._add(f"subset-{draw.labelled}", title, "subset", options, [out],
                  self._tiles(unlabelled), gpus=0)  # fmt: skip

    def _filled_options(self, options: Options) -> tuple[Options, Needs]:
        """Options with `_filled` values; keys of pseudo-labelled rows are training folders."""
        texts, folders = " ".join(map(str, options.values())), NOTHING
        if "{labelled}" in texts:
            folders += self._tiles(self._draw.labelled)
        places = {}
        for cell in self.combinations():
            key = row_key(*cell)
            if self.settings.generators[cell[0]].unlabelled is not None:
                places[key] = show_path(self.data / (key + self._draw.part))
                if f"{{{key}}}" in texts:
                    folders += self._selection(key + self._draw.part, *cell)
        values, needs = self._filled(list(options.values()), places)
        return dict(zip(options, values, strict=True)), needs + folders

    def _filled(
        self, texts: Sequence[Any], places: Mapping[str, str] | None = None
    ) -> tuple[list[Any], Needs]:
        """Texts with models for {NAME}, the labelled tiles for {labelled}, and further `places`."""
        known = {"labelled": show_path(self.data / self._draw.labelled), **(places or {})}
        used = set()

        def place(found: re.Match) -> str:
            if found[1] in known:
                return known[found[1]]
            if found[1] not in self.settings.models:
                names = [*self.settings.models, *known]
                raise UserError(f"{found[0]}: no such model{nearest(found[1], names)}")
            used.add(found[1])
            return show_path(self.model(found[1]))

        filled = [PLACE.sub(place, one) if isinstance(one, str) else one for one in texts]
        return filled, self._models(*sorted(used))

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
        data, needs = self.settings.data, NOTHING
        given = {key: self.model(other) for key, other in model.needs.items()}
        run = self._model_name(name)
        common = {"name": run, "logdir": self.out / "models"}
        if model.config is not None:
            verb, splits = "train", (data.unlabelled, data.labelled, "val")
            if self.settings.draws is not None:  # it is the same for all draws
                splits = (data.unlabelled, "val")
            files = tuple(existing_path(p, "config").absolute() for p in as_list(model.config))
            options = {"base": files, "t": True, **common, **model.arguments}
            environment = {DATA_VARIABLE: show_path(self.data), **model.env}
            environment |= {key: show_path(path) for key, path in given.items()}
            for file in files:
                for variable in VARIABLE.findall(file.read_text()):
                    if variable in os.environ:  # its value decides the result, too
                        environment.setdefault(variable, os.environ[variable])
        else:
            verb, files = "classify", ()
            splits = (self._draw.labelled, "val")
            options = {
                "data_dir": self.data / self._draw.labelled,
                "val_data_dir": self.data / "val",
            }
            further, needs = self._filled_options(model.classifier or {})
            options |= {**given, **common, **self._draw.seed, **further}
            environment = dict(model.env)
        return self._add(
            f"train-{run}",
            model.label or f"training of {run}",
            verb,
            options,
            [self.out / "models" / run],
            self._tiles(*splits) + self._models(*model.needs.values()) + needs,
            model.overrides,
            files=files,
            environment=environment,
            gpus=model.gpus,
        )

    def _sampling(self, name: str, largest: int) -> str:
        """The job that makes the pool of a generator, for its largest ratio."""
        generator, sampling = self.settings.generators[name], self.settings.sampling
        wanted = self._wanted(largest)
        amounts = {c: math.ceil(max(1, n) * sampling.per_wanted) for c, n in wanted.items()}
        if generator.amount is not None:
            amounts = dict.fromkeys(wanted, generator.amount)
        amount: Options = {"counts": ",".join(f"{c}={n}" for c, n in amounts.items())}
        if len(set(amounts.values())) == 1:
            amount = {"n_samples": next(iter(amounts.values()))}
        further, needs = self._filled_options({**sampling.options, **generator.sampling})
        pool = self.out / "samples" / (name + self._draw.part)
        options = {
            "resume": self.model(generator.diffusion),
            "classifier": generator.classifier and self.model(generator.classifier),
            "first_stage": generator.decoder and self.model(generator.decoder),
            **amount,
            "outdir": pool,
            **self._draw.seed,
            **further,
        }
        models = filter(None, (generator.diffusion, generator.classifier, generator.decoder))
        title = f"sampling of {generator.label or name}"
        return self._add(f"sample-{name}{self._draw.part}", title, "sample", options,
                         [pool], self._models(*models) + needs, gpus=sampling.gpus)  # fmt: skip

    def _judge(self) -> tuple[dict[str, Any], Needs]:
        """The judge as an option (`weights`, `model` or `features`), and what a job needs that uses
        it; of several networks the first."""
        judge = self.settings.judge
        if judge.features:
            texts, needs = self._filled(judge.features)
            return {"features": texts[0]}, needs
        if judge.run is not None:
            path = existing_path(judge.run, "judge.run").absolute()
            file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
            existing_path(file, "judge.run", "file")
            return {"weights": path}, Needs(data=self.checkpoints.digest(file))
        if judge.model is not None:
            return {"model": judge.model}, NOTHING
        seed = self._draw.seeds[0] if judge.seed is None or self._draw.part else judge.seed
        run, needs = self._classifier(judge.network, seed)
        return {"weights": run}, needs

    def _classifier(self, network: str | None, seed: int) -> tuple[Path, Needs]:
        """The run of a network on the labelled tiles, and what a job needs that uses it."""
        key, label, overrides = self._network(network)
        job = self._evaluation(key, label, self._draw.labelled, seed, overrides)
        return self._jobs[job].output[0], Needs((job,))

    def _features(self, name: str, sample_job: str) -> str:
        """The job that makes the features of a generator's pool, and a UMAP of them."""
        labelled, pool = self._draw.labelled, name + self._draw.part
        judge, needs = self._judge()
        settings = self.settings.judge
        options = {
            "real": self.data / labelled,
            "synthetic": self.out / "samples" / pool,
            "out": self.out / "features" / pool,
            **judge,
            **(settings.umap if settings.umap is not None else settings.options),
        }
        needs = self._tiles(labelled) + Needs((sample_job,)) + needs
        title, output = f"features and UMAP of {pool}", [self.out / "features" / pool]
        return self._add(f"features-{pool}", title, "features", options, output, needs)

    def _selection(
        self, folder: str, generator: str, selection: str, ratio: int, seed: int | None = None
    ) -> Needs:
        """What a job needs that uses a training folder; adds the job that makes it."""
        labelled, strategy = self._draw.labelled, self.settings.selection[selection]
        if folder in self._chosen:
            raise UserError(f"the judge that chooses the tiles of {folder} is trained on them")
        self._chosen.add(folder)
        candidates, needs = self._candidates(generator)
        self._chosen.remove(folder)
        if strategy.ensemble:
            for one in self._draw.seeds:
                run, classifier = self._classifier(None, one)
                candidates["features"] = [*candidates["features"], run]
                needs += classifier
        options: dict[str, Any] = {
            "real": self.data / labelled,
            **candidates,
            "ratio": ratio,
            "strategy": strategy.strategy,
            "link": self.settings.link,
            "out": self.data / folder,
        }
        output = [self.data / folder]
        if strategy.strategy == "random":
            options["seed"] = self._draw.seed.get("seed", 0) if seed is None else seed
        if strategy.sheets and strategy.strategy != "random":
            output.append(self.out / "sheets" / folder)
            options["sheets"] = output[-1]
        else:
            options["no-sheets"] = True
        needs = self._tiles(labelled) + needs
        title, options = f"selection of {folder}", {**options, **strategy.options}
        # Without a folder of scripts/vis.py the selection computes features itself.
        job = self._add(f"select-{folder}", title, "select", options, output, needs,
                        gpus=int("cache" in candidates))  # fmt: skip
        return Needs((job,))

    def _candidates(self, name: str) -> tuple[Options, Needs]:
        """The tiles of a generator, and their judge, as options of a selection."""
        unlabelled, judge = self.settings.generators[name].unlabelled, self.settings.judge
        if unlabelled is None:
            pool = name + self._draw.part
            options: Options = {"synthetic": self.out / "samples" / pool}
            needs = Needs((f"sample-{pool}",))
            if not judge.features:
                options["features"] = self.out / "features" / pool
                return options, Needs((f"features-{pool}",))
        else:
            place, needs = self._folder(unlabelled, f"generators.{name}.unlabelled")
            options = {"unlabelled": place}
        if judge.features:
            texts, models = self._filled(judge.features)
        else:
            named, models = self._judge()
            texts = [f"timm:{named['model']}" if "model" in named else named["weights"]]
        options |= {"features": texts, "val": self.data / "val", "cache": self._kept}
        options |= judge.options if judge.features else {}
        return options, needs + models + self._tiles("val")

    def _evaluation(
        self,
        key: str,
        label: str,
        folder: str,
        seed: int,
        overrides: dict[str, Any],
        needs: Needs = NOTHING,
    ) -> str:
        evaluation = self.settings.evaluation
        options = {
            "data_path": self.data,
            "output_dir": folder,
            "logdir": self.out / "eval" / key,
            **evaluation.arguments,
            **overrides,
        }
        return self._add(
            f"eval-{key}-seed{seed}",
            f"classifier on {label}, seed {seed}",
            "evaluate",
            options,
            [self.out / "eval" / key / folder / f"seed{seed}"],
            self._tiles(self._draw.labelled, "val", "test") + needs,
            ["--seed", str(seed)],
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
        for seed in seeds or self._draw.seeds:
            arm.folders[seed] = folder
            job = self._evaluation(arm.key, arm.label, folder, seed, overrides or {}, needs)
            arm.jobs[seed], arm.places[seed] = job, self._jobs[job].output[0]

    def _baseline(
        self,
        key: str,
        kind: str,
        label: str | None = None,
        options: Options | None = None,
        needs: Needs = NOTHING,
    ) -> Arm:
        """A classifier that scripts/baselines.py fits; nothing in it is random but the labels."""
        draw, labelled, results = self._draw, self._draw.labelled, self.out
        seed = draw.seed.get("seed", 0)
        results = results / "eval" if key == kind else results / "eval" / key
        arm = Arm(key + self._draw.part, label or kind.replace("_", " "), "baseline")
        arm.folders[seed], output = labelled, results / kind
        if draw.part or key != kind:
            output /= labelled
        options = {
            "data_path": self.data,
            "output_dir": labelled,
            "kind": kind,
            "logdir": results,
            **(self.settings.baselines.options.get(kind, {}) if options is None else options),
        }
        needs += self._tiles(labelled, "val", "test")
        arm.places[seed] = results / kind / labelled / "seed0"
        arm.jobs[seed] = self._add(f"baseline-{arm.key}", arm.label, "baselines",
                                   options, [output], needs)  # fmt: skip
        return arm

    def _probe(self, name: str) -> Arm:
        probe = self.settings.baselines.probes[name]
        options, needs = self._filled_options(probe.arguments)
        kind = options.pop("kind", "linear_probe")
        if kind in ("linear_probe", "label_spreading"):
            options = {"cache": self._kept, **options}
        return self._baseline(name, kind, probe.label or name, options, needs)

    def _network(self, name: str | None) -> tuple[str, str, dict[str, Any]]:
        """Key, label and options of a network on the labelled tiles; None: that of all arms."""
        if name is None:
            return REAL + self._draw.part, "real only", {}
        network = self.settings.baselines.networks[name]
        return name + self._draw.part, network.label or name, network.arguments

    def _real_arm(self, name: str | None) -> Arm:
        key, label, overrides = self._network(name)
        arm = Arm(key, label, REAL if name is None else "baseline")
        self._add_seeds(arm, self._draw.labelled, overrides=overrides)
        return arm

    def combinations(self) -> list[tuple[str, str, int]]:
        """Generator, selection and ratio of all synthetic rows."""
        grid = self.settings.grid
        names = {"generator": grid.generators, "selection": grid.selection, "ratio": grid.ratios}

        def cells(one: Cells) -> list[tuple[str, str, int]]:
            """All combinations of what is given, and of the whole grid where nothing is."""
            given = [(getattr(one, part), known) for part, known in names.items()]
            return list(product(*(known if v is None else as_list(v) for v, known in given)))

        without = {cell for one in grid.without for cell in cells(one)}
        found = [cell for cell in cells(Cells()) if cell not in without]
        return list(dict.fromkeys([*found, *(cell for one in grid.also for cell in cells(one))]))

    def _synthetic_arms(self) -> list[Arm]:
        arms, combinations, settings = [], self.combinations(), self.settings
        for name, generator in settings.generators.items():
            mine = [cell for cell in combinations if cell[0] == name]
            if not mine and generator.amount is None:
                continue
            beside: list[str] = []  # jobs
            if generator.unlabelled is None:
                sample_job = self._sampling(name, max((ratio for *_, ratio in mine), default=0))
                if not mine:
                    self.other_jobs.append(sample_job)
                    continue
                if not settings.judge.features or settings.judge.umap is not None:
                    beside.append(self._features(name, sample_job))
                beside += self._copy_check(name, sample_job)
            for _, selection, ratio in mine:
                arm = self._synthetic_arm(name, generator, selection, ratio)
                arm.other_jobs += beside
                arms.append(arm)
        return arms

    def _synthetic_arm(self, name: str, generator: Generator, selection: str, ratio: int) -> Arm:
        settings, key = self.settings, row_key(name, selection, ratio) + self._draw.part
        pseudo = generator.unlabelled is not None
        guidance = _guidance({**settings.sampling.options, **generator.sampling}, generator)
        made = {"decoder": generator.decoder or "own", "guidance": guidance}
        factors = {
            "generator": name,
            **({} if pseudo else made),
            **{k: v if isinstance(v, int) else str(v) for k, v in generator.factors.items()},
            "selection": selection,
            "ratio": ratio,
        }
        label = f"{generator.label or name}, {selection} {ratio}%"
        kind = PSEUDO if pseudo else "synthetic"
        arm = Arm(key, label, kind, factors, generator=name + self._draw.part)
        arm.wanted = sum(self._wanted(ratio).values())
        if not arm.wanted:
            raise UserError(f"ratio {ratio}: less than one tile per class; raise it")
        if settings.selection[selection].redraw and not self._draw.part:
            for seed in settings.evaluation.seeds:
                needs = self._selection(f"{key}@{seed}", name, selection, ratio, seed)
                self._add_seeds(arm, f"{key}@{seed}", needs, [seed])
        else:
            self._add_seeds(arm, key, self._selection(key, name, selection, ratio))
        if not pseudo:
            self._add_fidelity(arm)
        return arm

    def _add_fidelity(self, arm: Arm) -> None:
        """Add the fidelity of an arm: of its first draw, where there are several."""
        fidelity = self.settings.fidelity
        if fidelity is None:
            return
        folder, output = next(iter(arm.folders.values())), self.out / "fidelity" / f"{arm.key}.json"
        real, needs = self._folder(fidelity.real, "fidelity.real")
        needs += Needs((f"select-{folder}",))
        options = {"real": real, "fake": self.data / folder, "out": output, **fidelity.options}
        if fidelity.judge:
            judge, judged = self._judge()
            model = judge.get("model")
            named = f"timm:{model}" if model else judge.get("features")
            options |= {"extractor": named} if named else judge
            needs += judged
        title = f"fidelity of {arm.key}"
        job = f"fidelity-{arm.key}"
        arm.other_jobs.append(self._add(job, title, "fidelity", options, [output], needs))

    def _copy_check(self, name: str, sample_job: str) -> list[str]:
        """The job that looks for copies in a generator's pool, if there is to be one."""
        copies, data = self.settings.copies, self.settings.data
        if copies is None:
            return []
        holdout, needs = self._folder(copies.holdout, "copies.holdout")
        needs += Needs((sample_job,)) + self._tiles(data.unlabelled)
        pool = name + self._draw.part
        options = {
            "synthetic": self.out / "samples" / pool,
            "train": self.data / data.unlabelled,
            "holdout": holdout,
            "out": self.out / "copies" / pool,
            **copies.options,
        }
        if copies.judge:
            judge, judged = self._judge()
            options |= judge
            needs += judged
        job, title, output = f"copies-{pool}", f"copy check of {pool}", [self.out / "copies" / pool]
        return [self._add(job, title, "copies", options, output, needs)]

    def _ceiling_arm(self, ratio: int) -> Arm:
        unlabelled, key = self.settings.data.unlabelled, f"ceiling-{ratio}{self._draw.part}"
        options = {
            "data": self.data / unlabelled,
            "include": self.data / self._draw.labelled,
            "ratio": ratio,
            "link": self.settings.link,
            "out": self.data / key,
            **self._draw.seed,
            **self.settings.baselines.ceiling.options,
        }
        needs = self._tiles(unlabelled, self._draw.labelled)
        job = self._add(f"subset-{key}", f"{ratio}% more real tiles", "subset",
                        options, [self.data / key], needs, gpus=0)  # fmt: skip
        factors = {"selection": REAL, "ratio": ratio}
        arm = Arm(key, f"real tiles instead, {ratio}%", "ceiling", factors)
        self._add_seeds(arm, key, Needs((job,)))
        return arm


def row_key(generator: str, selection: str, ratio: int) -> str:
    """The key of a row with tiles of a generator, without its draw of labels."""
    return f"{generator}-{selection}-{ratio}"


def _add_draw(arms: dict[str, Arm], arm: Arm, draw: Draw) -> None:
    """Add what a draw of labels makes of a row to that row, which is named by the first draw."""
    key = f"{arm.key.removesuffix(draw.part)}@{draw.per_class}"
    row = arms.setdefault(
        key,
        replace(
            arm,
            key=key,
            label=f"{arm.label}, {draw.per_class} labels per class",
            factors={**arm.factors, "labels": draw.per_class},
            first=arm.key,
        ),
    )
    for mine, its in ((row.folders, arm.folders), (row.places, arm.places), (row.jobs, arm.jobs)):
        mine.update(its)
    row.other_jobs += [job for job in arm.other_jobs if job not in row.other_jobs]


def _guidance(options: dict[str, Any], generator: Generator) -> str:
    words = []
    if generator.classifier is not None:
        words.append(f"classifier {options.get('classifier_scale', 'default')}")
    if options.get("cfg_scale") is not None:
        words.append(f"labels {options['cfg_scale']}")
    return " and ".join(words) or "none"
