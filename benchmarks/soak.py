"""Does a long collection leak? Collects for an hour on Ray and draws the memory of worker and driver.

    python benchmarks/soak.py --minutes 60 --out docs/soak.png

Every episode is varied, so that textures, sizes and distractors are put on and off all the time. What counts is
memory that the process itself holds (``RssAnon``), after the first tenth, in which caches fill.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pvrpipe.store.drawing import PAPER, Panel, Range, colour_of

COLLECT = """
import sys
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
variation = "none,id,ood,texture=0.5,distractors=1+camera=0.5,sensor_noise=0.3"
config = CollectConfig("dmc:walker-walk", size=64, episodes=200_000, max_steps=100, policy="random",
                       variation=variation, shard_rows=400)
collect(config, sys.argv[1], Engine(workers=1))
"""


def held(process: int) -> float:
    """MiB of anonymous memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def worker_below(root: int) -> int | None:
    """The Ray worker that a process has started."""
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if "ray::ShardWorker" in stat.read_text() and _descends(int(stat.parent.name), root):
                return int(stat.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def _descends(process: int, root: int) -> bool:
    while process > 1:
        if process == root:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def watch(minutes: float, every: float) -> dict[str, list[float]]:
    """Minutes, MiB of worker and driver, and shards done, once in a while."""
    told: dict[str, list[float]] = {"minutes": [], "worker": [], "driver": [], "shards": []}
    with tempfile.TemporaryDirectory() as folder:
        driver = subprocess.Popen([sys.executable, "-c", COLLECT, folder], start_new_session=True)
        began = None
        while began is None or time.monotonic() - began < 60 * minutes:
            time.sleep(every)
            worker = worker_below(driver.pid)
            if worker is None:
                continue
            began = began or time.monotonic()
            told["minutes"].append((time.monotonic() - began) / 60)
            told["worker"].append(held(worker))
            told["driver"].append(held(driver.pid))
            told["shards"].append(float(len(list(Path(folder).glob("shards/*.json")))))
        os.killpg(driver.pid, signal.SIGINT)
        driver.wait(120)
    return told


def draw(told: dict[str, list[float]], path: Path) -> None:
    """The curves, as a PNG."""
    picture = Image.new("RGB", (900, 420), PAPER)
    panel = Panel(picture, (0, 0, 900, 420), "Memory that collecting holds, MiB")
    minutes = np.array(told["minutes"])
    most = max(max(told["worker"]), max(told["driver"]))
    names = ("worker", "driver")
    panel.axes(Range("minutes", 0, float(minutes[-1])), Range("MiB", 0, most * 1.05), names)
    for number, who in enumerate(names):
        panel.line(minutes, np.array(told[who]), colour_of(number))
    picture.save(path)


def main() -> None:
    """Watch, draw, and say how fast memory grows once caches are full."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=15, help="seconds between two looks")
    parser.add_argument("--out", type=Path, default=Path("soak.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told = watch(options.minutes, options.every)
    draw(told, options.out)
    late = np.array(told["minutes"]) > options.minutes / 10
    found = {"minutes": options.minutes, "shards": told["shards"][-1]}
    for who in ("worker", "driver"):
        values = np.array(told[who])[late]
        slope = float(np.polyfit(np.array(told["minutes"])[late], values, 1)[0]) * 60
        found |= {f"{who}_mib": float(values.mean()), f"{who}_mib_per_hour": slope}
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps({**found, **told}))


if __name__ == "__main__":
    main()
