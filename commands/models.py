"""``train-model``, ``probe`` and ``runs``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pvrpipe.commands.options import (
    DATA,
    Address,
    Debug,
    Device,
    Json,
    Overwrite,
    Root,
    Seed,
    Workers,
    environment_of,
    pick_device,
    took,
)
from pvrpipe.commands.terminal import ERROR_COLUMNS, error_rows, note, tell, watching
from pvrpipe.schemas.progress import silent

LOG_EVERY = 50  # updates between two lines of training losses, or fewer, so that each checkpoint has one
MODELS = "dreamerv3, tdmpc2 or dinowm."
SIZES = "Model size: 1m 12m 25m … (dreamerv3), 1m 5m 19m … (tdmpc2, dinowm)."

Updates = Annotated[int, typer.Option(min=1, help="Gradient steps.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Windows per batch; default: the paper's.")]
Length = Annotated[int | None, typer.Option(min=1, help="Rows per window; default: the paper's.")]
LearningRate = Annotated[float | None, typer.Option(min=0.0, help="Default: the paper's.")]
Warmup = Annotated[int, typer.Option(min=0, help="Updates over which dreamerv3's learning rate rises.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="What products are computed in.")]
ValidateEvery = Annotated[
    int, typer.Option(min=1, help="Updates between two checkpoints, each with validation losses.")
]
Patience = Annotated[
    int, typer.Option(min=0, help="Stop after so many checkpoints without a better validation; 0: never.")
]
Encoder = Annotated[
    Literal["auto", "linear", "mlp", "attention", "cnn"],
    typer.Option(help="How the model reads embeddings, tokens or frames; auto: the first that fits."),
]


def train_model(
    store: Annotated[
        str | None,
        typer.Argument(help="Embeddings, or rollouts to learn from pixels; default: the newest embeddings."),
    ] = None,
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run; default: named after its parts.")
    ] = None,
    model: Annotated[str, typer.Option(help=MODELS)] = "dreamerv3",
    size: Annotated[str, typer.Option(help=SIZES)] = "1m",
    updates: Updates = 1000,
    batch: Batch = None,
    length: Length = None,
    learning_rate: LearningRate = None,
    warmup: Warmup = 1000,
    precision: Precision = "fp32",
    validate_every: ValidateEvery = 500,
    patience: Patience = 0,
    encoder: Encoder = "auto",
    symlog: Annotated[bool, typer.Option(help="dreamerv3: squash embeddings by symlog.")] = True,
    burn_in: Annotated[
        int, typer.Option(min=0, help="dreamerv3: rows before each window that only carry the state to it.")
    ] = 0,
    proprioception: Annotated[
        bool, typer.Option("--proprioception", help="dinowm: see and predict the state too.")
    ] = False,
    pixels: Annotated[int, typer.Option(min=16, help="Side of frames, when learning from them.")] = 64,
    backing: Annotated[
        Literal["auto", "mapped", "ram", "device"],
        typer.Option(help="Where windows are read from: files, memory, or the device's memory."),
    ] = "auto",
    engine: Annotated[
        Literal["ray", "inline"],
        typer.Option(help="This process, or those torchrun starts; or with ray so many --workers."),
    ] = "inline",
    address: Address = None,
    workers: Workers = None,
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
    from pvrpipe.store.workspace import Workspace

    store = store or str(took("embeddings", Workspace(root).newest_embeddings()))

    from pvrpipe.worldmodel.ranks import joined, of_several  # torch: after the mistakes
    from pvrpipe.worldmodel.training import TrainConfig, train

    first = of_several().rank == 0

    run = run or Workspace(root).run(f"{run_label(root, store)}-{model}-{size}-s{seed}")
    config = TrainConfig(
        model=model,
        size=size,
        updates=updates,
        batch=batch,
        length=length,
        seed=seed,
        learning_rate=learning_rate,
        warmup=warmup,
        encoder=encoder,
        symlog_inputs=symlog,
        burn_in=burn_in,
        proprioception=proprioception,
        pixels=pixels,
        precision=precision,
        patience=patience,
        save_every=validate_every,
        log_every=math.gcd(validate_every, LOG_EVERY),
    )
    with watching("train", "updates", f"training {model} {size} into {run}") as progress:
        asked: dict[str, Any] = {
            "overwrite": overwrite,
            "backing": backing,
            "progress": progress if first else silent,
        }
        if engine == "ray":
            from pvrpipe.worldmodel.ray_engine import train_together

            result = train_together(
                config,
                store,
                run.absolute(),
                workers=workers or 1,
                device=pick_device(device),
                address=address,
                **asked,
            )
        else:
            with joined(pick_device(device)) as own:
                result = train(config, store, run, device=own, **asked)
    if not first:
        return
    note(f"windows came from {result.backing}")
    tell(json_, result, [result], ("run", "updates", "updates_per_second", "data_wait_fraction"))


def run_label(root: Path, store: str) -> str:
    """What the names of a store's runs begin with."""
    from pvrpipe.store.places import place_of
    from pvrpipe.store.reading import Store
    from pvrpipe.store.workspace import Workspace

    label = Workspace(root).label_of(store) or f"{environment_of(store)}-{place_of(store).name}"
    scratch = "" if Store.open(store).manifest.kind == "embeddings" else "-scratch"
    return label.removeprefix("dmc-").removeprefix("dmc:") + scratch


def probe(
    run: Annotated[
        str | None,
        typer.Argument(help="Folder of a run, or an embedding store to read out; default: the newest run."),
    ] = None,
    store: Annotated[
        str | None, typer.Argument(help="Store or URL to probe the run on; default: the run's own.")
    ] = None,
    horizon: Annotated[list[int], typer.Option(min=1, help="Rows to accumulate over; repeatable.")] = [
        33,
        500,
    ],
    context: Annotated[int, typer.Option(min=1, help="Rows seen before predicting.")] = 1,
    split: Annotated[
        list[str], typer.Option(help="Which episodes, val or train; repeatable, the first is reported.")
    ] = ["val"],
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

    if run is not None and not (Path(run) / RUN).exists() and holds_store(run):
        read_out(run, seed, json_)
        return
    folder = took("run", Workspace(root).newest_run()) if run is None else Path(run)

    from pvrpipe.worldmodel.probe import probe as measure  # torch: after the mistakes

    with watching("probe", "episodes") as progress:
        metrics = measure(
            folder,
            store,
            horizons=horizon,
            context=context,
            split=split,
            seed=seed,
            device=pick_device(device),
            progress=progress,
        )
    warn_of_random(metrics)
    tell(json_, metrics, error_rows(metrics), ERROR_COLUMNS)


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
    tell(json_, {"runs": rows}, rows, ("run", "model", "size", "pvr", "state", "updates", "loss", "val_loss"))
