"""Probing in batches against a loop over trajectories that computes the same numbers.

    python benchmarks/probe.py --episodes 200 --steps 500 --json probe.json

The loop is what a notebook does: for each trajectory, for each horizon, along the true actions and along shuffled ones,
it filters the trajectory, rolls the model out, predicts one step from each row, measures each row and adds the errors
up in Python. Both run on one thread and are given the same model, the same rows in memory, and the same training rows
to judge with. The loop is timed on a few trajectories, all of one length; its numbers of these must be the batched
ones: but for rounding for TD-MPC2 and DINO-WM, within their chance for DreamerV3, whose samples differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.probe_dynamics import judge
from pvrpipe.worldmodel.probe_episodes import TOGETHER, Padded, shuffled_actions
from pvrpipe.worldmodel.probe_reference import Reference
from pvrpipe.worldmodel.probe_reward import is_event
from pvrpipe.worldmodel.probe_state import fit_state_reader
from pvrpipe.worldmodel.probe_table import entries, table_of

HORIZONS = (33, 500)
CONTEXT, ACTION, STATE = 1, 6, 9
MODELS = (("dreamerv3", "1m"), ("tdmpc2", "1m"), ("dinowm", "1m"))
Numbers = dict[tuple[str, str, int], list[float]]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=200)
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
    print(
        f"{result['model']} {result['size']}: a trajectory takes the loop {result['loop_seconds']:.2f} s, batched "
        f"{1000 * result['batched_seconds']:.1f} ms, {result['ratio']:.1f} ×; totals differ by at most "
        f"{result['difference']:.2g} of themselves"
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
    starts = range(0, options.episodes, TOGETHER)

    def batched() -> pl.DataFrame:
        tables = [
            table_of(
                judge(model, part(episodes, start, start + TOGETHER), CONTEXT, reference, (0, start)),
                table[start : start + TOGETHER],
                HORIZONS,
            )
            for start in starts
        ]
        found = pl.concat(tables)
        entries(found, HORIZONS)
        return found

    batched_seconds, loop_seconds = [], []
    for _ in range(options.repeats):
        found, seconds = timed(batched)
        batched_seconds.append(seconds / options.episodes)
        looped, seconds = timed(lambda: loop(model, episodes, options.looped, reference))
        loop_seconds.append(seconds / options.looped)
    ratios = [slow / fast for slow, fast in zip(loop_seconds, batched_seconds, strict=True)]
    return {
        "model": name,
        "size": size,
        "loop_seconds": statistics.median(loop_seconds),
        "batched_seconds": statistics.median(batched_seconds),
        "ratio": statistics.median(ratios),
        "difference": difference(found, looped, options.looped),
    }


def loop(model: Any, episodes: Padded, count: int, reference: Reference) -> Numbers:
    """Every measure of some trajectories, one number after the other."""
    numbers: Numbers = {}
    for number in range(count):
        one = part(episodes, number, number + 1)
        start = number // TOGETHER * TOGETHER
        order = shuffled_of(episodes, start, number)
        for control, action in (("model", one.batch["action"]), ("shuffled_actions", order)):
            for horizon in HORIZONS:
                totals: dict[tuple[str, str], float] = {}
                filtered = model.filter(one.batch, chance(number))
                state = filtered.state(CONTEXT - 1)
                last = min(int(one.rows[0]), CONTEXT + horizon)
                rolled = model.predict(state, action[:, CONTEXT - 1 : last - 1], chance(number))
                for t in range(CONTEXT, last):
                    at = slice(t - CONTEXT, t - CONTEXT + 1)
                    stepped = model.predict(filtered.state(t - 1), action[:, t - 1 : t], chance(t))
                    for prediction, said in (
                        ("open_loop", [p[:, at] for p in rolled]),
                        ("one_step", list(stepped)),
                    ):
                        for measure_, value in one_row(model, said, filtered, one, t, reference).items():
                            key = prediction, measure_
                            totals[key] = totals.get(key, 0.0) + value
                for (prediction, measure_), total in totals.items():
                    numbers.setdefault((prediction, f"{control}/{measure_}", horizon), []).append(total)
    return numbers


def one_row(
    model: Any, said: list[Tensor], filtered: Any, one: Padded, t: int, reference: Reference
) -> dict[str, float]:
    """Every measure of one row's prediction."""
    latents, reward, features, logits = said
    row = slice(t, t + 1)
    true = one.batch["reward"][:, row]
    found = {
        f"dynamics_{name}": float(value)
        for name, value in model.divergences(latents, filtered.latents[:, row]).items()
    }
    found["reward_error"] = abs(float(reward) - float(true))
    found["reward_excess_nats"] = float(model.two_hot.loss(logits, true) - model.two_hot.floor(true))
    found["reward_predicted"], found["reward_received"] = float(reward), float(true)
    if reference.threshold is not None:
        expected, happened = (bool(is_event(r, reference.threshold)) for r in (reward, true))
        found |= {
            "events_predicted": expected,
            "events_received": happened,
            "events_hit": expected and happened,
        }
    if reference.state is not None:
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
        threshold=0.5,
        mean_latent=model.average(filtered.latents[:, 1:].flatten(0, 1)),
        mean_features=features.mean(0),
        state=fit_state_reader(features.double().numpy(), state, episode, torch.device("cpu")),
    )


def difference(found: pl.DataFrame, looped: Numbers, count: int) -> float:
    """The largest relative difference of any total, over the trajectories that the loop has done."""
    worst = 0.0
    for (prediction, name, horizon), theirs in looped.items():
        control, measure_ = name.split("/")
        ours = found.filter(prediction=prediction, control=control, measure=measure_, horizon=horizon).sort(
            "episode"
        )["accumulated"][:count]
        worst = max(worst, float(np.abs(ours.to_numpy() - theirs).max() / max(1e-6, np.abs(theirs).max())))
    return worst


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds it takes."""
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


if __name__ == "__main__":
    main()
