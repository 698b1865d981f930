"""What a store costs beside its rows: opening ten thousand shards, and frames against PNG.

    python benchmarks/storage.py --shards 10000 --json storage.json

The shards are tiny and written without fsync: what is timed is opening the store and its first window.
Frames are real ones, of pendulum-swingup at --size pixels; PNG is Pillow's default (zlib level 6).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from windows import noise_manifest

from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

WIDTH = 768


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = many_shards(Path(folder) / "many", options.shards) | frames(Path(folder) / "f", options.size)
    for name, value in found.items():
        print(f"{name:44} {value:>14,.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def many_shards(folder: Path, shards: int) -> dict[str, Any]:
    """Opening a store of many shards, and what its records weigh."""
    manifest = noise_manifest(shards, 2, WIDTH, shard_rows=3)
    random = np.random.default_rng(0)
    fsync, os.fsync = os.fsync, lambda _: None
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                rows = random.standard_normal((3, WIDTH), np.float32).astype(np.float16)
                writer.write_episode(
                    Episode(EpisodeInfo(plan.first_episode, 2, 0.0, 0, "none"), {"embedding": rows})
                )
                writer.commit()
        pending.seal()
    os.fsync = fsync
    times, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        started = time.perf_counter()
        store = Store.open(folder)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    WindowSampler(store, ["embedding"], batch=64, length=3, seed=0).batch(0)
    first = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "shards": shards,
        "opening, s": statistics.median(times),
        "first batch of 64 windows, s": first,
        "more memory, MiB": (after - before) / 1024,
        "store.json, bytes per shard": (folder / "store.json").stat().st_size / shards,
        "commit record, bytes": (folder / "shards" / "00000.json").stat().st_size,
    }


def frames(folder: Path, size: int) -> dict[str, Any]:
    """Bytes and decoding of real frames, as zstd pages and as PNG."""
    config = CollectConfig(size=size, episodes=1, max_steps=200, policy="random")
    store = Store.open(collect(config, folder, Engine("inline")).store)
    images = store.read_episode(0, ["frame"])["frame"]
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    path = folder / store.manifest.shards[0].file
    footer = pq.read_metadata(path)
    chunks = [footer.row_group(g).column(0) for g in range(footer.num_row_groups)]
    zstd = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == "frame")
    ours, theirs = [], []
    for _ in range(5):
        started = time.perf_counter()
        Store.open(folder).read_episode(0, ["frame"])
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        for data in encoded:
            np.asarray(Image.open(io.BytesIO(data)))
        theirs.append(time.perf_counter() - started)
    png = sum(map(len, encoded))
    return {
        "frames": len(images),
        "zstd pages, bytes per frame": zstd / len(images),
        "PNG, bytes per frame": png / len(images),
        "bytes, zstd pages / PNG": zstd / png,
        "decoding, PNG / zstd pages": statistics.median(theirs) / statistics.median(ours),
    }


if __name__ == "__main__":
    main()
