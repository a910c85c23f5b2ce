"""What tiles and checkpoints are there, and whether they are still the same ones."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ldm.data.images import class_folders, is_image, walk
from ldm.errors import UserError
from ldm.files import digest_of_text, file_sha256, write_json

log = logging.getLogger(__name__)

LARGE = 1 << 30  # bytes; reading such a file takes a while


@dataclass(frozen=True)
class Split:
    """A folder of tiles, looked at once."""

    root: Path

    @cached_property
    def identity(self) -> str:
        """Digest of names, sizes and times of all tiles, without reading them."""
        found = [f.path / name for f in walk(self.root, is_image) for name in f.files]
        facts = [(p.relative_to(self.root), p.stat()) for p in found]
        return digest_of_text(f"{p} {s.st_size} {s.st_mtime_ns}\n" for p, s in facts)

    @property
    def is_empty(self) -> bool:
        """Whether there are no tiles."""
        return not any(folder.files for folder in walk(self.root, is_image))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Tiles by class folder; a UserError where there are no such folders, or one is empty."""
        counts = {
            name: sum(len(folder.files) for folder in walk(self.root / name, is_image))
            for name in class_folders(self.root)
        }
        if len(counts) < 2:
            raise UserError(f"{self.root} has {len(counts)} class folders; a labelled set has two")
        empty = [name for name, count in counts.items() if not count]
        if empty:
            raise UserError(f"{self.root}: no tiles in {', '.join(empty)}; add some, or remove it")
        return counts


class Checkpoints:
    """Digests of checkpoint files, kept in `memory`; a file that changes is read again."""

    def __init__(self, memory: Path):
        self.memory = memory
        try:
            self.known: Mapping = json.loads(memory.read_text())
        except (OSError, ValueError):
            self.known = {}

    def digest(self, path: Path) -> str:
        """SHA-256 of a file."""
        status = path.stat()
        name, facts = str(path), [status.st_size, status.st_mtime_ns]
        entry = self.known.get(name)
        if entry and entry["file"] == facts:
            return entry["sha256"]
        if status.st_size > LARGE:
            log.info("reading %s once, to know it again", path)
        digest = file_sha256(path)
        self.known = {**self.known, name: {"file": facts, "sha256": digest}}
        write_json(self.memory, self.known)
        return digest
