"""Several corpora as one training set, each with its own storage and weight."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from ldm.cli import checked
from ldm.data.index import CorpusIndex
from ldm.data.storage import LAYOUTS, layout_of
from ldm.data.tiles import Tiles, Weighted, tiles_below
from ldm.errors import Problems, UserError

log = logging.getLogger(__name__)


def _given(value: Any) -> Any:
    if not value:
        raise ValueError(f"{value!r} is no folder; give the corpus's folder, or a list of them")
    return value


Root = Annotated[Path, BeforeValidator(_given), AfterValidator(Path.expanduser)]


@dataclass(frozen=True, kw_only=True)
class Corpus(Weighted):
    """Settings of one corpus."""

    root: Root | Annotated[tuple[Root, ...], BeforeValidator(_given)]
    layout: Literal["folder", "array", "shards", "slides"] | None = None  # None: see `Corpora`
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] = 1.0
    index: Path | None = None

    @classmethod
    def from_settings(cls, name: str, settings: Any) -> "Corpus":
        """Check what stands under `corpora.NAME`."""
        where = f"corpora.{name}"
        if not name or "/" in name:
            raise UserError(f"{where}: a corpus needs a name without slashes")
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}={settings!r} must be a mapping, such as {{root: DIR}}")
        try:
            return checked(cls, {**settings, "name": name})
        except Problems as error:
            found = {f"{where}.{key}": text for key, text in error.found.items()}
            raise Problems(found) from None

    @property
    def roots(self) -> tuple[Path, ...]:
        return self.root if isinstance(self.root, tuple) else (self.root,)


class Corpora(Tiles):
    """Tiles of several corpora: folders, arrays, tar shards and slides (see `ldm.data.storage`).

    A corpus of n tiles and weight w is drawn round(w n) times in a pass. Pass e takes the draws
    e round(w n) ... (e + 1) round(w n) - 1 of an endless sequence of permutations of its tiles, a
    function of the seed and the corpus's name. So with weight 1 every tile comes exactly once per
    pass; with weight 2 twice, augmented differently; with weight 0.5 every tile comes once in two
    passes. The draws of all corpora are shuffled together by the sampler. Hold-out (before
    weighting) and validation see every tile once.

    Tiles are named CORPUS/path, so a `group_regex` can tell corpora apart. Without a `group_regex`
    tiles of one group of an index are held out together.

    Attributes:
        corpora: Settings of the corpora, in the order of the configuration.

    Args:
        corpora: By name, a mapping of
            `root`: a folder or several;
            `layout`: one of `ldm.data.storage.LAYOUTS`; if omitted, the layout of the index, else
                "array" for a file of arrays and "folder" for a folder;
            `weight`: 1 if omitted;
            `index`: file that scripts/index_corpus.py wrote for the same roots; None walks the
                folders and reads the headers of shards at every start.
            A corpus that is null is left out.
        labelled: Whether tiles have a class: their first folder, the `.cls` member of a shard or
            the labels of an array.
        size ... resize: See `ldm.data.tiles.Tiles`; "auto" checks unless all corpora have an index.

    Raises:
        UserError: A value is not allowed, a corpus is missing or empty, an index no longer fits its
            folders, or a file is damaged.
    """

    def __init__(
        self,
        corpora: Mapping[str, Mapping[str, Any] | None],
        size: int,
        labelled: bool = False,
        classes: Sequence[str] | None = None,
        augment: Sequence[str | Mapping] | None = None,
        crop: Literal["center", "random"] = "center",
        check: bool | Literal["auto"] = "auto",
        cache: bool = False,
        preprocess: Sequence[Mapping] | None = None,
        resize: bool = True,
    ):
        super().__init__(size, labelled, classes, augment, crop, check, cache, preprocess, resize)
        self.corpora = [
            Corpus.from_settings(name, settings)
            for name, settings in corpora.items()
            if settings is not None
        ]
        if not self.corpora:
            raise UserError("corpora: no corpus is given; give at least one, NAME: {root: DIR}")
        self._corpus_of_root: list[int] = []
        self.groups = []
        names: list[str | None] = []
        for number, corpus in enumerate(self.corpora):
            index = corpus.index and CorpusIndex.of_roots(corpus.index, corpus.roots, corpus.layout)
            for i, root in enumerate(corpus.roots):
                layout = LAYOUTS[index.layout if index else corpus.layout or layout_of(root)]
                table = tiles_below(root, layout, index, i)
                self._add(root, layout, table, f"{corpus.name}/")
                self.groups += [f"{corpus.name}/{group}" for group in table["group"]]
                names += table["label"]
                self._corpus_of_root.append(number)
        self._add_labels("corpora: classes", names)
        for corpus, count in zip(self.corpora, self.tiles_per_corpus(), strict=True):
            drawn = f"{count:,} tiles x weight {corpus.weight:g} = {corpus.pass_length(count):,}"
            log.info("corpus %s: %s per pass", corpus.name, drawn)
        self._finish(all(corpus.index for corpus in self.corpora))

    def corpus_numbers(self) -> np.ndarray:
        return np.array(self._corpus_of_root)[self._places["root"]]
