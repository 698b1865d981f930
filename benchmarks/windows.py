"""Random windows out of a store, against a gather from an array in RAM and the usual ways to keep embeddings.

    python benchmarks/windows.py --mib 256 --repeats 100 --json windows.json

Every peer (``peers.py``) returns the same windows of float16 embeddings as a fresh array; all are asked for the same
windows in turns, in random order, five batches in a row. Medians; a ratio is the median of the ratios of each turn to
our Parquet store and to the RAM gather of that turn. A slow peer is asked until it has taken its share of seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from noise import Embeddings, noise
from peers import Own, Peer, Ram, Starts, written

from pvrpipe.store.windows import WindowSampler

#: batch, length, shape of a row, transitions in an episode
SETTINGS = ((64, 16, (768,), 500), (16, 64, (768,), 500), (16, 16, (196, 384), 100))
SHARE = 4.0  # seconds for one peer in one setting,
AT_LEAST = 3  # but that many turns
BLOCK = 5  # batches in a turn
SLOW = 0.1  # seconds; a peer that takes longer is asked for one batch in a turn


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256, help="of embeddings")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for shape, steps in dict.fromkeys((shape, steps) for _, _, shape, steps in SETTINGS):
        episodes = (options.mib << 20) // (2 * int(np.prod(shape)) * (steps + 1))
        rows = noise(episodes * (steps + 1), shape)
        with tempfile.TemporaryDirectory() as folder:
            peers = [peer for peer in written(Path(folder), rows, steps) if peer.has_windows]
            for batch, length, wanted, _ in SETTINGS:
                if wanted == shape:
                    results.append(measure(peers, rows, batch, length, options.repeats))
                    show(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(peers: list[Peer], rows: Embeddings, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """All peers in turns on the same windows, which end before the last row of their episode."""
    store = next(peer.store for peer in peers if isinstance(peer, Own))
    sampler = WindowSampler(store, ["embedding"], batch=batch, length=length + 1, seed=0, split=None)
    order = np.random.default_rng(0)
    turns: list[dict[str, float]] = []
    spent = dict.fromkeys([peer.name for peer in peers], 0.0)
    for turn in range(repeats):
        blocks = range(BLOCK * turn, BLOCK * (turn + 1))
        starts = [sampler.pieces(sampler.numbers(k)).start for k in blocks]
        seconds = {}
        for peer in order.permutation(np.array(peers, object)):
            compared_with = isinstance(peer, Ram | Own)  # these two are in every turn
            if spent[peer.name] > SHARE and turn >= AT_LEAST and not compared_with:
                continue
            if turn == 0:
                found = peer.timed(starts[0], length)[1]
                assert np.array_equal(found, rows[starts[0][:, None] + np.arange(length)]), peer.name
            seconds[peer.name] = block(peer, starts, length)
            spent[peer.name] += BLOCK * seconds[peer.name]
        turns.append(seconds)
    return {
        "batch": batch,
        "length": length,
        "shape": list(rows.shape[1:]),
        "peers": {peer.name: row(peer.name, turns, batch) for peer in peers},
    }


def block(peer: Peer, starts: list[Starts], length: int) -> float:
    """Seconds for a batch, as a training run asks for them: one after the other, the first to get going."""
    first = peer.timed(starts[0], length)[0]
    if first > SLOW:
        return first
    return statistics.median(peer.timed(at, length)[0] for at in starts[1:])


def row(name: str, turns: list[dict[str, float]], batch: int) -> dict[str, float]:
    """What is told of a peer."""
    asked = [turn for turn in turns if name in turn]
    return {
        "windows_per_second": batch / statistics.median(turn[name] for turn in asked),
        "of_ram": statistics.median(turn[Ram.name] / turn[name] for turn in asked),
        "ours_is_faster_by": statistics.median(turn[name] / turn[Own.name] for turn in asked),
        "asked": len(asked),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table of a setting."""
    shape = " × ".join(map(str, result["shape"]))
    print(f"\n{result['batch']} × {result['length']} windows of {shape} float16")
    print(f"  {'':28} {'windows/s':>12} {'of RAM':>8} {'ours / it':>10} {'asked':>6}")
    for name, found in result["peers"].items():
        print(
            f"  {name:28} {found['windows_per_second']:>12,.1f} {found['of_ram']:>8.4f} "
            f"{found['ours_is_faster_by']:>10.2f} {found['asked']:>6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
