"""Runs that go on from what they have: to more updates, and only where all that led to a checkpoint is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pvrpipe.schemas.errors import OutputExistsError, RunError
from pvrpipe.worldmodel import checkpoints, runs
from pvrpipe.worldmodel.metrics_log import METRICS
from pvrpipe.worldmodel.sharing import verify_run
from pvrpipe.worldmodel.training import train

from .toy import MODELS, WriteEmbeddings, short


@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_is_asked_for_more_updates_goes_on_as_if_it_had_been_from_the_start(
    model: str, write_embeddings: WriteEmbeddings, tmp_path: Path
) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    train(short(model, updates=12), store, tmp_path / "at once")
    train(short(model, updates=6), store, run)
    for name in ("metrics.json", "probe.parquet", "pairs-x.json", "map.parquet", "notes.txt"):
        (run / name).write_text("of the weights after six updates")
    result = train(short(model, updates=12), store, run)
    assert (result.updates, runs.read_run(run).config["updates"]) == (12, 12)
    for name in (checkpoints.CHECKPOINT, METRICS):
        assert (run / name).read_bytes() == (tmp_path / "at once" / name).read_bytes(), name
    assert verify_run(run) == []
    assert {path.name for path in run.glob("*.*")} == {
        "run.json",
        checkpoints.CHECKPOINT,
        METRICS,
        "notes.txt",
    }
    with pytest.raises(OutputExistsError, match="updates: 12, now 6"):
        train(short(model, updates=6), store, run)


def test_what_patience_kept_does_not_go_on(write_embeddings: WriteEmbeddings, tmp_path: Path) -> None:
    store, run = write_embeddings(), tmp_path / "run"
    train(short(patience=1), store, run)
    known = runs.read_run(run)
    with pytest.raises(OutputExistsError, match="updates: 6, now 12"):
        train(short(patience=1, updates=12), store, run)
    with pytest.raises(OutputExistsError, match="patience: 1, now 0"):
        train(short(updates=12), store, run)
    assert runs.read_run(run) == known


def test_losses_that_were_lost_are_missed(write_embeddings: WriteEmbeddings, tmp_path: Path) -> None:
    """A run that went on without them would end with another log than an undisturbed one."""
    store, run = write_embeddings(), tmp_path / "run"
    train(short(), store, run)
    first = (run / METRICS).read_text().splitlines(keepends=True)[0]
    (run / METRICS).unlink()
    for _ in range(2):
        with pytest.raises(RunError, match=r"ends before update 6.*--overwrite"):
            train(short(updates=12), store, run)
        (run / METRICS).write_text(first)


def test_losses_are_on_the_disk_before_the_checkpoint_that_they_lead_to(
    write_embeddings: WriteEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the machine goes down, a checkpoint without its losses would be one that nobody can go on from."""
    run, synced, sync = tmp_path / "run", dict[str, int](), os.fsync

    def syncing(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name.startswith(checkpoints.CHECKPOINT):
            assert synced.get(METRICS) == (run / METRICS).stat().st_size
        synced[path.name] = path.stat().st_size
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", syncing)
        train(short(), write_embeddings(), run)
    assert any(name.startswith(checkpoints.CHECKPOINT) for name in synced)
