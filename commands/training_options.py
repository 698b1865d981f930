"""How a model is trained: the options that ``train-model`` and ``sweep`` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pvrpipe.commands.options import ReadoutOptions, environment_of, pvr_label
from pvrpipe.schemas.errors import InvalidValueError

if TYPE_CHECKING:
    from pvrpipe.pipeline.tuning import TunedEncoder
    from pvrpipe.worldmodel.runs import RunRecord
    from pvrpipe.worldmodel.training import TrainConfig

LOG_EVERY = 50  # updates
MODELS = "dreamerv3, tdmpc2 or dinowm"
SIZES = "Model size: 1m 12m 25m … (dreamerv3), 1m 5m 19m … (tdmpc2, dinowm)"


def log_every(validate_every: int) -> int:
    """Updates between two lines of training losses: 50, or fewer, so that each checkpoint has one."""
    return math.gcd(validate_every, LOG_EVERY)


@dataclass(frozen=True)
class TrainOptions:
    """What is the same of every run of a command."""

    updates: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 1000
    batch: Annotated[int | None, typer.Option(min=1, help="Windows per batch; default: the paper's.")] = None
    length: Annotated[int | None, typer.Option(min=1, help="Rows per window; default: the paper's.")] = None
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Default: the paper's.")] = None
    warmup: Annotated[
        int, typer.Option(min=0, help="dreamerv3: updates over which its learning rate rises.")
    ] = 1000
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="What products are computed in.")] = (
        "fp32"
    )
    validate_every: Annotated[
        int, typer.Option(min=1, help="Updates between two checkpoints, each with validation losses.")
    ] = 500
    patience: Annotated[
        int,
        typer.Option(
            min=0, help="Stop after so many checkpoints no better than the best, and keep that; 0: never."
        ),
    ] = 0
    encoder: Annotated[
        Literal["auto", "linear", "mlp", "attention", "cnn"],
        typer.Option(help="How the model reads embeddings, tokens or frames; auto: the first that fits."),
    ] = "auto"
    symlog: Annotated[bool, typer.Option(help="dreamerv3: squash embeddings by symlog.")] = True
    burn_in: Annotated[
        int,
        typer.Option(
            min=0, help="dreamerv3: rows before each window, without losses, that carry the state to it."
        ),
    ] = 0
    joined: Annotated[
        bool,
        typer.Option(
            "--joined", help="dreamerv3: windows run on into the next episode, as in its authors' replay."
        ),
    ] = False
    proprioception: Annotated[
        bool, typer.Option("--proprioception", help="dinowm: see and predict the state too.")
    ] = False
    pixels: Annotated[int, typer.Option(min=16, help="Side of frames, when learning from them.")] = 64
    pvr: Annotated[
        str | None,
        typer.Option(
            help="Look at frames through this representation, inside the model, and see --unfreeze."
        ),
    ] = None
    weights: Annotated[str, typer.Option(help="Of --pvr: auto, FILE_OR_FOLDER or random:SEED.")] = "auto"
    unfreeze: Annotated[
        str, typer.Option(help="How many of the last blocks or stages of --pvr learn with the model, or all.")
    ] = "0"
    backbone_learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of what --unfreeze lets learn; default: 1e-6, DINO-WM's.")
    ] = None
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the update, which a GPU replays as CUDA graphs.")
    ] = False
    backing: Annotated[
        Literal["auto", "mapped", "ram", "device"],
        typer.Option(help="Where windows are read from: files, memory, or the device's memory."),
    ] = "auto"

    def config(self, model: str, size: str, seed: int, models: Sequence[str]) -> TrainConfig:
        """The configuration of one run; what belongs to one of the models alone is left to its own runs."""
        from pvrpipe.worldmodel.training import OWN, TrainConfig

        own: dict[str, Any] = {
            "warmup": self.warmup,
            "symlog_inputs": self.symlog,
            "burn_in": self.burn_in,
            "joined": self.joined,
            "proprioception": self.proprioception,
        }
        kept = {name: value for name, value in own.items() if OWN[name] == model or OWN[name] not in models}
        return TrainConfig(
            model=model,
            size=size,
            updates=self.updates,
            batch=self.batch,
            length=self.length,
            seed=seed,
            learning_rate=self.learning_rate,
            backbone_learning_rate=self.backbone_learning_rate,
            encoder=self.encoder,
            pixels=self.pixels,
            compiled=self.compile,
            precision=self.precision,
            patience=self.patience,
            save_every=self.validate_every,
            log_every=log_every(self.validate_every),
            **kept,
        )

    def backbone(self, store: str, part: ReadoutOptions) -> Callable[[str], TunedEncoder] | None:
        """What builds the encoder to look at a store's frames through, on a device; None: there is to be none.

        Raises:
            InvalidValueError: the store holds no frames, or options of an encoder are given without one.
        """
        if self.pvr is None:
            if (self.weights, self.unfreeze, self.backbone_learning_rate) != ("auto", "0", None) or any(
                value is not None for value in vars(part).values()
            ):
                raise InvalidValueError(
                    "--unfreeze and the like are of an encoder inside the model; name one with --pvr"
                )
            return None
        if self.unfreeze == "0" and self.backbone_learning_rate is not None:
            raise InvalidValueError(
                "--backbone-learning-rate is of what learns of --pvr, and with --unfreeze 0 nothing does; "
                "leave it out, or unfreeze some"
            )
        from pvrpipe.pipeline.tuning import tuned_as_asked, tuning_of
        from pvrpipe.store.reading import Store
        from pvrpipe.worldmodel.backbones import frame_of

        height, width, _ = frame_of(Store.open(store))
        tuning = tuning_of(self.pvr, self.weights, self.unfreeze)
        return partial(tuned_as_asked, tuning, (height, width), part.readout)

    def label(self, root: Path, store: str, part: ReadoutOptions) -> str:
        """What the names of a store's runs begin with."""
        if self.pvr is None:
            return run_label(root, store)
        encoder = pvr_label(self.pvr, self.weights, part.readout)
        return f"{run_label(root, store, '')}-{encoder}-unfreeze-{self.unfreeze}"


def run_label(root: Path, store: str, of_frames: str = "-scratch") -> str:
    """What the names of a store's runs begin with."""
    from pvrpipe.store.places import place_of
    from pvrpipe.store.reading import Store
    from pvrpipe.store.workspace import Workspace

    label = Workspace(root).label_of(store) or f"{environment_of(store)}-{place_of(store).resolve().name}"
    suffix = "" if Store.open(store).manifest.kind == "embeddings" else of_frames
    return label.removeprefix("dmc-").removeprefix("dmc:") + suffix


def backbone_of(record: RunRecord, device: str, weights: str | None = None) -> TunedEncoder | None:
    """What a run's model looks at frames through, as it was before it learned anything; None where it has none.

    Args:
        record: of the run.
        device: where to compute.
        weights: where the encoder's are; None: where they were.

    Raises:
        WeightsError, UnknownNameError: the encoder cannot be had here.
        InvalidValueError: weights for a run without one.
    """
    if record.tuning is None or record.encoder is None or record.setting.frames is None:
        if weights is not None:
            raise InvalidValueError(
                "--weights are of an encoder inside the model, and this run's has none; leave it out"
            )
        return None
    from pvrpipe.pipeline.readout import Readout
    from pvrpipe.pipeline.tuning import TunedEncoder

    tuning = record.tuning if weights is None else record.tuning.model_copy(update={"weights": weights})
    height, width, _ = record.setting.frames.shape
    return TunedEncoder(tuning, (height, width), Readout.of(record.encoder), device)
