"""A causal transformer over embeddings, after DINO-WM: the next frame's tokens from the last three frames and actions.

After Zhou et al. (2024) and gaoyuezhou/dino_wm (``models/vit.py``, ``visual_world_model.py``): every token of a frame
carries an embedding of the action taken from it, and of proprioception where that is asked for; attention sees a
frame's own tokens and those of earlier frames; the mean squared error to the next frame's embedding is the loss.
Ours besides: embeddings are standardised and mapped to the transformer's width, which in the original is their own;
and a reward head (DreamerV3's symexp two-hot) reads what is predicted, reward[t + 1] from the frames and actions up to
row t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.worldmodel.distributions import TwoHot
from pvrpipe.worldmodel.inputs import Observation, Seen, Standardise
from pvrpipe.worldmodel.predictions import Filtered, Imagined

HISTORY = 3  # frames
CONDITION = 10  # numbers that an action, and proprioception, become
INIT_STD = 0.02
ENCODERS = {"vector": ("linear",), "tokens": ("attention",)}  # the transformer's own ways to read them


@dataclass(frozen=True)
class Size:
    """Layers, width, heads, width of a head, and hidden units of each layer's MLP."""

    layers: int
    width: int
    heads: int
    head: int
    hidden: int


SIZES = {"1m": Size(4, 128, 4, 32, 512), "5m": Size(6, 256, 4, 64, 1024), "19m": Size(6, 384, 16, 64, 2048)}


class Attention(nn.Module):
    """Attention over all tokens of a frame and of the frames before it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.heads * size.head, bias=False)
        self.out = nn.Linear(size.heads * size.head, size.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T·K, width), mask (T·K, T·K) -> the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each added to what came in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = Attention(size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size.width),
            nn.Linear(size.width, size.hidden),
            nn.GELU(),
            nn.Linear(size.hidden, size.width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T·K, width) -> the same."""
        x = x + self.attention(x, mask)
        return x + self.mlp(x)


class DinoWM(nn.Module):
    """Predictor and reward head.

    Args:
        size: a name in :data:`SIZES`.
        observation: one embedding or tokens.
        action: A.
        encoder: how the observation is read, a name in :data:`ENCODERS`.
        proprioception: numbers of the state that are seen and predicted too; 0: none.
    """

    rows_before: int = 0
    divergence: ClassVar[str] = "mse"

    def __init__(
        self,
        size: str,
        observation: Observation,
        action: int,
        *,
        encoder: str = "auto",
        proprioception: int = 0,
    ) -> None:
        super().__init__()
        if observation.kind == "pixels":
            raise InvalidValueError(
                "dinowm learns from embeddings, and this store holds frames; first run `pvrpipe embed --pvr NAME`, "
                "or take --model dreamerv3 or tdmpc2"
            )
        if encoder not in (names := ("auto", *ENCODERS[observation.kind])):
            raise UnknownNameError.among(f"encoder of {observation.kind} for dinowm", encoder, names)
        self.size = widths = SIZES[size]
        self.columns: tuple[str, ...] = ("state",) if proprioception else ()
        self.tokens, self.features = (
            observation.shape if observation.kind == "tokens" else (1, observation.width)
        )
        self.proprioception = proprioception
        self.seen = Seen(observation)
        self.of_action = nn.Linear(action, CONDITION)
        if proprioception:
            self.seen_state, self.of_state = Standardise(proprioception), nn.Linear(proprioception, CONDITION)
            self.next_state = nn.Linear(widths.width, proprioception)
        self.into = nn.Linear(self.features + CONDITION * (2 if proprioception else 1), widths.width)
        self.place = nn.Parameter(torch.empty(HISTORY, self.tokens, widths.width))
        self.blocks = nn.ModuleList(Block(widths) for _ in range(widths.layers))
        self.norm = nn.LayerNorm(widths.width)
        self.out = nn.Linear(widths.width, self.features)
        self.two_hot = TwoHot.dreamerv3()
        bins = len(self.two_hot.bins)
        self.reward = nn.Sequential(
            nn.Linear(widths.width, widths.hidden), nn.GELU(), nn.Linear(widths.hidden, bins)
        )
        nn.init.normal_(self.place, std=INIT_STD)
        nn.init.zeros_(self.reward[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.reward[-1].bias)  # type: ignore[arg-type]

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, see :meth:`losses`."""
        return self.losses(batch, self.draw(batch, random))

    def draw(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[()]:
        """Nothing is sampled here."""
        del batch, random
        return ()

    def losses(self, batch: Mapping[str, Tensor], drawn: tuple[()] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the next embedding, and the reward's cross-entropy.

        Args:
            batch: observation (B, T, *shape), action (B, T, A), reward (B, T), windows of one episode; state (B, T, S)
                where proprioception is seen. Every run of up to three frames in a window is learned from.
            drawn: nothing.

        Returns:
            The loss, and its terms.
        """
        del drawn
        frames, action, reward = self._frames(batch), batch["action"], batch["reward"]
        runs = max(1, frames.shape[1] - HISTORY)
        length = min(HISTORY, frames.shape[1] - 1)
        before, after = (_runs(rows, runs, length) for rows in (frames, frames.detach()[:, 1:]))
        predicted, summary = self._next(before, _runs(action, runs, length))
        terms = {
            "embedding": F.mse_loss(predicted[..., : self.features], after[..., : self.features]),
            "reward": self.two_hot.loss(self.reward(summary), _runs(reward[:, 1:], runs, length)).mean(),
        }
        if self.proprioception:
            own = slice(self.features, None)
            terms["state"] = F.mse_loss(predicted[..., own], after[..., own])
        loss = torch.stack(list(terms.values())).sum()
        return loss, {"loss": loss, **terms}

    def filter(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Filtered:
        """What is observed is the latent.

        Returns:
            The last frames up to row t and the actions between them (N, F), by t; standardised embeddings
            (N, T, K, D), and their mean over the tokens as features.
        """
        del random
        frames, action = self._frames(batch), batch["action"]

        def state(t: int) -> Tensor:
            first = max(0, t + 1 - HISTORY)
            return torch.cat([frames[:, first : t + 1].flatten(1), action[:, first:t].flatten(1)], -1)

        embeddings = frames[..., : self.features]
        return Filtered(state, embeddings, embeddings.mean(-2))

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> Imagined:
        """Open loop from the frames up to a row along actions (N, T, A), each prediction seen as the next frame.

        Returns:
            Embeddings (N, T, K, D) and rewards of the T rows after it.
        """
        del random
        wide = self.tokens * (self.features + self.proprioception)
        count = (state.shape[-1] + action.shape[-1]) // (wide + action.shape[-1])
        frames = state[:, : count * wide].unflatten(-1, (count, self.tokens, -1))
        taken = torch.cat([state[:, count * wide :].unflatten(-1, (count - 1, action.shape[-1])), action], 1)
        embeddings, rewards = [], []
        for t in range(action.shape[1]):
            end = count + t
            first = max(0, end - HISTORY)
            shown = frames[:, -(end - first) :]
            predicted, summary = self._next(shown, taken[:, first:end])
            rewards.append(self.reward(summary[:, -1]))
            embeddings.append(predicted[:, -1, :, : self.features])
            frames = torch.cat([shown, predicted[:, -1:]], 1)
        latents, logits = torch.stack(embeddings, 1), torch.stack(rewards, 1)
        return Imagined(latents, self.two_hot.decode(logits), latents.mean(-2), logits)

    @staticmethod
    def divergences(predicted: Tensor, filtered: Tensor) -> dict[str, Tensor]:
        """Mean squared error over a frame's tokens: (..., K, D) twice -> (...)."""
        return {"mse": (predicted - filtered).square().mean((-2, -1))}

    @staticmethod
    def average(latents: Tensor) -> Tensor:
        """(N, K, D) -> (K, D)."""
        return latents.mean(0)

    def _frames(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens with proprioception behind each: (B, T, K, D + S), standardised."""
        tokens = self.seen(batch["observation"]).unflatten(-1, (-1, self.features)).flatten(2, -2)
        if not self.proprioception:
            return tokens
        state = self.seen_state(batch["state"]).unsqueeze(2).expand(-1, -1, self.tokens, -1)
        return torch.cat([tokens, state], -1)

    def _next(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One step ahead of every frame of a run.

        Args:
            frames: (B, T, K, D + S), at most three.
            action: (B, T, A), taken from each.

        Returns:
            The frames after each (B, T, K, D + S), and what the reward is read from (B, T, width).
        """
        T = frames.shape[1]
        tokens, state = frames.split([self.features, self.proprioception], -1)
        condition = [self.of_action(action).unsqueeze(2).expand(-1, -1, self.tokens, -1)]
        condition += [self.of_state(state)] if self.proprioception else []
        x = self.into(torch.cat([tokens, *condition], -1)) + self.place[:T]
        frame = torch.arange(T, device=x.device).repeat_interleave(self.tokens)
        mask = frame[:, None] >= frame
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x).unflatten(1, (T, self.tokens))
        summary = x.mean(2)
        following = [self.out(x)]
        if self.proprioception:
            following.append(self.next_state(summary).unsqueeze(2).expand(-1, -1, self.tokens, -1))
        return torch.cat(following, -1), summary


def _runs(rows: Tensor, runs: int, length: int) -> Tensor:
    """All runs of ``length`` rows of a window (B, T, ...), one under another: (B·runs, length, ...)."""
    at = torch.arange(runs, device=rows.device)[:, None] + torch.arange(length, device=rows.device)
    return rows[:, at].flatten(0, 1)
