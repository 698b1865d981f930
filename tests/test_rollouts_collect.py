"""Collection: alignment, and the same bytes whatever runs it and however often it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from pvrpipe.rollouts.collect import CollectConfig, CollectResult, Engine, collect, draft_manifest
from pvrpipe.rollouts.environments import make_environment
from pvrpipe.rollouts.episodes import CollectShard, episode_seed, run_episode
from pvrpipe.rollouts.policies import Member
from pvrpipe.rollouts.ray_engine import worker_pool
from pvrpipe.schemas.clusters import ray_cluster
from pvrpipe.schemas.errors import (
    ClusterError,
    InvalidValueError,
    OutputExistsError,
    SimulationError,
    UnknownNameError,
)
from pvrpipe.schemas.manifest import ShardCommit
from pvrpipe.store.building import PendingStore
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

INLINE = Engine("inline")
SMALL = CollectConfig(size=32, episodes=4, max_steps=8, policy="random,mpc+0.3", seed=3)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, CollectResult]:
    """A small store, collected in this process; what every other way must equal."""
    folder = tmp_path_factory.mktemp("inline") / "store"
    result = collect(SMALL, folder, INLINE)
    return Store.open(folder), result


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Ray, initialised by the caller; collect must use it and leave it up."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()


def test_the_result_says_what_the_store_holds(collected: tuple[Store, CollectResult]) -> None:
    store, result = collected
    assert result.id == store.manifest.id
    assert (result.episodes, result.rows, result.shards, result.resumed_shards) == (4, 36, 4, 0)
    assert result.bytes == sum(p.stat().st_size for p in store.path.glob("shards/*.parquet"))
    assert 0 < result.startup_seconds < result.seconds
    assert result.frames_per_second > 1
    assert verify(store.path) == []


def test_rows_follow_the_alignment_contract(collected: tuple[Store, CollectResult]) -> None:
    """From the stored physics, the stored action[t] leads to reward, state, physics and frame of t + 1."""
    store, _ = collected
    environment = make_environment(SMALL.environment, size=32, max_steps=8)
    for number in (0, 3):
        rows = store.read_episode(number)
        environment.reset(store.episodes["seed"][number])
        for t in (0, 1, 7):
            environment.restore(rows["physics"][t], t)
            step = environment.step(rows["action"][t])
            assert np.float32(step["reward"]) == rows["reward"][t + 1]
            assert step["is_last"] == rows["is_last"][t + 1]
            for name in ("state", "physics", "frame"):
                assert np.array_equal(step[name], rows[name][t + 1])  # type: ignore[literal-required]
                assert not np.array_equal(rows[name][t], rows[name][t + 1])
        assert rows["reward"][0] == 0
        assert not rows["action"][-1].any()
        assert np.all(rows["action"][:-1].any(axis=1))


def test_flags_and_counters(collected: tuple[Store, CollectResult]) -> None:
    rows = collected[0].read_episode(3)
    assert rows["is_first"].tolist() == [True] + [False] * 8
    assert rows["is_last"].tolist() == [False] * 8 + [True]
    assert not rows["is_terminal"].any()
    assert rows["step"].tolist() == list(range(9))
    assert set(rows["episode"]) == {3}


def test_episodes_say_who_played_them_and_can_be_played_again(
    collected: tuple[Store, CollectResult],
) -> None:
    """An episode follows from its recorded seed and policy alone."""
    store, _ = collected
    assert sorted(store.episodes["policy"]) == ["mpc+0.3"] * 2 + ["random"] * 2
    row = store.episodes.row(store.episodes["policy"].to_list().index("mpc+0.3"), named=True)
    assert row["seed"] == episode_seed(SMALL.seed, row["episode"])
    environment = make_environment(SMALL.environment, size=32, max_steps=8)
    again = run_episode(environment, Member("mpc", noise=0.3), row["episode"], row["seed"])
    stored = store.read_episode(row["episode"])
    assert all(np.array_equal(array, stored[name]) for name, array in again.arrays.items())
    assert again.info.episode_return == row["episode_return"]


def test_a_store_that_lacks_nothing_is_not_taken_for_one_of_another_kind(
    collected: tuple[Store, CollectResult],
) -> None:
    store, _ = collected
    for episodes in (4, 2):
        asked = replace(SMALL, episodes=episodes, seed=9)
        assert collect(asked, store.path, INLINE, append=True).id == store.manifest.id
        with pytest.raises(OutputExistsError, match="size: 32, there 40"):
            collect(replace(asked, size=40), store.path, INLINE, append=True)


def test_episode_seeds_differ_and_do_not_depend_on_each_other() -> None:
    seeds = {episode_seed(root, episode) for root in range(20) for episode in range(500)}
    assert len(seeds) == 10_000
    assert max(seeds) < 1 << 53


def test_running_again_finds_everything_done(collected: tuple[Store, CollectResult]) -> None:
    store, first = collected
    again = collect(SMALL, store.path, INLINE)
    assert (again.id, again.resumed_shards, again.frames_per_second) == (first.id, 4, 0)


def test_another_configuration_is_refused_and_nothing_lost(collected: tuple[Store, CollectResult]) -> None:
    store, first = collected
    with pytest.raises(OutputExistsError, match="seed: 3, now 4"):
        collect(replace(SMALL, seed=4), store.path, INLINE)
    assert Store.open(store.path).manifest.id == first.id


def test_the_cut_into_shards_does_not_change_the_data(
    collected: tuple[Store, CollectResult], tmp_path: Path
) -> None:
    store, _ = collected
    result = collect(replace(SMALL, shard_rows=20), tmp_path / "store", INLINE)
    other = Store.open(tmp_path / "store")
    assert result.shards == 2
    for number in range(SMALL.episodes):
        a, b = store.read_episode(number), other.read_episode(number)
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_byte(
    collected: tuple[Store, CollectResult], tmp_path: Path, workers: int
) -> None:
    reports: list[tuple[float, float]] = []
    result = collect(
        SMALL,
        tmp_path / "store",
        Engine(workers=workers),
        progress=lambda done, total, _: reports.append((done, total)),
    )
    assert result.id == collected[1].id
    assert (tmp_path / "store/store.json").read_bytes() == (collected[0].path / "store.json").read_bytes()
    assert sorted({done for done, _ in reports}) == list(range(0, 45, 9))
    assert {total for _, total in reports} == {36}
    assert ray.is_initialized()


def descendants(root: int) -> dict[int, str]:
    """Processes below a process: id → command line."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, fresh = set(), {root}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    commands = {}
    for process in found:
        try:
            commands[process] = Path(f"/proc/{process}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return commands


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_is_replaced_and_its_shard_done_again(
    collected: tuple[Store, CollectResult], tmp_path: Path
) -> None:
    manifest = draft_manifest(SMALL)
    with PendingStore.begin(tmp_path / "store", manifest) as pending:
        make = partial(CollectShard, pending.folder, manifest)
        with worker_pool(make, 4, workers=1) as shards:
            commits = (event for event in shards(pending.todo) if isinstance(event, ShardCommit))
            first = next(commits)
            victims = [p for p, command in descendants(os.getpid()).items() if "ray::ShardWorker" in command]
            assert len(victims) == 1
            os.kill(victims[0], signal.SIGKILL)
            rest = list(commits)
        assert sorted(c.shard for c in [first, *rest]) == list(range(4))
        assert pending.seal().id == collected[1].id


@pytest.mark.usefixtures("ray_session")
def test_a_workers_error_is_one_line(tmp_path: Path) -> None:
    """A worker that renders otherwise than the machine that began the store refuses to add to it."""
    manifest = draft_manifest(SMALL)
    elsewhere = manifest.specification.model_copy(update={"renderer": "egl: another machine"})
    wrong = manifest.model_copy(update={"specification": elsewhere})
    with (
        pytest.raises(SimulationError, match="'egl: another machine'") as caught,
        worker_pool(partial(CollectShard, tmp_path, wrong), 4, workers=1),
    ):
        pass
    assert "\n" not in str(caught.value)


COLLECT = """
import sys
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
config = CollectConfig(size=32, episodes=4, max_steps=8, policy="random,mpc+0.3", seed=3)
collect(config, sys.argv[1], Engine(sys.argv[2]))
"""


def interrupted(folder: Path, engine: str, how: signal.Signals) -> int:
    """Collect in another process, and stop it once it has committed a shard; its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-c", COLLECT, str(folder), engine],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("shards/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline, "no shard was committed"
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(60)


def test_killed_and_run_again_gives_the_same_store(
    collected: tuple[Store, CollectResult], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    assert interrupted(folder, "inline", signal.SIGKILL) == -signal.SIGKILL
    result = collect(SMALL, folder, INLINE)
    assert 1 <= result.resumed_shards < 4
    assert result.id == collected[1].id
    assert not list(folder.glob("**/*.tmp-*"))


@pytest.mark.slow
def test_an_interrupt_under_ray_leaves_a_store_to_go_on_with(
    collected: tuple[Store, CollectResult], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    assert interrupted(folder, "ray", signal.SIGINT) != 0
    result = collect(SMALL, folder, INLINE)
    assert result.resumed_shards >= 1
    assert result.id == collected[1].id


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"episodes": 0}, InvalidValueError),
        ({"seed": -1}, InvalidValueError),
        ({"policy": "randm"}, UnknownNameError),
    ],
)
def test_bad_configurations_are_refused_when_they_are_made(
    values: dict[str, int | str], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        CollectConfig(**values)  # type: ignore[arg-type]


def test_bad_environments_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="dmc:walker-walk"):
        collect(CollectConfig(environment="dmc:walker-wolk"), tmp_path / "store", INLINE)
    with pytest.raises(UnknownNameError, match="inline"):
        collect(SMALL, tmp_path / "store", Engine("dask"))  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="--workers"):
        collect(SMALL, tmp_path / "store", Engine(workers=0))
    assert not (tmp_path / "store").exists()


def test_an_address_nobody_answers_at_is_refused_at_once(tmp_path: Path) -> None:
    """In a process of its own: one with Ray up already stays with that."""
    code = """
import sys
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
collect(CollectConfig(size=32), sys.argv[1], Engine(address="127.0.0.1:1"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    last_line = done.stderr.strip().splitlines()[-1]
    assert "ClusterError: no Ray cluster answers at 127.0.0.1:1" in last_line
    assert "--address" in last_line


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises bare exceptions where a busy machine starts it too slowly."""

    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee its logs")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ClusterError, match=r"does not start \(The current node .*--engine inline$"),
        ray_cluster(None),
    ):
        pass
