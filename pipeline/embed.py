"""``pvrpipe embed``: a rollout store to one embedding store per PVR, the frames decoded once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pvrpipe.pipeline.drafting import (
    Draft,
    EmbedConfig,
    begun_on,
    draft,
    is_unfinished,
    made_by,
    readable,
    refuse_full_disk,
    workers_of,
)
from pvrpipe.pipeline.embedding import ShardEmbedder, ShardOutcome, Target
from pvrpipe.pipeline.encoders import EncoderRequest, device_named
from pvrpipe.pipeline.golden import golden_frames
from pvrpipe.pipeline.memory import SHARE, free_memory, passes
from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError, PvrpipeError
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.building import PendingStore
from pvrpipe.store.places import Place, refuse_source
from pvrpipe.store.reading import Store

__all__ = ["EmbedConfig", "EmbedEstimate", "EmbedResult", "embed", "estimate"]

TOLD = 4  # failures beside the first that are told in full


@dataclass(frozen=True)
class EmbedResult:
    """One embedding store, and what it cost."""

    store: Path
    id: str
    pvr: str
    shape: tuple[int, ...]
    rows: int
    shards: int
    resumed_shards: int
    bytes: int
    seconds: float
    frames_per_second: float
    model_seconds: float
    read_seconds: float
    write_seconds: float
    random_weights: bool
    batch: int
    smaller_batches: int
    """shards for which memory did not suffice"""
    memory_bytes: int
    """of the device: weights, and the most that a batch took beside them"""


@dataclass(frozen=True)
class EmbedEstimate:
    """One embedding store that is to be made, and what it will cost."""

    store: Path
    pvr: str
    shape: tuple[int, ...]
    shards: int
    """that are missing"""
    rows: int
    bytes: int
    batch: int
    frames_per_second: float
    """of all workers, if they add up"""
    workers: int
    hours: float


def embed(
    rollouts: Place | str,
    outputs: Sequence[tuple[EncoderRequest, Path]],
    config: EmbedConfig,
    progress: Progress = silent,
    revision: int | None = None,
) -> list[EmbedResult]:
    """Embed every frame of a rollout store, or of an earlier revision, with each encoder; resumes what was begun.

    Stores that are to grow, and were not finished when their rollouts grew, are finished as they were begun first.

    Raises:
        NotAStoreError, WeightsError, OutputExistsError, StoreError: before anything is written.
        EncodingError, StoreError: a shard could not be embedded; the others are committed, and stores that
            lack none are finished.
    """
    started = time.perf_counter()
    for output, begun in _left_behind(rollouts, outputs, config, revision):
        embed(rollouts, [output], config, progress, begun)
    store, drafts = _drafted(rollouts, outputs, config, revision)
    refuse_full_disk(store, drafts)
    with contextlib.ExitStack() as stack:
        pending = [stack.enter_context(PendingStore.begin(d.folder, d.manifest, d.overwrite)) for d in drafts]
        targets = [
            Target(d.request, p.folder, p.manifest, made_by(p.manifest), frozenset(t.shard for t in p.todo))
            for d, p in zip(drafts, pending, strict=True)
        ]
        size = f"about {readable(sum(d.bytes(store) for d in drafts))} to write"
        outcomes = _run(rollouts, _passes(drafts, targets, config), config, store, progress, size)
        failures = [failure for outcome in outcomes for failure in outcome.failures]
        sealed = [_sealed(store, p) for p in pending if not failures or p.is_whole]
        _raise_first(failures)
        seconds = time.perf_counter() - started
        return [
            _result(d, p, manifest, outcomes, seconds)
            for d, p, manifest in zip(drafts, pending, sealed, strict=True)
        ]


def estimate(
    rollouts: Place | str, outputs: Sequence[tuple[EncoderRequest, Path]], config: EmbedConfig
) -> list[EmbedEstimate]:
    """What :func:`embed` would do and take, by a few batches on this machine; nothing is written.

    Raises:
        the same errors that :func:`embed` raises before it writes anything.
    """
    for (_, folder), _ in _left_behind(rollouts, outputs, config, None):
        raise OutputExistsError(
            f"{folder} was not finished when its rollouts grew; --append finishes that first: leave --dry-run out"
        )
    store, drafts = _drafted(rollouts, outputs, config, None, measured=True)
    refuse_full_disk(store, drafts)
    return [_estimate(store, d, config) for d in drafts]


def _estimate(store: Store, d: Draft, config: EmbedConfig) -> EmbedEstimate:
    encoder = made_by(d.manifest).encoder
    workers = workers_of(config, device_named(d.request.device), len(d.todo))
    rate = (d.frames_per_second or 0.0) * workers
    rows = d.rows(store)
    return EmbedEstimate(
        store=d.folder,
        pvr=encoder.name,
        shape=encoder.shape,
        shards=len(d.todo),
        rows=rows,
        bytes=d.bytes(store),
        batch=d.request.batch or 0,
        frames_per_second=rate,
        workers=workers,
        hours=rows / rate / 3600,
    )


def _left_behind(
    rollouts: Place | str,
    outputs: Sequence[tuple[EncoderRequest, Path]],
    config: EmbedConfig,
    revision: int | None,
) -> Iterator[tuple[tuple[EncoderRequest, Path], int]]:
    """Of stores that are to grow, those not finished, and the revision of the rollouts that they were begun on."""
    if not config.append or config.overwrite:
        return
    store = Store.open(rollouts, kind="rollouts", revision=revision)
    for request, folder in outputs:
        begun = begun_on(store, folder)
        if begun is not None and is_unfinished(folder):
            yield (request, folder), begun


def _drafted(
    rollouts: Place | str,
    outputs: Sequence[tuple[EncoderRequest, Path]],
    config: EmbedConfig,
    revision: int | None,
    measured: bool = False,
) -> tuple[Store, list[Draft]]:
    store = Store.open(rollouts, kind="rollouts", revision=revision)
    for _, folder in outputs:
        refuse_url(folder)
        refuse_source(store.path, folder)
    if len({folder.resolve() for _, folder in outputs}) < len(outputs):
        raise InvalidValueError(
            "two of the encoders would write to the same folder; embed them one at a time with OUT"
        )
    return store, [draft(store, r.anywhere(), f.absolute(), config, measured) for r, f in outputs]


def _passes(drafts: Sequence[Draft], targets: Sequence[Target], config: EmbedConfig) -> list[list[Target]]:
    """Which targets go over the frames together: as many as fit into the memory of a worker."""
    todo = [(d, t) for d, t in zip(drafts, targets, strict=True) if t.todo]
    if not todo:
        return []
    device = device_named(todo[0][0].request.device)
    workers = workers_of(config, device, len(frozenset().union(*(t.todo for _, t in todo))))
    share = workers if device.type == "cpu" else 1
    needs = [(d.need, t.specification.computation.batch) for d, t in todo]
    room = int(SHARE * free_memory(device)) // share
    return [[todo[index][1] for index in group] for group in passes(needs, room)]


def _run(
    rollouts: Place | str,
    groups: Sequence[Sequence[Target]],
    config: EmbedConfig,
    store: Store,
    progress: Progress,
    size: str,
) -> list[ShardOutcome]:
    """Embed what is missing, shard by shard, and collect what became of each."""
    jobs = [(group, sorted(frozenset().union(*(t.todo for t in group)))) for group in groups]
    total = sum(store.manifest.shards[shard].rows for _, todo in jobs for shard in todo)
    outcomes: list[ShardOutcome] = []
    if jobs:
        progress(0, total, size)
    for outcome in _outcomes(rollouts, jobs, config):
        outcomes.append(outcome)
        progress(sum(o.rows for o in outcomes), total, size)
    return outcomes


def _raise_first(failures: Sequence[PvrpipeError]) -> None:
    """Say what went wrong first, and what else did: who mends only that would meet the next hours later."""
    if failures:
        first, *others = failures
        kind = "failure" if len(others) == 1 else "failures"
        told = "; ".join([*map(str, others[:TOLD]), *["…"] * (len(others) > TOLD)])
        more = f" (and {len(others)} more {kind}: {told})" if others else ""
        raise type(first)(f"{first}{more}")


def _sealed(store: Store, pending: PendingStore) -> Manifest:
    """The manifest of a store whose shards are all there."""
    begun_now = pending.manifest.state != "sealed" and pending.manifest.revision == 1
    return pending.seal(golden_frames(store, pending) if begun_now else None)


def _outcomes(
    rollouts: Place | str, jobs: Sequence[tuple[Sequence[Target], Sequence[int]]], config: EmbedConfig
) -> Iterator[ShardOutcome]:
    if not jobs:
        return
    if config.engine == "ray":
        from pvrpipe.pipeline.ray_engine import run_on_ray

        yield from run_on_ray(rollouts, jobs, config.address, config.workers)
        return
    for targets, todo in jobs:
        yield from ShardEmbedder(rollouts, targets).each(todo)


def _result(
    drafted: Draft,
    pending: PendingStore,
    manifest: Manifest,
    outcomes: Sequence[ShardOutcome],
    seconds: float,
) -> EmbedResult:
    specification, place = made_by(manifest), str(pending.folder)
    done = [o for o in outcomes if place in o.model_seconds]
    return EmbedResult(
        store=pending.folder,
        id=str(manifest.id),
        pvr=specification.encoder.name,
        shape=specification.encoder.shape,
        rows=manifest.rows,
        shards=len(manifest.shards),
        resumed_shards=pending.resumed,
        bytes=manifest.bytes,
        seconds=seconds,
        frames_per_second=sum(o.rows for o in done) / seconds,
        model_seconds=sum(o.model_seconds[place] for o in done),
        read_seconds=sum(o.read_seconds for o in done),
        write_seconds=sum(o.write_seconds for o in done),
        random_weights=specification.encoder.weights.random_seed is not None,
        batch=specification.computation.batch,
        smaller_batches=sum(entry.batch is not None for entry in manifest.shards),
        memory_bytes=drafted.need.weights + drafted.need.batch,
    )
