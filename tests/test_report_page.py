"""The tables and sentences of a report's page, cell by cell, against what they are made of."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass

import polars as pl
import pytest

from pvrpipe.schemas.study_record import StudyRecord
from pvrpipe.worldmodel.report_charts import charts_of
from pvrpipe.worldmodel.report_findings import Findings, findings_of
from pvrpipe.worldmodel.report_page import page_of
from pvrpipe.worldmodel.report_sources import evidence_of
from pvrpipe.worldmodel.report_tables import tables_of
from pvrpipe.worldmodel.report_words import NAMES, legible

from .planted_study import ROWS, Planted, write_study

#: Better, not told apart, worse; the name of the reference comes neither first nor last in the alphabet.
PLANTED = {"autoencoder": 0.4, "from scratch": 1.0, "random:7": 1.0, "vc1": 2.5}


@dataclass(frozen=True)
class Page:
    text: str
    findings: Findings
    record: StudyRecord

    def table(self, caption: str) -> list[list[str]]:
        """Cells of the table that a caption begins, as they are read."""
        (found,) = re.findall(rf"<caption><span>{caption}.*?</table>", self.text, re.DOTALL)
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found.split("<tr>")[1:]]
        return [[html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in rows]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """One run of `vc1` diverged, one `autoencoder` has nothing on the second task; one run has other episodes."""
    folder = write_study(tmp_path_factory.mktemp("page"), Planted(PLANTED, models=("tdmpc2",), seeds=4))
    record = json.loads((folder / "study.json").read_text())
    for job in record["jobs"]:
        job["commands"] = [f"pvrpipe train-model {job['run']}"]
        if job["pvr"] == "autoencoder" and job["environment"] == "dmc:other":
            job.update(state="failed", failure="no memory was left")
        if job["run"].endswith("other-vc1-tdmpc2-s0"):
            job.update(state="diverged", failure="the loss is nan")
    for number, store in enumerate(record["stores"]):
        store.update(id=f"{number:064x}", weights_sha256=f"{number + 8:064x}")
    record["stores"][0]["state"] = "damaged"
    (folder / "study.json").write_text(json.dumps(record))
    evidence = evidence_of([folder])
    first = evidence.scores["run"] == evidence.scores["run"][0]
    object.__setattr__(
        evidence,
        "scores",
        evidence.scores.with_columns(episodes=pl.when(first).then(3).otherwise(pl.col("episodes"))),
    )
    findings = findings_of(evidence, (33, 500))
    tables = tables_of(evidence, findings)
    text = page_of(evidence, findings, charts_of(evidence, findings, tables), tables)
    return Page(text, findings, evidence.studies[0][1])


def test_the_head_says_what_was_compared_and_what_has_no_numbers(page: Page) -> None:
    assert (
        "<p>27 runs: autoencoder, from scratch, random:7, vc1; tdmpc2 1m; one, other; 4 seeds; "
        "each probed on 3 to 8 held-out episodes.</p>" in page.text
    )
    assert (
        "4 failed, 1 damaged (what does not verify), 1 diverged (a loss or a prediction that is" in page.text
    )
    verdicts = [c.verdict for c in page.findings.comparisons]
    assert {"better", "worse", "unclear"} <= set(verdicts)
    claims = len(verdicts) - verdicts.count("unclear")
    assert (
        f"Of {len(verdicts)} comparisons with learning from scratch, {claims} find a difference." in page.text
    )
    assert f"what is said of that horizon is said of {ROWS} rows on average" in page.text


def test_every_standing_and_comparison_is_in_its_cell(page: Page) -> None:
    head, *rows = page.table("Error over that of a trivial prediction")
    assert head[:3] == ["model", "error", "from scratch"]
    cells = {(row[1], arm): cell for row in rows for arm, cell in zip(head[2:], row[2:], strict=True)}
    verdicts = {(c.pvr, c.error, c.horizon): c.verdict for c in page.findings.comparisons}
    assert len(cells) == len(page.findings.standings) == 4 * 3 * 2
    for s in page.findings.standings:
        marked = {"better": " better", "worse": " worse"}.get(
            verdicts.get((s.pvr, s.error, s.horizon), ""), ""
        )
        told = legible(s.relative.value) + marked + (" (1 of 2 tasks)" if s.pvr == "autoencoder" else "")
        assert cells[f"{NAMES[s.error]}, {s.horizon} rows", s.pvr] == told
    _, *rows = page.table("Every comparison of the report")
    for c, row in zip(page.findings.comparisons, rows, strict=True):
        about = [f"{c.model} {c.size}", NAMES[c.error], str(c.horizon), c.pvr, "from scratch"]
        assert (row[:5], row[8]) == (about, c.verdict)
        numbers = [float(number) for number in re.findall(r"[\d.]+", row[5])]
        of = c.improvement
        assert numbers == pytest.approx([of.value, of.low, of.high], abs=5.1e-3)
        assert [float(cell) for cell in row[6:8]] == pytest.approx([c.p, c.q], rel=5e-3)
    for differs in (
        ((c.p, c.q) for c in page.findings.comparisons),
        ((c.improvement.low, c.improvement.high) for c in page.findings.comparisons),
    ):
        assert any(one != other for one, other in differs), "nothing here would show what was swapped"


def test_every_store_run_and_command_is_in_its_row(page: Page) -> None:
    _, *rows = page.table("Stores, as verified.")
    for store, row in zip(page.record.stores, rows, strict=True):
        named = ("RANDOM WEIGHTS " if store.random_weights else "") + str(store.pvr)
        assert row == [store.folder, store.kind, named, store.state, store.id, store.weights_sha256]
    _, *rows = page.table("Runs; their numbers are in")
    told = {row[0].partition("runs/")[2]: row[1:] for row in rows}
    for job in page.record.jobs:
        assert told[job.run.removeprefix("runs/")] == [job.pvr, "tdmpc2 1m", str(job.seed), job.state]
    commands = [store.command for store in page.record.stores]
    commands += [line for job in page.record.jobs for line in job.commands]
    assert f"give others.</p><pre>{chr(10).join(commands)}</pre>" in page.text
    arms = json.loads(re.findall(r'"arms":(\[.*?\])', page.text)[0])
    assert arms == ["from scratch", "autoencoder", "random:7", "vc1"], (
        "the reference has the colour of the text"
    )
