"""Making the images that a folder lacks: batches, ranks, and writing beside sampling."""

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm import __version__
from ldm.devices import Ranks, one_thread, within_memory
from ldm.diffusion.samplers import Step
from ldm.files import Journal, require_space
from ldm.progress import LOG_EVERY, Bar
from ldm.run import git_revision, versions
from ldm.synthesis.folder import SampleFolder, image_row
from ldm.synthesis.guidance_log import GuidanceLog
from ldm.synthesis.sources import Sources
from ldm.synthesis.synthesiser import Confidence, Synthesiser

log = logging.getLogger(__name__)

Job = tuple[str, int]  # class and index of an image
QUEUE = 2  # sampled batches that may wait to be written: latents are small, but not free
LEAST_BYTES = 4096  # of a file on a disk
LEAST_BITS = 3  # of a pixel of a tile as PNG, which has 24: what its disk must have room for
STAGES = 8  # pictures of a class's first image on its way from noise


class SampleReport(NamedTuple):
    """What a call of `synthesise` did."""

    made: int  # images, by all processes together
    present: int  # images that were wanted and there already
    seconds: float  # wall-clock time of making them, without loading models

    @property
    def images_per_s(self) -> float:
        return self.made / self.seconds if self.made else 0.0


class Batch(NamedTuple):
    """A sampled batch, to be decoded and written."""

    jobs: list[Job]
    z_0: Tensor  # latents, (B, C, H, W)
    confidences: list[Confidence]
    guidance: GuidanceLog
    seconds: float  # that it took so far
    sources: list[str | None]  # the real tile that each image started from
    detail: Tensor | None  # that the images get from it, (B, 3, H, W)
    stages: list[tuple[str, float, Tensor]]  # class, t, expected latent of first images


class Writer:
    """Decodes and writes batches in a thread of its own, beside the sampling of the next one.

    One thread, so that batches are written in order; a GPU does both in streams of their own. What
    goes wrong in it is raised by the next `put`, or at the end.
    """

    def __init__(self, synthesiser: Synthesiser, folder: SampleFolder, journal: Journal):
        self._synthesiser = synthesiser
        self._folder = folder
        self._journal = journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._waiting: deque[Future] = deque()
        self._stream = None
        if synthesiser.device.type == "cuda":
            self._stream = torch.cuda.Stream(synthesiser.device)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while `QUEUE` others are waiting."""
        while self._waiting and (len(self._waiting) >= QUEUE or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, batch))

    def _write(self, batch: Batch) -> None:
        start = time.perf_counter()
        # The latents are complete: `latents` has looked at them.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            images = self._synthesiser.images(batch.z_0, batch.detail)
            for name, t, z_0_pred in batch.stages:
                self._folder.write_stage(name, t, self._synthesiser.images(z_0_pred[None])[0])
        files = [
            self._folder.write_image(*job, image)
            for job, image in zip(batch.jobs, images, strict=True)
        ]
        seconds = (batch.seconds + time.perf_counter() - start) / len(files)
        columns = zip(batch.jobs, files, batch.confidences, batch.sources, strict=True)
        rows = [
            image_row(*job, file=file, **opinion._asdict(), source=source, seconds=seconds)
            for job, file, opinion, source in columns
        ]
        self._journal.add({"rows": rows, "guidance": batch.guidance.record()})


def synthesise(
    synthesiser: Synthesiser,
    folder: SampleFolder,
    counts: Mapping[str, int],
    batch_size: int,
    ranks: Ranks | None = None,
    part: tuple[int, int] = (0, 1),
    sources: Sources | None = None,
) -> SampleReport:
    """Make the images 0..count-1 of each class that `folder` does not hold yet.

    Args:
        counts: Images per class, of `synthesiser.models.names`.
        batch_size: Images sampled together, of several classes where one does not fill the batch.
        ranks: Processes that share the work; this one alone by default.
        part: Share of the images to make, (i, n) for every n-th from the i-th on. Other runs may be
            making theirs in the same folder, so what is made of all images (manifest, card) is left
            to a run without parts.
        sources: Real tiles to start from, where there is a `Sampling.strength`.

    Raises:
        UserError: Sampling failed; images that were finished before are in the folder.
    """
    ranks = ranks or Ranks()
    (number, count), alone = part, part == (0, 1)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    if not alone:
        stamp += f"-{number:04d}"  # parts that start together do not share a journal
    # The same for all: each would find what the others have made already.
    there, stamp = ranks.broadcast((frozenset(folder.rows), stamp))
    wanted = len(range(number, sum(counts.values()), count))
    present = _count_present(there, counts, part)
    if present == wanted:
        if ranks.is_first and alone:
            folder.finish()
        return SampleReport(0, present, 0.0)
    if present:
        log.info("%d of %d images are there already", present, wanted)
    if ranks.is_first:
        log.info("%s", synthesiser.devices.describe())
        folder.start(alone)
    ranks.barrier()
    with _finishing(folder, ranks.is_first and alone):
        start = time.perf_counter()
        jobs = ((name, i) for name, images in counts.items() for i in range(images))
        missing = (job for job in islice(jobs, number, None, count) if job not in there)
        mine = islice(missing, ranks.rank, None, ranks.size)
        share = len(range(ranks.rank, wanted - present, ranks.size))
        with (
            folder.journal(stamp, ranks.rank, _start(synthesiser, ranks)) as journal,
            one_thread(synthesiser.device),
            within_memory(batch_size),
        ):
            quiet = not ranks.is_first
            _sample(synthesiser, folder, journal, mine, share, batch_size, quiet, sources)
        ranks.barrier()
        seconds = time.perf_counter() - start
    return SampleReport(wanted - present, present, seconds)


def require_room(
    folder: SampleFolder, counts: Mapping[str, int], part: tuple[int, int], pixels: int
) -> None:
    """Check that the disk can hold the images that `folder` lacks, even if they compress well.

    Args:
        counts, part: As in `synthesise`.
        pixels: Height and width of an image.

    Raises:
        NoRoom: There is too little room.
    """
    wanted = len(range(part[0], sum(counts.values()), part[1]))
    missing = wanted - _count_present(folder.rows, counts, part)
    size = max(LEAST_BYTES, LEAST_BITS * pixels**2 // 8)
    require_space(folder.root, missing * size, f"{missing:,} images")


@contextmanager
def _finishing(folder: SampleFolder, alone: bool) -> Iterator[None]:
    """Write what is made of all images at the end, and their list after a failure too.

    Args:
        alone: Whether this process is the one to do so.
    """
    try:
        yield
    except BaseException:
        if alone:
            folder.read()
            folder.write_manifest()
        raise
    if alone:
        folder.read()
        folder.finish()


def _count_present(there: Iterable[Job], counts: Mapping[str, int], part: tuple[int, int]) -> int:
    """How many of the images `there` are wanted; no list of all is made, there may be millions."""
    firsts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    return sum(
        index < counts.get(name, 0) and (firsts[name] + index) % part[1] == part[0]
        for name, index in there
    )


def _start(synthesiser: Synthesiser, ranks: Ranks) -> dict[str, Any] | None:
    """What is known of this start, for the card; None in all processes but the first."""
    if not ranks.is_first:
        return None
    device = synthesiser.device
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "processes": ranks.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "revision": git_revision(),
        "versions": {"histodiffusion": __version__, **versions()},
    }


def _sample(
    synthesiser: Synthesiser,
    folder: SampleFolder,
    journal: Journal,
    jobs: Iterator[Job],
    share: int,
    batch_size: int,
    quiet: bool,
    sources: Sources | None,
) -> None:
    """Make `share` images, which are this process's, batch by batch."""
    steps = len(synthesiser.pairs)
    shown_steps = {round(k * (steps - 1) / (STAGES - 1)) for k in range(STAGES)}
    options = {"unit": "img", "disable": quiet, "step": min(batch_size, share) / steps or 1}
    began = time.monotonic()
    shown = [began]  # when a log file got its last line
    with Writer(synthesiser, folder, journal) as writer, Bar(total=share, **options) as bar:

        def show(step: Step) -> None:
            """Say the step, and the time left before the first batch tells tqdm the rate."""
            bar.begun()
            if step.j in shown_steps:
                firsts = [i for i, (_, index) in enumerate(batch) if index == 0]
                stages.extend((batch[i][0], step.t, step.z_0_pred[i]) for i in firsts)
            done = bar.n + len(batch) * (step.j + 1) / steps  # images
            now = time.monotonic()
            left = (now - began) / done * (share - done)
            text = f"step {step.j + 1}/{steps}, about {Bar.format_interval(left)} left"
            # A terminal shows every sampler step; a log file gets a line now and then.
            due = bar.live or now - shown[0] > LOG_EVERY
            bar.set_postfix_str(text, refresh=due)
            if due:
                shown[0] = now

        while batch := list(islice(jobs, batch_size)):
            bar.set_description(batch[0][0], refresh=bar.live)
            start = time.perf_counter()
            labels = [synthesiser.models.label(name) for name, _ in batch]
            indices = [index for _, index in batch]
            synthesiser.guidance_log, stages = GuidanceLog(), []
            starts = detail = None
            if sources is not None:
                starts, detail = sources.start(batch, synthesiser.sampling.source_detail)
            z_0 = synthesiser.latents(labels, indices, show, starts)
            confidences = synthesiser.confidences(z_0, labels)
            seconds = time.perf_counter() - start
            files = [None if sources is None else sources.file(*job) for job in batch]
            guidance = synthesiser.guidance_log
            writer.put(Batch(batch, z_0, confidences, guidance, seconds, files, detail, stages))
            bar.update(len(batch))
