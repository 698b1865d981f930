"""What all charts of a report say alike: the keys of a panel, units, and numbers in words."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from pvrpipe.worldmodel.report_tables import short
from pvrpipe.worldmodel.report_words import NAMES

UNITS = {
    "reward_error": "accumulated |r̂ − r|",
    "state_error": "accumulated error, variances",
}
LATENT = {"dreamerv3": "accumulated KL, nats"}  # of others
SQUARED = "accumulated MSE of latents"


def panels_of(table: pl.DataFrame, *more: str) -> Iterator[tuple[dict[str, str], pl.DataFrame]]:
    """Rows by task, model, error and horizon, as far as the table has them."""
    keys = ["environment", "variation", "model", "size", "measure", *more]
    for values, rows in table.group_by(keys, maintain_order=True):
        found = dict(zip(keys, map(str, values), strict=True))
        named = {
            "task": task_of(found.pop("environment"), found.pop("variation")),
            "model": f"{found.pop('model')} {found.pop('size')}",
            "error": NAMES[found.pop("measure")],
        }
        yield {**named, **found}, rows


def task_of(environment: str, variation: str) -> str:
    """An environment, and the look in which it was trained on, if that is not its own."""
    return short(environment) if variation == "none" else f"{short(environment)}, {variation}"


def unit_of(rows: pl.DataFrame) -> str:
    """Of errors of one measure and model."""
    return UNITS.get(rows["measure"][0]) or LATENT.get(rows["model"][0], SQUARED)


def number_of(value: float | None) -> str:
    """Two decimals, if it is a number."""
    return "undefined" if value is None or value != value else f"{value:.2f}"
