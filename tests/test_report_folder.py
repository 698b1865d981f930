"""What a report's folder replaces and when it is whole, names that are no words, and numbers without an interval."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import resource
import shutil
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pvrpipe.commands.studies import reported
from pvrpipe.schemas.errors import InvalidValueError, StoreError
from pvrpipe.schemas.study_record import read_record
from pvrpipe.worldmodel import report_figures, runs
from pvrpipe.worldmodel.pictures import read_map
from pvrpipe.worldmodel.report import build_report
from pvrpipe.worldmodel.report_panels import task_of
from pvrpipe.worldmodel.report_sources import OWN
from pvrpipe.worldmodel.report_stamp import stamp_of
from pvrpipe.worldmodel.report_tables import severities_of, write_tables

from .planted_study import Planted, data_of, write_study

NAMES = (
    "from scratch",
    "<!--<script>",
    "</script><b>\"quoted\" & 'so' 😀",
    "a $\\frac$ of a $x^$",
    "taskonomy-segment-unsup25d random:0 blocks 0-11",
    "taskonomy-segment-unsup25d random:7 blocks 0-11",
    *(f"clip-rn50x64 {number}" for number in range(6)),
)


def test_what_no_report_wrote_is_not_replaced(tmp_path: Path) -> None:
    """``--out`` of a paper's folder cost its figures."""
    folder = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1))
    for name in ("figures/mine.pdf", "tables/mine.csv", "index.html", "report.json"):
        paper = tmp_path / name.partition("/")[0].partition(".")[0]
        (paper / name).parent.mkdir(parents=True)
        (paper / name).write_text("mine")
        with pytest.raises(InvalidValueError, match=r"that no report wrote.*--out"):
            build_report([folder], paper, figures=False)
        assert [str(path.relative_to(paper)) for path in paper.rglob("*") if path.is_file()] == [name]
        assert (paper / name).read_text() == "mine"
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "paper.tex").write_text("mine")
    for _ in range(2):
        assert build_report([folder], tmp_path / "beside", figures=False).page.is_file()
    assert (tmp_path / "beside" / "paper.tex").is_file()


def test_a_report_that_was_stopped_half_way_is_written_anew_by_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of before stood beside no tables, and the study took it for whole."""
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    folder = write_study(tmp_path, planted)
    page = reported(folder, read_record(folder))
    whole = {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    column = (page.parent / "figures" / "reward-error.svg").read_text()
    assert "reward error, 33 rows" in column, "the shortest horizon that was asked for"
    assert "500 rows" not in column

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in ("write_tables", "draw_figures"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pvrpipe.worldmodel.report.{where}", stopped)
            with pytest.raises(KeyboardInterrupt):
                build_report([folder], page.parent)
        assert reported(folder, read_record(folder)) == page
        assert {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()} == whole


def test_a_page_of_other_code_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvrpipe.worldmodel.report_stamp.files", lambda _: tmp_path)
    stamps = []
    for name, content in (("report.js", "a"), ("report.js", "b"), ("statistics.py", "a"), ("probe.py", "a")):
        (tmp_path / name).write_text(content)
        stamps.append(stamp_of([]))
    assert len(set(stamps[:3])) == 3
    assert stamps[3] == stamps[2], "what draws no page"


def test_a_page_shows_a_map_that_was_drawn_anew(tmp_path: Path) -> None:
    """Of a map that was cut the page says that the study draws it anew; it did, and kept the page without it."""
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, pictures=True)
    folder = write_study(tmp_path, planted)
    page = reported(folder, read_record(folder))
    shown = page.read_bytes()
    for name in (runs.MAP, runs.STRIP):
        (picture,) = (tmp_path / "runs").glob(f"*/{name}")
        whole = picture.read_bytes()
        picture.write_bytes(whole[:100])
        build_report([folder], page.parent, figures=False)
        assert page.read_bytes() != shown
        picture.write_bytes(whole)
        assert reported(folder, read_record(folder)) == page
        assert page.read_bytes() == shown


def test_names_of_any_letters_stay_within_page_and_figures(tmp_path: Path) -> None:
    """A comment's beginning in a name hid the rest of the page; a long name left no room for a figure."""
    factors = {name: 1.0 + 0.1 * number for number, name in enumerate(NAMES)}
    folder = write_study(
        tmp_path, Planted(factors, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, pictures=True)
    )
    boxes: dict[str, list[tuple[int, Any, Any]]] = {}
    marks: list[int] = []
    figure_of = report_figures._figure

    @contextlib.contextmanager
    def watched(path: Path, *arguments: Any) -> Iterator[Any]:
        with figure_of(path, *arguments) as axes:
            yield axes
            figure = axes[0, 0].figure
            figure.canvas.draw()
            if "maps" in path.name:
                titles = [(axis.title, axis.get_subplotspec().rowspan.start) for axis in axes.flat]
                boxes[path.name] = [
                    (row, title.get_window_extent(), figure.bbox) for title, row in titles if title.get_text()
                ]
            elif path.parent.name != "paper":
                marks.extend(len(axis.lines[0].get_ydata()) for axis in axes.flat)
                for axis in axes.flat:
                    assert axis.get_position().width > 0.3, "no room for what is drawn"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_figures, "_figure", watched)
        page = build_report([folder], folder / "report").page.read_text()
    assert {"".join(json.loads(_data(page))["arms"])} == {"".join(NAMES)}
    assert set(marks) == {len(NAMES)}, "two names became one"
    (found,) = boxes.values()
    assert len(found) == len(NAMES)
    for (row, left, whole), (below, right, _) in pairwise(found):
        assert left.x0 >= 0
        assert left.x1 <= whole.x1
        assert below > row or left.x1 < right.x0, "names of maps lie on one another"


def test_one_representation_that_nobody_trained_leaves_room_in_its_figure(tmp_path: Path) -> None:
    """The line that says what red is took the place of what is drawn."""
    planted = Planted({"random": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_report([write_study(tmp_path, planted)], tmp_path / "report")


def test_bars_of_the_papers_figures_are_the_tables_means_with_standard_errors(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"one": 1.0, "two": 2.0}, tasks=("dmc:one",), seeds=6))
    drawn: list[tuple[str, int, float, float]] = []
    figure_of = report_figures._figure

    @contextlib.contextmanager
    def watched(path: Path, *arguments: Any) -> Iterator[Any]:
        with figure_of(path, *arguments) as axes:
            yield axes
            for axis in axes.flat if path.name.startswith(("figure-6", "figure-7")) else ():
                (whiskers,) = axis.collections
                rows = int(axis.get_ylabel().split()[-2])
                for bar, ((_, low), (_, high)) in zip(axis.patches, whiskers.get_segments(), strict=True):
                    drawn.append((path.name[:8], rows, bar.get_height(), (high - low) / 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_figures, "_figure", watched)
        build_report([folder], folder / "report")
    table = pl.read_parquet(folder / "report" / "tables" / "errors.parquet").filter(look="own")
    for figure, measure in (("figure-6", "dynamics_error"), ("figure-7", "reward_error")):
        bars = [(rows, mean, half) for name, rows, mean, half in drawn if name == figure]
        told = table.filter(pl.col("horizon").is_in({rows for rows, _, _ in bars}), measure=measure)
        assert sorted(bars) == [pytest.approx(row) for row in sorted(told["horizon", "mean", "sem"].rows())]
        assert len(bars) > 3


def _data(page: str) -> str:
    """What a browser takes for the page's data: up to the end of the script, in which no comment begins."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in found
    return str(found)


def test_one_run_on_one_episode_has_no_interval(tmp_path: Path) -> None:
    """It had one of no width."""
    planted = Planted({"from scratch": 1.0, "vc1": 2.0}, tasks=("dmc:one",), seeds=1, episodes=1)
    folder = write_study(tmp_path, planted)
    page = build_report([folder], folder / "report", figures=False).page
    charts = {c["id"]: c for c in data_of(page)["charts"]}
    dots = [dot for chart in ("summary", "errors") for p in charts[chart]["panels"] for dot in p["dots"]]
    assert dots
    assert {(dot["low"], dot["high"]) for dot in dots} == {(None, None)}
    lines = [line for panel in charts["horizons"]["panels"] for line in panel["lines"]]
    assert lines
    assert all(set(line["low"]) == set(line["high"]) == {None} for line in lines)


def test_a_strip_shows_what_was_drawn(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, pictures=True)
    folder = write_study(tmp_path, planted)
    data = data_of(build_report([folder], folder / "report", figures=False).page)
    (panel,) = next(chart["panels"] for chart in data["charts"] if chart["id"] == "strips")
    table = pl.read_parquet(next((tmp_path / "runs").glob("*/strip.parquet")))
    for name in ("step", "received", "predicted", "distance"):
        assert panel[name] == pytest.approx(table[name].to_list(), rel=1e-3)
    for name, shown in dict(panel["strip"]).items():
        assert [base64.b64decode(str(data["frames"][frame])) for frame in shown] == table[name].to_list()


def test_pictures_are_of_the_first_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a study, of another seed, had drawn its own: two panels of one name, and two maps on one another."""
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3, pictures=True)
    folder = write_study(tmp_path, planted)
    runs = sorted((tmp_path / "runs").iterdir())
    for name in ("map.parquet", "strip.parquet"):
        shutil.copy(runs[0] / name, runs[2] / name)
    shown: list[str] = []

    def read(run: Path) -> Any:
        shown.append(run.name)
        return read_map(run)

    monkeypatch.setattr(report_figures, "read_map", read)
    charts = {c["id"]: c["panels"] for c in data_of(build_report([folder], folder / "report").page)["charts"]}
    assert shown == [runs[0].name]
    assert {name: len(charts[name]) for name in ("maps", "strips")} == {"maps": 2, "strips": 1}


def test_a_representation_without_a_picture_is_named(tmp_path: Path) -> None:
    """Where the run of the first seed had diverged, its map was not there and nothing said so."""
    planted = Planted(
        {"vc1": 1.0, "clip": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=2, pictures=True
    )
    study = write_study(tmp_path, planted)
    record = json.loads((study / "study.json").read_bytes())
    first = next(job for job in record["jobs"] if (job["pvr"], job["seed"]) == ("clip", 0))
    first["state"] = "diverged"
    (study / "study.json").write_text(json.dumps(record))
    page = build_report([study], study / "report", figures=False).page.read_text()
    for undone in ("No latents were laid out", "No rollouts were drawn"):
        told = f"{undone} of clip (tdmpc2 1m, one): the study says <code>maps: false</code>, the run of the first seed"
        assert page.count(told) == 1
        assert page.count(undone) == 1


def test_a_task_is_named_with_the_look_it_was_trained_in() -> None:
    assert task_of("dmc:one", "none") == "one"
    assert task_of("gym:one", "ood") == "gym:one, ood"


@pytest.mark.parametrize(
    ("trained", "severities"),
    [
        ("none", {"camera": [0.0, 0.3, 1.0], "light": [0.0, 0.2]}),
        ("camera=0.5", {"camera": [0.3, 0.5, 1.0], "light": [0.2]}),
        ("id", {"camera": [0.3, 1.0], "light": [0.2]}),
        ("size=0.5", {"camera": [0.3, 1.0], "light": [0.2]}),
    ],
)
def test_what_was_trained_on_has_its_own_severity(trained: str, severities: dict[str, list[float]]) -> None:
    """It was at 0 whatever it was."""
    looks = [OWN, "camera-1.0", "light-0.2", "ood", "camera-0.3"]
    errors = pl.DataFrame({"look": looks, "variation": trained, "mean": range(len(looks))})
    found = severities_of(errors)
    assert {name: found.filter(factor=name)["severity"].to_list() for name in severities} == severities
    shifted = [*looks[1:], "none"]
    again = severities_of(pl.DataFrame({"look": shifted, "variation": trained, "mean": range(len(shifted))}))
    assert again.filter(severity=0.0).select("factor", "mean").rows() == [("camera", 4), ("light", 4)]


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    """Readers of CSV refused such a file: `properties.csv` of the quick study was one empty line."""
    planted = Planted({"random": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    full = Planted({"from scratch": 1.0, "vc1": 0.8, "dinov2-b": 0.9}, tasks=("dmc:one",), models=("tdmpc2",))
    build_report([write_study(tmp_path / "full", full)], tmp_path / "other", figures=False)
    for name in ("comparisons", "properties"):
        of_none, of_some = (
            pl.read_csv(tmp_path / where / "tables" / f"{name}.csv") for where in ("report", "other")
        )
        assert of_none.is_empty()
        assert not of_some.is_empty()
        assert of_none.columns == of_some.columns


def test_returns_of_runs_without_errors_are_one_line(tmp_path: Path) -> None:
    """Where no return was of a run with numbers, the report ended in a traceback."""
    study = write_study(tmp_path, Planted({"from scratch": 1.0, "vc1": 0.8}, models=("tdmpc2",), seeds=1))
    record = json.loads((study / "study.json").read_bytes())
    failed = [job for job in record["jobs"] if (job["environment"], job["pvr"]) == ("dmc:one", "vc1")]
    for job in failed:
        job["state"] = "failed"
    (study / "study.json").write_text(json.dumps(record))
    (tmp_path / "returns.csv").write_text("environment,pvr,model,return\ndmc:one,vc1,tdmpc2,1\n")
    with pytest.raises(InvalidValueError, match="dmc:one, vc1, tdmpc2 has none"):
        build_report([study], tmp_path / "report", returns=tmp_path / "returns.csv", figures=False)


def test_a_return_that_stands_beside_no_error_is_named(tmp_path: Path) -> None:
    """It was left out without a word where others had errors."""
    factors = {"from scratch": 1.0, "vc1": 0.8, "clip": 0.9, "r3m": 0.7, "dinov2": 0.6}
    study = write_study(tmp_path, Planted(factors, models=("tdmpc2",), seeds=1))
    record = json.loads((study / "study.json").read_bytes())
    for job in record["jobs"]:  # r3m has errors on one of two tasks, dinov2 on none
        if job["pvr"] == "dinov2" or (job["environment"], job["pvr"]) == ("dmc:one", "r3m"):
            job["state"] = "failed"
    (study / "study.json").write_text(json.dumps(record))
    rows = [f"{pvr},tdmpc2,{-factor}" for pvr, factor in factors.items()]
    (tmp_path / "returns.csv").write_text("\n".join(["pvr,model,return", *rows]))
    made = build_report([study], tmp_path / "report", returns=tmp_path / "returns.csv", figures=False)
    (told,) = made.left_out
    assert told.startswith("A return that was given for r3m/tdmpc2, dinov2/tdmpc2 has no error")
    assert told in made.page.read_text()
    (chart,) = [chart for chart in data_of(made.page)["charts"] if chart["id"] == "returns"]
    assert all(
        {point["label"] for point in panel["points"]} == {"from scratch", "vc1", "clip"}
        for panel in chart["panels"]
    )
    table = pl.read_parquet(tmp_path / "report" / "tables" / "returns.parquet")
    assert table.filter(pl.col("mean").is_null()).select("pvr", "return").rows() == [
        ("r3m", -0.7),
        ("dinov2", -0.6),
    ]


def test_a_disk_that_takes_no_more_of_tables_and_figures_is_one_line(tmp_path: Path) -> None:
    """Both were tracebacks, behind all the work of a study."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    table = pl.DataFrame({"number": range(10_000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            write_tables({"numbers": table}, tmp_path)
        with (
            pytest.raises(StoreError, match="cannot write"),
            report_figures._figure(tmp_path / "figure", 1, 1, (1, 1)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_tables({"numbers": table}, tmp_path)
    assert pl.read_parquet(tmp_path / "numbers.parquet").equals(pl.read_csv(tmp_path / "numbers.csv"))
