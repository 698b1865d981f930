"""Collection: from a configuration to a sealed rollout store, whatever runs it and however often it is killed.

An episode follows from its own seed and policy alone, and the seed from the root seed and the episode's
number. So neither the number of workers nor the cut into shards changes the data.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa

import pvrpipe
from pvrpipe.rollouts.environments import DEFAULT_ENVIRONMENT, Environment, Restorable, make_environment
from pvrpipe.rollouts.episodes import CollectShard, Event, episode_columns, too_many
from pvrpipe.rollouts.importing import PREFIX
from pvrpipe.rollouts.policies import check_playable, parse_policy
from pvrpipe.rollouts.presets import expanded
from pvrpipe.rollouts.replay import ReplayShard
from pvrpipe.rollouts.variation import check_possible, parse_variation
from pvrpipe.schemas.addresses import refuse_url
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.manifest import Manifest, ShardCommit, ShardPlan
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.specifications import RolloutSpecification
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column
from pvrpipe.store.growing import grown
from pvrpipe.store.places import refuse_source
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store

ENGINES = ("ray", "inline")
MOST_EPISODES = 10_000_000  # all of them are planned, in memory, before anything runs

Work = CollectShard | ReplayShard
Shards = Callable[[Iterable[ShardPlan]], Iterator[Event]]


@dataclass(frozen=True)
class CollectConfig:
    """What to collect; nothing in it says how it is run."""

    environment: str = DEFAULT_ENVIRONMENT
    size: int = 256
    """Pixels of a side of the square frames."""
    camera: int | str | None = None
    """Number or name of a camera of the model; None takes what is usual for the environment."""
    action_repeat: int | None = None
    """How often each action is applied; rewards are summed. None takes what is usual for the environment."""
    episodes: int = 24
    max_steps: int | None = None
    """Transitions per episode after action repeat; None takes the task's own time limit."""
    policy: str = "random:0.5,mpc:0.5"
    """A mixture, by the grammar of :mod:`pvrpipe.rollouts.policies`, of policies and presets."""
    variation: str = "none"
    """A mixture of looks, by the grammar of :mod:`pvrpipe.rollouts.variation`."""
    seed: int = 0
    """The root seed, from which each episode's follows."""
    shard_rows: int | None = None
    """Rows wanted in a shard; None leaves it to the store."""
    shard_format: Literal["parquet", "webdataset"] = "parquet"
    """Of the shards; both hold the same rows."""

    def __post_init__(self) -> None:
        """Refuse what no environment could mend."""
        if not 1 <= self.episodes <= MOST_EPISODES:
            raise InvalidValueError(
                f"--episodes is {self.episodes}; a store has 1 to {MOST_EPISODES:,}, e.g. 24"
            )
        if self.seed < 0:
            raise InvalidValueError(f"--seed is {self.seed}; it must be 0 or more")
        parse_policy(expanded(self.policy, self.environment))
        parse_variation(self.variation)


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
    failed: int = 0
    """Episodes that the environment failed in; other seeds took their place."""


@dataclass(frozen=True)
class Engine:
    """What runs the collection; nothing in it changes a byte."""

    name: Literal["ray", "inline"] = "ray"
    """``ray`` for a pool of worker processes, ``inline`` for this process."""
    address: str | None = None
    """Of a running Ray cluster; None starts one on this machine."""
    workers: int | None = None
    """Processes; None takes one per processor that Ray sees."""
    max_failures: int = 3
    """Episodes that the environment may fail in before that is an error."""
    episode_timeout: float | None = None
    """Seconds that an episode may take before its worker counts as hung; None waits for ever. Needs Ray."""

    def __post_init__(self) -> None:
        """Refuse what nothing could run on."""
        if self.name not in ENGINES:
            raise UnknownNameError.among("engine", self.name, ENGINES)
        if self.workers is not None and self.workers < 1:
            raise InvalidValueError(f"--workers is {self.workers}; it must be at least 1")
        if self.max_failures < 0:
            raise InvalidValueError(f"--max-failures is {self.max_failures}; it must be 0 or more")
        if self.episode_timeout is not None and not self.episode_timeout > 0:
            raise InvalidValueError(
                f"--episode-timeout is {self.episode_timeout}; it must be above 0 seconds"
            )
        if self.episode_timeout is not None and self.name == "inline":
            raise InvalidValueError(
                "--episode-timeout needs --engine ray: a process cannot end what it hangs in itself"
            )


def collect(
    config: CollectConfig,
    out: Path | str,
    engine: Engine = Engine(),
    *,
    overwrite: bool = False,
    append: bool = False,
    progress: Progress = silent,
) -> CollectResult:
    """Collect a rollout store, or go on with one begun with the same configuration.

    Args:
        config: what to collect.
        out: folder of the store.
        engine: what runs it.
        overwrite: replace a store begun with another configuration.
        append: let a finished store grow to ``config.episodes`` episodes, as a new revision.
        progress: told of rows done and to do.

    Raises:
        UnknownNameError, InvalidValueError: from the configuration, before anything is written.
        OutputExistsError, StoreBusyError: the output is another store, or in use; it is left as it is.
        SimulationError: an environment failed; what is committed stays, and the same call goes on from there.
    """
    began = time.perf_counter()
    out = _output(out)
    draft = grown_manifest(config, out) if append else draft_manifest(config)
    make = partial(CollectShard, out, draft, engine.max_failures)
    return _run(draft, make, out, engine, overwrite, progress, began)


def replay(
    source: Store,
    out: Path | str,
    engine: Engine = Engine(),
    *,
    size: int | None = None,
    camera: int | str | None = None,
    variation: str = "none",
    overwrite: bool = False,
    progress: Progress = silent,
) -> CollectResult:
    """See the trajectories of a store again: the same physics, actions and rewards, other frames.

    Row n of the new store is row n of ``source``.

    Args:
        source: the rollout store that is replayed; it stays as it is.
        out: folder of the new store.
        engine: what runs it.
        size: pixels of a side; None as in the source.
        camera: number or name; None as in the source.
        variation: a mixture of looks.
        overwrite: replace a store begun with another configuration.
        progress: told of rows done and to do.

    Raises:
        PvrpipeError: as :func:`collect`; and where the environment does not repeat what is stored.
    """
    began = time.perf_counter()
    out = _output(out)
    refuse_source(source.path, out)
    draft = replay_manifest(source, size, camera, variation)
    return _run(draft, partial(ReplayShard, out, draft, source), out, engine, overwrite, progress, began)


def _output(out: Path | str) -> Path:
    refuse_url(Path(out))
    return Path(out).absolute()


def _run(
    draft: Manifest,
    make: Callable[[], Work],
    out: Path,
    engine: Engine,
    overwrite: bool,
    progress: Progress,
    began: float,
) -> CollectResult:
    """Fill and seal a store with whatever the work makes of its plan."""
    with PendingStore.begin(out, draft, overwrite) as pending:
        ready, new_rows = time.perf_counter(), 0
        if pending.todo:
            with _shards(engine, make, len(pending.todo)) as shards:
                ready = time.perf_counter()
                new_rows = _follow(shards(pending.todo), pending, engine.max_failures, progress)
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
        failed=len(sealed.failed),
    )


def draft_manifest(config: CollectConfig) -> Manifest:
    """What the store will be: everything that decides its bytes, and the cut into shards."""
    mixture = parse_policy(expanded(config.policy, config.environment))
    variation = parse_variation(config.variation)
    environment = make_environment(
        config.environment, config.size, config.camera, config.action_repeat, config.max_steps
    )
    with closing(environment):
        check_playable(mixture, environment)
        check_possible(variation, environment.name, environment.factors)
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
            discrete=environment.discrete,
            state_names=environment.state_names,
            renderer=environment.renderer(),
            versions=_versions(environment) | {k: v for m in mixture.members for k, v in m.versions.items()},
            variation=str(variation),
        )
        plan = plan_shards(config.episodes, environment.max_steps + 1, config.shard_rows)
        return new_manifest(specification, episode_columns(environment), plan, config.shard_format)


def replay_manifest(source: Store, size: int | None, camera: int | str | None, variation: str) -> Manifest:
    """What a replayed store will be; its shards hold the episodes that those of its source hold."""
    made, looks = source.manifest.rollouts, parse_variation(variation)
    if made.environment.startswith(PREFIX):
        raise InvalidValueError(
            f"{source.path} holds {made.environment}, which was imported: nothing here simulates it, so it cannot be "
            "seen anew; embed it as it is, or import it again with another --size or --camera"
        )
    camera = made.camera if camera is None else camera
    environment = make_environment(
        made.environment, made.size if size is None else size, camera, made.action_repeat, made.max_steps
    )
    with closing(environment):
        can = environment.factors
        if not isinstance(environment, Restorable):
            can -= {"size"}  # what is bumped into would change
        check_possible(looks, environment.name, can)
        specification = made.model_copy(
            update={
                "size": environment.size,
                "camera": environment.camera,
                "episodes": source.manifest.episodes,
                "variation": str(looks),
                "renderer": environment.renderer(),
                "versions": _versions(environment),
                "replay_of": source.manifest.id,
            }
        )
        frame = column("frame", "uint8", (environment.size, environment.size, 3))
        columns = tuple(frame if c.name == "frame" else c for c in source.manifest.columns)
        draft = new_manifest(specification, columns, source.manifest.plan, source.manifest.shard_format)
        return draft.model_copy(update={"splits": "recorded"})


def _versions(environment: Environment) -> dict[str, str]:
    return {**environment.versions, "pyarrow": pa.__version__, "pvrpipe": pvrpipe.__version__}


def grown_manifest(config: CollectConfig, out: Path) -> Manifest:
    """The store in ``out`` with as many episodes more as it lacks of those asked for."""
    sealed = Store.open(out, kind="rollouts").manifest
    if sealed.rollouts.replay_of:
        raise InvalidValueError(
            f"{out} shows the episodes of another store and none of its own; let that one grow, and replay it anew"
        )
    lacking = config.episodes - sealed.episodes
    more = draft_manifest(replace(config, episodes=max(lacking, 1)))  # of its kind, though none lacks
    assert isinstance(more.specification, RolloutSpecification)
    longest = more.specification.max_steps + 1
    plan = plan_shards(more.specification.episodes, longest, config.shard_rows, behind=sealed.plan)
    draft = grown(sealed, more.specification, plan)
    return draft if lacking > 0 else sealed


def _shards(engine: Engine, make: Callable[[], Work], shards: int) -> AbstractContextManager[Shards]:
    """Whatever turns plans into committed shards, in any order."""
    if engine.name == "inline":
        return _inline(make)
    from pvrpipe.rollouts.ray_engine import worker_pool  # Ray takes seconds to import

    return worker_pool(
        make, shards, address=engine.address, workers=engine.workers, patience=engine.episode_timeout
    )


@contextmanager
def _inline(make: Callable[[], Work]) -> Iterator[Shards]:
    """Collect in this process, one shard after another."""
    with closing(make()) as work:
        yield lambda plans: itertools.chain.from_iterable(map(work, plans))


def _follow(events: Iterator[Event], pending: PendingStore, max_failures: int, progress: Progress) -> int:
    """Wait for all shards, telling the progress; the rows that were collected."""
    made = pending.manifest.all_parts[-1].specification
    assert isinstance(made, RolloutSpecification)
    longest = made.max_steps + 1
    new_rows, to_do = 0, sum(plan.episodes for plan in pending.todo) * longest
    begun: dict[int, int] = {}  # rows of shards that are not committed yet
    failed = [failure for commit in pending.commits().values() for failure in commit.failed]
    progress(0, to_do, "collecting")
    for event in events:
        if not isinstance(event, ShardCommit):
            begun[event.shard] = event.rows
        else:
            begun.pop(event.shard, None)
            new_rows += event.rows
            to_do -= len(event.episodes) * longest - event.rows  # episodes may end before their time
            failed += event.failed
            if len(failed) > max_failures:
                raise too_many(made.environment, failed, max_failures)
        progress(
            new_rows + sum(begun.values()),
            to_do,
            f"{len(failed)} episodes failed" if failed else "collecting",
        )
    return new_rows
