"""What a study consists of: every store and every run, where each lies, and the command that makes it.

A folder's name ends in a digest of all that decides its content. So studies that ask for the same share it, those that
ask for something else never meet, and whatever is there under its name is what is wanted.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pvrpipe.commands.options import pvr_label
from pvrpipe.commands.rollouts import usual_policy
from pvrpipe.commands.training_options import log_every
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretraining import PretrainConfig
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.weights import WeightsFile, asks_for_random, find_weights
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.rollouts.collect import CollectConfig
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.study import (
    ALL,
    AUTOENCODER,
    CONTROL,
    RANDOM,
    SCRATCH,
    Representation,
    Study,
    Trained,
    Windows,
)
from pvrpipe.schemas.study_record import JobRecord
from pvrpipe.store.files import sha256_of
from pvrpipe.store.workspace import Workspace, slug
from pvrpipe.worldmodel.sweep import Job
from pvrpipe.worldmodel.training import TrainConfig

MAPS = {"dreamerv3": ("linear", "mlp"), "tdmpc2": ("mlp",)}  # that a model can be given for one embedding
FRAMELESS = "dinowm"  # predicts embeddings, and has nothing to predict from frames
LONGEST = 100  # letters of what a folder is of, in its name
#: Options of training that came after runs had their names: off, they decide nothing, and those keep their names.
LATER = ("joined",)


@dataclass(frozen=True)
class Look:
    """An environment in one look: a rollout store that is collected, or the trajectories of another seen anew."""

    environment: str
    variation: str
    folder: Path
    config: CollectConfig
    source: Look | None = None
    """whose trajectories are seen anew"""

    @property
    def command(self) -> str:
        """That makes it."""
        if self.source is not None:
            given = ["--replay", self.source.folder, self.folder, "--variation", self.variation]
            return line_of("collect", *given)
        return line_of("collect", self.environment, self.folder, *options_of(self.config, "environment"))


@dataclass(frozen=True)
class Encoded:
    """A representation of one look: the store that models are trained on."""

    look: Look
    label: str
    """how the report calls it"""
    blocks: str
    folder: Path
    request: EncoderRequest | None
    """None: the frames themselves"""
    pretrained: tuple[Path, PretrainConfig, Path] | None = None
    """folder, configuration and rollouts of an encoder that is trained for it"""
    dtype: Literal["float16", "float32"] = "float16"
    """that it is stored in"""

    @property
    def command(self) -> str:
        """That makes it of its look."""
        assert self.request is not None
        readout = self.request.readout
        given: dict[str, Any] = {
            "pvr": self.request.pvr,
            "weights": self.request.weights,
            "layer": readout.layer,
            "blocks": readout.blocks,
            "pool": readout.pooling,
            "precision": self.request.precision,
            "dtype": self.dtype,
        }
        return line_of("embed", self.look.folder, self.folder, *options_of(given))

    @property
    def pretrain_command(self) -> str:
        """That trains its encoder."""
        assert self.pretrained is not None
        folder, config, rollouts = self.pretrained
        given = {"updates": config.updates, "size": config.size, "seed": config.seed}
        return line_of("pretrain", AUTOENCODER, rollouts, folder, *options_of(given))


@dataclass(frozen=True)
class Plan:
    """All of a study, in the order in which it can be made."""

    study: Study
    root: Path
    looks: tuple[Look, ...]
    encoded: tuple[Encoded, ...]
    """what runs are trained and probed on, frames too"""
    jobs: tuple[tuple[Job, JobRecord], ...] = field(default=())

    @property
    def embeddings(self) -> list[Encoded]:
        """The stores that are embedded."""
        return [each for each in self.encoded if each.request is not None]

    def relative(self, folder: Path | str) -> str:
        """A folder as the study's record names it."""
        return str(Path(folder).absolute().relative_to(self.root.absolute()))


def plan_of(study: Study, root: Path, device: str) -> Plan:
    """Lay a study out in a workspace; nothing is looked at but the names of representations."""
    own = list(_looks(study, Workspace(root)))
    shifted = {look: [_seen_anew(look, shift, Workspace(root)) for shift in study.shifts] for look in own}
    encoded = {
        look: [list(_encoded(study, Workspace(root), look, of)) for of in (look, *shifted[look])]
        for look in own
    }
    jobs = [job for parts in encoded.values() for job in _jobs(study, root, parts, device)]
    looks = (*own, *(look for parts in shifted.values() for look in parts))
    stores = tuple(each for parts in encoded.values() for part in parts for each in part)
    return Plan(study, root, looks, stores, tuple(jobs))


def _looks(study: Study, workspace: Workspace) -> Iterator[Look]:
    for environment in study.environments:
        for variation in study.variations:
            asked = {
                **study.collect.model_dump(),
                "policy": study.collect.policy or usual_policy(environment),
            }
            config = CollectConfig(environment=environment, variation=variation, **asked)
            name = environment + ("" if variation == "none" else f"-{variation}")
            folder = workspace.rollouts(f"{fitting(name)}-{digest(asdict(config))}")
            yield Look(environment, variation, folder, config)


def _seen_anew(look: Look, shift: str, workspace: Workspace) -> Look:
    folder = workspace.rollouts(f"{look.folder.name}-{fitting(shift)}")
    return Look(look.environment, shift, folder, look.config, look)


def _encoded(study: Study, workspace: Workspace, trained: Look, look: Look) -> Iterator[Encoded]:
    """Every representation of a look, its own encoders trained on the look that models are trained on."""
    for wanted in study.pvrs:
        for blocks in wanted.blocks:
            if wanted.pvr == SCRATCH:
                yield Encoded(look, label_of(wanted, blocks), ALL, look.folder, None)
                continue
            name, weights, pretrained = wanted.pvr, wanted.weights, None
            readout = Readout(wanted.layer, None if blocks == ALL else blocks, None, wanted.pool)
            if wanted.pvr == AUTOENCODER:
                config = PretrainConfig(
                    updates=study.pretrain.updates, size=study.pretrain.size, seed=study.collect.seed
                )
                stem = f"{trained.folder.name}-{AUTOENCODER}-{digest(asdict(config))}"
                pretrained = (workspace.root / "pvrs" / stem, config, trained.folder)
                name, folder = str(pretrained[0]), f"{AUTOENCODER}-{digest(asdict(config))}"
            else:
                if wanted.pvr == RANDOM:
                    name, weights = CONTROL, "random:0" if weights == "auto" else weights
                folder = pvr_label(name, weights, readout) + _whose(name, weights)
            precise = "" if study.embed.precision == "fp32" else f"-{study.embed.precision}"
            wide = "" if study.embed.dtype == "float16" else f"-{study.embed.dtype}"
            yield Encoded(
                look,
                label_of(wanted, blocks),
                blocks,
                workspace.embeddings(look.folder.name, fitting(folder) + precise + wide),
                EncoderRequest(name, weights, study.embed.precision, readout=readout),
                pretrained,
                study.embed.dtype,
            )


def _whose(name: str, weights: str) -> str:
    """Which weights, where they are not the published ones, so that no store of one's own is taken for another."""
    if asks_for_random(weights):
        return ""
    try:
        source = find_pvr(name).source
        if weights == "auto":
            return "" if source.repo or source.url or not source.sha256 else f"-{source.sha256[:8]}"
        found = find_weights(find_pvr(name), weights, name)
        return f"-{sha256_of(found.path)[:8]}" if isinstance(found, WeightsFile) else ""
    except (PvrpipeError, OSError):  # is one of the study's mistakes
        return f"-{digest(weights)}"


def label_of(wanted: Representation, blocks: str) -> str:
    """How the report calls a representation in one of its readouts."""
    if wanted.pvr == SCRATCH:
        return "from scratch"
    name = Path(wanted.pvr).name
    given = "" if wanted.weights == "auto" else Path(wanted.weights).stem
    parts = (
        f"layer {wanted.layer}" if wanted.layer else "",
        wanted.pool or "",
        f"blocks {blocks}" if blocks != ALL else "",
        "random" if given == "random:0" else given,
    )
    return " ".join([name, *filter(None, parts)])


def _jobs(
    study: Study, root: Path, parts: list[list[Encoded]], device: str
) -> Iterator[tuple[Job, JobRecord]]:
    """The runs on one look, each with the stores of the shifts that it is probed on besides."""
    own, shifted = parts[0], parts[1:]
    for place, encoded in enumerate(own):
        elsewhere = [(slug(fitting(part[place].look.variation)), part[place]) for part in shifted]
        for trained in study.models:
            if trained.model == FRAMELESS and encoded.request is None:
                continue
            for size in trained.sizes:
                for through in maps_of(study, trained, encoded):
                    for seed in study.seeds:
                        yield _job(study, root, encoded, elsewhere, trained, (size, through, seed), device)


def maps_of(study: Study, trained: Trained, encoded: Encoded) -> list[str]:
    """The maps from an embedding that the study asks for and the model has; else its own."""
    has = MAPS.get(trained.model, ()) if encoded.request is not None else ()
    return [name for name in study.encoders if name == "auto" or name in has] or ["auto"]


def config_of(trained: Trained, windows: Windows, size: str, through: str, seed: int) -> TrainConfig:
    """How one run is trained."""
    return TrainConfig(
        model=trained.model,
        size=size,
        updates=trained.updates,
        batch=windows.batch,
        length=windows.length,
        seed=seed,
        learning_rate=trained.learning_rate,
        warmup=trained.warmup,
        encoder=through,
        symlog_inputs=trained.symlog,
        precision=trained.precision,
        save_every=trained.save_every,
        log_every=log_every(trained.save_every),
    )


def _job(
    study: Study,
    root: Path,
    encoded: Encoded,
    elsewhere: list[tuple[str, Encoded]],
    trained: Trained,
    variant: tuple[str, str, int],
    device: str,
) -> tuple[Job, JobRecord]:
    size, through, seed = variant
    windows = trained.scratch if encoded.request is None and trained.scratch else trained
    config = config_of(trained, windows, size, through, seed)
    where = encoded.folder.absolute().relative_to(root.absolute())
    stem = encoded.look.environment.removeprefix("dmc:")
    parts = (stem, encoded.label, through, trained.model, size, f"s{seed}")
    name = "-".join(part.replace(" ", "-") for part in parts if part != "auto")
    decides = {field: value for field, value in asdict(config).items() if value or field not in LATER}
    run = Workspace(root).run(f"{fitting(name)}-{digest({**decides, 'store': str(where)})}")
    shifts = [(label, str(each.folder.absolute())) for label, each in elsewhere]
    job = Job(
        store=str(encoded.folder.absolute()),
        run=run.absolute(),
        config=config,
        horizons=study.probe.horizons,
        context=study.probe.context,
        split=study.probe.splits,
        shifts=tuple(shifts),
        frames=str(encoded.look.folder.absolute()) if study.maps and seed == study.seeds[0] else "",
        device=device,
    )
    record = JobRecord(
        run=str(Path("runs") / run.name),
        store=str(where),
        environment=encoded.look.environment,
        variation=encoded.look.variation,
        pvr=encoded.label,
        encoder="cnn" if encoded.request is None else through,
        blocks=encoded.blocks,
        model=trained.model,
        size=size,
        seed=seed,
        probes=tuple(f"probe-{label}.parquet" if label else "probe.parquet" for label in ("", *dict(shifts))),
        commands=(
            _train_command(encoded.folder, run, config),
            _probe_command(study, run, seed),
            *(_probe_command(study, run, seed, each.folder, "--label", label) for label, each in elsewhere),
        ),
    )
    return job, record


def _train_command(store: Path, run: Path, config: TrainConfig) -> str:
    given = asdict(config)
    given = {name: given[name] for name in ("model", "size", "updates", "batch", "length", "seed")} | {
        "learning_rate": config.learning_rate,
        "warmup": config.warmup,
        "encoder": config.encoder,
        "precision": config.precision,
        "validate_every": config.save_every,
    }
    symlog = [] if config.symlog_inputs else ["--no-symlog"]
    return line_of("train-model", store, run, *options_of(given), *symlog)


def _probe_command(study: Study, run: Path, seed: int, *elsewhere: object) -> str:
    horizons = [part for h in study.probe.horizons for part in ("--horizon", h)]
    splits = [part for name in study.probe.splits for part in ("--split", name)]
    return line_of(
        "probe", run, *elsewhere, *horizons, "--context", study.probe.context, *splits, "--seed", seed
    )


def line_of(command: str, *arguments: object) -> str:
    """A command as it is typed."""
    return shlex.join(["pvrpipe", command, *map(str, arguments)])


def options_of(given: object, *without: str) -> list[str]:
    """Options of what is not as it is by default: ``--max-steps 200``."""
    values: dict[str, Any] = given if isinstance(given, dict) else asdict(given)  # type: ignore[call-overload]
    return [
        part
        for name, value in values.items()
        if value is not None and name not in (*without, "shard_rows", "shard_format")
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def fitting(name: str) -> str:
    """A name that leaves room for more in a folder's; one that is cut ends in a digest of the whole."""
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{digest(name)}"


def digest(content: Any) -> str:
    """Eight hexadecimal digits of whatever decides a folder's content."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:8]
