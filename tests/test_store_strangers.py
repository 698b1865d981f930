"""Stores of strangers: nothing is executed, nothing outside is touched, one typed error."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvrpipe.schemas.errors import CorruptStoreError, PvrpipeError, StoreError
from pvrpipe.schemas.manifest import store_id
from pvrpipe.store.files import sha256_of
from pvrpipe.store.publishing import write_cards
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore


def read_all(folder: Path) -> None:
    """Everything a training run reads."""
    store = Store.open(folder)
    sampler = WindowSampler(store, store.columns, batch=4, length=5, seed=0)
    for k in range(3):
        sampler.batch(k)
    for episode in store.episodes["episode"]:
        store.read_episode(episode)


def edit(folder: Path, change: Any) -> None:
    """Change the manifest, with an id that follows from it."""
    path = folder / "store.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def reseal(folder: Path, *names: str) -> None:
    """Forge hashes and sizes, so that only what a file says is left to be wrong."""

    def change(raw: dict[str, Any]) -> None:
        for name in names:
            path = folder / name
            if name in raw["files"]:
                raw["files"][name] = sha256_of(path)
            for entry in raw["shards"]:
                if entry["file"] == name:
                    entry |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}

    edit(folder, change)


def put(*keys: Any, value: Any) -> Any:
    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("columns", 0, "shape", value=[1 << 24] * 4),
        put("columns", 0, "shape", value=[0]),
        put("columns", 0, "shape", value=[-1]),
        put("columns", 0, "dtype", value="object"),
        put("columns", 0, "name", value="../../etc"),
        put("shards", 0, "file", value="../../../etc/passwd"),
        put("shards", 0, "file", value="/etc/passwd"),
        put("shards", 0, "file", value="shards/00000.pkl"),
        put("shards", 0, "rows", value=1 << 60),
        put("shards", 0, "rows", value=-5),
        put("shards", 0, "row_groups", value=[1 << 40]),
        put("shards", 0, "bytes", value=1),
        put("shards", value=[]),
        put("rows", value=10**30),
        put("episodes", value=10**9),
        put("files", value={}),
        put("specification", "kind", value="embeddings"),
        put("format_version", value=2),
        put("format_version", value="1; import os"),
        put("state", value="sealed?"),
        put("plan", value=[]),
        put("statistics", "reward", value={"count": 1, "mean": [0.0], "std": [1.0]}),
        put("surprise", value={"__reduce__": ["os.system", "true"]}),
    ],
)
def test_a_manifest_that_lies_is_one_typed_error(write_rollouts: WriteStore, change: Any) -> None:
    folder = write_rollouts()
    edit(folder, change)
    found: list[object] = []
    try:
        found += verify(folder)
        read_all(folder)
    except PvrpipeError as error:
        found.append(error)
    assert found


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "null", "", "\x00" * 100, '{"a":' * 5000 + "1"])
def test_deep_or_broken_json(write_rollouts: WriteStore, text: str) -> None:
    folder = write_rollouts()
    (folder / "store.json").write_text(text)
    with pytest.raises(StoreError):
        Store.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": pl.lit(99, pl.Int64)},
        {"shard": -pl.col("shard")},
        {"row_start": pl.col("row_start") + 1},
        {"rows": pl.col("rows") + 1_000_000},
        {"rows": -pl.col("rows")},
        {"length": pl.col("length") + 3},
        {"episode_return": pl.lit(np.nan)},
        {"episode": pl.col("episode").reverse()},
        {"split": pl.lit(1)},
        {"terminated": pl.lit(None, pl.Boolean)},
        {"stray": pl.lit("x")},
    ],
    ids=lambda change: next(iter(change)),  # an expression as text has its address
)
def test_an_episode_table_that_lies(write_rollouts: WriteStore, change: dict[str, pl.Expr]) -> None:
    folder = write_rollouts()
    table = pl.read_parquet(folder / "episodes.parquet").with_columns(**change)
    table.write_parquet(folder / "episodes.parquet")
    reseal(folder, "episodes.parquet")
    with pytest.raises(StoreError):
        Store.open(folder)


def tar_of(folder: Path, change: Any) -> None:
    """Rewrite the first tar member by member."""
    path = folder / "shards" / "00000.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in change(members):
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    reseal(folder, "shards/00000.tar")


def special(kind: bytes, name: str, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    return buffer.getvalue()


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def absurd_header() -> bytes:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 2), }"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def with_action(data: bytes) -> Any:
    return lambda members: [(i, data if i.name.endswith("action.npy") else d) for i, d in members]


@pytest.mark.parametrize(
    "change",
    [
        lambda members: [
            (special(tarfile.SYMTYPE, "000000000.action.npy", "/etc/passwd"), b""),
            *members[2:],
        ],
        lambda members: [(special(tarfile.LNKTYPE, "000000000.action.npy", "../../x"), b""), *members[2:]],
        lambda members: [*members, (special(tarfile.CHRTYPE, "dev"), b"")],
        lambda members: [*members, (special(tarfile.FIFOTYPE, "pipe"), b"")],
        lambda members: [*members, (tarfile.TarInfo("../../outside"), b"x")],
        lambda members: [*members, (tarfile.TarInfo("/tmp/outside"), b"x")],
        lambda members: [*members, members[0]],
        lambda members: members[1:],
        lambda members: [],
        with_action(pickled()),
        with_action(absurd_header()),
        with_action(b"\x93NUMPY\x03\x00" + b"\xff" * 200),
        with_action(npy_of(np.zeros((31, 2), np.float64))),
        with_action(npy_of(np.zeros((30, 2), np.float32))),
        with_action(npy_of(np.asfortranarray(np.ones((31, 2), np.float32)))),
    ],
)
def test_a_tar_that_lies(write_webdataset: Path, change: Any) -> None:
    tar_of(write_webdataset, change)
    before = set(write_webdataset.parent.rglob("*"))
    with contextlib.suppress(StoreError):  # a lost record of an episode hurts nobody who reads arrays
        read_all(write_webdataset)
    assert verify(write_webdataset)
    assert set(write_webdataset.parent.rglob("*")) == before


@pytest.fixture
def write_webdataset(write_rollouts: WriteStore) -> Path:
    return write_rollouts()


@pytest.fixture
def shard_format(request: pytest.FixtureRequest) -> str:
    return "webdataset" if "write_webdataset" in request.fixturenames else "parquet"


@pytest.mark.parametrize("shards", ["parquet", "webdataset"])
def test_a_thousand_flips_truncations_and_swaps_are_all_found(
    write_rollouts: WriteStore, shards: str
) -> None:
    folder = write_rollouts(shard_format=shards)
    random = np.random.default_rng(0)
    hashed = [entry.file for entry in Store.open(folder).manifest.shards]
    for _ in range(1000):
        name = hashed[random.integers(len(hashed))]
        path = folder / name
        good = path.read_bytes()
        kind = random.integers(3)
        if kind == 0:
            bad = bytearray(good)
            bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        elif kind == 1:
            bad = bytearray(good[: random.integers(len(good))])
        else:
            other = next(n for n in hashed if n != name)
            bad = bytearray((folder / other).read_bytes())
        path.write_bytes(bad)
        assert name in [failure.where for failure in verify(folder)]
        path.write_bytes(good)
    assert verify(folder) == []


@pytest.mark.parametrize(
    "name",
    ["README.md", "croissant.json", "store.json", "episodes.parquet", "shards", "shards/00001.parquet"],
)
def test_what_lies_behind_a_link_is_not_published(
    name: str, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    folder, outside = write_rollouts(), tmp_path / "outside"
    write_cards(folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    failures = verify(folder)
    assert [failure.where for failure in failures] == [name]
    assert "is a link" in failures[0].what
    with pytest.raises(CorruptStoreError, match=f"{name} is a link"):
        push(folder, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_a_card_that_is_a_link_is_not_pulled(write_rollouts: WriteStore, tmp_path: Path) -> None:
    folder = write_rollouts()
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    pull(str(folder), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "README.md").exists()
    assert verify(tmp_path / "pulled") == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a" * 5000, "a\0b"])
def test_verify_names_no_path_after_a_forged_name(name: str, write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    edit(folder, lambda raw: raw["files"].update({name: "0" * 64}))
    assert [(f.where, "no plain name" in f.what) for f in verify(folder)] == [("store.json", True)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_place_of_any_file(write_rollouts: WriteStore, data: st.DataObject) -> None:
    """Whatever lies where a store's file should, reading it ends well or in one typed error."""
    base = write_rollouts(name="base") if not hasattr(write_rollouts, "made") else write_rollouts.made
    write_rollouts.made = base  # type: ignore[attr-defined]
    folder = base.parent / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    names = ["store.json", "episodes.parquet", "shards/00000.parquet", "shards/00000.json"]
    name = data.draw(st.sampled_from(names))
    good = (folder / name).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, 64))
    bad = good[:at] + data.draw(st.binary(max_size=64)) + good[at + cut :]
    (folder / name).write_bytes(bad)
    if data.draw(st.booleans()) and name != "store.json":
        reseal(folder, name)
    try:
        verify(folder)
        read_all(folder)
    except PvrpipeError:
        pass


def test_ids_follow_from_content(write_rollouts: WriteStore) -> None:
    manifest = Store.open(write_rollouts()).manifest
    assert manifest.id == store_id(manifest.specification, [e.sha256 for e in manifest.shards])
