"""TD-MPC2's world model: SimNorm, stacks, alignment and losses; and both optimizers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pvrpipe.schemas.errors import UnknownNameError
from pvrpipe.worldmodel.inputs import Observation, vector
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.optimizer import LaProp, Updater
from pvrpipe.worldmodel.tdmpc2 import SIZES, TDMPC2
from pvrpipe.worldmodel.tdmpc2_encoders import SimNorm, stacked

from .settings import setting

WIDTH, ACTION = 5, 2
GENERATOR = torch.Generator()


def windows(rows: int = 6) -> dict[str, Tensor]:
    """Two windows whose numbers tell row and lane; the second begins its episode."""
    lane = torch.tensor([100.0, 200.0]).unsqueeze(1) + torch.arange(rows)
    is_first = torch.zeros(2, rows, dtype=torch.bool)
    is_first[1, 0] = True
    return {
        "observation": lane.unsqueeze(-1).expand(2, rows, WIDTH),
        "action": lane.unsqueeze(-1).expand(2, rows, ACTION) / 1000,
        "reward": lane,
        "is_first": is_first,
        "is_terminal": torch.zeros(2, rows, dtype=torch.bool),
    }


def test_simnorm_is_a_softmax_over_groups_of_eight() -> None:
    group = torch.arange(8) * 0.25
    expected = [0.04445499, 0.05708134, 0.07329389, 0.09411121, 0.12084119, 0.15516316, 0.19923344, 0.2558208]
    assert SimNorm()(group).tolist() == pytest.approx(expected, abs=1e-7)
    out = SimNorm()(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(out.view(3, 3, 8).sum(-1), torch.ones(3, 3))


def test_the_first_row_is_repeated_before_an_episode() -> None:
    rows = torch.arange(4.0).view(1, 4, 1)
    assert stacked(rows)[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_windows_use_true_preceding_rows_and_pair_action_with_the_next_reward() -> None:
    model = TDMPC2("1m", vector(WIDTH), ACTION)
    stacks, action, reward, _ = model._aligned(windows())
    newest, oldest = stacks[..., -1], stacks[..., 0]
    assert newest.tolist() == [[102, 103, 104, 105], [200, 201, 202, 203]]
    assert oldest.tolist() == [[100, 101, 102, 103], [200, 200, 200, 201]]
    assert (action[..., 0] * 1000).round().tolist() == [[102, 103, 104], [200, 201, 202]]
    assert reward.tolist() == [[103, 104, 105], [201, 202, 203]]


def test_the_end_of_an_episode_that_is_one_window_is_seen_half_the_time() -> None:
    """Its last two rows were always left out, and a store of such episodes taught that none ever ends."""
    model = build_model("tdmpc2", "1m", replace(setting(WIDTH, ACTION), episodic=True), seed=0)
    batch = {name: rows.repeat(32, *[1] * (rows.ndim - 1)) for name, rows in windows().items()}
    batch["is_terminal"][:, 5] = True
    drawn = model.draw(batch, torch.Generator().manual_seed(0))
    assert 20 < drawn.ends.sum() < 44
    _, _, reward, terminal = model._aligned(batch, drawn.ends)
    whole, shown = batch["is_first"][:, 0], drawn.ends
    assert torch.equal(terminal[:, -1], (shown | ~whole).float())
    assert reward[whole & shown].unique(dim=0).tolist() == [[203, 204, 205]]
    assert reward[whole & ~shown].unique(dim=0).tolist() == [[201, 202, 203]]
    batch["is_terminal"][:] = False  # cut where their time was over, they are windows as any other
    assert all(map(torch.equal, model._aligned(batch, shown), model._aligned(batch)))
    without = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0)
    plain = without.draw(batch, torch.Generator().manual_seed(0))  # no other chance is another
    assert plain.ends is None
    for name in ("noise", "pairs"):
        assert all(map(torch.equal, getattr(plain, name), getattr(drawn, name)))


def test_loss_at_initialisation_and_its_weights() -> None:
    """Reward and value know nothing: ln 101 times the mean of 1, 1/2, 1/4. Weights: 20, 0.1, 0.1 and the policy's 1."""
    model = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0)
    loss, terms = model.loss(windows(), GENERATOR)
    assert terms["reward"].item() == pytest.approx(math.log(101) * 1.75 / 3, abs=1e-4)
    assert terms["value"].item() == pytest.approx(math.log(101) * 1.75 / 3, abs=1e-4)
    weighed = 20 * terms["consistency"] + 0.1 * (terms["reward"] + terms["value"]) + terms["policy"]
    assert loss.item() == pytest.approx(weighed.item(), rel=1e-6)


def test_termination_is_learned_where_episodes_end_and_weighs_one() -> None:
    model = build_model("tdmpc2", "1m", replace(setting(WIDTH, ACTION), episodic=True), seed=0)
    assert model.termination is not None
    model.termination[-1].weight.data *= 10  # so that one row's logit is not another's
    batch = windows()
    batch["is_terminal"][0, 5] = True
    loss, terms = model.loss(batch, GENERATOR)
    weighed = 20 * terms["consistency"] + 0.1 * (terms["reward"] + terms["value"]) + terms["policy"]
    assert loss.item() == pytest.approx((weighed + terms["termination"]).item(), rel=1e-6)
    stacks, action, _, _ = model._aligned(batch)
    z, expected = model.encoder(stacks[:, 0]), 0.0
    for t in range(3):  # each row that an action leads to; the first window's last is the end
        z = model.dynamics(torch.cat([z, action[:, t]], -1))
        wanted = torch.tensor([float(t == 2), 0.0])
        expected += binary_cross_entropy_with_logits(model.termination(z)[:, 0], wanted).item() / 3
    assert terms["termination"].item() == pytest.approx(expected, rel=1e-5)


def test_every_linear_map_begins_as_upstreams_the_values_too() -> None:
    """Normal of deviation 0.02 (``init.weight_init``; the values were left out of it until e9f5932), heads at zero."""
    model = build_model("tdmpc2", "5m", setting(WIDTH, ACTION), seed=0)
    first, hidden, last = model.values.weights
    kernels = [first, hidden, model.dynamics[0].weight, model.policy[-1].weight, model.encoder[-3].weight]
    assert [kernel.std().item() for kernel in kernels] == pytest.approx([0.02] * len(kernels), rel=0.03)
    assert last.abs().max() == model.reward[-1].weight.abs().max() == 0
    assert all(p.abs().max() == 0 for p in [*model.values.biases, model.dynamics[0].bias])
    for own, target in zip(model.values.parameters(), model.target_values.parameters(), strict=True):
        assert torch.equal(own, target)


def test_consistency_equals_a_plain_loop_and_its_target_has_no_gradient() -> None:
    model = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0)
    stacks, action, *_ = model._aligned(windows())
    z, expected = model.encoder(stacks[:, 0]), torch.zeros(())
    for t in range(3):
        z = model.dynamics(torch.cat([z, action[:, t]], -1))
        expected = expected + nn.functional.mse_loss(z, model.encoder(stacks[:, t + 1]).detach()) * 0.5**t / 3
    _, terms = model.loss(windows(), GENERATOR)
    assert terms["consistency"].item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(terms["consistency"], list(model.encoder.parameters()))
    theirs = torch.autograd.grad(expected, list(model.encoder.parameters()))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("width", "encoder"), [(8, 139_520), (256, None), (768, None)], ids=["24-D state", "256", "768"]
)
def test_parameter_counts_of_the_published_5m(width: int, encoder: int | None) -> None:
    """Observation 24 is our stack of three embeddings of 8; wider stacks only widen the first layer."""
    with torch.device("meta"):
        model = TDMPC2("5m", vector(width), 6)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["dynamics"] == 794_112
    assert counts["reward"] == 582_245
    assert counts["policy"] == 533_516
    assert counts["values"] == 2_911_225
    assert counts["encoder"] == 139_520 + (3 * width - 24) * 256
    if encoder is not None:
        assert counts["encoder"] == encoder


@pytest.mark.parametrize(
    ("width", "total"), [(8, 4_960_618), (768, 5_544_298), (1024, 5_740_906), (1536, 6_134_122)]
)
def test_a_wider_embedding_makes_the_5m_so_much_larger(width: int, total: int) -> None:
    with torch.device("meta"):
        model = TDMPC2("5m", vector(width), 6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total


@pytest.mark.parametrize("size", list(SIZES))
def test_every_size_has_the_parameters_that_it_is_named_after(size: str) -> None:
    """The published ones see MT80's 39 numbers of state, for the 24 here, and a task's 96 before each network."""
    with torch.device("meta"):
        model = TDMPC2(size, vector(8), 6)
    widths, own = SIZES[size], [p for p in model.parameters() if p.requires_grad]
    of_tasks = (39 - 24 + 96) * widths.encoder + 96 * widths.hidden * (3 + widths.values)
    assert sum(p.numel() for p in own) + of_tasks == pytest.approx(1e6 * int(size.removesuffix("m")), abs=1e6)


def test_predictions_follow_the_actions_one_by_one() -> None:
    model = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0)
    random = torch.Generator().manual_seed(0)
    nn.init.normal_(model.reward[-1].weight, std=0.1, generator=random)
    z, action = torch.rand(3, 128, generator=random), torch.randn(3, 4, ACTION, generator=random)
    latents, reward, *_ = model.predict(z, action, GENERATOR)
    for t in range(4):
        joint = torch.cat([z, action[:, t]], -1)
        assert torch.allclose(reward[:, t], model.two_hot.decode(model.reward(joint)), rtol=1e-4)
        z = model.dynamics(joint)
        assert torch.allclose(latents[:, t], z, atol=1e-6)
    assert model.divergences(latents, latents.flip(1))["mse"].max() <= 2 / 8


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="nearest: dreamerv3"):
        build_model("dreamer", "1m", setting(8, 2), seed=0)
    with pytest.raises(UnknownNameError, match=r"unknown tdmpc2 size '12m'; nearest: .*1m"):
        build_model("tdmpc2", "12m", setting(8, 2), seed=0)


def test_laprop_with_clipping_equals_a_float64_loop() -> None:
    """Ten updates against the written-out rule; a gradient that is clipped always would cancel, so every other is."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.randn(4, 3, generator=random).requires_grad_(), torch.zeros(5).requires_grad_()]
    optimizer = LaProp(parameters, 0.01, warmup=4)
    expected = [p.detach().double().clone() for p in parameters]
    momenta, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for step in range(1, 11):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=random) * (1e-5, 10)[(step + i) % 2]
            grad = p.grad.double()
            longest = 0.3 * max(1e-3, expected[i].norm().item())
            grad = grad * min(1.0, longest / grad.norm().item())
            squares[i] = 0.999 * squares[i] + 0.001 * grad**2
            unit = grad / ((squares[i] / (1 - 0.999**step)).sqrt() + 1e-20)
            momenta[i] = 0.9 * momenta[i] + 0.1 * unit
            expected[i] = expected[i] - 0.01 * min(1, (step - 1) / 4) * momenta[i] / (1 - 0.9**step)
        optimizer.step()
        for p, q in zip(parameters, expected, strict=True):
            assert torch.allclose(p.detach().double(), q, rtol=1e-5, atol=1e-7)


def test_tdmpc2_learns_slower_in_its_encoder_and_clips_the_whole_gradient() -> None:
    model = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0)
    updater = Updater.of("tdmpc2", model, learning_rate=None, warmup=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    updater.update(1e6 * sum(p.sum() for p in model.parameters() if p.requires_grad))
    policy = list(model.policy.parameters())
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("policy.")]
    for parameters in (policy, rest):
        assert torch.stack([p.grad.norm() for p in parameters]).norm().item() == pytest.approx(20.0, rel=1e-3)
    for name, parameter in model.named_parameters():
        if name.startswith("target_values."):
            source = model.get_parameter(name.removeprefix("target_"))
            expected_target = torch.lerp(before[name], source.detach(), 0.01)
            assert torch.allclose(parameter, expected_target), name
            continue
        step = (parameter - before[name]).abs().max().item()
        expected = 3e-4 * (0.3 if name.startswith("encoder.") else 1.0)
        assert step == pytest.approx(expected, rel=0.02), name


def test_what_pools_tokens_is_as_slow_as_the_encoder_and_what_is_tuned_is_clipped_with_the_rest() -> None:
    made = replace(setting(WIDTH, ACTION), observation=Observation("tokens", (4, WIDTH)))
    model = build_model("tdmpc2", "1m", made, seed=0)
    model.seen.look_through(nn.Linear(3, 4 * WIDTH))
    updater = Updater.of("tdmpc2", model, learning_rate=None, warmup=1)
    slow = {
        p for group in updater.optimizer.param_groups if group["lr"] == 0.3 * 3e-4 for p in group["params"]
    }
    assert slow == {*model.pool.parameters(), *model.encoder.parameters()}
    updater.update(1e6 * sum(p.sum() for p in model.parameters() if p.requires_grad))
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("policy.")]
    assert any(p is model.seen.backbone.bias for p in rest)
    assert torch.stack([p.grad.norm() for p in rest]).norm().item() == pytest.approx(20.0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("dreamerv3", [(4e-5, 1e-20, 0)]),
        ("tdmpc2", [(0.3 * 3e-4, 1e-8, 0), (3e-4, 1e-8, 0), (3e-4, 1e-5, 0)]),
        ("dinowm", [(5e-4, 1e-8, 0.01)]),
    ],
)
def test_optimizers_have_the_published_numbers(name: str, groups: list[tuple[float, float, float]]) -> None:
    """Rate, epsilon and weight decay of each group; the last is an encoder's inside the model, at DINO-WM's rate."""
    model = build_model(name, "1m", setting(WIDTH, ACTION), seed=0)
    model.seen.look_through(nn.Linear(3, WIDTH))
    made = Updater.of(name, model, learning_rate=None, warmup=1000).optimizer.param_groups
    found = [(group["lr"], group["eps"], group.get("weight_decay", 0)) for group in made]
    assert found == [pytest.approx(numbers) for numbers in [*groups, (1e-6, groups[0][1], 0)]]
    assert len(made[-1]["params"]) == 2
    assert sum(p.numel() for group in made for p in group["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
