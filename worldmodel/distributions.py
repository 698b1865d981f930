"""The distributions world models predict: two-hot scalars and categoricals mixed with uniform.

Two variants of two-hot are in use, and their losses and checkpoints are not interchangeable:

* DreamerV3 (current): bins at raw values, ``symexp(linspace(-20, 20, 255))``; a target is split between
  the two bins around it in *raw* space (danijar/dreamerv3 ``embodied/jax/heads.py: symexp_twohot``).
* TD-MPC2: bins ``linspace(-10, 10, 101)`` in symlog space; a target is squashed first and split there
  (nicklashansen/tdmpc2 ``common/math.py: two_hot``).

The cross-entropy of a two-hot target has the target's entropy as its floor, up to ln 2 = 0.693 nats: a
reward loss of 0.6 can be optimal. Everything here computes in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNIMIX = 0.01


def symlog(x: Tensor) -> Tensor:
    """Sign(x) · ln(1 + |x|) (DreamerV3, equation 9)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """The inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())


class TwoHot(nn.Module):
    """A scalar as a categorical over fixed bins, split between the two bins around it.

    Args:
        bins: (n,), increasing and symmetric around 0.
        squash: whether the bins lie in symlog space (TD-MPC2) or hold raw values (DreamerV3).
    """

    bins: Tensor

    def __init__(self, bins: Tensor, *, squash: bool) -> None:
        super().__init__()
        self.register_buffer("bins", bins, persistent=False)
        self.squash = squash

    @classmethod
    def dreamerv3(cls, bins: int = 255) -> TwoHot:
        """Raw-value bins, mirrored so that the middle one is exactly 0 and the rest cancel exactly."""
        step = 40.0 / (bins - 1)
        half = symexp(-20.0 + step * torch.arange((bins + 1) // 2, dtype=torch.float64))
        if bins % 2:
            half[-1] = 0.0
        half = half.float()
        return cls(torch.cat([half, -half[: bins // 2].flip(0)]), squash=False)

    @classmethod
    def tdmpc2(cls, bins: int = 101, limit: float = 10.0) -> TwoHot:
        """Evenly spaced bins in symlog space; a target beyond ``limit`` there saturates."""
        return cls(torch.linspace(-limit, limit, bins), squash=True)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The lower bin's index (int64) and the upper bin's weight, both of the shape of ``value``."""
        value = symlog(value.float()) if self.squash else value.float()
        value = value.clamp(self.bins[0], self.bins[-1])
        lower = (torch.searchsorted(self.bins, value.contiguous(), right=True) - 1).clamp(
            0, len(self.bins) - 2
        )
        low, high = self.bins[lower], self.bins[lower + 1]
        return lower, (value - low) / (high - low)

    def encode(self, value: Tensor) -> Tensor:
        """The two-hot target itself: (...) -> (..., n)."""
        lower, weight = self.split(value)
        target = torch.zeros(*value.shape, len(self.bins), device=value.device)
        target.scatter_(-1, lower.unsqueeze(-1), (1 - weight).unsqueeze(-1))
        return target.scatter_(-1, lower.unsqueeze(-1) + 1, weight.unsqueeze(-1))

    def loss(self, logits: Tensor, value: Tensor) -> Tensor:
        """Cross-entropy in nats: logits (..., n), value (...) -> (...)."""
        lower, weight = self.split(value)
        logp = torch.log_softmax(logits.float(), -1)
        low, high = logp.gather(-1, torch.stack([lower, lower + 1], -1)).unbind(-1)
        return -((1 - weight) * low + weight * high)

    def floor(self, value: Tensor) -> Tensor:
        """The smallest cross-entropy there is, the entropy of the target in nats: (...) -> (...)."""
        _, weight = self.split(value)
        return torch.special.entr(weight) + torch.special.entr(1 - weight)

    def decode(self, logits: Tensor) -> Tensor:
        """The expected value: (..., n) -> (...).

        Bins are added in mirrored pairs, so that a uniform distribution decodes to exactly 0 although
        DreamerV3's outermost bins lie at ±4.8e8.
        """
        terms = torch.softmax(logits.float(), -1) * self.bins
        pairs = len(self.bins) // 2
        value = (terms[..., :pairs] + terms[..., -pairs:].flip(-1)).sum(-1)
        if len(self.bins) % 2:
            value = value + terms[..., pairs]
        return symexp(value) if self.squash else value


def unimix_probs(logits: Tensor, unimix: float = UNIMIX) -> Tensor:
    """Softmax mixed with ``unimix`` of the uniform distribution, over the last axis."""
    return (1 - unimix) * torch.softmax(logits, -1) + unimix / logits.shape[-1]


def one_hot_sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one-hot samples by inverting the cumulative distribution.

    Args:
        probs: (..., C).
        uniform: (...) in [0, 1); the only source of chance, so that a draw can be repeated.

    Returns:
        (..., C), exactly one-hot; no gradient passes.
    """
    index = (uniform.unsqueeze(-1) > probs.cumsum(-1)[..., :-1]).sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


def straight_through(logits: Tensor, uniform: Tensor, unimix: float = UNIMIX) -> Tensor:
    """One-hot samples (..., C) whose gradient is that of the unimixed probabilities."""
    probs = unimix_probs(logits, unimix)
    return one_hot_sample(probs.detach(), uniform) + (probs - probs.detach())


def kl_both_ways(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and KL(q || p) in nats, summed over the categoricals, not clipped by free nats.

    Args:
        p: probabilities (..., S, C), none of them 0.
        q: the same.

    Returns:
        (...) each.
    """
    ratio = p.log() - q.log()
    return (p * ratio).sum((-2, -1)), -(q * ratio).sum((-2, -1))


def balanced_kl(posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """KL(posterior || prior) twice, (...) each: the first moves only the prior, the second the posterior.

    Equals the first of :func:`kl_both_ways` with one side detached.
    """
    p, q = unimix_probs(posterior.float()), unimix_probs(prior.float())
    log_p, log_q = p.log(), q.log()
    dynamics = (p.detach() * (log_p.detach() - log_q)).sum((-2, -1))
    representation = (p * (log_p - log_q.detach())).sum((-2, -1))
    return dynamics, representation
