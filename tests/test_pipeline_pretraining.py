"""Pretraining one's own encoder: what it is shown, that it finds what was planted, and a kill costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.pipeline import pretrain_mae, pretraining
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretrain_contrastive import Atc, Contrastive, Curl
from pvrpipe.pipeline.pretrain_frames import Frames, frames_of
from pvrpipe.pipeline.pretrain_mae import MaskedAutoencoder, masked_loss
from pvrpipe.pipeline.pretraining import Method, PretrainConfig, kept_recipe, pretrain, recipe_of
from pvrpipe.schemas.errors import CorruptStoreError, InvalidValueError, NotAStoreError, OutputExistsError
from pvrpipe.schemas.records import Episode
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore, draft, random_episode
from .killing import run_killed

SIZE = 32
METHODS: tuple[Method, ...] = ("autoencoder", "mae", "atc", "curl")


def small(method: Method, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "size": SIZE,
        "channels": 8,
        "width": 64,
        "depth": 2,
        "updates": 3,
        "batch": 8,
        **changes,
    }
    return PretrainConfig(method, **settings)


def planted(episode: int, length: int) -> Episode:
    """A ramp from one colour to another, of the episode's own, over which a square moves a pixel a step."""
    made, random = random_episode(episode, length, size=SIZE), np.random.default_rng(episode)
    angle, colours = random.uniform(0, 2 * np.pi), random.uniform(0, 200, (2, 3))
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    share = 0.5 + 0.7 * (np.cos(angle) * x + np.sin(angle) * y)
    ground = np.clip(colours[0] + share[..., None] * (colours[1] - colours[0]), 0, 255)
    start, frames = random.integers(0, SIZE, 2), []
    for step in range(length + 1):
        frame = ground.copy()
        top, left = (start[0] + step) % (SIZE - 8), (start[1] + step // 2) % (SIZE - 8)
        frame[top : top + 8, left : left + 8] = 255
        frames.append(frame)
    return Episode(made.info, {**made.arrays, "frame": np.stack(frames).astype(np.uint8)})


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "rollouts"
    episodes = [planted(number, 12) for number in range(100)]
    manifest = draft(episodes)
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                for episode in episodes[plan.first_episode : plan.first_episode + plan.episodes]:
                    writer.write_episode(episode)
                writer.commit()
        pending.seal()
    return folder


def test_what_is_told_apart_are_two_crops_of_a_frame_or_a_frame_and_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal views are found too easily: the loss falls, and nothing is learned."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Contrastive, "logits", lambda _, *views: (seen.extend(views), torch.zeros(8, 8))[1])
    images = torch.rand(8, 3, SIZE, SIZE)
    draw = torch.Generator().manual_seed(0)
    Curl(SIZE - 5, 4, 8).objective(images, images, draw)
    same = [torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert sum(same) < 4  # one of 36 places may be drawn twice
    seen.clear()
    Atc(SIZE, 4, 8).objective(torch.zeros(8, 3, SIZE, SIZE), images, draw)
    anchors, partners = seen
    assert (anchors == 0).all()
    assert (partners > 0).all()
    assert not torch.equal(partners, images)


def test_partners_are_steps_later_in_the_same_episode(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((30, 41, 25, 30, 33, 28), size=16))
    recipe = kept_recipe(small("atc", size=16))
    every = frames_of(store, "train", 10_000, recipe, 3)
    assert (every.later[every.anchors] - every.anchors == 3).all()
    assert len(every.pixels) - len(every.anchors) == 3 * store.episodes.filter(split="train").height
    some = frames_of(store, "train", 40, recipe, 3)
    assert len(some.pixels) <= 40
    assert len(some.anchors) >= 16
    for number in some.anchors:  # it was the next that was kept, as far away as there were too many frames
        (place,) = (at for at, pixels in enumerate(every.pixels) if (pixels == some.pixels[number]).all())
        np.testing.assert_array_equal(some.pixels[some.later[number]], every.pixels[place + 3])
    first = store.episodes.filter(split="train").row(0, named=True)["episode"]
    frames = store.read_episode(first, ["frame"])["frame"]
    np.testing.assert_array_equal(every.pixels[: len(frames)], frames)


def test_curl_crops_from_whole_frames_and_its_encoder_sees_their_middle() -> None:
    trained, used = kept_recipe(small("curl", size=64)), recipe_of(small("curl", size=64))
    assert (trained.resize, trained.crop) == (76, 76)
    assert (used.resize, used.crop) == (76, 64)


def test_a_masked_autoencoder_sees_a_quarter_of_each_frame_and_is_asked_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MaskedAutoencoder(SIZE, SIZE // 8, 64, 1)
    encode, asked = MaskedAutoencoder.encode, list[torch.Tensor]()

    def encoding(self: MaskedAutoencoder, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        asked.append(visible)
        return encode(self, images, visible)

    def loss(predicted: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        asked.append(hidden)
        return masked_loss(predicted, target, hidden)

    monkeypatch.setattr(MaskedAutoencoder, "encode", encoding)
    monkeypatch.setattr(pretrain_mae, "masked_loss", loss)
    images = torch.rand(6, 3, SIZE, SIZE)
    model.objective(images, images, torch.Generator().manual_seed(0))
    visible, hidden = asked
    assert (visible.shape, hidden.shape) == ((6, 16), (6, 48))
    for seen, left in zip(visible, hidden, strict=True):
        assert sorted([*seen.tolist(), *left.tolist()]) == list(range(64))
    assert len({tuple(seen.sort().values.tolist()) for seen in visible}) == 6, "each frame has its own mask"


def test_what_is_reported_of_held_out_frames_is_of_them(rollouts: Path, tmp_path: Path) -> None:
    config = small("autoencoder")
    made = pretrain(rollouts, tmp_path / "ae", config)
    model = pretraining.objective_of(config)
    weights = {
        f"encoder.{name}": tensor
        for name, tensor in safetensors.torch.load_file(made.pvr / pretraining.WEIGHTS_FILE).items()
    }
    model.load_state_dict(weights | safetensors.torch.load_file(made.pvr / pretraining.REST_FILE))
    recipe, store = kept_recipe(config), Store.open(rollouts)
    losses = {
        split: pretraining._held_out(
            model, frames_of(store, split, config.frames, recipe), recipe, torch.device("cpu")
        )["val_loss"]
        for split in ("train", "val")
    }
    assert made.val_loss == pytest.approx(losses["val"], rel=1e-6)
    assert losses["train"] != pytest.approx(losses["val"], rel=1e-4)


@pytest.mark.parametrize(
    ("count", "sizes"), [(5, [5]), (64, [64]), (93, [64] * 2), (128, [64] * 2), (700, [64] * 11)]
)
def test_held_out_frames_are_told_from_sixty_three_others(count: int, sizes: list[int]) -> None:
    """Of 93 they were told from 92, which is harder; two encoders' losses were of as many frames as each store held."""
    seen: list[torch.Tensor] = []

    class Looking:
        def objective(self, images: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(images)
            return torch.tensor(0.0), torch.tensor(0.0)

    numbers = np.arange(count)
    pixels = np.stack([numbers // 256, numbers % 256, numbers * 0], 1)[:, None, None].astype(np.uint8)
    recipe = kept_recipe(small("atc")).model_copy(update={"resize": None, "crop": None})
    pretraining._held_out(Looking(), Frames(pixels, numbers), recipe, torch.device("cpu"))
    values = [((batch.flatten(1) + 1) * 127.5).round().long() for batch in seen]
    found = [set((256 * value[:, 0] + value[:, 1]).tolist()) for value in values]
    assert [len(batch) for batch in seen] == [len(batch) for batch in found] == sizes
    assert len(set().union(*found)) >= 0.95 * count
    spread = [max(batch) - min(batch) for batch in found]
    assert min(spread) > 0.9 * count - len(sizes)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_the_first_weights_and_no_other_draw_of_the_process(method: Method) -> None:
    torch.manual_seed(0)
    following = torch.random.get_rng_state()
    one, again, other = (
        next(pretraining._begun(small(method, seed=seed), torch.device("cpu")).model.encoder.parameters())
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), following)


def test_each_update_and_each_seed_draws_frames_and_places_of_its_own(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what is drawn, the later frame is what the later view holds."""
    views, drawn = pretraining._views, list[tuple[bytes, int]]()
    objective = Atc.objective

    def viewed(frames: Any, chosen: Any, *rest: Any) -> Any:
        images, later = views(frames, chosen, *rest)
        assert not torch.equal(images, later)
        return iter((images, later))

    def taking(self: Atc, images: torch.Tensor, later: torch.Tensor, draw: torch.Generator) -> Any:
        drawn.append((images.numpy().tobytes(), draw.initial_seed()))
        return objective(self, images, later, draw)

    monkeypatch.setattr(pretraining, "_views", viewed)
    monkeypatch.setattr(Atc, "objective", taking)
    monkeypatch.setattr(pretraining, "_held_out", lambda *_: {"val_loss": None, "val_accuracy": None})
    for seed in (0, 1):
        pretrain(rollouts, tmp_path / str(seed), small("atc", seed=seed))
    assert len(drawn) == 6
    assert [len(set(values)) for values in zip(*drawn, strict=True)] == [6, 6]


def test_float32_is_float32_while_it_trains(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU equal trainings would end differently else, and one that was killed too."""
    convolutions, seen = torch.backends.cudnn, set[tuple[bool, bool]]()
    monkeypatch.setattr(convolutions, "allow_tf32", True)
    monkeypatch.setattr(convolutions, "deterministic", False)

    def look(*_: object) -> None:
        seen.add((convolutions.allow_tf32, convolutions.deterministic))

    pretrain(rollouts, tmp_path / "ae", small("autoencoder"), progress=look)
    assert seen == {(False, True)}


@pytest.mark.parametrize("method", METHODS)
def test_it_finds_what_was_planted_and_embed_takes_the_folder(
    method: Method, rollouts: Path, tmp_path: Path
) -> None:
    few, many = small(method), small(method, updates=300, batch=64, learning_rate=3e-3)
    begun, trained = (pretrain(rollouts, tmp_path / str(c.updates), c) for c in (few, many))
    assert trained.val_loss < begun.val_loss
    if method in ("atc", "curl"):
        assert trained.val_accuracy is not None
        assert trained.val_accuracy > 0.15  # chance is 1 / 64
    if method == "mae":
        assert trained.val_loss < 0.9  # predicting the mean costs 1
    made = embed(
        rollouts,
        [(EncoderRequest(str(trained.pvr), device="cpu"), tmp_path / "e")],
        EmbedConfig(engine="inline"),
    )
    assert (made[0].pvr, made[0].shape) == (method, (64,))
    assert verify(tmp_path / "e") == []


def test_maes_encoder_is_a_timm_vit(rollouts: Path, tmp_path: Path) -> None:
    made = pretrain(rollouts, tmp_path / "mae", small("mae"))
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=SIZE, patch_size=4, embed_dim=64, depth=2, num_heads=1
    )
    vit.load_state_dict(safetensors.torch.load_file(made.pvr / "encoder.safetensors"), strict=True)


def trained_in_pieces(rollouts: Path, method: Method, place: str) -> None:
    pretraining.CHECKPOINT_EVERY = 2
    pretrain(rollouts, Path(place), small(method, updates=7))


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.pt", _truncated),
        ("checkpoint.pt", lambda _: b"no pickle"),
        ("checkpoint.pt", lambda _: b""),
        ("pretrain.json", _truncated),
        ("pretrain.json", lambda _: b"[]"),
        ("pretrain.json", lambda data: data.replace(b'"val_loss"', b'"validation"')),  # another version's
        ("encoder.safetensors", _truncated),
    ],
)
def test_what_an_earlier_training_left_damaged_is_one_line(
    rollouts: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, config = tmp_path / "own", small("autoencoder")
    if name == pretraining.CHECKPOINT_FILE:
        monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
        monkeypatch.setattr(pretraining, "_write", _stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(rollouts, out, config)
        monkeypatch.undo()
    else:
        pretrain(rollouts, out, config)
    (out / name).write_bytes(damage((out / name).read_bytes()))
    with pytest.raises(CorruptStoreError, match=rf"{name} is not what .* begin again with --overwrite"):
        pretrain(rollouts, out, config)
    assert not pretrain(rollouts, out, config, overwrite=True).reused


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_without_a_held_out_episode_there_is_no_validation(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    result = pretrain(write_rollouts((6,), size=SIZE), tmp_path / "own", small("autoencoder"))
    assert (result.val_loss, result.val_accuracy) == (None, None)
    assert pretrain(tmp_path / "rollouts", tmp_path / "own", small("autoencoder")).reused


@pytest.mark.parametrize("method", ["mae", pytest.param("atc", marks=pytest.mark.slow)])
def test_killed_after_a_checkpoint_it_goes_on_and_ends_with_the_same_bytes(
    method: Method, rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(rollouts, tmp_path / "whole", small(method, updates=7))
    # each checkpoint is written, synced, renamed, and its folder synced: the tenth is in the third
    assert run_killed(trained_in_pieces, rollouts, method, str(tmp_path / "killed"), stop=10)
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    with pytest.raises(OutputExistsError, match="a training of another configuration"):
        pretrain(rollouts, tmp_path / "killed", small(method, updates=8))
    again = pretrain(rollouts, tmp_path / "killed", small(method, updates=7))
    assert again.resumed_updates == 4
    assert sorted(p.name for p in again.pvr.iterdir()) == sorted(p.name for p in whole.pvr.iterdir())
    for path in whole.pvr.iterdir():
        assert path.read_bytes() == (again.pvr / path.name).read_bytes(), path.name


def test_mistakes_are_one_line(rollouts: Path, write_rollouts: WriteStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="--batch of 2"):
        small("curl", batch=1)
    with pytest.raises(InvalidValueError, match="at most the 20000 frames"):
        small("curl", batch=10**20)
    short = write_rollouts((2, 2, 2), size=16)
    with pytest.raises(NotAStoreError, match="no episode of more than 3 steps"):
        pretrain(short, tmp_path / "atc", small("atc", size=16))


@pytest.mark.parametrize("url", ["s3://lab/encoder", "file:///encoder"])
def test_a_url_to_write_to_is_refused(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """It was trained, and written to a folder called `s3:`."""
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "mae", str(rollouts), url, "--size", "16", "--updates", "1"]
    made = CliRunner().invoke(app, command, standalone_mode=False)
    assert isinstance(made.exception, InvalidValueError)
    assert f"{url.replace(':///', '://')} is a URL; write to a local folder" in str(made.exception)
    assert list(tmp_path.iterdir()) == []
