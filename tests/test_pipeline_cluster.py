"""Embedding on a Ray cluster of several nodes, on this machine: actors, nodes and drivers die, nodes join."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretraining import (
    CHECKPOINT_EVERY,
    WEIGHTS_FILE,
    PretrainConfig,
    PretrainResult,
    pretrain,
)
from pvrpipe.pipeline.ray_engine import run_one
from pvrpipe.schemas.errors import EncodingError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.files import sha256_of
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .brittle import brittle, number_of
from .clusters import committed
from .conftest import WriteStore

LENGTHS = (30,) * 16
REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(LENGTHS, size=24)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that does no work, and a node with one processor; its workers know the brittle network."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started.add_node(num_cpus=1)
    connect(started)
    yield started
    ray.shutdown()
    started.shutdown()


def connect(cluster: Cluster) -> None:
    ray.init(
        cluster.address,
        log_to_driver=False,
        runtime_env={
            "env_vars": {"PYTHONPATH": str(REPOSITORY)},
            "worker_process_setup_hook": "tests.brittle_hook.known",
        },
    )


def expected(request: EncoderRequest, rollouts: Path, folder: Path) -> str:
    return embed(rollouts, [(request, folder)], EmbedConfig(engine="inline"))[0].id


def in_a_thread(rollouts: Path, request: EncoderRequest, folder: Path) -> tuple[threading.Thread, list[Any]]:
    done: list[Any] = []
    work = lambda: done.extend(embed(rollouts, [(request, folder)], EmbedConfig()))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    return thread, done


def test_a_node_joins_and_a_node_dies(cluster: Cluster, rollouts: Path, tmp_path: Path) -> None:
    request = brittle(tmp_path / "pvr", wait=0.5)
    (first,) = cluster.worker_nodes
    thread, done = in_a_thread(rollouts, request, tmp_path / "e")
    committed(tmp_path / "e", 1)
    cluster.add_node(num_cpus=1)
    committed(tmp_path / "e", 3)
    cluster.remove_node(first, allow_graceful=False)
    thread.join(300)
    assert done, "embedding did not end"
    assert done[0].id == expected(request, rollouts, tmp_path / "inline")
    assert verify(tmp_path / "e") == []


def test_an_actor_dies_and_its_shard_is_done_again(cluster: Cluster, rollouts: Path, tmp_path: Path) -> None:
    frame = number_of(Store.open(rollouts).read_episode(5)["frame"][7])
    request = brittle(tmp_path / "pvr", die_at=frame, lives=2)
    (made,) = embed(rollouts, [(request, tmp_path / "e")], EmbedConfig())
    assert not list((tmp_path / "pvr" / "lives").iterdir())  # it did die, twice
    assert made.id == expected(request, rollouts, tmp_path / "inline")
    assert verify(tmp_path / "e") == []
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_shard_that_always_takes_its_worker_along_does_not_stop_the_others(
    cluster: Cluster, rollouts: Path, tmp_path: Path
) -> None:
    frame = number_of(Store.open(rollouts).read_episode(5)["frame"][7])
    request = brittle(tmp_path / "pvr", die_at=frame, lives=20)
    with pytest.raises(EncodingError, match=r"3 workers died at shard 5 \(episodes 5 to 5\); give them more"):
        embed(rollouts, [(request, tmp_path / "e")], EmbedConfig())
    assert len(list((tmp_path / "pvr" / "lives").iterdir())) == 17
    assert {p.stem for p in (tmp_path / "e" / "shards").glob("*.json")} == {
        f"{n:05d}" for n in range(16) if n != 5
    }


def dying_once(
    mark: Path, rollouts: Path, out: Path, progress: Progress = silent, again: bool = False
) -> PretrainResult:
    """Pretraining with --overwrite in a process that is killed behind its first checkpoint, the first time."""

    def tell(done: float, total: float, note: str = "") -> None:
        if done > CHECKPOINT_EVERY and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        progress(done, total, note)

    config = PretrainConfig(size=16, updates=CHECKPOINT_EVERY + 20)
    return pretrain(rollouts, out, config, overwrite=True, progress=tell, again=again)


def test_pretraining_whose_worker_dies_goes_on_from_its_checkpoint(
    cluster: Cluster, rollouts: Path, tmp_path: Path
) -> None:
    told: list[float] = []
    work = partial(dying_once, tmp_path / "mark", rollouts, tmp_path / "there")
    made = run_one(work, None, "cpu", lambda done, total, note="": told.append(done))
    assert made.resumed_updates == CHECKPOINT_EVERY
    assert told == sorted(told)
    (tmp_path / "mark-here").touch()
    dying_once(tmp_path / "mark-here", rollouts, tmp_path / "here")
    assert sha256_of(tmp_path / "there" / WEIGHTS_FILE) == sha256_of(tmp_path / "here" / WEIGHTS_FILE)


DRIVER = """
import sys, ray
from pathlib import Path
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
import tests.brittle
ray.init(sys.argv[1], log_to_driver=False, runtime_env={
    "env_vars": {"PYTHONPATH": sys.argv[2]}, "worker_process_setup_hook": "tests.brittle_hook.known"})
request = EncoderRequest(sys.argv[4], "random:0", device="cpu", batch=16)
embed(sys.argv[3], [(request, Path(sys.argv[5]))], EmbedConfig())
"""


def test_the_driver_dies_and_another_goes_on(cluster: Cluster, rollouts: Path, tmp_path: Path) -> None:
    request = brittle(tmp_path / "pvr", wait=0.3)
    arguments = [cluster.address, REPOSITORY, rollouts, request.pvr, tmp_path / "e"]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    committed(tmp_path / "e", 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    (result,) = embed(rollouts, [(request, tmp_path / "e")], EmbedConfig())
    assert result.id == expected(request, rollouts, tmp_path / "inline")
    assert 2 <= result.resumed_shards < 16
    assert verify(tmp_path / "e") == []
