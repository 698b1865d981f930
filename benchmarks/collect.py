"""Collection against a bare step-and-render loop, in one run; prints a table and one line of JSON.

    python benchmarks/collect.py [--frames 366] [--repeats 3] [--size 256]

The bare loop is dm_control as its users write it: ``env.step`` twice, ``physics.render``, nothing kept.
DESIGN.md asks that collecting with n workers reaches 0.95 × n × that, start-up aside. All ways take turns
within each repeat, so that a machine that slows down slows all of them. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect, draft_manifest
from pvrpipe.rollouts.environments import choose_backend, make_environment
from pvrpipe.rollouts.episodes import run_episode
from pvrpipe.rollouts.planning import planned_actions
from pvrpipe.rollouts.policies import Member
from pvrpipe.store.building import PendingStore, ShardWriter

STEPS = 60  # transitions of an episode here; one episode is one shard
REPEAT = 2  # of each action


def bare_loop(frames: int, size: int) -> float:
    """Frames per second of dm_control alone, its start-up aside."""
    choose_backend()
    from dm_control import suite

    env = suite.load("pendulum", "swingup", task_kwargs={"random": 0})
    spec, random = env.action_spec(), np.random.default_rng(0)
    env.reset()
    env.physics.render(size, size, camera_id=0)
    began = time.perf_counter()
    for _ in range(frames):
        action = random.uniform(spec.minimum, spec.maximum)
        for _ in range(REPEAT):
            env.step(action)
        env.physics.render(size, size, camera_id=0)
    return frames / (time.perf_counter() - began)


def bare_rate(processes: int, frames: int, size: int) -> float:
    """The sum of the rates of bare loops that run side by side."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(bare_loop, [frames] * processes, [size] * processes))


def collect_rates(workers: int, frames: int, size: int) -> tuple[float, float]:
    """Frames per second and seconds of start-up of a collection by random actions."""
    episodes = workers * max(1, frames // (STEPS + 1))
    config = CollectConfig(
        size=size, action_repeat=REPEAT, episodes=episodes, max_steps=STEPS, policy="random"
    )
    with tempfile.TemporaryDirectory() as folder:
        result = collect(config, Path(folder) / "store", Engine(workers=workers))
    return result.frames_per_second, result.startup_seconds


def parts(size: int) -> dict[str, float]:
    """Milliseconds that each part of collecting takes per frame, measured by itself."""
    environment = make_environment(size=size, action_repeat=REPEAT, max_steps=STEPS)
    environment.reset(0)
    actions = planned_actions(environment, np.random.default_rng(0))
    action = np.zeros(1, np.float32)
    still = np.zeros((1, 1, 1), np.float32)
    episode = run_episode(environment, Member("random"), episode=0, seed=0)
    manifest = draft_manifest(CollectConfig(size=size, episodes=1, max_steps=STEPS))

    def write() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            PendingStore.begin(Path(folder), manifest) as pending,
            ShardWriter(pending.folder, manifest, manifest.plan[0]) as writer,
        ):
            writer.write_episode(episode)
            writer.commit()

    return {
        "step and render": milliseconds(lambda: environment.step(action), STEPS),
        "of which physics": milliseconds(lambda: environment.evaluate(still), STEPS),
        "planning, for mpc": milliseconds(lambda: next(actions), STEPS),
        "compress and write": milliseconds(write, 3) / len(episode),
    }


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Mean time of a call."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return 1e3 * (time.perf_counter() - began) / times


@contextmanager
def ray_session(workers: int) -> Iterator[float]:
    """Ray for the whole benchmark; the seconds it took to start."""
    began = time.perf_counter()
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    yield time.perf_counter() - began
    ray.shutdown()


def measure(frames: int, repeats: int, size: int, workers: tuple[int, ...]) -> dict[str, float]:
    """Medians over the repeats, and the ratios of DESIGN.md."""
    rates: dict[str, list[float]] = {}
    with ray_session(max(workers)) as ray_seconds:
        for _ in range(repeats):
            for n in workers:
                rates.setdefault(f"bare loop × {n} processes, frames/s", []).append(
                    bare_rate(n, frames, size)
                )
                rate, startup = collect_rates(n, frames, size)
                rates.setdefault(f"collect, {n} workers, frames/s", []).append(rate)
                rates.setdefault(f"start-up of {n} workers, s", []).append(startup)
            for part, value in parts(size).items():
                rates.setdefault(f"{part}, ms/frame", []).append(value)
    result = {name: statistics.median(values) for name, values in rates.items()}
    one = result[f"bare loop × {workers[0]} processes, frames/s"]
    for n in workers:
        rate = result[f"collect, {n} workers, frames/s"]
        result[f"collect ÷ ({n} × one bare loop)"] = rate / (n * one)
        result[f"collect ÷ {n} bare loops side by side"] = (
            rate / result[f"bare loop × {n} processes, frames/s"]
        )
    return {**result, "start-up of Ray, s": ray_seconds}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=366, help="per process and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    options = parser.parse_args()
    result = measure(options.frames, options.repeats, options.size, workers=(1, 2))
    table = Table("what", "median", title=f"collect, dmc:pendulum-swingup at {options.size} px")
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}")
    Console(stderr=True).print(table)
    print(json.dumps({"benchmark": "collect", "size": options.size, "repeats": options.repeats, **result}))


if __name__ == "__main__":
    main()
