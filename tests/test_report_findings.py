"""What a report claims of studies whose truth is planted: what it must find, and what it must not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from pvrpipe.worldmodel.report import build_report
from pvrpipe.worldmodel.report_findings import _compared, findings_of, permutation_test
from pvrpipe.worldmodel.report_sources import evidence_of, evidence_of_runs
from pvrpipe.worldmodel.report_tables import errors_of
from pvrpipe.worldmodel.report_words import legible, sentences_of, summary_of

from .planted_study import BESIDE, FLOOR, ROWS, TRUE, Planted, data_of, write_study

COMPARED = (33, 500)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), Planted(TRUE))


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


def test_tasks_of_other_numbers_of_runs_count_alike_in_the_permutation_test() -> None:
    """Against every arrangement, with ties; scores of a task are permuted within it, U is a mean over tasks."""
    random = np.random.default_rng(2)
    for sizes in (((2, 1), (3, 3)), ((1, 3), (2, 2)), ((3, 2),)):
        tasks = [random.integers(0, 4, size=n + m).astype(float) for n, m in sizes]

        def u(chosen: Any, tasks: Any = tasks) -> float:
            won = []
            for scores, ours in zip(tasks, chosen, strict=True):
                theirs = [i for i in range(len(scores)) if i not in ours]
                pairs = [(scores[i], scores[j]) for i in ours for j in theirs]
                won.append(np.mean([(a > b) + (a == b) / 2 - 0.5 for a, b in pairs]))
            return abs(float(np.mean(won)))

        ways = [list(itertools.combinations(range(n + m), n)) for n, m in sizes]
        seen = u([range(n) for n, _ in sizes])
        wanted = np.mean([u(chosen) >= seen - 1e-12 for chosen in itertools.product(*ways)])
        ours = [scores[:n] for scores, (n, _) in zip(tasks, sizes, strict=True)]
        theirs = [scores[n:] for scores, (n, _) in zip(tasks, sizes, strict=True)]
        assert permutation_test(ours, theirs)[0] == pytest.approx(wanted)


def test_a_difference_is_claimed_at_five_per_cent_over_all_comparisons() -> None:
    """Of two comparisons one is as clear as four runs against four can be: p = 2/70, and q = 4/70 is above 5 %."""
    apart, alike = ([np.arange(4.0)], [np.arange(4.0) + 4]), ([np.arange(4.0)], [np.arange(4.0)])
    about = {"model": "tdmpc2", "size": "1m", "error": "reward_error", "horizon": 33}
    for others, verdict in ((1, "unclear"), (0, "better")):
        raw = [(about, "vc1", *apart), *[(about, "vip", *alike)] * others]
        found = {c.pvr: c for c in _compared(raw, "from scratch")}
        assert found["vc1"].p == pytest.approx(2 / 70)
        assert found["vc1"].q == pytest.approx(2 / 70 * (1 + others))
        assert found["vc1"].verdict == verdict


def test_small_models_are_listed_before_large_ones() -> None:
    runs = [np.arange(4.0)]
    raw = [
        ({"model": "tdmpc2", "size": size, "error": "reward_error", "horizon": 33}, "vc1", runs, runs)
        for size in ("19m", "317m", "1m", "5m")
    ]
    assert [c.size for c in _compared(raw, "from scratch")] == ["1m", "5m", "19m", "317m"]


def test_the_reference_is_what_it_is_wherever_it_stands_and_has_its_own_tasks(tmp_path: Path) -> None:
    factors = {"vc1": 0.8, "from scratch": 1.0, "vip": 1.0}
    folder = write_study(tmp_path, Planted(factors, models=("tdmpc2",), seeds=6, noise=0.01))
    record = json.loads((folder / "study.json").read_text())
    for job in record["jobs"]:
        if job["pvr"] == "from scratch" and job["environment"] == "dmc:other":
            job.update(state="failed", failure="no memory was left")
    (folder / "study.json").write_text(json.dumps(record))
    findings = findings_of(evidence_of([folder]), (33,))
    assert findings.reference == "from scratch"
    assert {c.improvement.count for c in findings.comparisons} == {6 + 6}, (
        "a task without the reference counted"
    )
    assert sorted(summary_of(findings)) == [
        "vc1, compared with learning from scratch twice: better in 2.",
        "vip, compared with learning from scratch twice: not told apart in 2.",
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0.00"),
        (0.0123, "0.01"),
        (0.05, "0.05"),
        (0.0049, "0.0049"),
        (-0.5, "-0.50"),
        (1234.0, "1,200"),
        (-98765.0, "-99,000"),
        (1.2345e7, "1.2e+07"),
    ],
)
def test_numbers_are_legible(value: float, told: str) -> None:
    assert legible(value) == told


def test_two_runs_are_too_few_to_tell(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"from scratch": 1.0, "vc1": 9.0}, tasks=("dmc:one",), seeds=2))
    findings = findings_of(evidence_of([folder]), COMPARED)
    assert {c.verdict for c in findings.comparisons} == {"too few runs"}


def test_one_is_one_and_training_episodes_are_not_held_out(tmp_path: Path) -> None:
    planted = Planted({"from scratch": 1.0, "vc1": 0.1}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1)
    folder = write_study(tmp_path, planted)
    record = json.loads((folder / "study.json").read_text())
    record["study"]["probe"].update(splits=["train", "val"], horizons=[33])
    (folder / "study.json").write_text(json.dumps(record))
    page = build_report([folder], folder / "report", figures=False).page.read_text()
    assert "2 runs: from scratch, vc1; tdmpc2 1m; one; 1 seed; each probed on 1 training episode.</p>" in page
    assert "open loop, on training episodes: mean over runs" in page
    assert "vc1, compared with learning from scratch twice: too few runs to tell in 2." in page
    dots = {
        chart["id"]: chart["panels"][0]["dots"]
        for chart in data_of(folder / "report" / "index.html")["charts"][:2]
    }
    assert dots["summary"][0]["note"] == "1 run, 1 task"
    assert dots["errors"][0]["note"] == "1 run on 1 episode"
    assert dots["errors"][0]["value"] == pytest.approx(33 * 0.1 * BESIDE["train"], rel=0.3)


def test_errors_are_means_over_runs_of_means_over_episodes(study: Path) -> None:
    rows = errors_of(evidence_of([study])).filter(
        environment="dmc:one", arm="vc1", model="tdmpc2", look="own", measure="reward_error", horizon=33
    )
    tables = [
        pl.read_parquet(p) for p in sorted(study.parents[1].glob("runs/one-vc1-tdmpc2-s?/probe.parquet"))
    ]
    asked = {"split": "val", "prediction": "open_loop", "control": "model", "measure": "reward_error"}
    means = [t.filter(**asked, horizon=33)["accumulated"].mean() for t in tables]
    assert len(means) == 6
    assert rows["mean"][0] == pytest.approx(np.mean(means))  # type: ignore[arg-type]
    assert rows["sem"][0] == pytest.approx(stats.sem(means))
    assert rows["iqm"][0] == pytest.approx(stats.trim_mean(means, 0.25))
    assert rows["values"][0].to_list() == pytest.approx(means)
    asked |= {"measure": "dynamics_kl_mean"}
    table = pl.read_parquet(study.parents[1] / "runs" / "one-vc1-dreamerv3-s0" / "probe.parquet")
    one = table.filter(**asked, horizon=33)["accumulated"]
    found = evidence_of([study]).errors(measure="dynamics_error", horizon=33, look="own", seed=0)
    row = found.filter(arm="vc1", model="dreamerv3", environment="dmc:one").row(0, named=True)
    assert (row["accumulated"], row["sem"]) == pytest.approx((one.mean(), stats.sem(one)))


def test_the_bar_of_a_single_run_is_over_its_episodes(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"vc1": 1.0}, tasks=("dmc:one",), models=("tdmpc2",), seeds=1))
    table = pl.read_parquet(tmp_path / "runs" / "one-vc1-tdmpc2-s0" / "probe.parquet")
    asked = {"prediction": "open_loop", "control": "model", "measure": "state_error", "horizon": 8}
    known = stats.sem(table.filter(**asked, split="val")["accumulated"])
    for evidence in (evidence_of([folder]), evidence_of_runs([tmp_path / "runs" / "one-vc1-tdmpc2-s0"])):
        (found,) = errors_of(evidence).filter(look="own", measure="state_error", horizon=8)["sem"]
        assert found == pytest.approx(known)


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
    charts = {chart["id"]: chart["panels"] for chart in data_of(report.page)["charts"]}
    assert charts["ood"][0]["text"].startswith("Over the trivial prediction, all tasks: ViT (3): 0.3")


def test_runs_of_studies_that_differ_are_no_repeats_and_those_of_studies_alike_are(tmp_path: Path) -> None:
    """Two studies of one task: six runs of each representation, unless they were trained otherwise or on other data."""

    def written(name: str, **changed: Any) -> Path:
        planted = Planted({"from scratch": 1.0, "vc1": 0.5}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3)
        (tmp_path / name).mkdir()
        return write_study(tmp_path / name, replace(planted, **changed))

    def arms(*folders: Path) -> dict[str, int]:
        rows = errors_of(evidence_of(folders)).filter(look="own", measure="reward_error", horizon=33)
        assert set(rows["pvr"]) == {"from scratch", "vc1"}
        return dict(rows.select("arm", "runs").rows())

    first, again, further = written("first"), written("again"), written("further", first_seed=3)
    longer, other = written("longer", updates=2000), written("other", store="2" * 64)
    assert arms(first, further) == {"from scratch": 6, "vc1": 6}
    assert arms(first, again) == {"from scratch": 3, "vc1": 3}  # the same trainings
    lengths = (1000, 2000)
    assert arms(first, longer) == {f"{p}, updates {n}": 3 for n in lengths for p in ("from scratch", "vc1")}
    assert arms(first, other) == {f"{p}, of {f}": 3 for f in (first, other) for p in ("from scratch", "vc1")}
    runs = [*(tmp_path / "first" / "runs").iterdir(), *(tmp_path / "other" / "runs").iterdir()]
    named = set(evidence_of_runs(runs).runs["arm"])
    assert named == {f"{p}, store {n * 8}" for n in "02" for p in ("from scratch", "vc1")}


def test_means_over_other_tasks_are_not_ranked(tmp_path: Path) -> None:
    """A representation that failed on the hard task would otherwise be the best of all."""
    folder = write_study(
        tmp_path, Planted({"from scratch": 1.0, "vc1": 0.8, "vip": 0.9}, models=("tdmpc2",), seeds=4)
    )
    record = json.loads((folder / "study.json").read_text())
    for job in record["jobs"]:
        if job["pvr"] == "vc1" and job["environment"] == "dmc:other":
            job.update(state="failed", failure="no memory was left")
    (folder / "study.json").write_text(json.dumps(record))
    report = build_report([folder], tmp_path / "report", figures=False)
    sentence = next(line for line in report.findings if "reward error over 33 rows" in line)
    assert "lowest is vip" in sentence
    assert "On fewer tasks, and not ranked: vc1 (1 of 2)." in sentence
    assert "Better than learning from scratch: " in sentence
    assert " better (1 of 2 tasks)</td>" in report.page.read_text()


def test_one_representation_alone_is_not_the_lowest(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Planted({"vc1": 0.5}, tasks=("dmc:one",), models=("tdmpc2",), seeds=3))
    sentences = sentences_of(findings_of(evidence_of([folder]), (33,)))
    assert sentences[0].startswith("tdmpc2 1m, reward error over 33 rows: vc1, 0.")
    assert "lowest" not in " ".join(sentences)


def test_the_charts_of_a_page_show_the_numbers_of_its_tables(study: Path, tmp_path: Path) -> None:
    """Bars and bands are a standard error long, points lie where both errors are, and cut episodes at their ends."""
    page = build_report([study], tmp_path / "report", figures=False).page
    errors = pl.read_parquet(tmp_path / "report" / "tables" / "errors.parquet")
    charts = {chart["id"]: chart["panels"] for chart in data_of(page)["charts"]}
    wanted = {"task": "one", "model": "tdmpc2 1m", "error": "reward error"}

    def panel(chart: str, **more: str) -> dict[str, Any]:
        (found,) = [p for p in charts[chart] if (wanted | more).items() <= p["keys"].items()]
        return dict(found)

    def known(arm: str, look: str = "own", horizon: int = 500) -> dict[str, Any]:
        about = {"environment": "dmc:one", "model": "tdmpc2", "measure": "reward_error"}
        return errors.filter(**about, arm=arm, look=look, horizon=horizon).row(0, named=True)

    for dot in panel("errors", horizon="500")["dots"]:
        row = known(dot["label"])
        ends = (row["mean"] - row["sem"], row["mean"] + row["sem"])
        assert (dot["value"], dot["low"], dot["high"]) == pytest.approx((row["mean"], *ends), rel=1e-3)
        assert dot["runs"] == pytest.approx(row["values"], rel=1e-3)
    units = {"dreamerv3 1m": "accumulated KL, nats", "tdmpc2 1m": "accumulated MSE of latents"}
    for model, unit in units.items():
        assert panel("errors", model=model, error="dynamics error", horizon="33")["x"] == unit
    for line in panel("horizons")["lines"]:
        assert line["x"] == [1, 8, 33, ROWS]
        row = known(line["label"])
        ends = [row["mean"] - row["sem"], row["mean"] + row["sem"]]
        assert [line["low"][-1], line["high"][-1]] == pytest.approx(ends, rel=1e-3)
    for point in panel("ood", horizon="500", property="ViT")["points"]:
        own, ood = known(point["label"]), known(point["label"], "ood")
        assert point["filled"] == (point["label"] == "autoencoder"), "the only one that was planted as a ViT"
        numbers = [point[name] for name in ("x", "x_sem", "y", "y_sem")]
        assert numbers == pytest.approx([own["mean"], own["sem"], ood["mean"], ood["sem"]], rel=1e-3)
    assert f"said of {ROWS} rows on average" in page.read_text()
    assert "Episodes end before 33 rows" not in page.read_text()
    costs = {p["keys"]["cost"]: p["dots"] for p in charts["cost"]}
    first = {cost: {dot["label"]: dot["value"] for dot in dots}["vc1"] for cost, dots in costs.items()}
    assert list(first.values()) == pytest.approx([1000 / 11, 1536, 2], rel=1e-3)
