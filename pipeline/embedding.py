"""Embedding one shard: read ahead, encode, write, commit. A plain callable that knows no scheduler."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, compute_deterministically
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.manifest import EmbeddingSpecification, Manifest
from pvrpipe.store.casting import cast_embedding
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.writing import ShardWriter

READ_AHEAD = 2  # batches that wait, decoded, for the device
CARRIED = ("action", "reward", "state")  # columns that an embedding store takes over as they are


@dataclass(frozen=True)
class Target:
    """One embedding store to fill: with which encoder, and which of its shards are still missing."""

    request: EncoderRequest
    folder: Path
    manifest: Manifest
    specification: EmbeddingSpecification
    todo: frozenset[int]


@dataclass
class ShardTimes:
    """What one shard cost, in seconds, all targets together."""

    shard: int
    rows: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    model_seconds: dict[str, float] = field(default_factory=dict)


class ShardEmbedder:
    """Embeds shards of one rollout store for several targets, decoding every frame once."""

    def __init__(self, rollouts: Place | str, targets: Sequence[Target]) -> None:
        self.store = Store.open(rollouts, kind="rollouts", prove=True)
        self.targets = targets
        self.encoders = [Encoder(target.request) for target in targets]
        compute_deterministically(self.encoders[0].device)

    def __call__(self, shard: int) -> ShardTimes:
        """Embed one shard and commit it in every store that lacks it.

        Raises:
            EncodingError: an embedding is not finite or does not fit its dtype; names episode and step.
        """
        wanted = [(t, e) for t, e in zip(self.targets, self.encoders, strict=True) if shard in t.todo]
        times = ShardTimes(shard, model_seconds={t.specification.encoder.name: 0.0 for t, _ in wanted})
        with contextlib.ExitStack() as stack:
            plan = self.store.manifest.plan[shard]
            records = self.store.records(shard)
            writers = [
                stack.enter_context(ShardWriter(t.folder, t.manifest, plan, records)) for t, _ in wanted
            ]
            for rows in read_ahead(self._batches(shard, times)):
                frames = rows.pop("frame").astype(np.uint8, copy=False)
                times.rows += len(frames)
                for (target, encoder), writer in zip(wanted, writers, strict=True):
                    self._embed(target, encoder, writer, frames, rows, times)
            for writer in writers:
                with timed(times, "write_seconds"):
                    writer.commit()
        return times

    def attempt(self, shard: int) -> ShardTimes | PvrpipeError:
        """As calling it, but a shard that cannot be embedded does not stop the others."""
        try:
            return self(shard)
        except PvrpipeError as error:
            return error

    def _batches(self, shard: int, times: ShardTimes) -> Iterator[dict[str, Rows]]:
        """Decoded batches of a shard; they never cross into the next."""
        columns = [name for name in self.store.columns if name != "physics"]
        batches = self.store.shard(shard).batches(columns, max(e.batch for e in self.encoders))
        while True:
            with timed(times, "read_seconds"):
                rows = next(batches, None)
            if rows is None:
                return
            yield rows

    @staticmethod
    def _embed(
        target: Target,
        encoder: Encoder,
        writer: ShardWriter,
        frames: NDArray[np.uint8],
        rows: Mapping[str, Rows],
        times: ShardTimes,
    ) -> None:
        specification = target.specification
        started = time.perf_counter()
        pieces = [encoder(frames[at : at + encoder.batch]) for at in range(0, len(frames), encoder.batch)]
        times.model_seconds[specification.encoder.name] += time.perf_counter() - started
        with timed(times, "write_seconds"):
            stored = stored_as(np.concatenate(pieces), specification.dtype, specification.encoder.name, rows)
            writer.write_rows({**rows, "embedding": stored})


def stored_as(embedding: NDArray[np.float32], dtype: str, encoder: str, rows: Mapping[str, Rows]) -> Rows:
    """Embeddings (n, D) in the dtype of the store; nothing overflows in silence."""
    return cast_embedding(embedding, dtype, rows, encoder, "embed with --dtype float32")


def read_ahead(batches: Iterator[dict[str, Rows]]) -> Iterator[dict[str, Rows]]:
    """Run an iterator in a thread, a few items ahead; its errors are raised here."""
    ready: queue.Queue[dict[str, Rows] | BaseException | None] = queue.Queue(READ_AHEAD)
    stopped = threading.Event()

    def put(item: dict[str, Rows] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in batches:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


@contextlib.contextmanager
def timed(times: ShardTimes, name: str) -> Iterator[None]:
    """Add the seconds spent inside to ``times.name``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(times, name, getattr(times, name) + time.perf_counter() - started)
