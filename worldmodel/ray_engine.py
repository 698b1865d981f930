"""Jobs as Ray tasks, in whatever order they are done; the only file here that knows Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from pvrpipe.schemas.addresses import ray_arguments
from pvrpipe.schemas.errors import ClusterError, one_line
from pvrpipe.schemas.quiet import quiet_start

AGAIN = 2  # times that a job whose process or node died is begun again
LOOK_AROUND = 1.0  # seconds between two looks at how far the jobs are

J = TypeVar("J")
R = TypeVar("R")


def outcomes(
    jobs: Sequence[J],
    do: Callable[[J], R],
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus: float = 0,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, R | str]]:
    """The number of each job and what ``do`` made of it, or why it made nothing: its process died again and again.

    Args:
        jobs: each takes one processor.
        do: a function of a module, which workers import.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: the most jobs at once; None: as many as there are processors, also of nodes that join later.
        gpus: that each job takes besides.
        watch: called every second.

    Raises:
        ClusterError: Ray cannot be reached, or fails.
    """
    with _ray(address):
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=AGAIN)(do)
        todo, busy = deque(range(len(jobs))), dict[Any, int]()
        while todo or busy:
            while todo and len(busy) < (workers or len(jobs)):
                number = todo.popleft()
                busy[remote.remote(jobs[number])] = number
            ready, _ = ray.wait(list(busy), timeout=LOOK_AROUND)
            watch()
            for reference in ready:
                yield busy.pop(reference), _result(reference)


def _result(reference: Any) -> Any:
    """What a task returned, or why it did not."""
    try:
        return ray.get(reference)
    except RayError as error:
        return f"its process died ({one_line(error)[:200]}); run the same command again, with fewer --workers"


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray for as long as it is needed, on this machine or at an address."""
    started = not ray.is_initialized()
    try:
        if started:
            with quiet_start():
                ray.init(**ray_arguments(address))
        yield
    except (RayError, ConnectionError) as error:
        raise ClusterError(
            f"Ray failed ({one_line(error)[:200]}); run the same command again to go on, or with --engine inline"
        ) from error
    finally:
        if started:
            ray.shutdown()
