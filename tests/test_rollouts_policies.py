"""Policies: their grammar, their shares, their determinism, and that the planner plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from colorednoise import powerlaw_psd_gaussian
from numpy.typing import NDArray

from pvrpipe.rollouts.environments import Environment, make_environment
from pvrpipe.rollouts.episodes import run_episode
from pvrpipe.rollouts.planning import PLANNERS, PlannerConfig, perturbations, planner_of_quality
from pvrpipe.rollouts.policies import OU_DEVIATION, OU_SECONDS, Member, coloured_noise, parse_policy
from pvrpipe.rollouts.presets import FAMILIES, NAMES, expanded
from pvrpipe.schemas.errors import InvalidValueError, PvrpipeError, UnknownNameError


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
        ("random+1e300", InvalidValueError, "noise is at most 1000"),
        ("run=", InvalidValueError, "run takes the folder of a run"),
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
    noise = perturbations(np.random.default_rng(0), config, 23, width=4000)
    assert noise.shape == (23, config.horizon, 4000)
    assert noise[0, 0].std() == pytest.approx(config.noise[0], rel=0.05)
    assert noise[-1, 0].std() == pytest.approx(config.noise[1], rel=0.05)
    assert noise[0, 1] == pytest.approx(noise[0, 0] * 2 / 3 + noise[0, 3] / 3)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
@pytest.mark.parametrize("length", [500, 501])
def test_coloured_noise_is_that_of_the_colorednoise_library(exponent: float, length: int) -> None:
    """The same algorithm on the same draws: the same values; and several columns have the same spectrum."""
    ours = coloured_noise(np.random.default_rng(3), exponent, length, 1)[:, 0]
    theirs = powerlaw_psd_gaussian(exponent, length, random_state=np.random.default_rng(3))
    assert ours == pytest.approx(theirs, abs=1e-9)
    many = coloured_noise(np.random.default_rng(4), exponent, length, 2000)
    library = powerlaw_psd_gaussian(exponent, (2000, length), random_state=5)
    assert (many**2).mean() == pytest.approx((library**2).mean(), rel=0.1)
    power = (np.abs(np.fft.rfft(many, axis=0)) ** 2).mean(axis=1)[1:100]
    slope = np.polyfit(np.log(np.fft.rfftfreq(length)[1:100]), np.log(power), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)


@pytest.mark.parametrize("task", ["dmc:pendulum-swingup", "dmc:no-planner-of-its-own", *PLANNERS])
def test_lower_quality_plans_less(task: str) -> None:
    configs = [planner_of_quality(quality, task) for quality in (1.0, 0.5, 0.2, 0.01)]
    work = [c.horizon * c.candidates / c.interval for c in configs]
    assert work == sorted(work, reverse=True)
    assert work[0] > work[1] > work[2]
    assert all(c.horizon >= c.interval and c.candidates > c.elites for c in configs)


def test_presets_become_members_with_their_weight_shared() -> None:
    assert expanded("random:0.5,ou", "gym:CartPole-v1") == "random:0.5,ou"
    assert expanded("expert", "metaworld:push") == "scripted:1"
    for family, presets in FAMILIES.items():
        environment = f"{family}:any"
        for name in NAMES:
            assert parse_policy(expanded(name, environment)) == parse_policy(presets[name])
        mixture = parse_policy(expanded("brown:1,mixed:3", environment))
        shares = dict(zip((m.label for m in mixture.members), mixture.weights, strict=True))
        assert shares["brown"] == pytest.approx(0.25)
        assert sum(shares.values()) == pytest.approx(1)
    with pytest.raises(InvalidValueError, match="no preset"):
        expanded("expert", "gym:CartPole-v1")


def test_noise_and_epsilon_on_a_preset_come_on_top_of_its_members_own() -> None:
    assert expanded("expert+0.3~0.1", "dmc:walker-walk") == "mpc+0.3~0.1:1"
    assert expanded("medium+0.4:2", "dmc:walker-walk") == "mpc@0.3+0.5:2"  # 0.3 and 0.4, independent
    assert expanded("medium~0.5", "metaworld:push") == "scripted+0.3~0.65:1"
    with pytest.raises(
        InvalidValueError, match=r"'expert@0\.5' gives a quality for expert, only mpc has one"
    ):
        expanded("expert@0.5", "dmc:walker-walk")
    with pytest.raises(InvalidValueError, match="noise 'x' must be a number"):
        expanded("expert+x", "dmc:walker-walk")


def test_members_that_a_preset_shares_with_the_rest_of_a_mixture_are_added_up() -> None:
    mixture = parse_policy(expanded("random:0.5,mixed:0.5", "dmc:walker-walk"))
    shares = dict(zip((m.label for m in mixture.members), mixture.weights, strict=True))
    assert shares["random"] == pytest.approx(0.6)
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["random", "ou", "pink", "brown", "mpc"])
def test_epsilon_and_noise_change_any_policy_as_often_and_as_much_as_they_say(
    pendulum: Environment, name: str
) -> None:
    pendulum.reset(0)
    count = 30 if name == "mpc" else 3000
    plain = take(Member(name), pendulum, count)
    random = take(Member(name, epsilon=1.0), pendulum, count)
    assert not np.array_equal(plain, random)
    assert random.mean() == pytest.approx(0, abs=4 / np.sqrt(3 * count))
    noisy = take(Member(name, noise=2.0), pendulum, count)
    clipped = float(np.mean(np.abs(noisy) == 1))
    assert clipped > 0.4  # P(|N(a, 2)| > 1) is at least 0.6 for any action a


def test_noise_has_the_deviation_it_says(pendulum: Environment, entry_point: str) -> None:
    """A policy of another package, always in the middle, so that noise and epsilon are all there is."""
    noise = take(Member(entry_point, noise=0.2), pendulum, 4000)
    assert noise.std() == pytest.approx(0.2, abs=0.01)
    rarely = take(Member(entry_point, epsilon=0.1), pendulum, 4000)
    assert np.mean(rarely != 0) == pytest.approx(0.1, abs=0.015)


def test_a_policy_of_another_package_plays(
    pendulum: Environment, entry_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pendulum, "max_steps", 5)
    member = parse_policy(f"{entry_point}~0.5").members[0]
    episode = run_episode(pendulum, parse_policy(entry_point).members[0], episode=0, seed=1)
    assert member.label == f"{entry_point}~0.5"
    assert episode.info.policy == entry_point
    assert not episode.arrays["action"].any()


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with an entry point of the group pvrpipe.policies, as pip leaves one; the policy's name."""
    about = tmp_path / "lazy_policy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lazy-policy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pvrpipe.policies]\nlazy = lazy_policy:lazy\n")
    (tmp_path / "lazy_policy.py").write_text(
        "import numpy as np\n\n\ndef lazy(environment, rng):\n"
        "    while True:\n        yield np.zeros(environment.action_low.shape, np.float32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "lazy"


def test_mpc_swings_the_pendulum_up(pendulum: Environment) -> None:
    """Up and balancing within 4 seconds, which random actions never are."""
    planned = run_episode(pendulum, Member("mpc"), episode=0, seed=2).info
    random = run_episode(pendulum, Member("random"), episode=0, seed=2).info
    assert planned.episode_return > 80 + random.episode_return


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("dmc:pendulum-swingup", 673), ("dmc:cartpole-swingup", 690)])
def test_expert_reaches_four_fifths_of_what_is_published(task: str, least: float) -> None:
    """80 % of 841 and of 862, in whole episodes, on average over seeds that nothing was chosen by."""
    environment = make_environment(task, size=16)
    member = parse_policy(expanded("expert", task)).members[0]
    returns = [run_episode(environment, member, 0, seed).info.episode_return for seed in (100, 101)]
    environment.close()
    assert np.mean(returns) >= least


@pytest.mark.slow
def test_quality_is_a_dial() -> None:
    environment = make_environment("dmc:cartpole-swingup", size=16, max_steps=200)
    worst, best = (
        np.mean(
            [
                run_episode(environment, Member("mpc", quality=q), 0, seed).info.episode_return
                for seed in (100, 101)
            ]
        )
        for q in (0.2, 1.0)
    )
    environment.close()
    assert best > worst + 20


def test_an_argument_in_quotes_may_hold_what_parts_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that gets such a character from the folder it lies in, for workers read the label again."""
    here = tmp_path / "lab,2"
    (here / "a:b@c+d~e").mkdir(parents=True)
    (here / "plain").mkdir()
    monkeypatch.chdir(here)
    text = 'random:0.5,run="a:b@c+d~e"+0.25~0.1:0.25,run=plain:0.25'
    for policy in (text, str(parse_policy(text)), expanded(text, "dmc:walker-walk")):
        _, named, plain = parse_policy(policy).members
        assert named == Member("run", str(here / "a:b@c+d~e"), noise=0.25, epsilon=0.1)
        assert plain == Member("run", str(here / "plain"))
        assert parse_policy(policy).weights == (0.5, 0.25, 0.25)
    assert parse_policy(expanded(text + ",mixed", "dmc:walker-walk")).members[1] == named
    for wrong in ("run=a+b", 'run="a', 'run="a"b"', 'run=""', '"run"=a'):
        with pytest.raises(PvrpipeError) as caught:
            parse_policy(wrong)
        assert 'run="my+run"' in str(caught.value), wrong
