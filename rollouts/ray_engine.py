"""A pool of Ray actors, one environment each, fed shard by shard; the only file here that knows Ray."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from pvrpipe.rollouts.episodes import CollectShard
from pvrpipe.schemas.addresses import check_answers
from pvrpipe.schemas.errors import PvrpipeError, SimulationError, one_line
from pvrpipe.schemas.manifest import Manifest, ShardCommit, ShardPlan

DEATHS = 3  # of workers, without a shard committed in between, until that is an error
RENDERING = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "LP_NUM_THREADS")  # workers must render as the user chose


class ShardWorker:
    """One environment in a process of its own."""

    def start(self, environ: Mapping[str, str], folder: Path, manifest: Manifest) -> None:
        """Build the environment. Not the constructor, whose errors Ray buries in a dead actor's story."""
        os.environ.update(environ)
        self._work = CollectShard(folder, manifest)

    def collect(self, plan: ShardPlan) -> ShardCommit:
        """Collect and commit a shard."""
        return self._work(plan)


class Pool:
    """Actors, and which of them does what; a dead one is replaced and its shard done again."""

    def __init__(self, start: Callable[[Any], ray.ObjectRef], workers: int) -> None:
        self._start, self._deaths = start, 0
        self._busy: dict[ray.ObjectRef, tuple[Any, ShardPlan | None]] = {}  # None: still starting
        self._idle: list[Any] = []
        for _ in range(workers):
            self._spawn()

    def wait_for_one(self) -> None:
        """Wait until a worker is ready."""
        while not self._idle:
            self._next()

    def collect(self, plans: Iterable[ShardPlan]) -> Iterator[ShardCommit]:
        """Commit all shards, in whatever order they are done."""
        todo = deque(plans)
        while todo or any(plan is not None for _, plan in self._busy.values()):
            while todo and self._idle:
                actor, plan = self._idle.pop(), todo.popleft()
                self._busy[actor.collect.remote(plan)] = (actor, plan)
            done = self._next()
            if isinstance(done, ShardPlan):
                todo.appendleft(done)
            elif done is not None:
                yield done

    def close(self) -> None:
        """Kill the workers; an unfinished shard leaves a temporary file that the next run removes."""
        for actor in [*self._idle, *(actor for actor, _ in self._busy.values())]:
            ray.kill(actor)

    def _spawn(self) -> None:
        actor = ray.remote(num_cpus=1)(ShardWorker).remote()
        self._busy[self._start(actor)] = (actor, None)

    def _next(self) -> ShardCommit | ShardPlan | None:
        """Wait for a worker: the shard it committed, or the plan to do again, or None if it has started."""
        (ref, *_), _ = ray.wait(list(self._busy))
        actor, plan = self._busy.pop(ref)
        try:
            commit: ShardCommit | None = ray.get(ref)
        except (RayActorError, OutOfMemoryError) as error:
            self._deaths += 1
            if self._deaths >= DEATHS:
                raise SimulationError(
                    f"{self._deaths} workers died in a row ({one_line(error)[:200]}); give them more memory or "
                    "fewer --workers, or find out with --engine inline, then run the same command again"
                ) from error
            self._spawn()
            return plan
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, PvrpipeError) else error) from None
        self._idle.append(actor)
        if commit is not None:
            self._deaths = 0
        return commit


@contextmanager
def worker_pool(
    folder: Path, manifest: Manifest, address: str | None, workers: int, shards: int
) -> Iterator[Callable[[Iterable[ShardPlan]], Iterator[ShardCommit]]]:
    """Workers that turn shard plans into committed shards; the first is ready on entering.

    Args:
        folder: of the store, which every worker must reach under the same path.
        manifest: of the store.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: how many; 0 takes one per processor that Ray has.
        shards: to do; more workers than that would have nothing to do.

    Raises:
        SimulationError: workers keep dying, or Ray itself fails.
    """
    environ = {name: os.environ[name] for name in RENDERING if name in os.environ}
    started = _start_ray(address, workers)
    try:
        processors = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(manifest)
        pool = Pool(
            lambda actor: actor.start.remote(environ, folder, shared),
            max(1, min(workers or processors, processors, shards)),
        )
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
    finally:
        if started:
            ray.shutdown()


def _start_ray(address: str | None, workers: int) -> bool:
    """Connect to Ray, starting it if need be; whether this call did so, and must leave it again."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address,
            num_cpus=None if address else workers or None,  # a running cluster has its own
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise SimulationError(
            f"Ray does not start ({one_line(error)[:200]}); "
            "check --address and `pvrpipe doctor`, or use --engine inline"
        ) from error
    return True
