"""Studies from their file to the last run: mistakes at once, what is there taken, what fails noted, kills survived."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from pvrpipe.commands.study_checks import mistakes_of
from pvrpipe.commands.study_plan import plan_of
from pvrpipe.schemas.study import read_content, study_of
from pvrpipe.schemas.study_record import StudyRecord, read_record
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.checkpoints import CHECKPOINT

from .commands import run

STUDIES = Path(__file__).parent.parent / "studies"
TINY: dict[str, Any] = {
    "name": "tiny",
    "environments": ["dmc:pendulum-swingup"],
    "shifts": ["ood"],
    "collect": {"size": 32, "episodes": 6, "max_steps": 12, "policy": "random"},
    "pvrs": ["autoencoder"],
    "pretrain": {"updates": 2, "size": 16},
    "models": [
        {"model": "dreamerv3", "updates": 2, "batch": 2, "length": 4, "save_every": 2},
        {"model": "tdmpc2", "updates": 2, "batch": 4, "save_every": 2},
    ],
    "probe": {"horizons": [4]},
    "maps": False,
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    content = {**TINY, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def study(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    done = run("study", "study.yaml", "--engine", "inline", "--device", "cpu", "--json", *more, cwd=folder)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    return done.returncode, found, done.stderr


def record_in(folder: Path) -> StudyRecord:
    return read_record(folder / "data" / "studies" / "tiny")


@pytest.mark.parametrize("name", ["quick", "neurips2024"])
def test_the_studies_that_ship_have_no_mistakes(name: str) -> None:
    wanted, mistakes = study_of(read_content(STUDIES / f"{name}.yaml"))
    assert mistakes == []
    assert wanted is not None
    assert wanted.name == name
    assert mistakes_of(wanted) == []
    plan = plan_of(wanted, Path("data"), "cpu")
    runs = {"quick": 1 * 3 * 2 * 4, "neurips2024": 7 * 14 * 2 * 6}
    assert len(plan.jobs) == len({job.run for job, _ in plan.jobs}) == runs[name]
    assert len(plan.looks) == 2 * len(wanted.environments)


def test_all_mistakes_of_a_study_are_told_at_once(tmp_path: Path) -> None:
    written(
        tmp_path,
        variations=["none", "camara=0.3"],
        pvrs=["scratch", "vc11", "vc11"],
        models=[
            {"model": "dreamer"},
            {"model": "tdmpc2", "sizes": ["1m", "2m"], "batch": 1, "length": 2, "warmup": 5},
        ],
    )
    code, _, told = study(tmp_path)
    lines = told.strip().splitlines()
    assert code == 1
    assert len(lines) == 6, told
    for wanted in (
        "vc11 auto all is named 2 times",
        "'camara'",
        "unknown PVR 'vc11'; nearest: vc1",
        "'dreamer'",
        "'2m'",
        "models: tdmpc2 1m: warmup is 5, but tdmpc2 has none",
    ):
        assert sum(wanted in line for line in lines) == 1, (wanted, told)
    assert "5 mistakes more" in lines[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml"]
    written(tmp_path, seeds=[-1], collect={"size": 0, "episode": 3}, environments=None)
    code, _, told = study(tmp_path)
    assert code == 1
    for wanted in (
        "environments is missing",
        "collect.episode: a study has no such field",
        "collect.size",
        "seeds[0]",
    ):
        assert wanted in told
    written(tmp_path, environments=["dmc:pendulum-swingdown", "nowhere:x"], pvrs=["vc1", "resnet50"])
    code, _, told = study(tmp_path)
    assert code == 1
    assert "--weights" not in told  # it is what a study's file calls weights:
    for wanted in ("dmc:pendulum-swingdown", "nowhere:x", "the weights of vc1", "the weights of resnet50"):
        assert wanted in told
    assert not (tmp_path / "data").exists()


def test_mistakes_of_form_of_names_and_of_what_is_not_there_are_told_together(tmp_path: Path) -> None:
    written(
        tmp_path,
        name="Not a Name",
        environments=["dmc:pendulum-swingdown"],
        variations=["camara=0.3"],
        collect={"size": -3, "policy": "nonsense"},
        pvrs=["vc11", {"pvr": "vc1-l", "blocks": ["0-99"]}, {"pvr": "resnet18", "weights": "/nowhere/w.pt"}],
        models=[{"model": "dreamer"}, {"model": "tdmpc2", "updates": 0}],
        seeds=[0, 0, -1],
        probe={"horizons": [9, 4, 9], "splits": ["val", "val"]},
        horizon=33,
    )
    code, _, told = study(tmp_path, "--dry-run")
    assert code == 1
    wanted = (
        "name: string should match",
        "collect.size: input",
        "models[1].updates: input",
        "seeds[2]: input",
        "horizon: a study has no such field",
        "seeds: 0 is named 2 times",
        "probe.horizons: 9 is named 2 times",
        "probe.splits: val is named 2 times",
        "'camara'",
        "'nonsense'",
        "'vc11'",
        "vc1-l has blocks 0 to 23",
        "'dreamer'",
        "'dmc:pendulum-swingdown'",
        "no file /nowhere/w.pt",
    )
    lines = told.strip().splitlines()
    assert [sum(each in line for line in lines) for each in wanted] == [1] * len(wanted), told
    assert len(lines) == len(wanted), told
    assert "14 mistakes more" in lines[-1]


def test_what_is_right_in_the_only_model_of_a_study_is_looked_at(tmp_path: Path) -> None:
    """A list whose only entry has a mistake was left out whole, and what else is wrong in it was not told."""
    written(tmp_path, models=[{"model": "tdmpc2", "sizes": ["9m"], "updates": -1}])
    told = study(tmp_path, "--dry-run")[2]
    assert "models[0].updates" in told
    assert "unknown tdmpc2 size '9m'" in told


def test_what_a_representation_has_not_is_refused(tmp_path: Path) -> None:
    """It was read past: blocks of the frames made every run twice, weights of `random` were loaded."""
    wrong: list[dict[str, Any]] = [
        {"pvr": "scratch", "blocks": ["all", "0-3"]},
        {"pvr": "autoencoder", "weights": "mine.safetensors", "pool": "mean"},
        {"pvr": "random", "layer": "layer9"},
        {"pvr": "random", "weights": "mine.safetensors"},
    ]
    written(tmp_path, pvrs=wrong)
    lines = study(tmp_path, "--dry-run")[2].strip().splitlines()
    told = (
        "scratch: it is of the study's own making, without blocks",
        "autoencoder: it is of the study's own making, without weights, pool",
        "layer9",
        "weights mine.safetensors are not random",
    )
    assert [sum(each in line for line in lines) for each in told] == [1] * 4, lines
    assert len(lines) == 4, lines


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00"])
def test_what_is_no_study_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(content)
    code, _, told = study(tmp_path)
    assert code == 1
    assert len(told.strip().splitlines()) == 1
    assert "studies/quick.yaml" in told or "cannot be read" in told


def test_a_study_goes_from_its_file_to_its_page_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    written(tmp_path, pvrs=["autoencoder", "scratch"], maps=None)
    code, dry, told = study(tmp_path, "--dry-run")
    assert code == 0, told
    assert [(stage["stage"], stage["left"]) for stage in dry["stages"]] == [
        ("collect", 2),
        ("pretrain", 1),
        ("embed", 2),
        ("train and probe", 4),
    ]
    assert not (tmp_path / "data").exists()
    code, found, told = study(tmp_path)
    assert code == 0, told
    assert (found["state"], found["runs"], found["stores"], found["unfinished"]) == ("finished", 4, 5, [])
    record = record_in(tmp_path)
    kinds = sorted(store.kind for store in record.stores)
    assert kinds == ["embeddings", "embeddings", "encoder", "replay", "rollouts"]
    assert all(store.id for store in record.stores if store.kind != "encoder")
    for job in record.jobs:
        names = {path.name for path in (tmp_path / "data" / job.run).iterdir()}
        assert {*job.probes, "map.parquet", "strip.parquet", "metrics.json", "metrics-ood.json"} <= names
    assert Path(found["report"]).is_file()
    before, numbers = files_of(tmp_path), measured(tmp_path)
    code, found, told = study(tmp_path)
    assert (code, found["state"]) == (0, "finished")
    assert changed(before, files_of(tmp_path)) == {"data/studies/tiny/study.json"}
    further = study(tmp_path, "--dry-run", "--horizon", "3")[1]["stages"][-1]
    assert (further["left"], further["bytes"], further["hours"]) == (4, 0, None), "probed, not trained, again"
    assert [store.frames_per_second for store in record_in(tmp_path).stores] == [
        store.frames_per_second for store in record.stores
    ]
    done = run("report", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["runs"] == 4
    assert Path(made["page"]).is_file()
    commands = [store.command for store in record.stores] + [c for job in record.jobs for c in job.commands]
    extra = {"collect": ["--engine", "inline"], "embed": ["--engine", "inline"]}
    for line in commands:
        _, command, *arguments = shlex.split(line)
        again = run(command, *arguments, *extra.get(command, []), cwd=tmp_path)
        assert again.returncode == 0, f"{line}: {again.stderr}"
    moved = {name for name in changed(before, files_of(tmp_path)) if "/studies/" not in name}
    probed = {"probe.parquet", "probe-ood.parquet"}
    assert {Path(name).name for name in moved} == probed | {"metrics.json", "metrics-ood.json"}, (
        "a command made something else"
    )
    assert measured(tmp_path) == numbers


def test_an_encoder_in_two_weights_is_two_representations(tmp_path: Path) -> None:
    """Two files had one store, and two seeds of random weights one name, so that their runs were repeats."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    wanted = [
        {"pvr": "resnet18", "weights": str(tmp_path / f"{name}.safetensors")} for name in ("one", "two")
    ]
    wanted += [{"pvr": "resnet18", "weights": f"random:{seed}"} for seed in (0, 1)]
    written(tmp_path, pvrs=[*wanted, "resnet18"], shifts=None)
    read, _ = study_of(read_content(tmp_path / "study.yaml"))
    assert read is not None
    plan = plan_of(read, tmp_path / "data", "cpu")
    names = ["resnet18 one", "resnet18 two", "resnet18 random", "resnet18 random:1", "resnet18"]
    assert [each.label for each in plan.encoded] == names
    assert len({each.folder for each in plan.encoded}) == 5
    assert len({job.run for job, _ in plan.jobs}) == 10
    (tmp_path / "one.safetensors").write_bytes(b"other")
    assert plan_of(read, tmp_path / "data", "cpu").encoded[0].folder != plan.encoded[0].folder
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "two.safetensors", tmp_path / "more" / "one.safetensors")
    alike = {"pvr": "resnet18", "weights": str(tmp_path / "more" / "one.safetensors")}
    same = {"pvr": "resnet18", "weights": str(tmp_path / "more" / ".." / "one.safetensors")}
    written(tmp_path, pvrs=[wanted[0], alike, "random", wanted[2], same], shifts=None)
    code, _, told = study(tmp_path)
    assert code == 1
    assert "2 representations would both be called 'resnet18 one'" in told
    assert "random and resnet18 random are one and the same; name it once" in told
    assert f"{same['weights']} and {wanted[0]['weights']} are one and the same; name it once" in told
    assert not (tmp_path / "data").exists()


def test_a_failed_store_and_a_damaged_one_cost_their_own_runs_alone(tmp_path: Path) -> None:
    """Weights that are none fail one representation; a flipped byte another; the third has its numbers."""
    (tmp_path / "weights.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"{}      ")
    wrong = {"pvr": "resnet18", "weights": str(tmp_path / "weights.safetensors")}
    written(tmp_path, pvrs=["autoencoder", "scratch", wrong], shifts=None, embed={"dtype": "float32"})
    code, _, told = study(tmp_path)
    assert code == 1
    record = record_in(tmp_path)
    states = {job.pvr: job.state for job in record.jobs}
    assert states == {"autoencoder": "finished", "from scratch": "finished", "resnet18 weights": "failed"}
    assert "pvrpipe study" not in told or "run it again" in told
    store = next(s for s in record.stores if s.pvr == "autoencoder" and s.kind == "embeddings")
    assert Store.open(tmp_path / "data" / store.folder).column("embedding").dtype == "float32"
    assert store.command.endswith("--dtype float32")
    damage(next((tmp_path / "data" / store.folder / "shards").glob("*.parquet")))
    code, found, told = study(tmp_path)
    assert code == 1
    states = {job.pvr: job.state for job in record_in(tmp_path).jobs}
    assert states == {"autoencoder": "damaged", "from scratch": "finished", "resnet18 weights": "failed"}
    assert {part["state"] for part in found["unfinished"]} == {"failed", "damaged"}
    assert "does not verify" in Path(found["report"]).read_text()
    done = run("report", "--json", "--no-figures", cwd=tmp_path)
    made = json.loads(done.stdout.splitlines()[-1])
    assert (made["runs"], made["unfinished"]) == (2, 6)
    damage(next((tmp_path / "data" / "rollouts").rglob("*.parquet")))
    assert study(tmp_path)[0] == 1
    record = record_in(tmp_path)
    made_of_it = [s for s in record.stores if s.kind == "embeddings"]
    assert {part.state for part in (*made_of_it, *record.jobs)} == {"damaged"}
    assert all("rollouts/" in part.failure and "has sha256" in part.failure for part in record.jobs)


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        written(folder)
    assert study(whole)[0] == 0
    command = [
        sys.executable,
        "-m",
        "pvrpipe.cli",
        "study",
        "study.yaml",
        "--engine",
        "inline",
        "--device",
        "cpu",
    ]
    for seconds in (6, 8, 10, 12, 14):
        process = subprocess.Popen(command, cwd=killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
    assert study(killed)[0] == 0
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in (folder / "data").rglob(CHECKPOINT)}
        for folder in (whole, killed)
    )
    assert len(ours) == 2
    assert ours == theirs
    tables = [sorted((f / "data").rglob("probe*.parquet")) for f in (whole, killed)]
    for one, other in zip(*tables, strict=True):  # all but where the run lies
        assert pl.read_parquet(one).drop("run").equals(pl.read_parquet(other).drop("run"))


@pytest.mark.slow
def test_a_study_on_ray_is_the_study_inline(tmp_path: Path) -> None:
    for engine in ("inline", "ray"):
        (tmp_path / engine).mkdir()
        written(tmp_path / engine)
        done = run("study", "study.yaml", "--engine", engine, "--device", "cpu", cwd=tmp_path / engine)
        assert done.returncode == 0, done.stderr
    ours, theirs = (
        {
            path.relative_to(tmp_path / e): path.read_bytes()
            for path in (tmp_path / e / "data").rglob(CHECKPOINT)
        }
        for e in ("inline", "ray")
    )
    assert ours == theirs


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


def measured(folder: Path) -> dict[str, Any]:
    """What the probes of all runs say, without the paths under which they were asked, which the tables hold too."""
    found = {
        f"{path.parent.name}/{path.name}": json.loads(path.read_text())
        for path in folder.rglob("runs/*/metrics*.json")
    }
    return {
        run: {k: v for k, v in m.items() if k not in ("run", "store", "table_sha256")}
        for run, m in found.items()
    }


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
