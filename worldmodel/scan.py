"""The posterior recurrence of DreamerV3's RSSM over a whole sequence, with its backward pass by hand.

An RSSM filters one row after the other, so its matrix products have only B rows, and automatic
differentiation would also form every weight's gradient B rows at a time and add up T of them. Here the
loop holds only what truly depends on the step before: forward, the pre-activations are kept; backward,
only the cotangents of the state are carried, every elementwise derivative is formed for all steps at
once, and each weight's gradient is one product over T·B rows.

:meth:`pvrpipe.worldmodel.dreamerv3.RSSM.step` is the same mathematics one step at a time; the tests hold
the two together, values and gradients. Inside, time comes first: (T, B, ...).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
        gates_bias = _with_update_bias(w.gates_bias)
        resets = (keep == 0).flatten(1).any(1).tolist()

        deter, stoch = action_part.new_zeros(T + 1, B, d), action_part.new_zeros(T + 1, B, S, C)
        pre_in, pre_core = action_part.new_empty(T, B, 2, H), action_part.new_empty(T, B, d)
        gates, pre_post = action_part.new_empty(T, G, B, 3 * k), action_part.new_empty(T, B, H)
        logits = action_part.new_empty(T, B, S, C)
        for t in range(T):
            h, z = deter[t], stoch[t].flatten(1)
            if resets[t]:
                h, z = h * keep[t], z * keep[t]
            torch.addmm(w.deter_in_bias, h, deter_in, out=pre_in[t, :, 0])
            torch.addmm(w.stoch_in_bias, z, stoch_in, out=pre_in[t, :, 1])
            features = F.silu(F.rms_norm(pre_in[t], (H,), None, NORM_EPS) * w.in_gain).flatten(1)
            dense = torch.addmm(action_part[t], features, w.core_features)
            blocks = h.view(B, G, k).transpose(0, 1)
            torch.add(
                dense.view(B, G, k),
                torch.bmm(blocks, w.core_deter).transpose(0, 1),
                out=pre_core[t].view(B, G, k),
            )
            core = F.silu(F.rms_norm(pre_core[t], (d,), w.core_gain, NORM_EPS)).view(B, G, k)
            torch.baddbmm(gates_bias, core.transpose(0, 1), w.gates, out=gates[t])
            reset, candidate, update = gates[t].view(G, B, 3, k).unbind(2)
            candidate = torch.tanh(torch.sigmoid(reset) * candidate)
            torch.lerp(
                blocks, candidate, torch.sigmoid(update), out=deter[t + 1].view(B, G, k).transpose(0, 1)
            )
            torch.addmm(token_part[t], deter[t + 1], post, out=pre_post[t])
            hidden = F.silu(F.rms_norm(pre_post[t], (H,), w.post_gain, NORM_EPS))
            torch.addmm(w.logits_bias, hidden, to_logits, out=logits[t].view(B, S * C))
            _sample_into(stoch[t + 1], logits[t], uniform[t])
        ctx.resets = resets
        ctx.save_for_backward(keep, deter, stoch, pre_in, pre_core, gates, pre_post, logits, *tensors)
        return deter[1:], stoch[1:], logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, deter_grad: Tensor, stoch_grad: Tensor, logits_grad: Tensor) -> tuple[Any, ...]:
        keep, deter, stoch, pre_in, pre_core, gates, pre_post, logits, *tensors = ctx.saved_tensors
        w = ScanWeights(*tensors)
        T, B, S, C = logits.shape
        G, k, _ = w.core_deter.shape
        H, d = w.post.shape
        before, stoch_before = deter[:-1] * keep, stoch[:-1].flatten(2) * keep
        into, core, post = (
            _NormSilu(pre_in, w.in_gain),
            _NormSilu(pre_core, w.core_gain),
            _NormSilu(pre_post, w.post_gain),
        )
        gate_slopes, pass_on = _gate_slopes(gates, before)
        probs = torch.softmax(logits, -1)
        core_deter, gates_out = w.core_deter.mT.contiguous(), w.gates.mT.contiguous()
        features_out = w.core_features.t().contiguous()

        new = deter.new_empty
        d_hidden, d_pre_post, d_logits = new(T, B, H), new(T, B, H), new(T, B, S * C)
        d_gates, d_core, d_pre_core = new(T, G, B, 3 * k), new(T, B, d), new(T, B, d)
        d_features, d_pre_in = new(T, B, 2, H), new(T, B, 2, H)
        dh, dz = new(B, d).zero_(), new(B, S * C).zero_()
        for t in reversed(range(T)):
            dz = (dz.view(B, S, C) + stoch_grad[t]) * (1 - UNIMIX)
            dl = torch.ops.aten._softmax_backward_data(dz, probs[t], -1, probs.dtype)
            torch.add(dl, logits_grad[t], out=d_logits[t].view(B, S, C))
            torch.mm(d_logits[t], w.logits, out=d_hidden[t])
            post.backward_into(d_pre_post, t, d_hidden[t])
            dh = torch.addmm(dh + deter_grad[t], d_pre_post[t], w.post).view(B, G, k).transpose(0, 1)
            torch.mul(dh.unsqueeze(2), gate_slopes[t], out=d_gates[t].view(G, B, 3, k))
            torch.bmm(d_gates[t], gates_out, out=d_core[t].view(B, G, k).transpose(0, 1))
            core.backward_into(d_pre_core, t, d_core[t])
            torch.mm(d_pre_core[t], features_out, out=d_features[t].view(B, 2 * H))
            into.backward_into(d_pre_in, t, d_features[t])
            dh = torch.baddbmm(
                dh * pass_on[t], d_pre_core[t].view(B, G, k).transpose(0, 1), core_deter
            ).transpose(0, 1).reshape(B, d)  # fmt: skip
            dh = torch.addmm(dh, d_pre_in[t, :, 0], w.deter_in)
            dz = torch.mm(d_pre_in[t, :, 1], w.stoch_in)
            if ctx.resets[t]:
                dh, dz = dh * keep[t], dz * keep[t]

        by_block = d_pre_core.view(T * B, G, k).transpose(0, 1)
        grads = ScanWeights(
            deter_in=_outer(d_pre_in[:, :, 0], before),
            deter_in_bias=d_pre_in[:, :, 0].sum((0, 1)),
            stoch_in=_outer(d_pre_in[:, :, 1], stoch_before),
            stoch_in_bias=d_pre_in[:, :, 1].sum((0, 1)),
            in_gain=into.gain_grad(d_features),
            core_deter=torch.bmm(before.view(T * B, G, k).permute(1, 2, 0), by_block),
            core_features=_outer(into.value.flatten(2), d_pre_core),
            core_gain=core.gain_grad(d_core),
            gates=torch.bmm(
                core.value.view(T * B, G, k).permute(1, 2, 0),
                d_gates.transpose(0, 1).reshape(G, T * B, 3 * k),
            ),
            gates_bias=d_gates.sum((0, 2)).unsqueeze(1),
            post=_outer(d_pre_post, deter[1:]),
            post_gain=post.gain_grad(d_hidden),
            logits=_outer(d_logits, post.value),
            logits_bias=d_logits.sum((0, 1)),
        )
        return d_pre_core, d_pre_post, None, None, *grads


class _NormSilu:
    """silu(gain · rms_norm(pre)) of all steps at once, and its backward one step at a time."""

    def __init__(self, pre: Tensor, gain: Tensor) -> None:
        scale = torch.rsqrt(pre.square().mean(-1, keepdim=True) + NORM_EPS)
        self.unit = pre * scale
        gained = self.unit * gain
        gate = torch.sigmoid(gained)
        self.value = gained * gate
        self.slope = gate + self.value * (1 - gate)
        self.factor = self.slope * gain * scale

    def backward_into(self, out: Tensor, t: int, grad: Tensor) -> None:
        """The gradient of step t's pre-activation from that of its value."""
        direct, unit = grad * self.factor[t], self.unit[t]
        along = (direct * unit).mean(-1, keepdim=True)
        torch.addcmul(direct, unit, along, value=-1, out=out[t])

    def gain_grad(self, grads: Tensor) -> Tensor:
        """The gradient of the gain from those of all values."""
        return (grads * self.slope * self.unit).sum((0, 1))


def _gate_slopes(gates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the next deter.

    Args:
        gates: (T, G, B, 3·k), pre-activations of reset, candidate and update.
        before: (T, B, d), the deter before.

    Returns:
        By the three pre-activations (T, G, B, 3, k), and by the deter before (T, G, B, k).
    """
    T, G, B, width = gates.shape
    reset, raw, update = gates.view(T, G, B, 3, width // 3).unbind(3)
    reset, update = torch.sigmoid(reset), torch.sigmoid(update)
    candidate = torch.tanh(reset * raw)
    into_candidate = update * (1 - candidate.square())
    closed = 1 - update
    by_block = before.view(T, B, G, -1).transpose(1, 2)
    slopes = torch.stack(
        [
            into_candidate * raw * reset * (1 - reset),
            into_candidate * reset,
            (candidate - by_block) * update * closed,
        ],
        3,
    )
    return slopes, closed


def _sample_into(out: Tensor, logits: Tensor, uniform: Tensor) -> None:
    """Write one-hot samples of unimixed logits (B, S, C) into zeros ``out`` (B, S, C)."""
    C = logits.shape[-1]
    probs = torch.softmax(logits, -1).mul_(1 - UNIMIX).add_(UNIMIX / C)
    index = (uniform.unsqueeze(-1) > probs.cumsum_(-1)).sum(-1, keepdim=True).clamp_max_(C - 1)
    out.scatter_(-1, index, 1.0)


def _with_update_bias(gates_bias: Tensor) -> Tensor:
    """The gates' bias (G, 1, 3·k) with the update gate's constant folded in."""
    bias = gates_bias.clone()
    bias[..., 2 * bias.shape[-1] // 3 :] += UPDATE_BIAS
    return bias


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over time and batch of outer products: (T, B, m), (T, B, n) -> (m, n)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)
