"""Every family of environments, collected for real: two short episodes, plain and varied, seen again, verified."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect, draft_manifest, replay
from pvrpipe.rollouts.environments import (
    Environment,
    Restorable,
    choose_backend,
    list_environments,
    make_environment,
    missing_families,
)
from pvrpipe.rollouts.variation import Look
from pvrpipe.schemas.errors import InvalidValueError, MissingExtraError, SimulationError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .killing import run_killed

INLINE = Engine("inline")
#: Environment, policy, a variation it can do, and the width of its actions.
FAMILIES = [
    ("dmc:walker-walk", "mixed", "id", 6),
    ("metaworld:push", "mixed", "ood", 4),
    ("metaworld:drawer-open", "scripted", "camera=0.5", 4),
    ("miniworld:PickupObjects", "random,pink", "id", 5),
    ("ale:Pong?noop=5&sticky=0", "random~0.5", "sensor_noise=0.5", 6),
    ("gym:HalfCheetah-v5", "ou", "sensor_noise=0.2", 6),
]
BASE = ("frame", "action", "reward", "episode", "step", "is_first", "is_last", "is_terminal")


@pytest.mark.parametrize(("name", "policy", "variation", "width"), FAMILIES)
def test_each_family_is_collected_varied_and_replayed(
    tmp_path: Path, name: str, policy: str, variation: str, width: int
) -> None:
    """Each in a process of its own, as in collection: OpenGL contexts of two libraries get into each other's way."""
    assert not run_killed(collected_varied_and_replayed, tmp_path, name, policy, variation, width)


def collected_varied_and_replayed(folder: Path, name: str, policy: str, variation: str, width: int) -> None:
    config = CollectConfig(name, size=48, episodes=2, max_steps=5, policy=policy, variation=variation, seed=1)
    collect(config, folder / "varied", INLINE)
    store = Store.open(folder / "varied")
    assert verify(store.path) == []
    assert set(store.columns) - {"state", "physics", "success"} == set(BASE)
    rows = store.read_episode(1)
    assert rows["frame"].shape == (6, 48, 48, 3)
    assert rows["frame"].std() > 5
    assert rows["action"].shape == (6, width)
    assert np.abs(rows["action"][:-1]).sum(axis=1).all()
    assert any(column.startswith("factor_") for column in store.episodes.columns)
    replay(store, folder / "plain", INLINE)
    plain = Store.open(folder / "plain")
    for name_, array in plain.read_episode(1).items():
        assert np.array_equal(array, rows[name_]) == (name_ != "frame")


# The last two have their goal marked where the model does not: it moves when a step computes what follows.
@pytest.mark.parametrize(
    "name",
    [f"metaworld:{task}" for task in ("push", "assembly", "soccer", "disassemble", "pick-out-of-hole")],
)
def test_meta_world_repeats_an_episode_and_goes_back_to_any_row(name: str) -> None:
    played, fresh = make_environment(name, size=32), make_environment(name, size=32)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 4)).astype(np.float32)
    played.reset(7)
    played.step(actions[0])
    rows = [played.reset(5), *(played.step(action) for action in actions)]
    again = [fresh.reset(5), *(fresh.step(action) for action in actions)]
    for a, b in zip(rows, again, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)  # type: ignore[literal-required]
    assert isinstance(fresh, Restorable)
    fresh.restore(rows[3]["physics"], 3)
    assert np.array_equal(fresh.observe()["frame"], rows[3]["frame"])
    onward = [fresh.step(action) for action in actions[3:]]
    for a, b in zip(rows[4:], onward, strict=True):
        assert np.array_equal(a["physics"], b["physics"])
        assert np.array_equal(a["frame"], b["frame"])


def test_meta_worlds_scripts_solve_its_tasks_and_success_is_recorded(tmp_path: Path) -> None:
    config = CollectConfig("metaworld:drawer-open", size=16, episodes=1, max_steps=100, policy="expert")
    collect(config, tmp_path / "store", INLINE)
    store = Store.open(tmp_path / "store")
    success = store.read_episode(0)["success"]
    assert success.any()
    assert not success[0]
    assert store.episodes["success"].to_list() == [1.0]


def test_all_fifty_tasks_and_the_names_of_the_literature() -> None:
    assert len(list_environments("metaworld")) == 50
    assert list_environments("metaworld")[:2] == ("metaworld:push", "metaworld:drawer-open")
    assert make_environment("metaworld:push-v2", size=16).name == "metaworld:push"
    assert list_environments("miniworld")[0] == "miniworld:PickupObjects"
    assert len(list_environments("ale")) == 104


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list_environments("metaworld"), *list_environments("miniworld")])
def test_every_task_runs(name: str) -> None:
    assert not run_killed(runs, name)


def runs(name: str) -> None:
    choose_backend()
    environment = make_environment(name, size=32)
    first = environment.reset(3)
    again = make_environment(name, size=32).reset(3)
    assert np.array_equal(first["frame"], again["frame"])
    assert first["frame"].std() > 5
    environment.step(environment.action_high)


def test_discrete_actions_are_one_hot_and_reach_the_environment(tmp_path: Path) -> None:
    """Turning left changes where the agent looks, by what the library says a turn is."""
    environment = make_environment("miniworld:OneRoom", size=32)
    assert environment.discrete
    before = environment.reset(0)["state"]
    after = environment.step(np.eye(len(environment.action_low), dtype=np.float32)[0])["state"]
    turned = np.arctan2(after[3], after[2]) - np.arctan2(before[3], before[2])
    assert np.rad2deg(turned) % 360 == pytest.approx(15, abs=0.01)
    collect(
        CollectConfig("miniworld:OneRoom", size=32, episodes=1, max_steps=30, policy="pink"), tmp_path, INLINE
    )
    store = Store.open(tmp_path)
    action = store.read_episode(0)["action"][:-1]
    assert store.manifest.rollouts.discrete
    assert np.array_equal(np.sort(action, axis=1)[:, -1], np.ones(len(action)))
    assert np.array_equal(action.sum(axis=1), np.ones(len(action)))


def test_atari_options() -> None:
    """Frames without colour, clipped rewards, an episode per life, 18 actions; each against the plain console."""
    plain = make_environment("ale:Breakout?sticky=0", size=84)
    grey = make_environment("ale:Breakout?sticky=0&gray=true&full=true", size=84)
    assert (len(plain.action_low), len(grey.action_low)) == (4, 18)
    colour, without = plain.reset(0)["frame"], grey.reset(0)["frame"]
    assert np.ptp(colour.astype(int), axis=2).any()
    assert not np.ptp(without.astype(int), axis=2).any()
    assert plain.reset(0)["state"].shape == (128,)
    lives = make_environment("ale:Breakout?sticky=0&life_loss=true", size=16)
    fire, right = np.eye(4, dtype=np.float32)[[1, 2]]
    lives.reset(0)
    rows = []
    for turn in range(200):
        rows.append(lives.step(fire if turn % 10 == 0 else right))
        if rows[-1]["is_last"]:
            break
    assert rows[-1]["is_terminal"]
    assert len(rows) < 200
    waited = make_environment("ale:Breakout?noop=30&sticky=0", size=16)
    starts = {waited.reset(seed)["state"].tobytes() for seed in range(6)}
    assert len(starts) > 1


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gym:NoSuch-v9", UnknownNameError, "nearest"),
        ("gym:HalfCheetah-v5?nonsense=1", SimulationError, "behind '\\?'"),
        ("gym:Blackjack-v1", (SimulationError, InvalidValueError), "gym:Blackjack-v1"),
        ("ale:Pongg", UnknownNameError, "ale:Pong"),
        ("ale:Pong?stick=0", UnknownNameError, "sticky"),
        ("ale:Pong?noop=many", InvalidValueError, "of type int"),
        ("metaworld:pusch", UnknownNameError, "metaworld:push"),
        ("miniworld:Pickup", UnknownNameError, "miniworld:PickupObjects"),
        ("nowhere:x", UnknownNameError, "pvrpipe envs"),
    ],
)
def test_names_and_options_that_are_wrong_are_one_line(name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        make_environment(name, size=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "policy", "words"),
    [
        ("miniworld:OneRoom", "mpc", "cannot look ahead"),
        ("dmc:walker-walk", "scripted", "has no scripted policy"),
        ("miniworld:OneRoom", "expert", "has no preset"),
    ],
)
def test_policies_that_an_environment_has_no_use_for_are_one_line(name: str, policy: str, words: str) -> None:
    with pytest.raises(InvalidValueError, match=words) as caught:
        draft_manifest(CollectConfig(name, size=32, policy=policy))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("mani_skill") is not None, reason="ManiSkill is installed")
def test_what_is_not_installed_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"maniskill:\* needs mani_skill.*pvrpipe\[maniskill\]"):
        make_environment("maniskill:StackCube")
    assert "maniskill" in missing_families()
    assert not any(name.startswith("maniskill") for name in list_environments())


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["StackCube", "PlugCharger", "PickClutterYCB", "AssemblingKits"])
def test_maniskill_is_collected_by_its_wrist_camera(tmp_path: Path, task: str) -> None:
    config = CollectConfig(f"maniskill:{task}", size=128, episodes=2, max_steps=5, policy="random")
    collect(config, tmp_path / "store", INLINE)
    assert verify(tmp_path / "store") == []


def test_the_example_of_an_environment_of_ones_own_installs_and_is_collected(tmp_path: Path) -> None:
    """The package of docs/environments.md, installed as a user would, without the network."""
    example = Path(__file__).parent.parent / "examples" / "pvrpipe-counter"
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*install, "--target", str(site), str(example)], check=True, capture_output=True)
    code = (
        "from pvrpipe.rollouts.collect import *; from pvrpipe.store.verifying import verify; import sys;"
        "r = collect(CollectConfig('counter:to-nine', size=32, episodes=3, policy='random'), sys.argv[1],"
        " Engine('inline')); assert verify(r.store) == []; print(r.rows)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "30", done.stderr


def test_miniworld_takes_turns_with_a_simulator_that_does_not_know_of_it() -> None:
    """Each has an OpenGL context of its own, and MuJoCo's renderers do not ask whether theirs is the current one."""
    assert not run_killed(take_turns, ("dmc:walker-walk", "miniworld:OneRoom"))


def take_turns(names: tuple[str, ...]) -> None:
    choose_backend()
    alone = [list(seen_on_the_way(make_environment(name, size=32))) for name in names]
    worlds = [make_environment(name, size=32) for name in names]
    together = zip(*(seen_on_the_way(world) for world in worlds), strict=True)
    for row, frames in zip(together, zip(*alone, strict=True), strict=True):
        assert all(np.array_equal(now, before) for now, before in zip(row, frames, strict=True))


def test_looks_of_miniworld_turn_camera_and_light_and_no_physics() -> None:
    assert not run_killed(take_looks, "miniworld:PickupObjects")


def take_looks(name: str) -> None:
    world = make_environment(name, size=32)
    plain = world.reset(3)

    def seen(**changed: float) -> np.ndarray:
        row = world.reset(3, Look(changed))
        assert np.array_equal(row["state"], plain["state"])
        return row["frame"].astype(int)

    wide, left, right = plain["frame"].astype(int), seen(camera_azimuth=25.0), seen(camera_azimuth=-25.0)
    assert np.abs(left - wide).mean() > 2
    assert np.abs(left[:, 12:] - right[:, 12:]).mean() > 2
    lit = [np.abs(seen(light_tilt=degrees) - wide).mean() for degrees in (0.0, 20.0, 60.0)]
    assert lit[0] == 0
    assert 0 < lit[1] < lit[2]  # graded, where a little used to be as much as a lot
    assert np.array_equal(world.reset(3)["frame"], plain["frame"])


def seen_on_the_way(environment: Environment) -> Iterator[np.ndarray]:
    yield environment.reset(3)["frame"]
    for action in np.eye(len(environment.action_low), dtype=np.float32)[:3]:
        yield environment.step(action)["frame"]
