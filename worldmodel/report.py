"""``pvrpipe report``: one folder that opens offline and says what a study found.

::

    report/
    ├── index.html      the page; asks the network for nothing
    ├── report.json     what it says, for machines
    ├── tables/         every table, as CSV and Parquet
    └── figures/        as SVG and PDF, in the width of a paper's column, and paper/ in the layout of the study's own
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.study_record import PAGE
from pvrpipe.store.files import make_folder, write_whole
from pvrpipe.worldmodel.report_charts import charts_of
from pvrpipe.worldmodel.report_figures import draw_figures
from pvrpipe.worldmodel.report_findings import Findings, findings_of
from pvrpipe.worldmodel.report_page import page_of
from pvrpipe.worldmodel.report_sources import Evidence, evidence_of
from pvrpipe.worldmodel.report_tables import (
    correlations_of,
    returns_of,
    silent_returns,
    tables_of,
    write_tables,
)
from pvrpipe.worldmodel.report_words import sentences_of, title_of

JSON, TABLES, FIGURES = "report.json", "tables", "figures"
FORMAT = "pvrpipe report"
COMPACT = (",", ":")


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    runs: int
    unfinished: int
    comparisons: int
    claims: int
    findings: tuple[str, ...]
    left_out: tuple[str, ...]
    """what was given with ``returns`` and stands in no chart, in a sentence"""
    bytes: int


def build_report(
    studies: Sequence[Path], out: Path, *, returns: Path | None = None, figures: bool = True
) -> Report:
    """Write a report; the same studies give the same page, whatever was in the folder before.

    Args:
        studies: folders with a ``study.json``.
        out: folder of the report; its own files are replaced.
        returns: a CSV of what agents got, to correlate errors with.
        figures: also draw the figures, which takes most of the time.

    Raises:
        NotAStudyError: a folder holds no study, or no run was probed.
        InvalidValueError: the folder has files of these names that no report wrote.
    """
    _check_own(out)
    evidence = evidence_of(studies)
    horizons = sorted({h for _, record in evidence.studies for h in record.study.probe.horizons})
    findings = findings_of(evidence, horizons)
    tables = tables_of(evidence, findings)
    if returns is not None:
        tables["returns"] = returns_of(returns, tables["errors"], evidence.runs)
        tables["correlations"] = correlations_of(tables["returns"], horizons)
    charts = charts_of(evidence, findings, tables)
    make_folder(out)
    (out / PAGE).unlink(missing_ok=True)  # written last: where it is, all of it is
    write_whole(
        out / JSON, (json.dumps(plain_of(evidence, findings, tables), separators=COMPACT) + "\n").encode()
    )
    for name in (TABLES, FIGURES):
        shutil.rmtree(out / name, ignore_errors=True)
    write_tables(tables, out / TABLES)
    if figures:
        draw_figures(evidence, tables["errors"], horizons, out / FIGURES)
    write_whole(out / PAGE, page_of(evidence, findings, charts, tables).encode())
    return Report(
        page=out / PAGE,
        runs=len(evidence.finished),
        unfinished=len(tables["unfinished"]),
        comparisons=len(findings.comparisons),
        claims=sum(c.verdict in ("better", "worse") for c in findings.comparisons),
        findings=tuple(sentences_of(findings)),
        left_out=tuple(silent_returns(tables["returns"])) if "returns" in tables else (),
        bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )


def _check_own(out: Path) -> None:
    """Refuse to replace what no report wrote: somebody's own figures, or page."""
    theirs = [name for name in (PAGE, JSON, TABLES, FIGURES) if (out / name).exists()]
    if not theirs:
        return
    try:
        ours = json.loads((out / JSON).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InvalidValueError(
            f"{out} has {', '.join(theirs)} that no report wrote, and a report would replace; give another --out"
        )


def plain_of(evidence: Evidence, findings: Findings, tables: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """``report.json``: what the page says, with numbers that are none as null."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": 1,
        "title": title_of(evidence),
        "reference": findings.reference,
        "findings": sentences_of(findings),
        "standings": [asdict(standing) for standing in findings.standings],
        "comparisons": [asdict(comparison) for comparison in findings.comparisons],
        "errors": tables["errors"].to_dicts(),
        **{
            name: tables[name].to_dicts()
            for name in ("properties", "costs", "correlations")
            if name in tables
        },
        "unfinished": tables["unfinished"].to_dicts(),
        "studies": [record.model_dump(mode="json", exclude={"others"}) for _, record in evidence.studies],
    }
    return _finite(content)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def newest_study(home: Path) -> Path | None:
    """The study of a workspace whose record was written last."""
    records = sorted(home.glob("*/study.json"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    return records[-1].parent if records else None
