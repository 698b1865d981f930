"""Every mistake of a study at once, before any work: what names nothing, does not go together, or cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pvrpipe.commands.study_plan import FRAMELESS, Encoded, Plan, config_of
from pvrpipe.pipeline.cached import cached_weights
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.pipeline.readout import Readout, read_out
from pvrpipe.pipeline.weights import find_weights
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.rollouts.collect import CollectConfig, draft_manifest
from pvrpipe.rollouts.variation import parse_variation
from pvrpipe.schemas.errors import InvalidValueError, PvrpipeError, one_line
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.study import (
    ALL,
    AUTOENCODER,
    CONTROL,
    RANDOM,
    SCRATCH,
    Collecting,
    Representation,
    Study,
)
from pvrpipe.store.layout import read_manifest
from pvrpipe.worldmodel.models import check_names

OWN = (SCRATCH, AUTOENCODER)  # have no weights to be fetched
READ_OUT = ("weights", "pool", "layer", "blocks")  # what of an encoder is the embedding


def mistakes_of(study: Study) -> list[str]:
    """Looks, representations, models, sizes and windows that are none, a line each."""
    found: list[str] = []
    for name in (*study.variations, *study.shifts):
        with _noted(found, f"variation {name}"):
            parse_variation(name)
    with _noted(found, "collect"):
        CollectConfig(study.environments[0], **study.collect.model_dump(exclude_none=True))
    for wanted in study.pvrs:
        with _noted(found, f"pvrs: {wanted.pvr}"):
            _check(wanted)
    for trained in study.models:
        for size in trained.sizes:
            with _noted(found, f"models: {trained.model} {size}"):
                check_names(trained.model, size)
                if trained.model == FRAMELESS and {wanted.pvr for wanted in study.pvrs} == {SCRATCH}:
                    raise InvalidValueError(
                        "it learns from embeddings, and scratch has none; name another of pvrs"
                    )
                for windows in (trained, trained.scratch or trained):
                    config_of(trained, windows, size, "auto", 0)
    return list(dict.fromkeys(found))


def right_in(study: Study) -> Study:
    """A study without what :func:`mistakes_of` has something to say about, so that the rest can be looked into."""
    fields = ("variations", "shifts", "pvrs", "models")
    nothing: dict[str, Any] = {**dict.fromkeys(fields, ()), "collect": Collecting()}
    right = {
        name: tuple(
            each
            for each in dict.fromkeys(getattr(study, name))
            if not mistakes_of(study.model_copy(update={**nothing, name: (each,)}))
        )
        for name in fields
    }
    collecting = mistakes_of(study.model_copy(update=dict.fromkeys(fields, ())))
    kept = {"collect": Collecting()} if collecting else {}
    return study.model_copy(update={**right, **kept, "variations": right["variations"] or ("none",)})


def mistakes_of_plan(plan: Plan, fetch: bool) -> list[str]:
    """Environments that cannot be made, or not in these looks; windows too long, weights not to be had, a line each.

    Args:
        plan: of a study without mistakes in its names.
        fetch: also fetch what weights are not on this machine, to be sure of them.
    """
    found = [*_one_as_another(plan), *_longer_than_episodes(plan)]
    if plan.study.collect.episodes == 1 and "val" in plan.study.probe.splits:
        found.append("collect.episodes: of one episode none is held out to be probed on; give 2 or more")
    looks = [look for look in plan.looks if sealed(look.folder) is None]
    sound: set[str] = set()
    for environment, config in {look.environment: look.config for look in looks}.items():
        with _noted(found, f"environments: {environment} as it is"):
            draft_manifest(replace(config, variation="none"))
            sound.add(environment)
    for look in looks:
        if look.environment in sound and look.variation != "none":
            with _noted(found, f"environments: {look.environment} {look.variation}"):
                draft_manifest(replace(look.config, variation=look.variation))
    for name, weights in sorted(_weights_of(plan)):
        if fetch or weights != "auto" or not _is_published(find_pvr(name)):
            with _noted(found, f"pvrs: {name}"):
                find_weights(find_pvr(name), weights, name)
    found = [each.replace("--weights ", "weights: ") for each in found]  # a study's file has no options
    return list(dict.fromkeys(found))


def _one_as_another(plan: Plan) -> list[str]:
    """Representations that would be one in the report, or are one under two names."""
    of_look = [each for each in plan.encoded if each.look == plan.looks[0]] if plan.looks else []
    called: dict[str, set[Path]] = {}
    made: dict[Path, set[tuple[str, str]]] = {}
    for each in of_look:
        called.setdefault(each.label, set()).add(each.folder)
        made.setdefault(each.folder, set()).add((each.label, _given(each)))
    return [
        *(
            f"pvrs: {len(folders)} representations would both be called {label!r}; rename the file or folder of one"
            for label, folders in called.items()
            if len(folders) > 1
        ),
        *(
            f"pvrs: {' and '.join(_told_apart(names))} are one and the same; name it once"
            for names in made.values()
            if len(names) > 1
        ),
    ]


def _given(each: Encoded) -> str:
    """What in the study says which encoder it is."""
    if each.request is None:
        return SCRATCH
    return each.request.pvr if each.request.weights == "auto" else each.request.weights


def _told_apart(names: set[tuple[str, str]]) -> list[str]:
    """Representations as the report calls them or, where that is one name for all, as the study does."""
    labels = {label for label, _ in names}
    return sorted(labels if len(labels) > 1 else {given for _, given in names})


def _longer_than_episodes(plan: Plan) -> list[str]:
    """Windows that no episode would hold, and a context that leaves nothing to predict, a line each."""
    steps, context = plan.study.collect.max_steps, plan.study.probe.context
    if steps is None:
        return []
    wanted = dict.fromkeys((job.config.model, job.config.rows) for job, _ in plan.jobs)
    found = [f"models: {model}: a window has {rows} rows" for model, rows in wanted if rows > steps + 1]
    found += [f"probe.context: predictions begin behind {context} rows"] if context > steps else []
    return [f"{each}, an episode {steps + 1}; give fewer, or more max_steps" for each in found]


def unfetched(plan: Plan) -> list[str]:
    """Representations whose published weights are not on this machine."""
    return sorted(
        name
        for name, weights in _weights_of(plan)
        if weights == "auto" and _is_published(find_pvr(name)) and cached_weights(find_pvr(name)) is None
    )


def _is_published(pvr: Pvr) -> bool:
    """Whether its weights can be fetched; those of one's own lie in its folder."""
    return bool(pvr.source.repo or pvr.source.url)


def sealed(folder: Path) -> Manifest | None:
    """The manifest of a store that is finished; None of any other."""
    try:
        manifest = read_manifest(folder)
    except PvrpipeError:
        return None
    return manifest if manifest.state == "sealed" else None


def _weights_of(plan: Plan) -> set[tuple[str, str]]:
    """Name and weights of every encoder that is to embed something and is not trained by the study.

    What is embedded needs none: a workspace may go to a machine that cannot have them.
    """
    return {
        (each.request.pvr, each.request.weights)
        for each in plan.embeddings
        if each.request is not None and each.pretrained is None and sealed(each.folder) is None
    }


def _check(wanted: Representation) -> None:
    if wanted.pvr in OWN:
        usual = Representation(pvr=wanted.pvr)
        if given := [name for name in READ_OUT if getattr(wanted, name) != getattr(usual, name)]:
            raise InvalidValueError(
                f"it is of the study's own making, without {', '.join(given)}; leave that out"
            )
        return
    if wanted.pvr == RANDOM and not wanted.weights.startswith(("auto", RANDOM)):
        raise InvalidValueError(
            f"weights {wanted.weights} are not random; give random:SEED, or {CONTROL} as pvr"
        )
    pvr = find_pvr(CONTROL if wanted.pvr == RANDOM else wanted.pvr)
    readouts = [
        Readout(wanted.layer, None if blocks == ALL else blocks, None, wanted.pool)
        for blocks in wanted.blocks
    ]
    asked = [read_out(pvr, readout) for readout in readouts if readout != Readout()]
    with torch.device("meta"):  # layers and blocks as the network has them, without its numbers
        if asked and _can_be_built(pvr):
            for each in asked:
                build_network(each, 0)


def _can_be_built(pvr: Pvr) -> bool:
    """Whether the network can be had without numbers, as its authors read it out."""
    try:
        build_network(pvr, 0)
    except PvrpipeError:
        return False
    return True


@contextmanager
def _noted(found: list[str], where: str) -> Iterator[None]:
    """A user's mistake is a line of the list, and the next thing is looked at."""
    try:
        yield
    except PvrpipeError as error:
        found.append(f"{where}: {one_line(error)}")
