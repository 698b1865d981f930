"""An encoder inside a model: what it makes of frames, before any of it has learned.

Any ``torch.nn.Module`` from frames (N, H, W, 3) uint8 to embeddings (N, D), or tokens (N, K, D), will do; what of it
requires gradients learns with the model. One that says which encoder it is, as those of ``pvrpipe.pipeline.tuning`` do
by ``identity`` and ``tuning``, can be told from others when the run is gone on with or probed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import EncodingError, InvalidValueError, RunError
from pvrpipe.schemas.manifest import ColumnStatistics
from pvrpipe.schemas.specifications import EncoderIdentity, Tuning
from pvrpipe.store.casting import is_finite
from pvrpipe.store.moments import RunningMoments, statistics_of
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.runs import RunRecord

#: Makes a backbone on a device, for a worker elsewhere.
Looking = Callable[[str], nn.Module]
MOMENT_ROWS, MOMENT_EPISODES = 1024, 64  # at most, of training, by whose embeddings all are standardised


def identity_of(backbone: nn.Module | None) -> tuple[EncoderIdentity | None, Tuning | None]:
    """Which encoder it is and how much of it learns, as far as it says so."""
    return getattr(backbone, "identity", None), getattr(backbone, "tuning", None)


def device_of(backbone: nn.Module) -> torch.device:
    """Where it computes."""
    return next((p.device for p in backbone.parameters()), torch.device("cpu"))


def frame_of(store: Store) -> tuple[int, int, int]:
    """The shape (H, W, 3) of a store's frames.

    Raises:
        InvalidValueError: it holds none.
    """
    if store.manifest.kind != "rollouts":
        raise InvalidValueError(
            f"{store.path} holds embeddings, but an encoder inside the model reads frames; give the rollout store "
            "that they were made of, or leave --pvr out"
        )
    height, width, channels = store.column("frame").shape
    return height, width, channels


@torch.no_grad()
def embedding_shape(backbone: nn.Module, store: Store) -> tuple[int, ...]:
    """The shape of what a backbone makes of one of a store's frames; from here on it is in evaluation mode."""
    frame = torch.zeros((1, *frame_of(store)), dtype=torch.uint8, device=device_of(backbone))
    return tuple(backbone.eval()(frame).shape[1:])  # a batch norm would learn of this frame


@torch.no_grad()
def moments_before(backbone: nn.Module, store: Store) -> ColumnStatistics:
    """Mean and deviation of the embeddings of training rows; of some, evenly spread, where there are many.

    Raises:
        EncodingError: one is not finite; names its episode.
    """
    train = store.episodes.filter(store.episodes["split"] == "train")
    episodes = train[:: -(-len(train) // MOMENT_EPISODES)]
    every = -(-int(episodes["rows"].sum()) // MOMENT_ROWS)
    running = RunningMoments(embedding_shape(backbone, store)[-1])
    for number in episodes["episode"]:
        frames = torch.from_numpy(store.read_episode(number, ("frame",))["frame"][::every])
        embedding = backbone(frames.to(device_of(backbone))).float().cpu().numpy()
        if not is_finite(embedding):
            raise EncodingError(
                f"the encoder inside the model gives an embedding that is not finite in episode {number}; "
                "check its weights"
            )
        running.add(embedding)
    return statistics_of(running.told())


def check_backbone(run: RunRecord, backbone: nn.Module | None) -> None:
    """Refuse to load a run without its backbone, or with another.

    Raises:
        RunError: it is not the run's.
    """
    encoder, inside = run.encoder, run.setting.frames is not None
    if inside != (backbone is not None):
        raise RunError(
            f"the run's model looks at frames through {run.pvr}; load it with that backbone"
            if inside
            else f"the run's model, {run.pvr}, has no backbone; leave it out"
        )
    here, _ = identity_of(backbone)
    if encoder is None or here is None:
        return
    if here.weights.tensors_sha256 != encoder.weights.tensors_sha256 or here.shape != encoder.shape:
        differ = differences(encoder.model_dump(), here.model_dump(), "here")
        raise RunError(
            f"the run was trained through {encoder.name}, which is another encoder here ({differ}); give its "
            "own weights with --weights"
        )
