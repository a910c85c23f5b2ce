"""Tar files of finished images in the layout of WebDataset: key.png, key.cls, key.json."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from ldm.synthesis.folder import OF_IMAGE, SampleFolder, write_if_changed

NAME = "shard-{:06d}.tar"  # a file beside the class folders: a folder would count as a class
VOLATILE = ("made", "seconds")  # what two runs of the same command differ in


def write_shards(folder: SampleFolder, size: int) -> list[Path]:
    """Pack the images into OUT/shard-000000.tar, ...; the same images give the same bytes.

    The classes alternate, so each shard holds all of them as evenly as the counts allow.

    Args:
        size: Images per shard. One shard is held in memory.

    Returns:
        The shards. Others, of an earlier division, are removed.
    """
    keys = sorted(folder.rows, key=lambda key: (key[1], key[0]))
    shards = []
    for start in range(0, len(keys), size):
        path = folder.root / NAME.format(len(shards))
        write_if_changed(path, _pack(folder, keys[start : start + size]))
        shards.append(path)
    for path in folder.root.glob("shard-*.tar"):
        if path not in shards:
            path.unlink()
    return shards


def _pack(folder: SampleFolder, keys: list[tuple[str, int]]) -> bytes:
    classes = folder.settings["classes"]
    stream = io.BytesIO()
    # USTAR has no extended headers, in which a writer may put times.
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            row = folder.rows[key]
            stem = row["file"].removesuffix(".png")
            label = -1 if classes is None else classes.index(row["class"])
            about = {name: row[name] for name in OF_IMAGE if name not in VOLATILE}
            parts: Mapping[str, bytes] = {
                "png": (folder.root / row["file"]).read_bytes(),
                "cls": str(label).encode(),
                "json": json.dumps(about).encode(),
            }
            for kind, content in parts.items():
                entry = tarfile.TarInfo(f"{stem}.{kind}")  # time 0, owner 0, mode 644
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
