"""Many runs at once, each trained and probed on its own.

A job is an ordinary run in an ordinary folder, as ``pvrpipe train-model`` would make it. So a sweep that was stopped
goes on where each of its runs was, and one that fails leaves the others alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pvrpipe.schemas.errors import InvalidValueError, one_line
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.runs import updates_done
from pvrpipe.worldmodel.training import TrainConfig, train


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    store: str
    run: Path
    config: TrainConfig
    horizons: tuple[int, ...] = ()
    """rows that it is probed over; none: it is not probed"""
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job; ``failure`` says why there are no numbers."""

    run: str
    store: str
    model: str
    size: str
    seed: int
    state: Literal["finished", "failed"]
    updates: int
    loss: float | None = None
    val_loss: float | None = None
    probe: dict[str, Any] | None = None
    failure: str = ""

    @classmethod
    def of(cls, job: Job, state: Literal["finished", "failed"], **found: Any) -> Outcome:
        """The outcome of a job as far as its run has come."""
        config, done = job.config, updates_done(job.run)
        return cls(
            str(job.run),
            job.store,
            config.model,
            config.size,
            config.seed,
            state=state,
            updates=done,
            **found,
        )


def do(job: Job, progress: Progress = silent) -> Outcome:
    """Train and probe one run; whatever goes wrong is its outcome, for the others are to go on."""
    try:
        result = train(
            job.config, job.store, job.run, device=job.device, overwrite=job.overwrite, progress=progress
        )
        metrics = (
            probe(job.run, horizons=job.horizons, seed=job.config.seed, device=job.device)
            if job.horizons
            else None
        )
    except Exception as error:
        return Outcome.of(job, "failed", failure=one_line(error))
    return Outcome.of(job, "finished", loss=result.train["loss"], val_loss=result.val["loss"], probe=metrics)


def sweep(
    jobs: Sequence[Job],
    *,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Do all jobs, one after another or on Ray; their outcomes in the order of the jobs.

    Args:
        jobs: each with a run of its own, in a folder that every worker reaches under the same path.
        engine: ``ray``, as many at once as there are processors, or GPUs where jobs are to use one; or ``inline``.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: the most at once on Ray.
        progress: told updates done and to do, over all jobs.

    Raises:
        InvalidValueError: two jobs would write to one folder.
        ClusterError: Ray cannot be reached, or fails.
    """
    twice = [run for run, count in Counter(job.run.absolute() for job in jobs).items() if count > 1]
    if twice:
        raise InvalidValueError(
            f"two jobs would write to {twice[0]}; name each store, model, size and seed once, and give stores whose "
            "folders differ in name"
        )
    total = sum(job.config.updates for job in jobs)
    if engine == "inline":
        return list(_one_by_one(jobs, total, progress))
    from pvrpipe.worldmodel.ray_engine import outcomes

    def watch() -> None:
        progress(sum(updates_done(job.run) for job in jobs), total, f"{len(done)} of {len(jobs)} runs")

    done: dict[int, Outcome] = {}
    gpus = 1 if any(job.device.startswith("cuda") for job in jobs) else 0
    for number, outcome in outcomes(jobs, do, address=address, workers=workers, gpus=gpus, watch=watch):
        job = jobs[number]
        done[number] = outcome if isinstance(outcome, Outcome) else Outcome.of(job, "failed", failure=outcome)
        watch()
    return [done[number] for number in range(len(jobs))]


def _one_by_one(jobs: Sequence[Job], total: int, progress: Progress) -> Iterator[Outcome]:
    """The jobs in this process."""
    before = 0
    for number, job in enumerate(jobs, start=1):
        outcome = do(job, partial(_shifted, progress, before, total))
        before += outcome.updates
        progress(before, total, f"{number} of {len(jobs)} runs")
        yield outcome


def _shifted(progress: Progress, before: int, total: int, done: float, _: float, note: str = "") -> None:
    """Progress of one job as part of that of all."""
    progress(before + done, total, note)
