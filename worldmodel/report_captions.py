"""What each chart of a report is called and how it is to be read."""

from __future__ import annotations

from typing import Any

BARS = "Bar: standard error over runs; of a single run, over its episodes"


def chart_of(name: str, title: str, kind: str, text: str, *beside: str) -> dict[str, Any]:
    """What a chart is; of ``beside``, the page shows all values beside each other."""
    return {"id": name, "title": title, "kind": kind, "text": text, "beside": beside}


SUMMARY = chart_of(
    "summary",
    "Over all tasks",
    "dots",
    "Interquartile mean over runs and tasks of the error relative to what a trivial prediction makes (1, dashed), with "
    "95 % intervals of a bootstrap stratified over tasks. Left is better. Dynamics errors are of each model's own "
    "latent: between representations they compare models in different units.",
    "model",
    "error",
)


def by_pvr(episodes: str) -> dict[str, Any]:
    """Of errors on ``held-out`` or other episodes."""
    return chart_of(
        "errors",
        "Error by representation",
        "dots",
        f"Accumulated over the horizon, open loop, on {episodes} episodes: mean over runs. {BARS}; ticks: the runs.",
        "model",
        "horizon",
    )


BY_HORIZON = chart_of(
    "horizons",
    "Error by horizon",
    "lines",
    "Mean over runs of the accumulated error, by the rows that were summed; an episode that ends before a horizon is "
    "summed to its end. Band: standard error over runs; of a single run, over its episodes.",
    "model",
    "error",
)
MAPS = chart_of(
    "maps",
    "Latent maps",
    "map",
    "Held-out rows by their latents in the run of the first seed, coloured by the reward received there; separation is "
    "R² of the reward as the mean reward of a row's nearest neighbours in other episodes. Point at a row, or walk with "
    "the arrow keys, to see its frame.",
    "representation",
    "model",
)
OOD = chart_of(
    "ood",
    "In and out of distribution",
    "scatter",
    "Each representation's error on the look it was trained on, and on the same trajectories seen in a shifted look. "
    f"On the dashed line a shift costs nothing. Mean over runs. {BARS}. Hollow: without the chosen property.",
    "model",
    "horizon",
)
SEVERITY = chart_of(
    "severity",
    "Error by severity",
    "lines",
    "One factor changed at a time, on the same trajectories; 0 is the environment as it is. Mean over runs; band: "
    "standard error over runs; of a single run, over its episodes.",
    "model",
    "factor",
)
ENCODERS = chart_of(
    "encoders",
    "Map from the embedding to the model",
    "dots",
    f"The same representation read through different maps: mean over runs. {BARS}; ticks: the runs.",
    "model",
    "representation",
)
BLOCKS = chart_of(
    "blocks",
    "Transformer blocks kept",
    "dots",
    f"The same representation with fewer of its blocks: mean over runs. {BARS}; ticks: the runs.",
    "model",
    "representation",
)
RETURNS = chart_of(
    "returns",
    "Errors and returns",
    "scatter",
    "Mean error of a representation's models, and the return that agents got with it: several that were given are "
    "averaged. Without tasks in that file, errors are means over all tasks; with them, tasks are not mixed. Brackets "
    "are 95 % intervals, p is two-sided.",
    "model",
    "error",
)
STRIPS = chart_of(
    "strips",
    "Imagined rollouts",
    "strip",
    "One held-out episode, in the run of the first seed. A latent has no picture; shown is the training frame whose "
    "latent is nearest to it: to what was imagined without seeing any of these frames, and to what was believed once "
    "each was seen.",
    "representation",
)
COST = chart_of(
    "cost",
    "Cost of a representation",
    "dots",
    "Seconds that 1,000 frames take on one worker, bytes of a frame, and memory for weights and a batch meanwhile, as "
    "measured when a study embedded them (of what none did, bytes alone are known); means over tasks and looks.",
    "cost",
)
