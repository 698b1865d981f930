"""One episode and one shard of episodes: the work itself, which knows nothing of who schedules it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pvrpipe.rollouts.environments import Environment, make_environment
from pvrpipe.rollouts.policies import Member, parse_policy
from pvrpipe.rollouts.tape import Tape
from pvrpipe.rollouts.variation import AS_IT_IS, PLAIN, STREAM, Look, Variation, columns_of, parse_variation
from pvrpipe.schemas.errors import PvrpipeError, SimulationError, one_line
from pvrpipe.schemas.manifest import Column, Failed, Manifest, ShardCommit, ShardPlan
from pvrpipe.schemas.records import Episode, EpisodeInfo, Step
from pvrpipe.schemas.specifications import RolloutSpecification
from pvrpipe.store.building import ShardWriter
from pvrpipe.store.columns import column, with_bounds

Lost = Mapping[tuple[int, int], str]
"""Tries that cannot be made where they would take the process with them: (episode, attempt) → why."""

NOTHING_LOST: Lost = MappingProxyType({})
TRIES = 2  # of a seed, before the episode is recorded as failed and another seed takes its place
LONGEST_REASON = 300


class Trying(NamedTuple):
    """Said by a worker before each try of an episode, so that whoever waits can tell work from a hang."""

    shard: int
    episode: int
    attempt: int  # counts tries, over all seeds
    rows: int  # of the shard that are done


class Played(NamedTuple):
    """Said by a worker once an episode, or a stretch of it, is there: what it does next is writing, however long."""

    shard: int
    rows: int  # of the shard that are done


Event = Trying | Played | ShardCommit


class EpisodeFailedError(Exception):
    """The environment failed in an episode; says where and how."""


def episode_seed(root: int, episode: int, substitute: int = 0) -> int:
    """Seed of an episode, 53 bits so that JSON holds it exactly; from the root seed and its number alone.

    ``substitute`` counts the seeds that take the place of those that failed.
    """
    key = (episode, substitute) if substitute else (episode,)
    state = np.random.SeedSequence(root, spawn_key=key).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(11))


def episode_columns(environment: Environment) -> tuple[Column, ...]:
    """The columns of a rollout store; ``state``, ``physics`` and ``success`` where the environment has them."""
    columns = [
        column("frame", "uint8", (environment.size, environment.size, 3)),
        column("action", "float32", environment.action_low.shape),
        column("reward", "float32", ()),
    ]
    if environment.state_names:
        columns.append(column("state", "float32", (len(environment.state_names),)))
    if environment.physics_width:
        columns.append(column("physics", "float64", (environment.physics_width,)))
    if environment.has_success:
        columns.append(column("success", "bool", ()))
    return with_bounds(columns)


def run_episode(
    environment: Environment,
    member: Member,
    episode: int,
    seed: int,
    *,
    look: Look = PLAIN,
    variation: Variation = AS_IT_IS,
    factors: Collection[str] = (),
    folder: Path | None = None,
) -> Episode:
    """Play one episode; the same environment, member, look and seed give the same arrays, bit for bit.

    Args:
        environment: that is played in.
        member: who plays.
        episode: its number in the store.
        seed: decides all that is drawn.
        look: of the episode.
        variation: that the look was drawn from.
        factors: whose values are recorded, without their ``factor_``.
        folder: where long episodes are put down while they are played; default: this one.

    Raises:
        EpisodeFailedError: the environment raised, or returned something that is not finite.
        InvalidValueError: the policy returned no action of this environment.
    """
    tape = Tape(_played(environment), folder or Path())
    actions = member.actions(environment, np.random.default_rng(seed), lambda: step)
    row = 0
    try:
        step = environment.reset(seed, look)
        _check(step, row, environment)
        tape.arrived(step)
        while not step["is_last"]:
            action = next(actions)
            tape.acted(action)
            row, step = row + 1, environment.step(action)
            _check(step, row, environment)
            tape.arrived(step)
    except (PvrpipeError, EpisodeFailedError):
        raise
    except (Exception, SystemExit) as error:  # simulators raise what they like; some think they are programs
        raise EpisodeFailedError(f"{type(error).__name__} at step {row}: {one_line(error)}") from error
    arrays = tape.arrays()
    values = {f"factor_{name}": look[name] for name in factors}
    if environment.has_success:
        values["success"] = float(arrays["success"].any())
    info = EpisodeInfo(
        episode=episode,
        length=row,
        episode_return=float(arrays["reward"].sum(dtype=np.float64)),
        seed=seed,
        policy=member.label,
        variation=variation.label,
        terminated=step["is_terminal"],
        distribution=variation.distribution,
        values=values,
    )
    return Episode(info, arrays)


def _played(environment: Environment) -> tuple[Column, ...]:
    """The columns that playing fills; the bounds follow from them."""
    bounds = {c.name for c in with_bounds(())}
    return tuple(c for c in episode_columns(environment) if c.name not in bounds)


def _check(step: Step, row: int, environment: Environment) -> None:
    """Refuse a row that no episode can have; environments of other packages are held to nothing else."""
    for name in ("reward", "state", "physics"):
        if not np.isfinite(step[name]).all():
            raise EpisodeFailedError(f"{name} is not finite at step {row}")
    frame, wanted = np.asarray(step["frame"]), [environment.size, environment.size, 3]
    if frame.dtype != np.uint8 or [*frame.shape] != wanted:
        raise EpisodeFailedError(
            f"the frame at step {row} is {frame.dtype} {[*frame.shape]}, not uint8 {wanted}"
        )
    if row >= environment.max_steps and not step["is_last"]:
        raise EpisodeFailedError(f"step {row} is not its last, though it has at most {environment.max_steps}")


def build_environment(specification: RolloutSpecification) -> Environment:
    """The environment of a store, on a machine that must be like the one where it was begun.

    Raises:
        SimulationError: it renders otherwise, or has other versions.
    """
    environment = make_environment(
        specification.environment,
        size=specification.size,
        camera=specification.camera,
        action_repeat=specification.action_repeat,
        max_steps=specification.max_steps,
    )
    found = {"renderer": environment.renderer(), **environment.versions}
    wanted = {"renderer": specification.renderer, **specification.versions}
    for what, value in found.items():
        if value != wanted[what]:
            raise SimulationError(
                f"this worker has {what} '{value}', the store was begun with '{wanted[what]}'; "
                "run all workers on machines of one kind"
            )
    return environment


class CollectShard:
    """Collects shards of one store; holds one environment, which lives as long as this does.

    Args:
        folder: of the store.
        manifest: of the store.
        max_failures: episodes that may fail before that is an error.
    """

    def __init__(self, folder: Path, manifest: Manifest, max_failures: int = 0) -> None:
        part = manifest.all_parts[-1]  # episodes are only ever collected for the part that came last
        made = part.specification
        assert isinstance(made, RolloutSpecification)
        self._folder, self._manifest, self._made, self._max_failures = folder, manifest, made, max_failures
        self._before = part.first_episode
        self._members = parse_policy(made.policy).assign(made.episodes, [made.seed])
        looks = parse_variation(made.variation)
        self._looks = looks.assign(made.episodes, [made.seed, STREAM])
        self._environment = build_environment(made)
        self._factors = columns_of(looks, self._environment.factors)

    def __call__(self, plan: ShardPlan, lost: Lost = NOTHING_LOST) -> Iterator[Event]:
        """Collect the planned episodes and commit their shard, saying before each try which it is.

        Args:
            plan: of the shard.
            lost: tries that took their worker with them; they are not made again.

        Raises:
            SimulationError: more episodes failed than may.
        """
        failed: list[Failed] = []
        rows = 0
        with ShardWriter(self._folder, self._manifest, plan) as writer:
            for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                attempt, episode = 0, None
                while episode is None:
                    seed = episode_seed(self._made.seed, number, attempt // TRIES)
                    yield Trying(plan.shard, number, attempt, rows)
                    reason = lost.get((number, attempt))
                    if reason is None:
                        episode, reason = self._try(number, seed)
                    attempt += 1
                    if episode is None and attempt % TRIES == 0:
                        failed.append(self._failed(number, seed, str(reason)))
                        self._refuse_too_many(failed)
                rows += len(episode)
                yield Played(plan.shard, rows)
                writer.write_episode(episode)
            yield writer.commit(failed)

    def _try(self, number: int, seed: int) -> tuple[Episode | None, str | None]:
        """Play an episode: what came of it, or why nothing did. The environment is built anew after a failure."""
        look = self._looks[number - self._before]
        try:
            return run_episode(
                self._environment,
                self._members[number - self._before],
                number,
                seed,
                look=look.draw(seed, self._environment.factors),
                variation=look,
                factors=self._factors,
                folder=self._folder,
            ), None
        except EpisodeFailedError as error:
            with suppress(Exception):  # it is broken
                self.close()
            self._environment = build_environment(self._made)
            return None, one_line(error)

    def _failed(self, number: int, seed: int, reason: str) -> Failed:
        policy = self._members[number - self._before].label
        return Failed(episode=number, seed=seed, policy=policy, reason=reason[:LONGEST_REASON])

    def _refuse_too_many(self, failed: list[Failed]) -> None:
        if len(failed) > self._max_failures:
            raise too_many(self._made.environment, failed, self._max_failures)

    def close(self) -> None:
        """Free the renderer."""
        self._environment.close()


def too_many(environment: str, failed: Collection[Failed], allowed: int) -> SimulationError:
    """Says which episode failed last, and what can be done."""
    *_, last = failed
    return SimulationError(
        f"{environment} failed in {len(failed)} episodes, --max-failures are {allowed}; the last: episode "
        f"{last.episode} (seed {last.seed}, policy {last.policy}): {last.reason}; try another --seed or --policy, "
        "or allow more"
    )
