"""Probing in batches against a loop over trajectories that computes the same numbers.

    python benchmarks/probe.py --json probe.json

The loop is what a notebook does: it filters a trajectory, rolls the model out along the true actions and along
shuffled ones, and goes through its rows: predicts one step from each, measures what was said of it and every control,
and adds the numbers up in Python, once for each horizon (``separate``), or for all horizons in one pass (``joint``).
There are as many of these as ``pvrpipe probe`` has: 33, 500 and the powers of two. All run on one thread and are given
the same model, the same rows in memory, and the same training rows to judge with; seconds are of processor time. The
loops are timed on a few trajectories, all of one length; their totals must be the batched ones: but for rounding for
TD-MPC2 and DINO-WM, within their chance for DreamerV3, whose samples differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.probe_dynamics import Key, judge
from pvrpipe.worldmodel.probe_episodes import TOGETHER, Padded, shuffled_actions
from pvrpipe.worldmodel.probe_reference import Reference
from pvrpipe.worldmodel.probe_reward import Event
from pvrpipe.worldmodel.probe_state import fit_state_reader
from pvrpipe.worldmodel.probe_table import entries, horizons_of, table_of

ASKED = (33, 500)
CONTEXT, ACTION, STATE = 1, 6, 9
MODELS = (("dreamerv3", "1m"), ("tdmpc2", "1m"), ("dinowm", "1m"))
EVENT = 0.5  # beyond which a reward is one
Numbers = dict[tuple[str, str, str, int], list[float]]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=768, help="of the embeddings")
    parser.add_argument("--looped", type=int, default=1, help="trajectories that the loop is timed on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=[name for name, _ in MODELS], action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name, size in MODELS:
        if options.model is None or name in options.model:
            results.append(measure(name, size, options))
            show(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    """One line."""
    seconds, ratio = result["seconds"], result["ratio"]
    print(
        f"{result['model']} {result['size']}: a trajectory takes {1000 * seconds['batched']:.1f} ms batched; "
        f"a loop for each horizon {seconds['separate']:.2f} s, {ratio['separate']:.1f} ×; "
        f"one for all {seconds['joint']:.2f} s, {ratio['joint']:.1f} ×; "
        f"totals differ by at most {result['difference']:.2g} of themselves"
    )


@torch.no_grad()
def measure(name: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns; seconds of one trajectory, and by how much the numbers of some differ."""
    setting = Setting(vector(options.width), ACTION, STATE, options.steps, episodic=False)
    model = build_model(name, size, setting, seed=0).eval()
    episodes = trajectories(options.episodes, options.steps, options.width)
    reference = judged_with(model, part(episodes, 0, 8))
    table = pl.DataFrame(
        {
            "episode": range(options.episodes),
            **dict.fromkeys(("split", "distribution", "variation", "policy"), "val"),
            "episode_return": 0.0,
        }
    )
    starts, horizons = range(0, options.episodes, TOGETHER), horizons_of(ASKED, options.steps)

    def batched() -> pl.DataFrame:
        tables = [
            table_of(
                judge(model, part(episodes, start, start + TOGETHER), CONTEXT, reference, (0, start)),
                table[start : start + TOGETHER],
                horizons,
            )
            for start in starts
        ]
        found = pl.concat(tables)
        entries(found, ASKED)
        return found

    def joint() -> Numbers:
        return loop(model, episodes, options.looped, reference, horizons)

    def separate() -> list[Numbers]:
        return [loop(model, episodes, options.looped, reference, [horizon]) for horizon in horizons]

    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for way, count in ((batched, options.episodes), (joint, options.looped), (separate, options.looped)):
            seconds.setdefault(way.__name__, []).append(timed(way) / count)
    each = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {
        name: statistics.median(
            slow / fast for slow, fast in zip(seconds[name], seconds["batched"], strict=True)
        )
        for name in ("joint", "separate")
    }
    worst = difference(batched(), joint(), options.looped)
    return {"model": name, "size": size, "seconds": each, "ratio": ratios, "difference": worst}


def loop(model: Any, episodes: Padded, count: int, reference: Reference, horizons: Sequence[int]) -> Numbers:
    """Every measure of some trajectories, one number after the other."""
    numbers: Numbers = {}
    for number in range(count):
        one, random = part(episodes, number, number + 1), chance(number)
        shuffled = shuffled_of(episodes, number // TOGETHER * TOGETHER, number)
        filtered = model.filter(one.batch, random)
        totals: dict[Key, float] = {}
        for control, action in (("model", one.batch["action"]), ("shuffled_actions", shuffled)):
            end = min(int(one.rows[0]), CONTEXT + max(horizons))
            rolled = model.predict(filtered.state(CONTEXT - 1), action[:, CONTEXT - 1 : end - 1], random)
            for t in range(CONTEXT, end):
                at = slice(t - CONTEXT, t - CONTEXT + 1)
                stepped = model.predict(filtered.state(t - 1), action[:, t - 1 : t], random)
                rows = {("open_loop", control): [p[:, at] for p in rolled], ("one_step", control): [*stepped]}
                if control == "model":
                    rows |= still(filtered, t, reference)
                for (prediction, name), said in rows.items():
                    for measure_, value in one_row(model, said, filtered, one, t, reference).items():
                        key = prediction, name, measure_
                        totals[key] = totals.get(key, 0.0) + value
                if t - CONTEXT + 1 in horizons:
                    for key, total in totals.items():
                        if (key[1] == "shuffled_actions") == (control == "shuffled_actions"):
                            numbers.setdefault((*key, t - CONTEXT + 1), []).append(total)
    return numbers


def still(filtered: Any, t: int, reference: Reference) -> dict[tuple[str, str], list[Tensor | None]]:
    """The controls that need no model: latents and features of earlier rows, of the mean, of the row itself."""
    row, latents, features = slice(t, t + 1), filtered.latents, filtered.features
    held = {"open_loop": slice(CONTEXT - 1, CONTEXT), "one_step": slice(t - 1, t)}
    rows: dict[tuple[str, str], list[Tensor | None]] = {}
    usual = torch.tensor([[reference.usual_reward]])
    mean = [
        reference.mean_latent.expand_as(latents[:, row]),
        None,
        reference.mean_features.expand(1, 1, -1),
        None,
    ]
    for prediction, before in held.items():
        rows[prediction, "no_change"] = [latents[:, before], usual, features[:, before], None]
        rows[prediction, "mean"] = mean
        rows[prediction, "filtered"] = [None, None, features[:, row], None]
    return rows


def one_row(
    model: Any, said: Sequence[Tensor | None], filtered: Any, one: Padded, t: int, reference: Reference
) -> dict[str, float]:
    """Every measure of one row's prediction, of what is said of it."""
    latents, reward, features, logits = said
    row = slice(t, t + 1)
    true, found = one.batch["reward"][:, row], dict[str, float]()
    if latents is not None:
        for name, value in model.divergences(latents, filtered.latents[:, row]).items():
            found[f"dynamics_{name}"] = float(value)
    if reward is not None:
        found["reward_error"] = abs(float(reward) - float(true))
    if logits is not None and reward is not None:
        found["reward_excess_nats"] = float(model.two_hot.loss(logits, true) - model.two_hot.floor(true))
        found["reward_predicted"], found["reward_received"] = float(reward), float(true)
        expected, happened = float(reward) > EVENT, float(true) > EVENT
        found |= {
            "events_predicted": expected,
            "events_received": happened,
            "events_hit": expected and happened,
        }
    if features is not None and reference.state is not None:
        found["state_error"] = float(reference.state.error(features, one.batch["state"][:, row]))
    return found


def trajectories(count: int, steps: int, width: int) -> Padded:
    """Rows of noise, as a store would give them; a tenth of them rewarded."""
    random = np.random.default_rng(0)
    shape = (count, steps + 1)
    arrays = {
        "observation": random.normal(size=(*shape, width)),
        "action": random.uniform(-1, 1, (*shape, ACTION)),
        "reward": random.uniform(size=shape) < 0.1,
        "state": random.normal(size=(*shape, STATE)),
    }
    batch = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    return Padded(batch, np.full(count, steps + 1))


def part(episodes: Padded, first: int, end: int) -> Padded:
    """Some of the trajectories."""
    return Padded({name: rows[first:end] for name, rows in episodes.batch.items()}, episodes.rows[first:end])


def shuffled_of(episodes: Padded, start: int, number: int) -> Tensor:
    """The shuffled actions that the batched probe draws for one trajectory, (1, T, A)."""
    batch = part(episodes, start, start + TOGETHER)
    drawn = shuffled_actions(batch.batch["action"], batch.rows, CONTEXT, np.random.default_rng((0, start, 1)))
    return drawn[number - start : number - start + 1]


def judged_with(model: Any, train: Padded) -> Reference:
    """What to judge with, fitted on a few trajectories."""
    filtered = model.filter(train.batch, chance(0))
    features = filtered.features[:, 1:].flatten(0, 1)
    episode = np.repeat(np.arange(len(train.rows)), features.shape[0] // len(train.rows))
    state = train.batch["state"][:, 1:].flatten(0, 1).double().numpy()
    return Reference(
        usual_reward=0.1,
        event=Event(EVENT, below=False),
        mean_latent=model.average(filtered.latents[:, 1:].flatten(0, 1)),
        mean_features=features.mean(0),
        state=fit_state_reader(features.double().numpy(), state, episode, torch.device("cpu")),
    )


def difference(found: pl.DataFrame, looped: Numbers, count: int) -> float:
    """The largest relative difference of any total, over the trajectories that the loop has done."""
    worst = 0.0
    for (prediction, control, measure_, horizon), theirs in looped.items():
        ours = found.filter(prediction=prediction, control=control, measure=measure_, horizon=horizon).sort(
            "episode"
        )["accumulated"][:count]
        worst = max(worst, float(np.abs(ours.to_numpy() - theirs).max() / max(1e-6, np.abs(theirs).max())))
    return worst


def timed(work: Callable[[], Any]) -> float:
    """Seconds of processor time that it takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
