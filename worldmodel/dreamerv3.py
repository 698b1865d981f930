"""DreamerV3's world model on embeddings: an RSSM behind a linear map, trained to decode the embedding.

After danijar/dreamerv3 at e3f0224 (``dreamerv3/rssm.py``, ``configs.yaml``) with the encoder of Schneider
et al. (NeurIPS 2024): frozen representation, one trainable linear map, and the decoder predicts the
embedding, not the image. Inputs and reconstruction targets pass through symlog, as in the study's DMC
runs; ``symlog_inputs=False`` is what it used for ManiSkill2.

Row t holds the observation, the reward received on arriving there and the action taken *from* there, so
the recurrence takes the action of row t - 1, and the reward head reads reward[t] off the state of row t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.worldmodel.distributions import TwoHot, balanced_kl, categorical_kl, straight_through, symlog
from pvrpipe.worldmodel.inputs import Standardise
from pvrpipe.worldmodel.scan import UPDATE_BIAS, ScanWeights, posterior_scan
from pvrpipe.worldmodel.steps import NORM_EPS

SCALES = {"reconstruction": 1.0, "reward": 1.0, "continue": 1.0, "dynamics": 1.0, "representation": 0.1}
FREE_NATS = 1.0  # per row, after the sum over categoricals
CONTINUE = 1 - 1 / 333  # what a row that is not terminal should predict: the discount itself
INIT_STD = 1.1368  # makes up for cutting a normal off at two standard deviations


@dataclass(frozen=True)
class Size:
    """Widths of a published size: deter d, hidden H, classes C of each categorical, units of the heads."""

    deter: int
    hidden: int
    classes: int
    units: int
    categoricals: int = 32
    blocks: int = 8


SIZES = {
    "1m": Size(512, 64, 4, 64),
    "12m": Size(2048, 256, 16, 256),
    "25m": Size(3072, 384, 24, 384),
    "50m": Size(4096, 512, 32, 512),
    "100m": Size(6144, 768, 48, 768),
    "200m": Size(8192, 1024, 64, 1024),
    "400m": Size(12288, 1536, 96, 1536),
}


class BlockLinear(nn.Module):
    """G independent linear maps over G equal slices of the features."""

    def __init__(self, features: int, out: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, features // blocks, out // blocks))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, in / G) -> (B, G, out / G)."""
        G, _, width = self.weight.shape
        return torch.einsum("bgi,gio->bgo", x, self.weight) + self.bias.view(G, width)


class Layer(nn.Module):
    """A linear map, RMS norm without shift, and silu."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, units)
        self.norm = nn.RMSNorm(units, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., units)."""
        return F.silu(self.norm(self.linear(x)))


class MLP(nn.Module):
    """Hidden layers and a linear output."""

    def __init__(self, features: int, units: int, layers: int, out: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(*(Layer(units if i else features, units) for i in range(layers)))
        self.out = nn.Linear(units, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., out)."""
        return self.out(self.hidden(x))


def initialise(module: nn.Module) -> None:
    """Truncated normal by fan-in; a block kernel counts the fan-in of all its blocks together."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, BlockLinear)):
            fan_in = part.in_features if isinstance(part, nn.Linear) else part.weight[..., 0].numel()
            std = INIT_STD / fan_in**0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(part.bias)


class RSSM(nn.Module):
    """Recurrent state-space model with a block-GRU core (``dreamerv3/rssm.py``).

    Its state is ``deter`` (B, d) and one-hot ``stoch`` (B, S, C).
    """

    def __init__(self, size: Size, tokens: int, action: int) -> None:
        super().__init__()
        d, H, G = size.deter, size.hidden, size.blocks
        self.size, self.width = size, size.categoricals * size.classes
        self.deter_in, self.stoch_in, self.action_in = Layer(d, H), Layer(self.width, H), Layer(action, H)
        self.core = BlockLinear(d + 3 * H * G, d, G)
        self.core_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.gates = BlockLinear(d, 3 * d, G)
        self.prior = MLP(d, H, 2, self.width)
        self.posterior_in, self.posterior_out = Layer(d + tokens, H), nn.Linear(H, self.width)

    def step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """The next deter (B, d), from the state and the action (B, A) taken in it."""
        (B, d), G = deter.shape, self.size.blocks
        features = [self.deter_in(deter), self.stoch_in(stoch.flatten(1)), self.action_in(bounded(action))]
        shared = torch.cat(features, -1).unsqueeze(1).expand(-1, G, -1)
        core = self.core(torch.cat([deter.view(B, G, -1), shared], -1)).flatten(1)
        gates = self.gates(F.silu(self.core_norm(core)).view(B, G, -1))
        reset, candidate, update = (g.reshape(B, d) for g in gates.chunk(3, -1))
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate, torch.sigmoid(update + UPDATE_BIAS))

    def prior_logits(self, deter: Tensor) -> Tensor:
        """What the next observation will look like, from the past alone: (..., d) -> (..., S, C)."""
        return self._categoricals(self.prior(deter))

    def posterior_logits(self, deter: Tensor, tokens: Tensor) -> Tensor:
        """The same once the observation is there."""
        return self._categoricals(self.posterior_out(self.posterior_in(torch.cat([deter, tokens], -1))))

    def observe(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Filter rows from the zero state, which every ``is_first`` row returns to.

        Only what depends on the row before is in the loop; the action's and the observation's shares of
        the linear maps, and the prior, are products over all rows.

        Args:
            tokens: (B, T, tokens).
            action: (B, T, A), taken *from* each row.
            is_first: (B, T) bool.
            uniform: (B, T, S) in [0, 1), the chance in the samples.

        Returns:
            deter (B, T, d), stoch (B, T, S, C), posterior logits (B, T, S, C).
        """
        d, H = self.size.deter, self.size.hidden
        G, k = self.size.blocks, d // self.size.blocks
        before = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        before = before.masked_fill(is_first.unsqueeze(-1), 0)
        of_deter, of_state, of_action = self.core.weight.split([k, 2 * H, H], 1)
        of_past, of_tokens = self.posterior_in.linear.weight.split([d, tokens.shape[-1]], 1)
        weights = ScanWeights(
            deter_in=self.deter_in.linear.weight,
            deter_in_bias=self.deter_in.linear.bias,
            stoch_in=self.stoch_in.linear.weight,
            stoch_in_bias=self.stoch_in.linear.bias,
            in_gain=torch.stack([self.deter_in.norm.weight, self.stoch_in.norm.weight]),
            core_deter=of_deter.contiguous(),
            core_features=of_state.transpose(0, 1).reshape(2 * H, d),
            core_gain=self.core_norm.weight,
            gates=self.gates.weight,
            gates_bias=self.gates.bias.view(G, 1, 3 * k),
            post=of_past.contiguous(),
            post_gain=self.posterior_in.norm.weight,
            logits=self.posterior_out.weight,
            logits_bias=self.posterior_out.bias,
        )
        action_kernel = of_action.permute(1, 0, 2).reshape(H, d).t()
        action_part = F.linear(self.action_in(bounded(before.transpose(0, 1))), action_kernel, self.core.bias)
        token_part = F.linear(tokens.transpose(0, 1), of_tokens, self.posterior_in.linear.bias)
        keep = (~is_first).t().unsqueeze(-1).to(tokens.dtype)
        states = posterior_scan(action_part, token_part, keep, uniform.transpose(0, 1), weights)
        deter, stoch, logits = (s.transpose(0, 1) for s in states)
        return deter, stoch, logits

    def imagine(
        self, deter: Tensor, stoch: Tensor, action: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run on without observations.

        Args:
            deter: (B, d), of the row to start from.
            stoch: (B, S, C), of the row to start from.
            action: (B, T, A), the first of them taken from that row.
            uniform: (B, T, S) in [0, 1), the chance in the samples.

        Returns:
            deter (B, T, d), stoch (B, T, S, C), prior logits (B, T, S, C), of the T rows after it.
        """
        states = []
        for t in range(action.shape[1]):
            deter = self.step(deter, stoch, action[:, t])
            logits = self.prior_logits(deter)
            stoch = straight_through(logits, uniform[:, t])
            states.append((deter, stoch, logits))
        deters, stochs, all_logits = (torch.stack(s, 1) for s in zip(*states, strict=True))
        return deters, stochs, all_logits

    def _categoricals(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.size.categoricals, self.size.classes))


def bounded(action: Tensor) -> Tensor:
    """Actions beyond [-1, 1] are scaled back to its edge."""
    return action / action.detach().abs().clamp_min(1)


class DreamerV3(nn.Module):
    """The world model: linear map, RSSM, and heads that decode embedding, reward and continuation.

    Args:
        size: a name in :data:`SIZES`.
        embedding: D.
        action: A.
        symlog_inputs: squash embeddings, as input and as target.
    """

    rows_before: ClassVar[int] = 0  # rows a window needs besides those it trains on

    def __init__(self, size: str, embedding: int, action: int, *, symlog_inputs: bool = True) -> None:
        super().__init__()
        widths = SIZES[size]
        self.size, self.symlog_inputs = widths, symlog_inputs
        features = widths.deter + widths.categoricals * widths.classes
        self.standardise = Standardise(embedding)
        self.encoder = nn.Linear(embedding, widths.units)
        self.rssm = RSSM(widths, widths.units, action)
        self.two_hot = TwoHot.dreamerv3()
        self.decoder = MLP(features, widths.units, 3, embedding)
        self.reward = MLP(features, widths.units, 1, len(self.two_hot.bins))
        self.continues = MLP(features, widths.units, 1, 1)
        initialise(self)
        nn.init.zeros_(self.reward.out.weight)

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The world-model loss (DreamerV3, equations 4 and 5) and its parts.

        Args:
            batch: embedding (B, T, D), action (B, T, A), reward (B, T), is_first and is_terminal (B, T).
            random: decides the samples.

        Returns:
            The loss, and its terms before scaling; ``kl`` is the KL divergence before free nats.
        """
        target = self._inputs(batch["embedding"])
        deter, stoch, posterior = self.rssm.observe(
            self.encoder(target), batch["action"], batch["is_first"], self._uniform(target, random)
        )
        prior = self.rssm.prior_logits(deter)
        features = torch.cat([deter, stoch.flatten(-2)], -1)
        continues = (~batch["is_terminal"]).to(target.dtype) * CONTINUE
        dynamics, representation = balanced_kl(posterior, prior)
        terms = {
            "reconstruction": (self.decoder(features) - target).square().sum(-1).mean(),
            "reward": self.two_hot.loss(self.reward(features), batch["reward"]).mean(),
            "continue": F.binary_cross_entropy_with_logits(self.continues(features).squeeze(-1), continues),
            "dynamics": dynamics.clamp_min(FREE_NATS).mean(),
            "representation": representation.clamp_min(FREE_NATS).mean(),
        }
        loss = torch.stack([SCALES[name] * term for name, term in terms.items()]).sum()
        return loss, {"loss": loss, **terms, "kl": dynamics.mean()}

    def filter(self, embedding: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the model believes at each row of whole episodes, having seen the rows up to it.

        Args:
            embedding: (N, T, D), from an episode's first row.
            action: (N, T, A), taken from each row.
            random: decides the samples.

        Returns:
            State (N, T, d + S·C), to predict from; posterior logits (N, T, S, C), to compare with.
        """
        tokens = self.encoder(self._inputs(embedding))
        is_first = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        is_first[:, 0] = True
        deter, stoch, logits = self.rssm.observe(tokens, action, is_first, self._uniform(tokens, random))
        return torch.cat([deter, stoch.flatten(-2)], -1), logits

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Open loop from one row's state (N, d + S·C) along actions (N, T, A).

        Returns:
            Prior logits (N, T, S, C) and expected reward (N, T) of the T rows after it.
        """
        deter, stoch = state.split([self.size.deter, self.rssm.width], -1)
        stoch = stoch.unflatten(-1, (self.size.categoricals, self.size.classes))
        deter, stoch, logits = self.rssm.imagine(deter, stoch, action, self._uniform(action, random))
        features = torch.cat([deter, stoch.flatten(-2)], -1)
        return logits, self.two_hot.decode(self.reward(features))

    @staticmethod
    def divergence(predicted: Tensor, filtered: Tensor) -> Tensor:
        """Mean of forward and backward KL in nats, unclipped: (..., S, C) twice -> (...)."""
        return (categorical_kl(predicted, filtered) + categorical_kl(filtered, predicted)) / 2

    def _inputs(self, embedding: Tensor) -> Tensor:
        """What the encoder sees and the decoder predicts."""
        standard = self.standardise(embedding)
        return symlog(standard) if self.symlog_inputs else standard

    def _uniform(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Chance for every row (B, T, ...), drawn on the CPU so that devices agree: (B, T, S)."""
        drawn = torch.rand(*rows.shape[:2], self.size.categoricals, generator=random)
        return drawn.to(rows.device, rows.dtype)
