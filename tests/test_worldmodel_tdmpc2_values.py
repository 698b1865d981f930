"""TD-MPC2's values and policy, against what is written out member by member, row by row, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.tdmpc2 import RHO, TDMPC2
from pvrpipe.worldmodel.tdmpc2_values import (
    Ensemble,
    RunningScale,
    discount_of,
    log_probabilities,
    sample_action,
)

WIDTH, ACTION, H = 5, 2, 3
ENTROPY = 1e-4  # upstream's entropy_coef
SETTING = Setting(vector(WIDTH), ACTION, state=0, steps=500, episodic=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_and_batch() -> tuple[TDMPC2, dict[str, Tensor]]:
    """A model in float64 none of whose heads is zero, and two windows, one of which ends its episode."""
    random = seeded()
    model = build_model("tdmpc2", "5m", SETTING, seed=0).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5, generator=random)
    model.scale.value.fill_(3.0)
    is_first, is_terminal = (torch.zeros(2, H + 3, dtype=torch.bool) for _ in range(2))
    is_first[1, 0] = is_terminal[0, -1] = True
    return model, {
        "observation": torch.randn(2, H + 3, WIDTH, generator=random, dtype=torch.float64),
        "action": torch.rand(2, H + 3, ACTION, generator=random, dtype=torch.float64) * 2 - 1,
        "reward": torch.randn(2, H + 3, generator=random, dtype=torch.float64) * 3,
        "is_first": is_first,
        "is_terminal": is_terminal,
    }


def member(ensemble: Ensemble, index: int) -> nn.Sequential:
    """One of an ensemble's networks, of torch's own layers."""
    layers: list[nn.Module] = []
    for depth, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        linear = nn.Linear(*weight.shape[1:], dtype=torch.float64)
        linear.weight.data, linear.bias.data = weight[index].t(), bias[index, 0]
        layers.append(linear)
        if depth < len(ensemble.gains):
            norm = nn.LayerNorm(weight.shape[-1], dtype=torch.float64)
            norm.weight.data, norm.bias.data = (
                ensemble.gains[depth][index, 0],
                ensemble.shifts[depth][index, 0],
            )
            layers += [norm, nn.Mish()]
    return nn.Sequential(*layers)


def two_hot(value: float) -> np.ndarray:
    """Upstream's target over 101 bins, by hand."""
    place = (min(max(math.copysign(math.log1p(abs(value)), value), -10), 10) + 10) / 0.2
    target = np.zeros(101)
    lower = min(int(place), 99)
    target[lower], target[lower + 1] = 1 - (place - lower), place - lower
    return target


def expected_value(logits: Tensor) -> float:
    mean = float(torch.softmax(logits, -1) @ torch.linspace(-10, 10, 101, dtype=torch.float64))
    return math.copysign(math.expm1(abs(mean)), mean)


def cross_entropy(logits: Tensor, value: float) -> float:
    return -float(torch.log_softmax(logits, -1) @ torch.from_numpy(two_hot(value)))


@pytest.mark.parametrize("members", [2, 5])
def test_an_ensemble_is_so_many_separate_networks(members: int) -> None:
    random = seeded()
    ensemble = Ensemble(7, 12, 4, members).double()
    for parameter in ensemble.parameters():
        nn.init.normal_(parameter, generator=random)
    x = torch.randn(9, 7, generator=random, dtype=torch.float64)
    for index, out in enumerate(ensemble(x)):
        torch.testing.assert_close(out, member(ensemble, index)(x), rtol=1e-12, atol=1e-12)


def test_dropout_is_in_the_first_layer_of_each_member_and_a_hundredth() -> None:
    ensemble = Ensemble(7, 400, 3, 2).double()
    for parameter in ensemble.parameters():
        nn.init.normal_(parameter, generator=seeded())
    x = torch.randn(500, 7, generator=seeded(1), dtype=torch.float64)
    kept = torch.empty(2, 500, 400, dtype=torch.float64).bernoulli_(0.99, generator=seeded(2))
    assert kept.mean().item() == pytest.approx(0.99, abs=0.001)
    assert not torch.equal(kept[0], kept[1])
    noisy = ensemble(x, ensemble.kept(500, seeded(2)))
    for index, out in enumerate(noisy):
        network = member(ensemble, index)
        torch.testing.assert_close(out, network[1:](network[0](x) * kept[index] / 0.99), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(noisy, ensemble(x))


def test_targets_value_loss_and_policy_loss_equal_a_float64_loop() -> None:
    """Windows, horizon, members one by one; chance in the order that the model draws it in."""
    model, batch = model_and_batch()
    with torch.no_grad():
        _, terms = model.loss(batch, seeded(4))
        stacks, action, reward, terminal = model._aligned(batch)
        random = seeded(4)
        target_noise = torch.empty(2, H, ACTION, dtype=torch.float64).normal_(generator=random)
        target_pair = torch.randperm(5, generator=random)[:2].tolist()
        policy_noise = torch.empty(2, H + 1, ACTION, dtype=torch.float64).normal_(generator=random)
        policy_pair = torch.randperm(5, generator=random)[:2].tolist()
        values, targets = ([member(e, i) for i in range(5)] for e in (model.values, model.target_values))
        value_loss = policy_loss = 0.0
        for lane in range(2):
            z = model.encoder(stacks[lane, 0])
            for t in range(H + 1):
                policy_loss -= policy_objective(
                    model, [values[i] for i in policy_pair], z, policy_noise[lane, t]
                ) * (RHO**t / (2 * (H + 1)))
                if t == H:
                    break
                following = model.encoder(stacks[lane, t + 1])
                chosen, _ = acted(model.policy(following), target_noise[lane, t])
                joint = torch.cat([following, chosen])
                bootstrap = min(expected_value(targets[i](joint)) for i in target_pair)
                wanted = float(reward[lane, t]) + 0.99 * (1 - float(terminal[lane, t])) * bootstrap
                joint = torch.cat([z, action[lane, t]])
                value_loss += sum(cross_entropy(v(joint), wanted) for v in values) / 5 / 2 * RHO**t / H
                z = model.dynamics(joint)
    assert terminal.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert terms["value"].item() == pytest.approx(value_loss, rel=1e-5)
    assert terms["policy"].item() == pytest.approx(policy_loss, rel=1e-5)


def acted(mean_and_log_std: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """The squashed action and its scaled entropy, as upstream writes them."""
    mean, log_std = mean_and_log_std.chunk(2, -1)
    log_std = -10 + 6 * (torch.tanh(log_std) + 1)
    gaussian = float((-0.5 * noise**2 - log_std - 0.9189385175704956).sum())
    action = torch.tanh(mean + noise * log_std.exp())
    logp = gaussian - float(torch.log(torch.relu(1 - action**2) + 1e-6).sum())
    return action, -logp * (gaussian * len(mean) / (logp + 1e-8))


def policy_objective(model: TDMPC2, pair: list[nn.Sequential], z: Tensor, noise: Tensor) -> float:
    action, entropy = acted(model.policy(z), noise)
    value = sum(expected_value(v(torch.cat([z, action]))) for v in pair) / 2
    return ENTROPY * entropy + value / 3.0  # the scale set in the model


def test_the_policys_term_moves_the_policy_alone_and_no_other_term_moves_it() -> None:
    model, batch = model_and_batch()
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith("target_values") for n in learned)
    _, terms = model.loss(batch, seeded())
    for term, value in terms.items():
        if term == "loss":
            continue
        grads = torch.autograd.grad(value, list(learned.values()), retain_graph=True, allow_unused=True)
        moved = {
            n.partition(".")[0] for n, g in zip(learned, grads, strict=True) if g is not None and g.any()
        }
        expected = {
            "policy": {"policy"},
            "value": {"encoder", "dynamics", "values"},
            "reward": {"encoder", "dynamics", "reward"},
            "consistency": {"encoder", "dynamics"},
            "termination": {"encoder", "dynamics", "termination"},
        }
        assert moved == expected[term], term


def test_the_scale_is_told_the_values_of_each_windows_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's ``self.scale.update(qs[0])``: the two values' mean, of the policy's action, before any rolling out."""
    model, batch = model_and_batch()
    told: list[Tensor] = []
    monkeypatch.setattr(RunningScale, "update", lambda _, values: told.append(values))
    drawn = model.draw(batch, seeded(4))
    model.losses(batch, drawn)
    with torch.no_grad():
        first = model.encoder(model._aligned(batch)[0][:, 0])
        expected = [
            (policy_objective(model, [member(model.values, i) for i in drawn.pairs[1]], z, noise), z, noise)
            for z, noise in zip(first, drawn.noise[1][:, 0], strict=True)
        ]
        values = [3.0 * (both - ENTROPY * acted(model.policy(z), noise)[1]) for both, z, noise in expected]
    assert [t.tolist() for t in told] == [pytest.approx(values, rel=1e-5)]


def test_the_scale_follows_numpys_percentiles() -> None:
    scale, expected = RunningScale().double(), 1.0
    for seed in range(5):
        values = torch.randn(37, generator=seeded(seed)) * 10**seed / 20  # spreads below and above 1
        low, high = np.percentile(values.numpy().astype(np.float64), (5, 95))
        expected += 0.01 * (max(high - low, 1.0) - expected)
        scale.update(values)
        assert float(scale.value) == pytest.approx(expected, rel=1e-6)
    assert scale(torch.tensor(expected, dtype=torch.float64)).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "discount"), [(25, 0.95), (100, 0.95), (200, 0.975), (500, 0.99), (1000, 0.995), (5000, 0.995)]
)
def test_the_discount_is_upstreams(steps: int, discount: float) -> None:
    """(L / 5 - 1) / (L / 5) between 0.95 and 0.995: 0.99 for DMC's 500, 0.995 for ManiSkill's and longer."""
    assert discount_of(steps) == pytest.approx(discount)


def test_log_probabilities_are_those_of_torchs_distributions() -> None:
    random = seeded()
    mean, log_std, noise = torch.randn(3, 6, ACTION, generator=random, dtype=torch.float64) * 0.6
    action = torch.tanh(mean + noise * log_std.exp())
    gaussian, squashed = log_probabilities(noise, log_std, action)
    normal = Normal(mean, log_std.exp())
    expected = normal.log_prob(mean + noise * log_std.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(gaussian, expected, rtol=1e-10, atol=0)
    expected = TransformedDistribution(normal, TanhTransform()).log_prob(action).sum(-1, keepdim=True)
    torch.testing.assert_close(
        squashed, expected, rtol=1e-3, atol=1e-4
    )  # upstream adds 1e-6 inside its logarithm


def test_sampled_actions_are_bounded_gaussians_and_their_entropy_is_upstreams() -> None:
    raw = torch.tensor([[0.3, -0.2, 0.9, -0.4]], dtype=torch.float64).expand(20_000, 4)
    noise = torch.empty(20_000, ACTION, dtype=torch.float64).normal_(generator=seeded(1))
    action, entropy = sample_action(raw, noise)
    for index in (0, 77):
        own, own_entropy = acted(raw[index], noise[index])
        torch.testing.assert_close(action[index], own)
        assert entropy[index].item() == pytest.approx(own_entropy)
    assert action.abs().max() <= 1
    std = (-10 + 6 * (torch.tanh(raw[0, 2:]) + 1)).exp()
    unsquashed = torch.atanh(action[:, 1])
    assert unsquashed.mean().item() == pytest.approx(-0.2, abs=4 * std[1].item() / 20_000**0.5)
    assert unsquashed.std().item() == pytest.approx(std[1].item(), rel=0.02)


def test_validation_changes_no_buffer_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    handed: list[object] = []
    forward = Ensemble.forward

    def watched(self: Ensemble, x: Tensor, kept: Tensor | None = None) -> Tensor:
        handed.append(kept)
        return forward(self, x, kept)

    monkeypatch.setattr(Ensemble, "forward", watched)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first, again = (model.loss(batch, seeded(9))[0] for _ in range(2))
    assert first == again
    assert handed
    assert all(kept is None for kept in handed)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.loss(batch, seeded(9))
    assert any(kept is not None for kept in handed)
    assert not torch.equal(before["scale.value"], model.scale.value)
