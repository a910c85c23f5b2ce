"""Several corpora as one training set, each with its own storage and weight."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.index import CorpusIndex
from ldm.data.storage import LAYOUTS, Layout, Place, find_files, read_place
from ldm.data.tile_files import matching_classes
from ldm.data.tiles import Tiles, Weighted
from ldm.errors import UserError

log = logging.getLogger(__name__)

# Where a tile is stored, an array of numbers since there may be millions: its root, its file among
# those that hold several tiles (-1: a file of its own), see `ldm.data.storage.Place`.
PLACES = [("root", np.int16), ("file", np.int64), ("offset", np.int64), ("size", np.int64)]
SETTINGS = ("root", "layout", "weight", "index")


@dataclass(frozen=True)
class Corpus(Weighted):
    """Settings of one corpus."""

    roots: list[Path]
    layout: str | None  # None: the layout of the index, or "folder" if there is no index
    index: Path | None

    @classmethod
    def from_settings(cls, name: str, settings: Any) -> "Corpus":
        """Check what stands under `corpora.NAME`.

        Raises:
            UserError: A name is unknown, or a value is not allowed.
        """
        where = f"corpora.{name}"
        if not name or "/" in name:
            raise UserError(f"{where}: a corpus needs a name without slashes")
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}={settings!r} must be a mapping of {', '.join(SETTINGS)}")
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise UserError(f"{where}.{unknown[0]}: unknown name (allowed: {', '.join(SETTINGS)})")
        root, index = settings.get("root"), settings.get("index")
        roots = [root] if isinstance(root, str | os.PathLike | None) else root
        if not isinstance(roots, Sequence) or not roots or not all(roots):
            raise UserError(f"{where}.root={root!r}: give the corpus's folder, or a list of them")
        weight = settings.get("weight", 1.0)
        usable = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not usable or not 0 < weight < math.inf:
            raise UserError(
                f"{where}.weight={weight!r} must be a number above 0; remove a corpus with"
                f" corpora.{name}=null"
            )
        layout = settings.get("layout")
        if layout not in (None, *LAYOUTS):
            raise UserError(f"{where}.layout={layout!r}: choose among {', '.join(LAYOUTS)}")
        roots = [Path(root).expanduser() for root in roots]
        return cls(name, float(weight), roots, layout, Path(index) if index else None)


class Corpora(Tiles):
    """Tiles of several corpora: folders, arrays and tar shards (see `ldm.data.storage`).

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
            `layout`: "folder", "array" or "shards"; if omitted, the layout of the index, or
                "folder" without an index;
            `weight`: 1 if omitted;
            `index`: file that scripts/index_corpus.py wrote for the same roots; None walks the
                folders and reads the headers of shards at every start.
            A corpus that is null is left out.
        size, augment, crop, preprocess, resize: See `ldm.data.tiles.Tiles`.
        labelled: Whether tiles have a class: their first folder, the `.cls` member of a shard or
            the types.npy of an array.
        classes, check, cache: See `ldm.data.tiles.TileFolder`; "auto" decodes tiles unless all
            corpora have an index.

    Raises:
        UserError: A value is not allowed, a corpus is missing or empty, an index no longer fits its
            folders, or a file is damaged.
    """

    _PER_TILE = (*Tiles._PER_TILE, "_places")

    def __init__(
        self,
        corpora: Mapping[str, Mapping[str, Any] | None],
        size: int,
        labelled: bool = False,
        classes: Sequence[str] | None = None,
        augment: Sequence[str | Mapping] | None = None,
        crop: str = "center",
        check: bool | str = "auto",
        cache: bool = False,
        preprocess: Sequence[Mapping] | None = None,
        resize: bool = True,
    ):
        super().__init__(size, augment, crop, preprocess, resize)
        if classes is not None and not labelled:
            raise UserError(f"classes={list(classes)}: classes need labelled=true")
        self.corpora = [
            Corpus.from_settings(name, settings)
            for name, settings in corpora.items()
            if settings is not None
        ]
        if not self.corpora:
            raise UserError("corpora: no corpus is given; give at least one, NAME: {root: DIR}")
        self._roots: list[tuple[Path, Layout]] = []
        self._corpus_of_root: list[int] = []
        self._files: list[str] = []  # that hold several tiles
        self._places = np.zeros(0, PLACES)
        self.groups = []
        names: list[str | None] = []
        for number, corpus in enumerate(self.corpora):
            names += self._add_corpus(number, corpus)
        self._take_labels(names if labelled else None, classes)
        for corpus, count in zip(self.corpora, self.tiles_per_corpus(), strict=True):
            drawn = f"{count:,} tiles x weight {corpus.weight:g} = {corpus.pass_length(count):,}"
            log.info("corpus %s: %s per pass", corpus.name, drawn)
        if check == "auto" and all(corpus.index for corpus in self.corpora):
            check = False  # the scan has decoded every tile
        self._finish(check, cache)

    def _add_corpus(self, number: int, corpus: Corpus) -> list[str | None]:
        """Add the tiles of a corpus; returns the names of their classes."""
        names: list[str | None] = []
        index = corpus.index and CorpusIndex.of_roots(corpus.index, corpus.roots, corpus.layout)
        layout = LAYOUTS[index.layout if index else corpus.layout or "folder"]
        for i, root in enumerate(corpus.roots):
            if index is not None:
                table = index.tiles(i)
                known = zip(table["group"], table["path"], strict=True)
                groups = [group or path for group, path in known]
            else:
                places = [p for f in find_files(root, layout)[0] for p in layout.places(root, f)]
                if not places:
                    raise UserError(f"corpus {root}: its {layout.kind} hold no tiles")
                table = dict(zip(Place._fields, map(list, zip(*places, strict=True)), strict=True))
                groups = table["path"]
            holders = sorted(set(table["file"]) - set(table["path"]))  # files of several tiles
            number_of = {file: len(self._files) + n for n, file in enumerate(holders)}
            self._files += holders
            self.relative_paths += [f"{corpus.name}/{path}" for path in table["path"]]
            self.groups += [f"{corpus.name}/{group}" for group in groups]
            names += table["label"]
            places = np.zeros(len(groups), PLACES)
            places["root"] = len(self._roots)
            places["file"] = [number_of.get(file, -1) for file in table["file"]]
            places["offset"], places["size"] = table["offset"], table["size"]
            self._places = np.concatenate([self._places, places])
            self._roots.append((root, layout))
            self._corpus_of_root.append(number)
        return names

    def _take_labels(
        self, names: Sequence[str | None] | None, classes: Sequence[str] | None
    ) -> None:
        if names is None:
            self.labels = [-1] * len(self)
            return
        if None in names:
            raise UserError(
                f"labelled=true: no class is known of {self.relative_paths[names.index(None)]};"
                " put tiles into class folders"
            )
        found = sorted(set(names))
        self.classes = matching_classes("corpora: classes", found, classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = [label_of[name] for name in names]

    def corpus_numbers(self) -> np.ndarray:
        return np.array(self._corpus_of_root)[self._places["root"]]

    def _place(self, index: int) -> tuple[Path, Layout, Place]:
        root, file, offset, size = self._places[index].tolist()
        path = self.relative_paths[index].split("/", 1)[1]
        place = Place(path, path if file < 0 else self._files[file], offset, size, None)
        return *self._roots[root], place

    def read(self, index: int) -> np.ndarray:
        root, layout, place = self._place(index)
        return read_place(root, layout, place)

    def path(self, index: int) -> str:
        root, _, place = self._place(index)
        return str(root / place.path)
