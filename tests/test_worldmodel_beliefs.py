"""What a model believes at a row and predicts from there, and which rows of a window it learns from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pvrpipe.worldmodel.models import build_model

from .settings import setting

WIDTH, ACTION, ROWS = 12, 2, 9


def window(lanes: int = 4) -> dict[str, Tensor]:
    """Windows of which the first begins its episode, the others within one."""
    random = torch.Generator().manual_seed(0)
    is_first = torch.zeros(lanes, ROWS, dtype=torch.bool)
    is_first[0, 0] = True
    return {
        "observation": torch.randn(lanes, ROWS, WIDTH, generator=random),
        "action": torch.rand(lanes, ROWS, ACTION, generator=random) * 2 - 1,
        "reward": torch.randn(lanes, ROWS, generator=random),
        "is_first": is_first,
        "is_terminal": torch.zeros(lanes, ROWS, dtype=torch.bool),
    }


def test_dreamerv3_predicts_from_the_row_that_it_was_asked_about() -> None:
    """One step from row t's belief is the prior of row t + 1, which no chance is in but the belief's own."""
    model, batch = build_model("dreamerv3", "1m", setting(WIDTH, ACTION), seed=0), window()
    believed = model.filter(batch, torch.Generator().manual_seed(0))
    deter = believed.features[..., : model.size.deter]
    for t in range(ROWS - 1):
        assert torch.equal(believed.state(t), believed.features[:, t])
        ahead = model.predict(believed.state(t), batch["action"][:, t : t + 1], torch.Generator())
        assert torch.allclose(ahead.features[:, 0, : model.size.deter], deter[:, t + 1], atol=1e-5)
        assert torch.allclose(ahead.latents[:, 0], model.rssm.prior_logits(deter[:, t + 1]), atol=1e-5)


def test_tdmpc2_predicts_from_the_row_that_it_was_asked_about() -> None:
    model, batch = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0), window()
    believed = model.filter(batch, torch.Generator())
    for t in range(2, ROWS - 1):
        stack = batch["observation"][:, t - 2 : t + 1].flatten(1)
        assert torch.allclose(believed.state(t), model.encoder(stack), atol=1e-6)
        ahead = model.predict(believed.state(t), batch["action"][:, t : t + 1], torch.Generator())
        joint = torch.cat([model.encoder(stack), batch["action"][:, t]], -1)
        assert torch.allclose(ahead.latents[:, 0], model.dynamics(joint), atol=1e-6)


def test_tdmpc2_acts_by_the_mean_of_its_policy_after_the_last_row() -> None:
    model, batch = build_model("tdmpc2", "1m", setting(WIDTH, ACTION), seed=0), window()
    latent = model.encoder(batch["observation"][:, -3:].flatten(1))
    mean = model.policy(latent)[:, :ACTION]
    assert torch.allclose(model.act(batch["observation"]), torch.tanh(mean), atol=1e-6)


def test_what_dreamerv3_says_of_every_row_is_its_mean_distribution() -> None:
    model = build_model("dreamerv3", "1m", setting(WIDTH, ACTION), seed=0)
    logits = 3 * torch.randn(20, 32, 4, generator=torch.Generator().manual_seed(0))
    average = torch.softmax(model.average(logits), -1)
    assert torch.allclose(average, torch.softmax(logits, -1).mean(0), atol=1e-6)


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_burnt_in_rows_have_no_losses_but_where_an_episode_begins(burn_in: int) -> None:
    """The mean over all other rows, whose states were carried to them."""
    model = build_model("dreamerv3", "1m", setting(WIDTH, ACTION), seed=0, burn_in=burn_in)
    nn.init.normal_(model.reward.out.weight, generator=torch.Generator().manual_seed(0))
    batch = window()
    drawn = model.draw(batch, torch.Generator().manual_seed(1))
    _, terms = model.losses(batch, drawn)
    tokens = model.encoder(model.seen(batch["observation"]))
    deter, stoch, _ = model.rssm.observe(tokens, batch["action"], batch["is_first"], drawn)
    rows = model.two_hot.loss(model.reward(torch.cat([deter, stoch.flatten(-2)], -1)), batch["reward"])
    learned = torch.cat([rows[0], rows[1:, burn_in:].flatten()])
    assert terms["reward"].item() == pytest.approx(learned.mean().item(), rel=1e-5)
