"""Choosing and weighting episodes by what the episode table says of them."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError, one_line

Condition = pl.Expr | str | None
SPLITS = ("train", "val")


def select_episodes(
    episodes: pl.DataFrame, split: str | None = None, where: Condition = None
) -> pl.DataFrame:
    """The rows of the episode table of a split that fulfil a condition.

    Args:
        episodes: ``Store.episodes``.
        split: ``train``, ``val``, or None for both.
        where: a polars expression, or its text in SQL, e.g. ``"policy = 'mpc' and episode_return > 100"``.

    Raises:
        InvalidValueError: the condition does not fit the table.
    """
    if split is not None:
        if split not in SPLITS:
            raise UnknownNameError.among("split", split, SPLITS)
        episodes = episodes.filter(episodes["split"] == split)
    if where is None:
        return episodes
    chosen = _evaluated(episodes, where, "condition")
    if chosen.dtype != pl.Boolean:
        raise InvalidValueError(
            f"the condition '{where}' is {chosen.dtype}, not true or false; compare something"
        )
    return episodes.filter(chosen.fill_null(value=False))


def weights_of(episodes: pl.DataFrame, weight: pl.Expr | str) -> NDArray[np.float64]:
    """A weight per episode, none of them negative.

    Raises:
        InvalidValueError: it does not fit the table, or is negative or not finite somewhere.
    """
    values = _evaluated(episodes, weight, "weight")
    try:
        found = values.cast(pl.Float64).to_numpy()
    except pl.exceptions.PolarsError:
        raise InvalidValueError(f"the weight '{weight}' is {values.dtype}, not a number") from None
    if not np.isfinite(found).all() or (found < 0).any():
        raise InvalidValueError(f"the weight '{weight}' is negative or not finite for some episode")
    return found


def _evaluated(episodes: pl.DataFrame, expression: pl.Expr | str, what: str) -> pl.Series:
    try:
        parsed = pl.sql_expr(expression) if isinstance(expression, str) else expression
        return episodes.with_columns(parsed.alias("_value"))["_value"]  # scalars as long as the table
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        names = ", ".join(name for name in episodes.columns if name != "row_first")
        raise InvalidValueError(
            f"the {what} '{expression}' does not fit the episode table ({one_line(error)[:100]}); it has {names}"
        ) from None
