"""Which runs of a study have numbers in its report: those that are as the study asked for them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.report_sources import evidence_of, evidence_of_runs
from pvrpipe.worldmodel.report_tables import costs_of, errors_of

from .planted_study import Planted, write_study


def _probed(seed: int) -> dict[str, Any]:
    """What a report of a probe says of what was asked, as the planted study asks it."""
    asked = {"store_id": "0" * 64, "split": "val", "context": 1, "seed": seed, "run_state": "finished"}
    splits = [{"by": "split", "value": "val"}, {"by": "distribution", "value": "id"}]
    return {**asked, "dynamics_error": {"33": {}, "500": {}}, "groups": splits}


@pytest.mark.parametrize("label", ["", "ood"])
def test_a_run_that_was_probed_by_hand_on_something_else_is_not_averaged(tmp_path: Path, label: str) -> None:
    by_hand: list[Any] = [
        {"store_id": "2" * 64},
        {"context": 9},
        {"seed": 77},
        {"dynamics_error": {"33": {}}},
        {"split": "train", "groups": [{"by": "split", "value": "train"}]},
        {"run_state": "training"},
        {"groups": None},
    ]
    seeds = 1 + len(by_hand)
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=seeds)
    study = write_study(tmp_path, planted)
    for seed, change in enumerate([{}, *by_hand]):
        folder = tmp_path / "runs" / f"one-vc1-tdmpc2-s{seed}"
        (folder / runs.labelled("metrics.json", label)).write_text(json.dumps(_probed(seed) | change))
    found = evidence_of([study]).runs
    assert found["state"].to_list() == ["finished", *["waiting"] * len(by_hand)]
    assert "probes it again" in found["failure"][1]


def test_a_shifted_look_is_not_taken_for_the_one_that_was_trained_on(tmp_path: Path) -> None:
    """`pvrpipe probe RUN STORE` without a label, of the study's own shifted store, replaces the run's own table."""
    study = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2))
    record = json.loads((study / "study.json").read_bytes())
    record["stores"].append({**record["stores"][0], "folder": "embeddings/one-ood/vc1", "id": "3" * 64})
    (study / "study.json").write_text(json.dumps(record))
    for seed, label in enumerate(("", "ood")):
        report = tmp_path / "runs" / f"one-vc1-tdmpc2-s{seed}" / runs.labelled("metrics.json", label)
        report.write_text(json.dumps(_probed(seed) | {"store_id": "3" * 64}))
    assert evidence_of([study]).runs["state"].to_list() == ["waiting", "finished"]


def test_a_run_that_was_begun_again_has_no_numbers_until_it_is_finished(tmp_path: Path) -> None:
    study = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2))
    again, _ = sorted((tmp_path / "runs").iterdir())
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(record | {"state": "training"}))
    found = evidence_of([study])
    assert found.runs["state"].to_list() == ["waiting", "finished"]
    assert "begun again" in found.runs["failure"][0]
    assert errors_of(found)["runs"].unique().to_list() == [1]


def test_a_probe_whose_table_was_changed_is_not_averaged(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3)
    study = write_study(tmp_path, planted)
    changed, cut, whole = sorted((tmp_path / "runs").iterdir())
    for seed, folder in ((0, changed), (2, whole)):
        table = (folder / "probe-ood.parquet").read_bytes()
        report = _probed(seed) | {"table_sha256": hashlib.sha256(table).hexdigest()}
        (folder / "metrics-ood.json").write_text(json.dumps(report))
    table = pl.read_parquet(changed / "probe-ood.parquet")
    table.with_columns(accumulated=pl.col("accumulated") / 2).write_parquet(changed / "probe-ood.parquet")
    (cut / "probe.parquet").write_bytes((cut / "probe.parquet").read_bytes()[:-9])
    found = evidence_of([study]).runs
    assert found["state"].to_list() == ["damaged", "damaged", "finished"]
    assert found["failure"][0] == "probe-ood.parquet is not what its probe wrote; probe it again"


def test_a_run_whose_probe_has_no_rows_is_damaged(tmp_path: Path) -> None:
    """Of nothing, all is finite."""
    study = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2))
    probe = tmp_path / "runs" / "one-vc1-tdmpc2-s1" / runs.PROBE_TABLE
    pl.read_parquet(probe).clear().write_parquet(probe)
    found = evidence_of([study]).runs
    assert found["state"].to_list() == ["finished", "damaged"]
    assert found["failure"].to_list() == ["", "a probe of it has no rows; probe it again"]


def test_a_run_that_another_study_made_has_its_numbers_in_any_order(tmp_path: Path) -> None:
    """Where the study that had not made it was named first, it was left out."""
    study = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=4))
    other = tmp_path / "studies" / "other"
    other.mkdir()
    record = json.loads((study / "study.json").read_bytes())
    states = ("waiting", "failed", "damaged", "finished")
    for job, state in zip(record["jobs"], states, strict=True):
        job["state"] = state
    (other / "study.json").write_text(json.dumps(record))
    found = evidence_of([other, study])
    assert found.runs["state"].to_list() == ["finished", "finished", "damaged", "finished"]
    assert errors_of(found)["runs"].unique().to_list() == [3]
    assert evidence_of([study, other]).runs["state"].unique().to_list() == ["finished"]


def test_a_copy_of_a_run_is_no_second_seed(tmp_path: Path) -> None:
    """A study and its copy on another disk were 48 runs of 24, with smaller q and narrower intervals."""
    study = write_study(
        tmp_path / "here", Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2)
    )
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    copy = tmp_path / "there" / study.relative_to(tmp_path / "here")
    alone, both = evidence_of([study]), evidence_of([study, copy])
    assert both.runs["state"].to_list() == ["finished"] * 2 + ["repeated"] * 2
    assert both.runs["failure"][2] == f"the same training as {alone.runs['run'][0]}, which would count twice"
    assert errors_of(both).equals(errors_of(alone))
    assert costs_of(both).equals(costs_of(alone))
    assert len(costs_of(alone)) == 1
    run = Path(alone.runs["run"][0])
    named = evidence_of_runs([run, shutil.copytree(run, tmp_path / "copy")])
    assert named.runs["state"].to_list() == ["finished", "repeated"]


def test_models_that_look_through_other_weights_are_not_one_training(tmp_path: Path) -> None:
    """Of one store of frames; the second was called a copy of the first, or another seed of it."""
    write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1))
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_bytes())
    record["tuning"] = {"pvr": "vc1", "weights": "auto", "unfreeze": "all"}
    record["encoder"]["weights"]["random_seed"] = None

    def looking(name: str, **weights: Any) -> Path:
        folder = shutil.copytree(run, tmp_path / name)
        encoder = record["encoder"] | {"weights": record["encoder"]["weights"] | weights}
        (folder / "run.json").write_text(json.dumps(record | {"encoder": encoder}))
        return folder

    ours, theirs = looking("ours", tensors_sha256="a" * 64), looking("theirs", tensors_sha256="b" * 64)
    found = evidence_of_runs([ours, theirs, looking("copy", tensors_sha256="a" * 64)]).runs
    assert found["state"].to_list() == ["finished", "finished", "repeated"]
    assert found["arm"][:2].to_list() == [f"vc1, all unfrozen, weights {8 * letter}" for letter in "ab"]
