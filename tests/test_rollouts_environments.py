"""Environments: names, exact replay, true ends, look-ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import (
    DEFAULT_ENVIRONMENT,
    Environment,
    choose_backend,
    list_environments,
    make_environment,
)
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.records import Step

SIZE = 32


@pytest.fixture(scope="module")
def pendulum() -> Iterator[Environment]:
    """The default task, three transitions long."""
    environment = make_environment(size=SIZE, max_steps=3)
    yield environment
    environment.close()


def random_actions(environment: Environment, count: int) -> NDArray[np.float32]:
    """Actions (count, A) within the bounds."""
    low, high = environment.action_low, environment.action_high
    return np.random.default_rng(0).uniform(low, high, (count, len(low))).astype(np.float32)


def differing(a: Step, b: Step) -> list[str]:
    """The fields in which two rows are not equal bit for bit."""
    return [name for name in a if not np.array_equal(a[name], b[name])]  # type: ignore[literal-required]


def check_exactness(name: str, size: int) -> None:
    """An environment just built, and one that has played, replay an episode bit for bit from any row."""
    played, fresh = make_environment(name, size), make_environment(name, size)
    actions = random_actions(played, 8)
    played.reset(7)
    for action in actions[:3]:
        played.step(action)
    rows = [played.reset(5), *(played.step(action) for action in actions)]
    assert rows[0]["frame"].shape == (size, size, 3)
    assert rows[0]["frame"].dtype == np.uint8
    assert rows[0]["frame"].std() > 5, "the picture is empty"
    assert rows[0]["state"].shape == (len(played.state_names),)
    assert not np.array_equal(rows[0]["physics"], rows[-1]["physics"])
    again = [fresh.reset(5), *(fresh.step(action) for action in actions)]
    assert [differing(a, b) for a, b in zip(rows, again, strict=True)] == [[]] * len(rows)
    for row in (0, 4):
        fresh.restore(rows[row]["physics"], row)
        assert np.array_equal(fresh.snapshot(), rows[row]["physics"])
        fresh.evaluate(actions[None, :2])
        onward = [fresh.step(action) for action in actions[row:]]
        assert [differing(a, b) for a, b in zip(rows[row + 1 :], onward, strict=True)] == [[]] * len(onward)
    played.close()
    fresh.close()


# One task for each way MuJoCo integrates, one with contacts, one whose model changes with the episode.
@pytest.mark.parametrize(
    "name", ["dmc:pendulum-swingup", "dmc:cartpole-balance", "dmc:hopper-hop", "dmc:reacher-easy"]
)
def test_episodes_replay_exactly(name: str) -> None:
    check_exactness(name, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_environments("dmc"))
def test_every_task_replays_exactly(name: str) -> None:
    check_exactness(name, 64)


def test_all_suite_tasks_are_listed() -> None:
    """Domains with underscores split at the first dash."""
    names = list_environments("dmc")
    assert len(names) == 51
    assert DEFAULT_ENVIRONMENT in names
    assert "dmc:ball_in_cup-catch" in names
    assert "dmc:lqr-lqr_2_1" in names


def test_defaults_are_those_of_the_study() -> None:
    environment = make_environment()
    assert (environment.size, environment.action_repeat, environment.max_steps) == (256, 2, 500)
    assert environment.control_timestep == pytest.approx(0.04)
    assert environment.state_names == ("orientation[0]", "orientation[1]", "velocity")


def test_time_running_out_is_last_and_not_terminal(pendulum: Environment) -> None:
    first = pendulum.reset(0)
    rows = [first, *(pendulum.step(action) for action in random_actions(pendulum, 3))]
    assert [row["is_last"] for row in rows] == [False, False, False, True]
    assert not any(row["is_terminal"] for row in rows)
    assert first["reward"] == 0


def test_a_true_end_is_terminal() -> None:
    """The lqr task ends where its state is zero; it has no time limit, so an episode gets one."""
    environment = make_environment("dmc:lqr-lqr_2_1", size=SIZE)
    environment.reset(0)
    environment.restore(np.zeros(environment.physics_width))
    step = environment.step(np.zeros(1, np.float32))
    assert (step["is_last"], step["is_terminal"]) == (True, True)
    assert environment.max_steps == 500
    assert np.array_equal(environment.action_high, [1.0])


def test_rewards_are_summed_over_repeats() -> None:
    once = make_environment("dmc:cheetah-run", size=SIZE, action_repeat=1)
    thrice = make_environment("dmc:cheetah-run", size=SIZE, action_repeat=3)
    once.reset(1)
    thrice.reset(1)
    action = np.full(6, 0.7, np.float32)
    rows = [once.step(action) for _ in range(3)]
    assert thrice.step(action)["reward"] == sum(row["reward"] for row in rows) > 0


def test_looking_ahead_forecasts_and_touches_nothing() -> None:
    """Without action repeat the forecast is the return itself; the episode does not move."""
    environment = make_environment("dmc:walker-walk", size=SIZE, action_repeat=1)
    actions = random_actions(environment, 6)
    environment.reset(3)
    environment.step(actions[0])
    before = environment.snapshot()
    forecast = environment.evaluate(np.stack([actions[1:], -actions[1:]]))
    assert np.array_equal(environment.snapshot(), before)
    rows = [environment.step(action) for action in actions[1:]]
    assert forecast.returns[0] == sum(row["reward"] for row in rows)
    assert forecast.returns[0] != forecast.returns[1]
    assert np.ptp(forecast.energies) > 0


def test_actions_are_clipped_to_their_bounds(pendulum: Environment) -> None:
    pendulum.reset(2)
    beyond = pendulum.step(np.array([50.0], np.float32))
    pendulum.reset(2)
    assert differing(beyond, pendulum.step(pendulum.action_high)) == []


def test_a_camera_has_one_name() -> None:
    by_number, by_text, by_name = (make_environment(size=SIZE, camera=c).camera for c in (1, "1", "lookat"))
    assert by_number == by_text == by_name == "lookat"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"name": "dmc:pendulum-swingupp"}, UnknownNameError, ["dmc:pendulum-swingup"]),
        ({"name": "pendulum-swingup"}, UnknownNameError, ["dmc:pendulum-swingup"]),
        ({"name": "dmc:"}, UnknownNameError, ["pvrpipe envs"]),
        ({"camera": 9}, UnknownNameError, ["0 (fixed), 1 (lookat)"]),
        ({"camera": "-1"}, UnknownNameError, ["0 (fixed), 1 (lookat)"]),
        ({"size": 3}, InvalidValueError, ["--size", "16"]),
        ({"size": 99999}, InvalidValueError, ["--size", "2048"]),
        ({"action_repeat": 0}, InvalidValueError, ["--action-repeat"]),
        ({"max_steps": 0}, InvalidValueError, ["--max-steps"]),
    ],
)
def test_bad_values_are_one_line_that_helps(
    arguments: dict[str, int | str], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        make_environment(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_the_users_backend_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    choose_backend()
    assert (os.environ["MUJOCO_GL"], os.environ["LP_NUM_THREADS"]) == ("osmesa", "1")


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True
    )


def test_a_broken_renderer_names_what_mends_it() -> None:
    code = "from pvrpipe.rollouts.environments import make_environment; make_environment()"
    last_line = python(code, MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99").stderr.strip().splitlines()[-1]
    assert "SimulationError" in last_line
    assert "apt-get install libegl1 libgl1-mesa-dri" in last_line
    assert "pvrpipe doctor" in last_line


def test_importing_loads_no_simulator_and_no_ray() -> None:
    code = "import sys, pvrpipe.rollouts.collect; print({'mujoco', 'dm_control', 'ray'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"
