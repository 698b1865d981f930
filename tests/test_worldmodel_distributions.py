"""Two-hot, symlog and unimixed categoricals against published numbers and TorchRL."""

from __future__ import annotations

import math

import pytest
import torch
from torchrl.modules import SymExpTwoHot
from torchrl.objectives import categorical_kl_terms

from pvrpipe.worldmodel.distributions import (
    TwoHot,
    balanced_kl,
    kl_both_ways,
    one_hot_sample,
    straight_through,
    symexp,
    symlog,
    unimix_probs,
)

POSTERIOR = torch.tensor([[2.0, -1.0, 0.5], [-0.5, 1.5, 0.0]])
PRIOR = torch.tensor([[0.0, 1.0, -1.0], [1.0, -0.5, 0.5]])
LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0])


def test_symexp_inverts_symlog() -> None:
    x = torch.tensor([-1e6, -2.5, -1e-3, 0.0, 1e-3, 0.7, 1e6], dtype=torch.float64)
    assert torch.allclose(symexp(symlog(x)), x, rtol=1e-12)
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0)


def test_dreamerv3_bins_are_raw_values_with_an_exact_zero() -> None:
    five = TwoHot.dreamerv3(5).bins
    assert torch.allclose(five, torch.tensor([-485165184.0, -22025.4648, 0.0, 22025.4648, 485165184.0]))
    bins = TwoHot.dreamerv3().bins
    assert bins[127] == 0
    assert torch.equal(bins, -bins.flip(0))
    assert torch.allclose(bins[128:130], torch.tensor([0.17056, 0.37021]), atol=1e-5)
    even = TwoHot.dreamerv3(6).bins
    assert torch.equal(even, -even.flip(0))


@pytest.mark.parametrize(
    ("two_hot", "value", "bins", "weights"),
    [
        (TwoHot.dreamerv3(), 1.0, (131, 132), (0.617329, 0.382671)),
        (TwoHot.dreamerv3(), 0.5, (129, 130), (0.444608, 0.555392)),
        (TwoHot.tdmpc2(), 1.0, (53, 54), (0.534264, 0.465736)),
        (TwoHot.tdmpc2(), 2.0, (55, 56), (0.506939, 0.493061)),
        (TwoHot.tdmpc2(), -1.0, (46, 47), (0.465736, 0.534264)),
    ],
)
def test_two_hot_weights(
    two_hot: TwoHot, value: float, bins: tuple[int, int], weights: tuple[float, float]
) -> None:
    target = two_hot.encode(torch.tensor(value))
    assert target.nonzero().flatten().tolist() == list(bins)
    assert target[list(bins)].tolist() == pytest.approx(weights, abs=2e-5)


@pytest.mark.parametrize("two_hot", [TwoHot.dreamerv3(), TwoHot.tdmpc2()], ids=["dreamerv3", "tdmpc2"])
def test_a_two_hot_target_decodes_to_its_value_and_saturates(two_hot: TwoHot) -> None:
    values = torch.tensor([-300.0, -1.0, -0.1, 0.0, 0.3, 2.5, 1000.0])
    logits = two_hot.encode(values).log()
    assert torch.allclose(two_hot.decode(logits), values, rtol=1e-4, atol=1e-5)
    assert two_hot.encode(torch.tensor([-1e30, 1e30])).argmax(-1).tolist() == [0, len(two_hot.bins) - 1]


def test_a_target_between_bins_one_apart_as_sheeprl_splits_it() -> None:
    """From sheeprl's ``tests/test_utils/test_two_hot_encoder.py``: 2.3 on whole numbers; beyond them the last."""
    whole = TwoHot(torch.arange(-5.0, 6.0), squash=False)
    assert whole.encode(torch.tensor(2.3))[[7, 8]].tolist() == pytest.approx([0.7, 0.3])
    assert whole.encode(torch.tensor([-5.5, 5.5]))[:, [0, -1]].tolist() == [[1, 0], [0, 1]]


def test_the_older_two_hot_is_another() -> None:
    """DreamerV3 v1, and dreamerv3-torch: evenly spaced in symlog space, so losses do not compare."""
    legacy = TwoHot(torch.linspace(-20, 20, 255), squash=True).encode(torch.tensor(1.0))
    assert legacy.nonzero().flatten().tolist() == [131, 132]
    assert legacy[[131, 132]].tolist() == pytest.approx([0.598515, 0.401485], abs=2e-5)
    assert not torch.allclose(legacy, TwoHot.dreamerv3().encode(torch.tensor(1.0)), atol=0.01)


def test_golden_cross_entropy_and_decode() -> None:
    two_hot = TwoHot.dreamerv3(5)
    middle = (two_hot.bins[1] + two_hot.bins[2]) / 2
    assert two_hot.loss(LOGITS, middle).item() == pytest.approx(2.4519143, abs=1e-6)
    assert two_hot.decode(LOGITS).item() == pytest.approx(-36122512.0, abs=100)


@pytest.mark.parametrize("bins", [5, 6, 254, 255])
def test_a_uniform_distribution_decodes_to_exactly_zero(bins: int) -> None:
    assert TwoHot.dreamerv3(bins).decode(torch.zeros(3, bins)).tolist() == [0.0] * 3


def test_loss_without_knowledge_is_ln_of_the_bins() -> None:
    value = torch.tensor([0.3])
    assert TwoHot.dreamerv3().loss(torch.zeros(1, 255), value).item() == pytest.approx(math.log(255))
    assert TwoHot.tdmpc2().loss(torch.zeros(1, 101), value).item() == pytest.approx(math.log(101))


@pytest.mark.parametrize(("value", "floor"), [(0.0, 0.0), (0.1, 0.678), (0.5, 0.687), (1.0, 0.665)])
def test_the_floor_of_the_loss_is_the_entropy_of_the_target(value: float, floor: float) -> None:
    two_hot = TwoHot.dreamerv3()
    target = two_hot.encode(torch.tensor(value))
    perfect = torch.where(target > 0, target, 1e-30).log()
    assert two_hot.loss(perfect, torch.tensor(value)).item() == pytest.approx(floor, abs=2e-3)


def test_two_hot_agrees_with_torchrl() -> None:
    theirs, ours = SymExpTwoHot(255), TwoHot.dreamerv3(255)
    random = torch.Generator().manual_seed(0)
    values = symexp(torch.randn(500, generator=random) * 4)
    logits = torch.randn(500, 255, generator=random)
    assert torch.allclose(ours.bins, theirs.bins, rtol=1e-5)
    assert torch.allclose(ours.encode(values), theirs.encode(values), atol=2e-4)
    assert torch.allclose(ours.loss(logits, values), theirs.loss(logits, values), rtol=1e-4)
    assert torch.allclose(ours.decode(logits), theirs.decode(logits), rtol=2e-4, atol=2e3)


def test_kl_is_between_unimixed_distributions_and_summed_over_categoricals() -> None:
    forward, backward = kl_both_ways(unimix_probs(POSTERIOR).T, unimix_probs(PRIOR).T)
    assert forward.item() == pytest.approx(1.9163513, abs=1e-6)
    assert backward.item() == pytest.approx(2.40141, abs=1e-5)
    assert ((forward + backward) / 2).item() == pytest.approx(2.15888, abs=1e-5)
    unmixed = kl_both_ways(torch.softmax(POSTERIOR, -1).T, torch.softmax(PRIOR, -1).T)
    assert [kl.item() for kl in unmixed] == pytest.approx([1.96066, 2.48358], abs=1e-5)
    assert torch.stack(unmixed).mean().item() == pytest.approx(2.22212, abs=1e-5)


def test_kl_terms_and_their_gradients_agree_with_torchrl() -> None:
    posterior, prior = (
        torch.randn(4, 5, 8, 6, generator=torch.Generator().manual_seed(s), requires_grad=True)
        for s in (0, 1)
    )
    theirs = categorical_kl_terms(posterior, prior, free_nats=1.0, unimix=0.01)
    ours = tuple(kl.clamp_min(1.0).mean() for kl in balanced_kl(posterior, prior))
    sides = posterior, prior
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b)
        moved, wanted = (
            torch.autograd.grad(term, sides, allow_unused=True, materialize_grads=True) for term in (a, b)
        )
        for ours_of, theirs_of in zip(moved, wanted, strict=True):  # of one side each: the other stands still
            assert torch.allclose(ours_of, theirs_of, atol=1e-7)


@pytest.mark.parametrize(
    ("classes", "ceiling"), [(4, 189.6), (16, 233.4), (24, 246.3), (32, 255.4), (48, 268.2), (64, 277.3)]
)
def test_one_certain_categorical_against_another_reaches_the_ceiling(classes: int, ceiling: float) -> None:
    """With 1 % unimix the KL of 32 categoricals cannot exceed so many nats, whatever the size of the model."""
    p, q = torch.full((32, classes), -1e4), torch.full((32, classes), -1e4)
    p[:, 0], q[:, 1] = 1e4, 1e4
    assert kl_both_ways(unimix_probs(p).T, unimix_probs(q).T)[0].item() == pytest.approx(ceiling, abs=0.06)


def test_unimix_leaves_every_class_its_share() -> None:
    probs = unimix_probs(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    assert probs.tolist() == pytest.approx([0.9925, 0.0025, 0.0025, 0.0025])


def test_samples_are_one_hot_and_follow_the_probabilities() -> None:
    probs = unimix_probs(torch.tensor([1.0, 0.0, -1.0, 2.0]))
    uniform = (torch.arange(20000) + 0.5) / 20000
    samples = one_hot_sample(probs.expand(20000, 4), uniform)
    assert torch.equal(samples.sum(-1), torch.ones(20000))
    assert samples.mean(0).tolist() == pytest.approx(probs.tolist(), abs=1e-3)
    edge = one_hot_sample(probs, torch.tensor(1 - 2**-24))
    assert edge.tolist() == [0, 0, 0, 1]


def test_straight_through_is_exactly_one_hot_with_the_gradient_of_the_probabilities() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    sample = straight_through(logits, torch.full((3, 4), 0.3))
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    expected = torch.autograd.grad((unimix_probs(logits) * weight).sum(), logits)[0]
    assert torch.allclose(torch.autograd.grad((sample * weight).sum(), logits)[0], expected)
