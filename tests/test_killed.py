"""Every command that writes, killed: push and pull wherever they write, all of them at random moments."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pvrpipe.store.converting import convert
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .killing import run_killed, run_killed_at_random
from .test_store import same_bytes

pytestmark = pytest.mark.usefixtures("cache")
RANDOM_KILLS = 50
#: What takes seconds to import, and is no part of what is to be interrupted.
RENDERING = ("pvrpipe.rollouts.collect", "tests.rendering")
ENCODING = ("pvrpipe.pipeline.embed", "pvrpipe.pipeline.autoencoder", "timm")


def push_once(store: Path, place: str) -> None:
    push(store, place, workers=2)


def pull_once(source: str, place: str) -> None:
    pull(source, Path(place), workers=2)


def convert_once(store: Path, place: str) -> None:
    convert(store, Path(place), "webdataset")


def collect_once(place: str) -> None:
    from pvrpipe.rollouts.collect import CollectConfig, Engine, collect

    collect(CollectConfig(size=16, episodes=4, max_steps=6, seed=3), Path(place), Engine("inline"))


def collect_as_rendered(place: str) -> None:
    """In a process that was forked before it rendered anything."""
    importlib.import_module("tests.rendering")
    collect_once(place)


def embed_once(rollouts: Path, pvr: str, place: str) -> None:
    from pvrpipe.pipeline.embed import EmbedConfig, embed
    from pvrpipe.pipeline.encoders import EncoderRequest

    request = EncoderRequest(pvr, device="cpu", batch=16)
    embed(rollouts, [(request, Path(place))], EmbedConfig(engine="inline"))


S3 = pytest.param("s3", marks=pytest.mark.slow)


@pytest.mark.parametrize("place", ["folder", S3])
def test_push_killed_at_every_write_fsync_rename_and_packet(
    place: str, write_rollouts: WriteStore, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = write_rollouts((5, 6))
    there = str(tmp_path) if place == "folder" else request.getfixturevalue("bucket")
    for stop in itertools.count(1):
        url = f"{there}/pushed-{stop}"
        killed = run_killed(push_once, folder, url, stop=stop)
        if killed:
            push_once(folder, url)
        pull(url, tmp_path / f"pulled-{stop}")
        assert same_bytes(folder, tmp_path / f"pulled-{stop}"), stop
        driver, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        assert not [p for p in driver.find(root) if ".tmp-" in p]
        if not killed:
            break
    assert stop > 24  # of 8 files in a folder, each is copied, synced, renamed


@pytest.mark.parametrize("place", ["folder", S3])
def test_pull_killed_at_every_write_fsync_rename_and_packet(
    place: str, write_rollouts: WriteStore, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = write_rollouts((5, 6))
    source = str(folder)
    if place == "s3":
        source = f"{request.getfixturevalue('bucket')}/walk"
        push(folder, source)
    for stop in itertools.count(1):
        there = tmp_path / f"pulled-{stop}"
        killed = run_killed(pull_once, source, str(there), stop=stop)
        if killed:
            pull_once(source, str(there))
        assert same_bytes(folder, there), stop
        if not killed:
            break
    assert stop > 24


@pytest.mark.parametrize("kills", [6, pytest.param(RANDOM_KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["convert", "push", "pull"])
def test_killed_at_random_moments_it_ends_with_the_same_store(
    what: str, kills: int, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    folder = write_rollouts()
    work = {"convert": convert_once, "push": push_once, "pull": pull_once}[what]
    run_killed_at_random(functools.partial(work, folder), str(tmp_path / what), kills)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["push", "pull"])
def test_killed_at_random_moments_on_the_way_to_a_bucket_and_back(
    what: str, write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    folder = write_rollouts()
    push(folder, f"{bucket}/walk")
    if what == "push":
        run_killed_at_random(
            functools.partial(push_once, folder), f"{bucket}/pushed", RANDOM_KILLS, ("s3fs",)
        )
    else:
        work = functools.partial(pull_once, f"{bucket}/walk")
        run_killed_at_random(work, str(tmp_path / "pulled"), RANDOM_KILLS, ("s3fs",))


@pytest.mark.slow
def test_collect_killed_at_random_moments_ends_with_the_same_store(tmp_path: Path) -> None:
    run_killed_at_random(collect_once, str(tmp_path / "rollouts"), RANDOM_KILLS, RENDERING)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_embed_killed_at_random_moments_ends_with_the_same_store(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts = write_rollouts(size=16)
    work = functools.partial(embed_once, rollouts, str(own_encoder(rollouts, tmp_path)))
    run_killed_at_random(work, str(tmp_path / "embeddings"), RANDOM_KILLS, ENCODING)


def own_encoder(rollouts: Path, folder: Path) -> Path:
    """A small autoencoder, for there are no weights here."""
    from pvrpipe.pipeline.pretraining import PretrainConfig, pretrain

    from .test_pipeline_embed import SMALL

    config = PretrainConfig(**{**vars(SMALL), "updates": 2})
    return pretrain(rollouts, folder / "pvr", config).pvr


def check_every_write(work: Callable[[str], None], place: Path, most: int = 200) -> None:
    """Killed at each write, fsync and rename in turn, each time in a fresh place, and run again."""
    work(str(place / "whole"))
    expected = read_manifest(place / "whole").id
    for stop in range(1, most):
        folder = place / str(stop)
        if not run_killed(work, str(folder), stop=stop):
            break
        run_killed(work, str(folder))
        assert read_manifest(folder).id == expected, f"killed at {stop}"
        assert verify(folder) == []
    else:
        raise AssertionError("it was killed every time; raise `most`")
    assert stop > 10, "it writes more often than that"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_collect_killed_at_every_write_ends_with_the_same_store(tmp_path: Path) -> None:
    check_every_write(collect_as_rendered, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_embed_killed_at_every_write_ends_with_the_same_store(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts = write_rollouts((6, 8), size=16)
    work = functools.partial(embed_once, rollouts, str(own_encoder(rollouts, tmp_path)))
    check_every_write(work, tmp_path / "embeddings")
