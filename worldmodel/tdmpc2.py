"""TD-MPC2 offline: a SimNorm latent with its dynamics, reward, values and policy prior.

After nicklashansen/tdmpc2 at e9f5932 (``tdmpc2/common/world_model.py``, ``layers.py``, ``tdmpc2.py``) with
the input of Schneider et al. (NeurIPS 2024): the last three embeddings side by side; or three frames of 64 × 64.
All losses are one sum and one backward pass: the policy's own term moves the policy alone, and sees the values as
they were before the update, where upstream updates the policy after the model.

Reward is predicted from (z[t], a[t]) and compared with reward[t + 1], which is received on arriving; so is termination.
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
from pvrpipe.worldmodel.inputs import Observation, Seen
from pvrpipe.worldmodel.observations import AttentionPool
from pvrpipe.worldmodel.predictions import AT_ONCE, Filtered, Imagined
from pvrpipe.worldmodel.ranks import own_part
from pvrpipe.worldmodel.tdmpc2_encoders import (
    ENCODERS,
    PIXELS,
    STACK,
    ConvEncoder,
    SimNorm,
    layer,
    mlp,
    shifts,
    stacked,
)
from pvrpipe.worldmodel.tdmpc2_values import (
    ENTROPY,
    Drawn,
    Ensemble,
    RunningScale,
    discount_of,
    sample_action,
)

RHO = 0.5
CONSISTENCY = 20.0
REWARD = VALUE = 0.1
TERMINATION = 1.0
INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """Widths of a published size, the number of layers of its encoder, and of its values."""

    encoder: int
    hidden: int
    latent: int
    encoder_layers: int
    values: int


SIZES = {
    "1m": Size(256, 384, 128, 2, 2),
    "5m": Size(256, 512, 512, 2, 5),
    "19m": Size(1024, 1024, 768, 3, 5),
    "48m": Size(1792, 1792, 768, 4, 5),
    "317m": Size(4096, 4096, 1376, 5, 8),
}


def initialise(module: nn.Module) -> None:
    """Truncated normal of one width in linear maps, the ensemble's too, no biases; convolutions as torch has them."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=INIT_STD)
            nn.init.zeros_(part.bias)
        elif isinstance(part, Ensemble):
            for weight in part.weights:
                nn.init.trunc_normal_(weight, std=INIT_STD)


class TDMPC2(nn.Module):
    """Encoder, latent dynamics, reward, termination, values and policy.

    Args:
        size: a name in :data:`SIZES`.
        observation: what a row shows.
        action: A.
        encoder: how the observation is read, a name in :data:`ENCODERS`.
        steps: transitions of an episode, which the discount follows from.
        episodic: whether episodes end before their time; only then is termination learned.
    """

    discount: Tensor
    columns: ClassVar[tuple[str, ...]] = ()  # beside observation, action, reward and the flags
    divergence: ClassVar[str] = "mse"
    rows_before: ClassVar[int] = STACK - 1  # rows a window needs besides those it trains on

    def __init__(
        self,
        size: str,
        observation: Observation,
        action: int,
        *,
        encoder: str = "auto",
        steps: int = 500,
        episodic: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.action = SIZES[size], action
        widths = self.size
        joint, latent = widths.latent + action, widths.latent
        self.two_hot = TwoHot.tdmpc2()
        bins = len(self.two_hot.bins)
        self.seen = Seen(observation)
        self.pool, self.encoder = self._encoders(observation, encoder, widths)
        self.dynamics = mlp(joint, widths.hidden, 2, layer(widths.hidden, latent, SimNorm()))
        self.reward = mlp(joint, widths.hidden, 2, [nn.Linear(widths.hidden, bins)])
        self.policy = mlp(latent, widths.hidden, 2, [nn.Linear(widths.hidden, 2 * action)])
        self.termination = mlp(latent, widths.hidden, 2, [nn.Linear(widths.hidden, 1)]) if episodic else None
        self.values, self.target_values = (
            Ensemble(joint, widths.hidden, bins, widths.values) for _ in range(2)
        )
        self.scale = RunningScale()
        self.register_buffer("discount", torch.tensor(discount_of(steps)))
        initialise(self)
        for weight in (self.reward[-1].weight, self.values.weights[-1]):
            nn.init.zeros_(weight)  # type: ignore[arg-type]
        self.target_values.load_state_dict(self.values.state_dict())
        self.target_values.requires_grad_(False)

    @staticmethod
    def _encoders(observation: Observation, encoder: str, widths: Size) -> tuple[nn.Module, nn.Module]:
        """What pools tokens, if anything, and what turns a stack into a latent."""
        names = ENCODERS[observation.kind]
        name = names[0] if encoder == "auto" else encoder
        if name not in names:
            raise UnknownNameError.among(
                f"encoder of {observation.kind} for tdmpc2", encoder, ("auto", *names)
            )
        if name == "cnn":
            if observation.shape != (PIXELS, PIXELS, 3):
                raise InvalidValueError(f"tdmpc2 reads frames of {PIXELS} × {PIXELS}; give --pixels {PIXELS}")
            return nn.Identity(), ConvEncoder(widths.latent)
        pool = AttentionPool(observation, widths.encoder) if name == "attention" else nn.Identity()
        width = widths.encoder if name == "attention" else observation.width
        last = layer(widths.encoder, widths.latent, SimNorm())
        return pool, mlp(STACK * width, widths.encoder, widths.encoder_layers - 1, last)

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of a batch, see :meth:`losses`, by chance that ``random`` decides."""
        return self.losses(batch, self.draw(batch, random))

    def draw(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Drawn:
        """Shifts and dropout, while gradients are recorded, noise of actions, values compared, and ends taken."""
        chance = on_device(random, batch["reward"].device)
        B, rows = batch["reward"].shape
        H, noisy = rows - self.rows_before - 1, torch.is_grad_enabled()
        moved = noisy and isinstance(self.encoder, ConvEncoder)
        after = shifts(B * H, chance) if moved else None
        target = self._noise(B, H, chance), self._pair(chance)
        first = shifts(B, chance) if moved else None
        kept = self.values.kept(B * H, chance) if noisy else None
        policy = self._noise(B, H + 1, chance), self._pair(chance)
        noise, pairs = zip(target, policy, strict=True)
        moves = None if after is None or first is None else (after, first)
        return Drawn(noise, pairs, moves, kept, self._ends(B, chance))

    def _ends(self, B: int, chance: torch.Generator) -> Tensor | None:
        """Which windows show their end, should they be a whole episode: (B,)."""
        if self.termination is None:
            return None
        device = chance.device
        return own_part(lambda whole: torch.rand(whole, generator=chance, device=device) < 0.5, (B,))

    def _noise(self, B: int, T: int, chance: torch.Generator) -> Tensor:
        """Of actions: (B, T, A)."""
        like = self.values.weights[0]
        return own_part(lambda whole: like.new_empty(whole).normal_(generator=chance), (B, T, self.action))

    def _pair(self, chance: torch.Generator) -> Tensor:
        """Two values, without replacement: (2,)."""
        return torch.randperm(self.size.values, generator=chance, device=chance.device)[:2]

    def losses(self, batch: Mapping[str, Tensor], drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """All losses along the rolled-out latent (TD-MPC2, equations 3 and 4).

        Args:
            batch: observation (B, 2 + H + 1, *shape), action (B, 2 + H + 1, A), reward, is_terminal and is_first
                (B, 2 + H + 1): windows of one episode, led by two rows that only fill the stack.
            drawn: the shifts of frames, what is kept, noise of the policy's actions and which values are compared.

        Returns:
            The loss, and its terms before scaling.
        """
        after, first = drawn.shifts or (None, None)
        stacks, action, reward, terminal = self._aligned(batch, drawn.ends)
        H = reward.shape[1]
        rho = RHO ** torch.arange(H, device=reward.device) / H
        with torch.no_grad():
            following = self._encode(stacks[:, 1:], after)
            wanted = self._td_target(following, reward, terminal, drawn)
        rolled = [self._encode(stacks[:, 0], first)]
        for t in range(H):
            rolled.append(self.dynamics(torch.cat([rolled[-1], action[:, t]], -1)))
        latents = torch.stack(rolled, 1)
        joint = torch.cat([latents[:, :-1], action], -1)
        values = self.values(joint.flatten(0, 1), drawn.kept).unflatten(1, joint.shape[:2])
        consistency = (latents[:, 1:] - following).square().mean((0, 2))
        reward_loss = self.two_hot.loss(self.reward(joint), reward).mean(0)
        value_loss = self.two_hot.loss(values, wanted.expand(values.shape[:-1])).mean((0, 1))
        terms = {
            "consistency": (consistency * rho).sum(),
            "reward": (reward_loss * rho).sum(),
            "value": (value_loss * rho).sum(),
            "policy": self._policy_loss(latents.detach(), drawn),
        }
        loss = (
            CONSISTENCY * terms["consistency"]
            + REWARD * terms["reward"]
            + VALUE * terms["value"]
            + terms["policy"]
        )
        if self.termination is not None:
            ends = self.termination(latents[:, 1:]).squeeze(-1)
            terms["termination"] = F.binary_cross_entropy_with_logits(ends, terminal)
            loss = loss + TERMINATION * terms["termination"]
        return loss, {"loss": loss, **terms}

    def _td_target(self, z: Tensor, reward: Tensor, terminal: Tensor, drawn: Drawn) -> Tensor:
        """Reward and the smaller of two target values of the policy's next action: (B, H)."""
        action, _ = sample_action(self.policy(z), drawn.noise[0])
        pair = self._two_values(self.target_values, z, action, drawn.pairs[0])
        return reward + self.discount * (1 - terminal) * pair.amin(0)

    def _policy_loss(self, z: Tensor, drawn: Drawn) -> Tensor:
        """What moves the policy, and it alone, to actions of high value and entropy."""
        action, entropy = sample_action(self.policy(z), drawn.noise[1])
        value = self._two_values(self.values, z, action, drawn.pairs[1], frozen=True).mean(0)
        if torch.is_grad_enabled():
            self.scale.update(value[:, 0])
        rho = RHO ** torch.arange(z.shape[1], device=z.device)
        return -((ENTROPY * entropy.squeeze(-1) + self.scale(value)).mean(0) * rho).mean()

    def _two_values(
        self, ensemble: Ensemble, z: Tensor, action: Tensor, pair: Tensor, *, frozen: bool = False
    ) -> Tensor:
        """Two values of the ensemble: (2, B, T)."""
        joint = torch.cat([z, action], -1)
        if frozen:
            parameters = {name: p.detach() for name, p in ensemble.named_parameters()}
            logits = torch.func.functional_call(ensemble, parameters, (joint.flatten(0, 1),))
        else:
            logits = ensemble(joint.flatten(0, 1))
        return self.two_hot.decode(logits[pair]).unflatten(1, joint.shape[:2])

    def _encode(self, stacks: Tensor, by: Tensor | None = None) -> Tensor:
        if isinstance(self.encoder, ConvEncoder):
            return self.encoder(stacks, by)
        return self.encoder(stacks)

    def _aligned(
        self, batch: Mapping[str, Tensor], ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stacks (B, H + 1, ...), the actions between them (B, H, A), what these bring: reward, termination (B, H).

        A window that begins with its episode has no rows before it to look back to: there the first row
        is repeated and the window's last two rows are left out instead. Of a window that is a whole episode,
        no other shows its termination: where ``ends`` says so, the first two rows only lead.
        """
        seen, action, reward = self.pool(self.seen(batch["observation"])), batch["action"], batch["reward"]
        begins = batch["is_first"][:, 0]
        if ends is not None:
            begins = begins & ~(ends & batch["is_terminal"][:, -1])
        rows = seen.shape[1] - self.rows_before
        start = torch.where(begins, 0, self.rows_before)
        kept = start.unsqueeze(1) + torch.arange(rows, device=start.device)
        lanes = torch.arange(len(kept), device=start.device).unsqueeze(1)
        after, terminal = kept[:, 1:], batch["is_terminal"].to(reward.dtype)
        return (
            stacked(seen)[lanes, kept],
            action[lanes, kept[:, :-1]],
            reward[lanes, after],
            terminal[lanes, after],
        )

    def filter(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Filtered:
        """The encoded latents (N, T, n) of whole episodes, which are states and features too."""
        del random
        observation = batch["observation"]
        episodes = observation.split(max(1, AT_ONCE // observation.shape[1]))
        z = torch.cat([self._encode(stacked(self.pool(self.seen(part)))) for part in episodes])
        return Filtered(lambda t: z[:, t], z, z)

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> Imagined:
        """Open loop from one row's latent (N, n) along actions (N, T, A).

        Returns:
            Latents (N, T, n) and expected reward (N, T) of the T rows after it.
        """
        del random
        latents = [state]
        for t in range(action.shape[1]):
            latents.append(self.dynamics(torch.cat([latents[-1], action[:, t]], -1)))
        joint = torch.cat([torch.stack(latents[:-1], 1), action], -1)
        rows = joint.flatten(0, 1).split(AT_ONCE)
        logits = torch.cat([self.reward(part) for part in rows]).unflatten(0, joint.shape[:2])
        following = torch.stack(latents[1:], 1)
        return Imagined(following, self.two_hot.decode(logits), following, logits)

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """The policy's action, without noise, after the last of some rows (N, T, *shape): (N, A) in [-1, 1]."""
        z = self._encode(stacked(self.pool(self.seen(observation))))[:, -1]
        return torch.tanh(self.policy(z).chunk(2, -1)[0])

    @staticmethod
    def divergences(predicted: Tensor, filtered: Tensor) -> dict[str, Tensor]:
        """Mean squared error over the latent: (..., n) twice -> (...). At most 2 / 8."""
        return {"mse": (predicted - filtered).square().mean(-1)}

    @staticmethod
    def average(latents: Tensor) -> Tensor:
        """(N, n) -> (n,)."""
        return latents.mean(0)


def on_device(random: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator for a device that follows from one for the CPU."""
    if device.type == "cpu":
        return random
    seed = int(torch.randint(2**62, (), generator=random))
    return torch.Generator(device).manual_seed(seed)
