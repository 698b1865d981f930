"""Every representation by name, and one's own."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pvrpipe.pipeline.hub import hub_pvr
from pvrpipe.pipeline.own import package_names, package_pvr, timm_pvr
from pvrpipe.pipeline.pvrs import SPEC_FILE, Pvr
from pvrpipe.pipeline.zoo_cnn import CNN_PVRS
from pvrpipe.pipeline.zoo_language import LANGUAGE_PVRS
from pvrpipe.pipeline.zoo_vit import VIT_PVRS
from pvrpipe.schemas.addresses import there_is
from pvrpipe.schemas.errors import UnknownNameError, WeightsError

PVRS: dict[str, Pvr] = {pvr.name: pvr for pvr in (*VIT_PVRS, *LANGUAGE_PVRS, *CNN_PVRS)}


def all_pvrs() -> tuple[dict[str, Pvr], list[WeightsError]]:
    """Those that pvrpipe knows, those of installed packages, and why some of these cannot be had."""
    found, failed = {}, []
    for name in package_names():
        if name in PVRS:
            failed.append(
                WeightsError(f"{name} of a package is hidden by pvrpipe's own; register another name")
            )
            continue
        try:
            found[name] = package_pvr(name)
        except WeightsError as error:
            failed.append(error)
    return {**found, **PVRS}, failed


def specification_at(path: str) -> Path | None:
    """The specification that a path is of, itself or the folder that it is in; None where there is none."""
    place = Path(path)
    spec = place if place.suffix == ".json" else place / SPEC_FILE
    return spec if path and there_is(spec) and spec.is_file() else None


def find_pvr(name: str) -> Pvr:
    """A representation by name, or one's own.

    Args:
        name: one of :data:`PVRS`, ``timm:NAME``, ``hf:ORG/NAME``, a name that a package registers, or the
            path of a specification (``.json``) or of a folder with a ``pvr.json``.

    Raises:
        UnknownNameError: there is no such representation; the message names the nearest.
        WeightsError: its specification is not valid.
    """
    if name in PVRS:
        return PVRS[name]
    prefix, _, rest = name.partition(":")
    if prefix in ("timm", "hf") and rest:
        return timm_pvr(rest) if prefix == "timm" else hub_pvr(rest)
    spec = specification_at(name)
    if spec is None:
        packaged = package_names()
        if name in packaged:
            return package_pvr(name)
        hint = (
            f"or timm:NAME, hf:ORG/NAME, the path of a folder with a {SPEC_FILE}, as `pvrpipe pretrain` makes"
        )
        raise UnknownNameError.among("PVR", name, [*packaged, *PVRS], hint=hint)
    try:
        return Pvr.model_validate_json(spec.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{spec}: {f'{where}: ' if where else ''}{first['msg']}; mend it, or make the folder again with "
            "`pvrpipe pretrain`"
        ) from None
