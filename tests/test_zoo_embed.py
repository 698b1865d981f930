"""Every representation goes through the whole stage on Ray, and fabricated checkpoints come out as they should."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .upstream import EMBEDDED, ON_RAY

KINDS = ("vit", "cnn", "language", "dinov3")
TOGETHER = 600e6  # parameters of the encoders of one pass; the largest, of 1.1e9, go alone
PIECES = 8  # of the zoo, so that `-k` can choose


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(PVRS[name], 0).parameters())


def passes(names: Sequence[str]) -> list[list[str]]:
    """Representations in passes of several encoders, as many as fit."""
    sizes = {name: parameters(name) for name in names}
    made: list[list[str]] = [[]]
    for name in sorted(names, key=sizes.__getitem__):
        if made[-1] and sum(sizes[n] for n in made[-1]) + sizes[name] > TOGETHER:
            made.append([])
        made[-1].append(name)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(PIECES))
def test_every_representation_is_embedded_on_ray(
    piece: int, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts = write_rollouts((2,), size=48)
    for names in passes(list(PVRS)[piece::PIECES]):
        outputs = [(EncoderRequest(n, "random:0", device="cpu", batch=3), tmp_path / n) for n in names]
        results = embed(rollouts, outputs, EmbedConfig(engine="ray", workers=1))
        assert [result.pvr for result in results] == names
        for result in results:
            assert verify(result.store) == []
            values = Store.open(result.store).read_episode(0)["embedding"]
            assert values.shape == (3, *result.shape)
            assert np.isfinite(values).all()
            assert result.random_weights


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_fabricated_checkpoint_of_every_representation_is_embedded_on_ray(tmp_path: Path) -> None:
    """The zoo's comparisons with independent implementations, once more with embeddings that went through the stage."""
    compared = [str(Path(__file__).with_name(f"test_zoo_{kind}.py")) for kind in KINDS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", *compared],
        env={**os.environ, ON_RAY: str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0
    assert {path.stem for path in tmp_path.glob(f"*{EMBEDDED}")} == set(PVRS)
