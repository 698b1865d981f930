"""Weights at an address of one's own: the right file, whole, and nowhere but in the cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pvrpipe.pipeline import fetching
from pvrpipe.pipeline.cached import cached_weights, download_target
from pvrpipe.pipeline.pvrs import Pvr, WeightsSource
from pvrpipe.pipeline.weights import WeightsFile, find_weights
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import WeightsError

from .serving import serving


def own(url: str, file: str = "model.pt", name: str = "own") -> Pvr:
    return PVRS["resnet18"].model_copy(update={"name": name, "source": WeightsSource(url=url, file=file)})


def fetched(pvr: Pvr) -> Path:
    found = find_weights(pvr, "auto", "own.json")
    assert isinstance(found, WeightsFile)
    return found.path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two versions of a file."""
    for version in ("v1", "v2"):
        (tmp_path / "www" / version).mkdir(parents=True)
        torch.save({"a": torch.full((1000,), float(version[1]))}, tmp_path / "www" / version / "model.pt")
    return tmp_path / "www"


def test_another_address_is_another_file_whatever_it_is_called(cache: Path, published: Path) -> None:
    """The first one's weights computed the second one's embeddings, and the store named the second's address."""
    with serving(published) as served:
        paths = [fetched(own(f"{served.url}/{version}/model.pt")) for version in ("v1", "v2", "v1")]
        assert len(served.requests) == 2
    assert [path.read_bytes() for path in paths] == [
        (published / version / "model.pt").read_bytes() for version in ("v1", "v2", "v1")
    ]
    assert {path.name for path in paths} == {"model.pt"}
    assert download_target(own("https://a/b", PVRS["vip"].source.file, "vip")) != download_target(PVRS["vip"])


@pytest.mark.parametrize("file", ["../../escaped.pt", "..", "/", "{}/escaped.pt"])
@pytest.mark.parametrize("name", ["own", "a/../../../escaped", "{}/escaped"])
def test_no_specification_writes_outside_the_cache(
    cache: Path, published: Path, tmp_path: Path, file: str, name: str
) -> None:
    with serving(published) as served:
        pvr = own(f"{served.url}/v1/model.pt", file.format(tmp_path), name.format(tmp_path))
        assert cached_weights(pvr) is None
        path = fetched(pvr)
        assert path == cached_weights(pvr)
    assert path.name == ("escaped.pt" if file.endswith(".pt") else "weights")
    assert path.is_relative_to(cache / "weights")
    assert [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(published)] == [path]


def test_what_ended_before_its_end_is_not_kept(cache: Path, published: Path) -> None:
    """It was, under the file's name, and each command after it failed to read it."""
    with serving(published) as served:
        pvr = own(f"{served.url}/v1/model.pt")
        served.fails["/v1/model.pt"] = "cut"
        with pytest.raises(WeightsError, match=r"ended after \d+ of \d+ bytes; run the same command again"):
            fetched(pvr)
        assert [path for path in cache.rglob("*") if path.is_file()] == []
        assert torch.load(fetched(pvr), weights_only=True)["a"][0] == 1
        served.fails["/v2/model.pt"] = "busy"
        with pytest.raises(WeightsError, match=r"/v2/model.pt cannot be reached"):
            fetched(own(f"{served.url}/v2/model.pt"))


def _fetch_and_die(url: str, target: Path) -> None:
    replace: Callable[..., Path] = Path.replace

    def dying(self: Path, to: Path) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, to)

    Path.replace = dying  # type: ignore[assignment,method-assign]
    fetching.fetch(url, target)


def test_what_a_killed_fetch_left_goes_with_the_next(cache: Path, published: Path) -> None:
    with serving(published) as served:
        pvr = own(f"{served.url}/v1/model.pt")
        target = download_target(pvr)
        killed = get_context("spawn").Process(target=_fetch_and_die, args=(pvr.source.url, target))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert [path.name.split(".tmp-")[0] for path in target.parent.iterdir()] == ["model.pt"]
        assert not target.exists()
        assert fetched(pvr) == target
    assert list(target.parent.iterdir()) == [target]
