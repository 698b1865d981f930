"""A frozen encoder: recipe, network and pooling behind one call from uint8 frames to embeddings."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pvrpipe.pipeline.networks import Network, build_network
from pvrpipe.pipeline.preprocessing import own_kernels, preprocess
from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.pipeline.readout import Readout, read_out
from pvrpipe.pipeline.replaying import Replayed
from pvrpipe.pipeline.weights import Random, find_weights, load_weights
from pvrpipe.pipeline.zoo import PVRS, find_pvr, specification_at
from pvrpipe.schemas.addresses import there_is
from pvrpipe.schemas.errors import (
    EncodingError,
    InvalidValueError,
    UnknownNameError,
    WeightsError,
    one_line,
)
from pvrpipe.schemas.specifications import Computation, EncoderIdentity, Recipe, WeightsIdentity

Precision = Literal["fp32", "bf16"]
BATCH = {"cpu": 32, "cuda": 256}  # at most; the shards, and memory where it is short, decide (memory.py)
NATIVE = 224  # pixels of the frames whose embeddings' shape is told where a recipe takes frames of any size
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
    readout: Readout = field(default_factory=Readout)

    def anywhere(self) -> EncoderRequest:
        """The same request for a worker that runs in another folder.

        Only what is taken for a path becomes one: a folder here may have the name of a package's representation.
        """
        own = self.pvr not in PVRS and specification_at(self.pvr) is not None
        pvr = _absolute(self.pvr) if own or self.pvr.startswith("hf:") else self.pvr
        weights = self.weights if self.weights == "auto" else _absolute(self.weights)
        return replace(self, pvr=pvr, weights=weights)


def device_named(name: str) -> torch.device:
    """The device that ``--device`` means: ``auto`` is a GPU where there is one.

    A GPU that is named by its number is from then on also the one of all that names none, in this thread.

    Raises:
        UnknownNameError, InvalidValueError: there is no such device; the message names those that there are.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unknown = UnknownNameError.among("device", name, ("auto", "cpu", "cuda"))
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise unknown from None
    if wanted.type not in ("cpu", "cuda"):
        raise unknown
    if wanted.type == "cuda":
        _settle_on(wanted)
    return wanted


def _settle_on(gpu: torch.device) -> None:
    """Let streams, graphs and kernels of this thread that name no GPU be on this one, if it is there."""
    if not torch.cuda.is_available():
        raise InvalidValueError(f"--device {gpu}: no GPU is visible here; use --device cpu")
    if gpu.index is None:
        return
    count = torch.cuda.device_count()
    if gpu.index >= count:
        raise InvalidValueError(
            f"--device {gpu}: the GPUs visible here are 0 to {count - 1}; name one of them"
        )
    torch.cuda.set_device(gpu)


def _absolute(name: str) -> str:
    """The path of what lies on this machine, from anywhere; other names as they are."""
    prefix = "hf:" if name.startswith("hf:") else ""
    said = name.removeprefix(prefix)  # nothing is not a path, though this folder is one
    return f"{prefix}{Path(said).absolute()}" if said and there_is(Path(said)) else name


class Encoder:
    """A frozen network that turns frames (n, H, W, 3) uint8 into embeddings (n, D) float32.

    Every batch is padded to the full batch, so that the shapes the network sees, and with them the bits
    it computes, do not depend on how many frames are left.
    """

    def __init__(self, request: EncoderRequest) -> None:
        asked = find_pvr(request.pvr)
        self.pvr = read_out(asked, request.readout)
        self.device = device_named(request.device)
        self.precision: Precision = request.precision
        self.batch = request.batch or BATCH[self.device.type]
        weights = find_weights(self.pvr, request.weights, request.pvr)
        network = build_network(self.pvr, weights.seed if isinstance(weights, Random) else 0)
        loaded = load_weights(network.trunk, self.pvr, weights)
        self.identity = _identity(self.pvr, network, loaded)
        if self.pvr.recipe.crop != asked.recipe.crop:
            _refuse_uneven(self.pvr, network)
        network.narrow()
        self.network = frozen(network.channels_last().to(self.device))
        self.identity = self.identity_on(self.pvr.recipe.crop or NATIVE, self.pvr.recipe.crop or NATIVE)
        if self.pvr == asked and request.pvr not in PVRS and not request.pvr.startswith(("timm:", "hf:")):
            _refuse_another_width(self.pvr, self.identity.shape)
        self.compiled = False
        self._compute: Callable[[Tensor], Tensor] = _computing(self.network, self.pvr.recipe)
        if request.compiled:
            self.compile()

    def identity_on(self, height: int, width: int) -> EncoderIdentity:
        """The encoder, with the shape of the embeddings that frames of this size get.

        Only a recipe that takes frames as they are gives frames of another size another shape. Nothing is computed,
        unless a network of one's own looks at the numbers on its way.
        """
        crop = self.pvr.recipe.crop
        size = crop or height, crop or width
        try:
            embedding = self._seen(torch.empty(1, 3, *size, device="meta"))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network of one's own fails in any way
            raise InvalidValueError(
                f"{self.pvr.name} cannot make --pool {self.pvr.pooling} of {size[0]} × {size[1]} pixels "
                f"({one_line(error)[:120]}); choose another --input-size or --pool"
            ) from error
        return self.identity.model_copy(update={"shape": tuple(embedding.shape[1:])})

    @torch.inference_mode()
    def _seen(self, pixels: Tensor) -> Tensor:
        """The embedding of pixels without data, which is without data too where the network lets it be."""
        tensors = itertools.chain(self.network.named_parameters(), self.network.named_buffers())
        without_data = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        try:
            embedding: Tensor = torch.func.functional_call(self.network, without_data, (pixels,))
        except Exception:
            embedding = self.network(torch.zeros_like(pixels, device=self.device))
        return embedding

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
            resizing="triton" if own_kernels(self.device) else "torch",
        )

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode at most ``batch`` frames."""
        return self.encode(torch.from_numpy(frames).to(self.device)).float().cpu().numpy()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode at most ``batch`` frames (n, H, W, 3) that are on the device; what it gives holds until the next.

        Raises:
            InvalidValueError: they are more; padding by less than nothing would leave the last of them out.
        """
        lacking = self.batch - len(pixels)
        if lacking < 0:
            raise InvalidValueError(
                f"{self.pvr.name} was given {len(pixels)} frames at once and has batches of {self.batch}; give as many "
                "at most"
            )
        full = F.pad(pixels, (0, 0) * 3 + (0, lacking)) if lacking else pixels
        return self.forward(full)[: len(pixels)]

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """A full batch (B, H, W, 3) uint8 on the device to (B, D)."""
        bf16 = self.precision == "bf16"
        with exact(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self._compute(pixels)

    def replay(self, frame: tuple[int, ...]) -> None:
        """On a GPU, from now on launch all kernels of a batch of such frames (H, W, 3) as one; the bits stay."""
        if self.device.type != "cuda" or isinstance(self._compute, Replayed):
            return
        self._compute = Replayed(self._compute)
        with contextlib.suppress(torch.OutOfMemoryError):  # whoever encodes with it will see to that
            self.encode(torch.zeros((self.batch, *frame), dtype=torch.uint8, device=self.device))

    def compile(self) -> None:
        """Compile the network; what is chosen by timing, and would change bits, is not."""
        import torch._inductor.config

        torch._inductor.config.deterministic = True
        self.compiled = True
        self._compute = _computing(torch.compile(self.network, dynamic=False), self.pvr.recipe)


def _computing(network: Callable[[Tensor], Tensor], recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """From frames to embeddings. No method: an encoder that knew itself would keep its memory when it is let go."""

    def compute(pixels: Tensor) -> Tensor:
        return network(preprocess(pixels, recipe))

    return compute


def _refuse_uneven(pvr: Pvr, network: Network) -> None:
    """Refuse a size that patches do not divide: what is left over would not be seen."""
    crop, patch = pvr.recipe.crop, network.patch
    if crop and patch and crop % patch:
        nearest = max(1, round(crop / patch)) * patch
        raise InvalidValueError(
            f"--input-size {crop}: {pvr.name} sees patches of {patch} pixels; give {nearest}"
        )


def refuse_norm(network: Network, identity: EncoderIdentity, asked: Readout) -> None:
    """Refuse a choice of the final norm where there is none: it would be the same encoder under another name."""
    if asked.final_norm is not None and not network.normed:
        raise InvalidValueError(
            f"--norm, --no-norm: {identity.name} has no final norm before its {identity.pooling}; leave it out"
        )


def refuse_chance(encoder: Encoder, frame: tuple[int, ...]) -> None:
    """Refuse a network that gives a frame (H, W, 3) other embeddings each time, as dropout and random masks do.

    Raises:
        EncodingError: it does; no store of it could be made again, or finished after a kill.
    """
    pixels = torch.arange(math.prod(frame), device=encoder.device).remainder(251).to(torch.uint8)
    asked, encoder.batch = encoder.batch, 1
    try:
        first, again = (encoder.encode(pixels.reshape(1, *frame)).clone() for _ in range(2))
    finally:
        encoder.batch = asked
    if not torch.equal(first.nan_to_num(), again.nan_to_num()):
        raise EncodingError(
            f"{encoder.identity.name} gives the same frame another embedding each time; let its network draw nothing "
            "at random once it is in evaluation mode"
        )


def _refuse_another_width(pvr: Pvr, shape: tuple[int, ...]) -> None:
    """A specification of one's own says how wide its embeddings are; of a map that is flattened, its channels."""
    width = shape[0] if pvr.pooling == "conv-map" else shape[-1]
    if width != pvr.width and pvr.pooling != "flat":
        raise WeightsError(
            f"the specification of {pvr.name} says width {pvr.width}, but its embeddings are {list(shape)}; "
            f"write {width}"
        )


def frozen(network: Network) -> Network:
    """A network in evaluation mode whose weights no one trains.

    Raises:
        WeightsError: it does not let itself be put there, as a network of one's own might.
    """
    network.eval().requires_grad_(False)
    training = [name for name, module in network.named_modules() if module.training]
    if training or any(parameter.requires_grad for parameter in network.parameters()):
        raise WeightsError(
            f"{training[0] if training else 'a parameter'} stays in training mode; mend the network's `train`"
        )
    return network


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Float32 is float32 on a GPU too, where convolutions round to ten bits else, and equal batches give equal bits."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic
    matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = before


@contextlib.contextmanager
def suitable_threads(device: torch.device) -> Iterator[None]:
    """On a CPU, so many threads that equal batches give equal bits; the process has its own back afterwards."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _identity(pvr: Pvr, network: Network, weights: WeightsIdentity) -> EncoderIdentity:
    return EncoderIdentity(
        name=pvr.name,
        title=pvr.title if weights.random_seed is None else f"{pvr.title}, random weights",
        architecture=pvr.architecture,
        overrides=pvr.overrides,
        positions=pvr.positions,
        weights=weights,
        recipe=pvr.recipe,
        layer=network.layer,
        blocks=network.blocks,
        final_norm=network.final_norm,
        pooling=pvr.pooling,
        shape=(),
    )
