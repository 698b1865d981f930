"""How DreamerV3 reads an observation, and how it predicts it back.

* One embedding: a trainable linear map, as in Schneider et al. (NeurIPS 2024, section 3.1), or the reference's MLP of
  three layers, which the study found no different (figure 9). The decoder predicts the embedding, not the image.
* Patch tokens: pooled by one attention query, as in a ViT's attention-pooling head; the decoder predicts each token.
* Pixels, the study's from-scratch baseline: the reference's convolutions (danijar/dreamerv3 ``dreamerv3/rssm.py`` at
  f8817c4, ``Encoder``, ``Decoder``), 5 × 5, pooled by maxima, and a decoder whose first map has a block for each block
  of the recurrent state.

Reconstruction errors are summed over an embedding's numbers or a frame's pixels, and averaged over tokens.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.layers import MLP, BlockLinear, ConvLayer, Layer
from pvrpipe.worldmodel.rssm import Size

ENCODERS = {"vector": ("linear", "mlp"), "tokens": ("attention",), "pixels": ("cnn",)}
LAYERS = 3  # of an MLP that reads or predicts an embedding
HEADS = 4  # of the attention that pools tokens
STAGES = (2, 3, 4, 4)  # channels of the convolutions, as multiples of a sixteenth of the units
KERNEL = 5
SPACE_BLOCKS = 8
SMALLEST, LARGEST = 3, 16  # sides of the map that is left of a frame


def encoder_for(
    observation: Observation, encoder: str, size: Size
) -> ConvEncoder | AttentionPool | VectorEncoder:
    """The network that reads an observation (..., *shape), with its ``width``; ``auto`` is the first that fits.

    Raises:
        UnknownNameError: this kind of observation is not read that way.
    """
    names = ENCODERS[observation.kind]
    name = names[0] if encoder == "auto" else encoder
    if name not in names:
        raise UnknownNameError.among(f"encoder of {observation.kind}", encoder, ("auto", *names))
    if name == "cnn":
        return ConvEncoder(observation, size.units // 16)
    if name == "attention":
        return AttentionPool(observation, size.units)
    return VectorEncoder(observation, size.units, LAYERS if name == "mlp" else 0)


def decoder_for(
    observation: Observation, size: Size, features: int
) -> ConvDecoder | TokenDecoder | VectorDecoder:
    """The network that predicts an observation from the state, with its ``loss``."""
    if observation.kind == "pixels":
        return ConvDecoder(observation, size)
    if observation.kind == "tokens":
        return TokenDecoder(observation, size.units, features)
    return VectorDecoder(observation, size.units, features)


class VectorEncoder(nn.Module):
    """A linear map, or an MLP."""

    def __init__(self, observation: Observation, units: int, layers: int) -> None:
        super().__init__()
        self.width = units
        if layers:
            self.map: nn.Module = nn.Sequential(
                *(Layer(units if i else observation.width, units) for i in range(layers))
            )
        else:
            self.map = nn.Linear(observation.width, units)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, units)."""
        return self.map(x)


class AttentionPool(nn.Module):
    """One learned query over K tokens that know their place."""

    def __init__(self, observation: Observation, units: int) -> None:
        super().__init__()
        tokens, features = observation.shape
        self.width, self.heads = units, HEADS
        self.place = nn.Parameter(torch.zeros(tokens, units))
        self.query = nn.Parameter(torch.zeros(units))
        self.into, self.out = Layer(features, units), Layer(units, units)
        self.keys_values = nn.Linear(units, 2 * units)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, K, D) -> (B, T, units)."""
        tokens = self.into(x) + self.place
        keys, values = self.keys_values(tokens).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        scores = (keys * self.query.unflatten(0, (self.heads, -1))).sum(-1) / keys.shape[-1] ** 0.5
        shares = torch.softmax(scores.float(), -2).to(values.dtype)
        return self.out((shares.unsqueeze(-1) * values).sum(-3).flatten(-2))


class ConvEncoder(nn.Module):
    """The reference's convolutions over frames."""

    def __init__(self, observation: Observation, depth: int) -> None:
        super().__init__()
        side = stage_side(observation)
        channels = [observation.shape[-1], *(depth * stage for stage in STAGES)]
        self.stages = nn.Sequential(
            *(ConvLayer(a, b, KERNEL, pool=2) for a, b in itertools.pairwise(channels))
        )
        self.width = side * side * channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, 3) in [0, 1] -> (B, T, width)."""
        frames = self.stages((x - 0.5).flatten(0, 1).permute(0, 3, 1, 2))
        return frames.flatten(1).unflatten(0, x.shape[:2])


class VectorDecoder(nn.Module):
    """Three hidden layers and a linear map onto the embedding."""

    def __init__(self, observation: Observation, units: int, features: int) -> None:
        super().__init__()
        self.mlp = MLP(features, units, LAYERS, observation.width)

    def forward(self, features: Tensor) -> Tensor:
        """(..., features) -> (..., D)."""
        return self.mlp(features)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Squared error, summed over the numbers of a row: (B, T)."""
        return (self(features) - target).square().sum(-1)


class TokenDecoder(nn.Module):
    """A trunk from the state, and one head that makes each token of it by the token's place."""

    def __init__(self, observation: Observation, units: int, features: int) -> None:
        super().__init__()
        tokens, width = observation.shape
        self.trunk = MLP(features, units, LAYERS - 1, units)
        self.place = nn.Parameter(torch.zeros(tokens, units))
        self.head = MLP(units, units, 1, width)
        nn.init.normal_(self.place, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(..., features) -> (..., K, D)."""
        return self.head(self.trunk(features).unsqueeze(-2) + self.place)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Squared error, summed over a token's numbers and averaged over tokens: (B, T)."""
        return (self(features) - target).square().sum(-1).mean(-1)


class ConvDecoder(nn.Module):
    """From the state to a frame: one map from each part of it, then convolutions between doublings."""

    def __init__(self, observation: Observation, size: Size) -> None:
        super().__init__()
        self.size, self.side = size, stage_side(observation)
        channels = [size.units // 16 * stage for stage in STAGES]
        space = self.side**2 * channels[-1]
        self.of_deter = BlockLinear(size.deter, space, SPACE_BLOCKS)
        self.of_stoch = nn.Sequential(
            Layer(size.categoricals * size.classes, 2 * size.units), nn.Linear(2 * size.units, space)
        )
        self.norm = nn.RMSNorm(channels[-1], eps=1e-4)
        back = channels[::-1]
        self.stages = nn.ModuleList(ConvLayer(a, b, KERNEL) for a, b in itertools.pairwise(back))
        self.out = nn.Conv2d(channels[0], observation.shape[-1], KERNEL, padding=KERNEL // 2)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, d + S·C) -> (B, T, H, W, 3) in [0, 1]."""
        deter, stoch = features.flatten(0, 1).split(
            [self.size.deter, self.size.categoricals * self.size.classes], -1
        )
        grid = self.side, self.side
        blocks = self.of_deter(deter.unflatten(-1, (SPACE_BLOCKS, -1))).unflatten(-1, (*grid, -1))
        x = blocks.permute(0, 2, 3, 1, 4).flatten(-2) + self.of_stoch(stoch).unflatten(-1, (*grid, -1))
        x = F.silu(self.norm(x.to(self.norm.weight.dtype))).permute(0, 3, 1, 2)
        for stage in self.stages:
            x = stage(F.interpolate(x, scale_factor=2.0))
        frames = torch.sigmoid(self.out(F.interpolate(x, scale_factor=2.0)))
        return frames.permute(0, 2, 3, 1).unflatten(0, features.shape[:2])

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Squared error, summed over a frame's pixels: (B, T)."""
        return (self(features) - target).square().flatten(2).sum(-1)


def stage_side(observation: Observation) -> int:
    """The side of the map that the convolutions leave of a square frame.

    Raises:
        InvalidValueError: the frame is not square, or of a size that they do not take.
    """
    height, width, _ = observation.shape
    side, rest = divmod(height, 2 ** len(STAGES))
    if height != width or rest or not SMALLEST <= side <= LARGEST:
        sizes = " ".join(str(16 * s) for s in range(4, LARGEST + 1, 4))
        raise InvalidValueError(
            f"frames of {height} × {width} do not fit the convolutions; give --pixels one of {sizes}"
        )
    return side
