"""What a report says in words; only what the statistics bear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pvrpipe.worldmodel.report_findings import REFERENCE, Comparison, Findings, Standing
from pvrpipe.worldmodel.report_sources import Evidence

NAMES = {
    "reward_error": "reward error",
    "state_error": "state error",
    "dynamics_error": "dynamics error",
}
TRIVIAL = {
    "reward_error": "the error of always predicting the mean reward",
    "state_error": "the error of the mean state",
    "dynamics_error": "the error of predicting no change",
}


#: What episodes of a split are called.
EPISODES = {"val": "held-out", "train": "training"}


def legible(value: float) -> str:
    """Two decimals; two digits where these would say nothing, or too much."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.2f}"
    return f"{float(f'{value:.2g}'):,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.2g}"


def shortened(name: str, letters: int) -> str:
    """A name in so many letters: what is in its middle makes way, as on the page."""
    return name if len(name) <= letters else f"{name[: (letters + 1) // 2 - 1]}…{name[-(letters // 2) :]}"


def title_of(evidence: Evidence) -> str:
    """Of the page: the study's own, or its name."""
    titles = [record.study.title or record.study.name for _, record in evidence.studies]
    return "; ".join(titles) or "World models side by side"


def episodes_of(evidence: Evidence) -> str:
    """Which episodes the runs of a page were probed on: ``held-out``."""
    kinds = (EPISODES[record.study.probe.splits[0]] for _, record in evidence.studies)
    return " or ".join(dict.fromkeys(kinds))


def summary_of(findings: Findings) -> list[str]:
    """A line for each representation: how often it is better, worse, or not told apart."""
    words = {
        "better": "better in {}",
        "worse": "worse in {}",
        "unclear": "not told apart in {}",
        "too few runs": "too few runs to tell in {}",
    }
    lines = []
    for pvr in dict.fromkeys(c.pvr for c in findings.comparisons):
        verdicts = [c.verdict for c in findings.comparisons if c.pvr == pvr]
        parts = [
            phrase.format(verdicts.count(verdict)) for verdict, phrase in words.items() if verdict in verdicts
        ]
        lines.append(
            f"{pvr}, compared with {told(findings.reference)} {_times(len(verdicts))}: {', '.join(parts)}."
        )
    return lines


def sentences_of(findings: Findings) -> list[str]:
    """What was found, a sentence for each model, error and horizon; only what the statistics bear."""
    found = []
    for about, standings in grouped(findings.standings):
        compared = [c for c in findings.comparisons if about_of(c) == about]
        model, size, error, horizon = about
        most = max(standing.tasks for standing in standings)
        ranked = [standing for standing in standings if standing.tasks == most]
        best = ranked[0]
        interval = (
            ""
            if best.relative.low is None or best.relative.high is None
            else f" [{legible(best.relative.low)}, {legible(best.relative.high)}]"
        )
        text = (
            f"{model} {size}, {NAMES[error]} over {horizon} rows: {'lowest is ' if ranked[1:] else ''}{best.pvr}, "
            f"{legible(best.relative.value)}{interval} of {TRIVIAL[error]}."
        )
        fewer = ", ".join(f"{s.pvr} ({s.tasks} of {most})" for s in standings if s.tasks < most)
        left = [f"On fewer tasks, and not ranked: {fewer}."] if fewer else []
        found.append(" ".join([text, *left, *_verdicts(compared, findings.reference)]))
    return found


def told(reference: str) -> str:
    """What is compared with, in a sentence."""
    return "learning from scratch" if reference == REFERENCE else reference


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _verdicts(compared: Sequence[Comparison], reference: str) -> list[str]:
    reference = told(reference)
    words = {
        "better": f"Better than {reference}",
        "worse": f"Worse than {reference}",
        "unclear": f"Not told apart from {reference}",
        "too few runs": f"Too few runs to be compared with {reference}",
    }
    said = []
    for verdict, phrase in words.items():
        names = [
            f"{c.pvr} (P = {c.improvement.value:.2f}, q = {c.q:.2g})"
            if verdict in ("better", "worse")
            else c.pvr
            for c in compared
            if c.verdict == verdict
        ]
        if names:
            said.append(f"{phrase}: {', '.join(names)}.")
    return said


def grouped(standings: Iterable[Standing]) -> list[tuple[tuple[Any, ...], list[Standing]]]:
    """By model, size, error and horizon."""
    groups: dict[tuple[Any, ...], list[Standing]] = {}
    for standing in standings:
        groups.setdefault(about_of(standing), []).append(standing)
    return list(groups.items())


def about_of(row: Standing | Comparison) -> tuple[Any, ...]:
    """What is compared: model, size, error and horizon."""
    return row.model, row.size, row.error, row.horizon
