"""DreamerV3's world model: an RSSM that reads an observation and learns to predict it back, offline.

After danijar/dreamerv3 at e3f0224 (``dreamerv3/agent.py``, ``configs.yaml``) and Schneider et al. (NeurIPS 2024): on
embeddings the representation is frozen, and the decoder predicts the embedding, not the image. How each kind of
observation is read and predicted is in :mod:`pvrpipe.worldmodel.observations`. Embeddings pass through symlog as input
and as target, as in the study's DMC runs; ``symlog_inputs=False`` is what it used for ManiSkill2.

The reward head reads reward[t], received on arriving, off the state of row t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.store.loading import without_waiting
from pvrpipe.worldmodel.distributions import TwoHot, balanced_kl, kl_both_ways, unimix_probs
from pvrpipe.worldmodel.inputs import Observation, Seen
from pvrpipe.worldmodel.layers import MLP, initialise
from pvrpipe.worldmodel.observations import decoder_for, encoder_for
from pvrpipe.worldmodel.predictions import Filtered, Imagined
from pvrpipe.worldmodel.ranks import averaged, own_part
from pvrpipe.worldmodel.rssm import RSSM, Size

SCALES = {"reconstruction": 1.0, "reward": 1.0, "continue": 1.0, "dynamics": 1.0, "representation": 0.1}
FREE_NATS = 1.0  # per row, after the sum over categoricals
CONTINUE = 1 - 1 / 333  # what a row that is not terminal should predict: the discount itself

SIZES = {
    "1m": Size(512, 64, 4, 64),
    "12m": Size(2048, 256, 16, 256),
    "25m": Size(3072, 384, 24, 384),
    "50m": Size(4096, 512, 32, 512),
    "100m": Size(6144, 768, 48, 768),
    "200m": Size(8192, 1024, 64, 1024),
    "400m": Size(12288, 1536, 96, 1536),
}


class DreamerV3(nn.Module):
    """The world model: encoder, RSSM, and heads that predict observation, reward and continuation.

    Args:
        size: a name in :data:`SIZES`.
        observation: what a row shows.
        action: A.
        encoder: how the observation is read, a name in :data:`pvrpipe.worldmodel.observations.ENCODERS`.
        symlog_inputs: squash embeddings, as input and as target.
        burn_in: first rows of a window that have no losses and carry the state, and its gradient, to the others; where
            an episode begins with the window, they are learned from too.
    """

    columns: ClassVar[tuple[str, ...]] = ()  # beside observation, action, reward and the flags
    divergence: ClassVar[str] = "kl_mean"

    def __init__(
        self,
        size: str,
        observation: Observation,
        action: int,
        *,
        encoder: str = "auto",
        symlog_inputs: bool = True,
        burn_in: int = 0,
    ) -> None:
        super().__init__()
        self.size = widths = SIZES[size]
        self.rows_before = burn_in
        features = widths.deter + widths.categoricals * widths.classes
        self.seen = Seen(observation, symlog_inputs=symlog_inputs)
        self.encoder = encoder_for(observation, encoder, widths)
        self.rssm = RSSM(widths, self.encoder.width, action)
        self.two_hot = TwoHot.dreamerv3()
        self.decoder = decoder_for(observation, widths, features)
        self.reward = MLP(features, widths.units, 1, len(self.two_hot.bins))
        self.continues = MLP(features, widths.units, 1, 1)
        initialise(self)
        nn.init.zeros_(self.reward.out.weight)

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, see :meth:`losses`, by samples that ``random`` decides."""
        return self.losses(batch, self.draw(batch, random))

    def draw(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Tensor:
        """The chance in the samples of a batch's states: (B, T, S)."""
        return self._uniform(batch["observation"], random)

    def losses(self, batch: Mapping[str, Tensor], drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The world-model loss (DreamerV3, equations 4 and 5) and its parts.

        Args:
            batch: observation (B, T, *shape), action (B, T, A), reward (B, T), is_first and is_terminal (B, T).
            drawn: (B, T, S) in [0, 1).

        Returns:
            The loss, and its terms before scaling; ``kl`` is the KL divergence before free nats.
        """
        seen = self.seen(batch["observation"])
        deter, stoch, posterior = self.rssm.observe(
            self.encoder(seen), batch["action"], batch["is_first"], drawn
        )
        prior = self.rssm.prior_logits(deter)
        features = torch.cat([deter, stoch.flatten(-2)], -1)
        continues = (~batch["is_terminal"]).to(features.dtype) * CONTINUE
        dynamics, representation = balanced_kl(posterior, prior)
        rows = {
            "reconstruction": self.decoder.loss(features, self.seen.target(batch["observation"], seen)),
            "reward": self.two_hot.loss(self.reward(features), batch["reward"]),
            "continue": F.binary_cross_entropy_with_logits(
                self.continues(features).squeeze(-1), continues, reduction="none"
            ),
            "dynamics": dynamics.clamp_min(FREE_NATS),
            "representation": representation.clamp_min(FREE_NATS),
        }
        mean = self._mean_over(batch["is_first"])
        terms = {name: mean(values) for name, values in rows.items()}
        loss = torch.stack([SCALES[name] * term for name, term in terms.items()]).sum()
        return loss, {"loss": loss, **terms, "kl": mean(dynamics)}

    def filter(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Filtered:
        """What the model believes at each row of whole episodes, having seen the rows up to it.

        Args:
            batch: observation (N, T, *shape) from an episode's first row, action (N, T, A) taken from each row.
            random: decides the samples.

        Returns:
            States, which are features too, (N, T, d + S·C); posterior logits (N, T, S, C), to compare with.
        """
        tokens = self.encoder(self.seen(batch["observation"]))
        is_first = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        is_first[:, 0] = True
        deter, stoch, logits = self.rssm.observe(
            tokens, batch["action"], is_first, self._uniform(tokens, random)
        )
        states = torch.cat([deter, stoch.flatten(-2)], -1)
        return Filtered(lambda t: states[:, t], logits, states)

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> Imagined:
        """Open loop from one row's state (N, d + S·C) along actions (N, T, A).

        Returns:
            Prior logits (N, T, S, C), rewards and states (N, T, d + S·C) of the T rows after it.
        """
        deter, stoch = state.split([self.size.deter, self.rssm.width], -1)
        stoch = stoch.unflatten(-1, (self.size.categoricals, self.size.classes))
        deter, stoch, logits = self.rssm.imagine(deter, stoch, action, self._uniform(action, random))
        features = torch.cat([deter, stoch.flatten(-2)], -1)
        reward = self.reward(features)
        return Imagined(logits, self.two_hot.decode(reward), features, reward)

    @staticmethod
    def divergences(predicted: Tensor, filtered: Tensor) -> dict[str, Tensor]:
        """Of logits (..., S, C) twice -> (...) each.

        KL in nats, summed over the categoricals, unclipped: ``kl_forward`` of the posterior to the prior,
        ``kl_backward`` of the prior to the posterior, ``kl_mean`` of the two. ``mse`` of the probabilities, averaged
        over S and C.
        """
        first = (logits.float().movedim(-1, 0).contiguous() for logits in (filtered, predicted))
        p, q = (unimix_probs(logits, axis=0) for logits in first)  # along a few neighbours softmax is slow
        forward, backward = kl_both_ways(p, q)
        return {
            "kl_mean": (forward + backward) / 2,
            "kl_forward": forward,
            "kl_backward": backward,
            "mse": (p - q).square().mean((0, -1)),
        }

    @staticmethod
    def average(latents: Tensor) -> Tensor:
        """Logits of the mean probabilities: (N, S, C) -> (S, C)."""
        return torch.softmax(latents.float(), -1).mean(0).log()

    def _mean_over(self, is_first: Tensor) -> Callable[[Tensor], Tensor]:
        """The mean over the rows that are learned from."""
        if not self.rows_before:
            return torch.mean
        learned = torch.ones_like(is_first, dtype=torch.float32)
        learned[:, : self.rows_before] = is_first[:, :1].float()
        share = learned / averaged(learned.sum())
        return lambda values: (values * share).sum()

    def _uniform(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Chance for every row (B, T, ...), drawn on the CPU so that devices agree: (B, T, S)."""
        shape = (*rows.shape[:2], self.size.categoricals)
        drawn = own_part(lambda whole: torch.rand(whole, generator=random), shape)
        return without_waiting(drawn.to(self.rssm.core.bias.dtype), rows.device)
