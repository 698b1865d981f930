"""A rollout store as large as a benchmark needs, of few frames: one episode dealt out again and again.

    python benchmarks/grow.py STORE OUT --episodes 40 --rows 1001

Rendering is what takes time in collecting; an embedding stage is as busy with frames that it has seen before.
Each row is one of STORE's first episode, in turn, so a shard is compressed as one that was collected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.writing import ShardWriter

BOUNDS = ("episode", "step", "is_first", "is_last", "is_terminal")  # a writer fills them in


def main() -> None:
    """Write the store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="of which the first episode is dealt out")
    parser.add_argument("out", type=Path, help="folder of the new one")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1001, help="of an episode")
    options = parser.parse_args()
    grow(Store.open(options.store, kind="rollouts"), options.out, options.episodes, options.rows)


def grow(store: Store, out: Path, episodes: int, rows: int) -> None:
    """Episode after episode, each beginning where the one before it ended."""
    names = [name for name in store.columns if name not in BOUNDS]
    seen = store.read_episode(0, names)
    size = {"episodes": episodes, "max_steps": rows - 1}
    plan = plan_shards(episodes, rows)
    manifest = new_manifest(store.manifest.rollouts.model_copy(update=size), store.manifest.columns, plan)
    with PendingStore.begin(out, manifest) as pending:
        for shard in pending.todo:
            with ShardWriter(pending.folder, manifest, shard) as writer:
                for number in range(shard.first_episode, shard.first_episode + shard.episodes):
                    writer.write_episode(dealt(seen, number, rows))
                writer.commit()
        pending.seal()


def dealt(seen: dict[str, np.ndarray], number: int, rows: int) -> Episode:
    """Episode ``number`` of ``rows`` rows."""
    turn = np.arange(number * rows, (number + 1) * rows) % len(seen["frame"])
    arrays = {name: values[turn] for name, values in seen.items()}
    arrays["reward"][0], arrays["action"][-1] = 0, 0
    info = EpisodeInfo(
        episode=number,
        length=rows - 1,
        episode_return=float(arrays["reward"].sum(dtype=np.float64)),
        seed=number,
        policy="dealt",
    )
    return Episode(info, arrays)


if __name__ == "__main__":
    main()
