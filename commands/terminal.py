"""What a person sees: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pvrpipe.schemas.progress import Progress


def note(message: str) -> None:
    """A remark for the person at the terminal; stdout stays clean."""
    print(message, file=sys.stderr)


NAME = 40  # characters of what a row is about that are never broken: it is to be typed again
WHOLE = "{task.completed:,.0f}/{task.total:,.0f}"


def duration(hours: float) -> str:
    """A time as one says it: 40 s, 12 min, 3.5 h."""
    seconds = 3600 * hours
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if hours < 1 else f"{hours:.1f} h"


@contextmanager
def watching(what: str, unit: str, *about: str) -> Iterator[Progress]:
    """A progress bar on stderr with rate and time left; what it is ``about`` is said once there is progress."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            # rich forgets what it has seen whenever the total changes
            whole = task.completed / task.elapsed if task.elapsed else 0
            return Text(f"{task.finished_speed or task.speed or whole:,.1f} {unit}/s")

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed:,.1f}/{task.total:,.1f}" if unit == "MiB" else WHOLE),
    )
    bar = Bar(
        *columns,
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task(what, total=1, note="")

    def progress(done: float, total: float, note: str = "") -> None:
        if not bar.live.is_started:  # nothing is shown until there is progress, so that a mistake is one line
            for line in about:
                print(line, file=sys.stderr)
            bar.start()
        bar.update(task, completed=done, total=total, note=note)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            try:
                bar.stop()
            except IndexError:  # Ctrl-C while it began: what it had not begun it cannot end
                bar.console.show_cursor(True)


def tell(as_json: bool, result: Any, rows: Iterable[Any], columns: Sequence[str]) -> None:
    """Print a result: as one line of JSON, or as a table for a person."""
    if as_json:
        print(json.dumps(plain(result)))
    else:
        show(rows, columns)


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON has them, and nothing for a number that is none."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value.absolute()) if isinstance(value, Path) else value


def show(rows: Iterable[Any], columns: Sequence[str], title: str | None = None) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    lines = [
        [
            "–" if (c := cells[name]) is None else f"{c:,.3f}" if isinstance(c, float) else str(c)
            for name in columns
        ]
        for cells in map(plain, rows)
    ]
    table = Table(title=title)
    for place, name in enumerate(columns):
        whole = max((len(line[0]) for line in lines), default=0) if place == 0 else 0
        table.add_column(name, overflow="fold", min_width=min(whole, NAME))
    for line in lines:
        table.add_row(*line)
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 160).print(table)


ERROR_COLUMNS = ("error", "horizon", "accumulated", "per step", "shuffled actions", "no change")


def error_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """A probe's errors as the rows of a table, mean ± standard error over episodes."""
    rows = []
    for error in ("dynamics_error", "reward_error", "state_error"):
        for horizon, values in (metrics[error] or {}).items():
            rows.append(
                {
                    "error": error,
                    "horizon": reached(int(horizon), values["steps"]["mean"]),
                    "accumulated": mean_sem(values["accumulated"]),
                    "per step": mean_sem(values["per_step"]),
                    "shuffled actions": mean_sem(values["shuffled_actions"]["accumulated"]),
                    "no change": mean_sem(values["no_change"]["accumulated"]),
                }
            )
    return rows


def reached(horizon: int, steps: float) -> str:
    """The horizon, and how far episodes went where they end before it."""
    return str(horizon) if steps >= horizon else f"{horizon} (end at {steps:.0f})"


def mean_sem(value: Mapping[str, float | None]) -> str:
    """``12.3 ± 0.4``."""
    sem = value["sem"]
    return f"{value['mean']:.4g}" + (f" ± {sem:.2g}" if sem is not None else "")
