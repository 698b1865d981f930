"""Counterfactual pairs: stored trajectories seen anew, with the same physics bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect, replay, replay_manifest
from pvrpipe.rollouts.environments import Restorable, make_environment
from pvrpipe.rollouts.replay import ReplayShard
from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError, SimulationError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .killing import run_killed

INLINE = Engine("inline")
SMALL = CollectConfig("dmc:reacher-easy", size=32, episodes=3, max_steps=6, policy="random,ou", seed=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Reacher puts its target into the model: a replay must put it there again."""
    folder = tmp_path_factory.mktemp("source") / "store"
    collect(SMALL, folder, INLINE)
    return Store.open(folder)


def pairs(first: Store, other: Store) -> list[tuple[dict, dict]]:
    return [(first.read_episode(e), other.read_episode(e)) for e in range(first.manifest.episodes)]


def test_a_replay_that_changes_nothing_gives_the_same_frames(source: Store, tmp_path: Path) -> None:
    """So a restored state is seen exactly as it was while it was played."""
    replay(source, tmp_path / "again", INLINE)
    for before, after in pairs(source, Store.open(tmp_path / "again")):
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_store_is_never_replayed_over_itself(source: Store) -> None:
    with pytest.raises(InvalidValueError, match="is the store to read"):
        replay(source, source.path, INLINE, overwrite=True)
    assert verify(source.path) == []


@pytest.mark.parametrize(
    "changes",
    [{"size": 48}, {"camera": 1}, {"variation": "ood"}, {"variation": "camera=0.5+sensor_noise=0.3"}],
)
def test_rows_correspond_one_to_one_and_the_physics_is_equal(
    source: Store, tmp_path: Path, changes: dict
) -> None:
    result = replay(source, tmp_path / "seen", INLINE, **changes)
    seen = Store.open(tmp_path / "seen")
    assert verify(seen.path) == []
    assert (result.rows, result.episodes) == (source.manifest.rows, source.manifest.episodes)
    assert seen.manifest.rollouts.replay_of == source.manifest.id
    for before, after in pairs(source, seen):
        for name in set(before) - {"frame"}:
            assert before[name].tobytes() == after[name].tobytes(), name
        assert before["frame"].shape != after["frame"].shape or not np.array_equal(
            before["frame"], after["frame"]
        )
    kept = ["episode", "rows", "episode_return", "seed", "policy", "split", "terminated"]
    assert seen.episodes.select(kept).equals(source.episodes.select(kept))


def test_the_pair_is_what_the_simulator_says(source: Store, tmp_path: Path) -> None:
    """Set to the stored physics by hand, another camera shows what the replayed store holds."""
    replay(source, tmp_path / "seen", INLINE, camera=1)
    rows = Store.open(tmp_path / "seen").read_episode(1)
    environment = make_environment(SMALL.environment, size=32, camera=1)
    environment.reset(source.episodes["seed"][1])
    assert isinstance(environment, Restorable)
    for t in (0, 3, 6):
        environment.restore(source.read_episode(1)["physics"][t], t)
        assert np.array_equal(environment.observe()["frame"], rows["frame"][t])
        assert np.array_equal(environment.observe()["state"], rows["state"][t])


def test_a_replay_does_not_grow_by_itself(source: Store, tmp_path: Path) -> None:
    """Its rows would no longer be those of what it shows."""
    replay(source, tmp_path / "seen", INLINE, camera=1)
    with pytest.raises(InvalidValueError, match="shows the episodes of another store"):
        collect(dataclasses.replace(SMALL, camera=1, episodes=9), tmp_path / "seen", INLINE, append=True)


def test_factors_are_columns_to_choose_episodes_by(source: Store, tmp_path: Path) -> None:
    replay(source, tmp_path / "seen", INLINE, variation="none:1,fov=1:2")
    table = Store.open(tmp_path / "seen").episodes
    assert sorted(table["variation"]) == ["fov=1", "fov=1", "none"]
    assert sorted(np.abs(table["factor_fov"]).round(6)) == [0, 0.4, 0.4]
    assert sorted(table["distribution"]) == ["id", "ood", "ood"]


def test_an_environment_that_cannot_be_set_takes_its_actions_again(tmp_path: Path) -> None:
    assert not run_killed(takes_its_actions_again, tmp_path)


def takes_its_actions_again(tmp_path: Path) -> None:
    config = CollectConfig("miniworld:PickupObjects", size=32, episodes=2, max_steps=12, policy="random")
    collect(config, tmp_path / "source", INLINE)
    source = Store.open(tmp_path / "source")
    assert source.manifest.column("physics") is None
    replay(source, tmp_path / "again", INLINE)
    replay(source, tmp_path / "seen", INLINE, variation="fov=1")
    for before, after in pairs(source, Store.open(tmp_path / "again")):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    for before, after in pairs(source, Store.open(tmp_path / "seen")):
        assert all(np.array_equal(before[name], after[name]) == (name != "frame") for name in before)
    with pytest.raises(InvalidValueError, match="cannot vary size"):
        replay(source, tmp_path / "sizes", INLINE, variation="size=1")
    assert not (tmp_path / "sizes").exists()


@pytest.mark.parametrize(
    ("environment", "sensor"), [("dmc:finger-spin", "touch[1]"), ("dmc:hopper-stand", "touch[0]")]
)
def test_what_is_measured_on_the_way_to_a_state_is_found_again(
    environment: str, sensor: str, tmp_path: Path
) -> None:
    """Touch and acceleration are those of the step that led to a state, not of the state."""
    small = CollectConfig(environment, size=32, episodes=2, max_steps=40, policy="ou")
    collect(small, tmp_path / "source", INLINE)
    source = Store.open(tmp_path / "source")
    at = source.manifest.rollouts.state_names.index(sensor)
    assert any(source.read_episode(e)["state"][:, at].any() for e in range(2))
    replay(source, tmp_path / "again", INLINE)
    for before, after in pairs(source, Store.open(tmp_path / "again")):
        assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("environment", ["metaworld:push", "dmc:finger-turn_easy"])
def test_a_replay_can_be_replayed_though_where_things_lie_depends_on_sizes(
    environment: str, tmp_path: Path
) -> None:
    small = CollectConfig(environment, size=32, episodes=2, max_steps=20, policy="random", variation="ood")
    collect(small, tmp_path / "source", INLINE)
    replay(Store.open(tmp_path / "source"), tmp_path / "once", INLINE, variation="camera=0.5")
    replay(Store.open(tmp_path / "once"), tmp_path / "twice", INLINE, variation="fov=0.5")
    replay(Store.open(tmp_path / "source"), tmp_path / "directly", INLINE, variation="fov=0.5")
    for twice, directly in pairs(Store.open(tmp_path / "twice"), Store.open(tmp_path / "directly")):
        assert all(np.array_equal(twice[name], directly[name]) for name in twice)
    sizes = (Store.open(tmp_path / name).episodes[column] for name, column in (
        ("source", "factor_size"), ("twice", "factor_played_size"),
    ))  # fmt: skip
    assert np.array_equal(*map(np.array, sizes))


def test_a_replay_that_hangs_is_an_error_not_a_loop(source: Store, tmp_path: Path) -> None:
    """No other seed can take the place of a stored trajectory."""
    draft = replay_manifest(source, None, 1, "none")
    lost = {(0, 0): "it did not come to an end in time"}
    with pytest.raises(SimulationError, match=f"episode 0 cannot be seen anew: {lost[0, 0]}; give more --ep"):
        list(ReplayShard(tmp_path, draft, source)(draft.plan[0], lost))


def test_trajectories_that_do_not_come_out_again_are_refused(
    source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose seeds are not those of its physics: its target would lie elsewhere."""
    records = type(source).records

    def forged(self: Store, shard: int) -> tuple:
        return tuple(r.model_copy(update={"seed": r.seed + 1}) for r in records(self, shard))

    monkeypatch.setattr(Store, "records", forged)
    with pytest.raises(
        SimulationError, match="does not repeat episode 0: at step 0 its state 'to_target"
    ) as caught:
        replay(source, tmp_path / "seen", INLINE, camera=1)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_seen_is_refused_before_anything_is_written(source: Store, tmp_path: Path) -> None:
    for changes, kind in (
        ({"camera": "nowhere"}, UnknownNameError),
        ({"variation": "nothing=1"}, UnknownNameError),
        ({"size": 3}, InvalidValueError),
    ):
        with pytest.raises(kind):
            replay(source, tmp_path / "seen", INLINE, **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "seen").exists()
    with pytest.raises(NotAStoreError):
        Store.open(tmp_path / "seen", kind="rollouts")
