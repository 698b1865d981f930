"""``pvrpipe embed``: a rollout store to one embedding store per PVR, the frames decoded once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from pvrpipe.pipeline.embedding import CARRIED, ShardEmbedder, ShardTimes, Target
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.golden import golden_frames
from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import EncodingError, InvalidValueError, OutputExistsError, PvrpipeError
from pvrpipe.schemas.manifest import EmbeddingSpecification, Manifest
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.growing import grown
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store

VERSIONS = ("pvrpipe", "torch", "timm", "pyarrow", "numpy")


@dataclass(frozen=True)
class EmbedConfig:
    """What decides how the stage runs, and what it stores."""

    dtype: Literal["float16", "float32"] = "float16"
    engine: Literal["ray", "inline"] = "ray"
    address: str | None = None
    workers: int | None = None
    overwrite: bool = False
    append: bool = False
    """Let a finished store grow by the episodes that its rollout store has grown by."""
    shard_format: Literal["parquet", "webdataset"] = "parquet"


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


def embed(
    rollouts: Place | str,
    outputs: Sequence[tuple[EncoderRequest, Path]],
    config: EmbedConfig,
    progress: Progress = silent,
) -> list[EmbedResult]:
    """Embed every frame of a rollout store with each encoder; resumes what was begun.

    Raises:
        NotAStoreError, WeightsError, OutputExistsError: before anything is written.
        EncodingError: a shard could not be embedded; the others are committed.
    """
    started = time.perf_counter()
    store = Store.open(rollouts, kind="rollouts")
    for _, folder in outputs:
        refuse_url(folder)
    asked = [(request.anywhere(), folder.absolute()) for request, folder in outputs]
    drafts = [(request, folder, _draft(store, request, folder, config)) for request, folder in asked]
    if len({folder.resolve() for _, folder, _ in drafts}) < len(drafts):
        raise InvalidValueError(
            "two of the encoders would write to the same folder; embed them one at a time with OUT"
        )
    with contextlib.ExitStack() as stack:
        pending = [
            stack.enter_context(PendingStore.begin(f, draft, config.overwrite)) for _, f, draft in drafts
        ]
        targets = [
            Target(
                request, p.folder, p.manifest, made_by(p.manifest), frozenset(plan.shard for plan in p.todo)
            )
            for (request, _, _), p in zip(drafts, pending, strict=True)
        ]
        times = _run(rollouts, [t for t in targets if t.todo], config, store, progress)
        sealed = [p.seal(golden_frames(store, p) if p.manifest.revision == 1 else None) for p in pending]
        seconds = time.perf_counter() - started
        return [_result(p, manifest, times, seconds) for p, manifest in zip(pending, sealed, strict=True)]


def _draft(store: Store, request: EncoderRequest, folder: Path, config: EmbedConfig) -> Manifest:
    """What the store in ``folder`` is to be."""
    draft = draft_manifest(store, request, config)
    if not config.append:
        return draft
    sealed = Store.open(folder, kind="embeddings").manifest
    known, now = made_by_last(sealed).rollouts_id, str(store.manifest.id)
    if known == now:
        return sealed
    if known not in [revision.id for revision in store.manifest.earlier]:
        raise OutputExistsError(
            f"{folder} holds embeddings of other rollouts, not of an earlier revision of {store.path}; "
            "choose another output"
        )
    return grown(sealed, draft.specification, store.manifest.plan[len(sealed.plan) :])


def draft_manifest(store: Store, request: EncoderRequest, config: EmbedConfig) -> Manifest:
    """The manifest of the embeddings that a request makes of a rollout store."""
    frame = store.column("frame")
    if frame.dtype != "uint8" or len(frame.shape) != 3 or frame.shape[2] != 3:
        raise EncodingError(
            f"{store.path} holds frames of {frame.dtype} {list(frame.shape)}; encoders take uint8 RGB (H, W, 3)"
        )
    encoder = Encoder(request)
    encoder(np.zeros((1, *frame.shape), np.uint8))  # a recipe that these frames do not fit is refused now
    identity = encoder.identity_on(*frame.shape[:2])
    specification = EmbeddingSpecification(
        rollouts_id=str(store.manifest.id),
        rollouts=store.manifest.rollouts,
        encoder=identity,
        computation=encoder.computation,
        dtype=config.dtype,
        versions={name: version(name) for name in VERSIONS},
    )
    carried = [c for c in store.manifest.columns if c.name in CARRIED]
    columns = with_bounds((column("embedding", config.dtype, identity.shape), *carried))
    return new_manifest(specification, columns, store.manifest.plan, config.shard_format)


def made_by(manifest: Manifest) -> EmbeddingSpecification:
    """How the embeddings of a manifest are made."""
    assert manifest.embeddings is not None
    return manifest.embeddings


def made_by_last(manifest: Manifest) -> EmbeddingSpecification:
    """How the embeddings of the episodes that joined last were made."""
    specification = manifest.all_parts[-1].specification
    assert isinstance(specification, EmbeddingSpecification)
    return specification


def _run(
    rollouts: Place | str, targets: list[Target], config: EmbedConfig, store: Store, progress: Progress
) -> list[ShardTimes]:
    """Embed what is missing, shard by shard, and collect what each cost."""
    todo = sorted(set().union(*(t.todo for t in targets)))
    total = sum(store.manifest.shards[shard].rows for shard in todo)
    times: list[ShardTimes] = []
    failures: list[PvrpipeError] = []
    for outcome in _outcomes(rollouts, targets, todo, config):
        if isinstance(outcome, ShardTimes):
            times.append(outcome)
            progress(sum(t.rows for t in times), total, "frames")
        else:
            failures.append(outcome)
    if failures:
        others = f" (and {len(failures) - 1} shards more failed)" if failures[1:] else ""
        raise type(failures[0])(f"{failures[0]}{others}")
    return times


def _outcomes(
    rollouts: Place | str, targets: list[Target], todo: list[int], config: EmbedConfig
) -> Iterator[ShardTimes | PvrpipeError]:
    if not todo:
        return
    if config.engine == "ray":
        from pvrpipe.pipeline.ray_engine import run_on_ray

        yield from run_on_ray(rollouts, targets, todo, config.address, config.workers)
        return
    embedder = ShardEmbedder(rollouts, targets)
    for shard in todo:
        yield embedder.attempt(shard)


def _result(
    pending: PendingStore, manifest: Manifest, times: list[ShardTimes], seconds: float
) -> EmbedResult:
    specification = made_by(manifest)
    name = specification.encoder.name
    done = [t for t in times if name in t.model_seconds]
    return EmbedResult(
        store=pending.folder,
        id=str(manifest.id),
        pvr=name,
        shape=specification.encoder.shape,
        rows=manifest.rows,
        shards=len(manifest.shards),
        resumed_shards=pending.resumed,
        bytes=manifest.bytes,
        seconds=seconds,
        frames_per_second=sum(t.rows for t in done) / seconds,
        model_seconds=sum(t.model_seconds[name] for t in done),
        read_seconds=sum(t.read_seconds for t in done),
        write_seconds=sum(t.write_seconds for t in done),
        random_weights=specification.encoder.weights.random_seed is not None,
    )
