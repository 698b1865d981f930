"""One episode and one shard of episodes: the work itself, which knows nothing of who schedules it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment, make_environment
from pvrpipe.rollouts.policies import Member, parse_policy
from pvrpipe.schemas.errors import PvrpipeError, SimulationError, one_line
from pvrpipe.schemas.manifest import Column, Manifest, RolloutSpecification, ShardCommit, ShardPlan
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import ShardWriter
from pvrpipe.store.columns import column, with_bounds


def episode_seed(root: int, episode: int) -> int:
    """Seed of an episode, 53 bits so that JSON holds it exactly; from the root seed and its number alone."""
    state = np.random.SeedSequence(root, spawn_key=(episode,)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(11))


def episode_columns(environment: Environment) -> tuple[Column, ...]:
    """The columns of a rollout store."""
    return with_bounds(
        (
            column("frame", "uint8", (environment.size, environment.size, 3)),
            column("action", "float32", environment.action_low.shape),
            column("reward", "float32", ()),
            column("state", "float32", (len(environment.state_names),)),
            column("physics", "float64", (environment.physics_width,)),
        )
    )


def run_episode(environment: Environment, member: Member, episode: int, seed: int) -> Episode:
    """Play one episode; the same environment, member and seed give the same arrays, bit for bit.

    Raises:
        SimulationError: the environment failed; the message names the episode and its seed.
    """
    try:
        length, terminated, arrays = _play(environment, member, seed)
    except PvrpipeError:
        raise
    except Exception as error:  # simulators raise types of their own; all the user can change is named here
        raise SimulationError(
            f"{environment.name} failed in episode {episode} (seed {seed}, policy {member.label}): "
            f"{one_line(error)}; try another --seed or --policy"
        ) from error
    info = EpisodeInfo(
        episode=episode,
        length=length,
        episode_return=float(arrays["reward"].sum(dtype=np.float64)),
        seed=seed,
        policy=member.label,
        terminated=terminated,
    )
    return Episode(info, arrays)


def _play(
    environment: Environment, member: Member, seed: int
) -> tuple[int, bool, dict[str, NDArray[np.generic]]]:
    """Length, whether the environment truly ended, and the arrays (L+1, ...) of an episode."""
    bounds = {c.name for c in with_bounds(())}
    arrays = {
        c.name: np.zeros((environment.max_steps + 1, *c.shape), c.dtype)
        for c in episode_columns(environment)
        if c.name not in bounds
    }
    actions = member.actions(environment, np.random.default_rng(seed))
    row, step = 0, environment.reset(seed)
    while True:
        for name in ("frame", "reward", "state", "physics"):
            arrays[name][row] = step[name]
        if step["is_last"]:
            return row, step["is_terminal"], {name: array[: row + 1] for name, array in arrays.items()}
        arrays["action"][row] = action = next(actions)
        row, step = row + 1, environment.step(action)


class CollectShard:
    """Collects shards of one store; holds one environment, which lives as long as this does."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        part = manifest.all_parts[-1]  # episodes are only ever collected for the part that came last
        specification = part.specification
        assert isinstance(specification, RolloutSpecification)
        self._folder, self._manifest, self._seed = folder, manifest, specification.seed
        self._before = part.first_episode
        self._members = parse_policy(specification.policy).assign(specification.episodes, specification.seed)
        self._environment = make_environment(
            specification.environment,
            size=specification.size,
            camera=specification.camera,
            action_repeat=specification.action_repeat,
            max_steps=specification.max_steps,
        )
        found = {"renderer": self._environment.renderer(), **self._environment.versions}
        wanted = {"renderer": specification.renderer, **specification.versions}
        for what, value in found.items():
            if value != wanted[what]:
                raise SimulationError(
                    f"this worker has {what} '{value}', the store was begun with '{wanted[what]}'; "
                    "run all workers on machines of one kind"
                )

    def __call__(self, plan: ShardPlan) -> ShardCommit:
        """Collect the planned episodes and commit their shard."""
        with ShardWriter(self._folder, self._manifest, plan) as writer:
            for episode in range(plan.first_episode, plan.first_episode + plan.episodes):
                seed = episode_seed(self._seed, episode)
                member = self._members[episode - self._before]
                writer.write_episode(run_episode(self._environment, member, episode, seed))
            return writer.commit()

    def close(self) -> None:
        """Free the renderer."""
        self._environment.close()
