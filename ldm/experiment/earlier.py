"""Records of version 0.1.0: what a table finished under it need not be made again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.experiment.jobs import Job, Record, Records, content_of, deciding_words, keys_of


def convert_records(records: Records, jobs: Sequence[Job]) -> None:
    """Rewrite records of version 0.1.0 that are still valid under the present keys.

    Args:
        jobs: Each after those that it needs.
    """
    keys, stamps = keys_of(jobs), {}
    for job in jobs:
        try:
            old = json.loads(records.path(job.name).read_text())
        except (OSError, ValueError):
            continue
        if "done" in old or any(name not in stamps for name in job.after):
            continue
        if old.get("key") != _earlier_key(job, stamps):
            continue
        done = "stamp" in old
        if done:
            stamps[job.name] = old["stamp"]
        facts = {name: old[name] for name in ("number", "failed", "reason") if name in old}
        record = Record(keys[job.name], job.title, job.shown, old["seconds"], done, **facts)
        records.write(job.name, record)


def _earlier_key(job: Job, stamps: Mapping[str, str]) -> str:
    """The key that version 0.1.0 gave a job; `stamps` are of the jobs before it."""
    facts: list[Any] = ["", deciding_words(job.command), dict(job.environment), job.data]
    facts += [content_of(path) for path in job.files]
    facts += [stamps[name] for name in job.after]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
