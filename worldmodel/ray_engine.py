"""Jobs as Ray tasks, in whatever order they are done, or one by several workers; the only file here that knows Ray."""

from __future__ import annotations

import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from pvrpipe.schemas import errors
from pvrpipe.schemas.clusters import ray_cluster
from pvrpipe.schemas.errors import (
    ClusterError,
    InvalidValueError,
    PvrpipeError,
    StoreBusyError,
    UnreachableError,
    one_line,
)
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.files import make_folder, write_whole
from pvrpipe.store.places import is_url
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.backbones import Looking
from pvrpipe.worldmodel.batches import Backing
from pvrpipe.worldmodel.metrics_log import updates_done
from pvrpipe.worldmodel.ranks import told_by_first
from pvrpipe.worldmodel.runs import RECORD
from pvrpipe.worldmodel.training import TrainConfig, TrainResult, train

AGAIN = 2  # times that a job whose process or node died is begun again
MISTAKE = "mistake.json"  # what of a user's ended a training by several workers
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


def train_together(
    config: TrainConfig,
    store: str,
    run: Path,
    *,
    workers: int,
    device: str = "cpu",
    address: str | None = None,
    overwrite: bool = False,
    backing: Backing = "auto",
    looking: Looking | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train one model by several workers, each with its part of every batch.

    When one dies, all go on from the checkpoint.

    Args:
        config: what and how, as of :func:`pvrpipe.worldmodel.training.train`.
        store: which all workers reach under the same path; Ray Train gives them a working folder of their own.
        run: likewise.
        workers: processes; their number must divide the batch.
        device: ``cpu``, or ``cuda`` for a GPU each.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        overwrite: replace a run of another configuration.
        backing: where windows are read from.
        looking: makes the backbone that the model is to look at frames through.
        progress: told updates done and to do.

    Raises:
        InvalidValueError: more workers than the cluster has processors, or GPUs.
        ClusterError: Ray cannot be reached, or its workers die again and again.
        PvrpipeError: what training raises.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    run, store = run.absolute(), store if is_url(store) else str(Path(store).absolute())
    scratch = run.parent / f".{run.name}-ray"
    trainer = TorchTrainer(
        _train_part,
        train_loop_config={
            "arguments": (config, store, run),
            "device": device,
            "backing": backing,
            "looking": looking,
            "mistake": scratch / MISTAKE,
            "replaced": _written(run) if overwrite else None,
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=device.startswith("cuda")),
        run_config=RunConfig(
            name="train", storage_path=str(scratch), failure_config=FailureConfig(max_failures=AGAIN)
        ),
    )
    watch = lambda: progress(updates_done(run), config.updates, f"{workers} workers")  # noqa: E731
    try:
        make_folder(scratch)
        with _ray(address), _watched(watch):
            _refuse_too_many(workers, "GPU" if device.startswith("cuda") else "CPU")
            trainer.fit()
        if (scratch / MISTAKE).exists():
            kind, message = json.loads((scratch / MISTAKE).read_text())
            raise getattr(errors, kind)(message)
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, PvrpipeError):
                raise failure from None
        raise ClusterError(
            f"the workers failed ({one_line(error)[:200]}); run the same command again to go on"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result = runs.read_run(run).result
    assert result is not None
    return TrainResult(**{**result, "run": str(run)})


def _refuse_too_many(workers: int, kind: str) -> None:
    """Ray Train would wait for processors that never come."""
    there = int(ray.cluster_resources().get(kind, 0))
    if workers > there:
        raise InvalidValueError(
            f"--workers is {workers}, but the cluster has {there} {kind}s; give as many or fewer"
        )


def _train_part(asked: dict[str, Any]) -> None:
    """What each worker does; Ray Train has made the process group.

    It begins all workers again whatever the failure was. So a mistake, which would be one again, is put down for the
    driver, and there is nothing left to do for those who find one.
    """
    from ray.train.torch import get_device

    if asked["mistake"].exists():
        return
    device = get_device() if asked["device"].startswith("cuda") else "cpu"
    backbone = asked["looking"] and asked["looking"](str(device))
    # Only the run that was there is replaced, not what these workers have begun before one of them died.
    there = asked["replaced"]
    overwrite = told_by_first(there is not None and there == _written(asked["arguments"][2]))
    try:
        train(
            *asked["arguments"],
            device=device,
            overwrite=overwrite,
            backing=asked["backing"],
            backbone=backbone,
        )
    except (UnreachableError, StoreBusyError):
        raise
    except PvrpipeError as error:
        write_whole(asked["mistake"], json.dumps([type(error).__name__, str(error)]).encode())
        raise


def _written(run: Path) -> int | None:
    """When a run was begun or ended, in nanoseconds; None where there is none."""
    try:
        return (run / RECORD).stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextmanager
def _watched(watch: Callable[[], None]) -> Iterator[None]:
    """Look every second, from a thread, while something else blocks."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_AROUND):
            watch()

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def _result(reference: Any) -> Any:
    """What a task returned, or why it did not."""
    try:
        return ray.get(reference)
    except RayError as error:
        return f"its process died ({one_line(error)[:200]}); run the same command again, with fewer --workers"


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray for as long as it is needed, on this machine or at an address."""
    try:
        with ray_cluster(address):
            yield
    except (RayError, ConnectionError) as error:
        raise ClusterError(
            f"Ray failed ({one_line(error)[:200]}); run the same command again to go on, or with --engine inline"
        ) from error
