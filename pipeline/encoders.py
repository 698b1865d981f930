"""A frozen encoder: recipe, network and pooling behind one call from uint8 frames to embeddings."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.autoencoder import ConvEncoder
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.pvrs import PVRS, Pvr, find_pvr
from pvrpipe.pipeline.weights import Random, WeightsFile, find_weights, load_weights
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError, WeightsError, one_line
from pvrpipe.schemas.manifest import Computation, EncoderIdentity

Precision = Literal["fp32", "bf16"]
BATCH = {"cpu": 32, "cuda": 256}  # on a GPU the most; how much memory there is decides (memory.py)
#: On a CPU every worker computes in one thread: rates add up over workers, and the number of threads,
#: which can change the last bits of a sum, is the same everywhere.
CPU_THREADS = 1


@dataclass(frozen=True)
class EncoderRequest:
    """Which encoder, as the user asked for it; picklable, so that every worker builds its own."""

    pvr: str
    weights: str = "auto"
    precision: Precision = "fp32"
    device: str = "auto"
    batch: int | None = None
    compiled: bool = False

    def anywhere(self) -> EncoderRequest:
        """The same request for a worker that runs in another folder."""
        pvr, weights = (
            str(Path(name).absolute()) if Path(name).exists() and name not in PVRS else name
            for name in (self.pvr, self.weights)
        )
        return replace(self, pvr=pvr, weights=weights)

    def resolved_device(self) -> torch.device:
        """The device to compute on; ``auto`` is a GPU where there is one."""
        if self.device != "auto":
            try:
                wanted = torch.device(self.device)
            except RuntimeError:
                raise UnknownNameError.among("device", self.device, ("auto", "cpu", "cuda")) from None
            if wanted.type == "cuda" and not torch.cuda.is_available():
                raise InvalidValueError("--device cuda: no GPU is visible here; use --device cpu")
            return wanted
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Encoder:
    """A frozen network that turns frames (n, H, W, 3) uint8 into embeddings (n, D) float32.

    Every batch is padded to the full batch, so that the shapes the network sees, and with them the bits
    it computes, do not depend on how many frames are left.
    """

    def __init__(self, request: EncoderRequest) -> None:
        self.pvr = find_pvr(request.pvr)
        self.device = request.resolved_device()
        self.precision: Precision = request.precision
        self.batch = request.batch or BATCH[self.device.type]
        weights = find_weights(self.pvr, request.weights, request.pvr)
        network = build_network(self.pvr, weights.seed if isinstance(weights, Random) else 0)
        self.identity = _identity(self.pvr, network, weights)
        self.network = (
            network.to(memory_format=torch.channels_last).to(self.device).eval().requires_grad_(False)
        )
        self.compiled, self._compute = False, self._eager
        if request.compiled:
            self.compile()

    @property
    def computation(self) -> Computation:
        """How it computes, as far as it decides the last bits."""
        cpu = self.device.type == "cpu"
        return Computation(
            precision=self.precision,
            device=f"cpu {platform.machine()}" if cpu else torch.cuda.get_device_name(self.device),
            threads=CPU_THREADS if cpu else None,
            batch=self.batch,
            compiled=self.compiled,
        )

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode at most ``batch`` frames."""
        return self.encode(torch.from_numpy(frames).to(self.device)).float().cpu().numpy()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode at most ``batch`` frames (n, H, W, 3) that are on the device."""
        lacking = self.batch - len(pixels)
        full = F.pad(pixels, (0, 0) * 3 + (0, lacking)) if lacking else pixels
        return self.forward(full)[: len(pixels)]

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """A full batch (B, H, W, 3) uint8 on the device to (B, D)."""
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self._compute(pixels)

    def compile(self) -> None:
        """Compile, to be replayed as a CUDA graph; what is chosen by timing, and would change bits, is not."""
        import torch._inductor.config

        torch._inductor.config.deterministic = True
        self.compiled = True
        self._compute = torch.compile(self._eager, mode="reduce-overhead", dynamic=False)

    def _eager(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.network(preprocess(pixels, self.pvr.recipe))
        return embedding


def compute_deterministically(device: torch.device) -> None:
    """Settings under which equal batches give equal bits; for a worker process, once."""
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def build_network(pvr: Pvr, seed: int) -> nn.Module:
    """The network with fresh weights drawn from ``seed``; its output is the embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        overrides: dict[str, Any] = {**pvr.overrides}
        try:
            if pvr.architecture == "conv-autoencoder":
                return ConvEncoder(**overrides, width=pvr.width)
            import timm  # a second of imports that the autoencoder does not need

            network: nn.Module = timm.create_model(pvr.architecture, num_classes=0, **overrides)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise WeightsError(
                f"{pvr.name}: architecture '{pvr.architecture}' with {overrides} cannot be built "
                f"({one_line(error)[:120]}); mend its specification"
            ) from error
        if pvr.projection is not None:
            network.head = nn.Linear(network.num_features, pvr.projection, bias=False)  # type: ignore[arg-type]
        return network


def _identity(pvr: Pvr, network: nn.Module, weights: Random | WeightsFile) -> EncoderIdentity:
    return EncoderIdentity(
        name=pvr.name,
        title=f"{pvr.title}, random weights" if isinstance(weights, Random) else pvr.title,
        architecture=pvr.architecture,
        overrides=pvr.overrides,
        positions=pvr.positions,
        weights=load_weights(network, pvr, weights),
        recipe=pvr.recipe,
        layer="last",
        blocks=None,
        final_norm=True,
        pooling=pvr.pooling,
        shape=(pvr.width,),
    )
