"""The commands merge, split, convert, card and inspect --picture, as a script meets them."""

from __future__ import annotations

from pathlib import Path

from .commands import run
from .conftest import WriteStore
from .embedded import write_embeddings
from .test_cli import last_json

REWRITTEN = {
    "store",
    "id",
    "kind",
    "format",
    "episodes",
    "rows",
    "shards",
    "resumed_shards",
    "bytes",
    "licence",
}


def test_the_commands_that_make_stores_of_stores(write_rollouts: WriteStore, tmp_path: Path) -> None:
    write_rollouts((20, 30), name="a")
    write_rollouts((12,), name="b", seed=7)
    merged = last_json(run("merge", "a", "b", "m", "--json", cwd=tmp_path))
    assert set(merged) >= REWRITTEN
    assert (merged["episodes"], merged["rows"]) == (3, 65)
    again = last_json(run("merge", "a", "b", "m", "--json", cwd=tmp_path))
    assert (again["id"], again["resumed_shards"]) == (merged["id"], 3)
    options = ("--where", "length > 15", "--rest", "short", "--json")
    first, second = last_json(run("split", "m", "long", *options, cwd=tmp_path))["stores"]
    assert (first["episodes"], second["episodes"]) == (2, 1)
    converted = last_json(run("convert", "m", "w", "--to", "webdataset", "--json", cwd=tmp_path))
    assert (converted["format"], converted["rows"]) == ("webdataset", 65)
    exported = last_json(run("convert", "m", "m.h5", "--to", "hdf5", "--json", cwd=tmp_path))
    assert exported["bytes"] == (tmp_path / "m.h5").stat().st_size
    for store in ("m", "long", "short", "w"):
        assert last_json(run("verify", store, "--json", cwd=tmp_path))["ok"]


def test_card_and_picture(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e")
    done = last_json(
        run("card", "e", "--creator", "Lab", "--url", "https://lab.example/e", "--json", cwd=tmp_path)
    )
    assert (done["licence"], done["croissant"]) == ("MIT", str(tmp_path / "e" / "croissant.json"))
    assert "https://lab.example/e/shards/00000.parquet" in (tmp_path / "e" / "croissant.json").read_text()
    shown = run("inspect", "e", "--picture", "e.png", "--json", cwd=tmp_path)
    assert last_json(shown)["rows"] == 193
    assert "\nencoder      toy: " in run("inspect", "e", cwd=tmp_path).stdout
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(write_rollouts: WriteStore, tmp_path: Path) -> None:
    write_rollouts((20, 30), name="a")
    write_rollouts((20, 30), name="other", size=10)
    for arguments, message in (
        (("merge", "a", "m"), "give two stores or more"),
        (("merge", "a", "other", "m"), "size: 8, there 10"),
        (("split", "a", "s"), "--where"),
        (("split", "a", "s", "--where", "bogus > 1"), "does not fit the episode table"),
        (("split", "a", "a", "--where", "length > 1", "--overwrite"), "is the store to read"),
        (("convert", "a", "c", "--dtype", "float16"), "leave --dtype out"),
        (("convert", "a", "other", "--to", "npy"), "other exists"),
        (("card", "nowhere"), "holds no store"),
        (("inspect", "a", "--picture", "a.svg"), "ends with .png"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 1, (arguments, done.stderr)
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert message in line, line
