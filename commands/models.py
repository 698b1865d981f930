"""``train-model`` and ``probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pvrpipe.commands.options import (
    DATA,
    Debug,
    Device,
    Json,
    Overwrite,
    Root,
    Seed,
    environment_of,
    pick_device,
    took,
)
from pvrpipe.commands.terminal import ERROR_COLUMNS, error_rows, note, tell, watching


def train_model(
    store: Annotated[
        str | None,
        typer.Argument(help="Embeddings, or rollouts to learn from pixels; default: the newest embeddings."),
    ] = None,
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run; default: named after its parts.")
    ] = None,
    model: Annotated[str, typer.Option(help="dreamerv3, tdmpc2 or dinowm.")] = "dreamerv3",
    size: Annotated[
        str, typer.Option(help="Model size: 1m 12m 25m … (dreamerv3), 1m 5m 19m … (tdmpc2, dinowm).")
    ] = "1m",
    updates: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 1000,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows per batch; default: the paper's.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Rows per window; default: the paper's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Default: the paper's.")] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Updates over which dreamerv3's learning rate rises.")
    ] = 1000,
    encoder: Annotated[
        Literal["auto", "linear", "mlp", "attention", "cnn"],
        typer.Option(help="How the model reads embeddings, tokens or frames; auto: the first that fits."),
    ] = "auto",
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
    from pvrpipe.store.places import place_of
    from pvrpipe.store.reading import Store
    from pvrpipe.store.workspace import Workspace

    store = store or str(took("embeddings", Workspace(root).newest_embeddings()))

    from pvrpipe.worldmodel.training import TrainConfig, train  # torch: after the mistakes

    label = Workspace(root).label_of(store) or f"{environment_of(store)}-{place_of(store).name}"
    scratch = "" if Store.open(store).manifest.kind == "embeddings" else "-scratch"
    name = f"{label.removeprefix('dmc-').removeprefix('dmc:')}{scratch}-{model}-{size}-s{seed}"
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
        encoder=encoder,
        symlog_inputs=symlog,
        burn_in=burn_in,
        proprioception=proprioception,
        pixels=pixels,
    )
    with watching("train", "updates", f"training {model} {size} into {run}") as progress:
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
    if metrics["random_weights"]:
        note(f"{metrics['pvr']}: RANDOM WEIGHTS, nobody trained this encoder")
    tell(json_, metrics, error_rows(metrics), ERROR_COLUMNS)
