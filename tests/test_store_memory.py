"""A reader's memory does not grow with the store: what was decoded is let go, what is mapped is the kernel's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import DECODED_BYTES, Decoded
from pvrpipe.store.windows import WindowSampler
from pvrpipe.store.writing import ShardWriter

from .conftest import rollout_specification

STEPS, EPISODES, SIZE = 20, 40, 224
DECODED_EPISODE = (STEPS + 1) * SIZE * SIZE * 3


@pytest.fixture
def black_frames(tmp_path: Path) -> Store:
    """Forty shards of large frames: 126 MB decoded, nothing on disk."""
    columns = with_bounds((column("frame", "uint8", (SIZE, SIZE, 3)),))
    plan = plan_shards(EPISODES, STEPS + 1)
    manifest = new_manifest(rollout_specification(EPISODES, STEPS, size=SIZE), columns, plan)
    frames = np.zeros((STEPS + 1, SIZE, SIZE, 3), np.uint8)
    with PendingStore.begin(tmp_path / "black", manifest) as pending:
        for shard in plan:
            with ShardWriter(pending.folder, manifest, shard) as writer:
                info = EpisodeInfo(shard.first_episode, STEPS, 0.0, 0, "none", terminated=False)
                writer.write_episode(Episode(info, {"frame": frames}))
                writer.commit()
        pending.seal()
    return Store.open(tmp_path / "black")


def test_decoded_frames_of_many_shards_are_let_go(black_frames: Store) -> None:
    assert EPISODES * DECODED_EPISODE > 1.5 * DECODED_BYTES
    before = pa.total_allocated_bytes()  # pages are decompressed into Arrow's memory
    for episode in range(EPISODES):
        black_frames.read_episode(episode, ["frame"])
    assert 0 < pa.total_allocated_bytes() - before <= DECODED_BYTES + (4 << 20)
    windows = WindowSampler(black_frames, ["frame"], batch=4, length=5, seed=0, split=None, backing="mapped")
    for k in range(25):
        windows.batch(k)
    assert pa.total_allocated_bytes() - before <= DECODED_BYTES + (4 << 20)


def test_what_was_used_longest_ago_goes_first() -> None:
    decoded = Decoded(limit=250)
    groups = {(0, "frame", g): np.full(100, g, np.uint8) for g in range(3)}
    for group, rows in list(groups.items())[:2]:
        decoded.keep(group, rows)
    assert decoded.get((0, "frame", 0)) is groups[0, "frame", 0]
    decoded.keep((0, "frame", 2), groups[0, "frame", 2])
    assert decoded.get((0, "frame", 1)) is None
    assert decoded.get((0, "frame", 0)) is not None
    decoded.keep((1, "frame", 0), np.zeros(251, np.uint8))
    assert decoded.get((1, "frame", 0)) is None


def test_mapped_windows_take_no_memory_but_their_batch(tmp_path: Path) -> None:
    rows, episodes = 501, 128
    columns = with_bounds((column("state", "float32", (512,)),))
    plan = plan_shards(episodes, rows)
    manifest = new_manifest(rollout_specification(episodes, rows - 1), columns, plan)
    values = np.ones((rows, 512), np.float32)
    with PendingStore.begin(tmp_path / "big", manifest) as pending:
        for shard in plan:
            with ShardWriter(pending.folder, manifest, shard) as writer:
                for number in range(shard.first_episode, shard.first_episode + shard.episodes):
                    info = EpisodeInfo(number, rows - 1, 0.0, 0, "none", terminated=False)
                    writer.write_episode(Episode(info, {"state": values}))
                writer.commit()
        pending.seal()
    windows = WindowSampler(Store.open(tmp_path / "big"), ["state"], batch=64, length=64, seed=0, split=None)
    batch = windows.batch(0)  # the first call maps and imports
    before = anonymous()
    for k in range(1, 40):
        batch = windows.batch(k)
    assert 39 * batch["state"].nbytes > 2 * values.nbytes * episodes
    assert anonymous() - before < 4 * batch["state"].nbytes < values.nbytes * episodes / 3


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) << 10
