"""Representations that are not in the zoo: timm's, those on the Hub by their configuration, those of packages.

No code that a repository brings is ever run: a configuration only chooses among architectures that are here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvrpipe.pipeline.pvrs import IMAGENET, KeyMap, Properties, Pvr, WeightsSource, recipe
from pvrpipe.pipeline.zoo_language import LANGUAGE_PVRS
from pvrpipe.pipeline.zoo_vit import VIT_PVRS, VIT_RENAMES
from pvrpipe.schemas.errors import UnknownNameError, WeightsError, one_line
from pvrpipe.schemas.specifications import Recipe

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "pvrpipe.pvrs"
PACKAGE = "package:"  # what an architecture of a package's own is called
OWN = Properties(trained_on="not stated")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors have them

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
HEADS = (r"^classifier\.", r"^pooler\.", r"mask_token$")


def package_pvrs() -> dict[str, Pvr]:
    """Representations that installed packages register; each entry point is a module with ``pvr`` and ``build``."""
    return {point.name: _package(point.name).pvr for point in entry_points(group=ENTRY_POINTS)}


def package_trunk(pvr: Pvr) -> nn.Module:
    """The network of a package's representation."""
    build: Callable[..., nn.Module] = _package(pvr.architecture.removeprefix(PACKAGE)).build
    return build(**pvr.overrides)


def _package(name: str) -> Any:
    points = list(entry_points(group=ENTRY_POINTS, name=name))
    if not points:
        raise WeightsError(f"no installed package registers the PVR {name}; install it again")
    try:
        return points[0].load()
    except Exception as error:  # somebody else's package: all that can be said is that it does not load
        raise WeightsError(
            f"{name} ({points[0].value}) cannot be loaded ({one_line(error)}); install its package again"
        ) from error


def timm_pvr(name: str) -> Pvr:
    """``timm:NAME``: the architecture, recipe and weights that timm's registry has under a name.

    Raises:
        UnknownNameError: timm has no such model.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError.among("timm model", name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    settings = {} if config is None else config.to_dict()
    return _of_timm(f"timm:{name}", name, settings, settings.get("hf_hub_id"))


def hub_pvr(name: str) -> Pvr:
    """``hf:ORG/NAME`` or ``hf:FOLDER``: by its ``config.json``, through timm's architectures.

    Raises:
        WeightsError: it cannot be reached, or is of a kind that is not known here.
    """
    config = _json_of(name, "config.json")
    if "architecture" in config and "pretrained_cfg" in config:
        return _of_timm(f"hf:{name}", config["architecture"], config["pretrained_cfg"], name)
    kind = str(config.get("model_type", "")).removesuffix("_vision_model")
    if kind not in FAMILIES:
        known = ", ".join(["timm's", *FAMILIES])
        raise WeightsError(
            f"hf:{name} is of type '{kind or 'unknown'}', and those known here are {known}; "
            "write a specification file, or register a package (docs/pvrs.md)"
        )
    return _of_transformers(name, FAMILIES[kind], config, _json_of(name, "preprocessor_config.json"))


def _json_of(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder, or of a repository on the Hub."""
    try:
        if Path(name).is_dir():
            path = Path(name) / file
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, file))
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"hf:{name} has no {file} that can be read ({one_line(error)[:120]}); "
            "check the name, or give a folder with --pvr hf:FOLDER"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"hf:{name}: {file} is not an object; give the repository of one model")
    return content


def _of_timm(name: str, architecture: str, settings: Mapping[str, Any], repo: str | None) -> Pvr:
    import timm
    import torch

    size = int(settings.get("input_size", (3, 224, 224))[-1])
    with torch.device("meta"):
        network: Any = timm.create_model(architecture, num_classes=0)
    heads = settings.get("classifier") or ()
    local = repo is not None and Path(repo).is_dir()
    return Pvr(
        name=name,
        title=architecture,
        source=WeightsSource(
            repo=None if local else repo, file=settings.get("hf_hub_filename") or "model.safetensors"
        ),
        architecture=architecture,
        overrides={"img_size": size} if getattr(network, "pos_embed", None) is not None else {},
        keys=KeyMap(
            drop=tuple(
                rf"^{head.replace('.', '[.]')}\." for head in ([heads] if isinstance(heads, str) else heads)
            )
        ),
        recipe=_timm_recipe(name, size, settings),
        pooling="pooled",
        width=getattr(network, "head_hidden_size", network.num_features),
        licence=str(settings.get("license") or "not stated"),
        properties=OWN,
    )


def _timm_recipe(name: str, size: int, settings: Mapping[str, Any]) -> Recipe:
    filter_, crop_mode = settings.get("interpolation", "bicubic"), settings.get("crop_mode") or "center"
    if filter_ not in ("bilinear", "bicubic") or crop_mode not in ("center", "squash"):
        raise WeightsError(
            f"{name} resizes by '{filter_}' and crops by '{crop_mode}', which no recipe says; "
            "write a specification file"
        )
    resize = int(size / (settings.get("crop_pct") or 1))
    values = {key: settings.get(key, IMAGENET[key]) for key in IMAGENET}
    return recipe(resize, filter_, values, crop=size, squash=crop_mode == "squash")


def _of_transformers(name: str, family: Pvr, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Pvr:
    vision = config.get("vision_config") or config
    try:
        width, size = int(vision["hidden_size"]), int(vision["image_size"])
        overrides: dict[str, Any] = {
            **family.overrides,
            "img_size": size,
            "patch_size": int(vision["patch_size"]),
            "embed_dim": width,
            "depth": int(vision["num_hidden_layers"]),
            "num_heads": int(vision["num_attention_heads"]),
            "layer_norm_eps": float(vision.get("layer_norm_eps", 1e-6)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"hf:{name}: config.json has no {one_line(error)}; write a specification file"
        ) from None
    if "intermediate_size" in vision:
        overrides["mlp_ratio"] = vision["intermediate_size"] / width
    crop = _crop_of(processor, size)
    architecture, projection = family.architecture, family.projection
    if projection is not None:
        projection = int(config.get("projection_dim", projection))
        if vision.get("hidden_act") == "gelu":
            architecture = architecture.replace("_quickgelu", "")
    return family.model_copy(
        update={
            "name": f"hf:{name}",
            "title": f"{name} ({config['model_type']})",
            "source": WeightsSource(repo=None if Path(name).is_dir() else name, file="model.safetensors"),
            "architecture": architecture,
            "overrides": {**overrides, "img_size": crop},
            "keys": family.keys.model_copy(update={"drop": (*family.keys.drop, *HEADS)}),
            "positions": family.positions or "bicubic-antialias",
            "projection": projection,
            "recipe": _processor_recipe(name, processor, crop),
            "width": projection or width,
            "licence": "see its card",
            "properties": OWN,
        }
    )


def _side(value: object, default: int) -> int:
    """One side of a processor's size, which may be a number or named."""
    if isinstance(value, Mapping):
        return int(next(iter(value.values()), default))
    return int(value) if isinstance(value, int) else default


def _crop_of(processor: Mapping[str, Any], size: int) -> int:
    if processor.get("do_center_crop"):
        return _side(processor.get("crop_size"), size)
    return _side(processor.get("size"), size)


def _processor_recipe(name: str, processor: Mapping[str, Any], crop: int) -> Recipe:
    """The recipe of transformers' image processor."""
    filter_ = FILTERS.get(processor.get("resample", 2), "unknown")
    if filter_ not in ("bilinear", "bicubic"):
        raise WeightsError(
            f"hf:{name} resizes by '{filter_}', which no recipe says; write a specification file"
        )
    size = processor.get("size")
    shortest = isinstance(size, Mapping) and "shortest_edge" in size
    values = {
        "mean": processor.get("image_mean", IMAGENET["mean"]),
        "std": processor.get("image_std", IMAGENET["std"]),
    }
    return recipe(_side(size, crop), filter_, values, crop=crop, squash=not shortest)  # type: ignore[arg-type]
