"""Golden frames: a few frames stored with their embeddings, by which another machine checks its encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pvrpipe.pipeline.agreement import agreement, agreement_of_keypoints, rounding
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import (
    EncodingError,
    InvalidValueError,
    NotAStoreError,
    UnknownNameError,
    one_line,
)
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.store.building import PendingStore
from pvrpipe.store.golden import read_golden
from pvrpipe.store.layout import GOLDEN
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.verifying import Failure

GOLDEN_FRAMES = 8


@dataclass(frozen=True)
class GoldenCheck:
    """How far the embeddings computed here are from those stored."""

    ok: bool
    frames: int
    largest_difference: float
    """absolute, over all numbers"""
    smallest_cosine: float
    """over the frames; 1 where both are zeros"""
    differs: str
    """fields of the encoder that are not those of the store's; empty if none"""

    @property
    def measured(self) -> str:
        """How far, in words."""
        return f"largest difference {self.largest_difference:.3g}, smallest cosine {self.smallest_cosine:.6f}"

    @property
    def failures(self) -> list[Failure]:
        """What is wrong, as :func:`~pvrpipe.store.verifying.verify` says it; empty where the encoder is the same."""
        if self.ok:
            return []
        another = f"another encoder here ({self.differs}): " if self.differs else "other embeddings here: "
        return [Failure(GOLDEN, another + self.measured)]


def golden_frames(store: Store, pending: PendingStore) -> dict[str, Rows]:
    """Frames of the first shard, evenly spaced, their embeddings and their rows."""
    embeddings = Store(pending.folder, pending.as_sealed(), store.episodes)
    rows = np.unique(np.linspace(0, store.manifest.shards[0].rows - 1, GOLDEN_FRAMES).astype(np.int64))
    pick = {"frame": store.shard(0), "embedding": embeddings.shard(0)}
    arrays = {
        name: np.concatenate([shard.rows(name, int(row), 1) for row in rows]) for name, shard in pick.items()
    }
    return {**arrays, "row": rows}


def refuse_ungolden(manifest: Manifest, where: object, pvr: str | None = None) -> None:
    """Refuse what :func:`check_golden` cannot check, before a whole store is read for it.

    Args:
        manifest: of the store.
        where: it lies, for messages.
        pvr: as there.

    Raises:
        NotAStoreError: the store has no golden frames.
        UnknownNameError, WeightsError: there is no such encoder here.
    """
    made = manifest.embeddings
    if made is None or GOLDEN not in manifest.files:
        raise NotAStoreError(f"{where} has no golden frames; only embedding stores have")
    try:
        find_pvr(pvr or made.encoder.name)
    except UnknownNameError as error:
        if pvr is not None:
            raise
        raise UnknownNameError(
            f"{where} was embedded by {made.encoder.name}, which is no name known here; give its folder with --pvr"
        ) from error


def check_golden(
    store: Store, pvr: str | None = None, weights: str | None = None, device: str = "auto"
) -> GoldenCheck:
    """Embed the golden frames of a store again, with the weights at hand.

    Args:
        store: an embedding store.
        pvr: name or path of the encoder; None is the one the store names.
        weights: where they are; None is ``auto``, or the store's own seed where nobody trained them.
        device: to compute on.

    Raises:
        NotAStoreError: the store has no golden frames.
        CorruptStoreError: they are not what the manifest promises.
        WeightsError, UnknownNameError: the encoder cannot be had here.
    """
    refuse_ungolden(store.manifest, store.path, pvr)
    made, found = store.manifest.embeddings, read_golden(store)
    assert made is not None
    assert found is not None
    frames, stored = np.asarray(found["frame"], np.uint8), found["embedding"]
    seed = made.encoder.weights.random_seed
    source = weights or ("auto" if seed is None else f"random:{seed}")
    request = EncoderRequest(
        pvr or made.encoder.name,
        source,
        made.computation.precision,
        device,
        len(frames),
        readout=Readout.of(made.encoder),
    )
    try:
        encoder = Encoder(request)
    except InvalidValueError as error:  # of the readout, which is the store's
        raise EncodingError(
            f"{request.pvr} cannot be read out as {store.path} was ({one_line(error)[:120]}); give the store's own "
            "encoder with --pvr"
        ) from error
    identity = encoder.identity_on(*frames.shape[1:3])
    computed = encoder(frames)
    if computed.shape != stored.shape:
        raise EncodingError(
            f"{encoder.identity.name} gives embeddings of {list(computed.shape[1:])}, the store holds "
            f"{list(stored.shape[1:])}; give the store's own encoder with --pvr"
        )
    differ = differences(_meaning(made.encoder.model_dump()), _meaning(identity.model_dump()), "here")
    if encoder.precision == "fp32":
        smallest, agree = agreement(computed, stored)
    elif encoder.pvr.pooling == "keypoints":
        smallest, agree = agreement_of_keypoints(computed, stored)
    else:
        encoder.precision = "fp32"
        smallest, agree = agreement(computed, stored, rounding(computed, encoder(frames)))
    largest = float(np.abs(computed.astype(np.float64) - stored.astype(np.float64)).max())
    return GoldenCheck(agree and not differ, len(frames), largest, smallest, differ)


def _meaning(identity: dict[str, object]) -> dict[str, object]:
    """An encoder without what it is called, and without where its file lay: the tensors' hash says which it is."""
    weights = dict(identity["weights"])  # type: ignore[call-overload]
    for told in ("source", "revision", "file", "file_sha256", "licence"):
        del weights[told]
    others = {name: value for name, value in identity.items() if name not in ("name", "title")}
    return {**others, "weights": weights}
