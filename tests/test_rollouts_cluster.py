"""Collection on a Ray cluster of several nodes, on this machine: nodes join, nodes die, drivers die."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.store.verifying import verify

from .clusters import committed

CONFIG = CollectConfig(size=64, episodes=24, max_steps=20, policy="random", seed=5)
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that does no work, and a node with one processor."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return collect(CONFIG, tmp_path_factory.mktemp("inline") / "store", Engine("inline")).id


def test_a_node_joins_and_a_node_dies(cluster: Cluster, expected: str, tmp_path: Path) -> None:
    """What the dead node was about is done elsewhere; the node that joined does its share."""
    done: list[Any] = []
    engine = Engine(address=cluster.address)
    thread = threading.Thread(target=lambda: done.append(collect(CONFIG, tmp_path / "store", engine)))
    (first,) = cluster.worker_nodes
    thread.start()
    committed(tmp_path / "store", 1)
    cluster.add_node(num_cpus=1)
    committed(tmp_path / "store", 3)
    cluster.remove_node(first, allow_graceful=False)
    thread.join(300)
    assert done, "collection did not end"
    assert done[0].id == expected
    assert verify(tmp_path / "store") == []


DRIVER = """
import sys
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
config = CollectConfig(size=64, episodes=24, max_steps=20, policy="random", seed=5)
print(collect(config, sys.argv[1], Engine(address=sys.argv[2])).resumed_shards)
"""


def test_the_driver_dies_and_another_goes_on(cluster: Cluster, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "store"), cluster.address]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    committed(tmp_path / "store", 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    result = collect(CONFIG, tmp_path / "store", Engine(address=cluster.address))
    assert result.id == expected
    assert 2 <= result.resumed_shards < 24
    assert verify(tmp_path / "store") == []
