"""``collect --replay``: stored trajectories seen again, under another camera, size, resolution or variation.

Physics, actions, rewards and states are those of the store that is replayed, row for row and bit for bit; only the
frames are drawn anew. Where the simulator can be set to a state, each row is; elsewhere the actions are taken
again, and every reward and state must come out as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Restorable
from pvrpipe.rollouts.episodes import NOTHING_LOST, Event, Lost, Played, Trying, build_environment
from pvrpipe.rollouts.variation import STREAM, Look, columns_of, parse_variation
from pvrpipe.schemas.errors import SimulationError
from pvrpipe.schemas.manifest import EpisodeRecord, Manifest, ShardPlan
from pvrpipe.store.building import ShardWriter
from pvrpipe.store.reading import Store

PLAYED_SIZE = "factor_played_size"  # column of a replay: the size that the physics had, whatever is seen
CHUNK = 64  # rows drawn before they are written

Rows = dict[str, NDArray[np.generic]]


class ReplayShard:
    """Draws the frames of shards anew; holds one environment, which lives as long as this does.

    Args:
        folder: of the new store.
        manifest: of the new store.
        source: the store that is replayed.
    """

    def __init__(self, folder: Path, manifest: Manifest, source: Store) -> None:
        made = manifest.rollouts
        self._folder, self._manifest, self._source, self._made = folder, manifest, source, made
        looks = parse_variation(made.variation)
        self._looks = looks.assign(made.episodes, [made.seed, STREAM])
        self._environment = build_environment(made)
        self._factors = columns_of(looks, self._environment.factors)

    def __call__(self, plan: ShardPlan, lost: Lost = NOTHING_LOST) -> Iterator[Event]:
        """Draw the planned episodes and commit their shard.

        Args:
            plan: of the shard.
            lost: episodes that took their worker with them, as (episode, 0).

        Raises:
            SimulationError: there is such a one, or one is not what is stored; no other can take its place.
        """
        numbers = range(plan.first_episode, plan.first_episode + plan.episodes)
        known = {record.episode: record for record in self._source.records(plan.shard)}
        looks = {n: self._looks[n].draw(known[n].seed, self._environment.factors) for n in numbers}
        records = [self._record(known[number], looks[number]) for number in numbers]
        rows = 0
        with ShardWriter(self._folder, self._manifest, plan, records) as writer:
            for number in numbers:
                if reason := lost.get((number, 0)):
                    raise SimulationError(
                        f"episode {number} cannot be seen anew: {reason}; give more --episode-timeout, or find out "
                        "with --engine inline"
                    )
                yield Trying(plan.shard, number, 0, rows)
                stored = self._source.read_episode(number, [c for c in self._source.columns if c != "frame"])
                for first, frames in self._frames(known[number], looks[number], stored):
                    held = slice(first, first + len(frames))
                    yield Played(plan.shard, rows + first)  # writing is no part of the episode's time
                    writer.write_rows({"frame": frames, **{name: a[held] for name, a in stored.items()}})
                    yield Trying(plan.shard, number, 0, rows + held.stop)
                rows += known[number].rows
                yield Played(plan.shard, rows)
            yield writer.commit()

    def close(self) -> None:
        """Free the renderer."""
        self._environment.close()

    def _record(self, known: EpisodeRecord, look: Look) -> EpisodeRecord:
        """What is known of an episode, in its new look."""
        variation = self._looks[known.episode]
        kept = {name: value for name, value in known.values.items() if not name.startswith("factor_")}
        if PLAYED_SIZE in known.values or "factor_size" in known.values:
            kept[PLAYED_SIZE] = _played_size(known)
        return known.model_copy(
            update={
                "variation": variation.label,
                "distribution": variation.distribution,
                "values": {**kept, **{f"factor_{name}": look[name] for name in self._factors}},
            }
        )

    def _frames(
        self, known: EpisodeRecord, look: Look, stored: Rows
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """First row and frames (n, H, W, 3) of one stretch after another.

        The episode begins with the sizes it was played with, on which it may depend where things lie.
        """
        environment, number = self._environment, known.episode
        played = _played_size(known)
        step = environment.reset(known.seed, look.sized(played))
        settable = environment if isinstance(environment, Restorable) and "physics" in stored else None
        comparable = settable is None or look["size"] == played  # touch and the like depend on sizes
        if settable:
            settable.redress(look)
        held = []
        for row in range(known.rows):
            if settable:
                settable.restore(stored["physics"][row], row)
                step = settable.observe()
            elif row:
                step = environment.step(stored["action"][row - 1])
                self._compare(number, row, "reward", np.float32(step["reward"]), stored["reward"][row])
            held.append(np.array(step["frame"]))  # some environments draw all into one array
            if "state" in stored and comparable:
                state = step["state"]
                if settable and row and not _close(state, stored["state"][row]).all():
                    # Touch and acceleration are measured on the way to a state: the step there is taken.
                    settable.restore(stored["physics"][row - 1], row - 1)
                    state = environment.step(stored["action"][row - 1])["state"]
                self._compare(number, row, "state", state, stored["state"][row])
            if len(held) == CHUNK or row == known.rows - 1:
                yield row + 1 - len(held), np.stack(held)
                held = []

    def _compare(self, number: int, row: int, name: str, found: Any, stored: Any) -> None:
        """Refuse to show what did not happen."""
        found, stored = np.atleast_1d(found), np.atleast_1d(stored)
        close = _close(found, stored)
        if close.all():
            return
        worst = int(np.argmin(close))
        what = f"state '{self._made.state_names[worst]}'" if name == "state" else name
        raise SimulationError(
            f"{self._made.environment} does not repeat episode {number}: at step {row} its {what} is "
            f"{found[worst]:g}, stored is {stored[worst]:g}; replay with the versions the store was made with "
            f"({self._source.path}/store.json)"
        )


def _played_size(known: EpisodeRecord) -> float:
    """What an episode was played with, also if it is known by a replay."""
    return known.values.get(PLAYED_SIZE, known.values.get("factor_size", 0.0))


def _close(found: Any, stored: Any) -> NDArray[np.bool_]:
    """Which numbers are equal, but for how machines round."""
    return np.isclose(found, stored, rtol=1e-4, atol=1e-5)
