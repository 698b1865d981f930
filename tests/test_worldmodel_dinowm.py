"""The causal transformer: what it may see, and its parts against torch's own and against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.worldmodel.dinowm import HISTORY, SIZES, Attention, DinoWM, Size
from pvrpipe.worldmodel.inputs import Observation, vector
from pvrpipe.worldmodel.models import build_model
from pvrpipe.worldmodel.training import LEAST

from .settings import setting

ACTION, STATE = 2, 3
VECTOR, TOKENS = vector(6), Observation("tokens", (5, 6))
KINDS = pytest.mark.parametrize(
    ("observation", "proprioception"),
    [(VECTOR, 0), (TOKENS, 0), (TOKENS, STATE)],
    ids=["one", "tokens", "state"],
)


def random_model(observation: Observation, proprioception: int = 0) -> DinoWM:
    """A model in float64 without a zero in it."""
    model = DinoWM("1m", observation, ACTION, proprioception=proprioception).double()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=random)
    model.two_hot.float()  # as it computes anyway
    return model


def batch_of(observation: Observation, rows: int = 7) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {"observation": observation.shape, "action": (ACTION,), "reward": (), "state": (STATE,)}
    return {
        name: torch.randn(2, rows, *shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@KINDS
@torch.no_grad()
def test_what_comes_later_never_changes_what_was_predicted(
    observation: Observation, proprioception: int
) -> None:
    """Frames and actions after row t leave the prediction from row t as it was; each one up to t changes it."""
    model, batch = random_model(observation, proprioception), batch_of(observation, HISTORY)
    frames, action = model._frames(batch), batch["action"]
    usual = model._next(frames, action)
    for row in range(HISTORY):
        for part in range(2):
            changed = [frames.clone(), action.clone()]
            changed[part][:, row] += 1
            for before, after in zip(usual, model._next(*changed), strict=True):
                assert torch.equal(before[:, :row], after[:, :row])
                moved = (before - after).abs().flatten(2).amax(-1)
                assert (moved[:, row:] > 1e-6).all()
    for rows in range(1, HISTORY):  # nor does it matter whether anything comes later
        for before, alone in zip(usual, model._next(frames[:, :rows], action[:, :rows]), strict=True):
            torch.testing.assert_close(before[:, :rows], alone)


@torch.no_grad()
def test_every_place_in_frame_and_time_is_told_apart() -> None:
    """Tokens that change places predict something else, and each frame's place has its part in what is predicted."""
    model, batch = random_model(TOKENS), batch_of(TOKENS, HISTORY)
    frames, action, order = model._frames(batch), batch["action"], torch.tensor([4, 0, 1, 2, 3])

    def last(frames: Tensor) -> Tensor:
        return model._next(frames, action)[0][:, -1]

    usual = last(frames)
    assert (last(frames[:, :, order]) - usual[:, order]).abs().max() > 1e-3
    for row in range(HISTORY):
        model.place[row] = 0
        assert (last(frames) - usual).abs().max() > 1e-3
        usual = last(frames)
    torch.testing.assert_close(last(frames[:, :, order]), last(frames)[:, order])


@KINDS
@torch.no_grad()
def test_open_loop_is_one_step_after_another_over_the_last_three_frames(
    observation: Observation, proprioception: int
) -> None:
    model, batch = random_model(observation, proprioception), batch_of(observation)
    state, latents, _ = model.filter(batch, torch.Generator())
    for t in range(5):
        embeddings, rewards, *_ = model.predict(state(t), batch["action"][:, t:-1], torch.Generator())
        shown = list(model._frames(batch)[:, : t + 1].unbind(1))
        for step in range(6 - t):
            now = t + step
            oldest = max(0, now + 1 - HISTORY)
            following, summary = model._next(
                torch.stack(shown[oldest:], 1), batch["action"][:, oldest : now + 1]
            )
            shown.append(following[:, -1])
            torch.testing.assert_close(embeddings[:, step], shown[-1][..., :6])
            expected = model.two_hot.decode(model.reward(summary[:, -1]))
            torch.testing.assert_close(rewards[:, step], expected, rtol=1e-4, atol=1e-4)
        assert embeddings.shape == latents[:, t + 1 :].shape


@KINDS
@pytest.mark.parametrize("rows", [2, 4, 7])
def test_the_loss_is_the_mean_over_every_run_of_a_window(
    observation: Observation, proprioception: int, rows: int
) -> None:
    """Window by window, run by run, row by row; the reward is that of the row arrived at."""
    model, batch = random_model(observation, proprioception), batch_of(observation, rows)
    loss, terms = model.loss(batch, torch.Generator())
    frames, length = model._frames(batch), min(HISTORY, rows - 1)
    squares, states, rewards = [], [], []
    for lane in range(2):
        for first in range(rows - length):
            run = slice(first, first + length)
            following, summary = model._next(
                frames[lane : lane + 1, run], batch["action"][lane : lane + 1, run]
            )
            for step in range(length):
                arrived = first + step + 1
                error = (following[0, step] - frames[lane, arrived]).square()
                squares.append(error[..., :6].mean())
                states.append(error[..., 6:].mean())
                target = model.two_hot.encode(batch["reward"][lane, arrived])
                rewards.append(-(target * F.log_softmax(model.reward(summary[0, step]).float(), -1)).sum())
    expected = {"embedding": squares, "reward": rewards, **({"state": states} if proprioception else {})}
    assert set(terms) == {"loss", *expected}
    for name, values in expected.items():
        torch.testing.assert_close(terms[name], torch.stack(values).mean(), rtol=1e-5, atol=1e-8)
    assert loss.item() == pytest.approx(sum(terms[name].item() for name in expected))


def test_attention_is_torchs_own() -> None:
    size, K = Size(1, 12, 4, 3, 8), 2
    torch.manual_seed(0)
    ours = Attention(size).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = nn.MultiheadAttention(12, 4, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        ours.qkv.weight,
        torch.zeros(36, dtype=torch.float64),
    )
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight, ours.out.bias
    x = torch.randn(2, HISTORY * K, 12, dtype=torch.float64)
    frame = torch.arange(HISTORY * K) // K
    mask = frame[:, None] >= frame
    normed = ours.norm(x)
    expected, _ = theirs(normed, normed, normed, attn_mask=~mask, need_weights=False)
    torch.testing.assert_close(ours(x, mask), expected)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    """Counted by hand: transformer blocks, the maps into and out of them, places, and the reward head."""
    size, D = SIZES[name], 384
    with torch.device("meta"):
        model = DinoWM(name, Observation("tokens", (16, D)), ACTION, proprioception=STATE)
    W, inner, hidden = size.width, size.heads * size.head, size.hidden
    block = 2 * W + W * 3 * inner + inner * W + W + 2 * W + (W + 1) * hidden + (hidden + 1) * W
    conditions = (ACTION + 1) * 10 + (STATE + 1) * 10
    heads = (W + 1) * D + (W + 1) * STATE + (W + 1) * hidden + (hidden + 1) * 255
    into = (D + 20 + 1) * W + HISTORY * 16 * W
    total = size.layers * block + 2 * W + conditions + into + heads
    assert sum(p.numel() for p in model.parameters()) == total
    assert total == pytest.approx(float(name.removesuffix("m")) * 1e6, rel=0.35)


def test_a_fresh_model_knows_no_reward() -> None:
    model = build_model("dinowm", "1m", setting(6, ACTION), seed=0)
    batch = {name: rows.float() for name, rows in batch_of(VECTOR).items()}
    state = model.filter(batch, torch.Generator()).state
    assert model.predict(state(2), batch["action"][:, 2:], torch.Generator()).reward.abs().max() == 0


def test_the_shortest_window_that_is_taken_teaches_every_place() -> None:
    model = random_model(VECTOR)
    model.loss(batch_of(VECTOR, LEAST["dinowm"]), torch.Generator())[0].backward()
    assert (model.place.grad.abs().amax((1, 2)) > 0).all()
