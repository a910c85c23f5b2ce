"""Tar files of finished images in the layout of WebDataset: key.png, key.cls, key.json."""

import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ldm.data.shards import NAME, write_tar
from ldm.synthesis.folder import OF_IMAGE, SampleFolder, write_if_changed

VOLATILE = ("made", "seconds")  # what two runs of the same command differ in


def write_shards(folder: SampleFolder, size: int) -> list[Path]:
    """Pack the images into OUT/shard-000000.tar, ...; the same images give the same bytes.

    They lie beside the class folders: a folder of them would count as a class.

    The classes alternate, so each shard holds all of them as evenly as the counts allow.

    Args:
        size: Images per shard. One shard is held in memory.

    Returns:
        The shards. Others, of an earlier division, are removed.
    """
    keys = sorted(folder.rows, key=lambda key: (key[1], key[0]))
    shards = []
    for start in range(0, len(keys), size):
        path, stream = folder.root / NAME.format(len(shards)), io.BytesIO()
        members = (_members(folder, key) for key in keys[start : start + size])
        write_tar(stream, chain.from_iterable(members))
        write_if_changed(path, stream.getvalue())
        shards.append(path)
    for path in folder.root.glob("shard-*.tar"):
        if path not in shards:
            path.unlink()
    return shards


def _members(folder: SampleFolder, key: tuple[str, int]) -> Iterator[tuple[str, bytes]]:
    classes, row = folder.settings["classes"], folder.rows[key]
    stem = row["file"].removesuffix(".png")
    label = -1 if classes is None else classes.index(row["class"])
    about = {name: row[name] for name in OF_IMAGE if name not in VOLATILE}
    yield f"{stem}.png", (folder.root / row["file"]).read_bytes()
    yield f"{stem}.cls", str(label).encode()
    yield f"{stem}.json", json.dumps(about).encode()
