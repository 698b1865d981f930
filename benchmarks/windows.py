"""Random windows out of a store, against a gather from an array in RAM and the usual ways to keep embeddings.

    python benchmarks/windows.py --rows 100000 --repeats 200 --json windows.json

Every reader returns the same windows of float16 embeddings as a fresh array; all are asked for the same
windows in turns, warm. Medians; a ratio is the median of the ratios of each turn to the RAM gather.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import Manifest, RolloutSpecification
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.gathering import Pieces, RowReader
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

STEPS = 500  # transitions in an episode
Reader = Callable[[NDArray[np.int64]], NDArray[np.float16]]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for kind in ("parquet", "webdataset"):
            stores[kind], embeddings = write_store(
                Path(folder) / kind, options.rows // (STEPS + 1), options.width, kind
            )
        results = [
            measure(stores, embeddings, Path(folder), b, t, options.repeats) for b, t in ((64, 16), (16, 64))
        ]
    for result in results:
        print(f"\n{result['batch']} × {result['length']} × {options.width} float16")
        for name, row in result["readers"].items():
            print(f"  {name:34} {row['windows_per_second']:>12,.0f} windows/s {row['of_ram']:>7.3f} of RAM")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def write_store(
    folder: Path, episodes: int, width: int, shard_format: Any
) -> tuple[Store, NDArray[np.float16]]:
    """A store of noise, and the same rows in RAM."""
    random = np.random.default_rng(0)
    manifest = noise_manifest(episodes, STEPS, width, shard_format=shard_format)
    rows = []
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                    rows.append(random.standard_normal((STEPS + 1, width), np.float32).astype(np.float16))
                    writer.write_episode(
                        Episode(EpisodeInfo(number, STEPS, 0.0, 0, "none"), {"embedding": rows[-1]})
                    )
                writer.commit()
        pending.seal()
    return Store.open(folder), np.concatenate(rows)


def noise_manifest(
    episodes: int, steps: int, width: int, shard_rows: int | None = None, **kind: Any
) -> Manifest:
    """A store of nothing but embeddings."""
    specification = RolloutSpecification(
        environment="noise",
        size=1,
        camera=0,
        action_repeat=1,
        episodes=episodes,
        max_steps=steps,
        policy="none",
        seed=0,
        control_timestep=1.0,
        action_low=(),
        action_high=(),
        state_names=(),
        renderer="none",
        versions={},
    )
    columns = with_bounds((column("embedding", "float16", (width,)),))
    return new_manifest(specification, columns, plan_shards(episodes, steps + 1, shard_rows), **kind)


def measure(
    stores: dict[str, Store],
    embeddings: NDArray[np.float16],
    folder: Path,
    batch: int,
    length: int,
    repeats: int,
) -> dict[str, Any]:
    """All readers in turns on the same windows."""
    sampler = WindowSampler(stores["parquet"], ["embedding"], batch=batch, length=length, seed=0)
    steps = np.arange(length)
    readers: dict[str, Reader | None] = {
        "array in RAM, gathered": lambda starts: embeddings[starts[:, None] + steps],
        "pvrpipe, mapped Parquet": own_reader(stores["parquet"], length),
        "pvrpipe, mapped WebDataset": own_reader(stores["webdataset"], length),
        ".npy, memory-mapped": npy_reader(folder, embeddings, steps),
        "HDF5, contiguous": hdf5_reader(folder, embeddings, length, None),
        "HDF5, chunks of 64 rows": hdf5_reader(folder, embeddings, length, 64),
        "Lance, take": lance_reader(folder, embeddings, steps),
        "Parquet list, pyarrow's defaults": list_reader(folder, embeddings, length),
    }
    readers = {name: read for name, read in readers.items() if read is not None}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for k in range(repeats):
        starts = sampler.pieces(sampler.numbers(k)).start
        few = k >= repeats // 20  # the slow ones are asked less often
        for name, read in readers.items():
            if read is None or (name.startswith("Parquet list") and few):
                continue
            started = time.perf_counter()
            found = read(starts)
            seconds[name].append(time.perf_counter() - started)
            if k == 0:
                assert np.array_equal(found, embeddings[starts[:, None] + steps]), name
    ram = seconds["array in RAM, gathered"]
    return {
        "batch": batch,
        "length": length,
        "readers": {
            name: {
                "windows_per_second": batch / statistics.median(times),
                "of_ram": statistics.median(r / t for r, t in zip(ram, times, strict=False)),
            }
            for name, times in seconds.items()
        },
    }


def own_reader(store: Store, length: int) -> Reader:
    """What a training run calls."""
    rows = RowReader(store, ("embedding",), "mapped")
    return lambda starts: rows.windows("embedding", Pieces.unbroken(starts, length))


def hdf5_reader(
    folder: Path, embeddings: NDArray[np.float16], length: int, chunk: int | None
) -> Reader | None:
    """One dataset of an HDF5 file; None where h5py is not installed."""
    if not find_spec("h5py"):
        return None
    import h5py

    chunks = (chunk, embeddings.shape[1]) if chunk else None
    with h5py.File(folder / f"{chunk}.h5", "w") as file:
        file.create_dataset("embedding", data=embeddings, chunks=chunks)
    data = h5py.File(folder / f"{chunk}.h5")["embedding"]
    return lambda starts: np.stack([data[start : start + length] for start in starts.tolist()])


def lance_reader(folder: Path, embeddings: NDArray[np.float16], steps: NDArray[np.int64]) -> Reader | None:
    """A Lance data set of fixed-size lists; None where pylance is not installed."""
    if not find_spec("lance"):
        return None
    import lance

    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    if not (folder / "lance").exists():
        lance.write_dataset(pa.table({"embedding": values}), folder / "lance")
    data = lance.dataset(folder / "lance")

    def read(starts: NDArray[np.int64]) -> NDArray[np.float16]:
        taken = data.take((starts[:, None] + steps).ravel().tolist(), columns=["embedding"])
        rows = taken.column("embedding").combine_chunks().flatten().to_numpy()
        return rows.reshape(len(starts), len(steps), embeddings.shape[1])

    return read


def npy_reader(folder: Path, embeddings: NDArray[np.float16], steps: NDArray[np.int64]) -> Reader:
    """One .npy file, mapped."""
    np.save(folder / "embeddings.npy", embeddings)
    mapped = np.load(folder / "embeddings.npy", mmap_mode="r")
    return lambda starts: np.asarray(mapped[starts[:, None] + steps])


def list_reader(folder: Path, embeddings: NDArray[np.float16], length: int) -> Reader:
    """A fixed-size list column as pyarrow writes it by default, read by row group."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    pq.write_table(pa.table({"embedding": values}), folder / "list.parquet", row_group_size=1024)
    file = pq.ParquetFile(folder / "list.parquet")

    def read(starts: NDArray[np.int64]) -> NDArray[np.float16]:
        out = np.empty((len(starts), length, embeddings.shape[1]), np.float16)
        for i, start in enumerate(starts.tolist()):
            groups = range(start // 1024, (start + length - 1) // 1024 + 1)
            chunk = file.read_row_groups(list(groups)).column("embedding").combine_chunks()
            rows = chunk.flatten().to_numpy().reshape(-1, embeddings.shape[1])
            out[i] = rows[start - groups[0] * 1024 :][:length]
        return out

    return read


if __name__ == "__main__":
    main()
