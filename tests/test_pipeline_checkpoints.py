"""Checkpoints are read without running anything, converted once, and refused where they are not what is pinned."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from pvrpipe.pipeline import checkpoints, weights
from pvrpipe.pipeline.checkpoints import read_tensors, tensors_of
from pvrpipe.pipeline.pvrs import KeyMap, WeightsSource
from pvrpipe.pipeline.weights import WeightsFile, find_weights, load_strictly, load_weights
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import StoreError, WeightsError
from pvrpipe.store.files import sha256_of

from .killing import run_killed
from .upstream import noise

pytestmark = pytest.mark.usefixtures("cache")


def test_a_pickle_is_converted_once_and_again_if_the_copy_is_damaged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = noise(4, 4)
    state = {"encoder.a": shared, "encoder.b": shared.T, "decoder.c": noise(2), "epoch": 3}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    keys = KeyMap(under="model", drop=("^decoder", "^epoch$"), rename=(("^encoder[.]", ""),))
    reads: list[Path] = []
    monkeypatch.setattr(checkpoints, "read_tensors", lambda path: (reads.append(path), read_tensors(path))[1])
    digest = sha256_of(tmp_path / "w.pth")
    first = {name: tensor.clone() for name, tensor in tensors_of(tmp_path / "w.pth", digest, keys).items()}
    assert first.keys() == {"a", "b"}
    torch.testing.assert_close(first["b"], shared.T, rtol=0, atol=0)
    again = tensors_of(tmp_path / "w.pth", digest, keys)
    assert len(reads) == 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    (copy,) = (cache / "converted").glob("*.safetensors")
    assert digest in copy.name
    damaged = bytearray(copy.read_bytes())
    damaged[-1] ^= 1
    copy.write_bytes(damaged)
    torch.testing.assert_close(tensors_of(tmp_path / "w.pth", digest, keys), first, rtol=0, atol=0)
    assert len(reads) == 2
    tensors_of(tmp_path / "w.pth", digest, keys.model_copy(update={"drop": ("^decoder", "^epoch$", "b$")}))
    assert len(reads) == 3  # something else is taken from it


def test_a_conversion_killed_at_every_write_leaves_nothing_to_the_next_one(
    cache: Path, tmp_path: Path
) -> None:
    """Checkpoints are of gigabytes, and what nobody removes stays."""
    torch.save({"a": noise(64, 64)}, tmp_path / "w.pth")
    stop, left = 1, set[str]()
    while run_killed(_convert, tmp_path / "w.pth", stop=stop):
        left |= {path.name.split(".tmp-")[0][-7:] for path in (cache / "converted").glob("*.tmp-*")}
        assert _convert(tmp_path / "w.pth").keys() == {"a"}
        kept = sorted((cache / "converted").iterdir())
        assert [path.suffix for path in kept] == [".safetensors", ".sha256"]
        for path in kept:
            path.unlink()
        stop += 1
    assert left == {"tensors", ".sha256"}, "of both files a temporary was left"


def _convert(path: Path) -> dict[str, torch.Tensor]:
    return tensors_of(path, "0" * 64, KeyMap())


@pytest.mark.parametrize("refused", ["No space left on device (os error 28)", None])
def test_a_cache_that_cannot_take_a_conversion_is_named(
    refused: str | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": noise(2)}, tmp_path / "w.pth")
    if refused is None:
        cache.touch()
    else:

        def save_file(*_: object) -> None:
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: {refused}")

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(StoreError, match=r"(disk is full|in the way).*PVRPIPE_CACHE"):
        tensors_of(tmp_path / "w.pth", "0" * 64, KeyMap())


def test_what_is_no_tensor_is_refused_unless_it_is_dropped(tmp_path: Path) -> None:
    torch.save({"a": noise(2), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="'epoch' is a int"):
        tensors_of(tmp_path / "w.pth", "0" * 64, KeyMap())
    with pytest.raises(WeightsError, match=r"'epoch' is a int.* no 'ema'; give a state dict"):
        tensors_of(tmp_path / "w.pth", "0" * 64, KeyMap(under="ema"))
    torch.save([noise(2)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        read_tensors(tmp_path / "list.pth")
    torch.save({"model": {1: noise(2)}}, tmp_path / "numbers.pth")
    with pytest.raises(WeightsError, match="an entry called 1"):
        tensors_of(tmp_path / "numbers.pth", "1" * 64, KeyMap(under="model"))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"holds torch\.nn\.modules\.linear\.Linear, .* give a state dict"):
        read_tensors(tmp_path / "module.pth")


def test_no_tensor_takes_the_place_of_another(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a.w": noise(2), "b.w": noise(2)}, tmp_path / "w.safetensors")
    assert len(tensors_of(tmp_path / "w.safetensors", "0" * 64, KeyMap(rename=(("^a", "c"),)))) == 2
    with pytest.raises(WeightsError, match=r"two of .* 'b\.w'"):
        tensors_of(tmp_path / "w.safetensors", "0" * 64, KeyMap(rename=(("^a", "b"),)))


def test_whole_numbers_are_no_weights() -> None:
    network = torch.nn.BatchNorm1d(2)  # has a count, which is one
    state = network.state_dict()
    assert load_strictly(network, dict(state), "w") == len(state)
    assert load_strictly(network, {name: tensor.half() for name, tensor in state.items()}, "w") == len(state)
    with pytest.raises(WeightsError, match=r"1 of integers \(weight\)"):
        load_strictly(network, {**state, "weight": torch.ones(2, dtype=torch.int8)}, "w")


@pytest.mark.parametrize("pin", [{"sha256": "0" * 64}, {"md5": "8cad7c"}])
def test_a_published_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, pin: dict[str, str]) -> None:
    torch.save({"model": {}}, tmp_path / "w.pth")
    pvr = PVRS["resnet18"].model_copy(update={"source": WeightsSource(url="x", file="w.pth", **pin)})
    with pytest.raises(WeightsError, match=rf"has {next(iter(pin))} .* remove the file"):
        load_weights(torch.nn.Linear(1, 1), pvr, WeightsFile(tmp_path / "w.pth", published=True))


@pytest.mark.parametrize("pinned", ["f" * 40, None])
def test_the_commit_of_the_hubs_cache_is_recorded_where_none_is_pinned(
    tmp_path: Path, pinned: str | None
) -> None:
    """Also of a cache on a disk whose own name is that of a folder of the cache."""
    file = tmp_path / "snapshots" / "hub" / "snapshots" / ("a" * 40) / "vision" / "w.safetensors"
    file.parent.mkdir(parents=True)
    network = torch.nn.Linear(1, 1)
    safetensors.torch.save_file(network.state_dict(), file)
    source = WeightsSource(repo="a/b", revision=pinned, file="vision/w.safetensors")
    pvr = PVRS["resnet18"].model_copy(update={"source": source})
    assert load_weights(network, pvr, WeightsFile(file, published=True)).revision == (pinned or "a" * 40)
    assert load_weights(network, pvr, WeightsFile(file, published=False)).revision is None


def test_of_the_hub_it_is_the_pinned_revision_that_is_found_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may be cached, for whoever asked for it, and be what its authors have there now."""
    older, newer = "a" * 40, "b" * 40
    repository = tmp_path / "models--org--net"
    for commit in (older, newer):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "w.bin").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(newer)
    fetched: list[tuple[object, ...]] = []

    def fetch(repo: str, file: str, revision: str | None) -> str:
        fetched.append((repo, file, revision))
        return str(tmp_path / "w.bin")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(weights, "_reach", lambda _: None)

    def found(revision: str | None) -> Path:
        source = WeightsSource(repo="org/net", revision=revision, file="w.bin")
        made = find_weights(PVRS["resnet18"].model_copy(update={"source": source}), "auto", "mine")
        assert isinstance(made, WeightsFile)
        return made.path

    assert found(older) == repository / "snapshots" / older / "w.bin"
    assert found(None) == repository / "snapshots" / newer / "w.bin"
    assert not fetched
    assert found("c" * 40) == tmp_path / "w.bin"
    assert fetched == [("org/net", "w.bin", "c" * 40)]


def test_what_is_behind_a_form_says_so_and_works_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(weights, "_reach", unreachable)
    monkeypatch.setattr(weights, "cached_weights", lambda _: None)
    with pytest.raises(WeightsError, match=r"facebook/dinov3-vits16.* behind a form.*--weights"):
        find_weights(PVRS["dinov3-s"], "auto", "dinov3-s")
    safetensors.torch.save_file({"a": noise(1)}, tmp_path / "model.safetensors")
    found = find_weights(PVRS["dinov3-s"], str(tmp_path), "dinov3-s")
    assert found == WeightsFile(tmp_path / "model.safetensors", published=False, pinned=False)


def test_another_entry_of_a_pickle_is_another_conversion(tmp_path: Path) -> None:
    content = {"model": {"a": noise(2)}, "ema": {"a": noise(2) + 1}}
    torch.save(content, tmp_path / "w.pth")
    digest = sha256_of(tmp_path / "w.pth")
    for under, tensors in content.items():
        found = tensors_of(tmp_path / "w.pth", digest, KeyMap(under=under))
        torch.testing.assert_close(found, tensors, rtol=0, atol=0)


def test_a_transpose_of_nothing_is_refused(tmp_path: Path) -> None:
    """A square matrix fits either way, and its embeddings would be others."""
    square = noise(3, 3)
    safetensors.torch.save_file({"head.weight": square, "head.bias": noise(3)}, tmp_path / "w.safetensors")
    turned = tensors_of(tmp_path / "w.safetensors", "", KeyMap(transpose=(r"^head[.]",)))
    torch.testing.assert_close(turned["head.weight"], square.T, rtol=0, atol=0)
    for pattern in ("^proj$", "bias$"):
        with pytest.raises(
            WeightsError, match=r"transpose '.*', and the checkpoint has no matrix .* mend it"
        ):
            tensors_of(tmp_path / "w.safetensors", "", KeyMap(transpose=(r"^head[.]", pattern)))
