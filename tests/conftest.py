"""Fixtures that many tests share: small real stores, written through the store's own interface."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch

from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.schemas.specifications import RolloutSpecification
from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards

from .hub import Hub, serving_hub
from .serving import Served, serving

if TYPE_CHECKING:
    from pvrpipe.pipeline.encoders import EncoderRequest

WriteStore = Callable[..., Path]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers whatever ran before it, and in whichever process."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """And whether or not a fixture that it shares with others had to be made first."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Checkpoints that tests convert go to a folder of the tests; processes that they start inherit it."""
    os.environ["PVRPIPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def rollout_specification(
    episodes: int, max_steps: int, seed: int = 0, size: int = 8
) -> RolloutSpecification:
    return RolloutSpecification(
        environment="test:walk",
        size=size,
        camera=0,
        action_repeat=1,
        episodes=episodes,
        max_steps=max_steps,
        policy="random",
        seed=seed,
        control_timestep=0.1,
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        state_names=("x", "y", "z"),
        renderer="none",
        versions={},
    )


def random_episode(number: int, length: int, seed: int = 0, size: int = 8) -> Episode:
    """An episode of noise with frames, action, reward, state and physics, aligned as the contract says."""
    random = np.random.default_rng((seed, number))
    action = random.uniform(-1, 1, (length + 1, 2)).astype(np.float32)
    reward = random.normal(size=length + 1).astype(np.float32)
    action[-1], reward[0] = 0, 0
    arrays = {
        "frame": random.integers(0, 256, (length + 1, size, size, 3), np.uint8),
        "action": action,
        "reward": reward,
        "state": random.normal(size=(length + 1, 3)).astype(np.float32),
        "physics": random.normal(size=(length + 1, 5)),
    }
    info = EpisodeInfo(
        number,
        length,
        float(reward.sum(dtype=np.float64)),
        seed + number,
        "random",
        terminated=number % 3 == 0,
    )
    return Episode(info, arrays)


def draft(
    episodes: Sequence[Episode],
    seed: int = 0,
    shard_rows: int | None = None,
    shard_format: Literal["parquet", "webdataset"] = "parquet",
) -> Manifest:
    size = episodes[0].arrays["frame"].shape[1]
    longest = max(len(e) for e in episodes)
    columns = with_bounds(column(n, str(a.dtype), a.shape[1:]) for n, a in episodes[0].arrays.items())
    specification = rollout_specification(len(episodes), longest - 1, seed, size)
    plan = plan_shards(len(episodes), longest, shard_rows)
    return new_manifest(specification, columns, plan, shard_format)


def write_store(
    folder: Path,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    size: int = 8,
    shard_rows: int | None = None,
    shard_format: Literal["parquet", "webdataset"] = "parquet",
) -> Path:
    """Write a rollout store of random episodes; returns its folder."""
    episodes = [random_episode(i, length, seed, size) for i, length in enumerate(lengths)]
    return write_episodes(folder, episodes, seed, shard_rows, shard_format)


def write_episodes(
    folder: Path,
    episodes: Sequence[Episode],
    seed: int = 0,
    shard_rows: int | None = None,
    shard_format: Literal["parquet", "webdataset"] = "parquet",
) -> Path:
    """Write a rollout store of these episodes; returns its folder."""
    manifest = draft(episodes, seed, shard_rows, shard_format)
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(pending.folder, manifest, plan) as writer:
                for episode in episodes[plan.first_episode : plan.first_episode + plan.episodes]:
                    writer.write_episode(episode)
                writer.commit()
        pending.seal()
    return folder


@pytest.fixture
def shard_format() -> str:
    """The format of stores that a test writes; the tests of storage run over both."""
    return "parquet"


@pytest.fixture
def write_rollouts(tmp_path: Path, shard_format: Any) -> WriteStore:
    """Write a rollout store of random episodes; returns its folder."""

    def write(
        lengths: Sequence[int] = (30, 41, 25, 30, 33, 28),
        *,
        name: str = "rollouts",
        seed: int = 0,
        size: int = 8,
        shard_rows: int | None = None,
        shard_format: Any = shard_format,
    ) -> Path:
        return write_store(
            tmp_path / name, lengths, seed=seed, size=size, shard_rows=shard_rows, shard_format=shard_format
        )

    return write


@pytest.fixture
def write_embeddings(tmp_path: Path) -> Callable[..., Path]:
    """Write an embedding store of the toy environment, see :func:`tests.toy.write_toy`; returns its folder."""
    from .toy import write_toy

    return partial(write_toy, tmp_path)


@pytest.fixture
def autoencoder(rollouts: Path, tmp_path: Path) -> EncoderRequest:
    """A real encoder that is trained on the test's own ``rollouts``."""
    from pvrpipe.pipeline.encoders import EncoderRequest
    from pvrpipe.pipeline.pretraining import pretrain

    from .small import SMALL

    pretrain(rollouts, tmp_path / "ae", SMALL)
    return EncoderRequest(str(tmp_path / "ae"), device="cpu", batch=16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, as it does not exist yet."""
    monkeypatch.setenv("PVRPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Served]:
    """A real HTTP server over the test's folder."""
    with serving(tmp_path) as served:
        yield served


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server in this process; its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty bucket of this test's own, as a URL."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import fsspec

    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """An empty Hub that the client talks to, without Xet, as somebody with a token."""
    import fsspec
    from huggingface_hub import constants

    client = fsspec.get_filesystem_class("hf")
    client.clear_instance_cache()
    with serving_hub() as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield served
    client.clear_instance_cache()
