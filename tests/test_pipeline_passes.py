"""Several encoders over the same frames: which go together, and that none of them notices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pvrpipe.pipeline import drafting
from pvrpipe.pipeline.drafting import draft, made_by
from pvrpipe.pipeline.embed import EmbedConfig, _passes, embed
from pvrpipe.pipeline.embedding import Target
from pvrpipe.pipeline.memory import Need, passes, smaller
from pvrpipe.store.reading import Store

from .brittle import brittle
from .conftest import WriteStore

INLINE = EmbedConfig(engine="inline")


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def test_a_fourth_encoder_costs_only_itself(rollouts: Path, tmp_path: Path) -> None:
    """The networks of the first three are told to die, should anything ask them again."""
    requests = [brittle(tmp_path / f"pvr{n}", name=f"pvr{n}", seed=n) for n in range(4)]
    outputs = [(request, tmp_path / f"e{n}") for n, request in enumerate(requests)]
    embed(rollouts, outputs[:3], INLINE)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("e?/**/*") if p.is_file()}
    results = embed(rollouts, outputs, INLINE)
    assert [r.resumed_shards for r in results] == [6, 6, 6, 0]
    assert [r.model_seconds > 0 for r in results] == [False, False, False, True]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_what_a_store_cost_is_of_what_was_done_for_it(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "fit", lambda *_, **__: Need(weights=30, batch=40))
    outputs = [(brittle(tmp_path / f"pvr{n}", name=f"pvr{n}"), tmp_path / f"e{n}") for n in range(2)]
    embed(rollouts, outputs[:1], INLINE)
    there, new = embed(rollouts, outputs, INLINE)
    assert there.frames_per_second == 0  # all of it was there
    assert new.frames_per_second == pytest.approx(new.rows / new.seconds)
    assert new.memory_bytes == 70


def test_encoders_share_a_pass_where_memory_and_batches_allow_it(rollouts: Path, tmp_path: Path) -> None:
    need = Need(weights=40, batch=20)
    assert passes([(need, 32)] * 3, 140) == [[0, 1, 2]]
    assert passes([(need, 32)] * 3, 139) == [[0, 1], [2]]
    assert passes([(need, 32)] * 3, 1) == [[0], [1], [2]]
    larger = Need(weights=40, batch=60)
    assert passes([(larger, 32), (need, 32)], 140) == [[0, 1]]
    assert passes([(larger, 32), (need, 32)], 139) == [[0], [1]]
    assert passes([(need, 32), (need, 48), (need, 96)], 1000) == [[0], [1, 2]]
    assert [smaller(b) for b in (256, 50, 25, 7, 2, 1)] == [128, 25, 5, 1, 1, 1]
    outputs = [
        (brittle(tmp_path / f"pvr{b}", name=f"pvr{b}", batch=b), tmp_path / f"e{b}") for b in (16, 8, 12)
    ]
    together = embed(rollouts, outputs, INLINE)
    for request, folder in outputs:
        (alone,) = embed(rollouts, [(request, folder.with_suffix(".alone"))], INLINE)
        assert alone.id in [r.id for r in together]
        assert (folder / "store.json").read_bytes() == (alone.store / "store.json").read_bytes()


def test_an_encoder_that_runs_out_of_memory_leaves_others_their_batches(
    rollouts: Path, tmp_path: Path
) -> None:
    outputs = [
        (brittle(tmp_path / "sound", name="sound", batch=16), tmp_path / "e"),
        (brittle(tmp_path / "large", name="large", batch=8, most=5), tmp_path / "f"),
    ]
    sound, large = embed(rollouts, outputs, INLINE)
    assert (sound.smaller_batches, large.smaller_batches) == (0, 6)
    (alone,) = embed(rollouts, [(outputs[0][0], tmp_path / "alone")], INLINE)
    assert sound.id == alone.id
    assert sound.rows == large.rows


def test_workers_of_one_machine_share_its_memory(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [(brittle(tmp_path / f"pvr{n}", name=f"pvr{n}"), tmp_path / f"e{n}") for n in range(2)]
    drafts = [
        replace(draft(Store.open(rollouts), request, folder, INLINE), need=Need(weights=30, batch=40))
        for request, folder in outputs
    ]
    targets = [Target(d.request, d.folder, d.manifest, made_by(d.manifest), d.todo) for d in drafts]
    monkeypatch.setattr(
        "pvrpipe.pipeline.embed.free_memory", lambda _: 250
    )  # of which four fifths are planned with
    for engine, workers, groups in (("inline", None, 1), ("ray", 2, 1), ("ray", 3, 2)):
        config = EmbedConfig(engine=engine, workers=workers)
        assert len(_passes(drafts, targets, config)) == groups
