"""Charts whose points are representations: errors in and out of distribution, errors and returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from pvrpipe.worldmodel.report_panels import number_of, panels_of, unit_of
from pvrpipe.worldmodel.report_sources import OWN, Evidence
from pvrpipe.worldmodel.report_tables import CORRELATED, SINGLE, short
from pvrpipe.worldmodel.report_words import NAMES, legible

PROPERTIES = {
    "vit": "ViT",
    "diverse": "diverse data",
    "sequential": "sequential data",
    "language": "language",
}


def shifted_panels(table: pl.DataFrame, evidence: Evidence, groups: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Every representation in each look of several factors beside the look it was trained on, by property."""
    stores = {store.pvr: store for _, record in evidence.studies for store in record.stores if store.pvr}
    own = table.filter(look=OWN)
    shifted = table.filter((pl.col("look") != OWN) & ~pl.col("look").str.contains(SINGLE))
    keys = ["environment", "variation", "arm", "model", "size", "measure", "horizon"]
    joined = shifted.join(own.select(*keys, before="mean", before_sem="sem"), on=keys, maintain_order="left")
    for about, rows in panels_of(joined, "horizon", "look"):
        chart = {"x": "error as trained", "y": f"error, {about['look']}", "diagonal": True}
        having = {
            name: {pvr for pvr in rows["pvr"] if pvr in stores and getattr(stores[pvr], name)}
            for name in PROPERTIES
        }
        if not any(having.values()):
            yield {**chart, "keys": about, "points": _points(rows, set(rows["pvr"]))}
        for name, pvrs in having.items():
            if pvrs:
                title = PROPERTIES[name]
                text = _grouped(groups, rows.row(0, named=True), name, title)
                keyed = {**about, "property": title}
                yield {**chart, "keys": keyed, "text": text, "points": _points(rows, pvrs)}


def _points(rows: pl.DataFrame, filled: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "label": row["arm"],
            "x": row["before"],
            "y": row["mean"],
            "x_sem": row["before_sem"],
            "y_sem": row["sem"],
            "filled": row["pvr"] in filled,
        }
        for row in rows.iter_rows(named=True)
    ]


def _grouped(groups: pl.DataFrame, about: dict[str, Any], name: str, title: str) -> str:
    """Errors over the trivial ones of those with a property and of the others, as trained and shifted."""
    keys = {key: about[key] for key in ("model", "size", "horizon")}
    told = []
    for has, who in ((True, title), (False, "others")) if len(groups) else ():
        of = groups.filter(property=name, has=has, error=about["measure"], **keys)
        values = [of.filter(look=look)["relative"].to_list() for look in (OWN, about["look"])]
        if all(values):
            told.append(
                f"{who} ({of['pvrs'][0]}): {legible(values[0][0])} as trained, {legible(values[1][0])} shifted"
            )
    return f"Over the trivial prediction, all tasks: {'; '.join(told)}" if told else ""


def return_panels(table: pl.DataFrame, correlations: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Errors beside returns, wherever there are three."""
    keys = [key for key in CORRELATED if key in correlations.columns]
    for found in correlations.filter(pl.col("points") > 2).iter_rows(named=True):
        rows = table.filter(**{key: found[key] for key in keys})
        told = [_correlation(name, found) for name in ("pearson", "spearman")]
        yield {
            "keys": {
                **({"task": short(found["environment"])} if "environment" in keys else {}),
                "model": f"{found['model']} {found['size']}",
                "error": NAMES[found["measure"]],
                "horizon": str(found["horizon"]),
            },
            "x": unit_of(rows),
            "y": "return",
            "text": f"{', '.join(told)}, {found['points']} points",
            "points": [
                {"label": row["pvr"], "x": row["mean"], "y": row["return"], "filled": True}
                for row in rows.iter_rows(named=True)
            ],
        }


def _correlation(name: str, found: dict[str, Any]) -> str:
    """A coefficient with its interval and p, as far as there are."""
    low, high, p = (found[f"{name}_{which}"] for which in ("low", "high", "p"))
    interval = "" if low is None else f" [{number_of(low)}, {number_of(high)}]"
    return f"{name.title()} {number_of(found[name])}{interval}" + ("" if p is None else f" (p = {p:.2g})")
