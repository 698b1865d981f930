"""What a model is shown: embeddings, tokens, frames; each read and predicted as its reference has it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import tdmpc2_encoders
from pvrpipe.worldmodel.batches import resized, setting_of
from pvrpipe.worldmodel.dreamerv3 import SIZES, DreamerV3
from pvrpipe.worldmodel.inputs import Observation, Seen, vector
from pvrpipe.worldmodel.layers import initialise
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.observations import AttentionPool, ConvDecoder, ConvEncoder, decoder_for
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.tdmpc2_encoders import shifted, shifts
from pvrpipe.worldmodel.training import TrainConfig, train

FRAMES = Observation("pixels", (64, 64, 3))
TOKENS = Observation("tokens", (5, 6))


def batch_of(observation: Observation, rows: int = 6, windows: int = 2, action: int = 2) -> dict[str, Tensor]:
    """Noise of the right shapes; the first window begins its episode, the second does not."""
    random = torch.Generator().manual_seed(0)
    is_first = torch.zeros(windows, rows, dtype=torch.bool)
    is_first[0, 0] = True
    shape = (windows, rows, *observation.shape)
    pixels = observation.kind == "pixels"
    return {
        "observation": torch.randint(256, shape, generator=random, dtype=torch.uint8)
        if pixels
        else torch.randn(shape, generator=random),
        "action": torch.rand(windows, rows, action, generator=random) * 2 - 1,
        "reward": torch.rand(windows, rows, generator=random),
        "state": torch.randn(windows, rows, 3, generator=random),
        "is_first": is_first,
        "is_terminal": torch.zeros(windows, rows, dtype=torch.bool),
    }


def every_model() -> list[pytest.ParameterSet]:
    cases = [
        ("dreamerv3", vector(6), {}),
        ("dreamerv3", vector(6), {"encoder": "mlp"}),
        ("dreamerv3", TOKENS, {}),
        ("dreamerv3", FRAMES, {}),
        ("dreamerv3", vector(6), {"burn_in": 2}),
        ("tdmpc2", vector(6), {}),
        ("tdmpc2", TOKENS, {}),
        ("tdmpc2", FRAMES, {}),
        ("dinowm", vector(6), {}),
        ("dinowm", TOKENS, {"proprioception": True}),
    ]
    return [pytest.param(*c, id=f"{c[0]}-{c[1].kind}-{'-'.join(c[2])}") for c in cases]


@pytest.mark.parametrize(("name", "observation", "options"), every_model())
def test_every_model_learns_from_each_parameter_and_predicts_what_it_filters(
    name: str, observation: Observation, options: dict[str, object]
) -> None:
    setting = Setting(observation, 2, state=3, steps=50, episodic=True)
    model = build_model(name, "1m", setting, seed=0, **options)
    batch, random = batch_of(observation), torch.Generator().manual_seed(1)
    for part in model.modules():  # heads begin at zero, and would let no gradient through
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.1, generator=random)
    for weight in getattr(getattr(model, "values", None), "weights", ()):
        nn.init.normal_(weight, std=0.1, generator=random)
    loss, terms = model.loss(batch, random)
    loss.backward()
    assert all(torch.isfinite(term) for term in terms.values())
    idle = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not idle
    with torch.no_grad():
        state, latents, _ = model.filter(batch, random)
        for t in (0, 1, 4):
            predicted, reward, *_ = model.predict(state(t), batch["action"][:, t:-1], random)
            assert predicted.shape == latents[:, t + 1 :].shape
            assert reward.shape == (2, 5 - t)
            for found in model.divergences(predicted, latents[:, t + 1 :]).values():
                assert found.shape == (2, 5 - t)


def test_rows_of_the_burn_in_are_not_learned_from_unless_an_episode_begins_there() -> None:
    model = build_model("dreamerv3", "1m", Setting(vector(6), 2, 0, 50, False), seed=0, burn_in=2)
    nn.init.normal_(model.reward.out.weight, std=0.1)
    batch = batch_of(vector(6))

    def reward_loss(changed: dict[str, Tensor]) -> float:
        return model.loss(changed, torch.Generator().manual_seed(0))[1]["reward"].item()

    for window, counts in ((0, True), (1, False)):
        other = {**batch, "reward": batch["reward"].clone()}
        other["reward"][window, :2] += 5
        assert (reward_loss(other) != reward_loss(batch)) == counts
    other = {**batch, "reward": batch["reward"].clone()}
    other["reward"][1, 2] += 5
    assert reward_loss(other) != reward_loss(batch)


def test_the_decoder_lays_blocks_out_as_the_reference_does() -> None:
    """``(g h w c) -> h w (g c)``, written out."""
    torch.manual_seed(0)
    decoder = ConvDecoder(FRAMES, SIZES["1m"]).double()
    features = torch.randn(1, 1, 512 + 32 * 4, dtype=torch.float64)
    seen = {}
    decoder.norm.register_forward_pre_hook(lambda _, inputs: seen.update(grid=inputs[0]))
    with torch.no_grad():
        frames = decoder(features)
    assert frames.shape == (1, 1, 64, 64, 3)
    deter, stoch = features[0, 0, :512].numpy(), features[0, 0, 512:]
    weight, bias = (p.detach().numpy() for p in (decoder.of_deter.weight, decoder.of_deter.bias))
    flat = np.concatenate([deter.reshape(8, -1)[g] @ weight[g] for g in range(8)]) + bias
    other = decoder.of_stoch(stoch).detach().numpy().reshape(4, 4, 16)
    for g, h, w, c in np.ndindex(8, 4, 4, 2):
        own = flat[((g * 4 + h) * 4 + w) * 2 + c]
        assert seen["grid"][0, h, w, g * 2 + c].item() == pytest.approx(own + other[h, w, g * 2 + c])


def test_the_convolutions_of_every_size_have_the_reference_widths() -> None:
    """Depth is a sixteenth of the units: 4, 16, 24, 32, 48, 64, 96 (configs.yaml)."""
    depths = {name: size.units // 16 for name, size in SIZES.items()}
    assert list(depths.values()) == [4, 16, 24, 32, 48, 64, 96]
    for side in (64, 128):
        with torch.device("meta"):
            encoder = ConvEncoder(Observation("pixels", (side, side, 3)), 16)
        widths = [3, 32, 48, 64, 64]
        expected = sum(25 * a * b + b + b for a, b in pairwise(widths))
        assert sum(p.numel() for p in encoder.parameters()) == expected
        assert encoder.width == (side // 16) ** 2 * 64


def test_the_convolutions_are_the_references_written_out() -> None:
    """``Encoder``: bytes / 255 - 0.5, each stage a convolution, the largest of 2 × 2, norm, silu. ``Decoder`` back."""
    torch.manual_seed(0)
    model = DreamerV3("1m", FRAMES, 2)
    encoder, decoder = model.encoder.double(), model.decoder.double()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    frames = torch.randint(256, (2, 3, 64, 64, 3))

    def activated(x: Tensor, gain: Tensor) -> Tensor:
        gain = gain.view(-1, 1, 1)
        return F.silu(gain * x / (x.square().mean(-3, keepdim=True) + 1e-4).sqrt())

    x = (frames.flatten(0, 1).double() / 255 - 0.5).permute(0, 3, 1, 2)
    for stage in encoder.stages:
        x = F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=2)
        x = activated(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5)), stage.norm.weight)
    torch.testing.assert_close(encoder(frames.double() / 255), x.flatten(1).unflatten(0, (2, 3)))

    features = torch.randn(2, 3, model.rssm.size.deter + model.rssm.width, dtype=torch.float64)
    deter, stoch = features.flatten(0, 1).split([model.rssm.size.deter, model.rssm.width], -1)
    blocks = [
        (part @ kernel + bias).unflatten(-1, (4, 4, 2))
        for part, kernel, bias in zip(
            deter.chunk(8, -1), decoder.of_deter.weight, decoder.of_deter.bias.chunk(8), strict=True
        )
    ]
    x = torch.cat(blocks, -1) + decoder.of_stoch(stoch).unflatten(-1, (4, 4, 16))
    x = activated(x.permute(0, 3, 1, 2), decoder.norm.weight)
    for stage in decoder.stages:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = activated(F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=2), stage.norm.weight)
    x = F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), decoder.out.weight, decoder.out.bias, padding=2
    )
    expected = torch.sigmoid(x).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize("observation", [vector(6), TOKENS, FRAMES], ids=["vector", "tokens", "pixels"])
def test_errors_are_summed_over_a_row_and_averaged_over_tokens(observation: Observation) -> None:
    """As the reference sums over an event (``outs.Agg``); a token is one event, a frame another."""
    random, features = torch.Generator().manual_seed(0), 512 + 32 * 4
    decoder = decoder_for(observation, SIZES["1m"], features)
    initialise(decoder)
    states = torch.randn(2, 3, features, generator=random)
    target = torch.rand(2, 3, *observation.shape, generator=random)
    events = observation.shape[0] if observation.kind == "tokens" else 1
    with torch.no_grad():
        apart = (decoder(states) - target).double().square().reshape(2, 3, -1)
        ours = decoder.loss(states, target).double()
    torch.testing.assert_close(ours, apart.sum(-1) / events, rtol=1e-5, atol=0)


def test_attention_pooling_is_attention_with_one_query() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(TOKENS, 16).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, *TOKENS.shape, dtype=torch.float64)
    tokens = pool.into(x) + pool.place
    keys, values = pool.keys_values(tokens).chunk(2, -1)
    heads = [part.unflatten(-1, (4, 4)).transpose(-2, -3) for part in (keys, values)]
    query = pool.query.view(4, 1, 4).expand(2, 3, 4, 1, 4)
    expected = F.scaled_dot_product_attention(query, *heads).squeeze(-2).flatten(-2)
    torch.testing.assert_close(pool(x), pool.out(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [64, 96])
def test_frames_are_reduced_as_pil_does(side: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 128, 128, 3), np.uint8)
    ours = resized(torch.from_numpy(frames), side)[0].numpy()
    how = Image.Resampling.BOX if 128 % side == 0 else Image.Resampling.BILINEAR
    for frame, small in zip(frames[0], ours, strict=True):
        theirs = np.asarray(Image.fromarray(frame).resize((side, side), how)).astype(int)
        assert np.abs(theirs - small).max() <= 1
        if 128 % side == 0:  # PIL rounds twice
            exact = frame.reshape(side, 128 // side, side, -1, 3).mean((1, 3))
            assert np.abs(exact - small).max() <= 0.5


def test_the_brightest_byte_is_one() -> None:
    frame = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 1, 64, 64, 3)
    seen = Seen(Observation("pixels", (64, 64, 3)))(frame)
    assert seen[0, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])


def test_only_what_hardly_varies_is_left_unscaled() -> None:
    seen = Seen(vector(3))
    seen.standardise.set([0.0, 0.0, 0.0], [0.05, 2e-4, 5e-5])
    assert seen(torch.ones(1, 1, 3)).flatten().tolist() == pytest.approx([20, 5000, 1])


def test_embeddings_are_squashed_once_they_are_standardised() -> None:
    seen = Seen(vector(3), symlog_inputs=True)
    seen.standardise.set([1.0, -2.0, 3.0], [2.0, 0.5, 4.0])
    standard = [-4.5, 24.0, 0.5]
    expected = [np.sign(x) * np.log1p(abs(x)) for x in standard]
    assert seen(torch.tensor([[[-8.0, 10.0, 5.0]]])).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_longest_episode_decides_how_many_steps_a_model_counts_on(
    write_rollouts: Callable[..., Path],
) -> None:
    """TD-MPC2's discount follows from them."""
    store = Store.open(write_rollouts(lengths=(9, 14, 11, 15, 13, 10)))
    assert min(store.episodes["length"]) < max(store.episodes["length"]) == 15
    assert setting_of(store, pixels=64, encoder="auto").steps == 15


def test_tdmpc2s_convolutions_are_upstreams_written_out() -> None:
    encoder, x = tdmpc2_encoders.ConvEncoder(512), torch.rand(2, 3, 64, 64, 9)
    maps = x.flatten(0, 1).movedim(-1, 1) - 0.5
    convolutions = [part for part in encoder.layers if isinstance(part, nn.Conv2d)]
    assert [part.kernel_size[0] for part in convolutions] == [7, 5, 3, 3]
    for part, stride in zip(convolutions, (2, 2, 2, 1), strict=True):
        maps = F.conv2d(maps, part.weight, part.bias, stride)
        maps = maps.relu() if part is not convolutions[-1] else maps
    latent = torch.softmax(maps.reshape(2, 3, 64, 8), -1).flatten(2)
    torch.testing.assert_close(encoder(x), latent, rtol=1e-5, atol=1e-6)


def test_shifted_frames_are_those_of_the_published_augmentation() -> None:
    """Shifts are whole pixels over replicated edges: sampling a padded grid, as upstream does, gives the same."""
    frames = torch.rand(6, 3, 64, 64)
    ours = shifted(frames, shifts(6, torch.Generator().manual_seed(3)))
    by = torch.randint(-3, 4, (2, 6, 1), generator=torch.Generator().manual_seed(3))
    padded, size = F.pad(frames, (3, 3, 3, 3), "replicate"), 70
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)[:64]
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).repeat(6, 1, 1, 1)
    shift = torch.stack([by[1], by[0]], -1).view(6, 1, 1, 2) + 3
    theirs = F.grid_sample(padded, grid + shift * 2.0 / size, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(UnknownNameError, match="encoder of vector 'cnn'"):
        DreamerV3("1m", vector(4), 2, encoder="cnn")
    with pytest.raises(InvalidValueError, match="--pixels"):
        DreamerV3("1m", Observation("pixels", (40, 40, 3)), 2)
    with pytest.raises(InvalidValueError, match="--pixels 64"):
        build_model("tdmpc2", "1m", Setting(Observation("pixels", (128, 128, 3)), 2, 0, 50, False), seed=0)
    with pytest.raises(InvalidValueError, match="pvrpipe embed --pvr NAME"):
        build_model("dinowm", "1m", Setting(FRAMES, 2, 0, 50, False), seed=0)
    with pytest.raises(InvalidValueError, match="no state column"):
        build_model("dinowm", "1m", Setting(vector(4), 2, 0, 50, False), seed=0, proprioception=True)
    for observation, encoder in ((vector(4), "mlp"), (vector(4), "attention"), (TOKENS, "cnn")):
        with pytest.raises(UnknownNameError, match=f"for dinowm '{encoder}'"):
            build_model("dinowm", "1m", Setting(observation, 2, 0, 50, False), seed=0, encoder=encoder)


@pytest.mark.parametrize("model", ["dreamerv3", "tdmpc2"])
def test_a_model_from_scratch_trains_from_a_rollout_store_and_is_probed_on_it(
    model: str, write_rollouts: Callable[..., Path], tmp_path: Path
) -> None:
    store = write_rollouts(size=80, lengths=(12,) * 12)
    assert setting_of(Store.open(store), pixels=64, encoder="auto").episodic
    config = TrainConfig(model, updates=2, batch=2, length=5, log_every=1, save_every=1)
    result = train(config, store, tmp_path / "run")
    assert np.isfinite(list(result.train.values())).all()
    report = probe(tmp_path / "run", horizons=(5,))
    assert report["pvr"] == "from scratch"
    assert not report["random_weights"]
    assert report["reward_error"]["5"]["per_step"]["mean"] > 0
