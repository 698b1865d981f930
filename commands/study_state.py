"""How far a study has come: the record of every store and run, kept in ``study.json`` while it is made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pvrpipe
from pvrpipe.commands.study_plan import Encoded, Look, Plan
from pvrpipe.commands.terminal import note
from pvrpipe.pipeline.weights import asks_for_random
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.errors import PvrpipeError, one_line
from pvrpipe.schemas.study_record import RECORD, STUDIES, StoreRecord, StudyRecord, read_record
from pvrpipe.store.files import write_whole


class Studying:
    """A study that is being made, and its record as far as it has come."""

    def __init__(self, plan: Plan, out: Path, command: str) -> None:
        self.plan, self.out = plan, out
        known = _earlier(out)
        self.stores = {record.folder: record for record in _stores_of(plan, known)}
        unasked = [record for record in known.values() if record.folder not in self.stores]
        self.others = tuple(record for record in unasked if record.frames_per_second)
        self.jobs = {record.run: record for _, record in plan.jobs}
        self.command = command

    def update(self, folder: Path | str, **changes: Any) -> None:
        """Note what became of a store."""
        key = self.plan.relative(folder)
        self.stores[key] = self.stores[key].model_copy(update=changes)
        self.save()

    def save(self, state: str = "unfinished") -> StudyRecord:
        """Write the record as it stands."""
        record = StudyRecord.model_validate(
            {
                "study": self.plan.study,
                "root": _relative(self.plan.root, self.out),
                "state": state,
                "stores": tuple(self.stores.values()),
                "jobs": tuple(self.jobs.values()),
                "others": self.others,
                "command": self.command,
                "versions": {"pvrpipe": pvrpipe.__version__},
            }
        )
        write_whole(self.out / RECORD, (record.model_dump_json(indent=1) + "\n").encode())
        return record

    def of(self, folder: Path | str) -> StoreRecord:
        """The record of a store."""
        return self.stores[self.plan.relative(folder)]

    def holds(self, folder: Path) -> bool:
        """Whether a store is finished, verified and can be built on."""
        return self.of(folder).state == "finished"

    def took_elsewhere(self, folder: Path, store: str | None) -> dict[str, Any]:
        """What a store took where another study made it: its id is the same, and nothing in it says so.

        Args:
            folder: of the store.
            store: its id.
        """
        record = self.of(folder)
        made = None if record.frames_per_second else self._elsewhere.get((record.folder, store))
        return {name: getattr(made, name) for name in ("frames_per_second", "memory_bytes")} if made else {}

    @cached_property
    def _elsewhere(self) -> dict[tuple[str, str | None], StoreRecord]:
        """Stores that other studies of this workspace made, by folder and id."""
        homes = {path.parent for path in (self.plan.root / STUDIES).glob(f"*/{RECORD}")} - {self.out}
        records = [record for home in sorted(homes) for record in _earlier(home).values()]
        return {(record.folder, record.id): record for record in records if record.frames_per_second}

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        states = [store.state for store in self.stores.values()] + [job.state for job in self.jobs.values()]
        return set(states) == {"finished"}

    def attempt(self, folder: Path, make: Callable[[], dict[str, Any]]) -> None:
        """Make a store; whatever goes wrong is noted, for the others are to go on."""
        began = time.perf_counter()
        try:
            changes = make()
        except Exception as error:
            note(f"{folder}: {one_line(error)}")
            self.update(folder, state="failed", failure=one_line(error))
            return
        self.update(
            folder, state="finished", failure="", **{"seconds": time.perf_counter() - began, **changes}
        )


def _earlier(out: Path) -> dict[str, StoreRecord]:
    """What earlier calls knew of their stores, if there were any."""
    try:
        found = read_record(out)
        return {record.folder: record for record in (*found.others, *found.stores)}
    except PvrpipeError:
        return {}


def _stores_of(plan: Plan, known: dict[str, StoreRecord]) -> list[StoreRecord]:
    """A record of every store of a plan, with what it had cost when it was made."""
    records: dict[str, StoreRecord] = {}

    def add(folder: Path, look: Look, kind: str, command: str, each: Encoded | None = None) -> None:
        key = plan.relative(folder)
        before = known.get(key)
        kept = ("seconds", "frames_per_second", "memory_bytes", "checked")
        records[key] = StoreRecord.model_validate(
            {
                "folder": key,
                "kind": kind,
                "environment": look.environment,
                "variation": look.variation,
                "command": command,
                **({name: getattr(before, name) for name in kept} if before else {}),
                **(_representation(each) if each else {}),
            }
        )

    for look in plan.looks:
        add(look.folder, look, "replay" if look.source else "rollouts", look.command)
    for each in plan.embeddings:
        if each.pretrained is not None and each.look.source is None:
            add(each.pretrained[0], each.look, "encoder", each.pretrain_command, each)
        add(each.folder, each.look, "embeddings", each.command, each)
    return list(records.values())


def _representation(each: Encoded) -> dict[str, Any]:
    """What groups a representation with others; an encoder of the study's own has no such property."""
    about: dict[str, Any] = {"pvr": each.label}
    if each.request is None or each.pretrained is not None:
        return about
    pvr = find_pvr(each.request.pvr)
    wanted = ("language", "sequential", "diverse")
    random = asks_for_random(each.request.weights)
    properties = {name: getattr(pvr.properties, name) and not random for name in wanted}
    return {**about, "vit": pvr.is_transformer, "random_weights": random, **properties}


def _relative(root: Path, out: Path) -> str:
    """The workspace as seen from the record, so that both can move together."""
    return os.path.relpath(root.absolute(), out.absolute())
