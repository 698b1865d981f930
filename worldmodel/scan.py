"""The posterior recurrence of DreamerV3's RSSM over a whole sequence, with its backward pass by hand.

An RSSM filters one row after the other, so its matrix products have only B rows, and automatic
differentiation would also form every weight's gradient B rows at a time and add up T of them. Here the
loop holds only what truly depends on the step before: forward, activations go to buffers; backward, only
the gradient of the state is carried, and each weight's gradient is one product over T·B rows.

:meth:`pvrpipe.worldmodel.rssm.RSSM.step` is the same mathematics one step at a time; the tests hold
the two together, values and gradients. Both directions are operators of torch's, so that ``torch.compile`` and CUDA
graphs take them as they are; in a compiled update their steps are compiled too, each way one function that is called
T times. Inside, time comes first: (T, B, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from pvrpipe.worldmodel.distributions import UNIMIX
from pvrpipe.worldmodel.steps import Gates, Normed, NormGrad, draw_into

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
    T, B, S = uniform.shape
    compiled = torch.compiler.is_compiling()
    deter, stoch, logits, *_ = _forward(action_part, token_part, keep, uniform, list(weights), compiled)
    return deter[1:], stoch[1:].view(T, B, S, -1), logits.view(T, B, S, -1)


@custom_op(
    "pvrpipe::posterior_scan",
    mutates_args=(),
    schema="(Tensor action_part, Tensor token_part, Tensor keep, Tensor uniform, Tensor[] weights, bool compiled)"
    " -> Tensor[]",
)
def _forward(
    action_part: Tensor,
    token_part: Tensor,
    keep: Tensor,
    uniform: Tensor,
    weights: list[Tensor],
    compiled: bool,
) -> list[Tensor]:
    """States and logits, and all that the backward pass needs besides."""
    states, kept = _room(action_part, uniform, weights)
    states.deter[0] = 0
    states.stoch.zero_()
    step = _compiled(_step) if compiled else _step
    _run(step, ScanWeights(*weights), states, kept, action_part, token_part, keep, uniform)
    return [*states, *(x for part in kept for x in part)]


@_forward.register_fake
def _(
    action_part: Tensor,
    _token_part: Tensor,
    _keep: Tensor,
    uniform: Tensor,
    weights: list[Tensor],
    _compiled: bool,
) -> list[Tensor]:
    states, kept = _room(action_part, uniform, weights)
    return [*states, *(x for part in kept for x in part)]


@custom_op(
    "pvrpipe::posterior_scan_backward",
    mutates_args=(),
    schema="(Tensor keep, Tensor[] weights, Tensor[] made, Tensor deter, Tensor stoch, Tensor logits, bool compiled)"
    " -> Tensor[]",
)
def _backward(
    keep: Tensor,
    weights: list[Tensor],
    made: list[Tensor],
    deter: Tensor,
    stoch: Tensor,
    logits: Tensor,
    compiled: bool,
) -> list[Tensor]:
    """Gradients of the action's and the token's part and of the weights, from those of the outputs."""
    (T, B), S = keep.shape[:2], stoch.shape[2]
    w, states, kept = ScanWeights(*weights), _States(*made[:3]), _Kept.of(iter(made[3:]))
    before = _States(states.deter[:-1] * keep, states.stoch[:-1] * keep, states.logits.view(T, B, S, -1))
    step = _compiled(_step_back) if compiled else _step_back
    grads = _run_back(step, w, before, kept, _States(deter, stoch, logits), keep)
    return [grads.core.pre, grads.hidden.pre, *_weight_grads(before, states, kept, grads)]


@_backward.register_fake
def _(_keep: Tensor, weights: list[Tensor], made: list[Tensor], *_others: Any) -> list[Tensor]:
    _, core, hidden, _ = _Kept.of(iter(made[3:]))
    return [torch.empty_like(x) for x in (core.unit, hidden.unit, *weights)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, _, keep, uniform, weights, ctx.compiled = inputs
    ctx.categoricals = uniform.shape[-1]
    ctx.set_materialize_grads(False)  # most of the output is for the backward pass alone
    ctx.save_for_backward(keep, *weights, *output)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    keep, *saved = ctx.saved_tensors
    weights, made = saved[: len(ScanWeights._fields)], saved[len(ScanWeights._fields) :]
    outer = [torch.zeros_like(x) if g is None else g for g, x in zip(grads[:3], made[:3], strict=True)]
    split = (*keep.shape[:2], ctx.categoricals, -1)
    d_action, d_token, *d_weights = _backward(
        keep, weights, made, outer[0][1:], outer[1][1:].reshape(split), outer[2].reshape(split), ctx.compiled
    )
    return d_action, d_token, None, None, d_weights, None


@functools.cache
def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as one function; a GPU then launches a dozen kernels for it, not fifty."""
    return torch.compile(step, dynamic=False, fullgraph=True)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _room(action_part: Tensor, uniform: Tensor, weights: list[Tensor]) -> tuple[_States, _Kept]:
    """Empty tensors for what a sequence is filtered to."""
    w = ScanWeights(*weights)
    T, B, _ = uniform.shape
    new, (H, d) = action_part.new_empty, w.post.shape
    states = _States(new(T + 1, B, d), new(T + 1, B, len(w.logits)), new(T, B, len(w.logits)))
    return states, _Kept.empty(new, T, B, H, d, len(w.core_deter))


def _resets(keep: Tensor) -> list[bool]:
    """At which rows an episode begins anywhere; on a GPU, that it might, for to ask it would be to wait for it."""
    return [True] * len(keep) if keep.is_cuda else (keep == 0).flatten(1).any(1).tolist()


def _run(
    step: Callable[..., None],
    w: ScanWeights,
    states: _States,
    kept: _Kept,
    action_part: Tensor,
    token_part: Tensor,
    keep: Tensor,
    uniform: Tensor,
) -> None:
    """Fill ``states`` and ``kept``, row after row."""
    resets = _resets(keep)
    k = w.core_deter.shape[-1]
    # A product of few rows is several times faster with the weight laid out (in, out).
    laid = w._replace(
        **{name: getattr(w, name).t().contiguous() for name in ("deter_in", "stoch_in", "post", "logits")},
        gates_bias=torch.cat([w.gates_bias[..., : 2 * k], w.gates_bias[..., 2 * k :] + UPDATE_BIAS], -1),
    )
    deters, stochs, logits = (x.unbind() for x in states)
    rows = zip(*map(_steps, kept), deters[1:], stochs[1:], logits, strict=True)
    for t, (into, core, hidden, gates, deter, stoch, logit) in enumerate(rows):
        h, z = deters[t], stochs[t]
        if resets[t]:
            h, z = h * keep[t], z * keep[t]
        made = _Made(into, core, hidden, gates, deter, stoch, logit)
        step(laid, h, z, action_part[t], token_part[t], uniform[t], made)


def _step(
    w: ScanWeights,
    h: Tensor,
    z: Tensor,
    action: Tensor,
    token: Tensor,
    uniform: Tensor,
    made: _Made,
) -> None:
    """One row from the state before it, into what was made room for; products' weights are laid out (in, out)."""
    G, k, _ = w.core_deter.shape
    B = len(h)
    blocks = h.view(B, G, k).transpose(0, 1)
    pre_deter, pre_stoch = (
        torch.addmm(w.deter_in_bias, h, w.deter_in),
        torch.addmm(w.stoch_in_bias, z, w.stoch_in),
    )
    features = made.into.forward(torch.stack([pre_deter, pre_stoch], 1), w.in_gain).flatten(1)
    pre_core = torch.addmm(action, features, w.core_features)
    pre_core.view(B, G, k).add_(torch.bmm(blocks, w.core_deter).transpose(0, 1))
    value = made.core.forward(pre_core, w.core_gain).view(B, G, k).transpose(0, 1)
    torch.baddbmm(w.gates_bias, value, w.gates, out=made.gates.pre)
    made.deter.view(B, G, k).copy_(made.gates.forward(blocks).transpose(0, 1))
    seen = made.hidden.forward(torch.addmm(token, made.deter, w.post), w.post_gain)
    torch.addmm(w.logits_bias, seen, w.logits, out=made.logits)
    draw_into(made.stoch, made.logits, uniform)


def _run_back(
    step: Callable[..., tuple[Tensor, Tensor]],
    w: ScanWeights,
    before: _States,
    kept: _Kept,
    outer: _States,
    keep: Tensor,
) -> _Grads:
    """Gradients of every pre-activation, row after row from the last, given those of the outputs."""
    resets = _resets(keep)
    (T, B, S, C), (G, k, _), d = outer.logits.shape, w.core_deter.shape, before.deter.shape[-1]
    probs = torch.softmax(before.logits.view(T, B, S, C), -1)
    laid = w._replace(
        core_deter=w.core_deter.mT.contiguous(),
        gates=w.gates.mT.contiguous(),
        core_features=w.core_features.t().contiguous(),
    )
    new = before.deter.new_empty
    grads = _Grads.like(kept, new(T, B, S * C), new(G, T, B, 3 * k))
    made = zip(*map(_steps, grads[:3]), grads.logits.unbind(), grads.gates.unbind(1), strict=True)
    rows = list(zip(zip(*map(_steps, kept), strict=True), made, strict=True))
    dh, dz = new(B, d).zero_(), new(B, S * C).zero_()
    for t in reversed(range(T)):
        mine, into = _Kept(*rows[t][0]), _Grads(*rows[t][1])
        dh, dz = step(laid, mine, before.deter[t], probs[t], dh, dz, _States(*(x[t] for x in outer)), into)
        if resets[t]:
            dh, dz = dh * keep[t], dz * keep[t]
    return grads


def _step_back(
    w: ScanWeights,
    kept: _Kept,
    h: Tensor,
    probs: Tensor,
    dh: Tensor,
    dz: Tensor,
    outer: _States,
    grads: _Grads,
) -> tuple[Tensor, Tensor]:
    """The gradient of the state before a row, before it is reset, from that of the state after; weights (out, in)."""
    (B, S, C), (G, k, _) = probs.shape, w.core_deter.shape
    dz = dz.view(B, S, C) + outer.stoch
    through = torch.ops.aten._softmax_backward_data(dz, probs, -1, probs.dtype)
    d_logits = torch.add(outer.logits, through, alpha=1 - UNIMIX).view(B, S * C)
    grads.logits.copy_(d_logits)
    d_pre = kept.hidden.backward(torch.mm(d_logits, w.logits), w.post_gain, grads.hidden)
    dh = torch.addmm(dh + outer.deter, d_pre, w.post).view(B, G, k).transpose(0, 1)
    dh = kept.gates.backward(dh, h.view(B, G, k).transpose(0, 1), grads.gates)
    d_value = torch.bmm(grads.gates, w.gates).transpose(0, 1).reshape(B, G * k)
    d_pre = kept.core.backward(d_value, w.core_gain, grads.core)
    dh = torch.baddbmm(dh, d_pre.view(B, G, k).transpose(0, 1), w.core_deter)
    d_pre = kept.into.backward(torch.mm(d_pre, w.core_features).view(B, 2, -1), w.in_gain, grads.into)
    dh = torch.addmm(dh.transpose(0, 1).reshape(B, G * k), d_pre[:, 0], w.deter_in)
    return dh, torch.mm(d_pre[:, 1], w.stoch_in)


def _weight_grads(before: _States, states: _States, kept: _Kept, grads: _Grads) -> ScanWeights:
    """The gradient of each weight, as one product over T·B rows."""
    d_deter_in, d_stoch_in = grads.into.pre.unbind(2)
    G, k = grads.gates.shape[0], grads.gates.shape[-1] // 3

    def by_block(x: Tensor) -> Tensor:
        return x.view(-1, G, k).transpose(0, 1)

    return ScanWeights(
        deter_in=_outer(d_deter_in, before.deter),
        deter_in_bias=d_deter_in.sum((0, 1)),
        stoch_in=_outer(d_stoch_in, before.stoch),
        stoch_in_bias=d_stoch_in.sum((0, 1)),
        in_gain=(grads.into.gained * kept.into.unit).sum((0, 1)),
        core_deter=torch.bmm(by_block(before.deter).mT, by_block(grads.core.pre)),
        core_features=_outer(kept.into.value.flatten(2), grads.core.pre),
        core_gain=(grads.core.gained * kept.core.unit).sum((0, 1)),
        gates=torch.bmm(by_block(kept.core.value).mT, grads.gates.flatten(1, 2)),
        gates_bias=grads.gates.sum((1, 2)).unsqueeze(1),
        post=_outer(grads.hidden.pre, states.deter[1:]),
        post_gain=(grads.hidden.gained * kept.hidden.unit).sum((0, 1)),
        logits=_outer(grads.logits, kept.hidden.value),
        logits_bias=grads.logits.sum((0, 1)),
    )


class _Made(NamedTuple):
    """Room for what one row of a sequence is filtered to."""

    into: Normed
    core: Normed
    hidden: Normed
    gates: Gates
    deter: Tensor  # (B, d)
    stoch: Tensor  # (B, S·C), zeros
    logits: Tensor  # (B, S·C)


class _States(NamedTuple):
    """Deter (T, B, d) and stoch (T, B, S·C), before the first row too where there is one more; logits."""

    deter: Tensor
    stoch: Tensor
    logits: Tensor


class _Kept(NamedTuple):
    """The activations of a whole sequence, time first."""

    into: Normed
    core: Normed
    hidden: Normed
    gates: Gates

    @classmethod
    def empty(cls, new: Callable[..., Tensor], T: int, B: int, H: int, d: int, G: int) -> _Kept:
        """Room for T rows."""
        shapes, k = ((T, B, 2, H), (T, B, d), (T, B, H)), d // G
        into, core, hidden = (Normed(new(*s[:-1], 1), *(new(s) for _ in range(3))) for s in shapes)
        return cls(into, core, hidden, Gates(new(T, G, B, 3 * k), *(new(T, G, B, k) for _ in range(3))))

    @classmethod
    def of(cls, tensors: Iterator[Tensor]) -> _Kept:
        """From the tensors in order."""
        into, core, hidden = (Normed(*islice(tensors, 4)) for _ in range(3))
        return cls(into, core, hidden, Gates(*islice(tensors, 4)))


class _Grads(NamedTuple):
    """Gradients of all pre-activations of a whole sequence; ``gates`` (G, T, B, 3·k)."""

    into: NormGrad
    core: NormGrad
    hidden: NormGrad
    logits: Tensor
    gates: Tensor

    @classmethod
    def like(cls, kept: _Kept, logits: Tensor, gates: Tensor) -> _Grads:
        """Room for the gradients of what was kept."""
        into, core, hidden = (NormGrad(*(torch.empty_like(n.unit) for _ in range(2))) for n in kept[:3])
        return cls(into, core, hidden, logits, gates)


Record = TypeVar("Record", bound=tuple)


def _steps(record: Record) -> list[Record]:
    """A record of whole sequences -> a record of each step; indexing every tensor would cost more."""
    return [type(record)(*step) for step in zip(*(x.unbind() for x in record), strict=True)]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over time and batch of outer products: (T, B, m), (T, B, n) -> (m, n)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)
