"""``index.html``: the page of a report, one file that asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import polars as pl

from pvrpipe.schemas.progress import counted
from pvrpipe.schemas.study_record import STATES
from pvrpipe.worldmodel.report_charts import Charts
from pvrpipe.worldmodel.report_findings import ALPHA, Findings, relative_errors
from pvrpipe.worldmodel.report_panels import task_of
from pvrpipe.worldmodel.report_sources import ERRORS, OWN, Evidence
from pvrpipe.worldmodel.report_stamp import stamp_of
from pvrpipe.worldmodel.report_tables import ends_of, short
from pvrpipe.worldmodel.report_words import (
    NAMES,
    TRIVIAL,
    about_of,
    episodes_of,
    grouped,
    legible,
    sentences_of,
    summary_of,
    title_of,
    told,
)

#: Rounding depends on it, and what was trained on what rounding leaves.
THREADS = (
    '<p class="about">On Ray a run computes on one thread. With <code>OMP_NUM_THREADS=1</code> these commands give its '
    "numbers to the last bit; without, runs of more than two million parameters on a CPU give others.</p>"
)


def page_of(evidence: Evidence, findings: Findings, charts: Charts, tables: dict[str, pl.DataFrame]) -> str:
    """The whole page."""
    arms = evidence.runs["arm"].unique(maintain_order=True).to_list()
    arms.sort(key=lambda arm: arm != findings.reference)  # the reference has the colour of the text
    data = {"arms": arms, "charts": charts.charts, "frames": charts.frames, "rows": charts.rows}
    parts = {
        "STAMP": stamp_of([record for _, record in evidence.studies]),
        "TITLE": escape(title_of(evidence)),
        "STYLE": _file("css"),
        "SCRIPT": _file("js"),
        "DATA": json.dumps(_drawn(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "LEAD": _lead(evidence, tables["unfinished"]),
        "FOUND": _found(evidence, findings, tables["errors"]),
        "COMPARISONS": _comparisons(findings),
        "ABSENT": _absent(charts.absent if findings.standings else ()),
        "PROVENANCE": _provenance(evidence, tables["unfinished"]),
        "COMMANDS": _commands(evidence),
        "FOOTER": "Made by <code>pvrpipe report</code>. Tables are in <code>tables/</code>, figures in "
        "<code>figures/</code>, all of this in <code>report.json</code>.",
    }
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], _file("html"))


def _drawn(value: Any) -> Any:
    """What the charts are drawn from, with as many digits as a screen can show."""
    if isinstance(value, dict):
        return {key: _drawn(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_drawn(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _file(suffix: str) -> str:
    return files("pvrpipe.worldmodel").joinpath(f"report.{suffix}").read_text()


def _lead(evidence: Evidence, unfinished: pl.DataFrame) -> str:
    runs = evidence.finished
    if runs.is_empty():
        return f"<p>No run has numbers.</p>{_lacking(unfinished)}"
    tasks = runs.select("environment", "variation").unique(maintain_order=True).rows()
    names = ", ".join(short(e) if v == "none" else f"{short(e)} ({v})" for e, v in tasks)
    arms = ", ".join(runs["arm"].unique(maintain_order=True))
    models = ", ".join(f"{m} {s}" for m, s in runs.select("model", "size").unique(maintain_order=True).rows())
    seeds = counted(runs["seed"].n_unique(), "seed")
    probed = evidence.scores.filter(look=OWN)["episodes"]
    held = f"each probed on {_range(probed.min(), probed.max())} {episodes_of(evidence)} episode"
    held += "s" * (probed.max() != 1)
    text = f"<p>{counted(len(runs), 'run')}: {escape(arms)}; {escape(models)}; {escape(names)}; {seeds}; {held}.</p>"
    random = runs.filter(pl.col("random_weights"))["arm"].unique(maintain_order=True).to_list()
    if random:
        text += f'<p class="alarm">Random weights, nobody trained these encoders: {escape(", ".join(random))}.</p>'
    return text + _lacking(unfinished)


def _range(low: Any, high: Any) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _lacking(unfinished: pl.DataFrame) -> str:
    if unfinished.is_empty():
        return ""
    counts = unfinished["state"].value_counts(sort=True).sort("count", "state", descending=[True, False])
    states = ", ".join(f"{count} {STATES[str(state)]}" for state, count in counts.rows())
    which = '<a href="#provenance">which</a>'
    return f'<p class="alarm">Without numbers, and averaged into nothing: {escape(states)} ({which}).</p>'


def _found(evidence: Evidence, findings: Findings, errors: pl.DataFrame) -> str:
    if not findings.standings:
        return "<p><strong>Nothing: there are no errors to be compared.</strong></p>"
    claims = sum(c.verdict in ("better", "worse") for c in findings.comparisons)
    count = len(findings.comparisons)
    find = "finds" if claims == 1 else "find"
    head = (
        f"Of {counted(count, 'comparison')} with {told(findings.reference)}, {claims} {find} a difference."
        if count
        else "There is nothing to compare."
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in summary_of(findings))
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences_of(findings))
    judged = (
        " P is the probability that a run has the smaller error. A difference is claimed where a permutation test "
        f"within tasks finds one at a false discovery rate of {ALPHA:.0%} over all {count} comparisons; if nothing "
        f"differed, the chance of any claim here would be about {ALPHA:.0%}."
    )
    sure = (
        "How sure: brackets are 95 % intervals of interquartile means over runs and tasks (bootstrap, stratified over "
        f"tasks).{judged if count else ''} Seeds change weights and batches, not the rollouts: intervals do not say "
        "what other trajectories would show. Dynamics errors are shown and not judged: each model's latent has units "
        "of its own, and one that hardly moves is easily predicted."
    )
    horizons = sorted({s.horizon for s in findings.standings})
    sure += "".join(
        f" Episodes end before {horizon} rows: what is said of that horizon is said of {steps:.0f} rows on average."
        for horizon, steps in ends_of(errors, horizons).items()
    )
    sure += "".join(f" {sentence}" for sentence in _uncompared(evidence, horizons))
    return (
        f'<p><strong>{escape(head)}</strong></p><ul class="findings">{items}</ul>{_standings(findings)}'
        f'{_folded("In sentences", f"""<ul class="findings">{sentences}</ul>""")}'
        f'<p class="about">{escape(sure)}</p>'
    )


def _uncompared(evidence: Evidence, horizons: Sequence[int]) -> list[str]:
    """What has no standing, or not in every task, since its trivial prediction is never wrong."""
    at = pl.col("horizon").is_in(list(horizons)) & pl.col("measure").is_in(ERRORS)
    stood = _tasks_of(relative_errors(evidence).filter(at))
    told = []
    for about, tasks in _tasks_of(evidence.errors(look=OWN).filter(at)).items():
        model, size, error, horizon = about
        never = ", ".join(task_of(*task) for task in tasks if task not in stood.get(about, ()))
        compared = (
            "with nothing" if about not in stood else f"in {len(stood[about])} of {len(tasks)} tasks only"
        )
        if never:
            told.append(
                f"{model} {size}, {NAMES[error]} over {horizon} rows is compared {compared}: {TRIVIAL[error]} is 0"
                + (f" in {never}." if about in stood else ".")
            )
    return told


def _tasks_of(errors: pl.DataFrame) -> dict[tuple[Any, ...], list[tuple[str, str]]]:
    """The tasks in which there is an error, by model, size, error and horizon."""
    found: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    keys = ("model", "size", "measure", "horizon", "environment", "variation")
    for *about, environment, variation in errors.select(keys).unique(maintain_order=True).rows():
        found.setdefault(tuple(about), []).append((environment, variation))
    return found


def _standings(findings: Findings) -> str:
    """Errors relative to the trivial prediction, a column for each representation."""
    groups = grouped(findings.standings)
    arms = list(dict.fromkeys(s.pvr for s in findings.standings))
    arms.sort(key=lambda arm: arm != findings.reference)
    verdicts = {(*about_of(c), c.pvr): c.verdict for c in findings.comparisons}
    marks = {"better": " better", "worse": " worse"}
    rows = []
    for about, standings in groups:
        of, most = {s.pvr: s for s in standings}, max(s.tasks for s in standings)
        cells = [
            f"{legible(of[arm].relative.value)}{marks.get(verdicts.get((*about, arm), ''), '')}"
            + (f" ({of[arm].tasks} of {most} tasks)" if of[arm].tasks < most else "")
            if arm in of
            else "–"
            for arm in arms
        ]
        model, size, error, horizon = about
        rows.append([f"{model} {size}", f"{NAMES[error]}, {horizon} rows", *cells])
    caption = "Error over that of a trivial prediction, interquartile mean; lower is better, 1 is as good as trivial."
    return _table(["model", "error", *arms], rows, caption)


def _comparisons(findings: Findings) -> str:
    rows = [
        [
            f"{c.model} {c.size}",
            NAMES[c.error],
            c.horizon,
            c.pvr,
            c.against,
            c.improvement,
            f"{c.p:.3g}",
            f"{c.q:.3g}",
            c.verdict,
        ]
        for c in findings.comparisons
    ]
    head = ["model", "error", "horizon", "representation", "against", "P(smaller error)", "p", "q", "verdict"]
    table = _table(head, rows, "Every comparison of the report, each with its test.")
    return _folded(counted(len(rows), "comparison"), table) if rows else "<p>None.</p>"


def _absent(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    told = (re.sub(r"`(.*?)`", r"<code>\1</code>", escape(sentence)) for sentence in sentences)
    items = "".join(f"<li>{sentence}</li>" for sentence in told)
    head = '<section aria-labelledby="absent"><h2 id="absent">What is not shown</h2>'
    return f'{head}<ul class="findings">{items}</ul></section>'


def _provenance(evidence: Evidence, unfinished: pl.DataFrame) -> str:
    rows = [
        [
            store.folder,
            store.kind,
            ("RANDOM WEIGHTS " if store.random_weights else "") + (store.pvr or ""),
            store.state,
            store.id or "",
            store.weights_sha256 or "",
        ]
        for _, record in evidence.studies
        for store in record.stores
    ]
    stores = _table(
        ["store", "kind", "representation", "state", "id", "sha256 of weights"], rows, "Stores, as verified."
    )
    runs = _table(
        ["run", "representation", "model", "seed", "state"],
        [
            [r["run"], r["arm"], f"{r['model']} {r['size']}", r["seed"], r["state"]]
            for r in evidence.runs.iter_rows(named=True)
        ],
        "Runs; their numbers are in probe.parquet and metrics.json of each folder.",
    )
    missing = (
        _table(["what", "state", "why"], unfinished.rows(), "Without numbers.") if len(unfinished) else ""
    )
    return (
        missing
        + _folded(counted(len(rows), "store"), stores)
        + _folded(counted(len(evidence.runs), "run"), runs, printed=False)
    )


def _folded(summary: str, content: str, *, printed: bool = True) -> str:
    """Content that is unfolded by a click, and where it is ``printed`` on paper too."""
    kind = ' class="printed"' if printed else ""
    return f"<details{kind}><summary>{summary}</summary>{content}</details>"


def _commands(evidence: Evidence) -> str:
    text = ""
    for _, record in evidence.studies:
        parts = [store.command for store in record.stores] + [
            line for job in record.jobs for line in job.commands
        ]
        steps = "\n".join(filter(None, parts))
        text += f"<pre>{escape(record.command)}</pre>"
        text += _folded("Step by step", f"{THREADS}<pre>{escape(steps)}</pre>", printed=False)
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption><span>{escape(caption)}</span></caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if hasattr(value, "low"):
        value = f"{value.value:.2f}" + ("" if value.low is None else f" [{value.low:.2f}, {value.high:.2f}]")
    text = escape(str(value))
    if text.startswith("RANDOM WEIGHTS"):
        return f'<td class="alarm">{text}</td>'
    return f"<td><code>{text}</code></td>" if len(text) >= 40 and " " not in text else f"<td>{text}</td>"
