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
    took,
)
from pvrpipe.commands.terminal import note, tell
from pvrpipe.schemas.errors import InvalidValueError, NotAStudyError

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


def report(
    studies: Annotated[
        list[Path] | None, typer.Argument(help="Folders of studies; default: the newest of the workspace.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: `report` in the first study's.")
    ] = None,
    returns: Annotated[
        Path | None, typer.Option(help="CSV of what agents got: pvr,model,return and perhaps environment.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Also draw figures for a paper, as SVG and PDF.")] = True,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write what studies found as a page that opens offline, with tables and figures for a paper.

    Example: pvrpipe report data/studies/quick
    """
    from pvrpipe.worldmodel.report import build_report, newest_study

    if not studies:
        newest = newest_study(root / STUDIES)
        if newest is None:
            raise NotAStudyError(
                f"there is no study in {root / STUDIES}; make one with `pvrpipe study studies/quick.yaml`"
            )
        studies = [took("study", newest)]
    made = build_report(studies, out or studies[0] / "report", returns=returns, figures=figures)
    if json_:
        return tell(True, made, [], ())
    for sentence in made.findings:
        print(sentence)
    note(f"{made.page}, {made.runs} runs, {made.bytes / 1e6:.1f} MB")
    return None


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of probed runs, or of studies.")],
    horizon: Annotated[list[int], typer.Option(min=1, help="Horizons that are shown; repeatable.")] = [33],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Set probed runs side by side: their errors, and which representations can be told apart.

    Example: pvrpipe compare data/runs/*
    """
    from pvrpipe.worldmodel.report_findings import findings_of
    from pvrpipe.worldmodel.report_sources import evidence_of_runs
    from pvrpipe.worldmodel.report_tables import errors_of
    from pvrpipe.worldmodel.report_words import sentences_of

    evidence = evidence_of_runs(runs)
    errors = errors_of(evidence)
    known = sorted(set(errors["horizon"].to_list()))
    if missing := [each for each in horizon if each not in known]:
        raise InvalidValueError(
            f"--horizon {missing[0]}: the runs were not probed there; they have {', '.join(map(str, known))}"
        )
    findings = findings_of(evidence, horizon)
    rows = [
        {
            "representation": row["arm"] + (" (RANDOM WEIGHTS)" if row["random_weights"] else ""),
            "model": f"{row['model']} {row['size']}",
            "environment": row["environment"],
            "error": row["measure"],
            "horizon": row["horizon"],
            "mean": row["mean"],
            "sem": row["sem"],
            "runs": row["runs"],
        }
        for row in errors.iter_rows(named=True)
        if row["horizon"] in horizon
    ]
    rows.sort(key=lambda row: (row["environment"], row["model"], row["error"], row["horizon"], row["mean"]))
    sentences = sentences_of(findings)
    found = {
        "rows": rows,
        "findings": sentences,
        "standings": findings.standings,
        "comparisons": findings.comparisons,
    }
    tell(json_, found, rows, tuple(rows[0]))
    for sentence in [] if json_ else sentences:
        print(sentence)
