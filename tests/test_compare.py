"""``pvrpipe compare``: runs and studies side by side in a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pvrpipe.worldmodel.report_sources import evidence_of_runs
from pvrpipe.worldmodel.report_tables import errors_of
from pvrpipe.worldmodel.training import TrainConfig

from .commands import run
from .planted_study import TRUE, Planted, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), Planted(TRUE))


def test_compare_prints_runs_side_by_side(study: Path, tmp_path: Path) -> None:
    folders = sorted((study.parents[1] / "runs").glob("one-*-tdmpc2-s?"))
    assert evidence_of_runs(folders).finished["seed"].n_unique() == 6
    done = run("compare", *map(str, folders), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    reward = {row["representation"]: row["mean"] for row in found["rows"] if row["error"] == "reward_error"}
    assert list(reward) == [
        f"{n} (RANDOM WEIGHTS)" if n != "from scratch" else n for n in sorted(TRUE, key=TRUE.__getitem__)
    ]
    assert all(row["runs"] == 6 for row in found["rows"])
    assert {(c["pvr"], c["verdict"]) for c in found["comparisons"]} == {
        ("vc1", "better"),
        ("autoencoder", "worse"),
        ("random", "worse"),
    }
    told = run("compare", *map(str, folders), cwd=tmp_path)
    assert "Better than learning from scratch: vc1" in told.stdout
    refused = run("compare", str(folders[0]), "--horizon", "7", cwd=tmp_path)
    assert refused.returncode == 1
    assert "they have 1, 8, 33, 500" in refused.stderr
    of_file = run("compare", str(study / "study.json"), "--json", cwd=tmp_path)
    assert of_file.returncode == 0, of_file.stderr
    no_run = run("compare", str(folders[0] / "probe.parquet"), cwd=tmp_path)
    assert "holds no run; first run `pvrpipe train-model`" in no_run.stderr


def test_compare_takes_studies_counts_a_run_once_and_leaves_out_what_has_no_numbers(tmp_path: Path) -> None:
    planted = Planted({"from scratch": 1.0, "vc1": 0.8}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3)
    study = write_study(tmp_path, planted)
    one, two, three = sorted((tmp_path / "runs").glob("one-vc1-*"))
    table = pl.read_parquet(two / "probe.parquet")
    table.with_columns(accumulated=pl.lit(float("nan"))).write_parquet(two / "probe.parquet")
    (three / "probe.parquet").unlink()
    told = run("compare", str(study), str(one), str(two), str(three), str(one), "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    own = {(row["representation"], row["runs"]) for row in found["rows"] if row["look"] == "own"}
    assert own == {("from scratch", 3), ("vc1", 1)}
    assert {Path(each["what"]).name: each["state"] for each in found["left_out"]} == {
        two.name: "diverged",
        three.name: "failed",
    }
    assert len(told.stderr.splitlines()) == 2
    refused = run("compare", str(two), str(three), cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "not finite" in refused.stderr


def test_runs_that_were_not_trained_alike_are_no_repeats(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2)
    write_study(tmp_path, planted)
    one, two = sorted((tmp_path / "runs").iterdir())
    record = json.loads((two / "run.json").read_text())
    record["config"]["updates"] = 7
    (two / "run.json").write_text(json.dumps(record))
    arms = evidence_of_runs([one, two]).runs["arm"].to_list()
    assert arms == [f"vc1, updates {TrainConfig().updates}", "vc1, updates 7"]


def test_runs_in_training_are_left_out_and_those_probed_otherwise_are_no_repeats(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3)
    write_study(tmp_path, planted)
    one, two, three = sorted((tmp_path / "runs").iterdir())
    (one / "metrics.json").write_text(json.dumps({"split": "val", "context": 1}))
    (two / "metrics.json").write_text(json.dumps({"split": "val", "context": 9}))
    record = json.loads((three / "run.json").read_text())
    (three / "run.json").write_text(json.dumps(record | {"state": "training"}))
    found = evidence_of_runs([one, two, three])
    assert errors_of(found)["runs"].unique().to_list() == [1]
    assert found.finished["arm"].to_list() == ["vc1, context 1", "vc1, context 9"]
    assert found.runs["state"].to_list() == ["finished", "finished", "waiting"]


def test_compare_names_runs_that_were_not_probed_at_a_horizon(tmp_path: Path) -> None:
    """Beside runs that were, they were left out of its rows without a word."""
    planted = Planted({"vc1": 1.0, "r3m": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    write_study(tmp_path, planted)
    one, two = sorted((tmp_path / "runs").iterdir())
    table = pl.read_parquet(two / "probe.parquet").filter(pl.col("horizon") != 33)
    table.write_parquet(two / "probe.parquet")
    told = run("compare", str(one), str(two), "--horizon", "33", "--horizon", "8", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert {row["horizon"] for row in found["rows"] if row["representation"].startswith("vc1")} == {8}
    (line,) = told.stderr.splitlines()
    assert f"{two} was not probed over 33 rows" in line
    assert [each["what"] for each in found["left_out"]] == [str(two)]
