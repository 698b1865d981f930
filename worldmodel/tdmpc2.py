"""TD-MPC2's world model on embeddings: a SimNorm latent, its dynamics and the reward.

After nicklashansen/tdmpc2 at e9f5932 (``tdmpc2/common/world_model.py``, ``layers.py``, ``tdmpc2.py``) with
the input of Schneider et al. (NeurIPS 2024): the last three embeddings side by side. The part that needs
no policy: consistency and reward; value and policy come with the agent.

Reward is predicted from (z[t], a[t]) and compared with reward[t + 1], which is received on arriving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.worldmodel.distributions import TwoHot
from pvrpipe.worldmodel.inputs import Standardise

STACK = 3
GROUP = 8  # a latent is groups of eight numbers that sum to one
RHO = 0.5
CONSISTENCY = 20.0
REWARD = 0.1
INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """Widths of a published size, and the number of layers of its encoder."""

    encoder: int
    hidden: int
    latent: int
    encoder_layers: int


SIZES = {
    "1m": Size(256, 384, 128, 2),
    "5m": Size(256, 512, 512, 2),
    "19m": Size(1024, 1024, 768, 3),
    "48m": Size(1792, 1792, 768, 4),
    "317m": Size(4096, 4096, 1376, 5),
}


class SimNorm(nn.Module):
    """Softmax over groups of eight (TD-MPC2, equation 5)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return torch.softmax(x.unflatten(-1, (-1, GROUP)), -1).flatten(-2)


def layer(features: int, units: int, activation: nn.Module) -> list[nn.Module]:
    """A linear map, layer norm, and the activation."""
    return [nn.Linear(features, units), nn.LayerNorm(units), activation]


def mlp(features: int, units: int, layers: int, last: list[nn.Module]) -> nn.Sequential:
    """``layers`` hidden Mish layers and the last one as given."""
    hidden = [m for i in range(layers) for m in layer(units if i else features, units, nn.Mish())]
    return nn.Sequential(*hidden, *last)


def initialise(module: nn.Module) -> None:
    """Truncated normal of one width everywhere, no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=INIT_STD)
            nn.init.zeros_(part.bias)


def stacked(embedding: Tensor, first: Tensor | None = None) -> Tensor:
    """The last three embeddings of each row side by side, oldest first.

    Args:
        embedding: (B, T, D).
        first: (B,), the earliest row that may be looked back to; before it, it is repeated. Row 0 if None.

    Returns:
        (B, T, 3·D).
    """
    B, T, _ = embedding.shape
    row = torch.arange(T, device=embedding.device)
    earliest = torch.zeros(B, 1, dtype=row.dtype, device=row.device) if first is None else first.unsqueeze(1)
    batch = torch.arange(B, device=row.device).unsqueeze(1)
    back = [embedding[batch, torch.maximum(row - lag, earliest)] for lag in reversed(range(STACK))]
    return torch.cat(back, -1)


class TDMPC2(nn.Module):
    """Encoder, latent dynamics and reward.

    Args:
        size: a name in :data:`SIZES`.
        embedding: D.
        action: A.
    """

    rows_before: ClassVar[int] = STACK - 1  # rows a window needs besides those it trains on

    def __init__(self, size: str, embedding: int, action: int) -> None:
        super().__init__()
        self.size = widths = SIZES[size]
        joint, latent = widths.latent + action, widths.latent
        self.two_hot = TwoHot.tdmpc2()
        self.standardise = Standardise(embedding)
        self.encoder = mlp(
            STACK * embedding,
            widths.encoder,
            widths.encoder_layers - 1,
            layer(widths.encoder, latent, SimNorm()),
        )
        self.dynamics = mlp(joint, widths.hidden, 2, layer(widths.hidden, latent, SimNorm()))
        logits = nn.Linear(widths.hidden, len(self.two_hot.bins))
        self.reward = mlp(joint, widths.hidden, 2, [logits])
        initialise(self)
        nn.init.zeros_(logits.weight)

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Consistency and reward along the rolled-out latent (TD-MPC2, equation 3, without the value).

        Args:
            batch: embedding (B, 2 + H + 1, D), action (B, 2 + H + 1, A), reward and is_first
                (B, 2 + H + 1): windows of one episode, led by two rows that only fill the stack.
            random: not used, nothing is sampled here.

        Returns:
            The loss, and its terms before scaling.
        """
        del random
        embedding, action, reward = self._aligned(batch)
        H = reward.shape[1]
        rho = RHO ** torch.arange(H, device=reward.device) / H
        with torch.no_grad():
            target = self.encoder(embedding[:, 1:])
        z = self.encoder(embedding[:, 0])
        rolled = [z]
        for t in range(H):
            rolled.append(self.dynamics(torch.cat([rolled[-1], action[:, t]], -1)))
        latents = torch.stack(rolled, 1)
        logits = self.reward(torch.cat([latents[:, :-1], action], -1))
        consistency = (latents[:, 1:] - target).square().mean((0, 2))
        reward_loss = self.two_hot.loss(logits, reward).mean(0)
        terms = {"consistency": (consistency * rho).sum(), "reward": (reward_loss * rho).sum()}
        loss = CONSISTENCY * terms["consistency"] + REWARD * terms["reward"]
        return loss, {"loss": loss, **terms}

    def _aligned(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Stacks (B, H + 1, 3·D), the actions between them (B, H, A), the rewards these bring (B, H).

        A window that begins with its episode has no rows before it to look back to: there the first row
        is repeated and the window's last two rows are left out instead.
        """
        embedding, action, reward = self.standardise(batch["embedding"]), batch["action"], batch["reward"]
        begins = batch["is_first"][:, 0]
        rows = embedding.shape[1] - self.rows_before
        start = torch.where(begins, 0, self.rows_before)
        kept = start.unsqueeze(1) + torch.arange(rows, device=start.device)
        lanes = torch.arange(len(kept), device=start.device).unsqueeze(1)
        stacks = stacked(embedding)[lanes, kept]
        return stacks, action[lanes, kept[:, :-1]], reward[lanes, kept[:, 1:]]

    def filter(self, embedding: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The encoded latent of each row of whole episodes (N, T, D), twice: to start from, to compare with."""
        del action, random
        z = self.encoder(stacked(self.standardise(embedding)))
        return z, z

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Open loop from one row's latent (N, n) along actions (N, T, A).

        Returns:
            Latents (N, T, n) and expected reward (N, T) of the T rows after it.
        """
        del random
        latents = [state]
        for t in range(action.shape[1]):
            latents.append(self.dynamics(torch.cat([latents[-1], action[:, t]], -1)))
        before = torch.stack(latents[:-1], 1)
        logits = self.reward(torch.cat([before, action], -1))
        return torch.stack(latents[1:], 1), self.two_hot.decode(logits)

    @staticmethod
    def divergence(predicted: Tensor, filtered: Tensor) -> Tensor:
        """Mean squared error over the latent: (..., n) twice -> (...). At most 2 / 8."""
        return F.mse_loss(predicted, filtered, reduction="none").mean(-1)
