"""The posterior recurrence of DreamerV3's RSSM over a whole sequence, with its backward pass by hand.

An RSSM filters one row after the other, so its matrix products have only B rows, and automatic
differentiation would also form every weight's gradient B rows at a time and add up T of them. Here the
loop holds only what truly depends on the step before: forward, activations go to buffers; backward, only
the gradient of the state is carried, and each weight's gradient is one product over T·B rows.

:meth:`pvrpipe.worldmodel.dreamerv3.RSSM.step` is the same mathematics one step at a time; the tests hold
the two together, values and gradients. Inside, time comes first: (T, B, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvrpipe.worldmodel.distributions import UNIMIX

NORM_EPS = 1e-4
UPDATE_BIAS = -1.0  # the update gate starts nearly closed


class ScanWeights(NamedTuple):
    """Weights of one step; d deter, H hidden, G blocks of k = d / G, S categoricals of C classes."""

    deter_in: Tensor  # (H, d)
    deter_in_bias: Tensor  # (H,)
    stoch_in: Tensor  # (H, S·C)
    stoch_in_bias: Tensor  # (H,)
    in_gain: Tensor  # (2, H)
    core_deter: Tensor  # (G, k, k)
    core_features: Tensor  # (2·H, d)
    core_gain: Tensor  # (d,)
    gates: Tensor  # (G, k, 3·k)
    gates_bias: Tensor  # (G, 1, 3·k)
    post: Tensor  # (H, d)
    post_gain: Tensor  # (H,)
    logits: Tensor  # (S·C, H)
    logits_bias: Tensor  # (S·C,)


def posterior_scan(
    action_part: Tensor, token_part: Tensor, keep: Tensor, uniform: Tensor, weights: ScanWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter a sequence from the zero state.

    Args:
        action_part: (T, B, d), what the previous action adds to the core, bias included.
        token_part: (T, B, H), what the observation adds to the posterior's layer, bias included.
        keep: (T, B, 1), 0 where an episode begins and the state is to be forgotten, else 1.
        uniform: (T, B, S) in [0, 1), the chance in the samples.
        weights: of one step.

    Returns:
        deter (T, B, d); stoch (T, B, S, C), one-hot with straight-through gradients; posterior logits
        (T, B, S, C).
    """
    deter, stoch, logits = _PosteriorScan.apply(action_part, token_part, keep, uniform, *weights)
    return deter, stoch, logits


class _PosteriorScan(torch.autograd.Function):
    """See :func:`posterior_scan`."""

    @staticmethod
    def forward(
        ctx: Any, action_part: Tensor, token_part: Tensor, keep: Tensor, uniform: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = ScanWeights(*tensors)
        T, B, d = action_part.shape
        G, k, _ = w.core_deter.shape
        H, S, C = len(w.post), uniform.shape[-1], len(w.logits) // uniform.shape[-1]
        # A product of few rows is several times faster with the weight laid out (in, out).
        deter_in, stoch_in, post, to_logits = (
            m.t().contiguous() for m in (w.deter_in, w.stoch_in, w.post, w.logits)
        )
        resets = (keep == 0).flatten(1).any(1).tolist()

        new = action_part.new_empty
        deter, stoch = new(T + 1, B, d), new(T + 1, B, S, C).zero_()
        deter[0] = 0
        logits, gates = new(T, B, S, C), new(T, G, B, 3 * k)
        gated = _Gated(new(T, G, B, k), new(T, G, B, k), new(T, G, B, k))
        into, core, hidden = (
            _Normed.empty(action_part, shape) for shape in ((T, B, 2, H), (T, B, d), (T, B, H))
        )
        pre_in = new(B, 2, H)
        for t in range(T):
            h, z = deter[t], stoch[t].flatten(1)
            if resets[t]:
                h, z = h * keep[t], z * keep[t]
            torch.addmm(w.deter_in_bias, h, deter_in, out=pre_in[:, 0])
            torch.addmm(w.stoch_in_bias, z, stoch_in, out=pre_in[:, 1])
            features = into.forward(t, pre_in, w.in_gain).view(B, 2 * H)
            pre_core = torch.addmm(action_part[t], features, w.core_features).view(B, G, k)
            blocks = h.view(B, G, k).transpose(0, 1)
            pre_core += torch.bmm(blocks, w.core_deter).transpose(0, 1)
            by_block = core.forward(t, pre_core.view(B, d), w.core_gain).view(B, G, k).transpose(0, 1)
            torch.baddbmm(w.gates_bias, by_block, w.gates, out=gates[t])
            gated.forward(t, gates[t], blocks, deter[t + 1].view(B, G, k).transpose(0, 1))
            pre_post = torch.addmm(token_part[t], deter[t + 1], post)
            seen = hidden.forward(t, pre_post, w.post_gain)
            torch.addmm(w.logits_bias, seen, to_logits, out=logits[t].view(B, S * C))
            _sample_into(stoch[t + 1], logits[t], uniform[t])
        ctx.resets = resets
        ctx.save_for_backward(*tensors, keep, deter, stoch, logits, gates, *gated, *into, *core, *hidden)
        return deter[1:], stoch[1:], logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, deter_grad: Tensor, stoch_grad: Tensor, logits_grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        w = ScanWeights(*islice(saved, len(ScanWeights._fields)))
        keep, deter, stoch, logits, gates = islice(saved, 5)
        gated = _Gated(*islice(saved, 3))
        into, core, hidden = (_Normed(*islice(saved, 4)) for _ in range(3))
        T, B, S, C = logits.shape
        G, k, _ = w.core_deter.shape
        H, d = w.post.shape
        before, stoch_before = deter[:-1] * keep, stoch[:-1].flatten(2) * keep
        probs = torch.softmax(logits, -1)
        core_deter, gates_out = w.core_deter.mT.contiguous(), w.gates.mT.contiguous()
        features_out = w.core_features.t().contiguous()

        new = deter.new_empty
        d_logits, d_gates = new(T, B, S * C), new(G, T, B, 3 * k)
        d_into, d_core, d_hidden = (_NormGrad.empty(deter, n.unit.shape) for n in (into, core, hidden))
        d_core_value = new(B, d)
        dh, dz = new(B, d).zero_(), new(B, S * C).zero_()
        for t in reversed(range(T)):
            dz = (dz.view(B, S, C) + stoch_grad[t]) * (1 - UNIMIX)
            dl = torch.ops.aten._softmax_backward_data(dz, probs[t], -1, probs.dtype)
            torch.add(dl, logits_grad[t], out=d_logits[t].view(B, S, C))
            d_pre = hidden.backward(t, torch.mm(d_logits[t], w.logits), w.post_gain, d_hidden)
            dh = torch.addmm(dh + deter_grad[t], d_pre, w.post).view(B, G, k).transpose(0, 1)
            by_block = before[t].view(B, G, k).transpose(0, 1)
            dh = gated.backward(t, dh, gates[t], by_block, d_gates[:, t])
            torch.bmm(d_gates[:, t], gates_out, out=d_core_value.view(B, G, k).transpose(0, 1))
            d_pre = core.backward(t, d_core_value, w.core_gain, d_core)
            dh = torch.baddbmm(dh, d_pre.view(B, G, k).transpose(0, 1), core_deter)
            dh = dh.transpose(0, 1).reshape(B, d)
            d_pre = into.backward(t, torch.mm(d_pre, features_out).view(B, 2, H), w.in_gain, d_into)
            dh = torch.addmm(dh, d_pre[:, 0], w.deter_in)
            dz = torch.mm(d_pre[:, 1], w.stoch_in)
            if ctx.resets[t]:
                dh, dz = dh * keep[t], dz * keep[t]

        def grouped(x: Tensor) -> Tensor:
            return x.view(T * B, G, k).transpose(0, 1)

        grads = ScanWeights(
            deter_in=_outer(d_into.pre[:, :, 0], before),
            deter_in_bias=d_into.pre[:, :, 0].sum((0, 1)),
            stoch_in=_outer(d_into.pre[:, :, 1], stoch_before),
            stoch_in_bias=d_into.pre[:, :, 1].sum((0, 1)),
            in_gain=(d_into.gained * into.unit).sum((0, 1)),
            core_deter=torch.bmm(grouped(before).mT, grouped(d_core.pre)),
            core_features=_outer(into.value.flatten(2), d_core.pre),
            core_gain=(d_core.gained * core.unit).sum((0, 1)),
            gates=torch.bmm(grouped(core.value).mT, d_gates.flatten(1, 2)),
            gates_bias=d_gates.sum((1, 2)).unsqueeze(1),
            post=_outer(d_hidden.pre, deter[1:]),
            post_gain=(d_hidden.gained * hidden.unit).sum((0, 1)),
            logits=_outer(d_logits, hidden.value),
            logits_bias=d_logits.sum((0, 1)),
        )
        return d_core.pre, d_hidden.pre, None, None, *grads


class _NormGrad(NamedTuple):
    """Gradients of a normed layer at every step: before the norm, and before the silu."""

    pre: Tensor
    gained: Tensor

    @classmethod
    def empty(cls, like: Tensor, shape: Sequence[int]) -> _NormGrad:
        return cls(*(like.new_empty(shape) for _ in range(2)))


class _Normed(NamedTuple):
    """silu(gain · rms_norm(pre)), kept step by step: (T, B, ..., n) each, ``scale`` (T, B, ..., 1)."""

    scale: Tensor
    unit: Tensor
    gained: Tensor
    value: Tensor

    @classmethod
    def empty(cls, like: Tensor, shape: Sequence[int]) -> _Normed:
        """Room for every step."""
        return cls(like.new_empty(*shape[:-1], 1), *(like.new_empty(shape) for _ in range(3)))

    def forward(self, t: int, pre: Tensor, gain: Tensor) -> Tensor:
        """Step t's value from its pre-activation."""
        torch.rsqrt(pre.square().mean(-1, keepdim=True).add_(NORM_EPS), out=self.scale[t])
        torch.mul(pre, self.scale[t], out=self.unit[t])
        torch.mul(self.unit[t], gain, out=self.gained[t])
        return torch.ops.aten.silu.out(self.gained[t], out=self.value[t])

    def backward(self, t: int, grad: Tensor, gain: Tensor, out: _NormGrad) -> Tensor:
        """The gradient of step t's pre-activation from that of its value; both are kept in ``out``."""
        torch.ops.aten.silu_backward.grad_input(grad, self.gained[t], grad_input=out.gained[t])
        direct, unit = out.gained[t] * gain, self.unit[t]
        along = (direct * unit).mean(-1, keepdim=True)
        return torch.mul(direct.addcmul_(unit, along, value=-1), self.scale[t], out=out.pre[t])


class _Gated(NamedTuple):
    """The gates' activations, kept step by step: (T, G, B, k) each."""

    reset: Tensor
    candidate: Tensor
    update: Tensor

    def forward(self, t: int, gates: Tensor, before: Tensor, out: Tensor) -> None:
        """Write the next deter (G, B, k) from pre-activations (G, B, 3·k) and the deter before."""
        reset, raw, update = gates.chunk(3, -1)
        torch.sigmoid(reset, out=self.reset[t])
        torch.tanh(self.reset[t] * raw, out=self.candidate[t])
        torch.sigmoid(update + UPDATE_BIAS, out=self.update[t])
        torch.lerp(before, self.candidate[t], self.update[t], out=out)

    def backward(self, t: int, grad: Tensor, gates: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """Write the pre-activations' gradient (G, B, 3·k); return that of the deter before."""
        aten = torch.ops.aten
        reset, candidate, update = self.reset[t], self.candidate[t], self.update[t]
        d_reset, d_raw, d_update = out.chunk(3, -1)
        aten.sigmoid_backward.grad_input(grad * (candidate - before), update, grad_input=d_update)
        d_candidate = grad * update
        d_inner = aten.tanh_backward(d_candidate, candidate)
        torch.mul(d_inner, reset, out=d_raw)
        aten.sigmoid_backward.grad_input(d_inner * gates.chunk(3, -1)[1], reset, grad_input=d_reset)
        return grad - d_candidate


def _sample_into(out: Tensor, logits: Tensor, uniform: Tensor) -> None:
    """Write one-hot samples of unimixed logits (B, S, C) into zeros ``out`` (B, S, C)."""
    C = logits.shape[-1]
    probs = torch.softmax(logits, -1).mul_(1 - UNIMIX).add_(UNIMIX / C)
    index = (uniform.unsqueeze(-1) > probs.cumsum_(-1)).sum(-1, keepdim=True).clamp_max_(C - 1)
    out.scatter_(-1, index, 1.0)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over time and batch of outer products: (T, B, m), (T, B, n) -> (m, n)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)
