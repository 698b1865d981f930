"""bfloat16 against float32: how far the embeddings of each representation are from each other.

    python benchmarks/precision.py --most 100 --json precision.json

Weights are random (``random:0``) unless files are cached: the numbers say what the arithmetic of an architecture
loses, not what trained weights lose; layer scales are 1, for at their first values (1e-5) the blocks of DINOv2 and
DINOv3 would add nothing. Frames are smooth scenes with noise. ``cosine`` is the smallest over the
frames; ``largest`` is the largest difference over the largest float32 value. Of R2D2, with batch norms that know
the frames and biases that make it confident, ``kept`` is the share of the keypoints that are found in both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.zoo import PVRS

PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")
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
        measure = compare_keypoints if name == "r2d2" else compare
        rows.append(measure(name, options.weights, options.device, options.frames))
        print(
            f"{name:28}",
            *(f"{what} {value}" for what, value in rows[-1].items() if what != "pvr"),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def compare(name: str, weights: str, device: str, count: int) -> dict[str, float | str]:
    """One representation in both precisions."""
    frames = scenes(count, 256 if PVRS[name].recipe.crop else 84)
    exact, rounded = (embedded(name, weights, precision, device, frames) for precision in PRECISIONS)
    a, b = exact.astype(np.float64), rounded.astype(np.float64)
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "pvr": name,
        "cosine": round(float(cosine.min()), 6),
        "largest": round(float(np.abs(a - b).max() / np.abs(a).max()), 4),
    }


def compare_keypoints(name: str, weights: str, device: str, count: int) -> dict[str, float | str]:
    """A network that chooses: how many of its float32 descriptors bfloat16 finds, in whatever order."""
    frames = scenes(count, 256)
    exact, rounded = (Encoder(EncoderRequest(name, weights, p, device, count)) for p in PRECISIONS)
    if weights.startswith("random"):
        make_confident(exact, frames)
        rounded.network.load_state_dict(exact.network.state_dict())
    alike = exact(frames) @ rounded(frames).transpose(0, 2, 1)
    return {"pvr": name, "kept": float((alike.max(axis=2) > 0.99).mean())}


def make_confident(encoder: Encoder, frames: np.ndarray) -> None:
    """Give R2D2 weights, drawn, with which descriptors differ and keypoints are found."""
    torch.manual_seed(0)
    norms = [m for m in encoder.network.modules() if isinstance(m, nn.BatchNorm2d)]
    for convolution in encoder.network.modules():
        if isinstance(convolution, nn.Conv2d):
            nn.init.kaiming_normal_(convolution.weight)
    for norm in norms:
        norm.momentum = None
        norm.train()
    encoder(frames)
    encoder.network.eval()
    encoder.network.get_parameter("trunk.sal.bias").fill_(2)
    encoder.network.get_parameter("trunk.clf.bias")[1] = 3


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
