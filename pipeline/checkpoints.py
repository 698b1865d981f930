"""Checkpoints: read without executing anything, converted once to safetensors, brought to our names.

A pickle is read with ``weights_only``; its tensors are then kept as safetensors in the cache, under the
sha256 of the pickle and of what was taken from it, beside a hash of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pvrpipe.pipeline.pvrs import KeyMap
from pvrpipe.schemas.errors import WeightsError, one_line
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.store.cache import cache_errors, cache_folder
from pvrpipe.store.files import (
    locked,
    remove_temporaries,
    replacing,
    sha256_of,
    tensors_to,
    write_whole,
)


def tensors_of(path: Path, digest: str, keys: KeyMap) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names.

    Args:
        path: safetensors, or a pickle of tensors.
        digest: its sha256.
        keys: what is taken from it, and what that is called here.

    Raises:
        WeightsError: it is no checkpoint of plain tensors, or a pattern of the keys is none.
    """
    try:
        return _tensors_of(path, digest, keys)
    except re.error as error:
        raise WeightsError(
            f"{error.pattern!r} in the specification's keys is no regular expression ({error}); mend it"
        ) from None


def _tensors_of(path: Path, digest: str, keys: KeyMap) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return rename(chosen(read_tensors(path), keys), keys)
    taken = canonical_json({"under": keys.under, "drop": keys.drop})
    name = f"{digest}-{hashlib.sha256(taken.encode()).hexdigest()[:8]}"
    converted = cache_folder() / "converted" / f"{name}.safetensors"
    if not _holds(converted):
        _convert(path, keys, converted)
    return rename(safetensors.torch.load_file(converted), keys)


def _holds(converted: Path) -> bool:
    """Whether a conversion is there and is what was written."""
    seal = converted.with_suffix(".sha256")
    return converted.is_file() and seal.is_file() and seal.read_text() == sha256_of(converted)


def _convert(path: Path, keys: KeyMap, target: Path) -> None:
    """Keep what is taken of a pickle as safetensors, one process at a time; another may have done it meanwhile."""
    with cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent, wait=True):
            if _holds(target):
                return
            remove_temporaries(target.parent)
            own = {name: t.contiguous().clone() for name, t in chosen(read_tensors(path), keys).items()}
            with replacing(target) as beside:
                with tensors_to(beside):
                    safetensors.torch.save_file(own, beside)
                seal = sha256_of(beside)
            write_whole(target.with_suffix(".sha256"), seal.encode())


def read_tensors(path: Path) -> dict[str, object]:
    """A checkpoint's content; a pickle is read with ``weights_only``, so nothing in it can run.

    Of all classes only ``argparse.Namespace`` is known to it, plain data that training scripts leave there.

    Raises:
        WeightsError: it is neither safetensors nor a checkpoint of plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # of pickles in another protocol, which may load or are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # bytes that are no pickle make its reader fail in any way
        if code := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise WeightsError(
                f"{path} cannot be read as weights: it holds {code[1]}, which runs code, and none is run; give a "
                "state dict"
            ) from None
        raise WeightsError(
            f"{path} cannot be read as weights ({one_line(error)[:120]}); get the file again"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors; give a state dict")
    return content


def chosen(content: dict[str, object], keys: KeyMap) -> dict[str, Tensor]:
    """The tensors that belong to the encoder, under upstream's names."""
    inner = content.get(keys.under) if keys.under else None
    tensors: dict[str, Tensor] = {}
    for name, value in (inner if isinstance(inner, dict) else content).items():
        if not isinstance(name, str):
            raise WeightsError(
                f"the checkpoint has an entry called {name!r}; give a state dict, which has names"
            )
        if any(re.search(pattern, name) for pattern in keys.drop):
            continue
        if not isinstance(value, Tensor):
            lacking = f" and there is no '{keys.under}'" if keys.under and inner is None else ""
            raise WeightsError(
                f"the checkpoint's entry '{name}' is a {type(value).__name__}, not a tensor{lacking}; give a state "
                "dict, or say in the specification's keys under which entry it is"
            )
        tensors[name] = value
    return tensors


def rename(tensors: dict[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """Upstream's tensors under our names, in our layout."""
    ours: dict[str, Tensor] = {}
    idle = set(keys.transpose)
    for name, value in tensors.items():
        for pattern, replacement in keys.rename:
            name = re.sub(pattern, replacement, name)
        if name in ours:
            raise WeightsError(
                f"two of the checkpoint's tensors would be called '{name}'; mend the rename of the specification's keys"
            )
        turning = {pattern for pattern in keys.transpose if value.dim() == 2 and re.search(pattern, name)}
        ours[name] = value.T if turning else value
        idle -= turning
    if idle:  # a square matrix would be loaded the other way, and nobody would know
        raise WeightsError(
            f"the specification's keys transpose {min(idle)!r}, and the checkpoint has no matrix called so; mend it, "
            "or give the checkpoint of this very encoder with --weights"
        )
    fitted = _split_q(_join_qkv(ours))
    return _fold_class_position(fitted) if keys.fold_class_position else fitted


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(tensors)
    for name in tensors:
        parts = [name.replace(".attn.q.", f".attn.{p}.") for p in "qkv"]
        if ".attn.q." in name and all(part in joined for part in parts):
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _split_q(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".q+kv." in name:
            q, kv = value.split([len(value) // 3, 2 * len(value) // 3])
            split |= {name.replace(".q+kv.", ".q."): q, name.replace(".q+kv.", ".kv."): kv}
        elif name.endswith(".q-v_bias"):
            q, _, v = value.chunk(3)
            split |= {name.replace("q-v_bias", "q_bias"): q, name.replace("q-v_bias", "v_bias"): v}
        else:
            split[name] = value
    return split


def _fold_class_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    positions, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if positions is None or token is None:
        return tensors
    return {**tensors, "cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
