"""Representations on the Hub, or in a folder that holds a repository: by their configuration.

What a file does not say is what transformers takes for it. No code that a repository brings is ever run: a
configuration only chooses among architectures that are here, and what these cannot do is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

from pvrpipe.pipeline.own import OWN, of_timm
from pvrpipe.pipeline.pvrs import KeyMap, Pvr, WeightsSource, recipe
from pvrpipe.pipeline.zoo_language import LANGUAGE_PVRS
from pvrpipe.pipeline.zoo_vit import VIT_PVRS, VIT_RENAMES
from pvrpipe.schemas.errors import WeightsError, one_line
from pvrpipe.schemas.specifications import Recipe

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
KNOWN = {pvr.name: pvr for pvr in (*VIT_PVRS, *LANGUAGE_PVRS)}
#: transformers' model types, and the representation of the zoo that is read and built the same way.
FAMILIES = {
    "vit": KNOWN["theia-b"].model_copy(update={"keys": KeyMap(rename=VIT_RENAMES), "pooling": "cls"}),
    "dinov2": KNOWN["dinov2-b"],
    "dinov2_with_registers": KNOWN["dinov2-b-reg"],
    "dinov3_vit": KNOWN["dinov3-b"],
    "ijepa": KNOWN["ijepa-h"],
    "clip": KNOWN["clip-b16"],
    "siglip": KNOWN["siglip-b16"],
}
#: The same with gated blocks.
GATED = {
    "dinov2": KNOWN["dinov2-g"],
    "dinov2_with_registers": KNOWN["dinov2-g-reg"],
    "dinov3_vit": KNOWN["dinov3-s+"],
}
REGISTERS = {"dinov2_with_registers": "reg_tokens", "dinov3_vit": "num_reg_tokens"}
HEADS = (r"^classifier\.", r"^pooler\.", r"mask_token$")
#: transformers' activations under timm's names.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
#: The files that transformers keeps weights in, those taken first ahead.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors have them
PROCESSORS = ("CLIP", "Bit", "ViT", "DeiT", "Siglip", "DINOv3ViT")  # those that a recipe can say


def hub_pvr(name: str) -> Pvr:
    """``hf:ORG/NAME`` or ``hf:FOLDER``: by its ``config.json``, through timm's architectures.

    Raises:
        WeightsError: it cannot be reached, or is of a kind, or asks for something, that is not known here.
    """
    config = _json_of(name, CONFIG)
    if "architecture" in config and "pretrained_cfg" in config:
        arguments = config.get("model_args") or {}
        return of_timm(_called(name), config["architecture"], config["pretrained_cfg"], name, arguments)
    kind = str(config.get("model_type", "")).removesuffix("_vision_model")
    if kind not in FAMILIES:
        known = ", ".join(["timm's", *FAMILIES])
        raise WeightsError(
            f"hf:{name} is of type '{kind or 'unknown'}', and those known here are {known}; "
            "write a specification file, or register a package (docs/pvrs.md)"
        )
    return _of_transformers(name, kind, _file_of(name, PROCESSOR).parent)


def _called(name: str) -> str:
    """What an encoder is called: a folder by its last part, as the same one lies elsewhere on another machine."""
    return f"hf:{Path(name).resolve().name if Path(name).is_dir() else name}"


def _file_of(name: str, file: str) -> Path:
    """A file of a folder, or of a repository on the Hub."""
    if Path(name).is_dir():
        return Path(name) / file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        raise _unreadable(name, file, error) from error


def _weights_file(name: str) -> str:
    """What a repository calls its weights: safetensors where it has them, else the pickle of older ones.

    Raises:
        WeightsError: they are in several files.
    """
    from huggingface_hub import list_repo_files, try_to_load_from_cache

    folder = Path(name)
    local = folder.is_dir()
    there = {
        file
        for file in WEIGHTS
        if ((folder / file).is_file() if local else isinstance(try_to_load_from_cache(name, file), str))
    }
    if not local and not there:
        with contextlib.suppress(OSError, ValueError):  # offline: what is missing is said when it is fetched
            there = set(list_repo_files(name)) & set(WEIGHTS)
    found = next((file for file in WEIGHTS if file in there), WEIGHTS[0])
    if found.endswith(".index.json"):
        raise WeightsError(
            f"hf:{name} has its weights in several files ({found}), and one is read here; write them as one with "
            "transformers' `model.save_pretrained(FOLDER, max_shard_size='100GB')`, and give --pvr hf:FOLDER"
        )
    return found


def _json_of(name: str, file: str) -> dict[str, Any]:
    try:
        content = json.loads(_file_of(name, file).read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(name, file, error) from error
    if not isinstance(content, dict):
        raise WeightsError(f"hf:{name}: {file} is not an object; give the repository of one model")
    return content


def _unreadable(name: str, file: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"hf:{name} has no {file} that can be read ({one_line(error)[:120]}); "
        "check the name, or give a folder with --pvr hf:FOLDER"
    )


def _of_transformers(name: str, kind: str, folder: Path) -> Pvr:
    from transformers import AutoConfig  # seconds

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its checks raise what they like
        raise _unreadable(name, CONFIG, error) from error
    vision = getattr(config, "vision_config", config)
    gated = bool(getattr(vision, "use_swiglu_ffn", False) or getattr(vision, "use_gated_mlp", False))
    family = (GATED if gated else FAMILIES)[kind]
    made = _processor_recipe(name, folder)
    size = made.crop or _one_side(name, "image_size", vision.image_size)
    projection = None
    if family.projection is not None and "CLIPVisionModel" not in (config.architectures or ()):
        projection = int(config.projection_dim)
    return family.model_copy(
        update={
            "name": _called(name),
            "title": f"{_called(name).removeprefix('hf:')} ({config.model_type})",
            "source": WeightsSource(repo=None if Path(name).is_dir() else name, file=_weights_file(name)),
            "overrides": {**family.overrides, **_sizes(name, kind, vision, gated), "img_size": size},
            "keys": family.keys.model_copy(
                update={
                    "drop": (*family.keys.drop, *HEADS),
                    # what a model with a head calls its encoder by; a model that is the encoder alone has no prefix
                    "rename": ((rf"^{kind}\.", ""), *family.keys.rename),
                }
            ),
            "positions": family.positions or "bicubic-antialias",
            "projection": projection,
            "pooling": "cls" if projection is None and family.projection else family.pooling,
            "recipe": made,
            "width": projection or vision.hidden_size,
            "licence": "see its card",
            "properties": OWN,
        }
    )


def _sizes(name: str, kind: str, vision: Any, gated: bool) -> dict[str, Any]:
    """What a configuration says of a network, in timm's words."""
    width, inner = vision.hidden_size, getattr(vision, "intermediate_size", None)
    if inner is None:
        inner = int(width * vision.mlp_ratio)
        if gated:  # joined, and of two thirds of the width: transformers, Dinov2SwiGLUFFN
            inner = 2 * ((int(inner * 2 / 3) + 7) // 8 * 8)
    sizes: dict[str, Any] = {
        "patch_size": _one_side(name, "patch_size", vision.patch_size),
        "embed_dim": width,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": (inner + 0.5) / width,  # timm rounds the product down
        "layer_norm_eps": vision.layer_norm_eps,
    }
    if kind in REGISTERS:
        sizes[REGISTERS[kind]] = vision.num_register_tokens
    if kind == "dinov3_vit":
        sizes["rope_temperature"] = float(vision.rope_theta)
    known = {"silu" if gated else "gelu": None} if kind == "dinov3_vit" else ACTIVATIONS
    if kind == "dinov3_vit" or not gated:  # DINOv2's gated blocks have SiLU whatever is said
        if vision.hidden_act not in known:
            raise _unknown(name, f"the activation '{vision.hidden_act}'")
        if known[vision.hidden_act] is not None:
            sizes["act_layer"] = known[vision.hidden_act]
    return sizes


def _one_side(name: str, what: str, value: Any) -> int:
    """The side of a square, that may be said once or twice."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise _unknown(name, f"{what} {list(value)}")
    return int(sides.pop())


def _unknown(name: str, what: str) -> WeightsError:
    return WeightsError(
        f"hf:{name} has {what}, which is not known here; write a specification file, or register a package "
        "(docs/pvrs.md)"
    )


def _processor_recipe(name: str, folder: Path) -> Recipe:
    """The recipe of transformers' image processor."""
    from transformers import AutoImageProcessor

    try:
        made: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, PROCESSOR, error) from error
    kind = type(made).__name__.partition("ImageProcessor")[0]
    filter_ = FILTERS.get(int(made.resample or 0))
    if kind not in PROCESSORS:
        raise _unknown(name, f"a {type(made).__name__}")
    if not made.do_resize or filter_ is None:
        raise _unknown(name, f"a processor that resizes by filter {made.resample}, or not at all")
    if not made.do_rescale or not isclose(made.rescale_factor, 1 / 255):
        raise _unknown(name, f"values that are not in [0, 1] (rescale_factor {made.rescale_factor})")
    resize, squash = _size(name, made.size)
    crop = _size(name, made.crop_size)[0] if made.do_center_crop else resize if squash else None
    if crop is None or crop > resize:
        raise _unknown(name, f"frames of {resize} pixels without a crop within them")
    mean, std = (made.image_mean, made.image_std) if made.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    values = {"mean": tuple(mean), "std": tuple(std)}
    return recipe(resize, filter_, values, crop, squash=squash, rounded=kind != "DINOv3ViT")  # type: ignore[arg-type]


def _size(name: str, size: Mapping[str, int | None]) -> tuple[int, bool]:
    """Pixels that the shortest side, or with a true second value both sides, are brought to."""
    said = {key: value for key, value in dict(size).items() if value is not None}
    if said.keys() == {"shortest_edge"}:
        return int(said["shortest_edge"]), False
    if said.keys() == {"height", "width"} and said["height"] == said["width"]:
        return int(said["height"]), True
    raise _unknown(name, f"frames of {said}")
