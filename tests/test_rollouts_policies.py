"""Policies: their grammar, their shares, their determinism, and that the planner plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment, make_environment
from pvrpipe.rollouts.episodes import run_episode
from pvrpipe.rollouts.planning import PlannerConfig, perturbations
from pvrpipe.rollouts.policies import OU_DEVIATION, OU_SECONDS, Member, parse_policy
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError


@pytest.fixture(scope="module")
def pendulum() -> Iterator[Environment]:
    """The default task at the size of a stamp."""
    environment = make_environment(size=16, max_steps=100)
    environment.reset(0)
    yield environment
    environment.close()


def take(member: Member, environment: Environment, count: int, seed: int = 0) -> NDArray[np.float32]:
    """The first actions (count, A) of a policy."""
    return np.stack(list(islice(member.actions(environment, np.random.default_rng(seed)), count)))


def test_weights_are_normalised_and_written_one_way() -> None:
    assert str(parse_policy("random:2, mpc:1 ,mpc+0.50")) == "random:0.5,mpc:0.25,mpc+0.5:0.25"
    assert str(parse_policy("mpc+0.3:7")) == "mpc+0.3"
    assert parse_policy("random:1,mpc:1") == parse_policy("random,mpc")


def test_the_canonical_text_is_read_back_to_itself() -> None:
    text = str(parse_policy("random,ou,mpc"))
    assert str(parse_policy(text)) == text


def test_small_stores_get_their_shares() -> None:
    """Largest remainder: 7 episodes of 50/30/20 are 4, 2 and 1 (or rather 3.5, 2.1 and 1.4)."""
    assigned = parse_policy("random:0.5,mpc:0.3,mpc+0.5:0.2").assign(7, [0])
    assert Counter(m.label for m in assigned) == {"random": 4, "mpc": 2, "mpc+0.5": 1}


def test_assignment_is_shuffled_by_the_seed_alone() -> None:
    mixture = parse_policy("random,mpc")
    assert mixture.assign(40, [1]) == mixture.assign(40, [1])
    assert mixture.assign(40, [1]) != mixture.assign(40, [2])
    labels = [m.label for m in mixture.assign(40, [1])]
    assert labels.count("mpc") == 20
    assert labels != sorted(labels)


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("randon", UnknownNameError, "random"),
        ("", UnknownNameError, "random"),
        ("random:0.5,cem:0.5", UnknownNameError, "mpc"),
        ("random:-1", InvalidValueError, "weight '-1'"),
        ("random:0,mpc:1", InvalidValueError, "weight '0'"),
        ("random:nan", InvalidValueError, "weight 'nan'"),
        ("random:half", InvalidValueError, "weight 'half'"),
        ("mpc:", InvalidValueError, "weight ''"),
        ("mpc+", InvalidValueError, "noise ''"),
        ("mpc+inf", InvalidValueError, "noise 'inf'"),
        ("mpc~2", InvalidValueError, "epsilon is at most 1"),
        ("mpc~0.1~0.3", InvalidValueError, "epsilon twice"),
        ("ou@0.5", InvalidValueError, "only mpc has one"),
        ("mpc:1,mpc:2", InvalidValueError, "twice"),
    ],
)
def test_bad_mixtures_are_one_line_that_helps(text: str, kind: type[Exception], word: str) -> None:
    with pytest.raises(kind) as caught:
        parse_policy(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["random", "ou", "pink", "brown", "mpc", "mpc@0.3+0.3~0.1", "random+0.3"])
def test_policies_follow_from_their_seed_and_stay_in_bounds(pendulum: Environment, text: str) -> None:
    member = parse_policy(text).members[0]
    actions = take(member, pendulum, 8)
    assert actions.shape == (8, 1)
    assert actions.dtype == np.float32
    assert np.array_equal(actions, take(member, pendulum, 8))
    assert not np.array_equal(actions, take(member, pendulum, 8, seed=1))
    assert np.all((actions >= pendulum.action_low) & (actions <= pendulum.action_high))


def test_noise_is_added_to_what_is_done() -> None:
    assert parse_policy("mpc+0.3").members[0].label == "mpc+0.3"
    assert parse_policy("mpc+0.3").members[0].noise == 0.3


def test_random_covers_the_bounds_evenly(pendulum: Environment) -> None:
    actions = take(Member("random"), pendulum, 4000)
    assert actions.mean() == pytest.approx(0, abs=0.03)
    assert actions.std() == pytest.approx(1 / np.sqrt(3), abs=0.02)


def test_ou_is_smooth_and_stationary(pendulum: Environment) -> None:
    """Within the bounds its values correlate from one row to the next as its time constant says."""
    actions = take(Member("ou"), pendulum, 20_000)[:, 0].astype(np.float64)
    correlation = np.corrcoef(actions[:-1], actions[1:])[0, 1]
    assert correlation == pytest.approx(np.exp(-pendulum.control_timestep / OU_SECONDS), abs=0.03)
    assert 0.8 * OU_DEVIATION < actions.std() <= OU_DEVIATION


def test_perturbations_are_linear_between_knots_and_of_every_size() -> None:
    config = PlannerConfig()
    noise = perturbations(np.random.default_rng(0), config, width=4000)
    assert noise.shape == (config.candidates - 1, config.horizon, 4000)
    assert noise[0, 0].std() == pytest.approx(config.noise[0], rel=0.05)
    assert noise[-1, 0].std() == pytest.approx(config.noise[1], rel=0.05)
    assert noise[0, 1] == pytest.approx(noise[0, 0] * 2 / 3 + noise[0, 3] / 3)


def test_mpc_swings_the_pendulum_up(pendulum: Environment) -> None:
    """Up and balancing within 4 seconds, which random actions never are."""
    planned = run_episode(pendulum, Member("mpc"), episode=0, seed=2).info
    random = run_episode(pendulum, Member("random"), episode=0, seed=2).info
    assert planned.episode_return > 80 + random.episode_return


@pytest.mark.slow
def test_mpc_solves_the_whole_episode() -> None:
    environment = make_environment(size=16)
    assert run_episode(environment, Member("mpc"), episode=0, seed=1).info.episode_return > 700
