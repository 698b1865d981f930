"""``pretrain``, ``embed`` and ``pvrs``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from pvrpipe.commands.options import (
    DATA,
    Address,
    Debug,
    Device,
    Engine,
    Format,
    Json,
    Overwrite,
    ReadoutOptions,
    Root,
    Seed,
    Workers,
    check_engine,
    environment_of,
    pvr_label,
    sharing,
    took,
)
from pvrpipe.commands.terminal import duration, note, tell, watching
from pvrpipe.schemas.errors import InvalidValueError


@sharing
def embed(
    rollouts: Annotated[str | None, typer.Argument(help="Rollout store or URL; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Embedding store to write; for one PVR.")] = None,
    pvr: Annotated[
        list[str],
        typer.Option(help="A name that `pvrpipe pvrs` lists, or the folder of your own; repeatable."),
    ] = ["vc1"],
    weights: Annotated[
        list[str], typer.Option(help="auto, FILE_OR_FOLDER or random:SEED; once, or once per --pvr.")
    ] = ["auto"],
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="What embeddings are stored in.")
    ] = "float16",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="What they are computed in.")] = "fp32",
    *,
    part: ReadoutOptions,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Frames per batch; default: up to 32 on a CPU, on a GPU what fits."),
    ] = None,
    format_: Format = "parquet",
    append: Annotated[
        bool, typer.Option("--append", help="Embed what the rollout store has grown by, as a new revision.")
    ] = False,
    device: Device = "auto",
    engine: Engine = "ray",
    address: Address = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would write and how long it would take.")
    ] = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Push the frames of a rollout store through frozen encoders, each frame decoded once.

    Example: pvrpipe embed --pvr vc1 --pvr dinov2-b
    """
    from pvrpipe.store.workspace import Workspace

    check_engine(engine, address, workers, device)
    if len(weights) not in (1, len(pvr)):
        raise InvalidValueError(
            f"{len(weights)} --weights for {len(pvr)} --pvr; give one for all, or one for each in order"
        )
    if out is not None and len(pvr) > 1:
        raise InvalidValueError(
            f"OUT is one store, but {len(pvr)} --pvr were given; leave OUT out, or embed one at a time"
        )
    rollouts = rollouts or str(took("rollouts", Workspace(root).newest_rollouts()))
    environment = environment_of(rollouts)
    label = Workspace(root).label_of(rollouts) or environment
    asked = list(zip(pvr, weights * (len(pvr) // len(weights)), strict=True))
    readout = part.readout
    folders = [out or Workspace(root).embeddings(label, pvr_label(*each, readout)) for each in asked]

    from pvrpipe.pipeline.embed import EmbedConfig, estimate  # torch takes seconds: after the mistakes
    from pvrpipe.pipeline.embed import embed as run
    from pvrpipe.pipeline.encoders import EncoderRequest

    outputs, about = [], []
    for (name, source), folder in zip(asked, folders, strict=True):
        outputs.append((EncoderRequest(name, source, precision, device, batch, readout=readout), folder))
        about.append(f"embedding with {name} into {folder}")
    config = EmbedConfig(
        dtype=dtype,
        engine=engine,
        address=address,
        workers=workers,
        overwrite=overwrite,
        append=append,
        shard_format=format_,
    )
    if dry_run:
        estimates = estimate(rollouts, outputs, config)
        columns = ("store", "pvr", "shape", "shards", "rows", "bytes", "batch", "frames_per_second", "hours")
        shown = [{**asdict(each), "hours": duration(each.hours)} for each in estimates]
        return tell(json_, {"dry_run": True, "stores": estimates}, shown, columns)
    with watching("embed", "frames", *about) as progress:
        results = run(rollouts, outputs, config, progress)
    for result in results:
        if result.smaller_batches:
            note(
                f"{result.pvr}: memory did not suffice for batches of {result.batch} in {result.smaller_batches} "
                "shards; they had smaller ones, and the store says so"
            )
        if result.random_weights:
            note(
                f"{result.pvr}: RANDOM WEIGHTS, nobody trained this encoder; its store and all that follows say so"
            )
    return tell(
        json_,
        {"stores": results},
        results,
        ("store", "pvr", "shape", "rows", "resumed_shards", "frames_per_second"),
    )


def pretrain(
    method: Annotated[
        Literal["autoencoder", "mae", "atc", "curl"],
        typer.Argument(help="Pixels made again; hidden patches; what comes later; another crop."),
    ],
    rollouts: Annotated[str | None, typer.Argument(help="Rollout store or URL; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder of the encoder, for `embed --pvr`.")] = None,
    size: Annotated[int, typer.Option(help="Pixels of a side that the network sees.")] = 64,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps; default: 1000 (autoencoder) or 2000.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames per batch.")] = 64,
    device: Device = "auto",
    engine: Annotated[
        Literal["ray", "inline"],
        typer.Option(help="This process, or a worker of a Ray cluster, on a GPU if --device says so."),
    ] = "inline",
    address: Address = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train a representation of your own on a store's frames: a small CNN, or with mae a small ViT.

    Example: pvrpipe pretrain autoencoder && pvrpipe embed --pvr data/pvrs/dmc-pendulum-swingup-autoencoder
    """
    from pvrpipe.pipeline.pretraining import UPDATES, WIDTHS, PretrainConfig
    from pvrpipe.pipeline.pretraining import pretrain as train
    from pvrpipe.schemas.addresses import refuse_url
    from pvrpipe.store.places import place_of
    from pvrpipe.store.workspace import Workspace

    check_engine(engine, address, device=device)
    rollouts = rollouts or str(took("rollouts", Workspace(root).newest_rollouts()))
    label = Workspace(root).label_of(rollouts) or environment_of(rollouts)
    out = out or Workspace(root).pvr(label, method)
    refuse_url(out)  # made absolute it looks like a path
    updates = updates or UPDATES[method]
    config = PretrainConfig(method, size, width=WIDTHS[method], updates=updates, batch=batch, seed=seed)
    with watching("pretrain", "updates", f"training by {method} into {out}") as progress:
        work = partial(train, place_of(rollouts).resolve(), out.absolute(), config, overwrite, device=device)
        if engine == "ray":
            from pvrpipe.pipeline.ray_engine import run_one

            result = run_one(work, address, device, progress)
        else:
            result = work(progress=progress)
    tell(json_, result, [result], ("pvr", "updates", "loss", "val_loss", "val_accuracy", "reused"))


def pvrs(json_: Json = False, debug: Debug = False) -> None:
    """List the representations: width, licence, what they were trained on, their groups, where the weights are.

    Example: pvrpipe pvrs
    """
    from urllib.parse import urlsplit

    from pvrpipe.pipeline.cached import cached_weights
    from pvrpipe.pipeline.zoo import all_pvrs

    known, failed = all_pvrs()
    listed = list(known.values())
    rows = [
        {
            "pvr": p.name,
            "title": p.title,
            "width": p.width,
            "licence": p.licence,
            "weights": p.source.repo or p.source.url,
            "revision": p.source.revision,
            "file": p.source.file,
            "sha256": p.source.sha256,
            "md5": p.source.md5,
            "note": p.source.note,
            "cached": cached_weights(p) is not None,
            "architecture": p.architecture,
            "layer": p.layer,
            "pool": p.pooling,
            "vit": p.is_transformer,
            **p.properties.model_dump(),
        }
        for p in listed
    ]
    groups = ("vit", "language", "sequential", "diverse")
    shown = [
        {
            **row,
            "groups": ", ".join(group for group in groups if row[group]),
            "weights": p.source.repo or urlsplit(p.source.url or "").hostname or "a file",
            "revision": (p.source.revision or "")[:7],
            "cached": "yes" if row["cached"] else "",
        }
        for row, p in zip(rows, listed, strict=True)
    ]
    columns = ("pvr", "width", "licence", "trained_on", "groups", "weights", "revision", "cached")
    tell(json_, {"pvrs": rows}, shown, columns)
    for p in listed:
        if p.source.note:
            note(f"{p.name}: {p.source.note}")
    for error in failed:
        note(str(error))
