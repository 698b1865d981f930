"""``pvrpipe pretrain``: a representation of one's own, from the frames of a rollout store."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pvrpipe.pipeline.autoencoder import Autoencoder
from pvrpipe.pipeline.encoders import device_named, exact
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.pretrain_contrastive import AHEAD, CROPPED, Atc, Curl
from pvrpipe.pipeline.pretrain_frames import Frames, frames_of
from pvrpipe.pipeline.pvrs import SPEC_FILE, WEIGHTS_FILE, Pvr, WeightsSource
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.errors import (
    CorruptStoreError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
    PvrpipeError,
    one_line,
)
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.specifications import Recipe
from pvrpipe.store.files import locked, make_folder, remove_temporaries, sha256_of, write_whole
from pvrpipe.store.layout import refuse_inside_store
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store

REPORT_FILE = "pretrain.json"
REST_FILE = "rest.safetensors"  # what was trained beside the encoder
CHECKPOINT_FILE = "checkpoint.pt"  # while it is trained
FILES = (SPEC_FILE, WEIGHTS_FILE, REST_FILE, REPORT_FILE, CHECKPOINT_FILE)
CHECKPOINT_EVERY = 100  # updates
PATCHES = 8  # of MAE along a side, so that a patch is 8 pixels at 64
HELD_OUT = 64  # frames of a batch on which the result is measured, whatever --batch is

Method = Literal["autoencoder", "mae", "atc", "curl"]
#: Where none are given.
WIDTHS: dict[Method, int] = {"autoencoder": 128, "mae": 192, "atc": 128, "curl": 128}
UPDATES: dict[Method, int] = {"autoencoder": 1000, "mae": 2000, "atc": 2000, "curl": 2000}


class Objective(Protocol):
    """A module that trains an encoder."""

    encoder: nn.Module

    def objective(self, images: Tensor, later: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Loss of frames (B, 3, S, S) in [-1, 1], and how often the partner was found where one is looked for."""

    def follow(self) -> None:
        """What is to be done after each update."""


@dataclass(frozen=True)
class PretrainConfig:
    """An encoder's size and training; equal configurations on equal rollouts and devices give equal weights."""

    method: Method = "autoencoder"
    size: int = 64  # pixels that the network sees
    channels: int = 16  # of the convolutions, as in autoencoder.py
    width: int = 128  # D, the embedding
    depth: int = 4  # blocks of MAE's ViT
    updates: int = 1000
    batch: int = 64
    learning_rate: float = 1e-3
    frames: int = 20_000  # at most so many are kept in memory, evenly over the training episodes
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 16 <= self.size <= 512 or self.size % 16:
            raise InvalidValueError(
                f"--size of `pretrain` is a multiple of 16 up to 512, not {self.size}; try 64"
            )
        if min(self.updates, self.batch, self.width, self.channels, self.depth) < 1:
            raise InvalidValueError("--updates, --batch and the sizes of an encoder must be at least 1")
        if self.batch > self.frames:
            raise InvalidValueError(
                f"--batch of `pretrain` is at most the {self.frames} frames that are kept"
            )
        if self.method in ("atc", "curl") and self.batch < 2:
            raise InvalidValueError(
                f"`pretrain {self.method}` tells frames apart; give a --batch of 2 or more"
            )


@dataclass(frozen=True)
class PretrainResult:
    """A folder to give to ``pvrpipe embed --pvr``."""

    pvr: Path
    updates: int
    loss: float
    val_loss: float | None
    """None where no episode is held out"""
    val_accuracy: float | None
    """how often a frame's partner is told from those of 63 others; of ``atc`` and ``curl`` only"""
    seconds: float
    reused: bool
    resumed_updates: int


@dataclass
class Training:
    """A training that can be put down and taken up again."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float]  # of the last updates
    updates: int = 0


def pretrain(
    rollouts: Place | str,
    out: Path,
    config: PretrainConfig,
    overwrite: bool = False,
    progress: Progress = silent,
    device: str = "cpu",
    again: bool = False,
) -> PretrainResult:
    """Train an encoder on the frames of the ``train`` episodes and write it as a PVR.

    A folder is a PVR once its ``pvr.json`` is there, which is written last. A killed training goes on from its last
    checkpoint and ends with the same weights: what update u draws follows from the seed and u alone. Done ``again`` for
    a worker that died, it overwrites nothing: what is there by now is that worker's.

    Raises:
        NotAStoreError: there are no frames to train on.
        OutputExistsError: ``out`` holds an encoder, or the checkpoint of one, of another configuration.
    """
    started = time.perf_counter()
    store, computes_on = Store.open(rollouts, kind="rollouts"), device_named(device)
    refuse_inside_store(out)
    make_folder(out)
    with locked(out):
        remove_temporaries(out)
        asked = {
            **asdict(config),
            "rollouts": store.manifest.id,
            "torch": version("torch"),
            "device": computes_on.type,
        }
        _refuse_other_files(out)
        if overwrite and not again:
            for name in (SPEC_FILE, CHECKPOINT_FILE):
                (out / name).unlink(missing_ok=True)
        report, resumed = _finished(out, asked), config.updates
        reused = report is not None
        if report is None:
            with every_thread(), exact():
                report, resumed = _train(store, out, config, asked, progress, computes_on)
        (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return PretrainResult(
        out,
        config.updates,
        **report,
        seconds=time.perf_counter() - started,
        reused=reused,
        resumed_updates=resumed,
    )


@contextlib.contextmanager
def every_thread() -> Iterator[None]:
    """Compute on all processors, whatever was computed in this process before: their number decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    store: Store,
    out: Path,
    config: PretrainConfig,
    asked: dict[str, Any],
    progress: Progress,
    device: torch.device,
) -> tuple[dict[str, Any], int]:
    """The whole training, from top to bottom; the report, and the updates of an earlier run."""
    kept = kept_recipe(config)
    ahead = AHEAD if config.method == "atc" else 0
    train, val = (frames_of(store, split, config.frames, kept, ahead) for split in ("train", "val"))
    if not len(train.anchors):
        raise NotAStoreError(
            f"{store.path} has no episode of more than {ahead} steps to train on; collect longer ones"
        )
    run = _begun(config, device)
    resumed = _take_up(run, out, asked, device)
    while run.updates < config.updates:
        numbers = np.random.default_rng((config.seed, run.updates))
        chosen = train.anchors[numbers.integers(len(train.anchors), size=config.batch)]
        draw = torch.Generator().manual_seed(int(numbers.integers(1 << 62)))
        loss, _ = run.model.objective(*_views(train, chosen, kept, device), draw)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.schedule.step()
        run.model.follow()
        run.updates += 1
        run.losses = [*run.losses[-49:], loss.item()]
        progress(run.updates, config.updates, f"loss {np.mean(run.losses):.4f}")
        if run.updates % CHECKPOINT_EVERY == 0 and run.updates < config.updates:
            _put_down(run, out, asked)
    report = {"loss": float(np.mean(run.losses)), **_held_out(run.model, val, kept, device)}
    _write(store, out, config, asked, run.model, report)
    return report, resumed


def _begun(config: PretrainConfig, device: torch.device) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = objective_of(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.updates + 1
    )
    return Training(model, optimizer, schedule, [])


def objective_of(config: PretrainConfig) -> Any:
    """The module of a method, with fresh weights; an :class:`Objective`."""
    if config.method == "mae":
        from pvrpipe.pipeline.pretrain_mae import MaskedAutoencoder  # imports timm, a second

        return MaskedAutoencoder(config.size, config.size // PATCHES, config.width, config.depth)
    kinds = {"autoencoder": Autoencoder, "atc": Atc, "curl": Curl}
    return kinds[config.method](config.size, config.channels, config.width)


def recipe_of(config: PretrainConfig) -> Recipe:
    """Frames squeezed to the network's size, values in [-1, 1]; of CURL's frames, the middle."""
    half = (0.5, 0.5, 0.5)
    side = round(config.size / CROPPED) if config.method == "curl" else config.size
    return Recipe(
        resize=side, interpolation="bilinear", antialias=True, crop=config.size, mean=half, std=half
    )


def kept_recipe(config: PretrainConfig) -> Recipe:
    """As frames are kept for training: before anything is cut out of them."""
    recipe = recipe_of(config)
    return recipe.model_copy(update={"crop": recipe.resize})


def _views(
    frames: Frames, chosen: np.ndarray[Any, Any], recipe: Recipe, device: torch.device
) -> Iterator[Tensor]:
    """Frames (B, 3, S, S) in [-1, 1], and those that are seen later."""
    later = frames.later[chosen]
    images = preprocess(torch.from_numpy(frames.pixels[chosen]).to(device), recipe)
    yield images
    same = bool((later == chosen).all())
    yield images if same else preprocess(torch.from_numpy(frames.pixels[later]).to(device), recipe)


@torch.no_grad()
def _held_out(model: Any, val: Frames, recipe: Recipe, device: torch.device) -> dict[str, float | None]:
    """Loss and accuracy on the held-out frames, in batches of frames that are far apart.

    All are of one size, since to be told from more is harder; where it does not divide the frames, some count twice.
    """
    losses, scores = [], []
    size, batches = min(HELD_OUT, len(val.anchors)), -(-len(val.anchors) // HELD_OUT)
    for number in range(batches):
        places = (np.arange(size) * batches + number) * len(val.anchors) // (size * batches)
        views = _views(val, val.anchors[places], recipe, device)
        loss, score = model.objective(*views, torch.Generator().manual_seed(number))
        losses.append(loss.item())
        if score is not None:
            scores.append(score.item())
    return {
        "val_loss": float(np.mean(losses)) if losses else None,
        "val_accuracy": float(np.mean(scores)) if scores else None,
    }


def _put_down(run: Training, out: Path, asked: dict[str, Any]) -> None:
    state = {
        "asked": asked,
        "updates": run.updates,
        "losses": run.losses,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(out / CHECKPOINT_FILE, buffer.getvalue())


def _take_up(run: Training, out: Path, asked: dict[str, Any], device: torch.device) -> int:
    """Go on from a checkpoint of this training, if there is one; after how many updates."""
    if not (out / CHECKPOINT_FILE).is_file():
        return 0
    with _undamaged(out / CHECKPOINT_FILE):
        state = torch.load(out / CHECKPOINT_FILE, map_location=device, weights_only=True)
        if state["asked"] != asked:
            raise OutputExistsError(
                f"{out} holds a training of another configuration; choose another output, or --overwrite"
            )
        run.updates, run.losses = state["updates"], state["losses"]
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
    return run.updates


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """What an earlier run left is read within; whatever is wrong with it is one line."""
    try:
        yield
    except PvrpipeError:
        raise
    except Exception as error:  # bytes that are no pickle make its reader fail in any way
        raise CorruptStoreError(
            f"{path} is not what `pvrpipe pretrain` wrote ({one_line(error)[:120]}); begin again with --overwrite"
        ) from error


def _refuse_other_files(out: Path) -> None:
    others = sorted(p.name for p in out.iterdir() if p.name not in FILES)
    if others:
        raise OutputExistsError(f"{out} holds other files ({others[0]}); choose another output folder")


def _finished(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an encoder already there with this configuration, or None."""
    if not (out / SPEC_FILE).is_file():
        return None
    with _undamaged(out / REPORT_FILE):
        report: dict[str, Any] = json.loads((out / REPORT_FILE).read_text())
        if report.pop("asked") != asked:
            raise OutputExistsError(
                f"{out} holds an encoder of another configuration; choose another output, or --overwrite"
            )
        found = {name: report[name] for name in ("loss", "val_loss", "val_accuracy")}
    with _undamaged(out / WEIGHTS_FILE):
        if find_pvr(str(out)).source.sha256 != sha256_of(out / WEIGHTS_FILE):
            raise ValueError(f"its sha256 is not that of {SPEC_FILE}")
    return found


def _write(
    store: Store, out: Path, config: PretrainConfig, asked: dict[str, Any], model: Any, report: dict[str, Any]
) -> None:
    """Weights first, the specification that makes the folder a PVR last."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    own = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    rest = {n: t for n, t in tensors.items() if not n.startswith("encoder.")}
    for part, name in ((own, WEIGHTS_FILE), (rest, REST_FILE)):
        write_whole(out / name, safetensors.torch.save(part))
    write_whole(out / REPORT_FILE, canonical_json({"asked": asked, **report}).encode())
    pvr = _pvr(config, store.manifest.rollouts.environment, sha256_of(out / WEIGHTS_FILE))
    write_whole(out / SPEC_FILE, canonical_json(pvr.model_dump(mode="json")).encode())


def _pvr(config: PretrainConfig, environment: str, sha256: str) -> Pvr:
    conv = Pvr(
        name=config.method,
        title=f"{config.method} trained on {environment}",
        source=WeightsSource(file=WEIGHTS_FILE, sha256=sha256),
        architecture="conv-autoencoder",
        overrides={"size": config.size, "channels": config.channels},
        recipe=recipe_of(config),
        pooling="flat",
        width=config.width,
        licence="that of the rollouts",
    )
    if config.method != "mae":
        return conv
    from pvrpipe.pipeline.pretrain_mae import ARCHITECTURE, overrides

    vit = overrides(config.size, config.size // PATCHES, config.width, config.depth)
    return conv.model_copy(update={"architecture": ARCHITECTURE, "overrides": vit, "pooling": "cls"})
