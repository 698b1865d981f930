"""Cards: the Hub's metadata and Croissant say what the store holds, and Croissant's own reader agrees."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pytest
import yaml

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.files import sha256_of
from pvrpipe.store.publishing import write_cards
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .embedded import D, write_embeddings
from .test_store_growing import grow


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hub_metadata(folder: Path) -> dict[str, Any]:
    before, metadata, rest = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    assert rest.startswith("# ")
    return yaml.safe_load(metadata)


def test_every_store_is_born_with_metadata_for_the_hub(tmp_path: Path, shard_format: str) -> None:
    folder = write_embeddings(tmp_path / "e", shard_format=shard_format, licence="CC-BY-NC-4.0")
    told = hub_metadata(folder)
    assert told["license"] == "cc-by-nc-4.0"
    assert {"pvrpipe", "embeddings", "toy"} <= set(told["tags"])
    assert told["size_categories"] == ["n<1K"]
    for config in told["configs"]:
        for files in config["data_files"]:
            assert list(folder.glob(files["path"])), files


def test_licences_the_hub_does_not_know_and_rollouts_without_one(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    told = hub_metadata(write_embeddings(tmp_path / "e", licence="for friends only"))
    assert (told["license"], told["license_name"]) == ("other", "for friends only")
    assert "license" not in hub_metadata(write_rollouts())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"url": "not a url"}, "--url 'not a url' is no URL"),
        ({"url": "lab/walk"}, "is no URL"),
        ({"url": "https://"}, "is no URL"),
        ({"url": "https://lab.org/a b"}, "is no URL"),
        ({"creator": "Our\nLab"}, r"--creator 'Our\\nLab' is no name; give one line"),
        ({"creator": " "}, "is no name"),
    ],
)
def test_what_is_no_url_or_name_is_on_no_card(
    told: dict[str, str], says: str, write_rollouts: WriteStore
) -> None:
    folder = write_rollouts()
    before = (folder / "README.md").read_bytes()
    with pytest.raises(InvalidValueError, match=says):
        write_cards(folder, **told)
    assert (folder / "README.md").read_bytes() == before
    assert not (folder / "croissant.json").exists()
    for url in ("https://lab.org/walk", "s3://lab", "hf://datasets/lab/walk"):
        assert json.loads(write_cards(folder, url=url).croissant.read_text())["url"] == url


def test_croissant_holds_every_shard_with_its_hash_and_loads(tmp_path: Path, shard_format: str) -> None:
    folder = write_embeddings(tmp_path / "e", shard_format=shard_format)
    written = write_cards(folder, creator="Some Lab", published=date(2026, 1, 2))
    assert verify(folder) == []
    told = json.loads(written.croissant.read_text())
    assert told["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    files = {f["@id"]: f for f in told["distribution"] if f["@type"] == "cr:FileObject"}
    manifest = Store.open(folder).manifest
    assert {s.file for s in manifest.shards} | {"store.json", "episodes.parquet"} <= files.keys()
    for name, file in files.items():
        assert file["sha256"] == sha256_of(folder / name)
        assert file["contentSize"] == f"{(folder / name).stat().st_size} B"
    fields = {f["name"]: f for r in told["recordSet"] if r["@id"] != "episodes" for f in r["field"]}
    assert set(fields) == set(Store.open(folder).columns)
    shape = {"parquet": f"float32 [{D}], little", "webdataset": f"float32 ['rows', {D}], an .npy"}
    assert fields["embedding"]["description"].startswith(shape[shard_format])

    dataset = mlcroissant.Dataset(jsonld=written.croissant)
    assert dataset.metadata.ctx.issues.errors == set()
    assert dataset.metadata.ctx.issues.warnings == set()
    records = list(dataset.records("episodes"))
    assert [r["episodes/length"] for r in records] == Store.open(folder).episodes["length"].to_list()


def test_mlcroissant_reads_the_rows_of_a_parquet_store(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", (9, 6))
    dataset = mlcroissant.Dataset(jsonld=write_cards(folder).croissant)
    rows, store = list(dataset.records("rows")), Store.open(folder)
    assert len(rows) == store.manifest.rows
    found = np.frombuffer(rows[12]["rows/embedding"], "<f4")
    np.testing.assert_array_equal(found, store.read_episode(1)["embedding"][2])


def test_cards_are_published_and_a_store_that_grows_drops_the_old_one(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    folder = write_rollouts()
    write_cards(folder)
    push(folder, str(tmp_path / "there"))
    pull(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back" / "croissant.json").read_bytes() == (folder / "croissant.json").read_bytes()
    grow(folder, (12,))
    assert not (folder / "croissant.json").exists()
    assert verify(folder) == []


def test_a_card_is_written_on_this_machine_only() -> None:
    with pytest.raises(InvalidValueError, match=r"//.* is a URL"):
        write_cards(Path("s3://bucket/store"))
