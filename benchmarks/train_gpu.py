"""Whole updates on a GPU, from windows of a resident store to new weights: launched, replayed, compiled.

    python benchmarks/train_gpu.py --rows dreamerv3:12m:16x64 tdmpc2:5m:1024x4 --json train_gpu.json

Noise of the right shapes in a store that is kept on the device, as ``train-model`` keeps it. Each update draws its
windows and its chance, computes loss and gradient, clips, and moves the weights. Milliseconds are of ``--updates``
updates between two synchronisations, the best of ``--repeats``.

eager       one kernel after the other
replayed    the same kernels as one CUDA graph: what ``train-model`` does on a GPU
compiled    loss and gradient compiled by Inductor, then replayed: ``train-model --compile``

kernels     of one update, from a profile; ``busy`` is the sum of their durations as a share of an update's time
waited      share of the time that the host spent on the next windows, while the device computed or not
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from noise import noise, write_store
from torch.profiler import ProfilerActivity, profile

from pvrpipe.store.loading import WindowLoader
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler
from pvrpipe.worldmodel.batches import COLUMNS, chance, prepared_for
from pvrpipe.worldmodel.compiling import EAGER, losses_of, update_of
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.optimizer import Updater

GPU = torch.device("cuda")
WIDTH, EPISODES, STEPS = 768, 200, 500
PROFILED = 5  # updates
HOW = ("eager", "replayed", "compiled")
ROWS = ("dreamerv3:1m:16x64", "dreamerv3:12m:16x64", "tdmpc2:5m:1024x4", "dinowm:1m:32x4")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="MODEL:SIZE:BxT")
    parser.add_argument("--how", nargs="+", default=list(HOW), choices=HOW)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'':44}{'ms':>9} {'busy':>6} {'kernels':>8} {'waited':>7} {'GiB':>6}")
    results = []
    with tempfile.TemporaryDirectory() as name:
        rows = noise(EPISODES * (STEPS + 1), (WIDTH,))
        store = write_store(Path(name) / "store", rows, STEPS)
        for row in options.rows:
            for precision in options.precision:
                for how in options.how:
                    results.append(r := measure(store, row, precision, how, options))
                    print(
                        f"{row:26} {precision} {how:9} {r['first_update_s']:>5.1f} s{r['ms']:>9.2f} {r['busy']:>6.2f} "
                        f"{r['kernels']:>8.0f} {r['waited']:>7.4f} {r['gib']:>6.2f}",
                        flush=True,
                    )
    if options.json is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def measure(store: Store, row: str, precision: Any, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, size, shape = row.split(":")
    update, data = updating(store, model, size, shape, precision, how)
    begun = time.perf_counter()
    update(1)
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    taken, numbers = [], iter(range(2, 1 << 30))
    for _ in range(EAGER + 2):
        update(next(numbers))
    for _ in range(options.repeats):
        torch.cuda.synchronize()
        waited, begun = data.waited, time.perf_counter()
        for _ in range(options.updates):
            update(next(numbers))
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begun, data.waited - waited))
    seconds, waited = min(taken)
    each = seconds / options.updates
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(PROFILED):
            update(next(numbers))
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "row": row,
        "precision": precision,
        "how": how,
        "first_update_s": first,
        "ms": 1e3 * each,
        "busy": sum(e.device_time for e in kernels) / 1e6 / PROFILED / each,
        "kernels": len(kernels) / PROFILED,
        "waited": waited / seconds,
        "gib": torch.cuda.max_memory_allocated() / (1 << 30),
    }


def updating(
    store: Store, name: str, size: str, shape: str, precision: Any, how: str
) -> tuple[Callable[[int], object], WindowLoader]:
    """What makes update k, and what gives it windows."""
    batch, length = (int(side) for side in shape.split("x"))
    with GPU:
        model = build_model(
            name, size, Setting(vector(WIDTH), 1, state=0, steps=STEPS, episodic=False), seed=0
        )
    sampler = WindowSampler(
        store, ("embedding", *COLUMNS), batch=batch, length=length + model.rows_before, seed=0
    )
    data = WindowLoader(sampler, GPU, prepared_for(vector(WIDTH)), resident=True)
    updater = Updater.of(name, model, learning_rate=None, warmup=1000)
    losses = losses_of(model, GPU, compiled=how == "compiled")
    update: Any = update_of(model, updater, losses, GPU, precision)
    made = update.eager if how == "eager" else update

    def run(k: int) -> object:
        windows = data(k)
        return made(windows, model.draw(windows, chance(0, k)))

    return run, data


if __name__ == "__main__":
    main()
