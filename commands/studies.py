"""``study``, ``report`` and ``compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvrpipe.commands.options import (
    DATA,
    Address,
    Debug,
    Device,
    Engine,
    Json,
    Root,
    Workers,
    pick_device,
)
from pvrpipe.commands.terminal import note, tell
from pvrpipe.schemas.errors import NotAStudyError

if TYPE_CHECKING:
    from pvrpipe.commands.study_plan import Plan
    from pvrpipe.schemas.study import Study

STUDIES = "studies"  # of a workspace


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study, e.g. studies/quick.yaml.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder of study.json and the report; default: after its name.")
    ] = None,
    engine: Engine = "ray",
    address: Address = None,
    workers: Workers = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which jobs, bytes and hours it would take.")
    ] = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Collect, embed, train and probe all that a study compares, and report it; run again, it goes on.

    Example: pvrpipe study studies/quick.yaml
    """
    plan = planned(file, root, device, fetch=not dry_run)
    if dry_run:
        return estimated(plan, json_)

    from pvrpipe.commands.study_stages import How, conduct
    from pvrpipe.rollouts import collect as stage
    from pvrpipe.store.files import locked, make_folder

    out = out or root / STUDIES / plan.study.name
    make_folder(out)
    with locked(out):
        how = How(stage.Engine(engine, address, workers), pick_device(device))
        record = conduct(plan, out, how, shlex.join(["pvrpipe", *sys.argv[1:]]))
    rows = [
        {"of": kind, "done": done, "of all": len(parts), "not done": ", ".join(sorted(others)) or "-"}
        for kind, parts in (("stores", record.stores), ("runs", record.jobs))
        for done, others in [
            (sum(p.state == "finished" for p in parts), {p.state for p in parts} - {"finished"})
        ]
    ]
    found = {
        "study": out,
        "state": record.state,
        "stores": len(record.stores),
        "runs": len(record.jobs),
        "unfinished": record.unfinished,
    }
    tell(json_, {**found, "unfinished": [p.model_dump() for p in record.unfinished]}, rows, tuple(rows[0]))
    if record.state != "finished":
        note(
            f"{len(record.unfinished)} parts have no result, {out / 'study.json'} says why; run it again to go on"
        )
        raise typer.Exit(1)
    return None


def planned(file: Path, root: Path, device: str, *, fetch: bool) -> Plan:
    """The plan of a study's file.

    Raises:
        NotAStudyError: it has mistakes; each was told in a line of its own.
    """
    from pvrpipe.schemas.study import read_study

    wanted, mistakes = read_study(file)
    if wanted is not None:
        from pvrpipe.commands.study_checks import mistakes_of  # torch: after the mistakes in its form

        mistakes += mistakes_of(wanted)
    if wanted is None or mistakes:
        raise refused(file, mistakes)
    return checked(file, wanted, root, device, fetch)


def checked(file: Path, wanted: Study, root: Path, device: str, fetch: bool) -> Plan:
    """A plan whose environments exist and whose weights are to be had."""
    from pvrpipe.commands.study_checks import mistakes_of_plan, unfetched
    from pvrpipe.commands.study_plan import plan_of

    plan = plan_of(wanted, root, pick_device(device))
    if mistakes := mistakes_of_plan(plan, fetch):
        raise refused(file, mistakes)
    for name in [] if fetch else unfetched(plan):
        note(f"the weights of {name} are not on this machine yet")
    return plan


def refused(file: Path, mistakes: list[str]) -> NotAStudyError:
    """Tell all mistakes of a study, a line each."""
    for line in mistakes[:-1]:
        note(f"{file}: {line}")
    more = f" (and {len(mistakes) - 1} mistakes more, above)" if mistakes[1:] else ""
    return NotAStudyError(f"{file}: {mistakes[-1]}{more}; nothing was begun")


def estimated(plan: Plan, json_: bool) -> None:
    """What a study would take."""
    from pvrpipe.commands.study_estimate import costs_of

    costs = costs_of(plan)
    hours = [cost.hours for cost in costs if cost.hours is not None]
    total = sum(hours) if len(hours) == len(costs) else None
    if not json_:
        note("hours are estimates, of one worker; bytes too")
    found = {
        "dry_run": True,
        "study": plan.study.name,
        "stages": costs,
        "bytes": sum(cost.bytes for cost in costs),
        "hours": total,
        "runs": [str(job.run) for job, _ in plan.jobs],
    }
    columns = ("stage", "jobs", "left", "bytes", "hours", "rates")
    tell(json_, found, costs, columns)
