"""What a study will cost before it is begun: jobs, bytes and hours.

Rates are those of past runs and stores of the same workspace; where there are none, those measured for
``docs/benchmarks.md`` on one processor of the machine described there. Where nothing was measured there are no hours.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.commands.study_checks import sealed
from pvrpipe.commands.study_plan import Encoded, Look, Plan
from pvrpipe.pipeline.pvrs import SPEC_FILE
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.study_record import RECORD, read_record
from pvrpipe.worldmodel.runs import read_run
from pvrpipe.worldmodel.sweep import Job, finished, trained

STEPS = 1000  # transitions of an episode, where a study leaves them to the task
FRAME_BYTES = 3975 / 224**2  # of a pixel of pendulum-swingup, compressed
SECONDS_PER_FRAME = {128: 0.031, 512: 0.050}  # up to so many pixels: stepped, rendered, planned, written
PRETRAINED_PER_SECOND = 10.0  # updates of the autoencoder at 64 px, batch 64
#: Frames a second at 224 px in fp32 on one processor, by the architecture's name.
EMBEDDED = {
    "resnet18": 23.3,
    "resnet50": 8.0,
    "vit_tiny": 54.0,
    "vit_small": 13.0,
    "vit_base": 4.9,
    "vit_large": 1.4,
}
#: Seconds of an update for each row of its batch, on one processor.
TRAINED = {("dreamerv3", "1m"): 0.150 / 1024, ("dreamerv3", "12m"): 1.160 / 1024}


@dataclass(frozen=True)
class Cost:
    """One stage."""

    stage: str
    jobs: int
    left: int
    bytes: int
    """that what is left will take"""
    hours: float | None
    """of one worker; None where a rate is not known"""
    rates: str
    """where they are from"""


def costs_of(plan: Plan) -> list[Cost]:
    """Every stage of a study, as far as it is left to do."""
    past = _past_rates(plan.root)
    looks = [look for look in plan.looks if sealed(look.folder) is None]
    encoders = {each.pretrained[0]: each for each in plan.embeddings if each.pretrained is not None}
    unmade = [folder for folder in encoders if not (folder / SPEC_FILE).is_file()]
    embeddings = [each for each in plan.embeddings if sealed(each.folder) is None]
    jobs = [job for job, _ in plan.jobs if finished(job) is None]
    untrained = [job for job in jobs if trained(job) is None]
    updates = plan.study.pretrain.updates * len(unmade)
    return [
        _cost(
            "collect",
            len(plan.looks),
            [_collecting(look, past) for look in looks],
            sum(int(frames_of(look) * FRAME_BYTES * look.config.size**2) for look in looks),
        ),
        _cost("pretrain", len(encoders), [updates / PRETRAINED_PER_SECOND] * bool(unmade), 0, len(unmade)),
        _cost(
            "embed",
            len(plan.embeddings),
            [_embedding(each, past) for each in embeddings],
            sum(frames_of(each.look) * _width(each) * np.dtype(each.dtype).itemsize for each in embeddings),
        ),
        _cost(
            "train and probe",
            len(plan.jobs),
            # Of probes and maps no rate is known: where nothing else is left, neither are the hours.
            [_training(job, past) for job in untrained] or [None] * len(jobs),
            sum(int(float(job.config.size.rstrip("m")) * 12e6) for job in untrained),
            len(jobs),
        ),
    ]


def frames_of(look: Look) -> int:
    """Rows of a rollout store; of one that is there, those it has."""
    manifest = sealed(look.folder)
    if manifest is not None:
        return manifest.rows
    return look.config.episodes * ((look.config.max_steps or STEPS) + 1)


def _cost(stage: str, jobs: int, seconds: list[float | None], size: int, left: int | None = None) -> Cost:
    known = [each for each in seconds if each is not None]
    hours = sum(known) / 3600 if len(known) == len(seconds) else None
    rates = (
        "" if not seconds else "not measured for some" if hours is None else "past runs, docs/benchmarks.md"
    )
    return Cost(stage, jobs, len(seconds) if left is None else left, size, hours, rates)


def _collecting(look: Look, past: dict[Any, float]) -> float:
    size = min(side for side in SECONDS_PER_FRAME if side >= min(look.config.size, 512))
    rate = past.get(("collect", look.environment))
    return frames_of(look) / rate if rate else frames_of(look) * SECONDS_PER_FRAME[size]


def _embedding(each: Encoded, past: dict[Any, float]) -> float | None:
    rate = past.get(("embed", each.label))
    if rate is None and each.request is not None and each.pretrained is None:
        architecture = find_pvr(each.request.pvr).architecture
        rate = next((rate for name, rate in EMBEDDED.items() if architecture.startswith(name)), None)
    elif rate is None:
        rate = 1 / SECONDS_PER_FRAME[128]  # a small network; no slower than rendering
    return frames_of(each.look) / rate if rate else None


def _training(job: Job, past: dict[Any, float]) -> float | None:
    config = job.config
    rate = past.get(("train", config.model, config.size, "-from-scratch-" in job.run.name))
    each = 1 / rate if rate else TRAINED.get((config.model, config.size))
    return each * config.updates * config.windows * config.rows if each else None


def _width(each: Encoded) -> int:
    """Numbers of an embedding; of an encoder that the study trains, those it will have."""
    if each.request is None or each.pretrained is not None:
        return 128
    return int(find_pvr(each.request.pvr).width)


def _past_rates(root: Path) -> dict[Any, float]:
    """Median frames, or rows of batches, a second, by what was done."""
    found: dict[Any, list[float]] = {}
    for path in sorted((root / "studies").glob(f"*/{RECORD}")):
        for key, rate in _rates_of_stores(path.parent):
            found.setdefault(key, []).append(rate)
    for folder in sorted((root / "runs").glob("*")):
        try:
            record = read_run(folder)
        except PvrpipeError:
            continue
        inside = record.setting.frames is not None  # an encoder in the loop sets the pace
        if record.result is None or not record.result["updates_per_second"] or inside:
            continue
        from pvrpipe.worldmodel.training import TrainConfig

        config = TrainConfig(**record.config)
        key = ("train", config.model, config.size, record.encoder is None)
        rows = config.windows * config.rows
        found.setdefault(key, []).append(record.result["updates_per_second"] * rows)
    return {key: statistics.median(rates) for key, rates in found.items()}


def _rates_of_stores(folder: Path) -> Iterable[tuple[Any, float]]:
    try:
        stores = read_record(folder).stores
    except PvrpipeError:
        return
    for store in stores:
        if store.frames_per_second and store.kind == "embeddings":
            yield ("embed", store.pvr), store.frames_per_second
        elif store.frames_per_second:
            yield ("collect", store.environment), store.frames_per_second
