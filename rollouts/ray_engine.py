"""A pool of Ray actors, one environment each, fed shard by shard; the only file here that knows Ray."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from pvrpipe.rollouts.episodes import NOTHING_LOST, TRIES, Event, Lost, Trying
from pvrpipe.rollouts.patience import VARIABLE
from pvrpipe.schemas.clusters import ray_cluster
from pvrpipe.schemas.errors import PvrpipeError, SimulationError, one_line
from pvrpipe.schemas.manifest import ShardCommit, ShardPlan

DEATHS = 3  # of workers, until the episode they were in has failed; outside of any, until that is an error
LOOK_AROUND = 5.0  # seconds between two looks for workers that hang, and for nodes that joined
#: Workers must render as the user chose, and wait as long.
ENVIRON = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "LP_NUM_THREADS", VARIABLE)


class ShardWork(Protocol):
    """What turns plans into committed shards: :class:`CollectShard`, or :class:`ReplayShard`."""

    def __call__(self, plan: ShardPlan, lost: Lost = NOTHING_LOST, /) -> Iterator[Event]:
        """Say before each try which it is, and the commit at the end."""

    def close(self) -> None:
        """Free the renderer."""


class ShardWorker:
    """One environment in a process of its own."""

    def start(self, environ: Mapping[str, str], make: Callable[[], ShardWork]) -> None:
        """Build the environment. Not the constructor, whose errors Ray buries in a dead actor's story."""
        os.environ.update(environ)
        self._work = make()

    def collect(self, plan: ShardPlan, lost: Lost) -> Iterator[Event]:
        """Collect and commit a shard."""
        yield from self._work(plan, lost)


@dataclass
class Job:
    """What a worker does now."""

    actor: Any
    plan: ShardPlan | None = None  # None: it is starting
    trying: Trying | None = None
    heard: float = field(default_factory=time.monotonic)
    spent: float = 0.0  # seconds of the try before it last was interrupted by writing
    last: tuple[int, int, int] | None = None  # shard, episode and attempt of that try


class Pool:
    """Actors, and which of them does what; a dead or hanging one is replaced and its shard done again.

    Args:
        start: begins to start an actor.
        workers: how many; None takes one per processor of the cluster, also of nodes that join later.
        shards: to do; more workers than that would have nothing to do.
        patience: seconds that one try of an episode may take; None waits for ever.
    """

    def __init__(
        self, start: Callable[[Any], ray.ObjectRef], workers: int | None, shards: int, patience: float | None
    ) -> None:
        self._start, self._workers, self._shards, self._patience = start, workers, shards, patience
        self._deaths, self._looked = 0, time.monotonic()
        self._died: Counter[tuple[int, int, int]] = Counter()  # by shard, episode and seed
        self._lost: dict[int, dict[tuple[int, int], str]] = {}  # of each shard
        self._busy: dict[Any, Job] = {}
        self._idle: list[Any] = []
        self._grow()

    def wait_for_one(self) -> None:
        """Wait until a worker is ready."""
        while not self._idle:
            self._next()

    def collect(self, plans: Iterable[ShardPlan]) -> Iterator[Event]:
        """Commit all shards, in whatever order they are done."""
        todo = deque(plans)
        while todo or any(job.plan is not None for job in self._busy.values()):
            while todo and self._idle:
                actor, plan = self._idle.pop(), todo.popleft()
                lost = self._lost.get(plan.shard, {})
                # Paused until each event is taken: what a worker was trying is known, however soon it dies of it.
                stream = actor.collect.options(
                    num_returns="streaming", _generator_backpressure_num_objects=1
                ).remote(plan, lost)
                self._busy[stream] = Job(actor, plan)
            told = self._next()
            if isinstance(told, ShardPlan):
                todo.appendleft(told)
            elif told is not None:
                yield told

    def close(self) -> None:
        """Kill the workers; an unfinished shard leaves a temporary file that the next run removes."""
        for actor in [*self._idle, *(job.actor for job in self._busy.values())]:
            ray.kill(actor)

    def _grow(self) -> None:
        """As many workers as there are processors and shards."""
        processors = int(ray.cluster_resources().get("CPU", 1))
        wanted = max(1, min(self._workers or processors, processors, self._shards))
        for _ in range(wanted - len(self._idle) - len(self._busy)):
            self._spawn()

    def _spawn(self) -> None:
        actor = ray.remote(num_cpus=1)(ShardWorker).remote()
        self._busy[self._start(actor)] = Job(actor)

    def _next(self) -> Event | ShardPlan | None:
        """Wait for a worker: what it says, or the plan to do again, or None if there is nothing to say."""
        ready, _ = ray.wait(list(self._busy), timeout=LOOK_AROUND, fetch_local=False)
        if not ready or time.monotonic() - self._looked > LOOK_AROUND:  # however much others have to say
            self._looked = time.monotonic()
            self._grow()
            given_up = self._give_up_on_one()
            if given_up or not ready:
                return given_up
        job = self._busy[ready[0]]
        try:
            told = self._hear(ready[0], job)
        except (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
            return self._replace(ready[0], error)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, PvrpipeError) else error) from None
        return told

    def _hear(self, source: Any, job: Job) -> Event | None:
        """What a worker says; a started one, and one that has committed, is idle."""
        before, job.heard = job.heard, time.monotonic()
        if job.plan is None:
            ray.get(source)
        else:
            event: Event = ray.get(next(source))
            if not isinstance(event, ShardCommit):
                if job.trying is not None:
                    job.spent += job.heard - before
                job.trying = event if isinstance(event, Trying) else None
                if isinstance(event, Trying) and event[:3] != job.last:
                    job.spent, job.last = 0.0, event[:3]
                return event
            self._deaths = 0
        del self._busy[source]
        self._idle.append(job.actor)
        return event if job.plan is not None else None

    def _replace(self, source: Any, error: Exception) -> ShardPlan | None:
        """A worker died, or its node did: another takes its place; its shard is to do again."""
        job = self._busy.pop(source)
        if job.trying is not None:
            self._count_death(job.trying)
        else:
            self._deaths += 1
        if self._deaths >= DEATHS:
            raise SimulationError(
                f"{self._deaths} workers died in a row ({one_line(error)[:200]}); give them more memory or "
                "fewer --workers, or find out with --engine inline, then run the same command again"
            ) from error
        self._spawn()
        return job.plan

    def _count_death(self, trying: Trying) -> None:
        """After so many deaths in an episode, with one seed, it has failed."""
        first = trying.attempt // TRIES * TRIES
        which = (trying.shard, trying.episode, first)
        self._died[which] += 1
        if self._died[which] == DEATHS:
            for attempt in range(first, first + TRIES):
                self._lose(trying, attempt, f"{DEATHS} workers died in it")

    def _lose(self, trying: Trying, attempt: int, reason: str) -> None:
        """Not try that again."""
        self._lost.setdefault(trying.shard, {})[trying.episode, attempt] = reason

    def _give_up_on_one(self) -> ShardPlan | None:
        """Kill a worker that has not said anything for too long, and remember what it hung in."""
        for source, job in self._busy.items():
            if job.plan is None or job.trying is None or self._patience is None:
                continue
            late = job.spent + time.monotonic() - job.heard > self._patience
            if late and not ray.wait([source], timeout=0, fetch_local=False)[0]:
                self._lose(job.trying, job.trying.attempt, "it did not come to an end in time")
                ray.kill(job.actor)
                del self._busy[source]
                self._spawn()
                return job.plan
        return None


@contextmanager
def worker_pool(
    make: Callable[[], ShardWork],
    shards: int,
    *,
    address: str | None = None,
    workers: int | None = None,
    patience: float | None = None,
) -> Iterator[Callable[[Iterable[ShardPlan]], Iterator[Event]]]:
    """Workers that turn shard plans into committed shards; the first is ready on entering.

    Args:
        make: builds the work in each worker, which must reach the store under the same path.
        shards: to do; more workers than that would have nothing to do.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: how many; None takes one per processor that Ray has.
        patience: seconds that one try of an episode may take; None waits for ever.

    Raises:
        ClusterError: nobody answers at the address, or Ray does not start.
        SimulationError: workers keep dying, or Ray itself fails.
    """
    environ = {name: os.environ[name] for name in ENVIRON if name in os.environ}
    try:
        with ray_cluster(address, workers):
            shared = ray.put(make)
            pool = Pool(lambda actor: actor.start.remote(environ, shared), workers, shards, patience)
            try:
                pool.wait_for_one()
                yield pool.collect
            finally:
                pool.close()
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise  # a bug in a worker: show where
        raise SimulationError(
            f"Ray failed ({one_line(error)[:200]}); run the same command again, or with --engine inline"
        ) from error
