"""DreamerV3's world model: the block GRU, the RSSM and the losses, against references."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules.models.model_based import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

from pvrpipe.worldmodel.distributions import straight_through
from pvrpipe.worldmodel.dreamerv3 import CONTINUE, SIZES, DreamerV3
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.layers import MLP, initialise
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.rssm import RSSM, Size

from .settings import setting

SMALL = Size(deter=16, hidden=6, classes=3, units=5, categoricals=4, blocks=2)
TOKENS, ACTION, B, T = 5, 2, 3, 7


def small_rssm(dtype: torch.dtype = torch.float64) -> RSSM:
    """A small RSSM in which no gain is 1 and no bias is 0, so that a forgotten one shows."""
    torch.manual_seed(0)
    rssm = RSSM(SMALL, TOKENS, ACTION)
    initialise(rssm)
    for parameter in rssm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return rssm.to(dtype)


def small_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(B, T, TOKENS, generator=random, dtype=dtype)
    action = 2 * torch.randn(B, T, ACTION, generator=random, dtype=dtype)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[1, 3] = is_first[2, 0] = True
    return tokens, action, is_first, torch.rand(B, T, SMALL.categoricals, generator=random, dtype=dtype)


def observe_step_by_step(
    rssm: RSSM, tokens: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor
) -> tuple[Tensor, ...]:
    """The plain loop that the scan must equal."""
    deter = tokens.new_zeros(len(tokens), rssm.size.deter)
    stoch = tokens.new_zeros(len(tokens), rssm.size.categoricals, rssm.size.classes)
    rows = []
    for t in range(tokens.shape[1]):
        keep = (~is_first[:, t]).to(tokens.dtype).unsqueeze(-1)
        before = action[:, t - 1] * keep if t else torch.zeros_like(action[:, 0])
        deter = rssm.step(deter * keep, stoch * keep.unsqueeze(-1), before)
        logits = rssm.posterior_logits(deter, tokens[:, t])
        stoch = straight_through(logits, uniform[:, t])
        rows.append((deter, stoch, logits))
    return tuple(torch.stack(column, 1) for column in zip(*rows, strict=True))


def test_the_scan_equals_the_loop_in_values_and_gradients() -> None:
    rssm, (tokens, action, is_first, uniform) = small_rssm(), small_inputs()
    tokens.requires_grad_()
    action.requires_grad_()
    sources = [tokens, action, *(p for n, p in rssm.named_parameters() if not n.startswith("prior."))]
    scanned = rssm.observe(tokens, action, is_first, uniform)
    looped = observe_step_by_step(rssm, tokens, action, is_first, uniform)
    for a, b in zip(scanned, looped, strict=True):
        assert torch.allclose(a, b, atol=1e-13)
    weights = [torch.randn_like(x) for x in scanned]
    ours, theirs = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(states, weights, strict=True)), sources)
        for states in (scanned, looped)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-12), (a - b).abs().max()


def test_block_gru_reproduces_the_published_fixture() -> None:
    """TorchRL ``test_block_gru_reference_fixture``: every parameter is linspace(-0.2, 0.2)."""
    rssm = RSSM(Size(deter=4, hidden=4, classes=2, units=4, categoricals=2, blocks=2), 1, 2)
    prior = MLP(4, 4, 1, 4)
    for parameter in (*rssm.parameters(), *prior.parameters()):
        parameter.data = torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter)
    stoch = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    deter = rssm.step(torch.tensor([[0.1, -0.2, 0.3, -0.4]]), stoch, torch.tensor([[2.0, -4.0]]))
    assert deter[0].tolist() == pytest.approx([0.0575409, -0.1607322, 0.2253285, -0.2480658], abs=1e-6)
    logits = prior(deter)[0].tolist()
    assert logits == pytest.approx([-0.2538432, -0.0850009, 0.0838414, 0.2526837], abs=1e-6)


def torchrl_rollout(rssm: RSSM) -> RSSMRolloutV3:
    """TorchRL's RSSM with our weights."""
    size = rssm.size
    prior = RSSMPriorV3(
        action_shape=torch.Size([ACTION]),
        hidden_dim=size.hidden,
        rnn_hidden_dim=size.deter,
        num_categoricals=size.categoricals,
        num_classes=size.classes,
        action_dim=ACTION,
        recurrent_model="block_gru",
        num_blocks=size.blocks,
        unimix=0.01,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=size.hidden,
        num_categoricals=size.categoricals,
        num_classes=size.classes,
        rnn_hidden_dim=size.deter,
        obs_embed_dim=TOKENS,
        use_rms_norm=True,
        unimix=0.01,
    )
    pairs = [
        (prior.rnn.belief_projection, rssm.deter_in),
        (prior.rnn.state_projection, rssm.stoch_in),
        (prior.rnn.action_projection, rssm.action_in),
        (prior.rnn.hidden_layers[0], rssm.core),
        (prior.rnn.hidden_layers[1], rssm.core_norm),
        (prior.rnn.gates, rssm.gates),
        (prior.rnn_to_prior_projector, rssm.prior),
        (posterior.obs_rnn_to_post_projector, torch.nn.Sequential(rssm.posterior_in, rssm.posterior_out)),
    ]
    for theirs, ours in pairs:
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert a.shape == b.shape
            a.data.copy_(b)
    assert sum(p.numel() for p in (*prior.parameters(), *posterior.parameters())) == sum(
        p.numel() for p in rssm.parameters()
    )
    return RSSMRolloutV3(
        TensorDictModule(
            prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior,
            in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
    )


def test_the_rollout_agrees_with_torchrl() -> None:
    rssm = small_rssm(torch.float32)
    tokens, action, is_first, _ = small_inputs(torch.float32)
    before = torch.cat([torch.zeros(B, 1, ACTION), action[:, :-1]], 1)
    width = SMALL.categoricals * SMALL.classes
    batch = TensorDict(
        {
            "state": torch.zeros(B, T, width),
            "belief": torch.zeros(B, T, SMALL.deter),
            "action": before,
            "is_init": is_first.unsqueeze(-1),
            "next": {"encoded_latents": tokens},
        },
        [B, T],
    )
    rollout = torchrl_rollout(rssm)
    torch.manual_seed(3)
    theirs = rollout(batch)
    torch.manual_seed(3)
    uniform = torch.rand(T, 2, B, SMALL.categoricals)[:, 1].transpose(0, 1)
    deter, stoch, posterior = rssm.observe(tokens, action, is_first, uniform)
    assert torch.allclose(deter, theirs["next", "belief"], atol=1e-5)
    assert torch.allclose(stoch.flatten(-2), theirs["next", "state"], atol=1e-6)
    assert torch.allclose(posterior, theirs["next", "posterior_logits"], atol=1e-5)
    assert torch.allclose(rssm.prior_logits(deter), theirs["next", "prior_logits"], atol=1e-5)


def test_is_first_forgets_everything_before_it() -> None:
    """A window with an episode's beginning in its middle equals two separate runs."""
    rssm, (tokens, action, is_first, uniform) = small_rssm(), small_inputs()
    is_first[:] = False
    is_first[:, 4] = True
    whole = rssm.observe(tokens, action, is_first, uniform)
    for rows in (slice(0, 4), slice(4, T)):
        part = rssm.observe(tokens[:, rows], action[:, rows], is_first[:, rows], uniform[:, rows])
        for a, b in zip(whole, part, strict=True):
            assert torch.allclose(a[:, rows], b, atol=1e-14)
    tokens.requires_grad_()
    whole = rssm.observe(tokens, action, is_first, uniform)
    loss = whole[0][:, 4:].sum() + whole[2][:, 4:].sum()
    assert torch.autograd.grad(loss, tokens)[0][:, :4].abs().max() == 0


def test_imagination_goes_on_where_filtering_stopped() -> None:
    rssm, (tokens, action, is_first, uniform) = small_rssm(), small_inputs()
    is_first[:] = False
    deter, stoch, _ = rssm.observe(tokens, action, is_first, uniform)
    next_deter, _, prior = rssm.imagine(deter[:, 3], stoch[:, 3], action[:, 3:5], uniform[:, 4:6])
    assert torch.allclose(next_deter[:, 0], deter[:, 4])
    assert torch.allclose(prior[:, 0], rssm.prior_logits(deter)[:, 4])
    assert not torch.allclose(next_deter[:, 1], deter[:, 5])  # it did not see row 4
    rssm.prior.out.bias.data.view(SMALL.categoricals, 3)[:, 0] += (
        100  # the last class is left a third of unimix
    )
    _, stoch, _ = rssm.imagine(
        deter[:, 3], stoch[:, 3], action[:, 3:4], torch.full_like(uniform[:, :1], 0.999)
    )
    assert (stoch.argmax(-1) == 2).all()


def batch_of(width: int, rows: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    is_first = torch.zeros(4, rows, dtype=torch.bool)
    is_first[:, 0] = True
    is_terminal = torch.zeros(4, rows, dtype=torch.bool)
    is_terminal[0, -1] = True
    return {
        "observation": torch.randn(4, rows, width, generator=random),
        "action": torch.rand(4, rows, 2, generator=random),
        "reward": torch.rand(4, rows, generator=random),
        "is_first": is_first,
        "is_terminal": is_terminal,
    }


def test_losses_at_initialisation() -> None:
    """The zero-initialised reward head knows nothing, and the loss is the scaled sum of its terms."""
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    loss, terms = model.loss(batch_of(12), torch.Generator().manual_seed(0))
    assert terms["reward"].item() == pytest.approx(math.log(255), abs=1e-4)
    assert terms["dynamics"] == terms["representation"] >= 1.0
    rest = terms["reconstruction"] + terms["reward"] + terms["continue"] + terms["dynamics"]
    assert loss.item() == pytest.approx((rest + 0.1 * terms["representation"]).item(), rel=1e-6)


def test_the_kl_is_of_the_posterior_to_the_prior_and_each_term_moves_its_own_side() -> None:
    """Equation 5: dynamics moves the prior to the posterior, representation the posterior to the prior."""
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    for head in (model.rssm.prior.out, model.rssm.posterior_out):
        head.weight.data *= 10  # far apart, and by other amounts either way
    batch, random = batch_of(12), torch.Generator().manual_seed(0)
    drawn = model.draw(batch, random)
    loss, terms = model.losses(batch, drawn)
    tokens = model.encoder(model.seen(batch["observation"]))
    deter, _, posterior = model.rssm.observe(tokens, batch["action"], batch["is_first"], drawn)
    p, q = (
        0.99 * torch.softmax(logits.double(), -1) + 0.01 / 4
        for logits in (posterior, model.rssm.prior_logits(deter))
    )
    forward, backward = (p * (p / q).log()).sum((-2, -1)).mean(), (q * (q / p).log()).sum((-2, -1)).mean()
    assert terms["kl"].item() == pytest.approx(forward.item(), rel=1e-4)
    assert abs(forward - backward) > 0.05 * forward
    sides = model.rssm.prior.out.weight, model.rssm.posterior_out.weight
    for name, still in (("dynamics", None), ("representation", 0)):
        grads = torch.autograd.grad(terms[name], sides, retain_graph=True, allow_unused=True)
        moved = [grad is not None and bool(grad.abs().max() > 0) for grad in grads]
        assert moved == [still is None, True]  # a later prior depends on earlier samples
    (whole,), (alone,) = (
        torch.autograd.grad(x, [sides[0]], retain_graph=True) for x in (loss, terms["dynamics"])
    )
    assert torch.allclose(whole, alone)  # dynamics counts once, not a tenth


def test_gradients_of_every_head_reach_the_state() -> None:
    """``reward_grad: True``, and nothing is stopped in front of the decoder and the continuation."""
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    torch.nn.init.normal_(model.reward.out.weight, generator=torch.Generator().manual_seed(0))
    _, terms = model.loss(batch_of(12), torch.Generator().manual_seed(0))
    for name in ("reconstruction", "reward", "continue"):
        (grad,) = torch.autograd.grad(terms[name], model.rssm.gates.weight, retain_graph=True)
        assert grad.abs().max() > 0, name


def test_free_nats_hold_after_the_sum_over_categoricals() -> None:
    """Where prior and posterior agree, both KL losses are exactly 1 and give no gradient."""
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    for head in (model.rssm.prior.out, model.rssm.posterior_out):
        torch.nn.init.zeros_(head.weight)
    _, terms = model.loss(batch_of(12), torch.Generator().manual_seed(0))
    assert terms["dynamics"].item() == terms["representation"].item() == 1.0
    assert terms["kl"].item() == pytest.approx(0.0, abs=1e-5)
    (terms["dynamics"] + terms["representation"]).backward()
    assert model.rssm.prior.out.weight.grad.abs().max() == 0


def test_symlog_inputs_decides_what_is_decoded() -> None:
    with_symlog, without = (
        build_model("dreamerv3", "1m", setting(12, 2), symlog_inputs=s, seed=0) for s in (True, False)
    )
    batch = batch_of(12)
    batch["observation"] = batch["observation"] * 100
    losses = [
        m.loss(batch, torch.Generator().manual_seed(0))[1]["reconstruction"].item()
        for m in (with_symlog, without)
    ]
    assert losses[0] < 12 * 40 < losses[1]


def test_a_row_that_is_not_terminal_continues_with_the_discount() -> None:
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    model.continues.out.weight.data.zero_()
    model.continues.out.bias.data.fill_(math.log(CONTINUE / (1 - CONTINUE)))
    batch = batch_of(12)
    batch["is_terminal"][:] = False
    _, terms = model.loss(batch, torch.Generator().manual_seed(0))
    entropy = -(CONTINUE * math.log(CONTINUE) + (1 - CONTINUE) * math.log(1 - CONTINUE))
    assert terms["continue"].item() == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "three_layers", "rssm"),
    [
        ("1m", 653_440, None),
        ("12m", 8_606_464, 5_783_040),
        ("25m", 18_905_600, 12_999_936),
        ("50m", 33_202_432, 23_100_416),
        ("100m", 73_789_184, None),
        ("200m", 130_366_720, None),
        ("400m", 291_494_144, None),
    ],
)
def test_parameter_counts(size: str, three_layers: int, rssm: int | None) -> None:
    """The published counts have a three-layer encoder; the study's is one linear map, U units wide.

    So it lacks two layers of U² weights, and the three biases and gains but for one bias: 2·U² + 5·U.
    """
    with torch.device("meta"):
        model, linear = (DreamerV3(size, vector(1024), 6, encoder=e) for e in ("mlp", "linear"))
    units = SIZES[size].units
    assert sum(p.numel() for p in model.parameters()) == three_layers
    assert sum(p.numel() for p in linear.parameters()) == three_layers - 2 * units**2 - 5 * units
    if rssm is not None:
        assert sum(p.numel() for p in model.rssm.parameters()) == rssm


def test_parameter_counts_are_those_of_torchrls_walker() -> None:
    """TorchRL #4133: 640,867 at size 1m, of which policy and value have 50,316 and 66,111."""
    with torch.device("meta"):
        model = DreamerV3("1m", vector(24), 6, encoder="mlp")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert {name: count for name, count in counts.items() if count} == {
        "encoder": 10_112,
        "rssm": 364_416,
        "decoder": 51_096,
        "reward": 57_663,
        "continues": 41_153,
    }
    assert sum(counts.values()) == 640_867 - 50_316 - 66_111


def test_initialisation_counts_the_fan_in_of_all_blocks() -> None:
    model = build_model("dreamerv3", "1m", setting(12, 2), seed=0)
    for part, fan_in in (
        (model.rssm.gates, 512),
        (model.rssm.core, 512 + 3 * 64 * 8),
        (model.rssm.prior.hidden[0].linear, 512),
    ):
        assert part.weight.std().item() * fan_in**0.5 == pytest.approx(1.0, abs=0.03)
        assert part.bias.abs().max() == 0


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build_model("dreamerv3", "1m", setting(12, 2), seed=7)
    assert torch.equal(torch.rand(1), expected)
    second = build_model("dreamerv3", "1m", setting(12, 2), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
