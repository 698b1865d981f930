"""Options that several commands share, and what they say of their defaults."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from pvrpipe.commands.terminal import note
from pvrpipe.schemas.errors import InvalidValueError

if TYPE_CHECKING:
    from pvrpipe.pipeline.readout import Readout

Root = Annotated[Path, typer.Option(envvar="PVRPIPE_ROOT", help="Workspace that supplies the default paths.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
HORIZONS = [33, 500]  # rows that a probe accumulates over: the study's
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides everything that is drawn.")]
Engine = Annotated[Literal["ray", "inline"], typer.Option(help="Ray, or this process (for debugging).")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default: start one here.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per processor.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output made with another configuration.")
]
Format = Annotated[
    Literal["parquet", "webdataset"], typer.Option("--format", help="Of the shards; both hold the same rows.")
]

ShardRows = Annotated[int | None, typer.Option(min=1, help="Rows wanted in a shard.")]

DATA = Path("data")


@dataclass(frozen=True)
class ReadoutOptions:
    """Which part of a representation is the embedding."""

    layer: Annotated[
        str | None, typer.Option(help="A block (5), several joined (3,7,11), a stage (layer2), or last.")
    ] = None
    blocks: Annotated[
        str | None, typer.Option(help="The blocks that compute; the others are taken out: 0-5, 6-11, 0,2,4.")
    ] = None
    norm: Annotated[
        bool | None, typer.Option("--norm/--no-norm", help="Whether the final norm is applied to the layer.")
    ] = None
    pool: Annotated[
        str | None,
        typer.Option(help="cls, cls+registers, mean, map, projected, patches, conv-map, average, …"),
    ] = None
    input_size: Annotated[int | None, typer.Option(help="Pixels of a side that the network sees.")] = None

    @property
    def readout(self) -> Readout:
        """As the pipeline takes it."""
        from pvrpipe.pipeline.readout import Readout

        return Readout(self.layer, self.blocks, self.norm, self.pool, self.input_size)


def sharing(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses, such as :class:`ReadoutOptions`, are options one by one."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            parameters += _options_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**given, **shared)

    run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: Any) -> list[Parameter]:
    """A parameter for each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]


def took(what: str, path: Path) -> Path:
    """Say which default was taken."""
    note(f"taking the newest {what}: {path}")
    return path


def environment_of(store: str) -> str:
    """The environment of a rollout or embedding store."""
    from pvrpipe.store.reading import Store

    return Store.open(store).manifest.rollouts.environment


def pvr_label(pvr: str, weights: str, readout: Readout) -> str:
    """A folder's name for an encoder: an own one by what it is, read out how, a random one as what it is."""
    from pvrpipe.pipeline.weights import asks_for_random
    from pvrpipe.pipeline.zoo import find_pvr

    name = find_pvr(pvr).name.replace(":", "-").replace("/", "-")
    return name + readout.label + ("-" + weights if asks_for_random(weights) else "")


def check_engine(engine: str, address: str | None, workers: int | None = None, device: str = "auto") -> None:
    """One process has no workers, and is on no cluster; and on one, Ray gives each worker a GPU of its own."""
    if engine == "inline" and (address, workers) != (None, None):
        raise InvalidValueError(
            "--workers and --address are of --engine ray, and this is one process; give --engine ray too, or neither"
        )
    if engine == "ray" and device.startswith("cuda:"):
        raise InvalidValueError(
            f"--device {device} names one GPU, and --engine ray gives each worker one; give --device cuda, or "
            "--engine inline"
        )


def pick_device(device: str) -> str:
    """Resolve ``auto``, and refuse a GPU that is not there."""
    from pvrpipe.pipeline.encoders import device_named

    return str(device_named(device))
