"""A reader at work: the memory it takes beyond its batch, and how long a consumer waits for batches read ahead.

    python benchmarks/reader.py --gib 4 --json reader.json

Memory is anonymous memory (RssAnon), sampled after every batch in a process of its own that draws random windows of
768 float16 from all over the store; mapped pages of files are not counted, the kernel takes them back at will. The
second store holds frames of 224 px, which have to be decoded. The first is read once more by a process that the kernel
gives a quarter of the store's size (in a memory control group, which takes root), its files out of the page cache
before. The consumer uses each batch of 64 × 16 windows for 5 ms, sleeping (as one waits for a GPU) or computing on
the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noise import noise, write_store

from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.loading import WindowLoader
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

CONTROL_GROUP = Path("/sys/fs/cgroup/memory/pvrpipe-reader"), Path("/sys/fs/cgroup/pvrpipe-reader")  # v1, v2
BUSY = 0.005  # seconds that a consumer takes for a batch
STEPS = 500
SIZE = 224


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0, help="of embeddings, and of decoded frames")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        episodes = int(options.gib * (1 << 30)) // (2 * 768 * (STEPS + 1))
        block = noise((STEPS + 1) * 64, (768,))
        write_store(folder / "embeddings", np.resize(block, (episodes * (STEPS + 1), 768)), STEPS)
        write_frames(folder / "frames", int(options.gib * (1 << 30)) // (SIZE * SIZE * 3 * 101))
        found = {
            "embeddings": alone(folder / "embeddings", "embedding", options.batches),
            "frames, decoded when read": alone(folder / "frames", "frame", options.batches // 10),
            "embeddings, four times the memory": confined(folder / "embeddings", options.batches),
            "waiting": waiting(folder / "embeddings", options.batches),
        }
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def write_frames(folder: Path, episodes: int) -> None:
    """Episodes of 100 steps of frames that move and compress about as rendered ones do."""
    draft = Store.open(folder.with_name("embeddings")).manifest
    columns = with_bounds((column("frame", "uint8", (SIZE, SIZE, 3)), column("reward", "float32", ())))
    manifest = new_manifest(draft.rollouts, columns, plan_shards(episodes, 101))
    still = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    still[32:] = 90  # an eighth is noise that moves
    frames = np.stack([np.roll(still, step, axis=0) for step in range(101)])
    arrays = {"frame": frames, "reward": np.zeros(101, np.float32)}
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                    writer.write_episode(Episode(EpisodeInfo(number, 100, 0.0, 0, "none"), arrays))
                writer.commit()
        pending.seal()


def alone(folder: Path, name: str, batches: int) -> dict[str, Any]:
    """What :func:`memory` says in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (folder, name, batches))


def memory(folder: Path, name: str, batches: int) -> dict[str, Any]:
    """Anonymous memory of a reader, beyond its batch and beyond what the process had before."""
    before = anonymous()
    sampler = WindowSampler(
        Store.open(folder), [name], batch=64, length=16, seed=0, split=None, backing="mapped"
    )
    most = touched = 0
    for k in range(batches):
        batch = sampler.batch(k)[name]
        touched += batch.nbytes
        most = max(most, anonymous() - before - batch.nbytes)
    whole = sampler.store.manifest.rows * sampler.store.column(name).width
    return {
        "store, MiB (decoded)": whole >> 20,
        "shards": len(sampler.store.manifest.shards),
        "read, MiB": touched >> 20,
        "batch, MiB": batch.nbytes / (1 << 20),
        "anonymous memory beyond it, MiB": most / (1 << 20),
    }


def confined(folder: Path, batches: int) -> dict[str, Any] | str:
    """What :func:`memory` says where the store does not fit into the memory that the kernel grants."""
    limit = sum(file.stat().st_size for file in folder.glob("shards/*")) // 4
    try:
        with (
            control_group(limit) as group,
            multiprocessing.get_context("spawn").Pool(1, initializer=join, initargs=(group,)) as pool,
        ):
            for file in folder.glob("shards/*"):
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            found = pool.apply_async(memory, (folder, "embedding", batches)).get(timeout=300)
            return {**found, "memory granted, MiB": limit >> 20, "seconds": time.perf_counter() - began}
    except OSError as error:
        return f"not measured: {error}"


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A memory control group of ``limit`` bytes."""
    group = CONTROL_GROUP[0] if CONTROL_GROUP[0].parent.is_dir() else CONTROL_GROUP[1]
    group.mkdir(exist_ok=True)
    try:
        name = "memory.limit_in_bytes" if group == CONTROL_GROUP[0] else "memory.max"
        (group / name).write_text(str(limit))
        yield group
    finally:
        time.sleep(0.5)  # until the process that was in it is gone
        group.rmdir()


def join(group: Path) -> None:
    """Put this process into a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not tell RssAnon")


def waiting(folder: Path, batches: int) -> dict[str, float]:
    """Share of a consumer's time that it waits, once warm; consumers in turns, the median of five rounds."""
    shares: dict[str, list[float]] = {"sleeping": [], "computing": []}
    sampler = WindowSampler(Store.open(folder), ["embedding"], batch=64, length=16, seed=0, split=None)
    torch.set_num_threads(1)
    for _ in range(5):
        for name, use in {"sleeping": sleep, "computing": compute}.items():
            shares[name].append(share(WindowLoader(sampler, torch.device("cpu")), use, batches))
    return {f"share of the time, {name}": statistics.median(found) for name, found in shares.items()}


def share(load: WindowLoader, use: Callable[[], None], batches: int) -> float:
    """Of a consumer that uses each batch."""
    for k in range(batches):
        if k == batches // 4:  # the first pages of every shard have been touched
            load.waited, started = 0.0, time.perf_counter()
        load(k)
        use()
    return load.waited / (time.perf_counter() - started)


def sleep() -> None:
    """As one waits for a GPU."""
    time.sleep(BUSY)


def compute() -> None:
    """One thread of matrix products."""
    until = time.perf_counter() + BUSY
    a = torch.ones(256, 256)
    while time.perf_counter() < until:
        a @ a


if __name__ == "__main__":
    main()
