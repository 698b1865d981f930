"""The charts of a report as data: what ``report.js`` draws, and the tables that stand behind them.

A chart has panels, each with ``keys`` that the page filters by, axes, and one of ``dots`` (a value with its interval
and the runs behind it), ``lines`` or ``points``. What there is no data for is no chart, but a sentence.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pvrpipe.schemas.progress import counted
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.pictures import read_map, read_strip
from pvrpipe.worldmodel.report_captions import (
    BLOCKS,
    BY_HORIZON,
    COST,
    ENCODERS,
    MAPS,
    OOD,
    RETURNS,
    SEVERITY,
    STRIPS,
    SUMMARY,
    by_pvr,
)
from pvrpipe.worldmodel.report_findings import Findings
from pvrpipe.worldmodel.report_panels import number_of, panels_of, task_of, unit_of
from pvrpipe.worldmodel.report_scatters import return_panels, shifted_panels
from pvrpipe.worldmodel.report_sources import OWN, Evidence
from pvrpipe.worldmodel.report_tables import severities_of, silent_returns
from pvrpipe.worldmodel.report_words import NAMES, episodes_of

MOMENTS = ("true", "imagined", "seen")
WITHOUT = (
    "the study says `maps: false`, the run of the first seed has no numbers, or a file is damaged (`pvrpipe study` "
    "draws it anew)."
)
NAMED = 5  # representations that a sentence names


@dataclass
class Charts:
    """Charts in the order of the page, their pictures, and a sentence for each chart that there is not."""

    charts: list[dict[str, Any]] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    """pictures, each once"""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """of maps: maps of one task show the same rows"""
    absent: list[str] = field(default_factory=list)
    _numbers: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def add(self, chart: dict[str, Any], panels: list[dict[str, Any]], without: str) -> None:
        """Take a chart in if it has a panel."""
        if panels:
            self.charts.append({**chart, "panels": panels})
        else:
            self.absent.append(without)

    def frame(self, webp: bytes) -> int:
        """The number of a picture."""
        return self._once(self.frames, webp, base64.b64encode(webp).decode())

    def rows_of(self, table: pl.DataFrame) -> int:
        """The number of a map's rows, without their places."""
        rows = {name: table[name].to_list() for name in ("episode", "step")}
        rows["reward"] = table["reward"].to_list()
        rows["frames"] = [self.frame(webp) for webp in table["frame"]]
        return self._once(self.rows, repr(rows).encode(), rows)

    def _once(self, kept: list[Any], content: bytes, value: Any) -> int:
        number = self._numbers.setdefault((id(kept), content), len(kept))
        if number == len(kept):
            kept.append(value)
        return number


def charts_of(evidence: Evidence, findings: Findings, tables: dict[str, pl.DataFrame]) -> Charts:
    """All charts of a page."""
    made, errors = Charts(), tables["errors"]
    horizons = sorted({h for _, record in evidence.studies for h in record.study.probe.horizons})
    at = errors.filter(pl.col("horizon").is_in(horizons)) if horizons else errors
    own = at.filter(look=OWN)
    made.add(SUMMARY, list(_standing_panels(findings, evidence.runs)), "No run has an error to be compared.")
    made.add(by_pvr(episodes_of(evidence)), list(_dots_by(own, "arm")), "No run has an error.")
    made.add(BY_HORIZON, list(_growth(errors.filter(look=OWN))), "Errors were probed at one horizon only.")
    _maps(made, evidence)
    made.add(
        OOD,
        list(shifted_panels(at, evidence, tables["properties"])),
        "No run was probed on a shifted look: the study has no `shifts`.",
    )
    made.add(
        SEVERITY,
        list(_severity(at)),
        "No look varies one factor by a severity, e.g. `shifts: [camera=0.3]`.",
    )
    made.add(ENCODERS, list(_ablation(own, "encoder")), "Every representation was read through one map only.")
    made.add(BLOCKS, list(_ablation(own, "blocks")), "No representation was cut down to some of its blocks.")
    made.add(
        RETURNS,
        list(return_panels(tables["returns"], tables["correlations"])) if "returns" in tables else [],
        "Errors are not correlated with returns of agents: none were given (`pvrpipe report --returns FILE.csv`), or "
        "of fewer than three representations.",
    )
    made.absent += silent_returns(tables["returns"]) if "returns" in tables else []
    _strips(made, evidence)
    made.add(COST, list(_cost(tables["costs"])), "No embeddings were made, so none have a cost.")
    return made


def _standing_panels(findings: Findings, runs: pl.DataFrame) -> Iterator[dict[str, Any]]:
    random = set(runs.filter(pl.col("random_weights"))["arm"])
    table: dict[tuple[Any, ...], list[Any]] = {}
    for s in findings.standings:
        table.setdefault((f"{s.model} {s.size}", s.error, s.horizon), []).append(s)
    for (model, error, horizon), standings in table.items():
        yield {
            "keys": {"model": model, "error": NAMES[error], "horizon": str(horizon)},
            "x": "error / trivial prediction",
            "mark": 1.0,
            "dots": [
                {
                    "label": s.pvr,
                    "value": s.relative.value,
                    "low": s.relative.low,
                    "high": s.relative.high,
                    "random": s.pvr in random,
                    "note": f"{counted(s.runs, 'run')}, {counted(s.tasks, 'task')}",
                }
                for s in standings
            ],
        }


def _dots_by(table: pl.DataFrame, label: str) -> Iterator[dict[str, Any]]:
    for keys, rows in panels_of(table, "horizon"):
        yield {
            "keys": keys,
            "x": unit_of(rows),
            "dots": [
                _dot(row, str(row[label]))
                for row in rows.sort("mean", maintain_order=True).iter_rows(named=True)
            ],
        }


def _dot(row: dict[str, Any], label: str) -> dict[str, Any]:
    mean, sem = row["mean"], row["sem"]
    return {
        "label": label,
        "value": mean,
        "low": None if sem is None else mean - sem,
        "high": None if sem is None else mean + sem,
        "runs": row["values"],
        "random": row["random_weights"],
        "note": f"{counted(row['runs'], 'run')} on {counted(row['episodes'], 'episode')}",
    }


def _growth(table: pl.DataFrame) -> Iterator[dict[str, Any]]:
    for keys, rows in panels_of(table):
        lines = [_line(arm, part.sort("horizon"), "steps") for arm, part in _by(rows, "arm")]
        if any(len(line["x"]) > 1 for line in lines):
            yield {
                "keys": keys,
                "x": "rows summed",
                "y": unit_of(rows),
                "log": True,
                "lines": lines,
            }


def _severity(table: pl.DataFrame) -> Iterator[dict[str, Any]]:
    graded = severities_of(table)
    for keys, rows in panels_of(graded, "horizon", "factor"):
        lines = [_line(arm, part.sort("severity"), "severity") for arm, part in _by(rows, "arm")]
        yield {
            "keys": keys,
            "x": f"severity of {keys['factor']}",
            "y": unit_of(rows),
            "lines": lines,
        }


def _line(label: str, rows: pl.DataFrame, x: str) -> dict[str, Any]:
    mean, sem = rows["mean"], rows["sem"]
    return {
        "label": label,
        "x": rows[x].to_list(),
        "y": mean.to_list(),
        "low": (mean - sem).to_list(),
        "high": (mean + sem).to_list(),
    }


def _by(table: pl.DataFrame, key: str) -> Iterator[tuple[str, pl.DataFrame]]:
    for (value,), rows in table.group_by(key, maintain_order=True):
        yield str(value), rows


def _ablation(table: pl.DataFrame, key: str) -> Iterator[dict[str, Any]]:
    """A representation at each value of ``key``, where it has several."""
    cut = zip(table["pvr"], table["blocks"], strict=True)
    stems = [pvr.replace(f" blocks {blocks}", "") for pvr, blocks in cut]  # weights may stand behind them
    stem = table.with_columns(stem=pl.Series(stems, dtype=pl.String))
    varied = stem.filter(pl.col(key).n_unique().over("stem", "environment", "model") > 1)
    for keys, rows in panels_of(varied, "horizon"):
        for name, part in _by(rows, "stem"):
            dots = [_dot(row, row["arm"]) for row in part.iter_rows(named=True)]
            yield {"keys": {**keys, "representation": name}, "x": unit_of(rows), "dots": dots}


def _pictured(evidence: Evidence, name: str) -> Iterator[tuple[dict[str, str], Path]]:
    for row in evidence.pictured(name).iter_rows(named=True):
        yield _keys(row), Path(row["run"])


def _keys(row: dict[str, Any]) -> dict[str, str]:
    """What a picture is filtered by."""
    task, model = task_of(row["environment"], row["variation"]), f"{row['model']} {row['size']}"
    return {"task": task, "model": model, "representation": row["arm"]}


def _unpictured(evidence: Evidence, name: str, undone: str) -> list[str]:
    """A sentence about those that have no picture of a kind that others have."""
    lacking = [_keys(row) for row in evidence.unpictured(name).iter_rows(named=True)]
    told = [f"{keys['representation']} ({keys['model']}, {keys['task']})" for keys in lacking]
    told = told if len(told) <= NAMED + 1 else [*told[:NAMED], f"{len(told) - NAMED} more"]
    return [f"{undone} of {'; '.join(told)}: {WITHOUT}"] if told else []


def _maps(made: Charts, evidence: Evidence) -> None:
    panels = []
    for keys, folder in _pictured(evidence, runs.MAP):
        table, separation = read_map(folder)
        rows, reward = made.rows_of(table), table["reward"].to_numpy()
        colours = f"reward from {reward.min():.3g} (blue) to {reward.max():.3g} (orange)"
        count = f"{counted(len(table), 'row')} of {counted(table['episode'].n_unique(), 'episode')}"
        for method in ("umap", "pca"):
            place = table.select(f"{method}_x", f"{method}_y").to_numpy()
            low, high = place.min(0), place.max(0)
            unit = np.round((place - low) / np.maximum(high - low, 1e-12), 3)
            told, latent = separation[method], separation["latent"]
            panels.append(
                {
                    "keys": {**keys, "map": method.upper()},
                    "text": f"separation {number_of(told)} here, {number_of(latent)} in the latent; {count}; {colours}",
                    "x": unit[:, 0].tolist(),
                    "y": unit[:, 1].tolist(),
                    "rows": rows,
                }
            )
    made.add(MAPS, panels, f"No latents were laid out: {WITHOUT}")
    if panels:
        made.absent += _unpictured(evidence, runs.MAP, "No latents were laid out")


def _strips(made: Charts, evidence: Evidence) -> None:
    panels = []
    for keys, folder in _pictured(evidence, runs.STRIP):
        table = read_strip(folder)
        panels.append(
            {
                "keys": keys,
                "text": f"episode {table['episode'][0]}",
                "step": table["step"].to_list(),
                "strip": {name: [made.frame(webp) for webp in table[name]] for name in MOMENTS},
                "received": table["received"].to_list(),
                "predicted": table["predicted"].to_list(),
                "distance": table["distance"].to_list(),
            }
        )
    made.add(STRIPS, panels, f"No rollouts were drawn: {WITHOUT}")
    if panels:
        made.absent += _unpictured(evidence, runs.STRIP, "No rollouts were drawn")


def _cost(costs: pl.DataFrame) -> Iterator[dict[str, Any]]:
    units = {
        "seconds_per_1000_frames": ("seconds for 1,000 frames", 1),
        "bytes_per_frame": ("bytes of a frame", 1),
        "memory_bytes": ("MB of memory while embedding", 1e6),
    }
    for column, (unit, scale) in units.items():
        rows = (
            costs.filter(pl.col(column).is_not_null())
            .group_by("pvr", maintain_order=True)
            .agg(pl.col(column).mean(), pl.col("random_weights").any())
        )
        if len(rows):
            yield {
                "keys": {"cost": unit},
                "x": unit,
                "dots": [
                    {"label": row["pvr"], "value": row[column] / scale, "random": row["random_weights"]}
                    for row in rows.sort(column, maintain_order=True).iter_rows(named=True)
                ],
            }
