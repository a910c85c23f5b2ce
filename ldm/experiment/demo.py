"""The demo: an experiment with few settings, those of configs/demo/demo.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config import read_yaml
from ldm.errors import UserError
from ldm.experiment.inputs import Split
from ldm.experiment.plan import Plan
from ldm.experiment.settings import check_settings, with_override
from ldm.files import ROOT

CONFIGS = "configs/demo"
SETTINGS = f"{CONFIGS}/demo.yaml"
LABELLED = "train5"


def read_settings(overrides: Sequence[str] = (), fast: bool = False) -> dict[str, Any]:
    """The settings of configs/demo/demo.yaml, with overrides such as `sampling.scale=5`.

    Args:
        fast: Merge its `fast` section over the rest.

    Raises:
        UserError: An override that is malformed or names nothing that is there.
    """
    config = read_yaml(ROOT / SETTINGS)
    quick = config.pop("fast")
    OmegaConf.set_struct(config, True)
    if fast:
        config = OmegaConf.merge(config, quick)
    for word in overrides:
        key = word.partition("=")[0]
        try:
            changed = with_override(config, word)
            before, after = (OmegaConf.select(one, key) for one in (config, changed))
        except (UserError, OmegaConfBaseException) as error:
            raise UserError(f"{str(error).splitlines()[0]}; see {SETTINGS}") from None
        if before is None:
            raise UserError(f"{word}: there is no such setting; see {SETTINGS}")
        if _kind(before) not in ("text", _kind(after)):
            raise UserError(f"{word}: must be {_kind(before)}, as {before} in {SETTINGS}")
        config = changed
    return OmegaConf.to_container(config)


def _kind(value: Any) -> str:
    if isinstance(value, DictConfig):
        return "a section"
    if isinstance(value, ListConfig):
        return "a list"
    return "a number" if isinstance(value, int | float) else "text"


class Demo:
    """The plan of the demo, and where its results are.

    Args:
        out: Folder of all results.
        source: A user's folder with train, train5, val and test; None for procedural tiles.
        settings: See `read_settings`.

    Attributes:
        plan: Its rows and jobs.
        size: Side of a tile in pixels.
        per_class: Tiles of each class that are sampled under guidance.
        ratio: Synthetic tiles in percent of the labelled ones; lowered where too few are sampled.

    Raises:
        UserError: Something is missing in `source`, or `out` holds other files.
    """

    def __init__(self, out: Path, source: Path | None, settings: dict[str, Any]):
        self.out, self.settings = out.absolute(), settings
        self.source = source.absolute() if source else None
        self.size: int = read_yaml(ROOT / CONFIGS / "autoencoder.yaml").vars.size
        self._choose_amounts()
        self.plan = Plan(check_settings(self._experiment(), SETTINGS))

    def _choose_amounts(self) -> None:
        sampling = self.settings["sampling"]
        labelled = self.settings["tiles"]["train5"]
        if self.source is not None and (self.source / LABELLED).is_dir():
            labelled = max(Split(self.source / LABELLED).counts.values())
        self.ratio: int = self.settings["selection"]["ratio"]
        wanted = (labelled * self.ratio + 50) // 100
        self.per_class: int = sampling["per_wanted"] * max(1, wanted)
        if self.per_class > sampling["most_per_class"]:
            self.per_class = sampling["most_per_class"]
            affordable = self.per_class / sampling["per_wanted"]
            self.ratio = max(1, int(100 * affordable / labelled))

    def _experiment(self) -> dict[str, Any]:
        """The settings of the experiment that the demo is, see `ldm.experiment.settings`."""
        derived = {
            "out": str(self.out),
            "root": str(self.source or self.out / "tiles"),
            "size": self.size,
            "per_class": self.per_class,
            "ratio": self.ratio,
        }
        config = OmegaConf.create({**self.settings, "derived": derived})
        experiment = OmegaConf.to_container(config, resolve=True)["experiment"]
        if self.source is not None:
            del experiment["data"]["tiles"]
        return experiment
