"""What an encoder takes of a device's memory, measured: how large its batches are, and which encoders fit together."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pvrpipe.pipeline.encoders import BATCH, Encoder
from pvrpipe.schemas.errors import EncodingError
from pvrpipe.schemas.specifications import EncoderIdentity
from pvrpipe.store.paging import available_memory

SHARE = 0.8  # of the free memory that is planned with; allocators need room to round up
#: Rows that a batch takes beside its own: ResNet-50 and ViT-S at 224 px on an H200; on a CPU none of these, five of
#: ResNet-18 at 64 px.
ROWS_OF_A_LAUNCH = {"cpu": 2, "cuda": 16}
STEP = {"cpu": 1, "cuda": 4}  # between batches to choose from; fours can be halved
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h of the GNU C library
TRIED = (4, 8)  # frames of the two batches by which the memory of one frame is measured


@dataclass(frozen=True)
class Need:
    """Bytes that an encoder takes of its device."""

    weights: int
    batch: int
    """more while a batch is computed"""


@dataclass
class Peak:
    """The most bytes in use within a block, beyond those in use before it."""

    bytes: int = field(default=0)


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the block; of a process on a CPU where the system tells it (Linux), else 0."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    reset = _reset_peak()
    before = _status("VmRSS")
    yield peak
    peak.bytes = max(0, _status("VmHWM") - before) if reset else 0


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, what one batch frees is kept for the next, and given back to the system at the end.

    The GNU C library gives large blocks back at once, and what it asks for anew has to be zeroed, page by page: a tenth
    of a ViT-S's time at 224 px. Other C libraries are left alone. Afterwards it does what it would have come to by
    itself: blocks of 32 MiB and more come from the system.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type != "cpu" or options is None:
        yield
        return
    options(M_MMAP_MAX, 0)
    options(M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        options(M_MMAP_MAX, 1 << 16)
        options(M_MMAP_THRESHOLD, 32 << 20)
        options(M_TRIM_THRESHOLD, 64 << 20)
        _give_back()


def free_memory(device: torch.device) -> int:
    """Bytes of the device that are free, or that torch holds and does not use."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return available_memory()


def fit(encoder: Encoder, frame: tuple[int, ...], shards: Sequence[int], fixed: bool) -> Need:
    """Set the batch of an encoder to what its device has room for, and say what it takes.

    That is at most 256 on a GPU and 32 on a CPU, where larger batches gain nothing, so that shards are cut into batches
    that are nearly full. On a GPU it is halved until it fits by the memory that two small batches took; it is tried,
    and halved where it does not fit after all.

    Args:
        encoder: on its device.
        frame: shape (H, W, 3) of the frames.
        shards: the rows of each.
        fixed: the batch was asked for, or is that of a store which was begun with it.

    Raises:
        EncodingError: a batch that was asked for, or one frame, does not fit; or the recipe refuses such frames.
    """
    weights = sum(t.numel() * t.element_size() for t in encoder.network.state_dict().values())
    if not fixed:
        encoder.batch = even_batch(shards, encoder.device.type)
    if encoder.device.type == "cpu":
        if encoder.batch * math.prod(frame) > free_memory(encoder.device):
            raise _too_large(encoder)
        asked, encoder.batch = encoder.batch, 1
        each = tried_until_it_fits(encoder, frame, fixed)
        encoder.batch = asked
        return Need(weights, each * asked)
    if not fixed:
        _tried(encoder, frame, TRIED[0])  # libraries take their workspaces
        few, more = (_tried(encoder, frame, size) for size in TRIED)
        each = max(1, (more - few) // (TRIED[1] - TRIED[0]))
        most = int(SHARE * free_memory(encoder.device)) // each
        while encoder.batch > max(1, most):
            encoder.batch = smaller(encoder.batch)
    return Need(weights, tried_until_it_fits(encoder, frame, fixed))


def tried_until_it_fits(encoder: Encoder, frame: tuple[int, ...], fixed: bool) -> int:
    """Peak bytes of a batch of the encoder, which is halved until it fits."""
    while True:
        try:
            return _tried(encoder, frame, encoder.batch)
        except torch.OutOfMemoryError:
            if encoder.batch == 1:
                raise no_room(encoder) from None
            if fixed:
                raise _too_large(encoder) from None
        encoder.batch = smaller(encoder.batch)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def passes(needs: Sequence[tuple[Need, int]], room: int) -> list[list[int]]:
    """Which encoders go over the frames together: in order, as many as fit.

    They share the frames of one batch, so that of two batch sizes one must divide the other.

    Args:
        needs: what each takes, and its batch.
        room: bytes that there are.
    """
    found: list[list[int]] = []
    for index, (_, batch) in enumerate(needs):
        together = [*found[-1], index] if found else []
        fits = sum(needs[i][0].weights for i in together) + max(
            (needs[i][0].batch for i in together), default=0
        )
        share = all(max(needs[i][1], batch) % min(needs[i][1], batch) == 0 for i in together)
        if together and share and fits <= room:
            found[-1] = together
        else:
            found.append([index])
    return found


def no_room(encoder: Encoder) -> EncodingError:
    """The error of an encoder that cannot be used here at all."""
    return EncodingError(
        f"{encoder.identity.name}: one frame does not fit into the memory of {encoder.device}; free some, or "
        "embed with fewer --pvr at a time"
    )


def _too_large(encoder: Encoder) -> EncodingError:
    return EncodingError(
        f"{encoder.identity.name}: a batch of {encoder.batch} does not fit into the memory of {encoder.device}; "
        "free some, or give a smaller --batch"
    )


def even_batch(shards: Sequence[int], device: str) -> int:
    """The batch that shards of so many rows take least time in, on a ``cpu`` or ``cuda``.

    The last of a shard is padded, so every batch of it takes as long as a full one: as its rows, and as
    ``ROWS_OF_A_LAUNCH`` more.
    """
    step, launch = STEP[device], ROWS_OF_A_LAUNCH[device]
    sizes = range(step, min(BATCH[device], step * -(-max(shards) // step)) + 1, step)
    return min(reversed(sizes), key=lambda size: sum(-(-rows // size) for rows in shards) * (size + launch))


def smaller(batch: int) -> int:
    """Half of a batch, or the next smaller size that divides it; 1 of 1."""
    return next((size for size in range(batch // 2, 1, -1) if batch % size == 0), 1)


def _tried(encoder: Encoder, frame: tuple[int, ...], frames: int) -> int:
    """Peak bytes of a batch of so many frames."""
    asked, encoder.batch = encoder.batch, frames
    try:
        with peak_of(encoder.device) as peak:
            pixels = torch.zeros((frames, *frame), dtype=torch.uint8, device=encoder.device)
            embedding = encoder.encode(pixels)
            _refuse_another_shape(encoder.identity_on(*frame[:2]), tuple(embedding.shape[1:]))
    finally:
        encoder.batch = asked
    return peak.bytes


def _refuse_another_shape(identity: EncoderIdentity, shape: tuple[int, ...]) -> None:
    if shape != identity.shape:
        raise EncodingError(
            f"{identity.name} gives embeddings of {list(shape)}, but its specification says "
            f"{list(identity.shape)}; mend its specification"
        )


def _reset_peak() -> bool:
    """Let the kernel count the peak of this process anew (man 5 proc, clear_refs).

    What the C library keeps of freed memory is given back first: used again, it would not show.
    """
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Let the C library give the system all that is free, where it is GNU's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _status(field: str) -> int:
    """Bytes that the kernel counts of this process; 0 where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)
