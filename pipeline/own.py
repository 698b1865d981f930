"""Representations that are not in the zoo: timm's, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvrpipe.pipeline.pvrs import IMAGENET, KeyMap, Properties, Pvr, WeightsSource, recipe
from pvrpipe.schemas.errors import UnknownNameError, WeightsError, one_line
from pvrpipe.schemas.specifications import Recipe

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "pvrpipe.pvrs"
PACKAGE = "package:"  # what an architecture of a package's own is called
OWN = Properties(trained_on="not stated")


def package_names() -> list[str]:
    """Of the representations that installed packages register; none of them is loaded."""
    return list(dict.fromkeys(point.name for point in entry_points(group=ENTRY_POINTS)))


def package_pvr(name: str) -> Pvr:
    """The representation that a package registers under a name.

    Raises:
        WeightsError: no package does, or several, or its module cannot be loaded, or has no ``pvr`` or ``build``.
    """
    found: Pvr = _package(name).pvr
    return found


def package_trunk(pvr: Pvr) -> nn.Module:
    """The network of a package's representation.

    Raises:
        WeightsError: the package cannot build it.
    """
    from torch import nn

    name = pvr.architecture.removeprefix(PACKAGE)
    build = _package(name).build
    try:
        trunk = build(**pvr.overrides)
    except Exception as error:  # somebody else's, as above
        raise WeightsError(
            f"{name}: its package cannot build it with {pvr.overrides} ({one_line(error)[:120]}); mend its package, "
            "or what it needs"
        ) from error
    if not isinstance(trunk, nn.Module):
        raise WeightsError(f"{name}: `build` gives a {type(trunk).__name__}, no network; mend its package")
    return trunk


def package_versions(pvr: Pvr) -> dict[str, str]:
    """The version of the package whose code computes a representation; none where it is of no package."""
    points = entry_points(group=ENTRY_POINTS, name=pvr.architecture.removeprefix(PACKAGE))
    made_by = [point.dist for point in points if pvr.architecture.startswith(PACKAGE)]
    return {package.name: package.version for package in made_by if package is not None}


def _package(name: str) -> Any:
    points = list(entry_points(group=ENTRY_POINTS, name=name))
    if not points:
        raise WeightsError(f"no installed package registers the PVR {name}; install it again")
    if len({point.value for point in points}) > 1:
        both = " and ".join(point.value for point in points)
        raise WeightsError(f"{name} is registered by several packages ({both}); uninstall all but one")
    where = f"{name} ({points[0].value})"
    try:
        module = points[0].load()
    except (Exception, SystemExit) as error:  # somebody else's: all that can be said is that it does not load
        raise WeightsError(
            f"{where} cannot be loaded ({one_line(error)}); install its package again"
        ) from error
    if not isinstance(getattr(module, "pvr", None), Pvr) or not callable(getattr(module, "build", None)):
        raise WeightsError(
            f"{where} is no module with a `pvr` and a `build`; mend its package (docs/pvrs.md)"
        )
    if module.pvr.name != name:  # `verify --golden` would not find it, or take another for it
        raise WeightsError(f"{where} calls its `pvr` {module.pvr.name}; let its package give it one name")
    return module


def timm_pvr(name: str) -> Pvr:
    """``timm:NAME``: the architecture, recipe and weights that timm's registry has under a name.

    Raises:
        UnknownNameError: timm has no such model, or no such weights of it.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError.among("timm model", name, timm.list_models())
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of weights that it does not know
        architecture = name.partition(".")[0]
        raise UnknownNameError.among("timm model", name, timm.list_pretrained(f"{architecture}.*")) from None
    settings = {} if config is None else config.to_dict()
    return of_timm(f"timm:{name}", name, settings, settings.get("hf_hub_id"))


def of_timm(
    name: str,
    architecture: str,
    settings: Mapping[str, Any],
    repo: str | None,
    arguments: Mapping[str, Any] | None = None,
) -> Pvr:
    """A model of timm.

    Args:
        name: of the representation.
        architecture: a name of timm's registry.
        settings: its ``pretrained_cfg``.
        repo: on the Hub, or a folder.
        arguments: what a repository builds it with (``model_args``).

    Raises:
        WeightsError: no recipe, or no specification, can say what it asks for.
    """
    import timm
    import torch

    size = int(settings.get("input_size", (3, 224, 224))[-1])
    given = dict(arguments or {})
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(architecture, **{**given, "num_classes": 0})
    except (RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{name}: '{architecture}' with {given} cannot be built ({one_line(error)[:120]}); "
            "write a specification file"
        ) from error
    if getattr(network, "pos_embed", None) is not None:
        given.setdefault("img_size", size)
    odd = [key for key, value in given.items() if not isinstance(value, int | float | str)]
    if odd:
        raise WeightsError(f"{name} is built with {odd[0]}={given[odd[0]]}; write a specification file")
    heads = settings.get("classifier") or ()
    local = repo is not None and Path(repo).is_dir()
    return Pvr(
        name=name,
        title=architecture,
        source=WeightsSource(
            repo=None if local else repo, file=settings.get("hf_hub_filename") or "model.safetensors"
        ),
        architecture=architecture,
        overrides=given,
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
