"""Two labs that share nothing but a bucket: every number that passes between them is checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.golden import check_golden
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.errors import CorruptStoreError, NotAStoreError
from pvrpipe.store.cache import Cache
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.training import TrainConfig, train

ROLLOUTS = CollectConfig(size=32, episodes=5, max_steps=12, policy="random")
ENCODER = EncoderRequest("resnet18", "random:0", batch=16)


def collected(lab: Path, episodes: int, seed: int = 0, append: bool = False) -> Path:
    config = CollectConfig(**{**vars(ROLLOUTS), "episodes": episodes, "seed": seed})
    return Path(collect(config, lab / "rollouts", Engine("inline"), append=append).store)


def embedded(lab: Path, append: bool = False) -> Path:
    config = EmbedConfig(engine="inline", append=append)
    return embed(lab / "rollouts", [(ENCODER, lab / "embeddings")], config)[0].store


def digest(store: Store) -> str:
    """Of everything that a training run would read."""
    sampler = WindowSampler(store, store.columns, batch=4, length=6, seed=0, split=None)
    found = hashlib.sha256()
    for k in range(6):
        for name, rows in sorted(sampler.batch(k).items()):
            found.update(name.encode() + np.ascontiguousarray(rows).tobytes())
    return found.hexdigest()


def test_two_labs(tmp_path: Path, bucket: str) -> None:
    a, b = tmp_path / "a", tmp_path / "b"

    collected(a, 5)  # lab A collects, embeds and publishes
    ours = Store.open(embedded(a))
    for kind in ("rollouts", "embeddings"):
        push(a / kind, f"{bucket}/{kind}")
    seen = digest(ours)

    for kind in (
        "rollouts",
        "embeddings",
    ):  # lab B fetches, checks the numbers with its own weights, and trains
        assert pull(f"{bucket}/{kind}", b / kind).id == Store.open(a / kind).manifest.id
        assert verify(b / kind) == []
    assert check_golden(Store.open(b / "embeddings")).ok
    config = TrainConfig(model="tdmpc2", updates=3, batch=4, length=3, log_every=1, save_every=3)
    train(config, b / "embeddings", b / "run")
    assert probe(b / "run", horizons=(5,))

    collected(b, 8, seed=7, append=True)  # B adds its own episodes, and publishes a new revision
    theirs = Store.open(embedded(b, append=True))
    assert (theirs.manifest.revision, theirs.manifest.episodes) == (2, 8)
    for kind in ("rollouts", "embeddings"):
        push(b / kind, f"{bucket}/{kind}")

    pinned = Store.open(f"{bucket}/embeddings", revision=1, cache=Cache(a / "cache", 1 << 30))
    assert pinned.manifest.id == ours.manifest.id  # A's reader sees what it published
    assert digest(pinned) == digest(Store.open(a / "embeddings")) == seen
    newest = pull(f"{bucket}/embeddings", a / "embeddings")
    assert newest.id == theirs.manifest.id
    assert digest(Store.open(a / "embeddings", revision=1)) == seen

    forged = f"{bucket}/embeddings/{theirs.manifest.shards[6].file}"  # someone else writes into the bucket
    driver, path = fsspec.core.url_to_fs(forged, use_listings_cache=False)
    bad = bytearray(driver.cat_file(path))
    bad[len(bad) // 2] ^= 1
    driver.pipe_file(path, bytes(bad))
    for lab in (a, b):
        with pytest.raises(CorruptStoreError, match="sha256"):
            digest(Store.open(f"{bucket}/embeddings", cache=Cache(lab / "fresh", 1 << 30)))
        with pytest.raises(CorruptStoreError, match="sha256"):
            pull(f"{bucket}/embeddings", lab / "again")
        with pytest.raises(NotAStoreError):
            Store.open(lab / "again")
