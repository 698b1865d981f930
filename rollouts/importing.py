"""``pvrpipe import``: a rollout store from what a lab already has.

The source is gone through twice. First without its frames: lengths, widths and values are checked, and the store
is planned, before anything is written. Then episode by episode, with the frames of one in memory. A store that was
begun is gone on with; its bytes follow from the source alone.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

import pvrpipe
from pvrpipe.rollouts.environments import SIZES
from pvrpipe.rollouts.import_source import Array, Frames, Source, Trajectory, all_of, as_rgb, reading
from pvrpipe.rollouts.import_survey import Survey, bounds_of, look_through
from pvrpipe.rollouts.pixels import squared
from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import InvalidValueError, SourceError, UnknownNameError
from pvrpipe.schemas.manifest import Column, Manifest, ShardPlan
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.schemas.specifications import IMPORTED, RolloutSpecification
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.writing import ShardWriter

FORMATS = ("minari", "lerobot", "vd4rl", "robomimic", "dqn-replay", "frames")
PREFIX = "import:"


@dataclass(frozen=True)
class ImportConfig:
    """What to import."""

    format: str
    source: str
    """A path; of Minari, also the id of a data set."""
    name: str | None = None
    """Of the data set in the store; None takes what the data set calls itself."""
    camera: str | None = None
    """Which of the source's; None takes the only one."""
    size: int | None = None
    """Pixels of a side; None keeps those of the longer side of the first frame."""
    shard_rows: int | None = None
    shard_format: Literal["parquet", "webdataset"] = "parquet"

    def __post_init__(self) -> None:
        """Refuse what no source could mend."""
        if self.format not in FORMATS:
            raise UnknownNameError.among("format", self.format, FORMATS)
        if self.size is not None and not SIZES[0] <= self.size <= SIZES[1]:
            raise InvalidValueError(
                f"--size is {self.size}; a frame has {SIZES[0]} to {SIZES[1]} pixels a side, e.g. 224"
            )


@dataclass(frozen=True)
class ImportResult:
    """What ``pvrpipe import --json`` says."""

    store: str
    id: str
    environment: str
    episodes: int
    rows: int
    shards: int
    resumed_shards: int
    bytes: int
    seconds: float
    skipped: int
    """Episodes without a transition of which both ends were seen."""
    cut: int
    """Episodes whose last transition was left out, since what it led to is not in the source."""
    remarks: tuple[str, ...]


def open_source(config: ImportConfig) -> Source:
    """Open the source with the importer of its format.

    Raises:
        SourceError: it is not of that format.
        MissingExtraError: a library that reads it is not installed.
    """
    if (
        config.format != "minari" and not Path(config.source).exists()
    ):  # Minari knows data sets by their id too
        raise SourceError(f"there is nothing at {config.source}; give the path of {config.format} data")
    module = importlib.import_module(f"pvrpipe.rollouts.import_{config.format.replace('-', '_')}")
    with reading(config.source):
        source: Source = module.open_source(config.source, config.camera)
    return source


def import_store(
    config: ImportConfig,
    source: Source,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ImportResult:
    """Import a source as a rollout store, or go on with one that was begun from the same.

    Raises:
        SourceError: the source is not what its format promises; nothing is left of a store begun from it.
        OutputExistsError, StoreBusyError: the output is another store, or in use; it is left as it is.
    """
    began = time.monotonic()
    refuse_url(out)
    progress(0, 1, "looking through the source")
    survey = look_through(source)
    draft = draft_manifest(config, source, survey)
    total = sum(survey.lengths) + len(survey.lengths)
    with PendingStore.begin(out, draft, overwrite) as pending:
        begun = pending.manifest.state == "writing"
        try:
            _fill(source, pending, survey.discrete, total, progress)
        except SourceError:
            if begun:
                pending.abandon()  # the same command could not finish it
            raise
        sealed = pending.seal()
        return ImportResult(
            store=str(out),
            id=sealed.id or "",
            environment=sealed.rollouts.environment,
            episodes=sealed.episodes,
            rows=sealed.rows,
            shards=len(sealed.shards),
            resumed_shards=pending.resumed,
            bytes=sealed.bytes,
            seconds=time.monotonic() - began,
            skipped=survey.skipped,
            cut=survey.cut,
            remarks=source.remarks,
        )


def draft_manifest(config: ImportConfig, source: Source, survey: Survey) -> Manifest:
    """What the store will be: everything that decides its bytes, and the cut into shards."""
    low, high = bounds_of(source, survey)
    longest = max(survey.lengths)
    specification = RolloutSpecification(
        environment=f"{PREFIX}{config.format}:{config.name or source.name}",
        size=config.size or survey.side,
        camera=source.camera,
        action_repeat=1,
        episodes=len(survey.lengths),
        max_steps=longest,
        policy=IMPORTED,
        seed=0,
        control_timestep=source.seconds,
        action_low=tuple(np.asarray(low, np.float32).tolist()),
        action_high=tuple(np.asarray(high, np.float32).tolist()),
        discrete=survey.discrete,
        state_names=source.state_names,
        renderer="imported",
        versions=_versions(source, survey),
    )
    plan = plan_shards(len(survey.lengths), longest + 1, config.shard_rows)
    return new_manifest(specification, _columns(specification, source), plan, config.shard_format)


def _columns(made: RolloutSpecification, source: Source) -> tuple[Column, ...]:
    columns = [
        column("frame", "uint8", (made.size, made.size, 3)),
        column("action", "float32", (len(made.action_low),)),
        column("reward", "float32", ()),
    ]
    if made.state_names:
        columns.append(column("state", "float32", (len(made.state_names),)))
    if source.has_success:
        columns.append(column("success", "bool", ()))
    return with_bounds(columns)


def _versions(source: Source, survey: Survey) -> dict[str, str]:
    """Of what decides the bytes; ``source`` is the sha256 of all actions, rewards and states that were read."""
    libraries = {name: version(name) for name in ("numpy", "pillow", "pyarrow", *source.packages)}
    return {**libraries, "pvrpipe": pvrpipe.__version__, "source": survey.digest}


def _fill(source: Source, pending: PendingStore, discrete: bool, total: int, progress: Progress) -> None:
    """Write the shards that are to do, with the frames of one episode in memory."""
    trajectories = enumerate(found for found in all_of(source) if len(found.action))
    rows = 0
    for plan in pending.todo:
        with ShardWriter(pending.folder, pending.manifest, plan) as writer:
            for number, found in _planned(trajectories, plan):
                writer.write_episode(_episode(number, found, pending.manifest.rollouts, discrete))
                rows += len(found.action) + 1
                progress(rows, total, f"episode {number}")
            writer.commit()


def _planned(
    trajectories: Iterator[tuple[int, Trajectory]], plan: ShardPlan
) -> Iterator[tuple[int, Trajectory]]:
    """The trajectories of a shard; those before it are passed over, their frames unread."""
    last = plan.first_episode + plan.episodes - 1
    for number, found in trajectories:
        if number >= plan.first_episode:
            yield number, found
        if number == last:
            return


def _episode(number: int, found: Trajectory, made: RolloutSpecification, discrete: bool) -> Episode:
    """Rows of a trajectory: its reward on arriving, its action where it is taken from."""
    length, count = len(found.action), len(made.action_low)
    with reading(found.name):
        frames = as_rgb(found.frames(), found.name)
    if len(frames) != length + 1:
        raise SourceError(
            f"{found.name} has {len(frames)} frames, not {length + 1}; get it again, or leave it out"
        )
    action = np.zeros((length + 1, count), np.float32)
    action[:-1] = np.eye(count, dtype=np.float32)[found.action] if discrete else found.action
    reward = np.zeros(length + 1, np.float32)
    reward[1:] = found.reward
    arrays: dict[str, Array] = {
        "frame": _fitted(frames, made.size),
        "action": action,
        "reward": reward,
    }
    if found.state is not None:
        arrays["state"] = found.state.astype(np.float32)
    if found.success is not None:
        arrays["success"] = np.asarray(found.success, bool)
    info = EpisodeInfo(
        episode=number,
        length=length,
        episode_return=float(reward.sum(dtype=np.float64)),
        seed=found.seed,
        policy=found.policy,
        terminated=found.terminated,
        values={} if found.success is None else {"success": float(np.any(found.success))},
    )
    return Episode(info, arrays)


def _fitted(frames: Frames, size: int) -> Frames:
    """Frames (n, H, W, 3) as squares of ``size`` pixels."""
    if frames.shape[1:3] == (size, size):
        return np.ascontiguousarray(frames)
    return np.stack([squared(frame, size) for frame in frames])
