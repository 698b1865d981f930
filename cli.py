"""The command line: parse, call one function, print. ``--json`` prints one object as the last line of stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pvrpipe.commands.terminal import ERROR_COLUMNS, error_rows, note, show, tell, watching
from pvrpipe.schemas.errors import InvalidValueError, PvrpipeError, one_line

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich"
)
pretrain = typer.Typer(
    no_args_is_help=True, help="Train a representation of your own on the frames of a rollout store."
)
app.add_typer(pretrain, name="pretrain")

Root = Annotated[Path, typer.Option(envvar="PVRPIPE_ROOT", help="Workspace that supplies the default paths.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")]
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
SHARED = ("store", "url", "files", "resumed", "bytes", "licence")
REWRITTEN = ("store", "id", "episodes", "rows", "shards", "resumed_shards", "bytes")
CONVERTED = ("store", "format", "episodes", "rows", "bytes")
STOPPED = 130  # what typer returns for Ctrl-C


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 1, a stop leaves what is finished."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own log files keep the rest
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    try:
        status = app(standalone_mode=False)
    except PvrpipeError as error:
        if "--debug" in sys.argv:
            raise
        fail(one_line(error), 1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own: wrong usage
            error.show()
            sys.exit(error.exit_code)
        raise
    if status == STOPPED:
        again = "without --overwrite " if "--overwrite" in sys.argv else ""
        fail(
            f"stopped; what is finished is kept. Run the same command {again}again to go on from there.",
            STOPPED,
        )
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> None:
    """Say it on stderr and leave."""
    print(f"pvrpipe: {message}", file=sys.stderr)
    sys.exit(status)


@app.command()
def collect(
    env: Annotated[
        str, typer.Argument(help="Environment, e.g. dmc:walker-walk; `pvrpipe envs` lists them.")
    ] = "dmc:pendulum-swingup",
    out: Annotated[Path | None, typer.Argument(help="Rollout store to write.")] = None,
    size: Annotated[int, typer.Option(help="Pixels of a side of the square frames.")] = 256,
    camera: Annotated[str, typer.Option(help="Number or name of a camera.")] = "0",
    action_repeat: Annotated[int, typer.Option(help="Simulator steps per action; rewards are summed.")] = 2,
    episodes: Annotated[int, typer.Option(help="Episodes to collect.")] = 24,
    max_steps: Annotated[
        int | None, typer.Option(help="Transitions per episode; default: the task's limit.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="random, ou, mpc, or a mixture such as random:0.5,mpc+0.3:0.5.")
    ] = "random:0.5,mpc:0.5",
    shard_rows: ShardRows = None,
    format_: Format = "parquet",
    append: Annotated[
        bool, typer.Option("--append", help="Let a finished store grow to --episodes, as a new revision.")
    ] = False,
    seed: Seed = 0,
    engine: Engine = "ray",
    address: Address = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Collect rollouts of an environment into a store.

    Example: pvrpipe collect dmc:walker-walk --episodes 100 --policy random:0.3,mpc:0.7
    """
    from pvrpipe.rollouts.collect import CollectConfig
    from pvrpipe.rollouts.collect import collect as run
    from pvrpipe.store.workspace import Workspace

    out = out or Workspace(root).rollouts(env)
    config = CollectConfig(
        environment=env,
        size=size,
        camera=int(camera) if camera.lstrip("-").isdecimal() else camera,
        action_repeat=action_repeat,
        episodes=episodes,
        max_steps=max_steps,
        policy=policy,
        seed=seed,
        shard_rows=shard_rows,
        shard_format=format_,
    )
    note(f"collecting {env} into {out}")
    with watching("collect", "frames") as progress:
        result = run(
            config,
            out,
            engine=engine,
            address=address,
            workers=workers,
            overwrite=overwrite,
            append=append,
            progress=progress,
        )
    tell(
        json_,
        result,
        [result],
        ("store", "episodes", "rows", "shards", "resumed_shards", "frames_per_second"),
    )


@app.command()
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
    batch: Annotated[
        int | None, typer.Option(min=1, help="Frames per batch; default: 32 on a CPU, 256 on a GPU.")
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
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Push the frames of a rollout store through frozen encoders, each frame decoded once.

    Example: pvrpipe embed --pvr vc1 --pvr dinov2-b
    """
    from pvrpipe.store.workspace import Workspace

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
    asked = list(zip(pvr, weights * (len(pvr) // len(weights)), strict=True))
    folders = [out or Workspace(root).embeddings(environment, pvr_label(*each)) for each in asked]

    from pvrpipe.pipeline.embed import EmbedConfig  # torch takes seconds to import: after the mistakes
    from pvrpipe.pipeline.embed import embed as run
    from pvrpipe.pipeline.encoders import EncoderRequest

    outputs = []
    for (name, source), folder in zip(asked, folders, strict=True):
        outputs.append((EncoderRequest(name, source, precision, device, batch), folder))
        note(f"embedding with {name} into {folder}")
    config = EmbedConfig(
        dtype=dtype,
        engine=engine,
        address=address,
        workers=workers,
        overwrite=overwrite,
        append=append,
        shard_format=format_,
    )
    with watching("embed", "frames") as progress:
        results = run(rollouts, outputs, config, progress)
    for result in results:
        if result.random_weights:
            note(
                f"{result.pvr}: RANDOM WEIGHTS, nobody trained this encoder; its store and all that follows say so"
            )
    tell(
        json_,
        {"stores": results},
        results,
        ("store", "pvr", "shape", "rows", "resumed_shards", "frames_per_second"),
    )


@app.command("train-model")
def train_model(
    store: Annotated[str | None, typer.Argument(help="Embedding store or URL; default: the newest.")] = None,
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run; default: named after its parts.")
    ] = None,
    model: Annotated[str, typer.Option(help="dreamerv3 or tdmpc2.")] = "dreamerv3",
    size: Annotated[
        str, typer.Option(help="Model size: 1m 12m 25m … (dreamerv3), 1m 5m 19m … (tdmpc2).")
    ] = "1m",
    updates: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 1000,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows per batch; default: the paper's.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Rows per window; default: the paper's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Default: the paper's.")] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Updates over which dreamerv3's learning rate rises.")
    ] = 1000,
    backing: Annotated[
        Literal["auto", "mapped", "ram", "device"],
        typer.Option(help="Where windows are read from: files, memory, or the device's memory."),
    ] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train a world model offline from an embedding store; the same command resumes it.

    Example: pvrpipe train-model --model tdmpc2 --size 5m --updates 20000
    """
    from pvrpipe.store.places import place_of
    from pvrpipe.store.workspace import Workspace

    store = store or str(took("embeddings", Workspace(root).newest_embeddings()))

    from pvrpipe.worldmodel.training import TrainConfig, train  # torch: after the mistakes

    name = f"{environment_of(store)}-{place_of(store).name}-{model}-{size}-s{seed}".removeprefix("dmc:")
    run = run or Workspace(root).run(name)
    config = TrainConfig(
        model=model,
        size=size,
        updates=updates,
        batch=batch,
        length=length,
        seed=seed,
        learning_rate=learning_rate,
        warmup=warmup,
    )
    note(f"training {model} {size} into {run}")
    with watching("train", "updates") as progress:
        result = train(
            config,
            store,
            run,
            device=pick_device(device),
            overwrite=overwrite,
            backing=backing,
            progress=progress,
        )
    note(f"windows came from {result.backing}")
    tell(json_, result, [result], ("run", "updates", "updates_per_second", "data_wait_fraction"))


@app.command()
def probe(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run; default: the newest.")] = None,
    store: Annotated[
        str | None, typer.Argument(help="Embedding store or URL; default: the run's own.")
    ] = None,
    horizon: Annotated[list[int], typer.Option(min=1, help="Rows to accumulate over; repeatable.")] = [
        33,
        500,
    ],
    split: Annotated[str, typer.Option(help="Which episodes: val or train.")] = "val",
    seed: Seed = 0,
    device: Device = "auto",
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a run's dynamics and reward errors on held-out episodes, beside two controls.

    Example: pvrpipe probe data/runs/pendulum-swingup-vc1-dreamerv3-1m-s0 --horizon 15 --horizon 50
    """
    from pvrpipe.store.workspace import Workspace

    run = run or took("run", Workspace(root).newest_run())

    from pvrpipe.worldmodel.probe import probe as measure  # torch: after the mistakes

    with watching("probe", "episodes") as progress:
        metrics = measure(
            run,
            store,
            horizons=horizon,
            split=split,
            seed=seed,
            device=pick_device(device),
            progress=progress,
        )
    tell(json_, metrics, error_rows(metrics), ERROR_COLUMNS)


@pretrain.command("autoencoder")
def pretrain_autoencoder(
    rollouts: Annotated[str | None, typer.Argument(help="Rollout store or URL; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder of the encoder, for `embed --pvr`.")] = None,
    size: Annotated[int, typer.Option(help="Pixels of a side that the network sees.")] = 64,
    updates: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Frames per batch.")] = 64,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small convolutional autoencoder on a store's own frames.

    Example: pvrpipe pretrain autoencoder && pvrpipe embed --pvr data/pvrs/dmc-pendulum-swingup-autoencoder
    """
    from pvrpipe.pipeline.pretraining import PretrainConfig
    from pvrpipe.pipeline.pretraining import pretrain_autoencoder as train
    from pvrpipe.store.workspace import Workspace

    rollouts = rollouts or str(took("rollouts", Workspace(root).newest_rollouts()))
    out = out or Workspace(root).pvr(environment_of(rollouts), "autoencoder")
    config = PretrainConfig(size=size, updates=updates, batch=batch, seed=seed)
    note(f"training an autoencoder into {out}")
    with watching("pretrain", "updates") as progress:
        result = train(rollouts, out, config, overwrite, progress)
    tell(json_, result, [result], ("pvr", "updates", "loss", "val_loss", "reused"))


@app.command()
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
    from pvrpipe.store.reading import Store

    opened = Store.open(store)
    found = describe(opened)
    if picture is not None:
        from pvrpipe.store.picturing import draw

        draw(opened, picture)
        note(f"drawn in {picture}")
    if json_:
        return tell(True, found, [], ())
    for key in ("kind", "environment", "id", "episodes", "rows", "shards", "bytes"):
        print(f"{key:12} {found[key]}")
    if found["random_weights"]:
        print("RANDOM WEIGHTS: nobody trained this encoder")
    columns = [{**c, "mapped": found["mapped"].get(c["name"], "")} for c in found["columns"]]
    show(columns, ("name", "dtype", "shape", "layout", "mapped"))
    return show(
        found["returns"], ("policy", "split", "episodes", "mean_return", "best_return", "mean_length")
    )


@app.command()
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
    """Check every byte and number of a store; exit status 1 and what fails, if anything does.

    Example: pvrpipe verify data/embeddings/dmc-pendulum-swingup/vc1
    """
    from pvrpipe.store.verifying import verify as check

    with watching("verify", "shards") as progress:
        failures = check(store, progress, sample)
    report: dict[str, object] = {"ok": not failures, "failures": failures}
    if golden and not failures:
        from pvrpipe.pipeline.golden import check_golden
        from pvrpipe.store.reading import Store

        checked = check_golden(Store.open(store), pvr, weights, device)
        report |= {"ok": checked.ok, "golden": checked}
        note(
            f"golden frames: largest difference {checked.largest_difference:.3g}, "
            f"smallest cosine {checked.smallest_cosine:.6f}"
            + (f"; another encoder: {checked.differs}" if checked.differs else "")
        )
    tell(json_, report, failures, ("where", "what"))
    if not report["ok"]:
        raise typer.Exit(1)
    if not json_:
        print(f"{store}: every byte and number{' of the sample' if sample else ''} holds")


@app.command()
def push(
    store: Annotated[str, typer.Argument(help="A store on this machine.")],
    url: Annotated[str, typer.Argument(help="s3://BUCKET/NAME, hf://datasets/OWNER/NAME, or a folder.")],
    workers: Annotated[int, typer.Option(min=1, help="Files at once.")] = 8,
    overwrite: Overwrite = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a store that verifies; the same command goes on after a stop.

    Example: pvrpipe push data/embeddings/dmc-pendulum-swingup/vc1 s3://lab/pendulum-vc1
    """
    from pvrpipe.store.sharing import push as run

    with watching("push", "MiB") as progress:
        result = run(store, url, workers=workers, overwrite=overwrite, progress=progress)
    if result.resumed == result.files:
        note(f"{url} holds all of it already; nothing was pushed")
    if result.licence is not None:
        note(f"the embeddings go under the licence of their encoder's weights: {result.licence}")
    tell(json_, result, [result], SHARED)


@app.command()
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
    """Fetch a published store, every byte checked; the same command goes on after a stop.

    Example: pvrpipe pull s3://lab/pendulum-vc1
    """
    from pvrpipe.store.places import place_of
    from pvrpipe.store.remote import Source
    from pvrpipe.store.sharing import pull as run
    from pvrpipe.store.workspace import Workspace

    folder = folder or Workspace(root).home(Source(place_of(url)).manifest()[1])
    note(f"pulling into {folder}")
    with watching("pull", "MiB") as progress:
        result = run(url, folder, workers=workers, progress=progress)
    if result.resumed == result.files:
        note(f"{folder} holds all of it already; nothing was pulled")
    tell(json_, result, [result], SHARED)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
    tell(json_, result, [result], ("store", "card", "croissant", "licence"))


@app.command()
def envs(json_: Json = False, debug: Debug = False) -> None:
    """List the environments.

    Example: pvrpipe envs
    """
    from pvrpipe.rollouts.environments import list_environments

    names = [{"env": name} for name in list_environments()]
    tell(json_, {"envs": [row["env"] for row in names]}, names, ("env",))


@app.command()
def pvrs(json_: Json = False, debug: Debug = False) -> None:
    """List the representations: width, licence, where the weights are.

    Example: pvrpipe pvrs
    """
    from pvrpipe.pipeline.pvrs import PVRS

    rows = [
        {
            "pvr": p.name,
            "title": p.title,
            "width": p.width,
            "licence": p.licence,
            "weights": p.source.repo or p.source.url,
            "revision": p.source.revision,
        }
        for p in PVRS.values()
    ]
    tell(json_, {"pvrs": rows}, rows, ("pvr", "title", "width", "licence", "weights"))


@app.command()
def doctor(root: Root = DATA, json_: Json = False, debug: Debug = False) -> None:
    """Check what pvrpipe needs of this machine, and print the command that mends what fails.

    Example: pvrpipe doctor
    """
    from pvrpipe.commands.doctor import examine

    checks = examine(root)
    ok = all(check.ok for check in checks if check.needed)
    tell(json_, {"ok": ok, "checks": checks}, checks, ("check", "ok", "found", "mend"))
    if not ok:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Workspace of the demonstration.")] = Path("demo"),
    episodes: Annotated[int, typer.Option(help="Episodes to collect.")] = 12,
    max_steps: Annotated[int, typer.Option(help="Transitions per episode.")] = 200,
    updates: Annotated[int, typer.Option(help="Gradient steps per network.")] = 300,
    engine: Engine = "ray",
    seed: Seed = 0,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Go the whole way on a real environment: collect, pretrain, embed, train, probe, compare.

    Example: pvrpipe demo
    """
    from pvrpipe.commands.demo import DemoConfig, demonstrate

    rows = demonstrate(out, DemoConfig(episodes, max_steps, updates, seed, engine))
    tell(json_, {"table": rows}, rows, ("pvr", "model", *ERROR_COLUMNS))


def took(what: str, path: Path) -> Path:
    """Say which default was taken."""
    note(f"taking the newest {what}: {path}")
    return path


def environment_of(store: str) -> str:
    """The environment of a rollout or embedding store."""
    from pvrpipe.store.reading import Store

    return Store.open(store).manifest.rollouts.environment


def pvr_label(pvr: str, weights: str) -> str:
    """A folder's name for an encoder: an own one by what it is, a random one as what it is."""
    from pvrpipe.pipeline.pvrs import find_pvr

    return find_pvr(pvr).name + ("-" + weights if weights.startswith("random") else "")


def pick_device(device: str) -> str:
    """Resolve ``auto``, and refuse a GPU that is not there."""
    from pvrpipe.pipeline.encoders import EncoderRequest

    return str(EncoderRequest("", device=device).resolved_device())


if __name__ == "__main__":
    main()
