"""What others have altered behind a URL is refused by whoever meets it."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from pvrpipe.schemas.errors import (
    CorruptStoreError,
)
from pvrpipe.store.layout import files_of, read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .serving import copy_to, forge

pytestmark = pytest.mark.usefixtures("cache")


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
            (folder / name).write_bytes(data.replace(b'"rows":42', b'"rows":43'))
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
