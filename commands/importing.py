"""``import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvrpipe.commands.options import DATA, Debug, Format, Json, Overwrite, Root, ShardRows
from pvrpipe.commands.terminal import note, tell, watching


def import_(
    format_: Annotated[
        str, typer.Argument(metavar="FORMAT", help="minari, lerobot, vd4rl, robomimic, dqn-replay or frames.")
    ],
    source: Annotated[
        str, typer.Argument(help="A folder or file of that format; of Minari, also the id of a data set.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Rollout store to write.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the data set in the store; default: as it calls itself.")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="Which of several cameras' frames; default: the only one.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of a side of the square frames; default: as in the source.")
    ] = None,
    shard_rows: ShardRows = None,
    shard_format: Format = "parquet",
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Make a rollout store from what you already have: Minari, LeRobot, V-D4RL, robomimic, DQN Replay, videos.

    Example: pvrpipe import robomimic lift/ph/image.hdf5 --camera agentview --size 224
    """
    from pvrpipe.rollouts.importing import PREFIX, ImportConfig, import_store, open_source
    from pvrpipe.store.workspace import Workspace

    config = ImportConfig(format_, source, name, camera, size, shard_rows, shard_format)
    opened = open_source(config)
    out = out or Workspace(root).rollouts(f"{PREFIX}{format_}:{name or opened.name}")
    note(f"importing {source} into {out}")
    with watching("import", "frames") as progress:
        result = import_store(config, opened, out, overwrite=overwrite, progress=progress)
    for remark in remarks_on(result.skipped, result.cut, result.remarks):
        note(remark)
    tell(
        json_,
        result,
        [result],
        ("store", "environment", "episodes", "rows", "shards", "resumed_shards", "skipped", "cut"),
    )


def remarks_on(skipped: int, cut: int, remarks: tuple[str, ...]) -> list[str]:
    """What a person ought to know of how the data came here."""
    found = list(remarks)
    if skipped:
        found.append(f"{skipped} episodes without a transition of which both ends were seen were passed over")
    if cut:
        found.append(
            f"what the last action led to is not in the source: {cut} episodes are a transition shorter"
        )
    return found
