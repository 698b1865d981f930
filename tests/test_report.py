"""The folder that a report writes of planted studies, what its charts show, and what is no number."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pvrpipe.commands.studies import reported
from pvrpipe.schemas.errors import NotAStudyError
from pvrpipe.schemas.study_record import StudyRecord, read_record
from pvrpipe.store.workspace import slug
from pvrpipe.worldmodel.pictures import drawn
from pvrpipe.worldmodel.report import Report, build_report
from pvrpipe.worldmodel.report_sources import evidence_of
from pvrpipe.worldmodel.report_tables import errors_of

from .commands import run
from .planted_study import TRUE, Planted, data_of, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), Planted(TRUE, pictures=True))


@pytest.fixture(scope="module")
def report(study: Path) -> Report:
    return build_report([study], study / "report")


def test_what_is_no_result_is_said_and_averaged_into_nothing(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"from scratch": 1.0, "vc1": 1.0}, tasks=("dmc:one",)))
    record = read_record(folder)
    root = tmp_path / "runs"
    poisoned = root / "one-vc1-dreamerv3-s0" / "probe.parquet"
    table = pl.read_parquet(poisoned)
    table.with_columns(accumulated=pl.col("accumulated") * float("nan")).write_parquet(poisoned)
    (root / "one-vc1-dreamerv3-s1" / "probe.parquet").unlink()
    became = {
        "runs/one-vc1-dreamerv3-s2": ("diverged", "the loss of update 3 is nan"),
        "runs/one-vc1-dreamerv3-s3": ("damaged", "its store does not verify"),
    }
    jobs = [
        job.model_copy(update=dict(zip(("state", "failure"), became[job.run], strict=True)))
        if job.run in became
        else job
        for job in record.jobs
    ]
    (folder / "study.json").write_text(record.model_copy(update={"jobs": tuple(jobs)}).model_dump_json())
    evidence = evidence_of([folder])
    states = dict(evidence.runs.filter(arm="vc1", model="dreamerv3").select("seed", "state").rows())
    assert states == {0: "diverged", 1: "failed", 2: "diverged", 3: "damaged", 4: "finished", 5: "finished"}
    (dot,) = errors_of(evidence).filter(
        arm="vc1", model="dreamerv3", look="own", measure="reward_error", horizon=33
    )["runs"]
    assert dot == 2
    found = build_report([folder], folder / "report", figures=False)
    page = found.page.read_text()
    assert found.unfinished == 4
    assert "2 diverged (a loss or a prediction that is not finite)" in page
    assert "the loss of update 3 is nan" in page
    unfinished = json.loads((folder / "report" / "report.json").read_text())["unfinished"]
    assert sorted(row["state"] for row in unfinished) == ["damaged", "diverged", "diverged", "failed"]


def test_the_folder_has_tables_figures_and_json(report: Report) -> None:
    folder = report.page.parent
    for path in (folder / "tables").glob("*.parquet"):
        table = pl.read_parquet(path)
        with path.with_suffix(".csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == table.columns
        assert len(rows) == len(table)
    names = {path.stem for path in (folder / "figures").rglob("*.svg")}
    assert {
        "reward-error",
        "dynamics-error",
        "figure-6-dynamics-error-one",
        "figure-8-latent-maps-one",
    } <= names
    assert names == {path.stem for path in (folder / "figures").rglob("*.pdf")}
    width = re.search(r'width="([\d.]+)pt"', (folder / "figures" / "reward-error.svg").read_text())
    assert width is not None
    assert float(width[1]) == pytest.approx(3.25 * 72)
    content = json.loads((folder / "report.json").read_text())
    assert content["findings"] == list(report.findings)
    assert len(content["comparisons"]) == report.comparisons == 24
    assert report.claims == 24


def test_the_page_flags_random_weights_and_asks_for_nothing(report: Report) -> None:
    page = report.page.read_text()
    assert "RANDOM WEIGHTS random" in page
    for figure in (report.page.parent / "figures").rglob("*.svg"):
        drawn = figure.read_text()
        assert "in red: random weights, nobody trained this encoder</text>" in drawn, figure
        red = re.findall(r'<text style="[^"]*fill: #b3121d[^"]*"[^>]*>([^<]*)</text>', drawn)
        assert {re.split("[,:]", name)[0] for name in red if "R²" not in name} == {"in red", "random"}, figure
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img|iframe)[^>]+(src|href)=\"(?!data:)", page)


def test_the_same_study_gives_the_same_bytes(study: Path, report: Report, tmp_path: Path) -> None:
    again = build_report([study], tmp_path / "again")
    ours, theirs = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (report.page.parent, again.page.parent)
    )
    assert [str(name) for name in ours if ours[name] != theirs.get(name)] == []
    assert ours.keys() == theirs.keys()


def test_maps_lie_as_they_were_laid_out_and_say_how_well_reward_separates(
    study: Path, report: Report
) -> None:
    data = data_of(report.page)
    (panels,) = [chart["panels"] for chart in data["charts"] if chart["id"] == "maps"]
    table = pl.read_parquet(study.parents[1] / "runs" / "one-vc1-tdmpc2-s0" / "map.parquet")
    wanted = {"task": "one", "model": "tdmpc2 1m", "representation": "vc1"}
    for method, told in (("pca", "0.20"), ("umap", "0.40")):
        (panel,) = [p for p in panels if (wanted | {"map": method.upper()}).items() <= p["keys"].items()]
        assert panel["text"].startswith(
            f"separation {told} here, 0.50 in the latent; 400 rows of 20 episodes"
        )
        for axis in "xy":
            place = table[f"{method}_{axis}"].to_numpy()
            unit = (place - place.min()) / np.ptp(place)
            np.testing.assert_allclose(panel[axis], unit, atol=1e-3)
        rows = data["rows"][panel["rows"]]
        np.testing.assert_allclose(rows["reward"], table["reward"], rtol=1e-3)


def test_a_look_of_several_factors_is_a_point_beside_the_look_that_was_trained_on(tmp_path: Path) -> None:
    looks = {"ood": 1.5, "camera=0.3+lighting=0.5": 1.3, "id:0.5,ood:0.5": 1.2, "camera=0.3": 1.1}
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, shifts=looks)
    report = build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    charts = {chart["id"]: chart["panels"] for chart in data_of(report.page)["charts"]}
    assert {panel["keys"]["look"] for panel in charts["ood"]} == {
        "ood",
        "camera-0.3+lighting-0.5",
        "id-0.5-ood-0.5",
    }
    assert {panel["keys"]["factor"] for panel in charts["severity"]} == {"camera"}


def test_figures_of_looks_with_dots_and_of_names_with_slashes_are_all_there(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("gym:ALE/Pong-v5",), models=("tdmpc2",), seeds=1)
    folder = write_study(tmp_path, planted)
    record = read_record(folder)
    looks = ("camera=0.3", "camera=0.8")
    jobs = []
    for look in looks:
        run = tmp_path / "runs" / slug(look)
        shutil.copytree(tmp_path / record.jobs[0].run, run)
        jobs.append(record.jobs[0].model_copy(update={"run": f"runs/{run.name}", "variation": look}))
    (folder / "study.json").write_text(record.model_copy(update={"jobs": tuple(jobs)}).model_dump_json())
    report = build_report([folder], tmp_path / "report")
    drawn = {path.name for path in (report.page.parent / "figures" / "paper").iterdir()}
    name = "figure-7-reward-error-gym-ALE-Pong-v5-camera-"
    assert {f"{name}{severity}.{kind}" for severity in ("0.3", "0.8") for kind in ("svg", "pdf")} <= drawn
    column = (report.page.parent / "figures" / "reward-error.svg").read_text()
    assert all(f"gym:ALE/Pong-v5, {look}, tdmpc2 1m" in column for look in looks)


def test_where_nobody_has_a_property_none_is_asked_for(tmp_path: Path) -> None:
    planted = Planted({"from scratch": 1.0, "random": 2.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2)
    folder = write_study(tmp_path, planted)
    record = read_record(folder)
    plain = tuple(store.model_copy(update={"vit": False}) for store in record.stores)
    (folder / "study.json").write_text(record.model_copy(update={"stores": plain}).model_dump_json())
    report = build_report([folder], tmp_path / "report", figures=False)
    (chart,) = [c for c in data_of(report.page)["charts"] if c["id"] == "ood"]  # type: ignore[comparison-overlap]
    for panel in chart["panels"]:
        assert "property" not in panel["keys"]
        assert all(point["filled"] for point in panel["points"])  # type: ignore[index]


def test_a_damaged_map_is_no_map_and_no_traceback(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, pictures=True)
    study = write_study(tmp_path, planted)
    (folder,) = (tmp_path / "runs").iterdir()
    data = (folder / "map.parquet").read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for damaged in (data[:middle], flipped, data[:100] + bytes(200) + data[300:]):
        (folder / "map.parquet").write_bytes(damaged)
        assert not drawn(folder)
        page = build_report([study], tmp_path / "report").page
        assert {"maps", "strips"} & {chart["id"] for chart in data_of(page)["charts"]} == {"strips"}  # type: ignore[comparison-overlap]
    (folder / "map.parquet").write_bytes(data)
    assert drawn(folder)


def test_an_error_whose_trivial_prediction_is_never_wrong_is_said_to_have_no_standing(tmp_path: Path) -> None:
    study = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2))
    for path in (tmp_path / "runs").glob("*/probe*.parquet"):
        trivial = (pl.col("measure") == "reward_error") & (pl.col("control") != "model")
        level = pl.when(trivial).then(0.0).otherwise(pl.col("accumulated"))
        pl.read_parquet(path).with_columns(accumulated=level).write_parquet(path)
    page = build_report([study], tmp_path / "report", figures=False).page.read_text()
    assert "tdmpc2 1m, reward error over 33 rows is compared with nothing" in page
    assert "state error over 33 rows is compared with nothing" not in page


def test_a_task_whose_trivial_prediction_is_never_wrong_is_said_to_be_in_no_standing(tmp_path: Path) -> None:
    """No reward was received in one of two tasks, and the standings looked like those of both."""
    study = write_study(tmp_path, Planted({"vc1": 1.0}, models=("tdmpc2",), seeds=2))
    for path in (tmp_path / "runs").glob("other-*/probe*.parquet"):
        trivial = (pl.col("measure") == "reward_error") & (pl.col("control") != "model")
        level = pl.when(trivial).then(0.0).otherwise(pl.col("accumulated"))
        pl.read_parquet(path).with_columns(accumulated=level).write_parquet(path)
    page = build_report([study], tmp_path / "report", figures=False).page.read_text()
    assert (
        "tdmpc2 1m, reward error over 33 rows is compared in 1 of 2 tasks only: "
        "the error of always predicting the mean reward is 0 in other."
    ) in page
    assert "state error over 33 rows is compared" not in page


@pytest.mark.parametrize("weights", ["", " mine"])
def test_severities_maps_and_blocks_are_charts_of_what_was_planted(tmp_path: Path, weights: str) -> None:
    grown = {"vc1": 1.0, "vc1 blocks 0-5": 1.4, "vc1 blocks 0-2": 2.0}
    factors = {pvr + weights: factor for pvr, factor in grown.items()}
    planted = Planted(
        factors,
        tasks=("dmc:one",),
        seeds=3,
        noise=0,
        shifts={"ood": 1.5, "camera=0.1": 1.2, "camera=0.3": 1.8},
        maps={"linear": 1.0, "mlp": 0.7},
    )
    build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    charts = {chart["id"]: chart["panels"] for chart in data_of(tmp_path / "report" / "index.html")["charts"]}
    wanted = {"error": "reward error", "horizon": "33", "model": "tdmpc2 1m"}
    severity, blocks, encoders = (
        [panel for panel in charts[name] if wanted.items() <= panel["keys"].items()]
        for name in ("severity", "blocks", "encoders")
    )
    assert [panel["keys"]["factor"] for panel in severity] == ["camera"]
    lines = {line["label"]: line for line in severity[0]["lines"]}
    assert lines.keys() == {f"{pvr} ({encoder})" for pvr in factors for encoder in planted.maps}
    for line in lines.values():
        assert line["x"] == [0.0, 0.1, 0.3]
        assert np.divide(line["y"], line["y"][0]) == pytest.approx([1, 1.2, 1.8], rel=0.15)
    for panel in blocks:
        values = {dot["label"]: dot["value"] for dot in panel["dots"]}
        for through, factor in planted.maps.items():
            for pvr, larger in factors.items():
                known = values[f"vc1{weights} (linear)"] * factor * larger
                assert values[f"{pvr} ({through})"] == pytest.approx(known, rel=0.15)
    assert {panel["keys"]["representation"] for panel in blocks} == {f"vc1{weights}"}
    assert [len(panel["dots"]) for panel in encoders] == [2 * 3]
    units = [panel["keys"]["cost"] for panel in charts["cost"]]
    assert units == ["seconds for 1,000 frames", "bytes of a frame", "MB of memory while embedding"]


def test_what_is_no_study_is_one_line(tmp_path: Path) -> None:
    for arguments in (("report", "--root", "."), ("report", "."), ("compare", ".")):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "pvrpipe" in done.stderr
    folder = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1))
    record = read_record(folder)
    waiting = tuple(job.model_copy(update={"state": "waiting"}) for job in record.jobs)
    content: StudyRecord = record.model_copy(update={"jobs": waiting})
    (folder / "study.json").write_text(content.model_dump_json())
    with pytest.raises(NotAStudyError, match=r"has numbers yet \(1 waiting\); go on with `pvrpipe study`"):
        build_report([folder], folder / "report")


def test_a_page_is_kept_while_it_says_what_its_study_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted({"vc1": 1.0, "random": 2.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2)
    folder = write_study(tmp_path, planted)
    record = read_record(folder)
    page = reported(folder, record)

    def written_anew(record: StudyRecord) -> bool:
        (folder / "study.json").write_text(record.model_dump_json())
        before = page.stat().st_mtime_ns
        assert reported(folder, record) == page
        return page.stat().st_mtime_ns != before

    assert not written_anew(record)
    assert not written_anew(record.model_copy(update={"command": "pvrpipe study elsewhere.yaml"}))
    renamed = record.model_copy(update={"study": record.study.model_copy(update={"title": "Anew"})})
    assert written_anew(renamed)
    assert "<title>Anew</title>" in page.read_text()
    assert not written_anew(renamed)
    assert written_anew(renamed.model_copy(update={"jobs": record.jobs[:-1]}))
    assert written_anew(renamed)
    probe = next((tmp_path / "runs").glob("*/probe.parquet"))
    os.utime(probe, ns=(2 * time.time_ns(),) * 2)
    assert written_anew(renamed)
    os.utime(probe, (0, 0))
    monkeypatch.setattr("pvrpipe.__version__", "999")
    assert written_anew(renamed)


def test_a_study_without_a_single_number_has_a_page_that_says_why(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0, "random": 2.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    folder = write_study(tmp_path, planted)
    record = read_record(folder)
    told = {"state": "diverged", "failure": "the loss of update 3 is nan"}
    jobs = tuple(job.model_copy(update=told) for job in record.jobs)
    (folder / "study.json").write_text(record.model_copy(update={"jobs": jobs}).model_dump_json())
    done = run("report", str(folder), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert (made["runs"], made["unfinished"], made["comparisons"], made["findings"]) == (0, 2, 0, [])
    page = Path(made["page"]).read_text()
    assert "No run has numbers." in page
    assert page.count("the loss of update 3 is nan") == 2
    assert "2 diverged (a loss or a prediction that is not finite)" in page
    assert [chart["id"] for chart in data_of(Path(made["page"]))["charts"]] == ["cost"]  # type: ignore[comparison-overlap]
    refused = run("compare", str(folder), cwd=tmp_path)
    assert refused.returncode == 1
    assert "no run has numbers to compare" in refused.stderr


@pytest.mark.slow
def test_a_report_of_a_whole_study_stays_small(tmp_path: Path) -> None:
    """12 representations × 2 models × 6 seeds × 5 tasks; that it opens in time is in test_report_browser.py."""
    pvrs = {f"pvr-{n}": 1.0 + 0.05 * n for n in range(11)}
    tasks = [f"dmc:task-{n}" for n in range(5)]
    planted = replace(Planted({"from scratch": 0.9, **pvrs}, tasks=tasks), pictures=True)
    folder = write_study(tmp_path, planted)
    found = build_report([folder], folder / "report")
    assert found.runs == 720
    assert found.page.stat().st_size < 8e6
    assert found.bytes < 15e6, found.bytes


def test_titles_of_figures_lie_within_them_whatever_the_names(tmp_path: Path) -> None:
    from pvrpipe.worldmodel import report_figures

    long = "taskonomy-segment-unsup25d blocks 0-11"
    folder = write_study(
        tmp_path, Planted({"from scratch": 1.0, long: 2.0}, tasks=("dmc:pendulum-swingup",), seeds=2)
    )
    sides = []
    seen = report_figures._figure

    @contextlib.contextmanager
    def watched(*arguments: Any) -> Iterator[Any]:
        with seen(*arguments) as axes:
            yield axes
            figure = axes[0, 0].figure
            figure.canvas.draw()
            for axis in axes.flat:
                for title in (axis.title, axis._left_title, axis._right_title):
                    box = title.get_window_extent()
                    if title.get_text():
                        sides.append((box.x0, figure.bbox.x1 - box.x1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_figures, "_figure", watched)
        build_report([folder], folder / "report")
    assert sides
    assert all(min(side) >= 0 for side in sides), sides
