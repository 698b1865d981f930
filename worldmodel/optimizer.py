"""How each world model's authors update it.

* DreamerV3: gradients clipped to a share of their tensor's norm (AGC, Brock et al. 2021), then LaProp
  (Ziyin et al. 2020), which takes the momentum of *normalised* gradients; linear warm-up, no weight decay
  (danijar/dreamerv3 ``embodied/jax/opt.py``).
* TD-MPC2: Adam with a slower encoder; the gradient's norm clipped, the policy's apart from the rest; target values that
  follow the values (nicklashansen/tdmpc2 ``tdmpc2/tdmpc2.py``).
* DINO-WM: AdamW (gaoyuezhou/dino_wm ``conf/train.yaml``).

A backbone's parameters are updated as the model's are, at a rate of their own and without weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pvrpipe.worldmodel.inputs import BACKBONE
from pvrpipe.worldmodel.ranks import average_gradients
from pvrpipe.worldmodel.tdmpc2_values import TAU

LEARNING_RATES = {"dreamerv3": 4e-5, "tdmpc2": 3e-4, "dinowm": 5e-4}
BACKBONE_RATE = 1e-6  # of an encoder inside any of them; DINO-WM's `encoder_lr`
ENCODER_SHARE = 0.3
MAX_NORM = 20.0
POLICY_EPS = 1e-5


class LaProp(torch.optim.Optimizer):
    """LaProp behind adaptive gradient clipping.

    Args:
        parameters: what to update.
        lr: learning rate after warm-up.
        warmup: updates over which the rate rises linearly, from none at the first as upstream's schedule does.
        clip: largest norm of a tensor's gradient, as a share of the tensor's own norm.
        smallest: a tensor's norm counts as at least this.
        betas: decay of the momentum and of the squared gradient.
        eps: added to the root of the latter.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-5,
        *,
        warmup: int = 1000,
        clip: float = 0.3,
        smallest: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
    ) -> None:
        defaults = {
            "lr": lr,
            "warmup": warmup,
            "clip": clip,
            "smallest": smallest,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(parameters, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "momentum": torch.zeros_like(p),
                "square": torch.zeros_like(p),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, [self.state[p] for p in parameters], group)

    def _update(
        self, parameters: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        """The arithmetic, over all tensors at once."""
        momentum_decay, square_decay = group["betas"]
        momenta, squares = [s["momentum"] for s in states], [s["square"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        step = states[0]["step"]  # a tensor throughout: a CUDA graph that holds this counts on
        grads = clipped([p.grad for p in parameters if p.grad is not None], parameters, group)
        torch._foreach_mul_(squares, square_decay)
        torch._foreach_addcmul_(squares, grads, grads, 1 - square_decay)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_mul_(scale, left_out(square_decay, step).rsqrt())
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(grads, scale)
        del scale  # as large as the model, and so is what comes next
        torch._foreach_lerp_(momenta, grads, 1 - momentum_decay)
        risen = ((step - 1) / group["warmup"]).clamp_max(1.0) if group["warmup"] else 1.0
        rate = group["lr"] * risen
        torch._foreach_sub_(parameters, torch._foreach_mul(momenta, rate / left_out(momentum_decay, step)))


def left_out(decay: float, step: Tensor) -> Tensor:
    """The share of the last ``step`` values in a running mean that began at zero: 1 - decay ** step."""
    return -torch.expm1(step * math.log(decay))


def clipped(grads: list[Tensor], parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Each tensor's gradient, cut where it lies to no longer than ``clip`` times the tensor."""
    longest = group["clip"] * torch.stack(torch._foreach_norm(parameters)).clamp_min(group["smallest"])
    shrink = 1 / (torch.stack(torch._foreach_norm(grads)) / longest).clamp_min(1.0)
    torch._foreach_mul_(grads, shrink.unbind())
    return grads


@dataclass(frozen=True)
class Updater:
    """An optimizer over a model's parameters, and what happens around its step.

    ``clipped``: groups of parameters whose joint gradient is cut to :data:`MAX_NORM`. ``targets``: tensors that follow
    others, by a share of the way at each update.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clipped: tuple[list[nn.Parameter], ...] = ()
    targets: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        *,
        learning_rate: float | None,
        warmup: int,
        backbone_rate: float | None = None,
    ) -> Updater:
        """The published one for a model's name; a rate of None is the published one."""
        rate = LEARNING_RATES[name] if learning_rate is None else learning_rate
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        tuned = [learned.pop(n) for n in list(learned) if n.startswith(BACKBONE)]
        rate_of_tuned = BACKBONE_RATE if backbone_rate is None else backbone_rate
        more: list[dict[str, Any]] = [{"params": tuned, "lr": rate_of_tuned}] if tuned else []
        groups: list[dict[str, Any]] = [{"params": [*learned.values()]}, *more]
        if name == "dreamerv3":
            return cls(model, LaProp(groups, rate, warmup=warmup))
        recorded = next(model.parameters()).is_cuda
        if name == "dinowm":
            groups[1:] = [{**group, "weight_decay": 0.0} for group in more]
            return cls(model, _ready(torch.optim.AdamW(groups, lr=rate, fused=True, capturable=recorded)))
        part = {n: n.partition(".")[0] for n in learned}
        policy = [p for n, p in learned.items() if part[n] == "policy"]
        encoder = [p for n, p in learned.items() if part[n] in ("encoder", "pool")]
        others = [p for n, p in learned.items() if part[n] not in ("encoder", "pool", "policy")]
        groups = [
            {"params": encoder, "lr": rate * ENCODER_SHARE},
            {"params": others},
            {"params": policy, "eps": POLICY_EPS},
            *more,
        ]
        values, targets = (list(getattr(model, part).parameters()) for part in ("values", "target_values"))
        adam = _ready(torch.optim.Adam(groups, lr=rate, fused=True, capturable=recorded))
        return cls(model, adam, ([*encoder, *others, *tuned], policy), (targets, values))

    def update(self, loss: Tensor) -> Tensor:
        """One update along the gradient of a loss, whose norm, before anything is clipped, is returned: ()."""
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.model)
        norms = [nn.utils.clip_grad_norm_(parameters, MAX_NORM) for parameters in self.clipped]
        norms = norms or [
            nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        ]
        self.optimizer.step()
        following, followed = self.targets
        if following:
            with torch.no_grad():
                torch._foreach_lerp_(following, followed, TAU)
        return torch.stack(norms).square().sum().sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter: ``momentum.encoder.weight`` and so on."""
        return {
            f"{part}.{name}": value
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            for part, value in self.optimizer.state[parameter].items()
        }


def _ready(adam: torch.optim.Adam | torch.optim.AdamW) -> torch.optim.Optimizer:
    """With the state that Adam would make in its first step: a checkpoint is loaded before."""
    for p in (p for group in adam.param_groups for p in group["params"]):
        adam.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return adam
