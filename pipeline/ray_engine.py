"""The embedding stage on Ray Data: an autoscaling pool of actors over shards, on a GPU where there is one.

Pretraining is one task. The only file here that knows Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from pvrpipe.pipeline.embedding import ShardEmbedder, ShardOutcome, Target
from pvrpipe.pipeline.encoders import device_named
from pvrpipe.schemas.clusters import ray_cluster
from pvrpipe.schemas.errors import ClusterError, EncodingError, PvrpipeError, one_line
from pvrpipe.schemas.progress import Progress
from pvrpipe.store.files import left_behind, marked
from pvrpipe.store.layout import shard_file
from pvrpipe.store.places import Place, place_of

IN_A_ROW = 8  # shards that an actor is given at most
TURNS = 4  # at least, of each actor, where there are shards enough: what is left at the end is small
DEATHS = 3  # of workers that had one shard, until that is this shard's failure
LOOK_AROUND = 0.5  # seconds between two looks at how far a worker is

R = TypeVar("R")


class _Actor:
    """A :class:`ShardEmbedder` that Ray Data feeds a few shards at a time."""

    def __init__(self, rollouts: Place | str, targets: Sequence[Target]) -> None:
        self._arguments = rollouts, targets
        self._embedder: ShardEmbedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Shards in a row, so that others are read and committed while one is encoded.

        Where a worker died at any of them, one after the other: what it dies at again is then known.
        """
        shards = [int(shard) for shard in batch["shards"][0]]
        alone = len(shards) > 1 and any(left_behind(self._mark(shard)[1]) for shard in shards)
        groups = [[shard] for shard in shards] if alone else [shards]
        outcomes = [outcome for group in groups for outcome in self._outcomes(group)]
        return {"outcome": np.array([pickle.dumps(outcome) for outcome in outcomes], object)}

    def _outcomes(self, shards: list[int]) -> list[ShardOutcome]:
        """Not the constructor loads the encoders: Ray buries its errors in a dead actor's story."""
        try:
            with ExitStack() as marks:
                for shard in shards:
                    target, mark = self._mark(shard)
                    _refuse_deadly(target, shard, len(left_behind(mark)))
                    marks.enter_context(marked(mark))
                self._embedder = self._embedder or ShardEmbedder(*self._arguments)
                return list(self._embedder.each(shards))
        except PvrpipeError as error:
            return [ShardOutcome(shard, failures=[error]) for shard in shards]

    def _mark(self, shard: int) -> tuple[Target, Path]:
        """A store that lacks the shard, and beside its file what tells of attempts at it."""
        target = next(t for t in self._arguments[1] if shard in t.todo)
        file = target.folder / shard_file(shard, target.manifest.shard_format)
        return target, file.with_suffix(".attempt")


def _refuse_deadly(target: Target, shard: int, deaths: int) -> None:
    """Ray tries again without end; each worker that died at a shard has left a mark."""
    if deaths < DEATHS:
        return
    plan = target.manifest.plan[shard]
    last = plan.first_episode + plan.episodes - 1
    raise EncodingError(
        f"{DEATHS} workers died at shard {shard} (episodes {plan.first_episode} to {last}); give them more memory "
        "or fewer --workers, or find out with --engine inline, then run the same command again"
    )


def run_on_ray(
    rollouts: Place | str,
    jobs: Sequence[tuple[Sequence[Target], Sequence[int]]],
    address: str | None,
    workers: int | None,
) -> Iterator[ShardOutcome]:
    """Embed shards on a Ray cluster, one pass after another; what became of each, as it is done.

    A lost actor is replaced and its shard done again, on another node if need be; nodes that join get actors. A
    shard either was committed or was not, so nothing is written twice. A shard whose workers die again and again
    fails, and the others are finished.

    Args:
        rollouts: which workers reach under the same path.
        jobs: of each pass, what to fill and which shards.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: the most there may be; None takes what the cluster has.

    Raises:
        ClusterError: Ray cannot be reached, or fails.
    """
    with _ray(address):
        for targets, todo in jobs:
            yield from _pass(rollouts, targets, todo, workers)


def run_one(work: Callable[..., R], address: str | None, device: str, progress: Progress) -> R:
    """One piece of work on a worker of the cluster; begun again where its process or node dies.

    Args:
        work: takes ``progress``, and ``again``: whether a worker that died had begun it.
        address: as of :func:`run_on_ray`.
        device: that it computes on; a GPU is asked of the cluster for ``cuda``, and for ``auto`` where it has any.
        progress: told what the work tells.

    Raises:
        ClusterError: Ray cannot be reached, or fails.
        PvrpipeError: whatever the work raises.
    """
    with _ray(address):
        on_gpu = device.startswith("cuda") or (device == "auto" and "GPU" in ray.cluster_resources())
        told: Any = ray.remote(num_cpus=0)(_Told).remote()
        task: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=DEATHS - 1)(_telling)
        result = task.remote(work, told)
        while not ray.wait([result], timeout=LOOK_AROUND)[0]:
            if last := ray.get(told.last.remote()):
                progress(*last)
        try:
            made: R = ray.get(result)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, PvrpipeError) else error) from None
        return made


class _Told:
    """What a worker said of its progress last, and whether it is the first to work."""

    def __init__(self) -> None:
        self._last: tuple[float, float, str] | None = None
        self._begun = False

    def begin(self) -> bool:
        before, self._begun = self._begun, True
        return before

    def tell(self, *progress: Any) -> None:
        self._last = progress

    def last(self) -> tuple[float, float, str] | None:
        return self._last


def _telling(work: Callable[..., R], told: Any) -> R:
    def tell(done: float, total: float, note: str = "") -> None:
        told.tell.remote(done, total, note)

    return work(progress=tell, again=ray.get(told.begin.remote()))


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray for as long as it is needed, on this machine or at an address."""
    try:
        with ray_cluster(address):
            yield
    except (RayError, ConnectionError) as error:
        if isinstance(error, RayTaskError):
            raise  # a bug in a worker: show where
        raise ClusterError(
            f"Ray failed ({one_line(error)[:200]}); run the same command again to go on, or with --engine inline"
        ) from error


def _pass(
    rollouts: Place | str, targets: Sequence[Target], todo: Sequence[int], workers: int | None
) -> Iterator[ShardOutcome]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    on_gpu = device_named(targets[0].request.device).type == "cuda"
    now = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1))
    most = min(workers or len(todo), len(todo))
    begin = max(1, min(now, most))
    in_a_row = max(1, min(IN_A_ROW, len(todo) // (TURNS * begin)))
    rows = [{"shards": list(todo[at : at + in_a_row])} for at in range(0, len(todo), in_a_row)]
    outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(place_of(rollouts).resolve(), list(targets)),
        batch_size=1,  # row; one must be given where a GPU is asked for
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=begin, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    for row in outcomes.iter_rows():
        outcome: ShardOutcome = pickle.loads(row["outcome"])
        yield outcome
