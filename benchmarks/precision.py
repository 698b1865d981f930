"""bfloat16 against float32: how far the embeddings of each representation are from each other.

    python benchmarks/precision.py --most 100 --json precision.json

Weights are random (``random:0``) unless files are cached: the numbers say what the arithmetic of an architecture
loses, not what trained weights lose; layer scales are 1, for at their first values (1e-5) the blocks of DINOv2 and
DINOv3 would add nothing. Frames are smooth scenes with noise. ``cosine`` is the smallest over the
frames; ``largest`` is the largest difference over the largest float32 value.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.zoo import PVRS

LAYER_SCALES = ("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pvr", nargs="+", default=list(PVRS))
    parser.add_argument("--most", type=float, default=100, help="millions of parameters")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.pvr:
        with torch.device("meta"):
            millions = sum(p.numel() for p in build_network(PVRS[name], 0).parameters()) / 1e6
        if millions > options.most:
            continue
        rows.append(compare(name, options.weights, options.device, options.frames))
        print(f"{name:28} cosine {rows[-1]['cosine']:.6f}  largest {rows[-1]['largest']:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def compare(name: str, weights: str, device: str, count: int) -> dict[str, float | str]:
    """One representation in both precisions."""
    frames = scenes(count, 256 if PVRS[name].recipe.crop else 84)
    exact, rounded = (embedded(name, weights, precision, device, frames) for precision in ("fp32", "bf16"))
    a, b = exact.astype(np.float64), rounded.astype(np.float64)
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "pvr": name,
        "cosine": float(cosine.min()),
        "largest": float(np.abs(a - b).max() / np.abs(a).max()),
    }


def embedded(name: str, weights: str, precision: Precision, device: str, frames: np.ndarray) -> np.ndarray:
    """Frames (B, H, W, 3) to embeddings (B, D), flattened."""
    encoder = Encoder(EncoderRequest(name, weights, precision, device, len(frames)))
    if weights.startswith("random"):
        for part, parameter in encoder.network.named_parameters():
            if part.endswith(LAYER_SCALES):
                parameter.fill_(1)
    return encoder(frames).reshape(len(frames), -1)


def scenes(count: int, side: int) -> np.ndarray:
    """Frames (count, side, side, 3): a gradient, a disc that moves, some noise."""
    y, x = np.mgrid[:side, :side]
    random = np.random.default_rng(0)
    frames = []
    for n in range(count):
        disc = 255 * ((x - side * (n + 1) / (count + 1)) ** 2 + (y - side / 3) ** 2 < (side / 8) ** 2)
        image = np.stack([x * 255 / side, y * 255 / side, disc], -1)
        frames.append((image + random.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


if __name__ == "__main__":
    main()
