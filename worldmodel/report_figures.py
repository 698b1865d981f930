"""Figures of a report for a paper, as SVG and PDF, in the width of a column, and in the layout of the study's own.

``figures/NAME.svg``: a panel per task and model, at the shortest horizon. ``figures/paper/``: figures 6 (dynamics
error), 7 (reward error) and 8 (latent maps) of Schneider et al. 2024: a column for each model, a row for each horizon,
bars with standard errors; maps with rows for each model. What nobody trained is named in red, which is said below.
Names that are too long for their place are shortened in the middle; tables have them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl

from pvrpipe.store.files import disk_errors, make_folder
from pvrpipe.store.workspace import slug
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.pictures import read_map
from pvrpipe.worldmodel.report_panels import task_of
from pvrpipe.worldmodel.report_sources import OWN, Evidence
from pvrpipe.worldmodel.report_tables import short
from pvrpipe.worldmodel.report_words import NAMES, shortened

LETTER = 0.06  # inches that one of a label takes
LABEL, TITLE = 26, 20  # letters of a representation's name, and of the one over a map
ACROSS = 4  # maps in a row
COLUMN, TEXT = 3.25, 5.5  # inches: of a two-column paper, and of NeurIPS' text
STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "pvrpipe",
    "text.parse_math": False,  # names may have dollars
}
SCIENTIFIC = (-3, 4)  # powers of ten that are written out
ALARM, ALARMED = "#b3121d", "in red: random weights, nobody trained this encoder"
PAPER = {"dynamics_error": "figure-6-dynamics-error", "reward_error": "figure-7-reward-error"}


def draw_figures(evidence: Evidence, errors: pl.DataFrame, horizons: Sequence[int], folder: Path) -> None:
    """Draw all figures that there is data for."""
    make_folder(folder / "paper")
    own = errors.filter(pl.col("horizon").is_in(list(horizons)), look=OWN)
    with matplotlib.rc_context(STYLE):
        for error in NAMES:
            rows = own.filter(measure=error)
            if len(rows):
                shortest = rows.filter(horizon=rows["horizon"].min())
                _draw_columns(shortest, NAMES[error], folder / error.replace("_", "-"))
        for environment, variation in (
            own.select("environment", "variation").unique(maintain_order=True).rows()
        ):
            task = own.filter(environment=environment, variation=variation)
            name = slug(short(environment) if variation == "none" else f"{short(environment)}-{variation}")
            for error, stem in PAPER.items():
                _draw_paper(task.filter(measure=error), NAMES[error], folder / "paper" / f"{stem}-{name}")
            _draw_maps(evidence, environment, variation, folder / "paper" / f"figure-8-latent-maps-{name}")


def _draw_columns(rows: pl.DataFrame, name: str, path: Path) -> None:
    """A panel for each model and task, one under another, in the width of a column."""
    parts = list(rows.group_by("model", "size", "environment", "variation", maintain_order=True))
    count = max(len(part) for _, part in parts)
    height = len(parts) * (0.6 + 0.16 * count) + 0.15 * rows["random_weights"].any()  # red is told below
    with _figure(path, len(parts), 1, (COLUMN, height)) as axes:
        for axis, ((model, size, environment, variation), part) in zip(axes[:, 0], parts, strict=True):
            ordered = part.sort("mean", descending=True, maintain_order=True)
            places = range(len(ordered))
            axis.errorbar(ordered["mean"], places, xerr=ordered["sem"].fill_null(0.0), fmt="o", ms=3, lw=1)
            axis.set_yticks(places, [shortened(arm, LABEL) for arm in ordered["arm"]])
            task = task_of(str(environment), str(variation))
            # Over the labels on the left, where long ones leave no room beside them.
            axis.set_title(f"{task}, {model} {size}", loc="right")
            axis.set_xlabel(f"{name}, {part['horizon'][0]} rows")
            axis.set_xlim(left=0)
            axis.set_ylim(-0.8, len(ordered) - 0.2)
            axis.ticklabel_format(axis="x", scilimits=SCIENTIFIC)
            axis.locator_params(axis="x", nbins=5)
            _flag(axis.get_yticklabels(), ordered["random_weights"])


def _draw_paper(rows: pl.DataFrame, name: str, path: Path) -> None:
    """A column for each model, a row for each horizon, longest first; bars with standard errors."""
    models = rows.select("model", "size").unique(maintain_order=True).rows()
    horizons = sorted(rows["horizon"].unique(), reverse=True)
    if not models:
        return
    arms = rows["arm"].unique(maintain_order=True).to_list()
    turned = len(arms) > 3
    labels = [shortened(arm, LABEL) for arm in arms]
    random = [rows.filter(arm=arm)["random_weights"].any() for arm in arms]
    below = LETTER * max(map(len, labels)) if turned else 0.0
    with _figure(path, len(horizons), len(models), (TEXT, 1.4 * len(horizons) + 0.5 + below)) as axes:
        for column, (model, size) in enumerate(models):
            for line, horizon in enumerate(horizons):
                axis = axes[line, column]
                part = rows.filter(model=model, size=size, horizon=horizon)
                colours = ["#555555" if random else "#0072b2" for random in part["random_weights"]]
                axis.bar(
                    [arms.index(arm) for arm in part["arm"]],
                    part["mean"],
                    yerr=part["sem"].fill_null(0.0),
                    color=colours,
                    ecolor="black",
                )
                last = line == len(horizons) - 1
                axis.set_xlim(-0.6, len(arms) - 0.4)
                axis.set_xticks(range(len(arms)), labels if last else [], rotation=90 if turned else 0)
                _flag(axis.get_xticklabels() if last else (), random)
                axis.ticklabel_format(axis="y", scilimits=SCIENTIFIC)
                axis.set_ylabel(f"{name}, {horizon} rows")
                if line == 0:
                    axis.set_title(f"{model} {size}")


def _draw_maps(evidence: Evidence, environment: str, variation: str, path: Path) -> None:
    """UMAPs coloured by reward: rows for each model, a column for each representation, as far as they fit."""
    drawn = evidence.pictured(runs.MAP).filter(environment=environment, variation=variation)
    if not len(drawn):
        return
    models = drawn.select("model", "size").unique(maintain_order=True).rows()
    arms = drawn["arm"].unique(maintain_order=True).to_list()
    columns = min(len(arms), ACROSS)
    lines = -(-len(arms) // columns)
    width = TEXT / max(columns, 3)
    with _figure(path, len(models) * lines, columns, (TEXT, len(models) * lines * width + 0.3)) as axes:
        for axis in axes.flat:
            axis.set_axis_off()
        for row in drawn.iter_rows(named=True):
            line, column = divmod(arms.index(row["arm"]), columns)
            axis = axes[models.index((row["model"], row["size"])) * lines + line, column]
            points, separation = read_map(Path(row["run"]))
            least, most = points["reward"].min(), points["reward"].max()
            shown = axis.scatter(
                points["umap_x"],
                points["umap_y"],
                c=points["reward"],
                vmin=least,
                vmax=most,
                s=2,
                lw=0,
                rasterized=True,
            )
            told = separation["latent"]
            name = f"{row['model']} {row['size']}" + ("" if told is None else f", R² {told:.2f}")
            axis.set_title(f"{shortened(row['arm'], TITLE)}\n{name}", fontsize=6)
            if row["random_weights"]:
                _alarm(axis.title)
        if least != most:  # of the same rows in every panel
            axes[0, 0].figure.colorbar(shown, ax=axes, label="reward", shrink=0.5, aspect=30)


def _flag(labels: Iterable[Any], random: Iterable[bool]) -> None:
    """Mark the names of representations that nobody trained."""
    for label, untrained in zip(labels, random, strict=False):
        if untrained:
            _alarm(label)


def _alarm(name: Any) -> None:
    """Red, and under the figure what that means."""
    name.set_color(ALARM)
    name.figure.supxlabel(ALARMED, fontsize=6, color=ALARM)


@contextmanager
def _figure(path: Path, rows: int, columns: int, inches: tuple[float, float]) -> Iterator[Any]:
    """Axes (rows, columns), written as SVG and PDF that hold no date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False)
    with disk_errors(path):
        figure.savefig(f"{path}.svg", metadata={"Date": None})  # a name may have dots of its own
        figure.savefig(f"{path}.pdf", metadata={"CreationDate": None}, dpi=300)
