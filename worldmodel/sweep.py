"""Many runs at once, each trained and probed on its own.

A job is an ordinary run in an ordinary folder, as ``pvrpipe train-model`` would make it. So a sweep that was stopped
goes on where each of its runs was, and one that fails leaves the others alone.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pvrpipe.schemas.errors import DivergedError, InvalidValueError, PvrpipeError, one_line
from pvrpipe.schemas.progress import Progress, counted, silent
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.actions import bounds_of
from pvrpipe.worldmodel.backbones import Looking
from pvrpipe.worldmodel.batches import Backing
from pvrpipe.worldmodel.metrics_log import updates_done
from pvrpipe.worldmodel.pictures import draw, drawn
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.training import TrainConfig, train

State = Literal["finished", "failed", "diverged"]


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    store: str
    run: Path
    config: TrainConfig
    horizons: tuple[int, ...] = ()
    """rows that it is probed over; none: it is not probed"""
    context: int = 1
    split: tuple[str, ...] = ("val",)
    shifts: tuple[tuple[str, str], ...] = ()
    """further stores that it is probed on: (label, store)"""
    frames: str = ""
    """the rollout store that pictures of its latents come from; empty: none are made"""
    looking: Looking | None = None
    """what makes the backbone that it looks at frames through; None: it has none"""
    backing: Backing = "auto"
    """where windows are read from"""
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
    state: State
    updates: int
    loss: float | None = None
    val_loss: float | None = None
    probe: dict[str, Any] | None = None
    failure: str = ""

    @classmethod
    def of(cls, job: Job, state: State, **found: Any) -> Outcome:
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
    """Train, probe and draw one run; whatever goes wrong is its outcome, for the others are to go on."""
    try:
        backbone = job.looking and job.looking(job.device)
        result = train(
            job.config,
            job.store,
            job.run,
            device=job.device,
            overwrite=job.overwrite,
            backing=job.backing,
            backbone=backbone,
            progress=progress,
        )
        metrics = [_probed(job, label, store, backbone) for label, store in _probes(job)]
        if job.frames:
            draw(job.run, job.frames, context=job.context, seed=job.config.seed, device=job.device)
    except DivergedError as error:
        return Outcome.of(job, "diverged", failure=one_line(error))
    except Exception as error:
        return Outcome.of(job, "failed", failure=one_line(error))
    return _finished(job, result.train["loss"], result.val["loss"], metrics)


def finished(job: Job) -> Outcome | None:
    """The outcome of a job of which nothing is left to do, from its files alone; None of any other."""
    record = trained(job)
    if record is None or job.looking is not None or (job.frames and not drawn(job.run, job.context)):
        return None
    try:
        metrics = [_found(job, label, store) for label, store in _probes(job)]
    except (PvrpipeError, OSError, ValueError, KeyError):
        return None
    known = [found for found in metrics if found is not None]
    if record.result is None or len(known) < len(metrics):
        return None
    return _finished(job, record.result["train"]["loss"], record.result["val"]["loss"], known)


def trained(job: Job) -> runs.RunRecord | None:
    """The run of a job if it is trained to its end as the job asks, whatever else is left to do; else None."""
    try:
        record = runs.read_run(job.run)
        store = Store.open(job.store).manifest
        same = (
            not runs.differing(record.config, asdict(job.config))
            and record.store_id == store.id
            and record.setting.bounds == bounds_of(store.rollouts)
        )
    except (PvrpipeError, OSError, ValueError, KeyError):
        return None
    return None if job.overwrite or not same or record.result is None else record


def _finished(job: Job, loss: float, val_loss: float, metrics: Sequence[dict[str, Any]]) -> Outcome:
    own = metrics[0] if metrics else None
    return Outcome.of(job, "finished", loss=loss, val_loss=val_loss, probe=own)


def _probes(job: Job) -> list[tuple[str, str]]:
    """Label and store of each probe of a job; its own store's first, without a label."""
    return [("", job.store), *job.shifts] if job.horizons else []


def _probed(job: Job, label: str, store: str, backbone: nn.Module | None) -> dict[str, Any]:
    return _found(job, label, store) or probe(
        job.run,
        store,
        horizons=job.horizons,
        context=job.context,
        split=job.split,
        seed=job.config.seed,
        device=job.device,
        label=label,
        backbone=backbone,
    )


def _found(job: Job, label: str, store: str) -> dict[str, Any] | None:
    """What an earlier probe of this run found, if it was asked the same of the same store."""
    path = job.run / runs.labelled(runs.PROBE, label)
    if not path.is_file() or not runs.has_its_table(job.run, label):
        return None
    asked = {
        "store_id": _id_of(store),
        "horizons": set(job.horizons),
        "splits": set(job.split),
        "split": job.split[0],
        "context": job.context,
        "seed": job.config.seed,
        "run_state": "finished",
    }
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        same = runs.asked_of(found) == asked
    except (ValueError, KeyError, TypeError):
        return None  # damaged, or another version's: to be probed again
    return found if same else None


def _id_of(store: str) -> str | None:
    return Store.open(store).manifest.id


def sweep(
    jobs: Sequence[Job],
    *,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    workers: int | None = None,
    progress: Progress = silent,
    told: Callable[[Job, Outcome], None] | None = None,
) -> list[Outcome]:
    """Do all jobs, one after another or on Ray; their outcomes in the order of the jobs.

    Args:
        jobs: each with a run of its own, in a folder that every worker reaches under the same path.
        engine: ``ray``, as many at once as there are processors, or GPUs where jobs are to use one; or ``inline``.
        address: of a running cluster; None starts Ray on this machine, unless it is initialised already.
        workers: the most at once on Ray.
        progress: told updates done and to do, over all jobs that are left.
        told: told each job once its outcome is known.

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
    known = {number: finished(job) for number, job in enumerate(jobs)}
    done = {number: outcome for number, outcome in known.items() if outcome is not None}
    todo = [number for number in range(len(jobs)) if number not in done]
    left = [jobs[number] for number in todo]
    inline = engine == "inline" or not left
    made = _one_by_one(left, progress) if inline else _on_ray(left, address, workers, progress)
    for number, outcome in itertools.chain(list(done.items()), ((todo[place], o) for place, o in made)):
        done[number] = outcome
        if told is not None:
            told(jobs[number], outcome)
    return [done[number] for number in range(len(jobs))]


def _one_by_one(jobs: Sequence[Job], progress: Progress) -> Iterator[tuple[int, Outcome]]:
    """The jobs in this process."""
    before, total = 0, _updates_of(jobs)
    for number, job in enumerate(jobs):
        outcome = do(job, partial(_shifted, progress, before, total))
        before += outcome.updates
        progress(before, total, f"{number + 1} of {counted(len(jobs), 'run')}")
        yield number, outcome


def _on_ray(
    jobs: Sequence[Job], address: str | None, workers: int | None, progress: Progress
) -> Iterator[tuple[int, Outcome]]:
    """The jobs as they are done, by several processes."""
    from pvrpipe.worldmodel.ray_engine import outcomes

    count = 0

    def watch() -> None:
        progress(
            sum(updates_done(job.run) for job in jobs),
            _updates_of(jobs),
            f"{count} of {counted(len(jobs), 'run')}",
        )

    gpus = 1 if any(job.device.startswith("cuda") for job in jobs) else 0
    for number, found in outcomes(jobs, do, address=address, workers=workers, gpus=gpus, watch=watch):
        count += 1
        watch()
        if isinstance(found, str):
            found = Outcome.of(jobs[number], "failed", failure=found)
        yield number, found


def _updates_of(jobs: Sequence[Job]) -> int:
    return sum(job.config.updates for job in jobs)


def _shifted(progress: Progress, before: int, total: int, done: float, _: float, note: str = "") -> None:
    """Progress of one job as part of that of all."""
    progress(before + done, total, note)
