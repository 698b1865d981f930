"""Collection of frames against Minari's DataCollector and stable-worldmodel; a table and one line of JSON.

    python benchmarks/collect_peers.py [--frames 204] [--repeats 3] [--size 128]

All on the same Gymnasium environment, HalfCheetah-v5, rendered offscreen by MuJoCo; random actions, one process each,
until the data set is on disk; one episode each, for the frames of stable-worldmodel's second one come out black here
(0.1 ms each). All take turns within each repeat, in random order. What counts is the share of the bare
loop (``env.step``, ``env.render``, nothing kept) that is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.rollouts.environments import choose_backend

choose_backend()

import gymnasium  # noqa: E402 (MuJoCo's backend is chosen first)


def bare(frames: int, size: int) -> None:
    """What any collector has to do."""
    env = gymnasium.make("HalfCheetah-v5", render_mode="rgb_array", width=size, height=size)
    env.reset(seed=0)
    env.render()
    for _ in range(frames - 1):
        env.step(env.action_space.sample())
        env.render()
    env.close()


def ours(frames: int, size: int) -> None:
    """pvrpipe, in this process."""
    name = f"gym:HalfCheetah-v5?width={size}&height={size}"
    config = CollectConfig(name, size=size, episodes=1, max_steps=frames - 1, policy="random")
    with tempfile.TemporaryDirectory() as folder:
        collect(config, Path(folder) / "store", Engine("inline"))


def minari(frames: int, size: int) -> None:
    """Minari's DataCollector with rendered observations, its data set written."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        from gymnasium.wrappers import AddRenderObservation, TimeLimit
        from minari import DataCollector

        env = gymnasium.make("HalfCheetah-v5", render_mode="rgb_array", width=size, height=size)
        collector = DataCollector(TimeLimit(AddRenderObservation(env, render_only=True), frames - 1))
        collector.reset(seed=0)
        done = False
        while not done:
            _, _, terminated, truncated, _ = collector.step(collector.action_space.sample())
            done = terminated or truncated
        collector.create_dataset("peer/cheetah-v0")
        collector.close()


def stable_worldmodel(frames: int, size: int) -> None:
    """stable-worldmodel's World.collect with its default format, Lance."""
    from stable_worldmodel import World
    from stable_worldmodel.policy import RandomPolicy

    with tempfile.TemporaryDirectory() as folder:
        world = World(
            "HalfCheetah-v5",
            num_envs=1,
            image_shape=(size, size),
            max_episode_steps=frames - 1,
            goal_conditioned=False,
            width=size,
            height=size,
        )
        world.set_policy(RandomPolicy())
        world.collect(Path(folder) / "peer.lance", episodes=1, seed=0, progress=False)
        world.close()


WAYS: dict[str, Callable[[int, int], None]] = {
    "bare loop": bare,
    "pvrpipe": ours,
    "Minari DataCollector": minari,
    "stable-worldmodel World": stable_worldmodel,
}


def measure(frames: int, repeats: int, size: int) -> dict[str, float]:
    """Frames per second, medians; and the shares of the bare loop."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for name, way in WAYS.items():  # once for caches
        try:
            way(frames, size)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}; `make bench-peers` installs it", file=sys.stderr)
            del rates[name]
    for turn in range(repeats):
        for name in random.Random(turn).sample(list(rates), len(rates)):
            began = time.perf_counter()
            WAYS[name](frames, size)
            rates[name].append(frames / (time.perf_counter() - began))
    found = {f"{name}, frames/s": statistics.median(values) for name, values in rates.items()}
    for name in list(rates)[1:]:
        found[f"{name} ÷ bare loop"] = found[f"{name}, frames/s"] / found["bare loop, frames/s"]
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=204)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    options = parser.parse_args()
    result = measure(options.frames, options.repeats, options.size)
    table = Table("what", "median", title=f"HalfCheetah-v5 at {options.size} px")
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}")
    Console(stderr=True).print(table)
    print(json.dumps({"benchmark": "collect_peers", "size": options.size, **result}))


if __name__ == "__main__":
    main()
