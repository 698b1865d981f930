"""Returns of policies and presets by task; prints a table as Markdown, and with ``--json FILE`` each episode.

    python benchmarks/returns.py [--tasks dmc:pendulum-swingup,...] [--policies random,medium,expert]
                                 [--seeds 100,101,102,103] [--steps N]

Nothing is drawn: frames are blank, which changes no physics, no reward and no action, and saves most of
the time.
A mixture plays each seed with one of its members, shared out as `collect` shares them. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.rollouts.environments import make_environment
from pvrpipe.rollouts.episodes import run_episode
from pvrpipe.rollouts.policies import check_playable, parse_policy
from pvrpipe.rollouts.presets import expanded

#: Best published returns on pixels (DreamerV3, DrQ-v2, TD-MPC2; reference worldmodels.md §2.1 and §3).
PUBLISHED = {
    "dmc:cartpole-swingup": 862,
    "dmc:cheetah-run": 830,
    "dmc:ball_in_cup-catch": 972,
    "dmc:finger-spin": 990,
    "dmc:walker-walk": 965,
    "dmc:pendulum-swingup": 841,
}


def make_blind(task: str, steps: int | None) -> Any:
    """An environment that draws nothing."""
    environment: Any = make_environment(task, size=16, max_steps=steps)
    blank = np.zeros((16, 16, 3), np.uint8)
    if hasattr(environment, "_render"):
        environment._render = lambda: blank
    else:
        environment._drawing.frame = lambda *_: blank
    return environment


def play(task: str, policy: str, seeds: list[int], steps: int | None) -> list[dict[str, Any]]:
    """One episode for each seed."""
    environment = make_blind(task, steps)
    mixture = parse_policy(expanded(policy, task))
    check_playable(mixture, environment)
    played = []
    for member, seed in zip(mixture.assign(len(seeds), [0]), seeds, strict=True):
        began = time.process_time()
        info = run_episode(environment, member, 0, seed).info
        played.append(
            {
                "task": task,
                "policy": policy,
                "member": member.label,
                "seed": seed,
                "return": info.episode_return,
                "success": info.values.get("success"),
                "seconds": time.process_time() - began,
            }
        )
    return played


def row(played: list[dict[str, Any]]) -> str:
    """The line of a task and a policy."""
    task, policy = played[0]["task"], played[0]["policy"]
    returns = [episode["return"] for episode in played]
    share = f"{statistics.mean(returns) / PUBLISHED[task]:.0%}" if task in PUBLISHED else ""
    solved = [episode["success"] for episode in played if episode["success"] is not None]
    success = f"{statistics.mean(solved):.0%}" if solved else ""
    seconds = statistics.mean(episode["seconds"] for episode in played)
    spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
    return (
        f"| {task} | {policy} | {len(played)} | {statistics.mean(returns):.0f} ± {spread:.0f} "
        f"| {share} | {success} | {seconds:.1f} |"
    )


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", default=",".join(PUBLISHED))
    parser.add_argument("--policies", default="random,medium,expert")
    parser.add_argument("--seeds", default="100,101,102,103")
    parser.add_argument("--steps", type=int, help="transitions of an episode; default: the task's own")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(
        "| task | policy | episodes | return, mean ± sd | of published | success | seconds |\n"
        + "|---" * 7
        + "|"
    )
    everything = []
    for task in arguments.tasks.split(","):
        for policy in arguments.policies.split(","):
            played = play(task, policy, seeds, arguments.steps)
            print(row(played), flush=True)
            everything += played
            if arguments.json:
                arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
