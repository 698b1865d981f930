"""Reports of studies whose truth is planted: what they must find, what they must not, and what is no number."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from pvrpipe.schemas.errors import InvalidValueError, NotAStudyError
from pvrpipe.schemas.study_record import StudyRecord, read_record
from pvrpipe.worldmodel.report import Report, build_report
from pvrpipe.worldmodel.report_findings import findings_of, permutation_test
from pvrpipe.worldmodel.report_sources import evidence_of, evidence_of_runs
from pvrpipe.worldmodel.report_tables import errors_of
from pvrpipe.worldmodel.training import TrainConfig

from .commands import run
from .planted_study import FLOOR, Planted, write_study

TRUE = {"from scratch": 1.0, "vc1": 0.8, "autoencoder": 1.3, "random": 1.9}
COMPARED = (33, 500)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), Planted(TRUE, pictures=True))


@pytest.fixture(scope="module")
def report(study: Path) -> Report:
    return build_report([study], study / "report")


def test_a_planted_order_and_its_sizes_are_recovered(study: Path) -> None:
    findings = findings_of(evidence_of([study]), COMPARED)
    assert findings.reference == "from scratch"
    groups: dict[tuple[object, ...], list[str]] = {}
    for s in findings.standings:
        groups.setdefault((s.model, s.error, s.horizon), []).append(s.pvr)
        assert s.relative.value == pytest.approx(TRUE[s.pvr] / FLOOR, rel=0.06)
        assert s.relative.low is not None
        assert s.relative.high is not None
        assert s.relative.low < s.relative.value < s.relative.high
        assert (s.runs, s.tasks) == (12, 2)
    assert len(groups) == 2 * 3 * 2
    assert all(order == ["vc1", "from scratch", "autoencoder", "random"] for order in groups.values())
    verdicts = {(c.pvr, c.verdict) for c in findings.comparisons}
    assert verdicts == {("vc1", "better"), ("autoencoder", "worse"), ("random", "worse")}


def test_in_a_null_study_no_difference_is_claimed(tmp_path: Path) -> None:
    same = dict.fromkeys(TRUE, 1.0)
    folder = write_study(tmp_path, Planted(same, noise=0.2))
    found = build_report([folder], folder / "report", figures=False)
    assert (found.comparisons, found.claims) == (24, 0)
    assert "0 find a difference" in found.page.read_text()


def test_of_null_studies_about_one_in_twenty_makes_any_claim() -> None:
    """The claim of the page, over 200 studies of 24 comparisons each; more than 8 % would be unlikely at 5 %."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        ours = random.normal(size=(24, 6))
        theirs = random.normal(size=(24, 6))
        tests = [permutation_test([a], [b])[0] for a, b in zip(ours, theirs, strict=True)]
        wrong += bool((stats.false_discovery_control(tests) <= 0.05).any())
    assert wrong <= 16


def test_the_permutation_test_is_that_of_scipy() -> None:
    random = np.random.default_rng(1)
    for n, m in ((5, 5), (4, 6), (3, 3)):
        a, b = random.normal(size=n), random.normal(0.8, size=m)
        p, least = permutation_test([a], [b])
        assert p == pytest.approx(stats.mannwhitneyu(a, b, method="exact").pvalue)
        assert least == pytest.approx(
            stats.mannwhitneyu(np.arange(n), n + np.arange(m), method="exact").pvalue
        )
    many, others = [random.normal(size=8) for _ in range(4)], [random.normal(0.6, size=8) for _ in range(4)]
    drawn, _ = permutation_test(many, others)
    z = [stats.mannwhitneyu(a, b).statistic / 64 - 0.5 for a, b in zip(many, others, strict=True)]
    normal = 2 * stats.norm.sf(abs(np.mean(z)) / np.sqrt((17 / (12 * 64)) / 4))
    assert drawn == pytest.approx(normal, abs=0.02)


def test_two_runs_are_too_few_to_tell(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"from scratch": 1.0, "vc1": 9.0}, tasks=("dmc:one",), seeds=2))
    findings = findings_of(evidence_of([folder]), COMPARED)
    assert {c.verdict for c in findings.comparisons} == {"too few runs"}


def test_errors_are_means_over_runs_of_means_over_episodes(study: Path) -> None:
    rows = errors_of(evidence_of([study])).filter(
        environment="dmc:one", arm="vc1", model="tdmpc2", look="own", measure="reward_error", horizon=33
    )
    tables = [
        pl.read_parquet(p) for p in sorted(study.parents[1].glob("runs/one-vc1-tdmpc2-s?/probe.parquet"))
    ]
    means = [
        t.filter(prediction="open_loop", control="model", measure="reward_error", horizon=33)[
            "accumulated"
        ].mean()
        for t in tables
    ]
    assert len(means) == 6
    assert rows["mean"][0] == pytest.approx(np.mean(means))  # type: ignore[arg-type]
    assert rows["sem"][0] == pytest.approx(stats.sem(means))
    assert rows["iqm"][0] == pytest.approx(stats.trim_mean(means, 0.25))
    assert rows["values"][0].to_list() == pytest.approx(means)


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
    assert "2 a loss or a prediction was not finite" in page
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


def test_returns_that_were_given_are_correlated_with_errors(study: Path, tmp_path: Path) -> None:
    returns = tmp_path / "returns.csv"
    lines = [
        f"{pvr},{model},{1000 - 300 * true}"
        for pvr, true in TRUE.items()
        for model in ("dreamerv3", "tdmpc2")
    ]
    returns.write_text("\n".join(["pvr,model,return", *lines]))
    build_report([study], tmp_path / "report", returns=returns, figures=False)
    data = _data_of(tmp_path / "report" / "index.html")
    (chart,) = [chart for chart in data["charts"] if chart["id"] == "returns"]
    for panel in chart["panels"]:
        found = re.match(r"Pearson (-[\d.]+) ", panel["text"])
        assert found is not None
        assert float(found[1]) < -0.95
        assert len(panel["points"]) == 8


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
    returns.write_text("pvr,model,return\nvc1,tdmpc2,3\nautoencoder,tdmpc2,2\nrandom,tdmpc2,1\n")
    build_report([study], tmp_path / "report", returns=returns, figures=False)
    found = pl.read_parquet(tmp_path / "report" / "tables" / "correlations.parquet")
    assert set(found["model"]) == {"tdmpc2"}
    assert (found["points"] == 3 * 2).all()
    assert found.filter(measure="reward_error")["spearman"].max() < -0.8  # type: ignore[operator]
    said = json.loads((tmp_path / "report" / "report.json").read_text())["correlations"]
    assert [row["pearson"] for row in said] == pytest.approx(found["pearson"].to_list())


def test_a_look_of_several_factors_is_a_point_beside_the_look_that_was_trained_on(tmp_path: Path) -> None:
    looks = {"ood": 1.5, "camera=0.3+lighting=0.5": 1.3, "id:0.5,ood:0.5": 1.2, "camera=0.3": 1.1}
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1, shifts=looks)
    report = build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    charts = {chart["id"]: chart["panels"] for chart in _data_of(report.page)["charts"]}
    assert {panel["keys"]["look"] for panel in charts["ood"]} == {
        "ood",
        "camera-0.3+lighting-0.5",
        "id-0.5-ood-0.5",
    }
    assert {panel["keys"]["factor"] for panel in charts["severity"]} == {"camera"}


def test_representations_are_grouped_by_property_in_and_out_of_distribution(tmp_path: Path) -> None:
    """Of the planted ones, every second is a transformer; random weights, autoencoders and scratch belong to nobody."""
    factors = {"from scratch": 9.0, "random": 9.0, "a": 0.5, "b": 1.0, "c": 0.7, "autoencoder": 9.0, "d": 0.9}
    planted = Planted(factors, tasks=("dmc:one",), models=("tdmpc2",), seeds=2, noise=0, shifts={"ood": 3.0})
    report = build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    found = pl.read_parquet(tmp_path / "report" / "tables" / "properties.parquet")
    assert set(found["property"]) == {"vit"}
    values = {
        (row["has"], row["look"]): (row["relative"] * FLOOR, row["pvrs"])
        for row in found.filter(error="reward_error", horizon=33).iter_rows(named=True)
    }
    assert values == {
        (True, "own"): (pytest.approx(0.7, abs=0.1), 3),
        (False, "own"): (pytest.approx(1.0, abs=0.1), 1),
        (True, "ood"): (pytest.approx(2.1, abs=0.3), 3),
        (False, "ood"): (pytest.approx(3.0, abs=0.3), 1),
    }
    charts = {chart["id"]: chart["panels"] for chart in _data_of(report.page)["charts"]}
    assert charts["ood"][0]["text"].startswith("Over the trivial prediction, all tasks: ViT (3): 0.3")


def test_a_run_that_was_probed_by_hand_on_something_else_is_not_averaged(tmp_path: Path) -> None:
    planted = Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3)
    study = write_study(tmp_path, planted)
    asked = {"store_id": "0" * 64, "context": 1, "dynamics_error": {"33": {}, "500": {}}}
    changes = [{}, {"store_id": "2" * 64}, {"context": 9}]
    for folder, change in zip(sorted((tmp_path / "runs").iterdir()), changes, strict=True):
        (folder / "metrics.json").write_text(json.dumps(asked | change))
    found = evidence_of([study]).runs
    assert found["state"].to_list() == ["finished", "waiting", "waiting"]
    assert "probes it again" in found["failure"][1]


def test_severities_maps_and_blocks_are_charts_of_what_was_planted(tmp_path: Path) -> None:
    factors = {"vc1": 1.0, "vc1 blocks 0-5": 1.4, "vc1 blocks 0-2": 2.0}
    planted = Planted(
        factors,
        tasks=("dmc:one",),
        seeds=3,
        noise=0,
        shifts={"ood": 1.5, "camera=0.1": 1.2, "camera=0.3": 1.8},
        maps={"linear": 1.0, "mlp": 0.7},
    )
    build_report([write_study(tmp_path, planted)], tmp_path / "report", figures=False)
    charts = {
        chart["id"]: chart["panels"] for chart in _data_of(tmp_path / "report" / "index.html")["charts"]
    }
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
            for pvr, grown in factors.items():
                known = values["vc1 (linear)"] * factor * grown
                assert values[f"{pvr} ({through})"] == pytest.approx(known, rel=0.15)
    assert {panel["keys"]["representation"] for panel in blocks} == {"vc1"}
    assert [len(panel["dots"]) for panel in encoders] == [2 * 3]
    units = [panel["keys"]["cost"] for panel in charts["cost"]]
    assert units == ["seconds for 1,000 frames", "bytes of a frame", "MB of memory while embedding"]


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
    assert "Better than from scratch: vc1" in told.stdout
    refused = run("compare", str(folders[0]), "--horizon", "7", cwd=tmp_path)
    assert refused.returncode == 1
    assert "they have 1, 8, 33, 500" in refused.stderr


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


def _data_of(page: Path) -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    content: dict[str, list[dict[str, list[dict[str, str]]]]] = json.loads(found[1])
    return content
