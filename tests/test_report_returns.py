"""Errors correlated with the returns that agents got elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.worldmodel.report import build_report

from .planted_study import TRUE, Planted, data_of, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), Planted(TRUE))


def test_returns_that_were_given_are_correlated_with_errors(study: Path, tmp_path: Path) -> None:
    returns = tmp_path / "returns.csv"
    lines = [
        f"{pvr},{model},{1000 - 300 * true}"
        for pvr, true in TRUE.items()
        for model in ("dreamerv3", "tdmpc2")
    ]
    returns.write_text("\n".join(["pvr,model,return", *lines]))
    build_report([study], tmp_path / "report", returns=returns, figures=False)
    data = data_of(tmp_path / "report" / "index.html")
    (chart,) = [chart for chart in data["charts"] if chart["id"] == "returns"]
    for panel in chart["panels"]:
        found = re.match(r"Pearson (-[\d.]+) ", panel["text"])
        assert found is not None
        assert float(found[1]) < -0.95
        given = {point["label"]: float(point["y"]) for point in panel["points"]}
        assert given == pytest.approx({pvr: 1000 - 300 * true for pvr, true in TRUE.items()}, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\n1,2", "no column pvr, model, return"),
        ("pvr,model,return\nvc1,tdmpc2,much", "not a number"),
        ("pvr,model,return\nvc1,tdmpc2,", "not a number"),
        ("pvr,model,return\nvc2,tdmpc2,1", "pvr 'vc2' was not compared; there is"),
        ("pvr,model,return\n", "no rows"),
        ("", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_returns_that_are_none_are_one_line(
    content: str | None, told: str, study: Path, tmp_path: Path
) -> None:
    returns = tmp_path / "returns.csv"
    if content is not None:
        returns.write_text(content)
    with pytest.raises(InvalidValueError, match=re.escape(told)) as refused:
        build_report([study], tmp_path / "report", returns=returns, figures=False)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report").exists()


def test_returns_of_some_representations_are_correlated_for_these_alone(study: Path, tmp_path: Path) -> None:
    returns = tmp_path / "returns.csv"
    returns.write_text(
        "pvr,model,return\nvc1,tdmpc2,2\nvc1,tdmpc2,4\nautoencoder,tdmpc2,2\nrandom,tdmpc2,1\n\n"
    )
    build_report([study], tmp_path / "report", returns=returns, figures=False)
    found = pl.read_parquet(tmp_path / "report" / "tables" / "correlations.parquet")
    assert set(found["model"]) == {"tdmpc2"}
    assert (found["points"] == 3).all()
    assert (found.filter(measure="reward_error")["spearman"] == -1).all()
    assert found["spearman_p"].to_list() == pytest.approx([1 / 3] * len(found))
    tables = tmp_path / "report" / "tables"
    given = pl.read_parquet(tables / "returns.parquet").filter(measure="reward_error", horizon=33)
    assert dict(given.select("pvr", "return").rows()) == {"vc1": 3.0, "autoencoder": 2.0, "random": 1.0}
    errors = pl.read_parquet(tables / "errors.parquet")
    own = errors.filter(model="tdmpc2", look="own", measure="reward_error", horizon=33)
    for pvr, mean in given.select("pvr", "mean").rows():  # over both tasks, in the look that was trained on
        assert mean == pytest.approx(own.filter(pvr=pvr)["mean"].mean())
    said = json.loads((tmp_path / "report" / "report.json").read_text())["correlations"]
    assert [row["pearson"] for row in said] == pytest.approx(found["pearson"].to_list())


def test_tasks_whose_returns_are_of_other_sizes_are_not_mixed(study: Path, tmp_path: Path) -> None:
    """Within each task, larger errors go with larger returns; both tasks together would say so of nothing but tasks."""
    returns = tmp_path / "returns.csv"
    lines = [
        f"{pvr},tdmpc2,{base + 10 * true},{task}"
        for task, base in (("dmc:one", 0), ("dmc:other", 900))
        for pvr, true in TRUE.items()
    ]
    returns.write_text("\n".join(["pvr,model,return,environment", *lines]))
    build_report([study], tmp_path / "report", returns=returns, figures=False)
    found = pl.read_parquet(tmp_path / "report" / "tables" / "correlations.parquet")
    assert set(found["environment"]) == {"dmc:one", "dmc:other"}
    assert (found["points"] == len(TRUE)).all()
    assert found["pearson"].min() > 0.95  # type: ignore[operator]
    (chart,) = [c for c in data_of(tmp_path / "report" / "index.html")["charts"] if c["id"] == "returns"]  # type: ignore[comparison-overlap]
    assert {panel["keys"]["task"] for panel in chart["panels"]} == {"one", "other"}  # type: ignore[index]
