"""Stores behind URLs, against real servers on loopback: read, and the same from everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pvrpipe.schemas.errors import (
    InvalidValueError,
    MissingDriverError,
    NotAStoreError,
    StoreBusyError,
    UnfinishedStoreError,
    UnknownNameError,
    UnreachableError,
)
from pvrpipe.store.describing import describe
from pvrpipe.store.files import locked
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.workspace import Workspace

from .conftest import WriteStore
from .serving import Served, copy_to, drawn
from .test_store import same_bytes

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("shard_format", ["parquet", "webdataset"])
def test_windows_are_the_same_bit_for_bit_from_everywhere(
    write_rollouts: WriteStore, bucket: str, web: Served
) -> None:
    folder = write_rollouts()
    copy_to(folder, f"{bucket}/lab/walk")
    copy_to(folder, "memory://lab/walk")
    expected = drawn(Store.open(folder))
    for url in (f"{bucket}/lab/walk", f"{web.url}/rollouts", "memory://lab/walk", f"file://{folder}"):
        for batch, wanted in zip(drawn(Store.open(url)), expected, strict=True):
            for name in wanted:
                np.testing.assert_array_equal(batch[name], wanted[name], err_msg=f"{url} {name}")


def test_shards_are_fetched_when_they_are_opened_and_once(write_rollouts: WriteStore, web: Served) -> None:
    write_rollouts()
    store = Store.open(f"{web.url}/rollouts/")
    assert str(store.path) == f"{web.url}/rollouts"
    assert not any("shards" in path for path in web.requests)
    assert store.shard(2).mapped("action") is not None
    Store.open(f"{web.url}/rollouts").shard(2)
    assert [path for path in web.requests if "shards" in path] == ["/rollouts/shards/00002.parquet"]


def test_what_a_store_is_costs_one_shard_however_many_there_are(
    write_rollouts: WriteStore, web: Served
) -> None:
    write_rollouts()
    told = describe(Store.open(f"{web.url}/rollouts"))
    assert [path for path in web.requests if "shards" in path] == ["/rollouts/shards/00000.parquet"]
    assert {c["of"] for c in told["coverage"]} >= {"action[0]", "x"}


def test_a_server_that_fails_once_is_asked_again(write_rollouts: WriteStore, web: Served) -> None:
    local = Store.open(write_rollouts())
    remote = Store.open(f"{web.url}/rollouts")
    web.fails.update({"/rollouts/shards/00000.parquet": "busy", "/rollouts/shards/00001.parquet": "cut"})
    for episode in range(2):
        np.testing.assert_array_equal(
            remote.read_episode(episode)["frame"], local.read_episode(episode)["frame"]
        )
    assert web.fails == {}


def test_a_forked_loader_fetches_for_itself(write_rollouts: WriteStore, bucket: str) -> None:
    folder = write_rollouts()
    copy_to(folder, f"{bucket}/walk")
    store = Store.open(f"{bucket}/walk")
    store.shard(0)
    expected = Store.open(folder).read_episode(4)["action"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(not np.array_equal(store.read_episode(4)["action"], expected))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_places_that_cannot_be_used_are_one_line(
    write_rollouts: WriteStore, bucket: str, web: Served
) -> None:
    folder = write_rollouts()
    for url, error, message in (
        (f"{bucket}/nothing", NotAStoreError, "holds no store"),
        ("s3://no-such-bucket-here/x", NotAStoreError, "holds no store"),
        (f"{web.url}/nothing", NotAStoreError, "holds no store"),
        ("http://127.0.0.1:1/x", UnreachableError, "cannot be reached"),
        ("foo://bar", UnknownNameError, "unknown kind of URL 'foo'"),
    ):
        with pytest.raises(error, match=message) as caught:
            Store.open(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidValueError, match="does not exist"):
        push(folder, "s3://no-such-bucket-here/x")
    with pytest.raises(InvalidValueError, match="pvrpipe pull"):
        push(f"{bucket}/x", f"{bucket}/y")
    copy_to(folder, "memory://half")
    draft = read_manifest(folder).model_copy(update={"state": "writing"})
    fsspec.filesystem("memory").pipe_file("/half/store.json", draft.to_json().encode())
    with pytest.raises(UnfinishedStoreError, match="memory://half"):
        Store.open("memory://half")


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDriverError, match=r"pip install 'pvrpipe\[s3\]'"):
        Store.open("s3://bucket/walk")
    with pytest.raises(MissingDriverError, match="gcsfs"):
        Store.open("gs://bucket/walk")


def test_two_pullers_and_two_readers_at_once(write_rollouts: WriteStore, web: Served, tmp_path: Path) -> None:
    folder = write_rollouts()
    code = """
import sys
from pathlib import Path
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull
store = Store.open(sys.argv[1])
for episode in range(6):
    store.read_episode(episode)
pull(sys.argv[1], Path(sys.argv[2]))
"""
    pulls = [
        subprocess.Popen([sys.executable, "-c", code, f"{web.url}/rollouts", str(tmp_path / name)])
        for name in ("a", "b")
    ]
    assert [process.wait() for process in pulls] == [0, 0]
    assert same_bytes(folder, tmp_path / "a")
    assert same_bytes(folder, tmp_path / "b")
    read = [path for path in web.requests if path.endswith("00000.parquet")]
    assert len(read) == 3  # one reader fetched it for both, each puller for itself
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    with locked(tmp_path / "b"), pytest.raises(StoreBusyError):
        pull(f"{web.url}/rollouts", tmp_path / "b")


def test_the_command_line_pushes_pulls_and_reads_urls(
    write_rollouts: WriteStore, bucket: str, tmp_path: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "pvrpipe"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    folder, url = write_rollouts(), f"{bucket}/walk"
    run("push", str(folder), url)
    pushed = run("push", str(folder), url, "--json")
    assert "nothing was pushed" in pushed.stderr
    assert set(json.loads(pushed.stdout)) == {
        "store", "url", "id", "kind", "files", "resumed", "bytes", "seconds", "licence",
    }  # fmt: skip
    assert json.loads(run("inspect", url, "--json").stdout)["store"] == url
    pulled = json.loads(run("pull", url, "--json").stdout)
    assert pulled["store"] == str(tmp_path / "data" / "rollouts" / "test-walk")
    assert same_bytes(folder, Workspace(tmp_path / "data").rollouts("test:walk"))
