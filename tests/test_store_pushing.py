"""Stores pushed to real servers and pulled from them: every byte, killed and run again, nothing of others replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
)
from pvrpipe.store.layout import PULLING, read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify
from pvrpipe.store.workspace import Workspace

from .conftest import WriteStore
from .serving import Served, drawn, forge
from .test_store import same_bytes
from .test_store_growing import grow

pytestmark = pytest.mark.usefixtures("cache")


def test_push_and_pull_keep_every_byte_and_do_nothing_the_second_time(
    write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    folder, url = write_rollouts(), f"{bucket}/walk"
    calls: list[float] = []
    first = push(folder, url, progress=lambda done, total, note="": calls.append(done / total))
    assert (first.files, first.resumed, calls[-1]) == (15, 0, 1)
    assert first.bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    again = push(folder, url)
    assert (again.files, again.resumed, again.bytes) == (15, 15, 0)
    pulled = pull(url, tmp_path / "pulled")
    assert same_bytes(folder, tmp_path / "pulled")
    assert (pulled.id, pulled.files, pulled.resumed) == (read_manifest(folder).id, 15, 0)
    twice = pull(url, tmp_path / "pulled")
    assert (twice.files, twice.resumed, twice.bytes) == (15, 15, 0)
    shard = tmp_path / "pulled" / "shards" / "00002.parquet"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert pull(url, tmp_path / "pulled").resumed == 14
    assert same_bytes(folder, tmp_path / "pulled")
    driver, path = fsspec.core.url_to_fs(f"{url}/shards/00002.parquet", use_listings_cache=False)
    driver.pipe_file(path, b"short")
    assert push(folder, url).resumed == 13
    assert verify(url) == []


def test_push_into_a_folder_is_served_over_http(
    write_rollouts: WriteStore, tmp_path: Path, web: Served
) -> None:
    folder = write_rollouts()
    push(folder, str(tmp_path / "served"))
    assert same_bytes(folder, tmp_path / "served")
    pull(f"{web.url}/served", tmp_path / "pulled")
    assert same_bytes(folder, tmp_path / "pulled")
    assert verify(f"{web.url}/served") == []
    with pytest.raises(InvalidValueError, match="nothing can be pushed over HTTP"):
        push(folder, f"{web.url}/elsewhere")


def test_what_does_not_verify_is_not_published(write_rollouts: WriteStore, bucket: str) -> None:
    folder = write_rollouts()
    forge(fsspec.filesystem("file"), str(folder / "shards" / "00004.parquet"))
    with pytest.raises(CorruptStoreError, match=r"shards/00004.parquet has sha256.*nothing was published"):
        push(folder, f"{bucket}/walk")
    assert not fsspec.filesystem("s3", use_listings_cache=False).exists(f"{bucket}/walk")


def test_a_file_is_no_folder_to_pull_into(write_rollouts: WriteStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        pull(str(write_rollouts()), tmp_path / "file")


def test_a_store_that_was_made_elsewhere_goes_to_its_like(write_rollouts: WriteStore, tmp_path: Path) -> None:
    manifest = read_manifest(write_rollouts())
    assert Workspace(tmp_path).home(manifest) == tmp_path / "rollouts" / "test-walk"
    for name in ("..", "", "a\nb", ".hidden"):
        made = manifest.specification.model_copy(update={"environment": name})
        with pytest.raises(InvalidValueError, match="give a FOLDER"):
            Workspace(tmp_path).home(manifest.model_copy(update={"specification": made}))


def test_overwrite_sends_again_what_changed_behind_the_url_and_no_more(
    write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    store, url = write_rollouts(), f"{bucket}/walk"
    first = push(store, url)
    forge(*fsspec.core.url_to_fs(f"{url}/shards/00003.parquet", use_listings_cache=False))
    assert push(store, url).resumed == first.files  # sizes and commit records are all that it looks at
    assert push(store, url, overwrite=True).resumed == first.files - 2
    assert verify(url) == []
    again = push(store, url, overwrite=True)
    assert (again.resumed, again.bytes) == (first.files, 0)
    pull(url, tmp_path / "pulled")
    assert same_bytes(store, tmp_path / "pulled")


def test_commit_records_that_say_the_same_are_of_one_store(write_rollouts: WriteStore, bucket: str) -> None:
    """Earlier versions indented them: the same store, made again since, was called another."""
    store, url = write_rollouts(), f"{bucket}/walk"
    first = push(store, url)
    driver, path = fsspec.core.url_to_fs(f"{url}/shards/00001.json", use_listings_cache=False)
    told = json.loads(driver.cat_file(path))
    driver.pipe_file(path, json.dumps(told, sort_keys=True, indent=1).encode())
    for overwrite in (False, True):
        assert push(store, url, overwrite=overwrite).resumed == first.files
    told["moments"]["action"]["count"] += 1
    driver.pipe_file(path, json.dumps(told).encode())
    with pytest.raises(OutputExistsError, match=r"holds shards/00001\.json of another store"):
        push(store, url)


def test_another_store_at_the_destination_is_refused_and_replaced_only_when_told(
    write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    one, other = write_rollouts(name="one"), write_rollouts((20, 21), name="other", seed=5)
    url, identity = f"{bucket}/walk", read_manifest(one).id
    push(one, url)
    with pytest.raises(OutputExistsError, match=rf"holds store {identity}.*--overwrite"):
        push(other, url)
    assert verify(url) == []
    push(other, url, overwrite=True)
    pull(url, tmp_path / "pulled")
    assert same_bytes(other, tmp_path / "pulled")
    driver, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    assert len(driver.ls(f"{root}/shards")) == 4
    driver.rm_file(f"{root}/store.json")
    with pytest.raises(OutputExistsError, match="of another store"):
        push(one, url)


def test_strangers_files_are_left_alone(write_rollouts: WriteStore, tmp_path: Path) -> None:
    folder = write_rollouts()
    for name in ("thesis.tex", "README.md"):
        mine = tmp_path / Path(name).stem
        mine.mkdir()
        (mine / name).write_text("years")
        with pytest.raises(OutputExistsError, match=name):
            push(folder, str(mine))
        with pytest.raises(OutputExistsError, match=name):
            pull(str(folder), mine)
        assert [p.name for p in mine.iterdir()] == [name]
        assert (mine / name).read_text() == "years"


KILLED = """
import os, sys
from pathlib import Path
from pvrpipe.store import destination, remote, sharing

left = int(sys.argv[4])

def dying(original):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    return call

if __name__ == "__main__":
    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    destination.Destination._put = dying(destination.Destination._put)
    remote.Source._open = dying(remote.Source._open)
    getattr(sharing, sys.argv[1])(sys.argv[2], sys.argv[3] if sys.argv[1] == "push" else Path(sys.argv[3]), workers=2)
"""


def killed(what: str, source: object, target: object, stop: int) -> int:
    command = [sys.executable, "-c", KILLED, what, str(source), str(target), str(stop)]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("place", "stops"), [("s3", (4, 6, 5)), ("folder", (4, 9, 11))])
def test_push_killed_and_pushed_again_then_pulled_elsewhere(
    place: str, stops: tuple[int, ...], write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    """Killed at an upload, a read, an fsync or a rename, and each time pushed again."""
    folder = write_rollouts((12, 13, 14, 15))
    url = f"{bucket}/walk" if place == "s3" else str(tmp_path / "there")
    driver, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    assert [killed("push", folder, url, stop) for stop in stops] == [-9, -9, -9]
    assert driver.find(root)
    assert not driver.exists(f"{root}/store.json")
    with pytest.raises(NotAStoreError):
        Store.open(url)
    assert 0 < push(folder, url).resumed < 12
    result = pull(url, tmp_path / "pulled")
    assert result.id == read_manifest(folder).id
    assert same_bytes(folder, tmp_path / "pulled")
    assert not [p for p in driver.find(root) if ".tmp-" in p]


def test_pull_killed_and_pulled_again(write_rollouts: WriteStore, bucket: str, tmp_path: Path) -> None:
    folder, there = write_rollouts((12, 13, 14, 15)), tmp_path / "pulled"
    push(folder, f"{bucket}/walk")
    for stop in (3, 10, 25):
        assert killed("pull", f"{bucket}/walk", there, stop) == -9
        assert not (there / "store.json").exists()
        with pytest.raises(NotAStoreError):
            Store.open(there)
    assert (there / PULLING).is_file()
    other = write_rollouts((20, 21), name="other", seed=5)
    with pytest.raises(OutputExistsError, match="something else"):
        pull(str(other), there)
    assert pull(f"{bucket}/walk", there).resumed > 0
    assert same_bytes(folder, there)


def test_a_grown_store_is_pushed_and_pulled_over_what_it_grew_from(
    write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    folder, url, pulled = write_rollouts(), f"{bucket}/walk", tmp_path / "pulled"
    first = push(folder, url)
    pull(url, pulled)
    before = drawn(Store.open(url))
    grow(folder, (30, 20))
    assert push(folder, url).resumed == first.files - 2  # all but README.md and store.json
    assert verify(url) == []
    assert Store.open(url).manifest.revision == 2
    for reader in (Store.open(url, revision=1), Store.open(folder, revision=1)):
        for batch, wanted in zip(drawn(reader), before, strict=True):
            for name in wanted:
                np.testing.assert_array_equal(batch[name], wanted[name], err_msg=name)
    pull(url, pulled)
    assert same_bytes(folder, pulled)
