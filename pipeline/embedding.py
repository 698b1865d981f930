"""Embedding one shard: read ahead, encode, write, commit. It knows no scheduler.

Bits are promised for equal batch sizes. So a shard has one batch size throughout, from its first frame: when the
device runs out of memory, the shard is begun again with smaller batches, and its commit record says so. The
next shard begins with the store's batch again, so that what a shard holds does not depend on what ran before.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.pipeline.decoding import ShardReader
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, suitable_threads
from pvrpipe.pipeline.memory import kept_memory, no_room, smaller
from pvrpipe.pipeline.transfers import READ_AHEAD, download
from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import EncodingError, PvrpipeError
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.casting import storable
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.writing import CheckedRows, ShardWriter

COMMITS = 4  # shards that are committed while another is encoded; each holds what its disk lacks
CHECKERS = 2  # threads that cast and count a batch each; one alone lets a GPU wait for a ResNet-50 at 64 px


@dataclass(frozen=True)
class Target:
    """One embedding store to fill: with which encoder, and which of its shards are still missing."""

    request: EncoderRequest
    folder: Path
    manifest: Manifest
    specification: EmbeddingSpecification
    todo: frozenset[int]


@dataclass
class ShardOutcome:
    """What became of one shard, and what it cost in seconds, all targets together."""

    shard: int
    rows: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    model_seconds: dict[str, float] = field(default_factory=dict)
    """of each store that the shard was committed to, by its folder"""
    failures: list[PvrpipeError] = field(default_factory=list)


Commit = Callable[[], ShardOutcome]


class OutOfRoomError(Exception):
    """The device's memory does not suffice for a batch of this encoder."""

    def __init__(self, work: Work) -> None:
        super().__init__(work.encoder.identity.name)
        self.work = work


@dataclass
class Work:
    """One target's share of a shard."""

    target: Target
    encoder: Encoder
    writer: ShardWriter
    failed: bool = False


@dataclass(frozen=True)
class Encoded:
    """A batch of embeddings for one target."""

    work: Work
    rows: dict[str, Rows]
    embedding: Callable[[], NDArray[np.float32]]
    """waits for them, and gives them"""
    seconds: float
    """that it took to encode them, or on a GPU to tell it to"""


@dataclass
class Threads:
    """Those that see to batches on their way from the device, while it encodes the next ones."""

    checking: Executor
    writing: Executor
    """one thread, so in order"""
    committing: Executor
    arrived: float = 0.0
    """when the last batch had come from the device; two threads wait at a time, and a second counts once"""


@contextlib.contextmanager
def _threads() -> Iterator[Threads]:
    """To commit is to wait for the disk: beside the rest, or the next shard and with it the device would wait too."""
    with (
        ThreadPoolExecutor(CHECKERS, thread_name_prefix="check") as checking,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writing,
        ThreadPoolExecutor(COMMITS, thread_name_prefix="commit") as committing,
    ):
        yield Threads(checking, writing, committing)


class ShardEmbedder:
    """Embeds shards of one rollout store for several targets, decoding every frame once.

    Raises:
        EncodingError: an encoder here is not the one that the store was begun with.
    """

    def __init__(self, rollouts: Place | str, targets: Sequence[Target]) -> None:
        self.store = Store.open(rollouts, kind="rollouts", prove=True)
        self.targets = targets
        self.encoders = [Encoder(target.request) for target in targets]
        frame = self.store.column("frame").shape
        for target, encoder in zip(targets, self.encoders, strict=True):
            _refuse_another(target.specification, encoder, frame)
            encoder.replay(frame)
        self._reader = ShardReader(self.store, self.encoders[0].device)

    def attempt(self, shard: int) -> ShardOutcome:
        """Embed one shard and commit it in every store that lacks it.

        What stops it is in its outcome, and does not stop others: frames that cannot be read (episode and step are
        named), for one store an embedding that is not finite or does not fit its dtype.
        """
        (outcome,) = self.each([shard])
        return outcome

    def each(self, shards: Sequence[int]) -> Iterator[ShardOutcome]:
        """As :meth:`attempt` on each, in order; while one is encoded, those before are committed, the next is read."""
        with (
            _threads() as threads,
            kept_memory(self.encoders[0].device),
            self._reader.ahead([(shard, self._largest(shard)) for shard in shards]),
        ):
            committed: deque[Future[ShardOutcome]] = deque()
            for shard in shards:
                committed.append(self._attempted(shard, threads))
                if len(committed) > COMMITS:
                    yield committed.popleft().result()
            while committed:
                yield committed.popleft().result()

    def _largest(self, shard: int) -> int:
        """Rows of a shard that are read at a time: what the largest batch takes of those that it is embedded in."""
        return max(t.specification.computation.batch for t in self.targets if shard in t.todo)

    def _attempted(self, shard: int, threads: Threads) -> Future[ShardOutcome]:
        """Encode a shard; what becomes of it is told when it is committed."""

        def failed(error: PvrpipeError) -> ShardOutcome:
            return ShardOutcome(shard, failures=[error])

        try:
            commit = self._computed(shard, threads)
        except PvrpipeError as error:
            return threads.committing.submit(failed, error)

        def committed() -> ShardOutcome:
            try:
                return commit()
            except PvrpipeError as error:
                return failed(error)

        return threads.committing.submit(committed)

    def _computed(self, shard: int, threads: Threads) -> Commit:
        """Embed a shard with batches that fit; what remains to be done is to commit it."""
        batches = [target.specification.computation.batch for target in self.targets]
        while True:
            for encoder, batch in zip(self.encoders, batches, strict=True):
                encoder.batch = batch
            try:
                with suitable_threads(self.encoders[0].device):
                    return self._at_these_batches(shard, threads)
            except OutOfRoomError as error:
                index = self.encoders.index(error.work.encoder)
            if batches[index] == 1:
                raise no_room(self.encoders[index])
            batches[index] = smaller(batches[index])
            if self.encoders[index].device.type == "cuda":
                torch.cuda.empty_cache()

    def _at_these_batches(self, shard: int, threads: Threads) -> Commit:
        outcome = ShardOutcome(shard)
        plan, records = self.store.manifest.plan[shard], self.store.records(shard)
        with contextlib.ExitStack() as stack:
            works = [
                Work(t, e, stack.enter_context(ShardWriter(t.folder, t.manifest, plan, records)))
                for t, e in zip(self.targets, self.encoders, strict=True)
                if shard in t.todo
            ]
            for work in works:
                outcome.model_seconds[str(work.target.folder)] = 0.0
            under_way: deque[Future[None]] = deque()
            stack.callback(wait, under_way)  # before a writer is closed
            with contextlib.closing(self._encoded(works, outcome)) as encoded:
                for batch in encoded:
                    checked = threads.checking.submit(_checked, batch)
                    under_way.append(threads.writing.submit(_write, batch, checked, outcome, threads))
                    if len(under_way) > READ_AHEAD:
                        under_way.popleft().result()
            sizes = [work.encoder.batch for work in works]
            writers = stack.pop_all()

        def commit() -> ShardOutcome:
            with writers:
                for written in under_way:
                    written.result()
                for work, batch in zip(works, sizes, strict=True):
                    if not work.failed:
                        usual = work.target.specification.computation.batch
                        with timed(outcome, "write_seconds"):
                            work.writer.commit(batch=batch if batch != usual else None)
            return outcome

        return commit

    def _encoded(self, works: Sequence[Work], outcome: ShardOutcome) -> Generator[Encoded, None, None]:
        """Batches of embeddings on their way from the device, and the rows beside them.

        Each encoder has batches of its own size, whichever encoders it shares the frames with.
        """
        largest = max(works, key=lambda work: work.encoder.batch)
        batches = self._reader.batches(outcome.shard, largest.encoder.batch)
        try:
            with contextlib.closing(batches):
                for decoded in batches:
                    frames = decoded.frames()
                    outcome.rows += len(frames)
                    outcome.read_seconds += decoded.seconds
                    for work in works:
                        for at in range(0, len(frames), work.encoder.batch):
                            if work.failed:
                                break
                            part = slice(at, at + work.encoder.batch)
                            rows = {name: column[part] for name, column in decoded.rows.items()}
                            began = time.perf_counter()
                            embedding = download(_encode(work, frames[part]))
                            yield Encoded(work, rows, embedding, time.perf_counter() - began)
        except torch.OutOfMemoryError:
            raise OutOfRoomError(largest) from None


def _refuse_another(made: EmbeddingSpecification, encoder: Encoder, frame: tuple[int, ...]) -> None:
    """Workers of a cluster may have other weights at that path, or another GPU."""
    here = encoder.computation.model_copy(update={"batch": made.computation.batch})
    identity = encoder.identity_on(*frame[:2])
    differ = differences(made.encoder.model_dump(), identity.model_dump(), "on this worker")
    differ = differ or differences(made.computation.model_dump(), here.model_dump(), "on this worker")
    if differ:
        raise EncodingError(
            f"{made.encoder.name}: {differ}; let workers be alike, and reach the same files under the same path"
        )


def _encode(work: Work, frames: Tensor) -> Tensor:
    try:
        return work.encoder.encode(frames)
    except torch.OutOfMemoryError:
        raise OutOfRoomError(work) from None


@dataclass(frozen=True)
class Checked:
    """A batch as it is stored; from when to when it was waited for, and the seconds that it took to check it."""

    rows: CheckedRows
    awaited: float
    arrived: float
    seconds: float


def _checked(batch: Encoded) -> Checked:
    awaited = time.perf_counter()
    embedding = batch.embedding()
    arrived = time.perf_counter()
    made = batch.work.target.specification
    stored = stored_as(embedding, made.dtype, made.encoder.name, batch.rows)
    rows = batch.work.writer.checked({**batch.rows, "embedding": stored})
    return Checked(rows, awaited, arrived, time.perf_counter() - arrived)


def _write(batch: Encoded, checked: Future[Checked], outcome: ShardOutcome, threads: Threads) -> None:
    work = batch.work
    if work.failed:
        return
    with _failing(work, outcome):
        found = checked.result()
        waited = max(0.0, found.arrived - max(found.awaited, threads.arrived))
        threads.arrived = max(found.arrived, threads.arrived)
        outcome.model_seconds[str(work.target.folder)] += batch.seconds + waited
        outcome.write_seconds += found.seconds
        with timed(outcome, "write_seconds"):
            work.writer.append(found.rows)


def stored_as(embedding: NDArray[np.float32], dtype: str, encoder: str, rows: Mapping[str, Rows]) -> Rows:
    """Embeddings (n, D) in the dtype of the store; nothing overflows in silence.

    Made by torch: the same halves take NumPy 28 times as long.
    """
    cast: Rows = torch.from_numpy(embedding).to(getattr(torch, dtype)).numpy()
    return storable(cast, embedding, rows, encoder, "embed with --dtype float32")


@contextlib.contextmanager
def _failing(work: Work, outcome: ShardOutcome) -> Iterator[None]:
    """Let an embedding that cannot be stored stop the shard for its own store."""
    try:
        yield
    except EncodingError as error:
        work.failed = True
        outcome.failures.append(error)
        del outcome.model_seconds[str(work.target.folder)]


@contextlib.contextmanager
def timed(outcome: ShardOutcome, name: str) -> Iterator[None]:
    """Add the seconds spent inside to ``outcome.name``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(outcome, name, getattr(outcome, name) + time.perf_counter() - started)
