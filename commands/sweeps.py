"""``sweep``: stores × models × sizes × seeds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from pvrpipe.commands.options import (
    DATA,
    HORIZONS,
    Address,
    Debug,
    Device,
    Engine,
    Json,
    Overwrite,
    ReadoutOptions,
    Root,
    Workers,
    check_engine,
    pick_device,
    sharing,
)
from pvrpipe.commands.terminal import note, tell, watching
from pvrpipe.commands.training_options import MODELS, SIZES, TrainOptions
from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.progress import counted


@sharing
def sweep(
    stores: Annotated[list[str], typer.Argument(help="Embeddings, or rollouts to learn from pixels.")],
    model: Annotated[list[str], typer.Option(help=f"{MODELS}; repeatable.")] = ["dreamerv3"],
    size: Annotated[list[str], typer.Option(help=f"{SIZES}; repeatable.")] = ["1m"],
    seed: Annotated[
        list[int], typer.Option(min=0, max=2**63 - 1, help="Decides everything that is drawn; repeatable.")
    ] = [0],
    *,
    training: TrainOptions,
    part: ReadoutOptions,
    probe: Annotated[bool, typer.Option("--probe", help="Probe each run once it is trained.")] = False,
    horizon: Annotated[
        list[int], typer.Option(min=1, help="Rows that --probe accumulates over; repeatable.")
    ] = HORIZONS,
    engine: Engine = "ray",
    address: Address = None,
    workers: Workers = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train every model in every size with every seed on every store; the same command goes on where it stopped.

    Example: pvrpipe sweep data/embeddings/*/* --model dreamerv3 --model tdmpc2 --seed 0 --seed 1 --probe
    """
    from pvrpipe.store.places import is_url
    from pvrpipe.store.workspace import Workspace

    check_engine(engine, address, workers, device)
    if horizon != HORIZONS and not probe:
        raise InvalidValueError("--horizon is of the probe of each run; give --probe too, or leave it out")
    stores = [store if is_url(store) else str(Path(store).absolute()) for store in stores]
    labels = {store: training.label(root, store, part) for store in stores}
    looking = {store: training.backbone(store, part) for store in stores}

    from pvrpipe.worldmodel.sweep import Job
    from pvrpipe.worldmodel.sweep import sweep as schedule  # torch: after the mistakes

    chosen = pick_device(device)
    jobs = [
        Job(
            store=store,
            run=Workspace(root).run(f"{labels[store]}-{each}-{width}-s{number}").absolute(),
            config=training.config(each, width, number, model),
            horizons=tuple(horizon) if probe else (),
            looking=looking[store],
            backing=training.backing,
            device=chosen,
            overwrite=overwrite,
        )
        for store, each, width, number in itertools.product(stores, model, size, seed)
    ]
    with watching("sweep", "updates", f"{counted(len(jobs), 'run')} in {root / 'runs'}") as progress:
        outcomes = schedule(jobs, engine=engine, address=address, workers=workers, progress=progress)
    failed = [outcome for outcome in outcomes if outcome.state != "finished"]
    for outcome in failed:
        note(f"{outcome.run}: {outcome.failure}")
    columns = ("run", "model", "size", "seed", "state", "updates", "loss", "val_loss")
    tell(json_, {"runs": outcomes, "failed": len(failed)}, outcomes, columns)
    if failed:
        raise typer.Exit(1)
