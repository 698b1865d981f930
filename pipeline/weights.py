"""Weights: found, fetched, and loaded strictly.

A missing, extra or misshapen tensor is an error. What was loaded is counted and hashed, so that the
manifest says which tensors computed an embedding, whatever the file was called.
"""

from __future__ import annotations

import hashlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pvrpipe.pipeline.cached import cached_weights, download_target
from pvrpipe.pipeline.checkpoints import tensors_of
from pvrpipe.pipeline.fetching import fetch
from pvrpipe.pipeline.positions import resample_positions
from pvrpipe.pipeline.pvrs import Positions, Pvr
from pvrpipe.schemas.addresses import there_is
from pvrpipe.schemas.errors import WeightsError, one_line
from pvrpipe.schemas.specifications import WeightsIdentity
from pvrpipe.store.files import sha256_of


@dataclass(frozen=True)
class Random:
    """Weights that nobody trained, by asking for them: ``random:SEED``."""

    seed: int


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint on disk."""

    path: Path
    published: bool
    """from where its authors have it"""
    pinned: bool = True
    """whether it must be the file whose hash the specification gives; not where another was asked for by path"""


def asks_for_random(weights: str) -> bool:
    """Whether ``--weights`` means weights that nobody trained; random_init.pt is a file."""
    return weights.startswith("random:") or re.fullmatch(r"random\d*", weights) is not None


def find_weights(pvr: Pvr, weights: str, asked: str) -> Random | WeightsFile:
    """The weights that ``--weights`` means.

    Args:
        pvr: the representation.
        weights: ``auto``, ``random:SEED``, or the path of a file or of a folder that holds it.
        asked: the name or path by which the representation was asked for.

    Raises:
        WeightsError: they cannot be had; the message names ``--weights``.
    """
    if asks_for_random(weights):
        seed = weights.removeprefix("random").removeprefix(":")
        if not seed.isdecimal() or int(seed) >= 2**63:
            raise WeightsError(
                f"--weights {weights}: write random:SEED with a whole number below 2^63, e.g. random:0"
            )
        return Random(int(seed))
    if weights == "auto" and (pvr.source.repo or pvr.source.url):
        return WeightsFile(_published(pvr), published=True)
    if not weights:
        raise WeightsError("--weights is empty; give auto, FILE_OR_FOLDER or random:SEED")
    path = Path(asked.removeprefix("hf:")) if weights == "auto" else Path(weights)
    if path.suffix == ".json":  # a specification: its weights lie beside it
        path = path.parent
    file = path / pvr.source.file if there_is(path) and path.is_dir() else path
    if not (there_is(file) and file.is_file()):
        raise WeightsError(
            f"there is no file {file}; give the weights of {pvr.name} with --weights FILE_OR_FOLDER"
        )
    return WeightsFile(file, published=False, pinned=weights == "auto")


def _published(pvr: Pvr) -> Path:
    """The pinned file, from a cache or downloaded into it."""
    try:
        return _from_hub(pvr) if pvr.source.repo else _from_url(pvr)
    except OSError as error:
        origin = pvr.source.repo or pvr.source.url
        note = f" ({pvr.source.note})" if pvr.source.note else ""
        raise WeightsError(
            f"the weights of {pvr.name} are not cached and {origin} cannot be reached{note}; "
            "give them with --weights FILE_OR_FOLDER, or try the pipeline with --weights random:0"
        ) from error
    except ValueError as error:  # of a name that the Hub does not allow, of an address that is none
        raise WeightsError(
            f"the source of {pvr.name} is no place ({one_line(error)[:120]}); mend its specification, or give the "
            "weights with --weights FILE_OR_FOLDER"
        ) from error


def _from_hub(pvr: Pvr) -> Path:
    from huggingface_hub import constants, hf_hub_download

    cached = cached_weights(pvr)
    if cached is not None:
        return cached
    _reach(constants.ENDPOINT)
    return Path(hf_hub_download(pvr.source.repo or "", pvr.source.file, revision=pvr.source.revision))


def _reach(address: str) -> None:
    """Fail in seconds where there is no network, instead of after a minute of retries."""
    url = urllib.parse.urlsplit(address)
    if not urllib.request.getproxies():
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()


def _from_url(pvr: Pvr) -> Path:
    target = download_target(pvr)
    if not target.is_file():
        _reach(pvr.source.url or "")
        fetch(pvr.source.url or "", target)
    return target


def _fit_positions(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], how: Positions) -> None:
    """Resample the positions of the tokens, and those of the attention pooling of CLIP's ResNets."""
    for name in ("pos_embed", "head.pos_embed"):
        if name in tensors and name in wanted and tensors[name].shape[-1] == wanted[name].shape[-1]:
            *_, count, width = wanted[name].shape
            resampled = resample_positions(tensors[name].reshape(1, -1, width), count, how)
            tensors[name] = resampled.reshape(wanted[name].shape)


def load_strictly(network: nn.Module, tensors: dict[str, Tensor], where: str) -> int:
    """Load exactly the network's tensors; how many they were.

    Raises:
        WeightsError: a tensor is missing, left over, of another shape, or of integers; the message names it.
    """
    wanted = network.state_dict()
    fitted = {name: _with_axes_of_one(value, wanted.get(name)) for name, value in tensors.items()}
    problems = {
        "missing": sorted(wanted.keys() - fitted.keys()),
        "unexpected": sorted(fitted.keys() - wanted.keys()),
        "of another shape": sorted(
            n for n in wanted.keys() & fitted.keys() if wanted[n].shape != fitted[n].shape
        ),
        "of integers": sorted(  # of a quantised model, whose scales are elsewhere
            n
            for n in wanted.keys() & fitted.keys()
            if wanted[n].is_floating_point() and not fitted[n].is_floating_point()
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


def _check_pin(weights: WeightsFile, digest: str, pvr: Pvr) -> None:
    """Refuse a file that is not the one that the specification pins."""
    found, pinned, kind = digest, pvr.source.sha256 or "", "sha256"
    if pvr.source.sha256 is None and pvr.source.md5 is not None:
        with weights.path.open("rb") as file:
            found, pinned, kind = hashlib.file_digest(file, "md5").hexdigest(), pvr.source.md5, "md5"
    if not found.startswith(pinned):
        own = "get the folder again, or give the file with --weights if it is meant"
        raise WeightsError(
            f"{weights.path} has {kind} {found[:12]}…, but {pvr.name} is pinned to {pinned[:12]}…; "
            f"{'remove the file and run again' if weights.published else own}"
        )


def _snapshot(path: Path) -> str | None:
    """The commit of a file in the Hub's cache, which keeps it under ``snapshots/COMMIT``, wherever the cache lies."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return found[1] if found else None


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
    if weights.pinned:
        _check_pin(weights, digest, pvr)
    tensors = tensors_of(weights.path, digest, pvr.keys)
    if pvr.positions is not None:
        _fit_positions(tensors, network.state_dict(), pvr.positions)
    loaded = load_strictly(network, tensors, str(weights.path))
    return WeightsIdentity(
        source=str(pvr.source.repo or pvr.source.url) if weights.published else "file",
        revision=(pvr.source.revision or _snapshot(weights.path)) if weights.published else None,
        file=weights.path.name,
        file_sha256=digest,
        tensors_sha256=tensors_sha256(network),
        loaded=loaded,
        expected=expected,
        random_seed=None,
        licence=pvr.licence,
    )
