"""Options that several commands share, and what they say of their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pvrpipe.commands.terminal import note

if TYPE_CHECKING:
    from pvrpipe.pipeline.readout import Readout

Root = Annotated[Path, typer.Option(envvar="PVRPIPE_ROOT", help="Workspace that supplies the default paths.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
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
    from pvrpipe.pipeline.zoo import find_pvr

    name = find_pvr(pvr).name.replace(":", "-").replace("/", "-")
    return name + readout.label + ("-" + weights if weights.startswith("random") else "")


def pick_device(device: str) -> str:
    """Resolve ``auto``, and refuse a GPU that is not there."""
    from pvrpipe.pipeline.encoders import EncoderRequest

    return str(EncoderRequest("", device=device).resolved_device())
