"""``train-model``, ``probe`` and ``runs``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pvrpipe.commands.options import (
    DATA,
    HORIZONS,
    Address,
    Debug,
    Device,
    Json,
    Overwrite,
    ReadoutOptions,
    Root,
    Seed,
    check_engine,
    pick_device,
    sharing,
    took,
)
from pvrpipe.commands.terminal import ERROR_COLUMNS, error_rows, mean_sem, note, tell, watching
from pvrpipe.commands.training_options import MODELS, SIZES, TrainOptions, backbone_of
from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.progress import counted, silent

VIEWS = ("source", "replay", "shift")  # of a pair of stores
# What is of a run's probe, and not of reading a store out.
OF_A_RUN = ("store", "horizon", "context", "split", "beside", "weights", "device")


@sharing
def train_model(
    store: Annotated[
        str | None,
        typer.Argument(help="Embeddings, or rollouts to learn from pixels; default: the newest embeddings."),
    ] = None,
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run; default: named after its parts.")
    ] = None,
    model: Annotated[str, typer.Option(help=f"{MODELS}.")] = "dreamerv3",
    size: Annotated[str, typer.Option(help=f"{SIZES}.")] = "1m",
    *,
    training: TrainOptions,
    part: ReadoutOptions,
    engine: Annotated[
        Literal["ray", "inline"],
        typer.Option(help="This process, or those torchrun starts; or with ray so many --workers."),
    ] = "inline",
    address: Address = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray, which must divide the batch; default: one."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train a world model offline from embeddings, or from frames; the same command resumes it.

    Example: pvrpipe train-model --model tdmpc2 --size 5m --updates 20000
    """
    check_engine(engine, address, workers, device)

    from pvrpipe.store.workspace import Workspace

    workspace = Workspace(root)
    if store is None and training.pvr is None:
        store = str(took("embeddings", workspace.newest_embeddings()))
    store = store or str(took("rollouts", workspace.newest_rollouts()))
    looking = training.backbone(store, part)

    from pvrpipe.worldmodel.ranks import joined, of_several  # torch: after the mistakes
    from pvrpipe.worldmodel.training import train

    if engine == "ray" and of_several().ranks > 1:
        raise InvalidValueError("torchrun starts the processes of --engine inline; leave out one of the two")
    first = of_several().rank == 0
    run = run or workspace.run(f"{training.label(root, store, part)}-{model}-{size}-s{seed}")
    config = training.config(model, size, seed, [model])
    with watching("train", "updates", f"training {model} {size} into {run}") as progress:
        asked: dict[str, Any] = {
            "overwrite": overwrite,
            "backing": training.backing,
            "progress": progress if first else silent,
        }
        if engine == "ray":
            from pvrpipe.worldmodel.ray_engine import train_together

            result = train_together(
                config,
                store,
                run,
                workers=workers or 1,
                device=pick_device(device),
                address=address,
                looking=looking,
                **asked,
            )
        else:
            with joined(pick_device(device)) as own:
                backbone = looking and looking(str(own))
                result = train(config, store, run, device=own, backbone=backbone, **asked)
    if not first:
        return
    note(f"windows came from {result.backing}")
    if result.too_short:
        short = counted(result.too_short, "training episode")
        note(
            f"{short} shorter than a window had no part in it; a smaller --length lets them in, or --joined (dreamerv3)"
        )
    tell(json_, result, [result], ("run", "updates", "updates_per_second", "data_wait_fraction"))


def probe(
    given: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(help="Folder of a run, or an embedding store to read out; default: the newest run."),
    ] = None,
    store: Annotated[
        str | None, typer.Argument(help="Store or URL to probe the run on; default: the run's own.")
    ] = None,
    horizon: Annotated[
        list[int], typer.Option(min=1, help="Rows to accumulate over; repeatable.")
    ] = HORIZONS,
    context: Annotated[int, typer.Option(min=1, help="Rows seen before predicting.")] = 1,
    split: Annotated[
        list[str], typer.Option(help="Which episodes, val or train; repeatable, the first is reported.")
    ] = ["val"],
    beside: Annotated[
        str | None,
        typer.Option(help="Embeddings of a replay of the store: what another look of the same physics does."),
    ] = None,
    label: Annotated[
        str, typer.Option(help="Of STORE: writes probe-LABEL.parquet and leaves what the own store said.")
    ] = "",
    weights: Annotated[
        str | None,
        typer.Option(help="Of the encoder inside the run's model, where they are not where they were."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how well a run predicts held-out episodes, beside its controls; episode by episode in probe.parquet.

    Given an embedding store instead, it says what reward and state can be read off its embeddings at all.

    Example: pvrpipe probe data/runs/pendulum-swingup-vc1-dreamerv3-1m-s0 --horizon 15 --horizon 50
    """
    from pvrpipe.store.workspace import RUN, Workspace

    if label and (store is None or beside is not None):
        raise InvalidValueError("--label names another STORE than the run's own, without --beside; give that")
    if beside is not None and len(split) > 1:
        raise InvalidValueError("--beside compares the episodes of one --split; name one")
    if run is not None and not (Path(run) / RUN).exists() and holds_store(run):
        refuse_any_of_a_run(given, run)
        read_out(run, seed, json_)
        return
    folder = took("run", Workspace(root).newest_run()) if run is None else Path(run)

    from pvrpipe.worldmodel.counterfactual import probe_pairs  # torch: after the mistakes
    from pvrpipe.worldmodel.probe import probe as measure
    from pvrpipe.worldmodel.runs import read_run

    chosen = pick_device(device)
    asked: dict[str, Any] = {"horizons": horizon, "context": context, "seed": seed, "device": chosen}
    asked |= {"backbone": backbone_of(read_run(folder), chosen, weights)}
    with watching("probe", "episodes") as progress:
        asked |= {"progress": progress}
        if beside is None:
            report = measure(folder, store, split=split, label=label, **asked)
        else:
            report = probe_pairs(folder, beside, store, split=split[0], **asked)
    warn_of_random(report)
    if beside is None:
        tell(json_, report, error_rows(report), ERROR_COLUMNS)
    else:
        tell(json_, report, pair_rows(report), ("measure", "horizon", *VIEWS))


def pair_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each view of the same physics costs per step, and what is between them."""
    return [
        {
            "measure": name,
            "horizon": horizon,
            **{view: mean_sem(entry[view]["per_step"]) if view in entry else "" for view in VIEWS},
        }
        for name, by_horizon in report["measures"].items()
        for horizon, entry in by_horizon.items()
    ]


def refuse_any_of_a_run(given: typer.Context, store: str) -> None:
    """An embedding store is read out, and knows none of the options of a run's probe."""
    for name in OF_A_RUN:
        if getattr(given.get_parameter_source(name), "name", "") == "COMMANDLINE":
            option = "a second STORE" if name == "store" else f"--{name}"
            raise InvalidValueError(
                f"{option} does not go with {store}, an embedding store that is read out; leave it out, or give a run"
            )


def holds_store(place: str) -> bool:
    """Whether there is a store, rather than a run or nothing."""
    from pvrpipe.schemas.errors import NotAStoreError
    from pvrpipe.store.reading import Store

    try:
        Store.open(place)
    except NotAStoreError:
        return False
    return True


def read_out(store: str, seed: int, json_: bool) -> None:
    """What an embedding store contains, as a table."""
    from pvrpipe.worldmodel.readout import READERS, TARGETS
    from pvrpipe.worldmodel.readout import read_out as measure

    with watching("readout", "updates") as progress:
        report = measure(store, seed=seed, progress=progress)
    warn_of_random(report)
    rows = [
        {"target": target, "reader": reader, **report[target][reader]}
        for target in TARGETS
        if target in report
        for reader in (*READERS, "mean")
    ]
    tell(json_, report, rows, ("target", "reader", "r2", "mae"))


def warn_of_random(report: Mapping[str, Any]) -> None:
    """Say that nobody trained the encoder, where that is so."""
    if report["random_weights"]:
        note(f"{report['pvr']}: RANDOM WEIGHTS, nobody trained this encoder")


def runs(root: Root = DATA, json_: Json = False, debug: Debug = False) -> None:
    """List the runs of the workspace: what is trained on what, how far, and its last losses.

    Example: pvrpipe runs
    """
    from pvrpipe.worldmodel.runs import listed

    rows = listed(root / "runs")
    if not rows and not json_:
        note(f"there is no run in {root / 'runs'}; make one with `pvrpipe train-model`")
    columns = ("run", "model", "size", "pvr", "state", "updates", "wanted", "loss", "val_loss")
    tell(json_, {"runs": rows}, rows, columns)
