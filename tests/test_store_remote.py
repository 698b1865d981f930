"""Stores behind URLs, against real servers on loopback: read, pushed, killed, pulled, forged."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    InvalidValueError,
    MissingDriverError,
    NotAStoreError,
    OutputExistsError,
    StoreBusyError,
    StoreError,
    UnfinishedStoreError,
    UnknownNameError,
    UnreachableError,
)
from pvrpipe.store.cache import Cache
from pvrpipe.store.describing import describe
from pvrpipe.store.files import locked
from pvrpipe.store.layout import PULLING, files_of, read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler
from pvrpipe.store.workspace import Workspace

from .conftest import WriteStore
from .test_store import same_bytes
from .test_store_growing import grow

COLUMNS = ("frame", "action", "reward", "is_first")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("PVRPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass(frozen=True)
class Served:
    url: str
    requests: list[str]
    fails: dict[str, str]  # path → how its next request fails


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with range requests, as nginx serves them."""

    def __init__(self, *args: object, seen: list[str], fails: dict[str, str], **kwargs: object) -> None:
        self.seen, self.fails = seen, fails
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.seen.append(self.path)
        how = self.fails.pop(self.path, "")
        if how == "busy":
            return self.send_error(503)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not path.is_file() or not (asked or how):
            return super().do_GET()
        data = path.read_bytes()
        if how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        assert asked
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Served]:
    """A real HTTP server over the test's folder."""
    seen: list[str] = []
    fails: dict[str, str] = {}
    handler = functools.partial(Handler, directory=str(tmp_path), seen=seen, fails=fails)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Served(f"http://127.0.0.1:{server.server_port}", seen, fails)
        server.shutdown()


def forge(driver: fsspec.AbstractFileSystem, path: str) -> None:
    data = bytearray(driver.cat_file(path))
    data[len(data) // 2] ^= 1
    driver.pipe_file(path, bytes(data))


def drawn(store: Store) -> list[dict[str, np.ndarray]]:
    sampler = WindowSampler(store, COLUMNS, batch=6, length=8, seed=3, split="train")
    return [sampler.batch(k) for k in range(4)]


def copy_to(source: Path, url: str) -> None:
    driver, root = fsspec.core.url_to_fs(url)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        driver.pipe_file(f"{root}/{path.relative_to(source)}", path.read_bytes())


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


def test_a_bounded_cache_evicts_and_what_is_open_stays_readable(
    write_rollouts: WriteStore, web: Served, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = write_rollouts()
    limit = 2.5 * Store.open(folder).manifest.bytes / 6 + 20_000
    monkeypatch.setenv("PVRPIPE_CACHE_GB", str(limit / 1e9))
    local, remote = Store.open(folder), Store.open(f"{web.url}/rollouts")
    for _ in range(2):
        for episode in range(6):
            for name, array in remote.read_episode(episode).items():
                np.testing.assert_array_equal(array, local.read_episode(episode)[name])
            held = [p for p in cache.rglob("*") if p.is_file()]
            assert sum(p.stat().st_size for p in held) <= limit
    assert 1 <= len(list(cache.glob("*/shards/*.parquet"))) < 6


def test_eviction_takes_what_was_used_longest_ago_and_nothing_that_is_held(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250)
    shards = [cache.folder / "store" / "shards" / f"{i:05d}.parquet" for i in range(3)]
    shards[0].parent.mkdir(parents=True)
    for age, path in enumerate(shards):
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + age, 1000 + age))
    with cache.holding(shards[0]):
        cache.make_room(0)
    assert [p.exists() for p in shards] == [True, False, True]
    os.utime(shards[0])
    cache.make_room(100)
    assert [p.exists() for p in shards] == [True, False, False]


def test_a_size_that_a_manifest_only_claims_evicts_nothing(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    copy_to(folder, "memory://huge")
    manifest = read_manifest(folder)
    huge = manifest.shards[1].model_copy(update={"bytes": 1 << 52})
    manifest = manifest.model_copy(update={"shards": (manifest.shards[0], huge, *manifest.shards[2:])})
    fsspec.filesystem("memory").pipe_file("/huge/store.json", manifest.to_json().encode())
    store = Store.open("memory://huge")
    store.shard(0)
    with pytest.raises(StoreError, match="PVRPIPE_CACHE_GB"):
        store.shard(1)
    store.shard.cache_clear()
    fsspec.filesystem("memory").rm_file("/huge/shards/00000.parquet")
    assert store.shard(0)


@pytest.mark.parametrize("size", ["-1", "much", "nan"])
def test_a_size_of_the_cache_that_is_none(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVRPIPE_CACHE_GB", size)
    with pytest.raises(InvalidValueError, match="PVRPIPE_CACHE_GB"):
        Cache.from_environment()


@pytest.mark.parametrize("use", [Store.open, verify])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/pvrpipe", "~nobody-of-that-name/x"])
def test_a_cache_that_cannot_be_is_named(
    use: Any, where: str, tmp_path: Path, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to(write_rollouts(), "memory://cached")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PVRPIPE_CACHE", where if where[0] in "/~" else str(tmp_path / where))
    with pytest.raises((StoreError, InvalidValueError), match="PVRPIPE_CACHE"):
        use("memory://cached")


def test_a_disk_that_fills_while_a_shard_is_fetched(
    write_rollouts: WriteStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to(write_rollouts(), "memory://cached")
    store = Store.open("memory://cached")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as then:
        then.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"disk is full.*PVRPIPE_CACHE"):
            store.shard(0)
    assert list(cache.glob("*/shards/*")) == []
    assert store.shard(0)


VERIFY = """
import os, signal, sys
from pvrpipe.store.verifying import verify
verify(sys.argv[1], lambda done, total, note="": done == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_verify_that_was_killed_leaves_nothing_once_another_has_run(
    write_rollouts: WriteStore, web: Served, cache: Path
) -> None:
    write_rollouts()
    url = f"{web.url}/rollouts"
    killed = subprocess.run([sys.executable, "-c", VERIFY, url], check=False)
    assert killed.returncode == -9
    (left,) = cache.glob("verify-*")
    assert list(left.glob("*/shards/*.parquet"))
    with Cache(cache, 10**9).empty() as own:
        assert own.folder != left
        assert list(cache.glob("verify-*")) == [own.folder]
        assert verify(url) == []  # one that is in use stays
        assert list(cache.glob("verify-*")) == [own.folder]
    assert list(cache.glob("verify-*")) == []


@pytest.mark.parametrize("how", ["flipped", "longer", "missing"])
def test_a_forged_shard_is_refused_by_reader_verify_and_pull(
    how: str, write_rollouts: WriteStore, bucket: str, tmp_path: Path, cache: Path
) -> None:
    url = f"{bucket}/walk"
    push(write_rollouts(), url)
    driver, path = fsspec.core.url_to_fs(f"{url}/shards/00003.parquet", use_listings_cache=False)
    if how == "flipped":
        forge(driver, path)
    elif how == "longer":
        driver.pipe_file(path, driver.cat_file(path) + bytes(1 << 20))
    else:
        driver.rm_file(path)
    store = Store.open(url)
    assert store.shard(2)
    message = rf"{url}: shards/00003.parquet (has sha256|is larger|is missing)"
    with pytest.raises(CorruptStoreError, match=message):
        store.shard(3)
    assert not [p for p in cache.rglob("*00003*") if p.parent.name != "locks"]
    assert [failure.where for failure in verify(url)] == ["shards/00003.parquet"]
    with pytest.raises(CorruptStoreError, match=message):
        pull(url, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "store.json").exists()
    assert not (tmp_path / "pulled" / "shards" / "00003.parquet").exists()


def test_a_forged_episode_table_or_commit_record_is_refused(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    for name, cause in (("episodes.parquet", "has sha256"), ("shards/00001.json", "manifest says|no valid")):
        folder = write_rollouts(name=f"forged-{Path(name).stem}")
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            (folder / name).write_bytes(data.replace(b'"rows": 42', b'"rows": 43'))
        else:
            (folder / name).write_bytes(data[:-9] + b"x" + data[-8:])
            copy_to(folder, "memory://forged")
            with pytest.raises(CorruptStoreError, match=r"memory://forged: episodes\.parquet has"):
                Store.open("memory://forged")
        with pytest.raises(CorruptStoreError, match=cause):
            pull(str(folder), tmp_path / "pulled" / name)


def test_another_episode_in_a_commit_record_is_noticed(write_rollouts: WriteStore, tmp_path: Path) -> None:
    folder = write_rollouts()
    record = folder / "shards" / "00001.json"
    changed = json.loads(record.read_text())
    changed["episodes"][0]["episode_return"] += 1
    record.write_text(json.dumps(changed, sort_keys=True, indent=1))
    with pytest.raises(CorruptStoreError, match="does not list the episodes"):
        pull(str(folder), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "store.json").exists()


def test_a_manifest_with_a_true_id_and_false_content_does_not_reach_the_true_store(
    write_rollouts: WriteStore,
) -> None:
    folder = write_rollouts()
    copy_to(folder, "memory://true")
    copy_to(folder, "memory://false")
    manifest = read_manifest(folder).model_copy(update={"statistics": {}})
    fsspec.filesystem("memory").pipe_file("/false/store.json", manifest.to_json().encode())
    assert Store.open("memory://false").manifest.statistics == {}
    assert Store.open("memory://true").manifest == read_manifest(folder)
    forged = read_manifest(folder).model_copy(update={"id": "0" * 64})
    fsspec.filesystem("memory").pipe_file("/false/store.json", forged.to_json().encode())
    with pytest.raises(CorruptStoreError, match="the id does not follow"):
        Store.open("memory://false")


@pytest.mark.parametrize(
    "name",
    [
        "../../outside",
        "/etc/cron.d/x",
        "a/../../b",
        "..",
        ".",
        "",
        ".bashrc",
        "C:\\x",
        "a\\..\\b",
        "shards",
        "shards/00000.parquet",
        "STORE.JSON",
        "store.json/x",
        "pull.json",
        "a//b",
        "a\n",
        "a\0b",
        "a" * 300,
        "~/x",
        "http://evil/x",
    ],
)
def test_names_that_lead_out_of_the_store_are_never_joined(
    name: str, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    folder = write_rollouts((12, 12))
    manifest = read_manifest(folder)
    hostile = manifest.model_copy(update={"files": {**manifest.files, name: "0" * 64}})
    with pytest.raises(CorruptStoreError, match="no plain name"):
        files_of(hostile)
    (folder / "store.json").write_text(hostile.to_json())
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(CorruptStoreError, match="no plain name"):
        pull(str(folder), tmp_path / "pulled")
    assert sorted(p for p in tmp_path.rglob("*")) == before
    copy_to(folder, "memory://hostile")
    with pytest.raises(CorruptStoreError, match="no plain name"):
        Store.open("memory://hostile")


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
