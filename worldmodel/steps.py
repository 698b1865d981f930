"""One step of each layer inside the recurrence, forward and backward by hand.

Each record holds a layer's activations, of a whole sequence or (see ``scan._steps``) of one step; the
methods work on one step and write into the record, so that nothing is allocated twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pvrpipe.worldmodel.distributions import UNIMIX

NORM_EPS = 1e-4


class NormGrad(NamedTuple):
    """Gradients of a normed layer: before the norm, and before the silu."""

    pre: Tensor
    gained: Tensor


class Normed(NamedTuple):
    """silu(gain · rms_norm(pre)) as it is kept: (..., n) each, ``scale`` (..., 1)."""

    scale: Tensor
    unit: Tensor
    gained: Tensor
    value: Tensor

    def forward(self, pre: Tensor, gain: Tensor) -> Tensor:
        """The value from the pre-activation."""
        torch.rsqrt(pre.square().mean(-1, keepdim=True).add_(NORM_EPS), out=self.scale)
        torch.mul(pre, self.scale, out=self.unit)
        torch.mul(self.unit, gain, out=self.gained)
        return torch.ops.aten.silu.out(self.gained, out=self.value)

    def backward(self, grad: Tensor, gain: Tensor, out: NormGrad) -> Tensor:
        """The gradient of the pre-activation from that of the value; both are kept in ``out``."""
        torch.ops.aten.silu_backward.grad_input(grad, self.gained, grad_input=out.gained)
        direct = out.gained * gain
        along = (direct * self.unit).sum(-1, keepdim=True)
        direct.addcmul_(self.unit, along, value=-1 / direct.shape[-1])
        return torch.mul(direct, self.scale, out=out.pre)


class Gates(NamedTuple):
    """The gates as they are kept: pre-activations (..., 3·k), activations (..., k)."""

    pre: Tensor
    reset: Tensor
    candidate: Tensor
    update: Tensor

    def forward(self, before: Tensor) -> Tensor:
        """The next deter (G, B, k) from the pre-activations and the deter before."""
        reset, raw, update = self.pre.chunk(3, -1)
        torch.sigmoid(reset, out=self.reset)
        torch.tanh(self.reset * raw, out=self.candidate)
        torch.sigmoid(update, out=self.update)
        return torch.lerp(before, self.candidate, self.update)

    def backward(self, grad: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """Write the pre-activations' gradient (G, B, 3·k); return that of the deter before."""
        aten = torch.ops.aten
        d_reset, d_raw, d_update = out.chunk(3, -1)
        aten.sigmoid_backward.grad_input(grad * (self.candidate - before), self.update, grad_input=d_update)
        d_candidate = grad * self.update
        d_inner = aten.tanh_backward(d_candidate, self.candidate)
        d_raw.copy_(d_inner * self.reset)
        raw = self.pre.chunk(3, -1)[1]
        aten.sigmoid_backward.grad_input(d_inner * raw, self.reset, grad_input=d_reset)
        return grad - d_candidate


def draw_into(out: Tensor, logits: Tensor, uniform: Tensor) -> None:
    """One-hot samples of unimixed logits, as ``distributions.one_hot_sample`` draws them.

    Args:
        out: zeros (B, S·C), written to.
        logits: (B, S·C).
        uniform: (B, S).
    """
    shape = (*uniform.shape, logits.shape[-1] // uniform.shape[-1])
    probs = torch.softmax(logits.view(shape), -1)
    share = probs.new_full((), UNIMIX / shape[-1])
    cumulative = torch.add(share, probs, alpha=1 - UNIMIX).cumsum(-1)[..., :-1]
    index = (uniform.unsqueeze(-1) > cumulative).sum(-1, keepdim=True)
    out.view(shape).scatter_(-1, index, 1.0)
