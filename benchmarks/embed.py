"""The embedding stage against the bare network on a resident batch, and against other ways of doing the same job.

    python benchmarks/embed.py --network resnet50 --size 64 224 256 --frames 128 --repeats 3 --json embed.json

One process, one thread on a CPU, float32, frames of a rollout store that this script writes; random weights. All
take turns; each is timed over whole passes in its steady state (workers started, encoder loaded), medians over repeats.

bare        the network on one preprocessed batch, resident on the device, again and again
pvrpipe     the stage: read, decode, preprocess, encode, cast, write, hash, fsync, commit
pvrpipe 3   three encoders (seeds 0, 1, 2) in one pass over the frames; its rate is counted in embeddings
loader      what clip-retrieval and stable-worldmodel do, written here: a torch DataLoader (2 workers, prefetch 2) whose
            dataset decodes a PNG of each frame and preprocesses it with PIL and torchvision, read → encode → append in
            one loop, one np.save (float16) at the end
ray data    map_batches over the same PNGs, one actor that preprocesses a batch with PIL and encodes it, write_parquet;
            only from its first batch to its last, without Ray's start and end
On a CPU, bare, pvrpipe and ray data compute in one thread; the loader has two processes more for its PIL. ``of peak``
is the share of a large matrix product's rate, same device and precision; a pass is the whole store, to its last commit.
Of a store of five shards or more, ``on its way`` leaves out beginning and end: from the first shard's outcome to the
last frame. For a GPU, ``--rollouts`` of many frames; ``--compile`` is what the stage does where there are a million.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from pvrpipe.pipeline import drafting
from pvrpipe.pipeline.drafting import EmbedConfig, draft, made_by
from pvrpipe.pipeline.embedding import COMMITS, ShardEmbedder, Target
from pvrpipe.pipeline.encoders import CPU_THREADS, Encoder, EncoderRequest, device_named, exact
from pvrpipe.pipeline.memory import peak_of
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.pvrs import SPEC_FILE, Pvr, WeightsSource
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.specifications import Recipe
from pvrpipe.store.building import PendingStore
from pvrpipe.store.reading import Store

ARCHITECTURES = {
    "resnet18": ("resnet18", 512),
    "vit-s": ("vit_small_patch16_224", 384),
    "vit-b": ("vit_base_patch16_224", 768),
    "resnet50": ("resnet50", 2048),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FROM = 256  # pixels of the frames that are collected for this
OTHERS = ("loader", "ray data")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--size", nargs="+", type=int, default=[64, 224, 256], help="pixels the network sees")
    parser.add_argument(
        "--frames", type=int, default=64, help="collected for this, if no --rollouts are given"
    )
    parser.add_argument("--rollouts", type=Path, help="a store of one's own to embed")
    parser.add_argument("--compile", action="store_true", help="on a GPU, pvrpipe and bare")
    parser.add_argument("--batch", type=int, help="default: what the stage chooses, 32 on a CPU")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], choices=["pvrpipe 3", *OTHERS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(CPU_THREADS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.rollouts is None:
            options.rollouts = folder / "rollouts"
            config = CollectConfig(size=FROM, episodes=1, max_steps=options.frames - 1, policy="random")
            collect(config, options.rollouts, Engine("inline"))
        store = Store.open(options.rollouts)
        frames = (
            f for number in store.episodes["episode"] for f in store.read_episode(number, ["frame"])["frame"]
        )
        pngs = [] if set(OTHERS) <= set(options.without) else [png(frame) for frame in frames]
        options.frames, peak = store.manifest.rows, peak_rate(options)
        print(f"{peak / 1e12:.1f} TFLOP/s of a large matrix product, {options.precision}")
        for network in options.network:
            for size in options.size:
                rows += measure(network, size, folder, pngs, peak, options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    network: str, size: int, folder: Path, pngs: list[bytes], peak: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every way, in turns; a row of each."""
    own = specification(network, size, folder)
    with ExitStack() as stack:
        encoder, one = stage(own, folder, options, (0,), stack)
        ways: dict[str, Callable[[], object]] = {"bare": bare(encoder, options), "pvrpipe": one}
        if "pvrpipe 3" not in options.without:
            ways["pvrpipe 3"] = stage(own, folder, options, (0, 1, 2), stack)[1]
        if "loader" not in options.without:
            ways["loader"] = loader(encoder, size, pngs, folder, options)
        if "ray data" not in options.without:
            ways["ray data"] = ray_data(own, size, pngs, folder, options)
        memory, work = peak_per_frame(own, encoder.batch, options), operations(encoder, size)
        for way in ways.values():
            way()
        passes = {name: way for name, way in ways.items() if isinstance(way, Pass)}
        for way in passes.values():
            way.on_its_way.clear()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                seconds[name].append(timed(way))
    count = options.frames
    done = {"pvrpipe 3": 3 * count, "bare": -(-count // encoder.batch) * encoder.batch}
    rates = {name: [done.get(name, count) / s for s in taken] for name, taken in seconds.items()}
    rates |= {f"{n}, on its way": way.on_its_way for n, way in passes.items() if way.on_its_way}
    rows = []
    for name, rate in rates.items():
        ratio = statistics.median(r / b for r, b in zip(rate, rates["bare"], strict=True))
        row = {
            "network": network,
            "size": size,
            "way": name,
            "frames_per_second": statistics.median(rate),
            "of_bare": ratio,
            "batch": encoder.batch,
            "precision": options.precision,
            "device": str(encoder.device),
            "of_peak": statistics.median(rate) * work / peak,
            "kilobytes_per_frame_in_flight": memory,
            "compiled": encoder.compiled,
        }
        print(
            f"{network:>9} {size:>4} px  {name:<21} {row['frames_per_second']:>9.2f} frames/s  {ratio:>6.3f} of bare"
            f"  {row['of_peak']:>6.3f} of peak  {memory:>8.0f} kB a frame in flight, {encoder.batch} in a batch",
            flush=True,
        )
        rows.append(row)
    return rows


def specification(network: str, size: int, folder: Path) -> Path:
    """An encoder of one's own: the network at this input size, ImageNet's preprocessing."""
    architecture, width = ARCHITECTURES[network]
    own = folder / f"{network}-{size}"
    own.mkdir()
    pvr = Pvr(
        name=own.name,
        title=own.name,
        source=WeightsSource(file="none"),
        architecture=architecture,
        overrides={} if network.startswith("resnet") else {"img_size": size},
        recipe=Recipe(resize=size, interpolation="bicubic", antialias=True, crop=size, mean=MEAN, std=STD),
        pooling="average" if network.startswith("resnet") else "cls",
        width=width,
        licence="none",
    )
    (own / SPEC_FILE).write_text(canonical_json(pvr.model_dump(mode="json")))
    return own


def stage(
    own: Path, folder: Path, options: argparse.Namespace, seeds: tuple[int, ...], stack: ExitStack
) -> tuple[Encoder, Pass]:
    """Embedding the store with an encoder of each seed, its workers' state already there."""
    store, targets = Store.open(options.rollouts), []
    shards = range(len(store.manifest.shards))
    drafting.COMPILED_FROM = 0 if options.compile else 1 << 60
    for seed in seeds:
        target = folder / f"out-{len(seeds)}-{seed}"
        shutil.rmtree(target, ignore_errors=True)
        request = EncoderRequest(str(own), f"random:{seed}", options.precision, options.device, options.batch)
        made = draft(store, request, target, EmbedConfig())
        stack.enter_context(PendingStore.begin(target, made.manifest))
        targets.append(Target(made.request, target, made.manifest, made_by(made.manifest), frozenset(shards)))
    embedder = ShardEmbedder(options.rollouts, targets)
    return embedder.encoders[0], Pass(embedder)


class Pass:
    """The stage over all shards of a store, from nothing to the last commit."""

    def __init__(self, embedder: ShardEmbedder) -> None:
        self.embedder = embedder
        self.shards = [shard.rows for shard in embedder.store.manifest.shards]
        self.on_its_way: list[float] = []
        """embeddings/s of each pass while neither the first shard nor the end of the last is in it"""

    def __call__(self) -> None:
        """One pass; a shard's outcome comes when it is committed, and so many shards after it are encoded."""
        told = [time.perf_counter() for _ in self.embedder.each(range(len(self.shards)))]
        if len(told) > COMMITS + 2:
            encoded = sum(self.shards[1 + COMMITS :]) * len(self.embedder.targets)
            self.on_its_way.append(encoded / (told[-1 - COMMITS] - told[0]))


def bare(encoder: Encoder, options: argparse.Namespace) -> Callable[[], None]:
    """The network alone on a resident batch."""
    frames = Store.open(options.rollouts).read_episode(0, ["frame"])["frame"]
    frames = np.resize(frames, (encoder.batch, *frames.shape[1:]))
    pixels = preprocess(torch.from_numpy(frames).to(encoder.device), encoder.pvr.recipe)
    network: Any = encoder.network
    if encoder.compiled:
        network = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def run() -> None:
        bf16 = options.precision == "bf16"
        with (
            torch.inference_mode(),
            exact(),
            torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16),
        ):
            for _ in range(-(-options.frames // encoder.batch)):
                network(pixels)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    return run


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """Frames decoded and preprocessed one by one with PIL."""

    def __init__(self, pngs: list[bytes], size: int) -> None:
        self.pngs, self.prepare = pngs, pil_pipeline(size)

    def __len__(self) -> int:
        return len(self.pngs)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One, as (3, size, size)."""
        found: torch.Tensor = self.prepare(Image.open(io.BytesIO(self.pngs[index])))
        return found


def loader(
    encoder: Encoder, size: int, pngs: list[bytes], folder: Path, options: argparse.Namespace
) -> Callable[[], None]:
    """clip-retrieval's reader, runner and writer in short; its workers stay between passes."""
    data = torch.utils.data.DataLoader(
        Pictures(pngs, size), encoder.batch, num_workers=2, prefetch_factor=2, persistent_workers=True
    )

    def run() -> None:
        found = []
        bf16 = options.precision == "bf16"
        with (
            torch.inference_mode(),
            exact(),
            torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16),
        ):
            for batch in data:
                found.append(encoder.network(batch.to(encoder.device)).cpu().to(torch.float16).numpy())
        np.save(folder / "loader.npy", np.concatenate(found))

    return run


class Actor:
    """What the documentation of Ray Data's batch inference shows: preprocess, encode, return."""

    def __init__(self, own: str, size: int, options: argparse.Namespace) -> None:
        self.encoder = Encoder(
            EncoderRequest(own, "random:0", options.precision, options.device, options.batch)
        )
        torch.set_num_threads(CPU_THREADS)
        self.prepare, self.bf16 = pil_pipeline(size), options.precision == "bf16"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of PNGs to embeddings."""
        began = time.perf_counter()
        pixels = torch.stack([self.prepare(Image.open(io.BytesIO(data))) for data in batch["png"]])
        with (
            torch.inference_mode(),
            exact(),
            torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            embedding = self.encoder.network(pixels.to(self.encoder.device)).cpu().to(torch.float16)
        times = {"began": began, "ended": time.perf_counter()}
        return {
            "embedding": embedding.numpy(),
            **{name: np.full(len(pixels), value) for name, value in times.items()},
        }


def ray_data(
    own: Path, size: int, pngs: list[bytes], folder: Path, options: argparse.Namespace
) -> Callable[[], float]:
    """One actor over the PNGs; its seconds from the first batch to the last."""
    import ray.data

    if not ray.is_initialized():
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    on_gpu = device_named(options.device).type == "cuda"

    def run() -> float:
        shutil.rmtree(folder / "ray-data", ignore_errors=True)
        ray.data.from_items([{"png": png} for png in pngs], override_num_blocks=2).map_batches(
            Actor,
            fn_constructor_args=(str(own), size, options),
            batch_size=options.batch or 32,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_gpus=1 if on_gpu else 0,
        ).write_parquet(str(folder / "ray-data"))
        told = pq.read_table(folder / "ray-data", columns=["began", "ended"])
        return float(pc.max(told["ended"]).as_py() - pc.min(told["began"]).as_py())

    return run


def pil_pipeline(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The authors' way of preprocessing, on PIL images."""
    pipeline: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return pipeline


def operations(encoder: Encoder, size: int) -> int:
    """Floating-point operations that a frame takes in matrix products and convolutions, two a multiplication."""
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        encoder.network(torch.zeros((1, 3, size, size), device=encoder.device))
    return int(counted.get_total_flops())


def peak_rate(options: argparse.Namespace) -> float:
    """Operations a second of a large matrix product, the median of seven."""
    device = device_named(options.device)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn((2, side, side), device=device)
    if options.precision == "bf16":
        a, b = a.bfloat16(), b.bfloat16()

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    return 2 * side**3 / statistics.median(timed(product) for _ in range(7))


def peak_per_frame(own: Path, batch: int, options: argparse.Namespace) -> float:
    """Kilobytes at most in use for each frame of a batch that is preprocessed and encoded.

    By an encoder of its own: what a recorded batch takes is taken when it is recorded.
    """
    encoder = Encoder(EncoderRequest(str(own), "random:0", options.precision, options.device, batch))
    shape = (batch, *Store.open(options.rollouts).column("frame").shape)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=encoder.device)
    encoder.encode(pixels)
    with peak_of(encoder.device) as peak:
        encoder.encode(pixels)
    return peak.bytes / batch / 1000


def png(frame: np.ndarray[Any, Any]) -> bytes:
    """A frame as others keep it."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes, or those that it says."""
    started = time.perf_counter()
    told = work()
    return told if isinstance(told, float) else time.perf_counter() - started


if __name__ == "__main__":
    main()
