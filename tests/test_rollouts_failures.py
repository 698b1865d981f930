"""Environments that raise, hang or return NaN: tried again, then recorded as failed; the rest is unharmed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect, replay
from pvrpipe.rollouts.environments import make_environment
from pvrpipe.rollouts.episodes import episode_seed, run_episode
from pvrpipe.rollouts.policies import Member
from pvrpipe.schemas.errors import InvalidValueError, SimulationError
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

EPISODES = 8
FAILING = [e for e in range(EPISODES) if episode_seed(0, e) % 3 == 0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with an entry point of the group pvrpipe.envs, as pip leaves one; workers find it too."""
    site, marks = tmp_path / "site", tmp_path / "marks"
    about = site / "failing-1.dist-info"
    about.mkdir(parents=True)
    marks.mkdir()
    (site / "failing_env.py").write_text((Path(__file__).parent / "failing.py").read_text())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[pvrpipe.envs]\nfailing = failing_env\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("FAILING_MARKS", str(marks))
    yield site
    sys.modules.pop("failing_env", None)


@pytest.fixture
def ray_session(package: Path) -> Iterator[None]:
    """Ray whose workers see the package."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(how: str, **changes: object) -> CollectConfig:
    return CollectConfig(f"failing:{how}", size=16, episodes=EPISODES, policy="random", **changes)  # type: ignore[arg-type]


def test_some_episodes_of_these_tests_fail() -> None:
    assert 2 <= len(FAILING) <= 4


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError at step 2: the gripper came off"),
        ("nan", "reward is not finite at step 3"),
        ("exit", "SystemExit at step 2: as if it were a program"),
    ],
)
def test_a_failed_episode_is_recorded_and_another_seed_takes_its_place(
    tmp_path: Path, how: str, reason: str
) -> None:
    result = collect(config(how), tmp_path / "store", Engine("inline", max_failures=9))
    store = Store.open(tmp_path / "store")
    assert verify(store.path) == []
    assert result.failed == len(store.manifest.failed) >= len(FAILING)
    for failure in store.manifest.failed:
        assert (failure.reason, failure.policy) == (reason, "random")
        assert failure.seed % 3 == 0
        assert failure.episode in FAILING
    for episode in range(EPISODES):
        own = episode_seed(0, episode)
        assert (store.episodes["seed"][episode] == own) == (episode not in FAILING)
    assert np.isfinite(store.read_episode(FAILING[0])["state"]).all()


@pytest.mark.usefixtures("package")
def test_a_hiccup_is_tried_again_on_its_own_seed_and_leaves_no_trace(tmp_path: Path) -> None:
    first = collect(config("once"), tmp_path / "first", Engine("inline", max_failures=0))
    assert len(list((tmp_path / "marks").iterdir())) == len(FAILING)
    smooth = collect(config("once"), tmp_path / "smooth", Engine("inline", max_failures=0))
    assert first.failed == 0
    assert first.id == smooth.id


@pytest.mark.usefixtures("package")
def test_too_many_failures_are_one_line_and_what_is_committed_stays(tmp_path: Path) -> None:
    with pytest.raises(
        SimulationError, match=r"failed in 1 episodes, --max-failures are 0; .*gripper"
    ) as caught:
        collect(config("raise"), tmp_path / "store", Engine("inline", max_failures=0))
    assert "\n" not in str(caught.value)
    done = len(list((tmp_path / "store/shards").glob("*.json")))
    assert done == FAILING[0]
    again = collect(config("raise"), tmp_path / "store", Engine("inline", max_failures=9))
    assert again.resumed_shards == done


@pytest.mark.usefixtures("package")
def test_an_environment_that_always_fails_ends(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="failed in 4 episodes, --max-failures are 3"):
        collect(config("never"), tmp_path / "store", Engine("inline", max_failures=3))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("floats", r"the frame at step 0 is float64 \[16, 16, 3\], not uint8 \[16, 16, 3\]"),
        ("endless", "step 5 is not its last, though it has at most 5"),
    ],
)
def test_rows_that_no_episode_can_have_are_refused(tmp_path: Path, how: str, reason: str) -> None:
    """Frames of floating point would be stored as black ones."""
    with pytest.raises(SimulationError, match=reason):
        collect(config(how), tmp_path / "store", Engine("inline"))


@pytest.mark.usefixtures("package")
def test_an_environment_may_use_its_arrays_again(tmp_path: Path) -> None:
    collect(config("reused"), tmp_path / "reused", Engine("inline"))
    collect(config("long"), tmp_path / "fresh", Engine("inline"))
    reused, fresh = Store.open(tmp_path / "reused"), Store.open(tmp_path / "fresh")
    replay(reused, tmp_path / "again", Engine("inline"))
    for store in (reused, Store.open(tmp_path / "again")):
        for name, rows in fresh.read_episode(3).items():
            assert np.array_equal(rows, store.read_episode(3)[name]), name


@pytest.mark.usefixtures("package")
def test_an_environment_that_fails_and_cannot_be_closed_is_made_anew(tmp_path: Path) -> None:
    failed = collect(config("unclosable"), tmp_path / "unclosable", Engine("inline", max_failures=9)).failed
    assert failed == collect(config("raise"), tmp_path / "raised", Engine("inline", max_failures=9)).failed


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("unbounded", InvalidValueError, "has actions between .* they must be as many finite bounds"),
        ("unmade", SimulationError, "failing:unmade cannot be made .the licence has expired"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(
    tmp_path: Path, how: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        collect(config(how), tmp_path / "store", Engine("inline"))
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_hang_is_ended_and_counts_as_a_failure(tmp_path: Path) -> None:
    """The same store as one whose environment raises there, but for the reasons."""
    hung = collect(config("hang"), tmp_path / "hung", Engine(workers=2, max_failures=9, episode_timeout=8))
    store = Store.open(tmp_path / "hung")
    raised = collect(config("raise"), tmp_path / "raised", Engine("inline", max_failures=9))
    other = Store.open(tmp_path / "raised")
    assert hung.failed == raised.failed
    assert {f.reason for f in store.manifest.failed} == {"it did not come to an end in time"}
    assert store.episodes["seed"].to_list() == other.episodes["seed"].to_list()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_dies_in_an_episode_costs_its_shard(tmp_path: Path) -> None:
    died = collect(config("die"), tmp_path / "died", Engine(workers=2, max_failures=0))
    assert died.failed == 0
    assert died.id == collect(config("die"), tmp_path / "smooth", Engine("inline")).id


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_simulator_that_crashes_whenever_it_comes_to_an_episode_has_failed_in_it(tmp_path: Path) -> None:
    """Other seeds take the place of those that kill three workers, as where the environment raises."""
    crashed = collect(config("crash"), tmp_path / "crashed", Engine(workers=2, max_failures=9))
    raised = collect(config("raise"), tmp_path / "raised", Engine("inline", max_failures=9))
    store, other = Store.open(tmp_path / "crashed"), Store.open(tmp_path / "raised")
    assert crashed.failed == raised.failed
    assert {f.reason for f in store.manifest.failed} == {"3 workers died in it"}
    assert store.episodes["seed"].to_list() == other.episodes["seed"].to_list()


def test_a_hang_cannot_be_ended_by_the_process_that_hangs() -> None:
    with pytest.raises(InvalidValueError, match="--episode-timeout needs --engine ray"):
        Engine("inline", episode_timeout=1)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("action", "words"),
    [(np.zeros(3), r"shape \[3\]"), (np.array([0, np.nan]), "not finite"), (0.5, r"shape \[\]")],
)
def test_a_policy_of_the_wrong_shape_is_one_line(
    action: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvrpipe.rollouts import policies

    monkeypatch.setitem(policies.POLICIES, "wrong", lambda environment, rng: iter([action]))
    environment = make_environment("failing:raise", size=16)
    with pytest.raises(InvalidValueError, match=f"policy 'wrong' returned .*{words}.* is 2 finite") as caught:
        run_episode(environment, Member("wrong"), episode=0, seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("package")
def test_long_episodes_do_not_take_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a limit, frames wait in a file without a name; the store is the same."""
    from pvrpipe.rollouts import tape

    whole = collect(config("long", max_steps=40), tmp_path / "whole", Engine("inline"))
    monkeypatch.setattr(tape, "HELD", 7 * 16 * 16 * 3)
    spilled = collect(config("long", max_steps=40), tmp_path / "spilled", Engine("inline"))
    assert spilled.id == whole.id


@pytest.mark.usefixtures("package")
def test_an_environment_that_hangs_while_it_is_built_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVRPIPE_BUILD_SECONDS", "0.3")
    with pytest.raises(SimulationError, match=r"failing:unbuilt was not built within 0\.3 seconds; "):
        collect(config("unbuilt"), tmp_path / "store", Engine("inline"))
    assert not (tmp_path / "store").exists()
    monkeypatch.setenv("PVRPIPE_BUILD_SECONDS", "soon")
    with pytest.raises(InvalidValueError, match="PVRPIPE_BUILD_SECONDS is 'soon'"):
        make_environment("failing:long")


def test_time_spent_writing_within_an_episode_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn for 3 s, written for 100 s, drawn for 3 s more: 6 s of one try; the next begins at 0."""
    from pvrpipe.rollouts import ray_engine
    from pvrpipe.rollouts.episodes import Played, Trying
    from pvrpipe.schemas.manifest import ShardPlan

    clock = [0.0]
    monkeypatch.setattr(ray_engine.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ray_engine.ray, "get", lambda told: told)
    pool = ray_engine.Pool.__new__(ray_engine.Pool)
    job = ray_engine.Job(None, ShardPlan(shard=0, first_episode=0, episodes=2))
    told = [(0, Trying(0, 0, 0, 0)), (3, Played(0, 64)), (103, Trying(0, 0, 0, 64)), (106, Played(0, 128))]
    for clock[0], event in told:
        pool._hear(iter([event]), job)
    assert (job.spent, job.trying) == (6, None)
    clock[0] = 200
    pool._hear(iter([Trying(0, 1, 0, 128)]), job)
    assert job.spent == 0
