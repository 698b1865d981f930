"""Stores are put together and taken apart: episodes keep their values, their split and how they were made."""

from __future__ import annotations

import filecmp
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.numpy

from pvrpipe.schemas.errors import CorruptStoreError, InvalidValueError, OutputExistsError
from pvrpipe.store.licences import strictest
from pvrpipe.store.merging import merge, split
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .embedded import write_embeddings
from .killing import run_killed
from .test_store_growing import grow
from .test_store_strangers import reseal


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_same_episode(store: Store, episode: int, source: Store, original: int) -> None:
    """All but the number of the episode is the same, bit for bit."""
    found, expected = store.read_episode(episode), source.read_episode(original)
    assert set(found.pop("episode")) == {episode}
    del expected["episode"]
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert found[name].tobytes() == rows.tobytes(), name
    known = [s.episodes.row(e, named=True) for s, e in ((store, episode), (source, original))]
    for place in ("episode", "shard", "row_start", "row_first"):
        assert known[0].pop(place) is not None
        del known[1][place]
    assert known[0] == known[1]


def test_a_merged_store_has_every_episode_and_says_how_each_was_made(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    a, b = write_rollouts(name="a"), write_rollouts((12, 20, 9), name="b", seed=7)
    result = merge([a, b], tmp_path / "m")
    merged, sources = Store.open(tmp_path / "m"), (Store.open(a), Store.open(b))
    assert verify(tmp_path / "m") == []
    assert (result.episodes, result.rows) == (9, sum(s.manifest.rows for s in sources))
    for number in range(9):
        source, original = (sources[0], number) if number < 6 else (sources[1], number - 6)
        assert_same_episode(merged, number, source, original)
    manifest = merged.manifest
    assert [p.specification.seed for p in manifest.all_parts] == [0, 7]
    assert [p.first_episode for p in manifest.all_parts] == [0, 6]
    assert [(t.store, t.first_episode, t.episodes) for t in manifest.taken] == [
        (sources[0].manifest.id, 0, 6),
        (sources[1].manifest.id, 0, 3),
    ]
    assert manifest.splits == "recorded"


def test_parts_survive_another_merge_and_a_split(tmp_path: Path, write_rollouts: WriteStore) -> None:
    a, b, c = (write_rollouts((12, 9), name=str(seed), seed=seed) for seed in (1, 2, 3))
    merge([a, b], tmp_path / "ab")
    merge([tmp_path / "ab", c], tmp_path / "abc")
    split(tmp_path / "abc", tmp_path / "s", where="episode in (1, 2, 5)")
    parts = Store.open(tmp_path / "s").manifest.all_parts
    assert [(p.first_episode, p.episodes, p.specification.seed) for p in parts] == [
        (0, 1, 1),
        (1, 1, 2),
        (2, 1, 3),
    ]
    assert verify(tmp_path / "s") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "first"}, "encoder.layer: last, there first"),
        ({"dtype": "float16"}, "dtype: float32, there float16"),
        ({"pooling": "cls"}, "encoder.pooling: mean, there cls"),
    ],
)
def test_embeddings_that_are_not_alike_are_refused(
    tmp_path: Path, shard_format: str, changes: Any, message: str
) -> None:
    a = write_embeddings(tmp_path / "a", shard_format=shard_format)
    b = write_embeddings(tmp_path / "b", seed=1, shard_format=shard_format, **changes)
    with pytest.raises(OutputExistsError, match=message):
        merge([a, b], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_kinds_columns_and_the_same_store_twice_are_refused(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    a = write_rollouts(name="a")
    for others, message in (
        ([], "give two stores or more"),
        ([a], "given twice"),
        ([write_embeddings(tmp_path / "e")], "kind: rollouts, there embeddings"),
        ([write_rollouts(name="b", size=10)], "size: 8, there 10"),
    ):
        with pytest.raises((InvalidValueError, OutputExistsError), match=message):
            merge([a, *others], tmp_path / "m")
    for overwrite in (False, True):
        with pytest.raises(InvalidValueError, match="is the store to read"):
            merge([a, write_rollouts((5, 6), name="c", seed=3)], a, overwrite=overwrite)
    assert verify(a) == []


def refused_as_shared(stores: list[Path], message: str) -> None:
    out = stores[0].parent / "shared"
    with pytest.raises(InvalidValueError, match=message) as refused:
        merge(stores, out)
    assert all(str(path) in str(refused.value) for path in stores[-2:])
    assert not out.exists()


def test_an_episode_that_two_stores_have_is_not_merged_twice(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    whole, other = write_rollouts(name="whole"), write_rollouts((20, 9), name="other", seed=40)
    split(whole, tmp_path / "half", where="episode < 3", rest=tmp_path / "rest")
    split(tmp_path / "half", tmp_path / "third", where="episode > 0")
    merge([other, tmp_path / "rest"], tmp_path / "m")
    refused_as_shared(
        [whole, tmp_path / "half"], r"half shares 3 of its 3 episodes \(0, 1, 2\).*leave it out"
    )
    refused_as_shared([tmp_path / "half", whole], r"whole shares 3 of its 6 episodes.*`pvrpipe split`")
    refused_as_shared([other, whole, tmp_path / "third"], "third shares 2 of its 2")
    refused_as_shared([whole, tmp_path / "m"], r"m shares 3 of its 5 episodes \(2, 3, 4\)")
    assert merge([tmp_path / "half", tmp_path / "rest"], tmp_path / "again").episodes == 6
    assert merge([tmp_path / "m", tmp_path / "third"], tmp_path / "more").episodes == 7


def test_a_merged_store_that_grows_still_says_where_its_episodes_came_from(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    merge([write_rollouts((9, 9), name="a"), write_rollouts((9,), name="b", seed=7)], tmp_path / "m")
    before = Store.open(tmp_path / "m").manifest
    grow(tmp_path / "m", (12, 15), seed=70)
    grow(tmp_path / "m", (8,), seed=90)
    now = Store.open(tmp_path / "m").manifest
    assert verify(tmp_path / "m") == []
    assert now.taken == before.taken
    assert [(p.first_episode, p.specification.seed) for p in now.all_parts] == [
        (0, 0),
        (2, 7),
        (3, 70),
        (5, 90),
    ]


def test_a_store_is_not_merged_with_its_earlier_revision(tmp_path: Path, write_rollouts: WriteStore) -> None:
    shutil.copytree(write_rollouts(name="now"), tmp_path / "before")
    grow(tmp_path / "now", (12, 15))
    refused_as_shared([tmp_path / "now", tmp_path / "before"], "before shares 6 of its 6 episodes")


def test_embeddings_of_a_store_and_of_its_split_are_not_merged(tmp_path: Path, shard_format: str) -> None:
    whole = write_embeddings(tmp_path / "whole", shard_format=shard_format)
    part = write_embeddings(tmp_path / "part", (30, 41), shard_format=shard_format, scale=1.001)
    refused_as_shared([whole, part], "part shares 2 of its 2 episodes")


def test_episodes_that_only_look_alike_are_merged(tmp_path: Path, write_rollouts: WriteStore) -> None:
    """Seed, policy, length and return say nothing of what others recorded: these may all be 0."""
    folders = [write_rollouts((9, 9), name=str(seed), seed=seed) for seed in (3, 4)]
    for folder in folders:
        retold(folder, {"seed": 0, "episode_return": 0.0, "terminated": False})
    assert merge(folders, tmp_path / "m").episodes == 4


def retold(folder: Path, told: dict[str, Any]) -> None:
    """The same rows, of which the episode table says something else."""
    table = pl.read_parquet(folder / "episodes.parquet")
    table.with_columns(pl.lit(v, table.schema[k]).alias(k) for k, v in told.items()).write_parquet(
        folder / "episodes.parquet"
    )
    reseal(folder, "episodes.parquet")


def test_a_merge_keeps_the_strictest_licence_in_every_part(tmp_path: Path, shard_format: str) -> None:
    a = write_embeddings(tmp_path / "a", shard_format=shard_format)
    b = write_embeddings(tmp_path / "b", seed=1, shard_format=shard_format, licence="CC-BY-NC-4.0")
    assert merge([a, b], tmp_path / "m").licence == "CC-BY-NC-4.0"
    manifest = Store.open(tmp_path / "m").manifest
    assert {p.specification.encoder.weights.licence for p in manifest.all_parts} == {"CC-BY-NC-4.0"}
    assert "CC-BY-NC-4.0" in (tmp_path / "m" / "README.md").read_text()
    assert verify(tmp_path / "m") == []


def test_of_licences_nobody_knows_none_is_dropped() -> None:
    assert strictest(["MIT", "Apache-2.0"]) == "Apache-2.0"
    assert strictest(["MIT", "ours", "CC-BY-NC-4.0"]) == "ours"
    assert strictest(["theirs", "ours"]) == "ours AND theirs"


def golden(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "golden.safetensors")


def test_golden_frames_go_along_with_their_rows_while_these_are_there(
    tmp_path: Path, shard_format: str
) -> None:
    a = write_embeddings(tmp_path / "a", shard_format=shard_format)
    merge([a, write_embeddings(tmp_path / "b", seed=1, shard_format=shard_format)], tmp_path / "m")
    merged, found = Store.open(tmp_path / "m"), golden(tmp_path / "m")
    np.testing.assert_array_equal(found["frame"], golden(a)["frame"])
    np.testing.assert_array_equal(merged.read_episode(0)["embedding"][found["row"]], found["embedding"])

    split(tmp_path / "m", tmp_path / "without", where="episode > 1")
    assert golden(tmp_path / "without").keys() == {"frame", "embedding"}
    split(tmp_path / "m", tmp_path / "with", where="episode != 1")
    assert golden(tmp_path / "with")["row"].tolist() == [0, 3, 7]


def test_golden_frames_that_are_not_the_stores_are_found(tmp_path: Path, shard_format: str) -> None:
    store = write_embeddings(tmp_path / "a", shard_format=shard_format)
    good = golden(store)
    for damage, says in (
        ({"embedding": good["embedding"][::-1].copy()}, "does not hold the embedding of row"),
        ({"row": good["row"] + 10**6}, "which the store does not have"),
        ({"frame": good["frame"].astype(np.float32)}, "does not hold frames and embeddings"),
    ):
        safetensors.numpy.save_file({**good, **damage}, store / "golden.safetensors")
        reseal(store, "golden.safetensors")
        failures = verify(store)
        assert says in failures[0].what
        assert "golden.safetensors" in failures[0].where


def test_split_takes_what_fulfils_the_condition_and_the_rest(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    source = Store.open(write_rollouts())
    good = source.episodes.filter(pl.col("length") >= 30)["episode"].to_list()
    made = split(source.path, tmp_path / "good", where="length >= 30", rest=tmp_path / "bad")
    assert [m.episodes for m in made] == [len(good), 6 - len(good)]
    for folder, numbers in (("good", good), ("bad", [e for e in range(6) if e not in good])):
        store = Store.open(tmp_path / folder)
        assert verify(tmp_path / folder) == []
        for number, original in enumerate(numbers):
            assert_same_episode(store, number, source, original)
    expression = split(source.path, tmp_path / "expression", where=pl.col("length") >= 30)
    assert expression[0].id == made[0].id
    train = split(source.path, tmp_path / "train", of="train")
    assert set(Store.open(train[0].store).episodes["split"]) == {"train"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "which episodes"),
        ({"where": "length > 1000"}, "no episode would be left"),
        ({"where": "nonsense > 1"}, "it has episode"),
    ],
)
def test_split_refuses_what_makes_no_store(
    tmp_path: Path, write_rollouts: WriteStore, arguments: Any, message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        split(write_rollouts(), tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_another_choice_of_as_many_episodes_is_not_taken_for_the_same(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    source = write_rollouts((20,) * 6)
    first = split(source, tmp_path / "s", where="episode < 3")
    assert split(source, tmp_path / "s", where="episode < 3")[0].resumed_shards == 3
    with pytest.raises(OutputExistsError, match="taken"):
        split(source, tmp_path / "s", where="episode >= 3")
    other = split(source, tmp_path / "s", where="episode >= 3", overwrite=True)
    assert other[0].id != first[0].id
    assert verify(tmp_path / "s") == []


def test_a_damaged_shard_is_not_given_a_new_hash(tmp_path: Path, write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    shard = folder / Store.open(folder).manifest.shards[2].file
    bad = bytearray(shard.read_bytes())
    bad[len(bad) // 2] ^= 1
    shard.write_bytes(bad)
    with pytest.raises(CorruptStoreError, match=shard.name):
        split(folder, tmp_path / "s", where="episode >= 0")


def merge_two(a: Path, b: Path, out: Path) -> None:
    merge([a, b], out)


def test_a_merge_killed_at_every_write_ends_with_the_same_bytes(tmp_path: Path, shard_format: str) -> None:
    a = write_embeddings(tmp_path / "a", (9, 7), shard_format=shard_format)
    b = write_embeddings(tmp_path / "b", (8,), seed=1, shard_format=shard_format)
    merge_two(a, b, tmp_path / "whole")
    names = sorted(str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*.*"))
    for stop in itertools.count(1):
        folder = tmp_path / f"killed-{stop}"
        killed = run_killed(merge_two, a, b, folder, stop=stop)
        if killed:
            merge_two(a, b, folder)
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == names
        assert filecmp.cmpfiles(tmp_path / "whole", folder, names, shallow=False)[0] == names, stop
        if not killed:
            break
    assert stop > 30
