"""What is done with a finished store: from ``inspect`` and ``verify`` to ``push``, ``merge`` and ``convert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pvrpipe.commands.options import DATA, Debug, Device, Json, Overwrite, Root, ShardRows
from pvrpipe.commands.terminal import note, show, tell, watching
from pvrpipe.schemas.errors import InvalidValueError

RUN_SHARED = ("run", "url", "files", "bytes")
SHARED = ("store", "url", "files", "resumed", "bytes", "licence")
REWRITTEN = ("store", "id", "episodes", "rows", "shards", "resumed_shards", "bytes")
CONVERTED = ("store", "format", "episodes", "rows", "bytes")


def inspect(
    store: Annotated[str, typer.Argument(help="A store, or its URL.")],
    picture: Annotated[
        Path | None, typer.Option(help="A .png to draw: frames, returns, actions, embeddings.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a store is: size, columns, provenance, returns.

    Example: pvrpipe inspect data/rollouts/dmc-pendulum-swingup --picture pendulum.png
    """
    from pvrpipe.store.describing import describe
    from pvrpipe.store.places import Url
    from pvrpipe.store.reading import Store

    opened = Store.open(store)
    found = describe(opened)
    if picture is not None:
        from pvrpipe.store.picturing import draw

        draw(opened, picture)
        note(f"drawn in {picture}")
    if isinstance(opened.path, Url) and len(opened.manifest.shards) > 1:
        note(
            "behind a URL, actions and states are those of the first shard; `pvrpipe pull` it to see all of them"
        )
    if json_:
        return tell(True, found, [], ())
    for key in ("kind", "environment", "id", "episodes", "rows", "shards", "bytes"):
        print(f"{key:12} {found[key]}")
    if found["kind"] == "embeddings":
        _tell_encoder(found["specification"])
    if found["random_weights"]:
        print("RANDOM WEIGHTS: nobody trained this encoder")
    if found["smaller_batches"]:
        print(f"smaller batches than specified in {found['smaller_batches']} shards: memory did not suffice")
    columns = [{**c, "mapped": found["mapped"].get(c["name"], "")} for c in found["columns"]]
    show(columns, ("name", "dtype", "shape", "layout", "mapped"))
    show(
        found["returns"],
        ("policy", "variation", "split", "episodes", "mean_return", "best_return", "mean_length"),
    )
    show(found["coverage"], ("of", "minimum", "mean", "maximum", "deviation", "bins_reached"))
    return show(found["failed"], ("episode", "seed", "policy", "reason"))


def _tell_encoder(made: dict[str, Any]) -> None:
    """Which encoder made a store's embeddings, of which weights, and of what of it."""
    encoder, computed = made["encoder"], made["computation"]
    weights, recipe = encoder["weights"], encoder["recipe"]
    file = f" {weights['file']}" if weights["file"] else ""
    print(f"encoder      {encoder['name']}: {encoder['title']}")
    print(f"weights      {weights['source']}{file}, tensors {weights['tensors_sha256'][:12]}…")
    print(f"embedding    layer {encoder['layer']}, {encoder['pooling']}, {encoder['shape']} {made['dtype']}")
    print(f"frames       {recipe['resize'] or 'as they are'}, crop {recipe['crop'] or 'none'}")
    print(f"computed     {computed['precision']} on {computed['device']}, batches of {computed['batch']}")


def preview(
    store: Annotated[str, typer.Argument(help="A rollout store, or its URL.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="A name without ending, for OUT.png and OUT.mp4; default: preview-<store>."),
    ] = None,
    episode: Annotated[
        list[int], typer.Option(help="Which; repeatable. Default: best, middle and worst by return.")
    ] = [],
    beside: Annotated[str | None, typer.Option(help="A replay of the store, shown beside it.")] = None,
    film: Annotated[
        Literal["mp4", "gif"] | None, typer.Option(help="Default: mp4 where PyAV is installed.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="Frames per second; default: as it happened, 30 at most.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a sheet of frames and a film of some episodes, with reward and actions under them.

    Example: pvrpipe preview data/rollouts/dmc-walker-walk --beside data/rollouts/dmc-walker-walk-fov=0.5
    """
    from pvrpipe.store.filming import can_write_mp4
    from pvrpipe.store.places import place_of
    from pvrpipe.store.previewing import preview as draw
    from pvrpipe.store.reading import Store

    opened = Store.open(store, kind="rollouts")
    base = out or Path(f"preview-{place_of(store).name}")
    kind = film or ("mp4" if can_write_mp4() else "gif")
    sheet, moving = (base.with_name(f"{base.name}.{ending}") for ending in ("png", kind))
    pair = Store.open(beside, kind="rollouts") if beside is not None else None
    result = draw(opened, sheet, moving, episode, pair, rate)
    tell(json_, result, [result], ("sheet", "film", "episodes", "frames"))


def verify(
    store: Annotated[str, typer.Argument(help="A store, or its URL.")],
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many shards only, of a store too big to read whole.")
    ] = None,
    golden: Annotated[
        bool, typer.Option("--golden", help="Embed the stored frames again and compare.")
    ] = False,
    pvr: Annotated[str | None, typer.Option(help="For --golden; default: the store's own.")] = None,
    weights: Annotated[str | None, typer.Option(help="For --golden: auto or FILE_OR_FOLDER.")] = None,
    device: Device = "auto",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Check every byte and number of a store, or of a run; exit status 1 and what fails, if anything does.

    Example: pvrpipe verify data/embeddings/dmc-pendulum-swingup/vc1
    """
    from pvrpipe.store.verifying import verify as check
    from pvrpipe.store.workspace import RUN

    if (Path(store) / RUN).is_file():
        from pvrpipe.worldmodel.sharing import verify_run

        if golden or sample:
            raise InvalidValueError(
                "--golden and --sample are of stores; a run is checked whole, without them"
            )
        return _tell_checked(store, {}, verify_run(Path(store)), json_)
    if golden:
        from pvrpipe.pipeline.golden import check_golden, refuse_ungolden
        from pvrpipe.store.places import place_of
        from pvrpipe.store.reading import Store
        from pvrpipe.store.remote import Source

        refuse_ungolden(Source(place_of(store)).manifest()[1], store, pvr)
    elif pvr or weights:
        raise InvalidValueError("--pvr and --weights say what --golden is to embed with; give --golden too")
    with watching("verify", "shards") as progress:
        failures = check(store, progress, sample)
    report: dict[str, object] = {}
    if golden and not failures:
        checked = check_golden(Store.open(store), pvr, weights, device)
        report, failures = {"golden": checked}, checked.failures
        note(f"golden frames: {checked.measured}")
    return _tell_checked(store, report, failures, json_, _extent(store, sample))


def _extent(store: str, sample: int | None) -> str:
    """How much of a store was read, where that is not all of it."""
    from pvrpipe.store.places import place_of
    from pvrpipe.store.remote import Source

    if sample is None or sample >= len(Source(place_of(store)).manifest()[1].shards):
        return ""
    return f" of a sample of {sample} shards"


def _tell_checked(
    store: str, more: Mapping[str, object], failures: list[Any], json_: bool, extent: str = ""
) -> None:
    """What a check found; exit status 1 if anything."""
    tell(json_, {"ok": not failures, "failures": failures, **more}, failures, ("where", "what"))
    if failures:
        raise typer.Exit(1)
    if not json_:
        print(f"{store}: every byte and number{extent} holds")


def push(
    store: Annotated[str, typer.Argument(help="A store on this machine.")],
    url: Annotated[str, typer.Argument(help="s3://BUCKET/NAME, hf://datasets/OWNER/NAME, or a folder.")],
    workers: Annotated[int, typer.Option(min=1, help="Files at once.")] = 8,
    overwrite: Overwrite = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a store, or a run, that verifies; the same command goes on after a stop.

    Example: pvrpipe push data/embeddings/dmc-pendulum-swingup/vc1 s3://lab/pendulum-vc1
    """
    from pvrpipe.store.sharing import push as run
    from pvrpipe.store.workspace import RUN

    if (Path(store) / RUN).is_file():
        from pvrpipe.worldmodel.sharing import push_run

        with watching("push", "files") as progress:
            pushed = push_run(Path(store), url, overwrite=overwrite, progress=progress)
        return tell(json_, pushed, [pushed], RUN_SHARED)
    with watching("push", "MiB") as progress:
        result = run(store, url, workers=workers, overwrite=overwrite, progress=progress)
    if result.resumed == result.files:
        how = "" if overwrite else ", by sizes and commit records"
        note(f"{url} holds all of it already{how}; nothing was pushed")
    if result.licence is not None:
        note(f"the embeddings go under the licence of their encoder's weights: {result.licence}")
    return tell(json_, result, [result], _told(SHARED, result.licence))


def pull(
    url: Annotated[str, typer.Argument(help="Where a store is published: any URL that fsspec reads.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where to; default: its place in the workspace.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files at once.")] = 8,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a published store or run, every byte checked; the same command goes on after a stop.

    Example: pvrpipe pull s3://lab/pendulum-vc1
    """
    from pvrpipe.schemas.errors import NotAStoreError
    from pvrpipe.store.places import place_of
    from pvrpipe.store.remote import Source
    from pvrpipe.store.sharing import pull as run
    from pvrpipe.store.workspace import Workspace

    try:
        manifest = Source(place_of(url)).manifest()[1]
    except NotAStoreError as error:
        return _pull_run(url, folder or Workspace(root).run(place_of(url).name), json_, error)
    folder = folder or Workspace(root).home(manifest)
    note(f"pulling into {folder}")
    with watching("pull", "MiB") as progress:
        result = run(url, folder, workers=workers, progress=progress)
    if result.resumed == result.files:
        note(f"{folder} holds all of it already; nothing was pulled")
    return tell(json_, result, [result], _told(SHARED, result.licence))


def _told(columns: tuple[str, ...], licence: str | None) -> tuple[str, ...]:
    """Columns of a table; rollouts have no licence that is known."""
    return tuple(name for name in columns if name != "licence" or licence is not None)


def _pull_run(url: str, folder: Path, json_: bool, otherwise: Exception) -> None:
    """Fetch a run; where there is none either, there is no store."""
    from pvrpipe.worldmodel.sharing import holds_run, pull_run

    if not holds_run(url):
        raise otherwise
    note(f"pulling into {folder}")
    with watching("pull", "files") as progress:
        result = pull_run(url, folder, progress=progress)
    tell(json_, result, [result], RUN_SHARED)


def merge(
    stores: Annotated[
        list[str], typer.Argument(help="Two stores or more, or their URLs; then OUT, the new one.")
    ],
    shard_rows: ShardRows = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Put stores of the same kind together as a new one; the same command goes on after a stop.

    Example: pvrpipe merge ours/vc1 s3://their-lab/vc1 both/vc1
    """
    from pvrpipe.store.merging import merge as run

    *sources, out = stores
    with watching("merge", "rows") as progress:
        result = run(sources, Path(out), shard_rows=shard_rows, overwrite=overwrite, progress=progress)
    if result.licence is not None:
        note(f"the strictest licence of the weights counts for all of it: {result.licence}")
    tell(json_, result, [result], REWRITTEN)


def split(
    store: Annotated[str, typer.Argument(help="A store, or its URL; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="The new store.")],
    where: Annotated[
        str | None, typer.Option(help="Which episodes, in SQL over the columns of the episode table.")
    ] = None,
    split_: Annotated[
        str | None, typer.Option("--split", help="Only those of a split: train or val.")
    ] = None,
    rest: Annotated[Path | None, typer.Option(help="Another new store, for the other episodes.")] = None,
    shard_rows: ShardRows = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Take the episodes that fulfil a condition into a new store.

    Example: pvrpipe split data/rollouts/dmc-walker-walk good --where "episode_return > 100 and policy = 'mpc'"
    """
    from pvrpipe.store.merging import split as run

    with watching("split", "rows") as progress:
        results = run(
            store,
            out,
            where=where,
            of=split_,
            rest=rest,
            shard_rows=shard_rows,
            overwrite=overwrite,
            progress=progress,
        )
    tell(json_, {"stores": results}, results, REWRITTEN)


def convert(
    store: Annotated[str, typer.Argument(help="A store, or its URL; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="The new store; or what is exported, for hdf5 a file.")],
    to: Annotated[
        Literal["parquet", "webdataset", "parquet-lists", "npy", "hdf5", "minari", "lerobot"] | None,
        typer.Option(help="A store in another format, or an export; default: the format it has."),
    ] = None,
    dtype: Annotated[
        Literal["float16", "float32"] | None, typer.Option(help="Of embeddings; default: as they are.")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write a store in another format or precision, or export it to a layout that others read.

    Example: pvrpipe convert data/embeddings/dmc-pendulum-swingup/vc1 vc1.h5 --to hdf5 --dtype float32
    """
    from pvrpipe.store.converting import convert as run

    with watching("convert", "rows") as progress:
        result = run(store, out, to, dtype=dtype, overwrite=overwrite, progress=progress)
    tell(json_, result, [result], CONVERTED)


def card(
    store: Annotated[Path, typer.Argument(help="A store on this machine.")],
    url: Annotated[str | None, typer.Option(help="Where it is or will be published.")] = None,
    creator: Annotated[str, typer.Option(help="Who made it: a person or a lab.")] = "unknown",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write what others find a store by: README.md with the Hub's metadata, and croissant.json.

    Example: pvrpipe card data/embeddings/dmc-pendulum-swingup/vc1 --creator "Our Lab"
    """
    from pvrpipe.store.publishing import write_cards

    result = write_cards(store, url=url, creator=creator)
    tell(json_, result, [result], _told(("store", "card", "croissant", "licence"), result.licence))
