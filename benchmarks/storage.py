"""What a store costs beside random windows: writing, reading in order, bytes, opening many shards, and frames.

    python benchmarks/storage.py --mib 128 --rounds 3 --shards 10000 --json storage.json

Every peer (``peers.py``) writes the same rows of 768 float16 noise into a new folder and reads them in order into one
buffer, warm, in turns; medians over the rounds. Ours fsyncs and hashes what it writes, nobody else does. The ten
thousand shards are tiny and written without fsync: what is timed is opening the store and its first windows. Frames are
real ones at --size pixels; PNG is Pillow's default (zlib level 6); random windows are of 16 frames, each read from a
store that keeps nothing decoded.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
from noise import noise, noise_manifest, still
from peers import written
from PIL import Image

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Decoded
from pvrpipe.store.windows import WindowSampler

WIDTH = 768
STEPS = 500
WINDOW = 16


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--env", default="dmc:pendulum-swingup")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"peers": throughput(folder, options.mib, options.rounds)}
        print(f"\n{'':28} {'written, MB/s':>14} {'read, MB/s':>12} {'bytes / raw':>12}")
        for peer, row in found["peers"].items():
            print(f"{peer:28} {row['written']:>14,.0f} {row['read']:>12,.0f} {row['bytes']:>12.4f}")
        found["frames"] = frames(folder / "frames", options.env, options.size)
        found["many shards"] = many_shards(folder / "many", options.shards)
    for part in ("frames", "many shards"):
        print()
        for label, value in found[part].items():
            print(f"{label:44} {value:>14,.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def throughput(folder: Path, mib: int, rounds: int) -> dict[str, dict[str, float]]:
    """Writing and reading in order, MB/s of raw rows; and bytes on disk as a share of them."""
    rows = noise((mib << 20) // (2 * WIDTH) // (STEPS + 1) * (STEPS + 1), (WIDTH,))
    wrote: dict[str, list[float]] = {}
    read: dict[str, list[float]] = {}
    size: dict[str, float] = {}
    for turn in range(rounds):
        for peer in written(folder / f"round-{turn}", rows, STEPS):
            wrote.setdefault(peer.name, []).append(peer.write_seconds)
            read.setdefault(peer.name, []).append(peer.timed_scan())
            size[peer.name] = peer.bytes() / rows.nbytes
            peer.close()
        shutil.rmtree(folder / f"round-{turn}")
    megabytes = rows.nbytes / 1e6
    return {
        name: {
            "written": megabytes / statistics.median(wrote[name]),
            "read": megabytes / statistics.median(read[name]),
            "bytes": size[name],
        }
        for name in size
    }


def many_shards(folder: Path, shards: int) -> dict[str, float]:
    """Opening a store of many shards, and what its records weigh; pyarrow reads every footer to count the rows."""
    write_many(folder, shards)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opening = median_seconds(lambda: Store.open(folder))
    store = Store.open(folder)
    started = time.perf_counter()
    WindowSampler(store, ["embedding"], batch=64, length=3, seed=0).batch(0)
    first = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = median_seconds(
        lambda: pyarrow.dataset.dataset(sorted(map(str, folder.glob("shards/*.parquet")))).count_rows()
    )
    return {
        "shards": shards,
        "opening, s": opening,
        "first batch of 64 windows, s": first,
        "pyarrow.dataset over them, s": counted,
        "more memory, MiB": (after - before) / 1024,
        "store.json, bytes per shard": (folder / "store.json").stat().st_size / shards,
        "commit record, bytes": (folder / "shards" / "00000.json").stat().st_size,
    }


def write_many(folder: Path, shards: int) -> None:
    """Shards of three rows each, without fsync."""
    manifest = noise_manifest(shards, 2, (WIDTH,), shard_rows=3)
    rows = noise(3, (WIDTH,))
    fsync, os.fsync = os.fsync, lambda _: None
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                info = EpisodeInfo(plan.first_episode, 2, 0.0, 0, "none")
                writer.write_episode(Episode(info, {"embedding": rows, **still(2)}))
                writer.commit()
        pending.seal()
    os.fsync = fsync


def frames(folder: Path, environment: str, size: int) -> dict[str, float]:
    """Bytes and decoding of real frames, as zstd pages and as PNG, in turns."""
    config = CollectConfig(environment, size=size, episodes=2, max_steps=200, policy="random")
    store = Store.open(collect(config, folder, Engine("inline")).store)
    store._decoded = Decoded(0)  # what was decoded once is not to be found again
    images = np.concatenate([store.read_episode(e, ["frame"])["frame"] for e in range(2)])
    encoded = [as_png(image) for image in images]
    sampler = WindowSampler(store, ["frame"], batch=1, length=WINDOW, seed=0, split=None, backing="mapped")
    seconds: dict[str, list[float]] = {}
    for k in range(40):
        start = int(sampler.pieces(sampler.numbers(k)).start[0])
        turns: dict[str, Callable[[], object]] = {
            "window": lambda k=k: sampler.batch(k),
            "window, PNG": lambda at=start: decoded(encoded[at : at + WINDOW]),
        }
        if k % 8 == 0:
            turns["episode"] = lambda: store.read_episode(0, ["frame"])
            turns["episode, PNG"] = lambda: decoded(encoded[: len(images) // 2])
        for name, turn in turns.items():
            started = time.perf_counter()
            turn()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    png, zstd = sum(map(len, encoded)), page_bytes(store)
    per = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "frames": len(images),
        "zstd pages, bytes per frame": zstd / len(images),
        "PNG, bytes per frame": png / len(images),
        "bytes, zstd pages / PNG": zstd / png,
        "an episode, µs per frame": 2e6 * per["episode"] / len(images),
        "windows of 16, µs per frame": 1e6 * per["window"] / WINDOW,
        "decoding an episode, PNG / zstd pages": per["episode, PNG"] / per["episode"],
        "decoding windows, PNG / zstd pages": per["window, PNG"] / per["window"],
    }


def as_png(image: np.ndarray) -> bytes:
    """A frame as Pillow writes it by default."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(images: list[bytes]) -> np.ndarray:
    """PNGs as one array (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in images])


def page_bytes(store: Store) -> int:
    """What the frames of a store take in its shards."""
    total = 0
    for entry in store.manifest.shards:
        footer = pq.read_metadata(Path(str(store.path), entry.file))
        columns = [
            footer.row_group(g).column(c)
            for g in range(footer.num_row_groups)
            for c in range(footer.num_columns)
        ]
        total += sum(chunk.total_compressed_size for chunk in columns if chunk.path_in_schema == "frame")
    return total


def median_seconds(call: Callable[[], object], times: int = 5) -> float:
    """Of a few calls."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


if __name__ == "__main__":
    main()
