"""``pvrpipe pretrain autoencoder``: a representation of one's own, from the frames of a rollout store."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from pvrpipe.pipeline.autoencoder import ConvDecoder, ConvEncoder
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.pvrs import SPEC_FILE, WEIGHTS_FILE, Pvr, WeightsSource
from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError
from pvrpipe.schemas.manifest import Recipe, canonical_json
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.files import locked, make_folder, remove_temporaries, sha256_of, write_whole
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store

REPORT_FILE = "pretrain.json"
DECODER_FILE = "decoder.safetensors"
READ_BATCH = 64  # frames decoded at a time


@dataclass(frozen=True)
class PretrainConfig:
    """An autoencoder's size and training; equal configurations on equal rollouts give equal weights."""

    size: int = 64  # pixels that the network sees
    channels: int = 16
    width: int = 128  # D, the embedding
    updates: int = 1000
    batch: int = 64
    learning_rate: float = 1e-3
    frames: int = 20_000  # at most so many are kept in memory, evenly over the training episodes
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 16 <= self.size <= 512 or self.size % 16:
            raise InvalidValueError(
                f"an autoencoder's --size is a multiple of 16 up to 512, not {self.size}; try 64"
            )
        if min(self.updates, self.batch, self.width, self.channels) < 1:
            raise InvalidValueError("--updates, --batch and the width of an autoencoder must be at least 1")


@dataclass(frozen=True)
class PretrainResult:
    """A folder to give to ``pvrpipe embed --pvr``."""

    pvr: Path
    updates: int
    loss: float
    val_loss: float
    seconds: float
    reused: bool


def pretrain_autoencoder(
    rollouts: Place | str,
    out: Path,
    config: PretrainConfig,
    overwrite: bool = False,
    progress: Progress = silent,
) -> PretrainResult:
    """Train an autoencoder on the frames of the ``train`` episodes and write its encoder as a PVR.

    The loss is the mean squared error of pixels in [-1, 1]. A folder is a PVR once its ``pvr.json`` is
    there, which is written last; an interrupted training starts again and ends with the same weights.

    Raises:
        NotAStoreError: there are no frames to train on.
        OutputExistsError: ``out`` holds an encoder of another configuration.
    """
    started = time.perf_counter()
    store = Store.open(rollouts, kind="rollouts")
    make_folder(out)
    with locked(out):
        remove_temporaries(out)
        asked = {**asdict(config), "rollouts": store.manifest.id, "torch": version("torch")}
        report = _finished(out, asked, overwrite)
        if report is None:
            report = _train(store, out, config, asked, progress)
            return PretrainResult(out, config.updates, *report, time.perf_counter() - started, reused=False)
        return PretrainResult(out, config.updates, *report, time.perf_counter() - started, reused=True)


def _train(
    store: Store, out: Path, config: PretrainConfig, asked: dict[str, object], progress: Progress
) -> tuple[float, float]:
    """The whole training, from top to bottom; the last training loss and the loss on held-out frames."""
    recipe = recipe_of(config)
    train, val = (frames_of(store, split, config.frames, recipe) for split in ("train", "val"))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        encoder, decoder = (
            part(config.size, config.channels, config.width).to(memory_format=torch.channels_last)
            for part in (ConvEncoder, ConvDecoder)
        )
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.updates + 1
    )
    draw = np.random.default_rng(config.seed)
    losses = []
    for update in range(config.updates):
        pixels = _pixels(train[draw.integers(len(train), size=config.batch)], recipe)
        loss = F.mse_loss(decoder(encoder(pixels)), pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(update + 1, config.updates, f"loss {np.mean(losses[-50:]):.4f}")
    with torch.no_grad():
        held_out = [_pixels(val[at : at + READ_BATCH], recipe) for at in range(0, len(val), READ_BATCH)]
        val_loss = (
            float(np.mean([F.mse_loss(decoder(encoder(p)), p).item() for p in held_out])) if held_out else 0.0
        )
    report = float(np.mean(losses[-50:])), val_loss
    _write(store, out, config, asked, encoder, decoder, report)
    return report


def recipe_of(config: PretrainConfig) -> Recipe:
    """Frames squeezed to the network's size, values in [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return Recipe(
        resize=config.size, interpolation="bilinear", antialias=True, crop=config.size, mean=half, std=half
    )


def frames_of(store: Store, split: str, most: int, recipe: Recipe) -> NDArray[np.uint8]:
    """At most ``most`` frames of a split, evenly spaced and already resized, (N, size, size, 3) uint8."""
    rows = int(store.episodes.filter(store.episodes["split"] == split)["rows"].sum())
    stride = max(1, -(-rows // most))
    kept: list[NDArray[np.uint8]] = []
    seen = 0
    for record in store.episodes.filter(store.episodes["split"] == split).iter_rows(named=True):
        for at in range(0, record["rows"], READ_BATCH):
            count = min(READ_BATCH, record["rows"] - at)
            frames = store.shard(record["shard"]).rows("frame", record["row_start"] + at, count)
            frames = frames[-seen % stride :: stride]
            seen += count
            if len(frames):
                values = preprocess(torch.from_numpy(np.ascontiguousarray(frames)), recipe)
                kept.append(((values + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(kept) if kept else np.zeros((0, recipe.crop or 0, recipe.crop or 0, 3), np.uint8)


def _pixels(frames: NDArray[np.uint8], recipe: Recipe) -> torch.Tensor:
    return preprocess(torch.from_numpy(frames), recipe)


def _finished(out: Path, asked: dict[str, object], overwrite: bool) -> tuple[float, float] | None:
    """The report of an encoder already there with this configuration, or None."""
    others = [
        p.name for p in out.iterdir() if p.name not in (SPEC_FILE, WEIGHTS_FILE, DECODER_FILE, REPORT_FILE)
    ]
    if others:
        raise OutputExistsError(f"{out} holds other files ({others[0]}); choose another output folder")
    if overwrite or not (out / SPEC_FILE).is_file():
        (out / SPEC_FILE).unlink(missing_ok=True)
        return None
    report = json.loads((out / REPORT_FILE).read_text())
    if report["asked"] != asked:
        raise OutputExistsError(
            f"{out} holds an encoder of another configuration; choose another output, or --overwrite"
        )
    return report["loss"], report["val_loss"]


def _write(
    store: Store,
    out: Path,
    config: PretrainConfig,
    asked: dict[str, object],
    encoder: nn.Module,
    decoder: nn.Module,
    report: tuple[float, float],
) -> None:
    """Weights first, the specification that makes the folder a PVR last."""
    for part, name in ((encoder, WEIGHTS_FILE), (decoder, DECODER_FILE)):
        tensors = {key: tensor.contiguous() for key, tensor in part.state_dict().items()}
        write_whole(out / name, safetensors.torch.save(tensors))
    losses = {"asked": asked, "loss": report[0], "val_loss": report[1]}
    write_whole(out / REPORT_FILE, canonical_json(losses).encode())
    pvr = Pvr(
        name="autoencoder",
        title=f"autoencoder trained on {store.manifest.rollouts.environment}",
        source=WeightsSource(file=WEIGHTS_FILE, sha256=sha256_of(out / WEIGHTS_FILE)),
        architecture="conv-autoencoder",
        overrides={"size": config.size, "channels": config.channels},
        recipe=recipe_of(config),
        pooling="flat",
        width=config.width,
        licence="that of the rollouts",
    )
    write_whole(out / SPEC_FILE, canonical_json(pvr.model_dump(mode="json")).encode())
