"""Collection: from a configuration to a sealed rollout store, whatever runs it and however often it is killed.

An episode follows from its own seed and policy alone, and the seed from the root seed and the episode's
number. So neither the number of workers nor the cut into shards changes the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

import pvrpipe
from pvrpipe.rollouts.environments import DEFAULT_ENVIRONMENT, make_environment
from pvrpipe.rollouts.episodes import CollectShard, episode_columns
from pvrpipe.rollouts.policies import parse_policy
from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.manifest import Manifest, RolloutSpecification, ShardCommit, ShardPlan
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.growing import grown
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store

ENGINES = ("ray", "inline")

Shards = Callable[[Iterable[ShardPlan]], Iterator[ShardCommit]]


@dataclass(frozen=True)
class CollectConfig:
    """What to collect; nothing in it says how it is run."""

    environment: str = DEFAULT_ENVIRONMENT
    size: int = 256
    """Pixels of a side of the square frames."""
    camera: int | str = 0
    """Number or name of a camera of the model."""
    action_repeat: int = 2
    """How often each action is applied; rewards are summed."""
    episodes: int = 24
    max_steps: int | None = None
    """Transitions per episode after action repeat; None takes the task's own time limit."""
    policy: str = "random:0.5,mpc:0.5"
    """A mixture, by the grammar of :mod:`pvrpipe.rollouts.policies`."""
    seed: int = 0
    """The root seed, from which each episode's follows."""
    shard_rows: int | None = None
    """Rows wanted in a shard; None leaves it to the store."""
    shard_format: Literal["parquet", "webdataset"] = "parquet"
    """Of the shards; both hold the same rows."""

    def __post_init__(self) -> None:
        """Refuse what no environment could mend."""
        if self.episodes < 1:
            raise InvalidValueError(f"--episodes is {self.episodes}; it must be at least 1")
        if self.seed < 0:
            raise InvalidValueError(f"--seed is {self.seed}; it must be 0 or more")
        parse_policy(self.policy)


@dataclass(frozen=True)
class CollectResult:
    """What ``pvrpipe collect --json`` says."""

    store: str
    id: str
    episodes: int
    rows: int
    shards: int
    resumed_shards: int
    bytes: int
    seconds: float
    """Of the whole call."""
    startup_seconds: float
    """Of these, until the first worker was ready."""
    frames_per_second: float
    """Rows collected now (not resumed), start-up aside; 0 if there was nothing to do."""


def collect(
    config: CollectConfig,
    out: Path | str,
    *,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    append: bool = False,
    progress: Progress = silent,
) -> CollectResult:
    """Collect a rollout store, or go on with one begun with the same configuration.

    Args:
        config: what to collect.
        out: folder of the store.
        engine: ``ray`` for a pool of worker processes, ``inline`` for this process.
        address: of a running Ray cluster; None starts one on this machine.
        workers: processes; None takes one per processor that Ray sees.
        overwrite: replace a store begun with another configuration.
        append: let a finished store grow to ``config.episodes`` episodes, as a new revision.
        progress: told of rows done and to do.

    Raises:
        UnknownNameError, InvalidValueError: from the configuration, before anything is written.
        OutputExistsError, StoreBusyError: the output is another store, or in use; it is left as it is.
        SimulationError: an environment failed; what is committed stays, and the same call goes on from there.
    """
    began = time.perf_counter()
    if engine not in ENGINES:
        raise UnknownNameError.among("engine", engine, ENGINES)
    if workers is not None and workers < 1:
        raise InvalidValueError(f"--workers is {workers}; it must be at least 1")
    refuse_url(Path(out))
    out = Path(out).absolute()
    draft = grown_manifest(config, out) if append else draft_manifest(config)
    with PendingStore.begin(out, draft, overwrite) as pending:
        ready, new_rows = time.perf_counter(), 0
        if pending.todo:
            with _engine(engine, out, draft, address, workers or 0, len(pending.todo)) as shards:
                ready = time.perf_counter()
                new_rows = _follow(shards(pending.todo), draft, pending, progress)
        ended = time.perf_counter()
        sealed = pending.seal()
    return CollectResult(
        store=str(out),
        id=sealed.id or "",
        episodes=sealed.episodes,
        rows=sealed.rows,
        shards=len(sealed.shards),
        resumed_shards=pending.resumed,
        bytes=sealed.bytes,
        seconds=time.perf_counter() - began,
        startup_seconds=ready - began,
        frames_per_second=new_rows / (ended - ready) if new_rows else 0.0,
    )


def draft_manifest(config: CollectConfig) -> Manifest:
    """What the store will be: everything that decides its bytes, and the cut into shards."""
    mixture = parse_policy(config.policy)
    environment = make_environment(
        config.environment, config.size, config.camera, config.action_repeat, config.max_steps
    )
    with closing(environment):
        specification = RolloutSpecification(
            environment=environment.name,
            size=environment.size,
            camera=environment.camera,
            action_repeat=environment.action_repeat,
            episodes=config.episodes,
            max_steps=environment.max_steps,
            policy=str(mixture),
            seed=config.seed,
            control_timestep=environment.control_timestep,
            action_low=tuple(environment.action_low.tolist()),
            action_high=tuple(environment.action_high.tolist()),
            state_names=environment.state_names,
            renderer=environment.renderer(),
            versions={**environment.versions, "pyarrow": pa.__version__, "pvrpipe": pvrpipe.__version__},
        )
        plan = plan_shards(config.episodes, environment.max_steps + 1, config.shard_rows)
        return new_manifest(specification, episode_columns(environment), plan, config.shard_format)


def grown_manifest(config: CollectConfig, out: Path) -> Manifest:
    """The store in ``out`` with as many episodes more as it lacks of those asked for."""
    sealed = Store.open(out, kind="rollouts").manifest
    if sealed.episodes >= config.episodes:
        return sealed
    more = draft_manifest(replace(config, episodes=config.episodes - sealed.episodes))
    assert isinstance(more.specification, RolloutSpecification)
    longest = more.specification.max_steps + 1
    plan = plan_shards(more.specification.episodes, longest, config.shard_rows, behind=sealed.plan)
    return grown(sealed, more.specification, plan)


def _engine(
    engine: str, folder: Path, manifest: Manifest, address: str | None, workers: int, shards: int
) -> AbstractContextManager[Shards]:
    """Whatever turns plans into committed shards, in any order."""
    if engine == "inline":
        return _inline(folder, manifest)
    from pvrpipe.rollouts.ray_engine import worker_pool  # Ray takes seconds to import

    return worker_pool(folder, manifest, address, workers, shards)


@contextmanager
def _inline(folder: Path, manifest: Manifest) -> Iterator[Shards]:
    """Collect in this process, one shard after another."""
    with closing(CollectShard(folder, manifest)) as work:
        yield lambda plans: map(work, plans)


def _follow(
    commits: Iterator[ShardCommit], draft: Manifest, pending: PendingStore, progress: Progress
) -> int:
    """Wait for all shards, telling the progress; the rows that were collected."""
    made = draft.all_parts[-1].specification
    assert isinstance(made, RolloutSpecification)
    longest = made.max_steps + 1
    new_rows, to_do = 0, sum(plan.episodes for plan in pending.todo) * longest
    progress(0, to_do, "collecting")
    for commit in commits:
        new_rows += commit.rows
        to_do -= len(commit.episodes) * longest - commit.rows  # episodes may end before their time
        progress(new_rows, to_do, "collecting")
    return new_rows
