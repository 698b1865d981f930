"""Studies whose every error a test has made up: records, runs and probe tables as `pvrpipe study` leaves them."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from pvrpipe.schemas.study import Study
from pvrpipe.schemas.study_record import JobRecord, StoreRecord, StudyRecord
from pvrpipe.store.workspace import slug
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting
from pvrpipe.worldmodel.pictures import MOMENT, POINT, SEPARATION, webp, write_pictures
from pvrpipe.worldmodel.training import TrainConfig

from .conftest import rollout_specification
from .planted import specification

HORIZONS = (1, 8, 33, 500)
ROWS = 300  # of an episode behind the context; it does not reach the last horizon
DIVERGENCES = {"dreamerv3": "dynamics_kl_mean", "tdmpc2": "dynamics_mse"}
OTHERS = {"dreamerv3": ("dynamics_kl_forward", "dynamics_mse"), "tdmpc2": ()}
#: Representations and their errors, as most tests plant them.
TRUE = {"from scratch": 1.0, "vc1": 0.8, "autoencoder": 1.3, "random": 1.9}
FLOOR = 2.0  # what the trivial prediction gets, in units of a factor of 1
#: What is in a table of a probe besides, and counted nowhere: how many times as large it is as what is counted.
BESIDE = {
    "one_step": 7.0,
    "shuffled_actions": 11.0,
    "other_control": 13.0,
    "other_measure": 17.0,
    "train": 19.0,
}
TRIVIAL = {"state_error": "mean"}  # which control an error is held against; others against no_change


@dataclass(frozen=True)
class Planted:
    """What is true of a study."""

    factors: Mapping[str, float]
    """representation → its errors, as multiples of one and the same; ``NAME blocks WHICH`` is cut down to
    these; weights may be named behind them"""
    tasks: Sequence[str] = ("dmc:one", "dmc:other")
    models: Sequence[str] = ("dreamerv3", "tdmpc2")
    seeds: int = 6
    first_seed: int = 0
    shifts: Mapping[str, float] = field(default_factory=lambda: {"ood": 1.5})
    """further look → by how much errors grow on it"""
    maps: Mapping[str, float] = field(default_factory=lambda: {"auto": 1.0})
    """map from the embedding to the model → by how much it changes errors"""
    noise: float = 0.05
    """of a run, relative"""
    episodes: int = 8
    pictures: bool = False
    updates: int = 1000
    """that each run was trained for"""
    store: str = "0" * 64
    """id of what they were trained on"""


def write_study(root: Path, planted: Planted, **of_record: object) -> Path:
    """Write it all into a workspace; the study's folder."""
    folder = root / "studies" / "planted"
    folder.mkdir(parents=True)
    jobs = [
        _write_run(root, planted, task, pvr, encoder, model, seed)
        for task in planted.tasks
        for pvr in planted.factors
        for encoder in planted.maps
        for model in planted.models
        for seed in range(planted.first_seed, planted.first_seed + planted.seeds)
    ]
    stores = [
        StoreRecord(
            folder=f"embeddings/{task[4:]}/{pvr}",
            kind="embeddings",
            environment=task,
            variation="none",
            pvr=pvr,
            state="finished",
            id=planted.store,
            weights_sha256="1" * 64,
            random_weights=pvr.startswith("random"),
            vit=number % 2 == 0,
            rows=1000,
            bytes=1000 * 1536,
            frames_per_second=10.0 + number,
            memory_bytes=1_000_000 * (1 + number),
            command=f"pvrpipe embed {pvr}",
        )
        for task in planted.tasks
        for number, pvr in enumerate(planted.factors)
        if pvr != "from scratch"
    ]
    study = Study.model_validate(
        {
            "name": "planted",
            "title": "A planted study",
            "environments": list(planted.tasks),
            "shifts": list(planted.shifts),
            "pvrs": ["scratch"],
            "models": [{"model": model} for model in planted.models],
            "seeds": list(range(planted.first_seed, planted.first_seed + planted.seeds)),
        }
    )
    made = {"state": "finished", "stores": stores, "jobs": jobs, "command": "pvrpipe study planted.yaml"}
    record = StudyRecord.model_validate({"study": study, "root": "../..", **made, **of_record})
    (folder / "study.json").write_text(record.model_dump_json())
    return folder


def _write_run(
    root: Path, planted: Planted, task: str, pvr: str, encoder: str, model: str, seed: int
) -> JobRecord:
    through = "" if encoder == "auto" else f"-{encoder}"
    name = f"{task[4:]}-{pvr.replace(' ', '-')}{through}-{model}-s{seed}"
    run, key = root / "runs" / name, zlib.crc32(f"{name}".encode())
    run.mkdir(parents=True)
    config = TrainConfig(model=model, seed=seed, updates=planted.updates)
    made = specification(rollout_specification(1, 1), pvr, (4,), "0" * 64)
    record = runs.RunRecord(
        state="finished",
        config=asdict(config),
        store=f"embeddings/{task[4:]}/{pvr}",
        store_id=planted.store,
        encoder=None if pvr == "from scratch" else made.encoder,
        setting=Setting(vector(4), 1, 2, 500, False),
        parameters=1,
        device="cpu",
        versions={},
    )
    runs.write_run(run, record)
    random = np.random.default_rng(key)
    of_run = planted.factors[pvr] * planted.maps[encoder] * np.exp(random.normal(0, planted.noise))
    looks = {"": 1.0, **{slug(look): grown for look, grown in planted.shifts.items()}}
    for label, grown in looks.items():
        table = _table(planted, model, of_run * grown, "ood" if label else "id", random)
        table.with_columns(environment=pl.lit(task), variation=pl.lit(label or "none")).write_parquet(
            run / runs.labelled(runs.PROBE_TABLE, label)
        )
    if planted.pictures and seed == 0:
        _draw(run, task, random)
    return JobRecord(
        run=f"runs/{name}",
        store=f"embeddings/{task[4:]}/{pvr}",
        environment=task,
        variation="none",
        pvr=pvr,
        encoder=encoder,
        blocks=pvr.partition(" blocks ")[2].partition(" ")[0] or "all",
        model=model,
        size="1m",
        seed=seed,
        state="finished",
        probes=tuple(runs.labelled(runs.PROBE_TABLE, label) for label in looks),
        commands=(f"pvrpipe train-model {name}", f"pvrpipe probe {name}"),
    )


def _table(
    planted: Planted, model: str, factor: float, distribution: str, random: np.random.Generator
) -> pl.DataFrame:
    """Probe rows: an episode's error is the factor times what its episode adds, and grows with the horizon."""
    measures = ("reward_error", "state_error", DIVERGENCES[model], *OTHERS[model])
    keys = [
        (prediction, control, measure, horizon)
        for prediction in ("open_loop", "one_step")
        for control in ("model", "shuffled_actions", "no_change", "mean")
        for measure in measures
        for horizon in HORIZONS
    ]
    N, K = planted.episodes + 1, len(keys)  # the last is of the other split
    columns = list(zip(*keys, strict=True))
    horizon = np.tile(np.array(columns[3], np.int32), N)
    level = np.tile([_level(model, factor, *key[:3]) for key in keys], N)
    of_episode = 1 + 0.1 * random.normal(size=N)
    of_episode[-1] *= BESIDE["train"]
    steps = np.minimum(horizon, ROWS)
    accumulated = level * np.repeat(of_episode, K) * steps
    return pl.DataFrame(
        {
            "episode": np.repeat(np.arange(N), K),
            "split": np.repeat(["val"] * planted.episodes + ["train"], K),
            "distribution": np.full(N * K, distribution),
            "prediction": list(columns[0]) * N,
            "control": list(columns[1]) * N,
            "measure": list(columns[2]) * N,
            "horizon": horizon,
            "steps": steps,
            "accumulated": accumulated,
            "per_step": accumulated / steps,
        }
    )


def _level(model: str, factor: float, prediction: str, control: str, measure: str) -> float:
    """An error's size: what is planted, and other sizes of what a report does not ask for."""
    trivial = TRIVIAL.get(measure, "no_change")
    size = {"model": factor, "shuffled_actions": BESIDE["shuffled_actions"], trivial: FLOOR}
    level = size.get(control, BESIDE["other_control"])
    level *= BESIDE["one_step"] if (prediction, control) == ("one_step", "model") else 1.0
    return level * (BESIDE["other_measure"] if measure in OTHERS[model] else 1.0)


def _draw(run: Path, task: str, random: np.random.Generator, points: int = 400, moments: int = 8) -> None:
    """A map and a film strip of noise, as large as real ones."""
    seen = np.random.default_rng(zlib.crc32(task.encode()))  # maps of one task show the same rows
    frames = [webp(f, POINT) for f in seen.integers(0, 256, (points, 8, 8, 3), np.uint8)]
    places = {f"{m}_{axis}": random.normal(size=points) for m in ("pca", "umap") for axis in "xy"}
    about = {"episode": np.arange(points) // 20, "step": np.arange(points) % 20}
    table = pl.DataFrame({**about, "reward": seen.uniform(size=points), **places, "frame": frames})
    separation = json.dumps({"latent": 0.5, "pca": 0.2, "umap": 0.4})
    write_pictures(run / runs.MAP, table, {SEPARATION: separation})
    pictures = {
        name: [webp(f, MOMENT) for f in random.integers(0, 256, (moments, 8, 8, 3), np.uint8)]
        for name in ("true", "imagined", "seen")
    }
    numbers = {name: random.uniform(size=moments) for name in ("received", "predicted", "distance")}
    strip = pl.DataFrame(
        {"episode": [0] * moments, "step": list(range(1, moments + 1)), **pictures, **numbers}
    )
    write_pictures(run / runs.STRIP, strip, {})


def picture_of(data: bytes) -> tuple[int, int]:
    """Size of an encoded picture."""
    return Image.open(BytesIO(data)).size


def data_of(page: Path) -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    """What the charts of a page are drawn from."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    content: dict[str, list[dict[str, list[dict[str, str]]]]] = json.loads(found[1])
    return content
