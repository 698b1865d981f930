"""Sweeps: the same runs as one by one, on both engines, whatever becomes of the others."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import ray
from typer.main import get_command

from pvrpipe.cli import app
from pvrpipe.commands.options import ReadoutOptions
from pvrpipe.commands.training_options import TrainOptions
from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel import checkpoints
from pvrpipe.worldmodel.ray_engine import AGAIN, outcomes
from pvrpipe.worldmodel.runs import RECORD, read_run
from pvrpipe.worldmodel.sweep import Job, Outcome, finished, sweep
from pvrpipe.worldmodel.training import TrainConfig, train

from .commands import run
from .planted import write_planted

ROWS = 8  # of a window; the short store's episodes have fewer


def noise(number: int, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    return {
        name: random.uniform(-1, 1, (rows, *shape)).astype(np.float32)
        for name, shape in (("embedding", (6,)), ("action", (2,)), ("reward", ()))
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    rows = {"one": 12, "other": 14, "short": ROWS - 2}
    return {
        name: write_planted(folder / name, [noise(e, count) for e in range(10)])
        for name, count in rows.items()
    }


def config(model: str, seed: int) -> TrainConfig:
    return TrainConfig(
        model, updates=4, batch=4, length=ROWS - 2 * (model == "tdmpc2"), seed=seed, log_every=2, save_every=2
    )


def jobs_in(folder: Path, stores: dict[str, Path]) -> list[Job]:
    """Three models and two seeds on the first store, and one job on each of the others; the last one fails."""
    asked = [("one", model, seed) for model in ("dreamerv3", "tdmpc2", "dinowm") for seed in (0, 1)]
    asked += [("short", "dreamerv3", 0), ("other", "dinowm", 0)]
    return [
        Job(str(stores[store]), folder / f"{store}-{model}-{seed}", config(model, seed), horizons=(3,))
        for store, model, seed in asked
    ]


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_sweep_makes_the_runs_that_train_makes_and_one_failure_stops_none(
    engine: Literal["inline", "ray"], stores: dict[str, Path], tmp_path: Path
) -> None:
    jobs, told = jobs_in(tmp_path, stores), []
    heard: list[Outcome] = []
    found = sweep(
        jobs,
        engine=engine,
        workers=2,
        progress=lambda *about: told.append(about),
        told=lambda job, outcome: heard.append(outcome),
    )
    assert sorted(heard, key=found.index) == found
    assert [Path(outcome.run) for outcome in found] == [job.run for job in jobs]
    (failed,) = [outcome for outcome in found if outcome.state == "failed"]
    assert failed.store == str(stores["short"])
    assert "--length" in failed.failure
    assert not jobs[-2].run.exists()
    assert told[-1][:2] == (28, 32)
    for job, outcome in zip(jobs, found, strict=True):
        if outcome is failed:
            continue
        alone = train(job.config, job.store, tmp_path / "alone" / job.run.name)
        ours, theirs = (f / checkpoints.CHECKPOINT for f in (job.run, Path(alone.run)))
        assert ours.read_bytes() == theirs.read_bytes()
        assert (outcome.updates, outcome.loss, outcome.val_loss) == (
            4,
            alone.train["loss"],
            alone.val["loss"],
        )
        assert outcome.probe is not None
        assert outcome.probe == json.loads((job.run / "metrics.json").read_text())


def test_a_sweep_that_is_run_again_leaves_finished_runs_alone(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    twice = {"horizons": (3, 3), "split": ("val", "val")}  # said twice, asked once
    jobs = [replace(job, **twice) for job in jobs_in(tmp_path, stores)[:2]]
    first = sweep(jobs[:1], engine="inline")
    made = [jobs[0].run / name for name in (checkpoints.CHECKPOINT, "probe.parquet")]
    stamps = [path.stat().st_mtime_ns for path in made]
    both = sweep(jobs, engine="inline")
    assert both[0] == first[0]
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert finished(jobs[0]) == first[0]
    for asked in ({"context": 2}, {"horizons": (4,)}, {"split": ("train",)}, {"overwrite": True}):
        assert finished(replace(jobs[0], **asked)) is None, asked
    other = replace(jobs[0], config=config("dreamerv3", 9))
    (refused,) = sweep([other], engine="inline")
    assert "seed: 0, now 9" in refused.failure
    (again,) = sweep([replace(other, overwrite=True)], engine="inline")
    assert again.state == "finished"
    with pytest.raises(InvalidValueError, match="two jobs would write to"):
        sweep([*jobs, other], engine="inline")


def test_a_run_of_before_an_option_was_there_is_finished_with_it_off(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """Such a run was counted as left to do."""
    job = jobs_in(tmp_path, stores)[0]
    (first,) = sweep([job], engine="inline")
    record = json.loads((job.run / RECORD).read_bytes())
    del record["config"]["joined"]
    (job.run / RECORD).write_text(json.dumps(record))
    assert finished(job) == first
    assert finished(replace(job, config=replace(job.config, joined=True))) is None


def test_a_probe_that_cannot_be_read_is_made_again(stores: dict[str, Path], tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, stores)[:1]
    (first,) = sweep(jobs, engine="inline")
    found = jobs[0].run / "metrics.json"
    whole = found.read_bytes()
    for spoiled in (whole[:-20], b"[]", b"{}"):
        found.write_bytes(spoiled)
        assert sweep(jobs, engine="inline") == [first]
        assert found.read_bytes() == whole


def test_a_process_that_dies_costs_its_own_job_alone(tmp_path: Path) -> None:
    """It is begun again, twice; a job that dies once is done in the end."""
    folder = str(tmp_path)

    def fragile(number: int) -> int:
        attempts = os.path.join(folder, str(number))  # noqa: PTH118
        with open(attempts, "a") as file:  # noqa: PTH123
            file.write("x")
        if number == 1 or (number == 2 and os.path.getsize(attempts) == 1):  # noqa: PTH202
            os._exit(1)
        return number * 10

    found = dict(outcomes([0, 1, 2], fragile, workers=3))
    assert (found[0], found[2]) == (0, 20)
    assert "its process died" in str(found[1])
    assert [(tmp_path / str(n)).stat().st_size for n in range(3)] == [1, 1 + AGAIN, 2]
    assert not ray.is_initialized()


def test_the_command_says_which_run_failed_and_why(stores: dict[str, Path], tmp_path: Path) -> None:
    arguments = (
        *("--model", "tdmpc2", "--model", "dinowm", "--seed", "3", "--updates", "2"),
        *("--batch", "2", "--length", "8", "--probe", "--horizon", "3", "--engine", "inline", "--json"),
    )
    asked = ("sweep", str(stores["one"]), str(stores["short"]), *arguments)
    done = run(*asked, cwd=tmp_path)
    assert done.returncode == 1
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == 2
    names = [f"test-walk-{s}-{m}-1m-s3" for s in ("one", "short") for m in ("tdmpc2", "dinowm")]
    assert [Path(row["run"]).name for row in report["runs"]] == names
    lines = [line for line in done.stderr.splitlines() if "--length" in line]
    assert len(lines) == 2
    assert all("short" in line for line in lines)
    assert set(report["runs"][0]["probe"]["reward_error"]) == {"3"}
    assert set(report["runs"][0]) == set(Outcome.__dataclass_fields__)
    again = run("sweep", str(stores["one"]), *arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["runs"] == report["runs"][:2]
    twice = run("sweep", str(stores["one"]), str(stores["one"]), *arguments, cwd=tmp_path)
    assert twice.returncode == 1
    assert "two jobs would write to" in twice.stderr


def test_an_option_of_one_model_is_for_its_runs_alone(stores: dict[str, Path], tmp_path: Path) -> None:
    models = ("--model", "dreamerv3", "--model", "dinowm")
    short = ("--updates", "2", "--batch", "2", "--length", "6", "--engine", "inline", "--json")
    own = ("--burn-in", "2", "--no-symlog", "--warmup", "7")
    done = run("sweep", str(stores["one"]), *models, *short, *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["runs"]
    configs = [read_run(Path(row["run"])).config for row in rows]
    asked = [(c["burn_in"], c["symlog_inputs"], c["warmup"]) for c in configs]
    assert asked == [(2, False, 7), (0, True, 1000)]
    refused = run("sweep", str(stores["one"]), "--model", "dinowm", *short, *own, cwd=tmp_path)
    assert refused.returncode == 1
    assert "but dinowm has none; only dreamerv3 does" in refused.stderr


def test_train_model_and_sweep_have_the_same_options_of_training() -> None:
    options = {
        name: {p.name for p in get_command(app).commands[name].params} for name in ("train-model", "sweep")
    }
    shared = {field.name for kind in (TrainOptions, ReadoutOptions) for field in fields(kind)}
    assert all(shared <= names for names in options.values())
    assert options["sweep"] - options["train-model"] == {"stores", "probe", "horizon"}
