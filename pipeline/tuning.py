"""An encoder as a part of a model: what of it learns, and frames to embeddings while gradients are recorded.

The last n blocks of a vision transformer, or the last n stages of a ResNet, and what stands behind them (the final
norm, a pooling head) learn; what stands before them keeps its weights, and no gradient goes through it. Batch norms
keep their statistics throughout, for the network stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, refuse_norm
from pvrpipe.pipeline.networks import MapNetwork, Network, StagedNetwork, TokenNetwork
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.readout import Readout
from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.specifications import EncoderIdentity, Tuning

ALL = "all"


class TunedEncoder(nn.Module):
    """A representation whose last parts learn: frames (N, H, W, 3) uint8 -> (N, D), or tokens (N, K, D).

    Args:
        tuning: which encoder, and how much of it learns.
        frame: (H, W).
        readout: what of it is the embedding.
        device: where to compute.

    Raises:
        WeightsError, UnknownNameError: the encoder cannot be had.
        InvalidValueError: it has not so many blocks, or none that can learn.
    """

    def __init__(self, tuning: Tuning, frame: tuple[int, int], readout: Readout, device: str) -> None:
        super().__init__()
        encoder = Encoder(EncoderRequest(tuning.pvr, tuning.weights, device=device, readout=readout))
        self.network, self.recipe, self.batch = encoder.network, encoder.pvr.recipe, encoder.batch
        self.identity: EncoderIdentity = encoder.identity_on(*frame)
        self.tuning = tuning
        chosen = unfrozen(self.network, tuning.unfreeze, self.identity.name)
        for parameter in chosen:
            parameter.requires_grad_(True)
        if chosen:
            self._freeze_unused(chosen, torch.zeros((1, *frame, 3), dtype=torch.uint8, device=encoder.device))

    def forward(self, frames: Tensor) -> Tensor:
        """As many frames at once as when a store is embedded, so that memory does not grow with what is frozen."""
        return torch.cat([self.network(preprocess(part, self.recipe)) for part in frames.split(self.batch)])

    def _freeze_unused(self, chosen: Sequence[nn.Parameter], frame: Tensor) -> None:
        """What the embedding does not depend on, such as a head that is not read, is not said to have learned."""
        gradients = torch.autograd.grad(self(frame).sum(), chosen, allow_unused=True)
        for parameter, gradient in zip(chosen, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def tuned_as_asked(tuning: Tuning, frame: tuple[int, int], asked: Readout, device: str) -> TunedEncoder:
    """A :class:`TunedEncoder` by the readout that a user gives; one that a run records says more than he chose.

    Raises:
        InvalidValueError: also where a final norm is chosen that the encoder has not.
    """
    encoder = TunedEncoder(tuning, frame, asked, device)
    refuse_norm(encoder.network, encoder.identity, asked)
    return encoder


def tuning_of(pvr: str, weights: str, unfreeze: str) -> Tuning:
    """How an encoder is asked for, from wherever the run is gone on with."""
    request = EncoderRequest(pvr, weights).anywhere()
    number = str(int(unfreeze)) if unfreeze.isdecimal() else unfreeze
    return Tuning(pvr=request.pvr, weights=request.weights, unfreeze=number)


def unfrozen(network: Network, unfreeze: str, name: str) -> list[nn.Parameter]:
    """The parameters that learn.

    Raises:
        InvalidValueError: there are not so many blocks, or the network cannot learn.
    """
    if unfreeze == "0":
        return []
    if network.pooling == "keypoints":
        raise InvalidValueError(
            f"--unfreeze {unfreeze}: {name} chooses its keypoints, which no gradient goes through; give 0, or "
            "another --pvr"
        )
    if unfreeze == ALL:
        return list(network.parameters())
    parts, behind = parts_of(network)
    if not parts:
        raise InvalidValueError(f"--unfreeze {unfreeze}: {name} has no blocks to count; give 0 or {ALL}")
    if not unfreeze.isdecimal() or int(unfreeze) > len(parts):
        kind = "blocks" if isinstance(network, TokenNetwork) else "stages"
        raise InvalidValueError(
            f"--unfreeze {unfreeze}: {name} has {len(parts)} {kind}; give 0 to {len(parts)} or {ALL}"
        )
    return [p for part in (*parts[-int(unfreeze) :], *behind) for p in part.parameters()]


def parts_of(network: Network) -> tuple[list[nn.Module], list[nn.Module]]:
    """What can be unfrozen one by one, in order, and what stands behind the last of it."""
    trunk = network.trunk
    if isinstance(network, TokenNetwork):
        names = [name for name, _ in trunk.named_children()]
        behind = [trunk.get_submodule(name) for name in names[names.index("blocks") + 1 :]]
        return list(trunk.get_submodule("blocks").children()), behind
    if isinstance(network, MapNetwork) and not isinstance(network, StagedNetwork) and len(network.stages) > 1:
        stages = [stage for stage in network.stages.values() if isinstance(stage, nn.Module)]
        heads = [getattr(trunk, head) for head in ("head", "fc") if hasattr(trunk, head)]
        return stages, heads
    return [], []
