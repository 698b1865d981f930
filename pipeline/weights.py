"""Weights: found, read without executing anything, renamed, and loaded strictly.

A missing, extra or misshapen tensor is an error. What was loaded is counted and hashed, so that the
manifest says which tensors computed an embedding, whatever the file was called.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pvrpipe.pipeline.pvrs import KeyMap, Pvr
from pvrpipe.schemas.errors import WeightsError, one_line
from pvrpipe.schemas.manifest import WeightsIdentity
from pvrpipe.store.files import sha256_of

HUB_GRID, INTERPOLATION_OFFSET = 37, 0.1  # DINOv2 was trained at 518 px; "historical kludge" of its hub


@dataclass(frozen=True)
class Random:
    """Weights that nobody trained, by asking for them: ``random:SEED``."""

    seed: int


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint on disk; ``published`` where it is the one that the specification pins."""

    path: Path
    published: bool


def find_weights(pvr: Pvr, weights: str, asked: str) -> Random | WeightsFile:
    """The weights that ``--weights`` means.

    Args:
        pvr: the representation.
        weights: ``auto``, ``random:SEED``, or the path of a file or of a folder that holds it.
        asked: the name or path by which the representation was asked for.

    Raises:
        WeightsError: they cannot be had; the message names ``--weights``.
    """
    if weights.startswith("random"):
        seed = weights.removeprefix("random").removeprefix(":")
        if not seed.isdecimal():
            raise WeightsError(f"--weights {weights}: write random:SEED with a whole number, e.g. random:0")
        return Random(int(seed))
    own = pvr.source.repo is None and pvr.source.url is None
    if weights == "auto" and not own:
        return WeightsFile(_published(pvr), published=True)
    path = Path(asked) if weights == "auto" else Path(weights)
    file = path / pvr.source.file if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(
            f"there is no file {file}; give the weights of {pvr.name} with --weights FILE_OR_FOLDER"
        )
    return WeightsFile(file, published=False)


def _published(pvr: Pvr) -> Path:
    """The pinned file, from a cache or downloaded into it."""
    try:
        return _from_hub(pvr) if pvr.source.repo else _from_url(pvr)
    except OSError as error:
        origin = pvr.source.repo or pvr.source.url
        raise WeightsError(
            f"the weights of {pvr.name} are not cached and {origin} cannot be reached; "
            "give them with --weights FILE_OR_FOLDER, or try the pipeline with --weights random:0"
        ) from error


def _from_hub(pvr: Pvr) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repo, revision = pvr.source.repo or "", pvr.source.revision
    cached = try_to_load_from_cache(repo, pvr.source.file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    _reach(constants.ENDPOINT)
    return Path(hf_hub_download(repo, pvr.source.file, revision=revision))


def _reach(address: str) -> None:
    """Fail in seconds where there is no network, instead of after a minute of retries."""
    url = urllib.parse.urlsplit(address)
    if not urllib.request.getproxies():
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()


def _from_url(pvr: Pvr) -> Path:
    cache = Path(os.environ.get("PVRPIPE_CACHE", Path.home() / ".cache" / "pvrpipe")) / "weights"
    target = cache / pvr.name / pvr.source.file
    if not target.is_file():
        _reach(pvr.source.url or "")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(pvr.source.url or "", str(target), progress=False)
    return target


def read_tensors(path: Path) -> dict[str, object]:
    """A checkpoint's content; a pickle is read with ``weights_only``, so nothing in it can run.

    Raises:
        WeightsError: it is neither safetensors nor a checkpoint of plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
    ) as error:
        raise WeightsError(
            f"{path} cannot be read as weights ({one_line(error)[:120]}); get the file again"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors; give a state dict")
    return content


def rename(content: dict[str, object], keys: KeyMap) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names."""
    inner = content.get(keys.under) if keys.under else None
    tensors: dict[str, Tensor] = {}
    for name, value in (inner if isinstance(inner, dict) else content).items():
        if any(re.search(pattern, name) for pattern in keys.drop):
            continue
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"the checkpoint's entry '{name}' is a {type(value).__name__}, not a tensor; give a state dict"
            )
        for pattern, replacement in keys.rename:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    return _join_qkv(tensors)


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(tensors)
    for name in tensors:
        if ".attn.q." in name:
            parts = [name.replace(".attn.q.", f".attn.{p}.") for p in "qkv"]
            if all(part in joined for part in parts):
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                    [joined.pop(part) for part in parts]
                )
    return joined


def resample_positions(positions: Tensor, tokens: int) -> Tensor:
    """DINOv2's position embeddings (1, 1 + 37², D) on a smaller grid (1, tokens, D), as its hub does.

    Bicubic by a scale of (side + 0.1) / 37, without antialiasing: facebookresearch/dinov2, hub/backbones.py
    (``interpolate_offset=0.1``). timm and transformers differ from this, and from each other.
    """
    side = round((tokens - 1) ** 0.5)
    old = round((positions.shape[1] - 1) ** 0.5)
    if positions.shape[1] == tokens:
        return positions
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + INTERPOLATION_OFFSET) / old
    grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def load_strictly(network: nn.Module, tensors: dict[str, Tensor], where: str) -> int:
    """Load exactly the network's tensors; how many they were.

    Raises:
        WeightsError: a tensor is missing, left over, or of another shape; the message names it.
    """
    wanted = network.state_dict()
    fitted = {name: _with_axes_of_one(value, wanted.get(name)) for name, value in tensors.items()}
    problems = {
        "missing": sorted(wanted.keys() - fitted.keys()),
        "unexpected": sorted(fitted.keys() - wanted.keys()),
        "of another shape": sorted(
            n for n in wanted.keys() & fitted.keys() if wanted[n].shape != fitted[n].shape
        ),
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"{where} does not fit: of {len(wanted)} tensors expected, {'; '.join(found)}; "
            "give the checkpoint of this very encoder with --weights"
        )
    network.load_state_dict(fitted, strict=True)
    return len(fitted)


def _with_axes_of_one(value: Tensor, target: Tensor | None) -> Tensor:
    """Add leading axes of one: a class token may be stored as (D,) and wanted as (1, 1, D)."""
    if target is not None and target.shape == (1,) * (target.dim() - value.dim()) + value.shape:
        return value.reshape(target.shape)
    return value


def tensors_sha256(network: nn.Module) -> str:
    """Sha256 over name, dtype, shape and bytes of every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(network: nn.Module, pvr: Pvr, weights: Random | WeightsFile) -> WeightsIdentity:
    """Fill a freshly built network and say with what; random weights are those it was built with."""
    expected = len(network.state_dict())
    if isinstance(weights, Random):
        return WeightsIdentity(
            source=f"random:{weights.seed}",
            revision=None,
            file=None,
            file_sha256=None,
            tensors_sha256=tensors_sha256(network),
            loaded=0,
            expected=expected,
            random_seed=weights.seed,
            licence="none",
        )
    digest = sha256_of(weights.path)
    if weights.published and pvr.source.sha256 not in (None, digest):
        raise WeightsError(
            f"{weights.path} has sha256 {digest[:12]}…, but {pvr.name} is pinned to "
            f"{str(pvr.source.sha256)[:12]}…; remove the file and run again"
        )
    tensors = rename(read_tensors(weights.path), pvr.keys)
    if pvr.positions == "dinov2-hub" and "pos_embed" in tensors:
        tokens = network.state_dict()["pos_embed"].shape[1]
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"], tokens)
    loaded = load_strictly(network, tensors, str(weights.path))
    return WeightsIdentity(
        source=str(pvr.source.repo or pvr.source.url) if weights.published else "file",
        revision=pvr.source.revision if weights.published else None,
        file=weights.path.name,
        file_sha256=digest,
        tensors_sha256=tensors_sha256(network),
        loaded=loaded,
        expected=expected,
        random_seed=None,
        licence=pvr.licence,
    )
