"""Before the stage runs: what each store is to be, what is missing of it, and what it will take."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pvrpipe.pipeline.decoding import Decoded, ShardReader, carried
from pvrpipe.pipeline.encoders import (
    Encoder,
    EncoderRequest,
    device_named,
    refuse_chance,
    refuse_norm,
    suitable_threads,
)
from pvrpipe.pipeline.memory import Need, fit, kept_memory, tried_until_it_fits
from pvrpipe.pipeline.own import package_versions
from pvrpipe.pipeline.transfers import download
from pvrpipe.schemas.errors import EncodingError, OutputExistsError, StoreError
from pvrpipe.schemas.manifest import Manifest, Part
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.building import PendingStore, new_manifest, read_draft
from pvrpipe.store.columns import column
from pvrpipe.store.growing import grown, refuse_unlike
from pvrpipe.store.layout import MANIFEST, read_manifest
from pvrpipe.store.planning import split_in
from pvrpipe.store.reading import Store

VERSIONS = ("pvrpipe", "torch", "timm", "transformers", "pyarrow", "numpy")
#: From so many frames on, compiling pays on a GPU: it takes a minute, and saves 10 to 20 % of a ViT's time,
#: half of a ResNet's (timm's published benchmarks).
COMPILED_FROM = 1_000_000
MEASURED_BATCHES, MEASURED_SECONDS = 3, 20.0  # whichever comes first, for the rate of a dry run


@dataclass(frozen=True)
class EmbedConfig:
    """What decides how the stage runs, and what it stores."""

    dtype: Literal["float16", "float32"] = "float16"
    engine: Literal["ray", "inline"] = "ray"
    address: str | None = None
    workers: int | None = None
    overwrite: bool = False
    append: bool = False
    """Let a store grow by the episodes that its rollout store has grown by; one that is not there is made."""
    shard_format: Literal["parquet", "webdataset"] = "parquet"


@dataclass(frozen=True)
class Draft:
    """A store that is to be made."""

    request: EncoderRequest
    """with the batch that it will have"""
    folder: Path
    manifest: Manifest
    need: Need
    todo: frozenset[int]
    """the shards that are missing now"""
    frames_per_second: float | None
    """of one worker, where it was measured"""
    overwrite: bool
    """whether what is in the folder is replaced"""

    def rows(self, store: Store) -> int:
        """Frames that are still to be embedded."""
        return sum(store.manifest.shards[shard].rows for shard in self.todo)

    def bytes(self, store: Store) -> int:
        """What the missing shards will take on disk, before any compression."""
        return self.rows(store) * sum(c.width for c in self.manifest.columns)


def draft(
    store: Store, request: EncoderRequest, folder: Path, config: EmbedConfig, measured: bool = False
) -> Draft:
    """What the store in ``folder`` is to be; loads the encoder, and lets it go again.

    A store that was begun keeps its batch size, unless another is asked for.

    Args:
        store: the rollouts.
        request: the encoder.
        folder: of the embeddings; nothing is written there.
        config: of the stage.
        measured: also measure its rate on some of the frames.

    Raises:
        WeightsError, EncodingError, OutputExistsError: it cannot be made.
    """
    batch = request.batch or (None if config.overwrite else _recorded_batch(folder))
    device = device_named(request.device)
    compiled = device.type == "cuda" and store.manifest.rows >= COMPILED_FROM
    encoder, need = _loaded(store, replace(request, batch=batch, compiled=False))
    if compiled:
        encoder = _compiled(encoder, request, store.column("frame").shape)
    manifest = _manifest(store, encoder, folder, config)
    overwrite = config.overwrite and manifest.state != "sealed"  # what holds all of it stays
    todo = PendingStore.peek(folder, manifest, overwrite)
    rate = _rate(store, encoder) if measured else None
    settled = replace(request, batch=encoder.batch, compiled=encoder.compiled)
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the workers
    return Draft(settled, folder, manifest, need, frozenset(plan.shard for plan in todo), rate, overwrite)


def refuse_full_disk(store: Store, drafts: Sequence[Draft]) -> None:
    """Refuse to begin what there is clearly no room for.

    Raises:
        StoreError: names both sizes.
    """
    wanted: dict[int, list[Draft]] = {}
    for each in drafts:
        wanted.setdefault(_existing_parent(each.folder).stat().st_dev, []).append(each)
    for together in wanted.values():
        size = sum(each.bytes(store) for each in together)
        free = shutil.disk_usage(_existing_parent(together[0].folder)).free
        if size > free:
            raise StoreError(
                f"the embeddings take about {readable(size)}, but {readable(free)} are free at "
                f"{together[0].folder}; choose another output, a smaller --dtype, or fewer --pvr"
            )


def workers_of(config: EmbedConfig, device: torch.device, shards: int) -> int:
    """Workers that this machine will have for so many shards."""
    if config.engine == "inline":
        return 1
    here = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    return max(1, min(config.workers or here, shards))


def readable(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def made_by(manifest: Manifest) -> EmbeddingSpecification:
    """How the embeddings of the episodes that joined last were made."""
    specification = manifest.all_parts[-1].specification
    assert isinstance(specification, EmbeddingSpecification)
    return specification


def _recorded_batch(folder: Path) -> int | None:
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_draft(folder) or read_manifest(folder)
    return made_by(manifest).computation.batch if manifest.kind == "embeddings" else None


def _loaded(store: Store, request: EncoderRequest) -> tuple[Encoder, Need]:
    frame = store.column("frame")
    if frame.dtype != "uint8" or len(frame.shape) != 3 or frame.shape[2] != 3:
        raise EncodingError(
            f"{store.path} holds frames of {frame.dtype} {list(frame.shape)}; encoders take uint8 RGB (H, W, 3)"
        )
    encoder = Encoder(request)
    refuse_norm(encoder.network, encoder.identity, request.readout)
    shards = [entry.rows for entry in store.manifest.shards]
    need = fit(encoder, frame.shape, shards, fixed=request.batch is not None)
    refuse_chance(encoder, frame.shape)
    return encoder, need


def _compiled(encoder: Encoder, request: EncoderRequest, frame: tuple[int, ...]) -> Encoder:
    """The same encoder, compiled, where that is possible: Triton wants a C compiler."""
    try:
        made = Encoder(replace(request, batch=encoder.batch, compiled=True))
        tried_until_it_fits(made, frame, fixed=True)
    except (RuntimeError, EncodingError):
        return encoder
    return made


def _manifest(store: Store, encoder: Encoder, folder: Path, config: EmbedConfig) -> Manifest:
    identity = encoder.identity_on(*store.column("frame").shape[:2])
    specification = EmbeddingSpecification(
        rollouts_id=str(store.manifest.id),
        rollouts=store.manifest.rollouts,
        encoder=identity,
        computation=encoder.computation,
        dtype=config.dtype,
        versions={name: version(name) for name in VERSIONS} | package_versions(encoder.pvr),
    )
    if _is_sealed(folder) and (config.append or _has_grown_with(store, folder, config)):
        return _grown(store, specification, folder, config)
    _refuse_outgrown(store, folder, config)
    return _whole(store, specification, folder, config)


def _whole(
    store: Store, specification: EmbeddingSpecification, folder: Path, config: EmbedConfig
) -> Manifest:
    """A store of all episodes that there are, begun now or before."""
    columns = (column("embedding", config.dtype, specification.encoder.shape), *carried(store))
    fresh = new_manifest(specification, columns, store.manifest.plan, config.shard_format)
    as_one = not config.overwrite and _begun_as_one(folder, specification)
    parts = () if as_one else tuple(_part(specification, part) for part in store.manifest.parts)
    return _with_splits_of(store, fresh.model_copy(update={"parts": parts}))


def _grown(
    store: Store, specification: EmbeddingSpecification, folder: Path, config: EmbedConfig
) -> Manifest:
    """A finished store as it is, or where its rollouts have grown, the revision that follows."""
    sealed = Store.open(folder, kind="embeddings").manifest
    known, now = made_by(sealed).rollouts_id, str(store.manifest.id)
    if known != now and known not in [revision.id for revision in store.manifest.earlier]:
        raise OutputExistsError(
            f"{folder} holds embeddings of other rollouts, not of an earlier revision of {store.path}; "
            "choose another output"
        )
    if sealed.shard_format != config.shard_format:
        raise OutputExistsError(f"{folder} is of --format {sealed.shard_format}, and grows in that; give it")
    refuse_unlike(sealed, specification)
    if known == now:
        return sealed
    following = grown(sealed, specification, store.manifest.plan[len(sealed.plan) :])
    joined = [_part(specification, p) for p in store.manifest.parts if p.first_episode >= sealed.episodes]
    return _with_splits_of(store, following.model_copy(update={"parts": (*sealed.parts, *joined)}))


def _is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and read_manifest(folder).state == "sealed"


def _has_grown_with(store: Store, folder: Path, config: EmbedConfig) -> bool:
    """Whether a finished store holds embeddings of these rollouts that joined it in turn."""
    held = read_manifest(folder)
    if config.overwrite or held.kind != "embeddings" or held.revision == 1:
        return False
    return made_by(held).rollouts_id == str(store.manifest.id)


def _refuse_outgrown(store: Store, folder: Path, config: EmbedConfig) -> None:
    """Say how embeddings of an earlier revision of the rollouts go on; they are not to be computed again."""
    if not config.overwrite and begun_on(store, folder) is not None:
        raise OutputExistsError(
            f"{folder} holds embeddings of {store.path} before it grew to {store.manifest.episodes} episodes; "
            "embed what is new with --append"
        )


def begun_on(store: Store, folder: Path) -> int | None:
    """The earlier revision of the rollouts that the embeddings in a folder are of, finished or not; else None."""
    if not (folder / MANIFEST).is_file():
        return None
    held = read_draft(folder) or read_manifest(folder)
    ids = [revision.id for revision in store.manifest.earlier]
    known = made_by(held).rollouts_id if held.kind == "embeddings" else None
    return ids.index(known) + 1 if known in ids else None


def is_unfinished(folder: Path) -> bool:
    """Whether embeddings, or a revision of them, were begun in a folder and not finished."""
    return (folder / MANIFEST).is_file() and (read_draft(folder) is not None or not _is_sealed(folder))


def _part(specification: EmbeddingSpecification, rollouts: Part) -> Part:
    """Episodes that one command made, as they are embedded."""
    made = specification.model_copy(update={"rollouts": rollouts.specification})
    return rollouts.model_copy(update={"specification": made})


def _begun_as_one(folder: Path, specification: EmbeddingSpecification) -> bool:
    """Whether a folder holds these embeddings, begun when those of rollouts in parts were taken for one part."""
    held = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    return held is not None and not held.parts and held.specification == specification


def _with_splits_of(store: Store, draft: Manifest) -> Manifest:
    """The draft, of which episodes keep the splits that they have: these are recorded unless they follow from it."""
    made = store.manifest
    if made.splits == "hash" and not made.parts:
        return draft
    splits = store.episodes["split"].to_list()
    same = all(split_in(draft, episode) == split for episode, split in enumerate(splits))
    return draft if same else draft.model_copy(update={"splits": "recorded"})


def _rate(store: Store, encoder: Encoder) -> float:
    """Frames per second of one worker: the median over a few batches behind the first, read and all."""
    encoder.replay(store.column("frame").shape)
    began = [time.perf_counter()]
    device = encoder.device
    with (
        suitable_threads(device),
        kept_memory(device),
        contextlib.closing(_batches(store, encoder)) as batches,
    ):
        for decoded in itertools.islice(batches, 1 + MEASURED_BATCHES):
            download(encoder.encode(decoded.frames()))()
            began.append(time.perf_counter())
            if began[-1] - began[0] > MEASURED_SECONDS:
                break
    times = np.diff(began)
    return encoder.batch / float(np.median(times[1:] if len(times) > 1 else times))  # batches are padded


def _batches(store: Store, encoder: Encoder) -> Generator[Decoded, None, None]:
    """One shard's after the other's: a shard may have one batch, and the first of all is slow."""
    reader, shards = ShardReader(store, encoder.device), range(len(store.manifest.shards))
    with reader.ahead([(shard, encoder.batch) for shard in shards]):
        for shard in shards:
            yield from reader.batches(shard, encoder.batch)


def _existing_parent(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
