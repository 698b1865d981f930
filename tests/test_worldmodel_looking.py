"""Latent maps, film strips and counterfactual pairs, of a world whose every frame is known.

The frame's colour, the embedding and the reward follow from the last action alone.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.counterfactual import probe_pairs
from pvrpipe.worldmodel.filmstrip import film_strip
from pvrpipe.worldmodel.maps import latent_map, pca, separation, umap
from pvrpipe.worldmodel.pictures import draw, drawn, read_strip, write_pictures
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.probe_reference import beliefs_of
from pvrpipe.worldmodel.probe_subject import subject_of
from pvrpipe.worldmodel.runs import MAP
from pvrpipe.worldmodel.training import TrainConfig, train

from .commands import run
from .planted import write_planted

CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
CODES = np.random.default_rng(99).normal(size=(5, 8))
COLOURS = np.array([0, 60, 120, 180, 240], np.uint8)
COLUMNS = ("action", "reward", "state")
LOOK = 0.5 * np.ones(8)  # what another look adds to every embedding


def world(number: int) -> dict[str, np.ndarray]:
    corner = np.random.default_rng(number).integers(4, size=31 + number % 5)
    code = np.concatenate([[4], corner[:-1]])
    return {
        "frame": np.broadcast_to(COLOURS[code][:, None, None, None], (len(code), 8, 8, 3)).copy(),
        "embedding": CODES[code].astype(np.float32),
        "action": CORNERS[corner],
        "reward": (code == 2).astype(np.float32),
        "state": np.eye(5, dtype=np.float32)[code],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts, their embeddings, embeddings of replays, and a run of each model."""
    folder = tmp_path_factory.mktemp("looking")
    episodes = [world(number) for number in range(40)]
    frames = write_planted(folder / "rollouts", [_only(e, "frame", *COLUMNS) for e in episodes])
    made_of = Store.open(frames).manifest.id
    assert made_of is not None
    seen = [_only(e, "embedding", *COLUMNS) for e in episodes]
    write_planted(folder / "store", seen, rollouts_id=made_of)
    for name, look in (("same", 0 * LOOK), ("other", LOOK)):
        anew = [{**e, "embedding": (e["embedding"] + look).astype(np.float32)} for e in seen]
        made = {"rollouts_id": f"{len(name):064x}", "replay_of": made_of, "variation": f"camera={name}"}
        write_planted(folder / name, anew, **made)
    write_planted(folder / "stranger", seen[::-1], rollouts_id="1" * 64)
    settings = {"dreamerv3": {"length": 8, "warmup": 10, "learning_rate": 3e-3}, "tdmpc2": {"batch": 64}}
    for name, setting in settings.items():
        train(TrainConfig(name, "1m", 100, **setting), folder / "store", folder / name)  # type: ignore[arg-type]
    return folder


def _only(episode: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: episode[name] for name in names}


@pytest.mark.parametrize("model", ["dreamerv3", "tdmpc2"])
def test_a_film_strip_shows_what_the_actions_lead_to(model: str, home: Path) -> None:
    strip = film_strip(home / model, home / "rollouts", horizon=20, moments=9)
    frames = Store.open(home / "rollouts").read_episode(strip.episode, ("frame",))["frame"]
    assert strip.step.tolist() == [1, 3, 6, 8, 11, 13, 15, 18, 20]
    assert (strip.true == frames[strip.step]).all()
    assert (strip.seen == strip.true).all()
    assert np.mean((strip.imagined == strip.true).all((1, 2, 3))) >= 8 / 9
    for (episode, step), shown in zip(strip.nearest, strip.imagined, strict=True):
        assert Store.open(home / "store").episodes["split"][int(episode)] == "train"
        assert (
            Store.open(home / "rollouts").read_episode(int(episode), ("frame",))["frame"][step] == shown
        ).all()
    assert strip.reward[:, 0].tolist() == [float(frame[0, 0, 0] == COLOURS[2]) for frame in strip.true]


def test_a_strip_of_another_context_is_drawn_anew(home: Path) -> None:
    """A study whose context was changed kept the strips of the one before beside its new numbers."""
    folder = home / "tdmpc2"
    write_pictures(folder / MAP, pl.DataFrame({"episode": [0]}), {})  # UMAP takes half a minute
    for context, other in ((1, 3), (3, 1)):
        assert not drawn(folder, context)
        draw(folder, home / "rollouts", context=context)
        assert read_strip(folder)["step"][0] == context
        assert (drawn(folder, context), drawn(folder, other)) == (True, False)


def test_frames_of_other_rollouts_are_refused(home: Path, tmp_path: Path) -> None:
    others = write_planted(tmp_path / "others", [_only(world(n + 1), "frame", *COLUMNS) for n in range(40)])
    with pytest.raises(NotAStoreError, match=r"does not hold the frames of .*; give that store"):
        film_strip(home / "tdmpc2", others)
    with pytest.raises(InvalidValueError, match="it has 0 to 39"):
        film_strip(home / "tdmpc2", home / "rollouts", episode=40)


def test_a_map_says_how_well_reward_separates(home: Path) -> None:
    found = latent_map(home / "tdmpc2", rows=150, methods=("pca",))
    store = Store.open(home / "store")
    assert len(found.reward) == 150
    for number in (0, 70, 149):
        row = store.read_episode(int(found.episode[number]), ("reward",))["reward"][found.step[number]]
        assert row == found.reward[number]
    latent, plane = found.separation["latent"], found.separation["pca"]
    assert latent is not None
    assert plane is not None
    assert latent > 0.9
    assert plane <= latent + 0.05


def test_pca_is_the_singular_value_decomposition() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 7)) * np.arange(1, 8)
    points = pca(rows)
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(points, pca(rows))


@pytest.mark.parametrize("count", [1, 2, 4, 16, 40])
@pytest.mark.parametrize("width", [1, 2, 64])
def test_pca_of_few_rows_and_of_rows_that_are_alike(count: int, width: int) -> None:
    """Where rows are few, or alike, ARPACK had no vector to start from, and a run failed for its picture."""
    rows = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    left, strength, _ = np.linalg.svd(rows - rows.mean(0, dtype=np.float64), full_matrices=False)
    kept = min(2, len(strength))
    wanted = np.zeros((count, 2))
    wanted[:, :kept] = (left * strength)[:, :kept]
    np.testing.assert_allclose(np.abs(pca(rows)), np.abs(wanted), atol=1e-5)
    np.testing.assert_array_equal(pca(np.ones_like(rows)), np.zeros((count, 2)))
    line = rows[:, :1] * np.ones((1, width), np.float32)
    np.testing.assert_allclose(pca(line)[:, 1], 0, atol=1e-6)
    if count < 5:
        np.testing.assert_array_equal(umap(rows), pca(rows))


def test_separation_is_what_neighbours_in_other_episodes_tell() -> None:
    random = np.random.default_rng(1)
    reward, episode = np.repeat([0.0, 1.0], 100), np.arange(200) % 10
    apart = random.normal(size=(200, 3)) + 100 * reward[:, None]
    assert separation(apart, reward, episode) == 1.0
    mixed = separation(random.normal(size=(200, 3)), reward, episode)
    assert mixed is not None
    assert mixed < 0.1
    assert separation(apart, np.ones(200), episode) is None
    assert separation(apart, reward, np.zeros(200)) is None
    lonely = random.normal(size=(200, 3)) + 100 * episode[:, None]
    within = random.uniform(size=10)[episode]  # each episode a place and a reward of its own
    told = separation(lonely, within, episode)
    assert told is not None
    assert told < 0.5


def test_umap_leaves_as_many_threads_as_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler takes all cores for the whole process: what a worker trained after a map had other bits."""

    class Layout:
        def __init__(self, **_: object) -> None: ...

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            torch.set_num_threads(before + 2)
            return rows[:, :2]

    before = torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Layout))
    umap(np.zeros((4, 3), np.float32))
    assert torch.get_num_threads() == before


@pytest.mark.slow  # UMAP compiles for half a minute
def test_umap_keeps_two_clouds_apart_and_is_repeatable() -> None:
    random = np.random.default_rng(2)
    reward = np.repeat([0.0, 1.0], 80)
    rows = (random.normal(size=(160, 5)) + 20 * reward[:, None]).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    points = umap(rows, 3)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    assert points.shape == (160, 2)
    assert separation(points, reward, np.arange(160) % 8) == 1.0
    np.testing.assert_array_equal(points, umap(rows, 3))


@pytest.mark.parametrize("model", ["dreamerv3", "tdmpc2"])
def test_the_same_look_shifts_nothing_and_another_by_what_was_planted(model: str, home: Path) -> None:
    same, other = (probe_pairs(home / model, home / name, horizons=(5, 20)) for name in ("same", "other"))
    shifts = [name for name, found in same["measures"].items() if "shift" in found["5"]]
    assert {"filtered.embedding_shift", "open_loop.reward_shift", "open_loop.latent_shift"} <= set(shifts)
    for name in shifts:
        assert abs(same["measures"][name]["20"]["shift"]["accumulated"]["mean"]) < 1e-4, name
        if name.startswith("filtered"):  # what the actions lead to is the same whatever it looks like
            assert other["measures"][name]["20"]["shift"]["accumulated"]["mean"] > 1e-3, name
    errors = same["measures"]["open_loop.reward_error"]["5"]
    assert errors["source"] == errors["replay"]
    views = pl.read_parquet(home / model / f"pairs-{other['replay_id'][:12]}.parquet")
    asked = {"control": "source", "prediction": "open_loop", "measure": "reward_error", "horizon": 20}
    probe(home / model, horizons=(5, 20))  # the same episodes of the source, on their own
    own = pl.read_parquet(home / model / "probe.parquet").filter(split="val", **{**asked, "control": "model"})
    np.testing.assert_array_equal(views.filter(**asked)["accumulated"], own["accumulated"])
    assert (
        views.filter(**{**asked, "control": "replay"})["accumulated"].to_list()
        != own["accumulated"].to_list()
    )
    assert views["variation"].unique().to_list() == ["camera=other"]
    check_latent_shifts(home, model, views)
    store = Store.open(home / "store")
    rows = [
        store.read_episode(number, ("embedding",))["embedding"][1:]
        for number in store.episodes.filter(pl.col("split") == "train")["episode"]
    ]
    spread = 2 * np.concatenate(rows).astype(np.float64).var(0).sum()
    found = other["measures"]["filtered.embedding_shift"]["5"]["shift"]["per_step"]["mean"]
    assert found == pytest.approx((LOOK**2).sum() / spread, rel=1e-3)
    name = f"pairs-{other['replay_id'][:12]}"
    assert json.loads((home / model / f"{name}.json").read_text()) == other
    table = pl.read_parquet(home / model / f"{name}.parquet")
    one = table.filter(prediction="filtered", measure="embedding_shift", control="shift", horizon=5)
    assert one["per_step"].mean() == pytest.approx(found)


@torch.no_grad()
def check_latent_shifts(home: Path, name: str, views: pl.DataFrame) -> None:
    """KL of the source's latents to the replay's, and squared distances of features, by the formulas."""
    with subject_of(home / name) as subject, subject_of(home / name, home / "other") as anew:
        numbers, trained = subject.episodes("val"), subject.episodes("train")
        seen = [s.model.filter(s.reader(numbers).batch, chance(0, numbers[0], 0)) for s in (subject, anew)]
        spread = (
            beliefs_of(subject.model, subject.reader, trained, 0).features.astype(np.float64).var(0).sum()
        )
    rows = subject.reader(numbers).rows
    a, b = (one.features[:, 1:].double().numpy() for one in seen)
    shifts = {"latent_shift": ((a - b) ** 2).sum(-1) / (2 * spread)}
    p, q = (one.latents[:, 1:].double() for one in seen)
    if name == "dreamerv3":
        p, q = (0.99 * torch.softmax(x, -1) + 0.01 / x.shape[-1] for x in (p, q))
        shifts["latent_kl_forward"] = (p * (p / q).log()).sum((-2, -1)).numpy()
        shifts["latent_kl_backward"] = (q * (q / p).log()).sum((-2, -1)).numpy()
    for measure, values in shifts.items():
        found = views.filter(prediction="filtered", control="shift", measure=measure, horizon=20).sort(
            "episode"
        )
        known = [line[: min(20, n - 1)].sum() for line, n in zip(values, rows, strict=True)]
        np.testing.assert_allclose(found["accumulated"], known, rtol=1e-4, atol=1e-6)


def test_the_command_probes_a_run_and_its_pair(home: Path) -> None:
    arguments = ("--horizon", "5", "--context", "2", "--json", "--device", "cpu")
    done = run("probe", "tdmpc2", "--split", "val", "--split", "train", *arguments, cwd=home)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["context"], report["split"]) == (2, "val")
    assert {group["value"] for group in report["groups"]} == {"val", "train", "id", "none"}
    assert pl.read_parquet(home / "tdmpc2" / "probe.parquet")["split"].unique().sort().to_list() == [
        "train",
        "val",
    ]
    done = run("probe", "tdmpc2", "--beside", "other", *arguments, cwd=home)
    pairs = json.loads(done.stdout.splitlines()[-1])
    assert pairs["measures"]["filtered.embedding_shift"]["5"]["shift"]["per_step"]["mean"] > 0
    refused = run("probe", "tdmpc2", "--beside", "stranger", cwd=home)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is no replay of" in refused.stderr


def test_stores_that_are_no_pair_are_refused(home: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"is no replay of .*collect --replay"):
        probe_pairs(home / "tdmpc2", home / "stranger")
