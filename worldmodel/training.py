"""Train a world model from a store: one loop, from the first update to the last."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError, PvrpipeError, RunError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.places import without_password
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import checkpoints, runs
from pvrpipe.worldmodel.backbones import check_backbone, embedding_shape, identity_of, moments_before
from pvrpipe.worldmodel.batches import PIXELS, Backing, Batches, chance, open_observations, setting_of
from pvrpipe.worldmodel.compiling import Precision, computing, losses_of, update_of
from pvrpipe.worldmodel.judging import check_finite, means_of, validate
from pvrpipe.worldmodel.memory import check_room
from pvrpipe.worldmodel.metrics_log import MetricsLog
from pvrpipe.worldmodel.models import (
    Setting,
    build_model,
    check_names,
    parameter_count,
    suitable_threads,
)
from pvrpipe.worldmodel.optimizer import Updater
from pvrpipe.worldmodel.ranks import ranks, told_by_first

BATCH = {"dreamerv3": 16, "tdmpc2": 256, "dinowm": 32}
LENGTH = {"dreamerv3": 64, "tdmpc2": 4, "dinowm": 4}
#: Rows of a window that teach all of a model: of dinowm the places of three frames, and the next.
LEAST = {"dreamerv3": 2, "tdmpc2": 2, "dinowm": 4}
#: Settings of one model alone.
OWN = {
    "warmup": "dreamerv3",
    "symlog_inputs": "dreamerv3",
    "burn_in": "dreamerv3",
    "joined": "dreamerv3",
    "proprioception": "dinowm",
}
VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how; with the store's id it decides every number of a run."""

    model: str = "dreamerv3"
    """dreamerv3, tdmpc2 or dinowm"""
    size: str = "1m"
    """a published size of that model"""
    updates: int = 1000
    """gradient steps"""
    batch: int | None = None
    """windows in a batch; None: 16 for dreamerv3, 256 for tdmpc2, 32 for dinowm"""
    length: int | None = None
    """rows of a window; None: 64 for dreamerv3, 4 for tdmpc2 (a horizon of 3) and dinowm (three frames and the next)"""
    seed: int = 0
    """decides weights, windows and samples"""
    learning_rate: float | None = None
    """None: the published one, 4e-5 for dreamerv3, 3e-4 for tdmpc2, 5e-4 for dinowm"""
    backbone_learning_rate: float | None = None
    """of what learns of an encoder inside the model; None: 1e-6, as in DINO-WM's configuration"""
    warmup: int = 1000
    """updates over which dreamerv3's learning rate rises"""
    normalize: bool = True
    """embeddings to zero mean and unit variance, by the store's own statistics"""
    symlog_inputs: bool = True
    """dreamerv3 squashes embeddings, as input and as target"""
    encoder: str = "auto"
    """how a model reads what it observes: linear, mlp, attention or cnn; auto: the first that fits"""
    burn_in: int = 0
    """rows in front of a window, without losses, that carry dreamerv3's state to it"""
    joined: bool = False
    """dreamerv3's windows run on into the next episode, which begins anew in them, as in its authors' replay"""
    proprioception: bool = False
    """dinowm sees and predicts the state too"""
    pixels: int = PIXELS
    """side of the frames that a model from scratch is shown"""
    compiled: bool = False
    """by torch.compile, loss and gradient as one function; the last bits are others"""
    precision: Precision = "fp32"
    """what products are computed in; weights, optimizer and the recurrence of dreamerv3 stay in float32"""
    patience: int = 0
    """stop once the validation loss has not fallen for so many checkpoints, and keep the best; 0: train to the end"""
    log_every: int = 50
    """updates between two lines of training losses"""
    save_every: int = 500
    """updates between two checkpoints, each with validation losses"""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        check_names(self.model, self.size)
        for name in ("updates", "log_every", "save_every", "rows", "windows", "pixels"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, owner in OWN.items():
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != usual and self.model != owner:
                raise InvalidValueError(f"{name} is {value}, but {self.model} has none; only {owner} does")
        for name in ("learning_rate", "backbone_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                option = f"--{name.replace('_', '-')}"
                raise InvalidValueError(f"{option} is {rate}; give a positive number, e.g. 1e-4")
        if self.rows < LEAST[self.model]:
            raise InvalidValueError(
                f"--length is {self.rows}; a window of {self.model} needs at least {LEAST[self.model]} rows"
            )
        if self.save_every % self.log_every:
            raise InvalidValueError(
                f"save_every ({self.save_every}) must be a multiple of log_every ({self.log_every})"
            )

    @property
    def windows(self) -> int:
        """B."""
        return BATCH[self.model] if self.batch is None else self.batch

    @property
    def rows(self) -> int:
        """T, without the rows a model needs in front."""
        return LENGTH[self.model] if self.length is None else self.length


@dataclass(frozen=True)
class TrainResult:
    """What ``pvrpipe train-model --json`` prints; losses as last logged, of validation those of the kept weights."""

    run: str
    updates: int
    updates_per_second: float
    data_wait_fraction: float
    backing: str
    """where windows were read from"""
    train: dict[str, float]
    val: dict[str, float]
    kept: int | None = None
    """with ``patience``, the update of the best checkpoint, which is the one kept; None: the last"""
    too_short: int = 0
    """training episodes that no window fits into, of which nothing was learned"""


def train(
    config: TrainConfig,
    store_path: Path | str,
    run: Path | str,
    *,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    backing: Backing = "auto",
    backbone: torch.nn.Module | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train to the end, going on from the last checkpoint if the run was begun before.

    In a process group, each process has its part of every batch, see :mod:`pvrpipe.worldmodel.ranks`.

    Args:
        config: what and how.
        store_path: an embedding store, or a rollout store to learn from frames.
        run: the folder that the run goes to; laid out in :mod:`pvrpipe.worldmodel.runs`.
        device: where to compute.
        overwrite: replace a run of another configuration.
        backing: where windows are read from; ``device`` keeps the store there. It never changes a number.
        backbone: on the device, what the model is to look at frames through, see :mod:`pvrpipe.worldmodel.backbones`;
            the same when a run is gone on with, as it was before it learned anything.
        progress: told updates done and to do.

    Returns:
        The losses and the speed; a finished run is returned at once.

    Raises:
        NotAStoreError: the store holds no embeddings.
        InvalidValueError: no window fits an episode, or the batch does not fit into the device's memory.
        OutputExistsError: the run was begun with another configuration or backbone; it is left as it is.
        DivergedError: a loss is not finite.
        RunError: the checkpoint does not fit; the last good one is kept.
    """
    store, folder, device = open_observations(store_path), Path(run), torch.device(device)
    first = ranks().rank == 0  # of several processes, the one that writes
    embedding = None if backbone is None else embedding_shape(backbone, store)
    setting = setting_of(store, pixels=config.pixels, encoder=config.encoder, embedding=embedding)
    draft = _record(config, store, setting, device, backbone)
    if not overwrite:  # asked before a model is built, which takes time and memory
        known = told_by_first(runs.same_run(folder, draft))
        if known.result is not None:
            return TrainResult(**{**known.result, "run": str(folder)})
    model = model_of(config, setting, device, backbone)
    draft = draft.model_copy(update={"parameters": parameter_count(model)})
    length = config.rows + model.rows_before
    data, held_out = (
        Batches(
            store,
            split,
            batch=config.windows,
            length=length,
            seed=config.seed,
            device=device,
            setting=setting,
            columns=model.columns,
            joined=config.joined,
            backing=backing,
        )
        for split in ("train", "val")
    )
    # Before the folder is this configuration's: the cure is another one.
    with suitable_threads(model, device), computing(config.precision, device):
        check_room(model, setting, length, config.windows // ranks().ranks, device)
    updater = Updater.of(
        config.model,
        model,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        backbone_rate=config.backbone_learning_rate,
    )
    losses = losses_of(model, device, compiled=config.compiled)
    update = update_of(model, updater, losses, device, config.precision)
    begin = runs.begun(folder, draft, overwrite=overwrite) if first else contextlib.nullcontext(draft)
    with suitable_threads(model, device), begin as record:
        record = told_by_first(record)
        resumed = (folder / checkpoints.CHECKPOINT).exists()
        done = checkpoints.load(folder, model, updater) if resumed else 0
        if config.normalize and not resumed:
            progress(0, config.updates, "looking at training rows")
            standardise(model, store)
        log = MetricsLog(folder, done, writes=first)
        choosy = first and config.patience > 0
        if choosy and log.best == done > 0:  # killed before that was noted, or after the run's end
            checkpoints.mark_best(folder)
        unlogged: list[dict[str, Tensor]] = []
        progress(done, config.updates, f"windows from {data.backing}")
        began, k = time.perf_counter(), done
        while k < config.updates and not log.stale(config.patience):
            k += 1
            batch = data(k)
            terms = update(batch, model.draw(batch, chance(config.seed, k)))
            # copies: a CUDA graph writes its next terms where these are
            unlogged.append({name: term.clone() for name, term in terms.items()})
            last = k == config.updates
            if k % config.log_every == 0 or last:
                log.write(k, "train", means_of(unlogged, k, data))
                unlogged.clear()
            if k % config.save_every == 0 or last:
                with computing(config.precision, device):
                    judged = validate(model, held_out.first(VALIDATION_BATCHES), config.seed)
                check_finite("validation loss after", judged["loss"], k, "held-out windows")
                log.write(k, "val", judged)
                if first:
                    checkpoints.save(folder, k, model, updater)
                if choosy and log.best == k:
                    checkpoints.mark_best(folder)
            progress(k, config.updates, log.note)
        seconds = max(time.perf_counter() - began, 1e-9)
        log.close()
        result = TrainResult(
            run=str(folder),
            updates=k,
            updates_per_second=(k - done) / seconds,
            data_wait_fraction=data.waited / seconds,
            backing=data.backing,
            train=log.last["train"],
            val=log.validation[log.best] if config.patience else log.last["val"],
            kept=log.best if config.patience else None,
            too_short=data.too_short,
        )
        if choosy:
            checkpoints.keep_best(folder)
        if first:
            runs.finish(folder, record, asdict(result))
    return result


def config_of(record: runs.RunRecord) -> TrainConfig:
    """What a run was asked to be; RunError where that is nothing this pvrpipe knows."""
    try:
        return TrainConfig(**record.config)
    except (TypeError, PvrpipeError) as error:
        raise RunError(
            f"the run's configuration is of another pvrpipe, {record.versions.get('pvrpipe')} ({error}); take that, or "
            "train again with --overwrite"
        ) from None


def model_of(
    config: TrainConfig, setting: Setting, device: torch.device, backbone: torch.nn.Module | None = None
) -> Any:
    """The model that a configuration asks for, with fresh weights, and what it looks at frames through."""
    model = build_model(
        config.model,
        config.size,
        setting,
        seed=config.seed,
        encoder=config.encoder,
        symlog_inputs=config.symlog_inputs,
        burn_in=config.burn_in,
        proprioception=config.proprioception,
    ).to(device)
    if backbone is not None:
        model.seen.look_through(backbone)
    return model


def standardise(model: Any, store: Store) -> None:
    """Give the model the moments of the store's training rows."""
    moments = store.manifest.statistics.get("embedding")
    if model.seen.backbone is not None:
        moments = moments_before(model.seen.backbone, store)
    if moments is not None:
        model.seen.standardise.set(moments.mean, moments.std)
    if "state" in model.columns:
        train = store.episodes.filter(store.episodes["split"] == "train")["episode"].to_list()
        states = np.concatenate([store.read_episode(e, ("state",))["state"] for e in train]).astype(
            np.float64
        )
        model.seen_state.set(states.mean(0), states.std(0))


def _record(
    config: TrainConfig,
    store: Store,
    setting: Setting,
    device: torch.device,
    backbone: torch.nn.Module | None,
) -> runs.RunRecord:
    """What ``run.json`` says when a run begins, but for the model's parameters."""
    specification = store.manifest.specification
    encoder, tuning = identity_of(backbone)
    if isinstance(specification, EmbeddingSpecification):
        encoder = specification.encoder
    assert store.manifest.id is not None
    return runs.RunRecord(
        state="training",
        config=asdict(config),
        store=without_password(store.path.absolute() if isinstance(store.path, Path) else store.path),
        store_id=store.manifest.id,
        environment=store.manifest.rollouts.environment,
        encoder=encoder,
        tuning=tuning,
        setting=setting,
        parameters=0,
        device=str(device),
        processes=ranks().ranks,
        versions=runs.versions(),
    )


def load_model(
    folder: Path, device: torch.device, backbone: torch.nn.Module | None = None
) -> tuple[Any, runs.RunRecord]:
    """The model of a run, as its last checkpoint left it, and the run's record.

    Args:
        folder: of the run.
        device: where to.
        backbone: what the run was trained through, if it was, on the device and as it was before it learned anything.

    Raises:
        RunError: there is no run, no checkpoint, or a checkpoint or a backbone that does not fit.
    """
    record = runs.read_run(folder)
    runs.check_checkpoint(folder, record)
    check_backbone(record, backbone)
    model = model_of(config_of(record), record.setting, device, backbone)
    checkpoints.load(folder, model)
    return model, record
