"""What of a network is the embedding: which layer or blocks, normalised or not, pooled how, at what input size.

Every combination is an encoder of its own, with an identity and a folder of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from pvrpipe.pipeline.pvrs import LARGEST, Pooling, Pvr
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.schemas.specifications import EncoderIdentity

SMALLEST = 16  # pixels of a side
MOST_BLOCKS = 1000  # of a list; no network has as many


@dataclass(frozen=True)
class Readout:
    """What the user asks of a representation beyond its name; None is what its authors do."""

    layer: str | None = None
    """``last``, a block (``5``) or several (``3,7,11``, joined along the features), a stage (``layer2``)"""
    blocks: str | None = None
    """the blocks that compute, all others are taken out: ``0-5``, ``6-11``, ``0,2,4``"""
    final_norm: bool | None = None
    pooling: str | None = None
    size: int | None = None
    """pixels of a side that the network sees"""

    @property
    def label(self) -> str:
        """What to add to a folder's name; empty for the authors' own readout."""
        norm = {None: "", True: "norm", False: "no-norm"}[self.final_norm]
        parts = (
            f"layer{self.layer.removeprefix('layer').replace(',', '+')}" if self.layer else "",
            f"blocks{self.blocks.replace(',', '+')}" if self.blocks else "",
            norm,
            self.pooling or "",
            f"{self.size}px" if self.size else "",
        )
        return "".join(f"-{part}" for part in parts if part)

    @staticmethod
    def of(identity: EncoderIdentity) -> Readout:
        """The readout that an identity records, in full."""
        blocks = None if identity.blocks is None else ",".join(map(str, identity.blocks))
        return Readout(identity.layer, blocks, identity.final_norm, identity.pooling, identity.recipe.crop)


def read_out(pvr: Pvr, readout: Readout) -> Pvr:
    """A representation with its readout replaced where another is asked for.

    Raises:
        UnknownNameError, InvalidValueError: there is no such pooling, block list or size.
    """
    changes: dict[str, object] = {}
    if readout.layer is not None:
        changes["layer"] = readout.layer
    if readout.blocks is not None:
        changes["blocks"] = block_list(readout.blocks)
    if readout.final_norm is not None:
        changes["final_norm"] = readout.final_norm
    if readout.pooling is not None:
        if readout.pooling not in get_args(Pooling):
            raise UnknownNameError.among("pooling", readout.pooling, get_args(Pooling))
        changes["pooling"] = readout.pooling
    resized = pvr.model_copy(update=changes)
    return resized if readout.size in (None, pvr.recipe.crop) else _at_size(resized, int(readout.size or 0))


def _at_size(pvr: Pvr, size: int) -> Pvr:
    """The same at another input size: the resize keeps its ratio to the crop, positions are resampled."""
    if not SMALLEST <= size <= LARGEST:
        raise InvalidValueError(f"--input-size {size}: give the pixels of a side, {SMALLEST} to {LARGEST}")
    if pvr.architecture == "conv-autoencoder":  # a linear map of all its pixels
        raise InvalidValueError(
            f"--input-size {size}: {pvr.name} sees {pvr.recipe.crop} pixels and no other size; leave it out, or "
            f"train another with `pvrpipe pretrain --size {size}`"
        )
    crop, resize = pvr.recipe.crop, pvr.recipe.resize
    scaled = size if crop is None or resize is None else round(resize * size / crop)
    overrides = dict(pvr.overrides)
    side = next((name for name in ("img_size", "crop_size", "size") if name in overrides), None)
    if side is not None:
        overrides[side] = size
    return pvr.model_copy(
        update={
            "recipe": pvr.recipe.model_copy(update={"resize": scaled, "crop": size}),
            "overrides": overrides,
            "positions": pvr.positions or ("bicubic-antialias" if side == "img_size" else None),
        }
    )


def block_list(text: str) -> tuple[int, ...]:
    """``0-5`` or ``0,2,4-6`` as numbers.

    Raises:
        InvalidValueError: it is not a rising list of numbers.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, to, last = part.partition("-")
            numbers += range(int(first), min(int(last if to else first), MOST_BLOCKS) + 1)
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] >= MOST_BLOCKS:
        raise InvalidValueError(f"--blocks {text}: write a range or a rising list, e.g. 0-5 or 0,2,4")
    return tuple(numbers)
