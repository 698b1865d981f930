"""DreamerV3's recurrent state-space model with a block-GRU core (danijar/dreamerv3 ``dreamerv3/rssm.py`` at e3f0224).

Row t holds the observation, the reward received on arriving there and the action taken *from* there, so
the recurrence takes the action of row t - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.worldmodel.distributions import straight_through
from pvrpipe.worldmodel.layers import MLP, BlockLinear, Layer
from pvrpipe.worldmodel.scan import UPDATE_BIAS, ScanWeights, posterior_scan
from pvrpipe.worldmodel.steps import NORM_EPS


@dataclass(frozen=True)
class Size:
    """Widths of a published size: deter d, hidden H, classes C of each categorical, units of the heads."""

    deter: int
    hidden: int
    classes: int
    units: int
    categoricals: int = 32
    blocks: int = 8


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
        keep = (~is_first).t().unsqueeze(-1).to(uniform.dtype)
        with torch.autocast(tokens.device.type, enabled=False):  # the state is carried in full precision
            states = posterior_scan(
                action_part.to(uniform.dtype),
                token_part.to(uniform.dtype),
                keep,
                uniform.transpose(0, 1),
                weights,
            )
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
