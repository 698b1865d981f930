"""The embedding stage against the bare network on a resident batch: same precision, device and threads.

    python benchmarks/embed.py --pvr resnet18 --frames 512 --repeats 5 --json embed.json

The stage reads, decodes, preprocesses, encodes, casts and writes; the bare network sees one preprocessed
batch again and again. Both take turns in one process; start-up (imports, loading) is its own row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pvrpipe.pipeline.embed import EmbedConfig, draft_manifest, made_by
from pvrpipe.pipeline.embedding import ShardEmbedder, Target
from pvrpipe.pipeline.encoders import EncoderRequest, compute_deterministically
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.store.building import PendingStore
from pvrpipe.store.reading import Store


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pvr", nargs="+", default=["resnet18"])
    parser.add_argument("--frames", type=int, default=512)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rollouts = Path(folder) / "rollouts"
        config = CollectConfig(size=options.size, episodes=1, max_steps=options.frames - 1, policy="random")
        collect(config, rollouts, Engine("inline"))
        results = [measure(name, rollouts, Path(folder), options) for name in options.pvr]
    print(f"{'PVR':>10} {'stage':>9} {'bare':>9} {'ratio':>7} {'start-up':>9}   (frames/s, s)")
    for r in results:
        print(
            f"{r['pvr']:>10} {r['stage']:>9.1f} {r['bare']:>9.1f} {r['ratio']:>7.3f} {r['startup_seconds']:>9.1f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str, rollouts: Path, folder: Path, options: argparse.Namespace) -> dict[str, float | str]:
    """The stage over one shard, and the bare network over as many frames, in turns."""
    request = EncoderRequest(name, "random:0", options.precision, options.device, options.batch)
    store, target_folder = Store.open(rollouts), folder / name
    manifest = draft_manifest(store, request, EmbedConfig())
    started = time.perf_counter()
    with PendingStore.begin(target_folder, manifest):
        embedder = ShardEmbedder(
            rollouts, [Target(request, target_folder, manifest, made_by(manifest), frozenset({0}))]
        )
        startup = time.perf_counter() - started
        encoder = embedder.encoders[0]
        compute_deterministically(encoder.device)
        frames = store.read_episode(0, ["frame"])["frame"]
        resident = torch.from_numpy(np.ascontiguousarray(frames[: encoder.batch])).to(encoder.device)
        pixels = preprocess(resident, encoder.pvr.recipe)
        batches = -(-len(frames) // encoder.batch)

        def bare() -> None:
            with (
                torch.inference_mode(),
                torch.autocast(encoder.device.type, torch.bfloat16, enabled=options.precision == "bf16"),
            ):
                for _ in range(batches):
                    encoder.network(pixels)
            if encoder.device.type == "cuda":
                torch.cuda.synchronize()

        bare()
        embedder(0)
        turns = [(timed(lambda: embedder(0)), timed(bare)) for _ in range(options.repeats)]
    shutil.rmtree(target_folder)
    return {
        "pvr": name,
        "precision": options.precision,
        "device": str(encoder.device),
        "batch": encoder.batch,
        "stage": len(frames) / statistics.median(s for s, _ in turns),
        "bare": batches * encoder.batch / statistics.median(b for _, b in turns),
        "ratio": statistics.median((len(frames) / s) / (batches * encoder.batch / b) for s, b in turns),
        "startup_seconds": startup,
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
