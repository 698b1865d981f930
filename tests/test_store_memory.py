"""A reader's memory does not grow with the store: what was decoded is let go, what is mapped is the kernel's."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.mapping import map_file
from pvrpipe.store.paging import BLOCK, PageRequests, available_memory
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
    windows = WindowSampler(black_frames, ["frame"], batch=4, length=5, seed=0, split=None, backing="mapped")
    tracemalloc.start()  # NumPy tells it of its arrays
    try:
        for episode in range(EPISODES):
            black_frames.read_episode(episode, ["frame"])
        assert tracemalloc.get_traced_memory()[0] <= DECODED_BYTES + (4 << 20)
        for k in range(25):
            windows.batch(k)
        assert DECODED_BYTES // 2 < tracemalloc.get_traced_memory()[0] <= DECODED_BYTES + (4 << 20)
    finally:
        tracemalloc.stop()


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


def resident(data: np.ndarray) -> np.ndarray:
    """Which pages of a mapped file the page cache holds."""
    pages = np.zeros(-(-data.nbytes // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(data.ctypes.data, data.nbytes, pages.ctypes.data) == 0
    return pages % 2 == 1


@pytest.fixture
def cold_file(tmp_path: Path) -> np.ndarray:
    """Sixty-four blocks on disk, none of them in the page cache."""
    path = tmp_path / "cold"
    with path.open("wb") as file:
        file.write(os.urandom(64 * BLOCK))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    data = map_file(path)
    if resident(data).any():
        pytest.skip("this file system keeps files in memory")
    return data


def one(value: int) -> np.ndarray:
    return np.array([value])


def test_runs_that_are_asked_for_are_read_and_nothing_else(cold_file: np.ndarray) -> None:
    requests = PageRequests(np.array([cold_file.nbytes]), cached=cold_file.nbytes)
    address, length = one(cold_file.ctypes.data), one(BLOCK)
    requests.ask(one(0), address, one(3 * BLOCK + 5), length)  # lies in blocks 3 and 4
    requests.ask(one(0), address, one(63 * BLOCK), 2 * length)  # ends behind the array
    wanted = np.repeat(np.isin(np.arange(64), (3, 4, 63)), BLOCK // mmap.PAGESIZE)
    until = time.monotonic() + 20
    while not resident(cold_file)[wanted].all() and time.monotonic() < until:
        time.sleep(0.01)
    assert resident(cold_file)[wanted].all()
    assert not resident(cold_file)[~wanted].any()


def test_memory_is_what_the_control_group_leaves() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= total
    group = Path(f"/sys/fs/cgroup/memory/pvrpipe-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        join = f"open('{group}/cgroup.procs', 'w').write('0')"
        ask = "from pvrpipe.store.paging import available_memory; print(available_memory())"
        command = [sys.executable, "-c", f"{join}; {ask}"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert (1 << 30) < int(told) < (2 << 30)
    finally:
        time.sleep(0.2)
        group.rmdir()
