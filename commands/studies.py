"""``study``, ``report`` and ``compare``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
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
    check_engine,
    pick_device,
    sharing,
    took,
)
from pvrpipe.commands.study_options import StudyOptions
from pvrpipe.commands.terminal import duration, mean_sem, note, tell
from pvrpipe.schemas.errors import InvalidValueError, NotAStudyError
from pvrpipe.schemas.progress import counted
from pvrpipe.schemas.study_record import STUDIES

if TYPE_CHECKING:
    from pvrpipe.commands.study_plan import Plan
    from pvrpipe.schemas.study_record import StudyRecord

REPORT = "report"  # folder of a study


@sharing
def study(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file of the study, e.g. studies/quick.yaml; or options alone.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="Folder of study.json and the report; default: after its name.")
    ] = None,
    *,
    asked: StudyOptions,
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

    Options take the place of what the file says.

    Example: pvrpipe study --environment dmc:pendulum-swingup --pvr scratch --pvr random --seed 0 --seed 1
    """
    check_engine(engine, address, workers, device)
    plan = planned(file, asked, root, device, fetch=not dry_run)
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
        page = reported(out, record)
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
        "unfinished": [part.model_dump() for part in record.unfinished],
        "report": page,
    }
    tell(json_, found, rows, tuple(rows[0]))
    note(f"what was found: {page}")
    if record.state != "finished":
        note(
            f"without a result: {len(record.unfinished)} of {counted(len(record.stores) + len(record.jobs), 'part')}, "
            f"{out / 'study.json'} says why; run it again to go on"
        )
        raise typer.Exit(1)
    return None


def reported(out: Path, record: StudyRecord) -> Path:
    """The page of a study, written unless the one that is there is of the same record, version, probes and pictures."""
    from pvrpipe.schemas.study_record import PAGE
    from pvrpipe.worldmodel import runs
    from pvrpipe.worldmodel.report_stamp import is_current

    page = out / REPORT / PAGE
    shown = (runs.MAP, runs.STRIP)  # drawn anew where they were cut, and the record is the same
    tables = [out / record.root / job.run / name for job in record.jobs for name in (*job.probes, *shown)]
    if is_current(page, record, tables):
        return page
    from pvrpipe.worldmodel.report import build_report  # a second that a study without news need not pay

    return build_report([out], page.parent).page


def planned(file: Path | None, asked: StudyOptions, root: Path, device: str, *, fetch: bool) -> Plan:
    """The plan of a study's file, its options, or both.

    Raises:
        NotAStudyError: it has mistakes; each was told in a line of its own.
    """
    from pvrpipe.schemas.study import read_content, study_of

    wanted, mistakes = study_of(asked.within(None if file is None else read_content(file)))
    if wanted is None:
        raise refused(file, mistakes)
    from pvrpipe.commands.study_checks import mistakes_of, mistakes_of_plan, right_in, unfetched
    from pvrpipe.commands.study_plan import plan_of

    mistakes += mistakes_of(wanted)
    plan = plan_of(right_in(wanted) if mistakes else wanted, root, pick_device(device))
    mistakes += mistakes_of_plan(plan, fetch and not mistakes)
    if mistakes:
        raise refused(file, list(dict.fromkeys(mistakes)))
    for name in [] if fetch else unfetched(plan):
        note(f"the weights of {name} are not on this machine yet")
    return plan


def refused(file: Path | None, mistakes: list[str]) -> NotAStudyError:
    """Tell all mistakes of a study, a line each."""
    where = file or "the study"
    for line in mistakes[:-1]:
        note(f"{where}: {line}")
    more = f" (and {counted(len(mistakes) - 1, 'mistake')} more, above)" if mistakes[1:] else ""
    return NotAStudyError(f"{where}: {mistakes[-1]}{more}; nothing was begun")


def estimated(plan: Plan, json_: bool) -> None:
    """What a study would take."""
    from pvrpipe.commands.study_estimate import Cost, costs_of

    costs = costs_of(plan)
    hours = [cost.hours for cost in costs if cost.hours is not None]
    total = sum(hours) if len(hours) == len(costs) else None
    if not json_:
        note("sizes and times are estimates, times of one worker")
    found = {
        "dry_run": True,
        "study": plan.study.name,
        "stages": costs,
        "bytes": sum(cost.bytes for cost in costs),
        "hours": total,
        "runs": [str(job.run) for job, _ in plan.jobs],
    }
    jobs, left = sum(cost.jobs for cost in costs), sum(cost.left for cost in costs)
    shown = [*costs, Cost("all", jobs, left, sum(cost.bytes for cost in costs), total, "")]
    rows = [
        {
            **asdict(cost),
            "size": f"{cost.bytes / 1e6:,.1f} MB",
            "time": "not known" if cost.hours is None else duration(cost.hours),
        }
        for cost in shown
    ]
    tell(json_, found, rows, ("stage", "jobs", "left", "size", "time", "rates"))


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
    made = build_report(studies, out or studies[0] / REPORT, returns=returns, figures=figures)
    if json_:
        return tell(True, made, [], ())
    for sentence in made.findings:
        print(sentence)
    for sentence in made.left_out:
        note(sentence)
    lacking = f", {made.unfinished} more without numbers" if made.unfinished else ""
    note(f"{made.page}, {counted(made.runs, 'run')}{lacking}, {made.bytes / 1e6:.1f} MB")
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
    from pvrpipe.worldmodel.report_sources import OWN, evidence_of_runs
    from pvrpipe.worldmodel.report_tables import errors_of, unfinished_of, unprobed_of
    from pvrpipe.worldmodel.report_words import sentences_of

    evidence = evidence_of_runs(runs)
    silent = unfinished_of(evidence).rows(named=True)
    for each in silent:
        note(f"{each['what']} is left out ({each['state']}): {each['why'] or 'it has no numbers'}")
    errors = errors_of(evidence)
    known = sorted(set(errors["horizon"].to_list()))
    if missing := [each for each in horizon if each not in known]:
        raise InvalidValueError(
            f"--horizon {missing[0]}: the runs were not probed there; they have {', '.join(map(str, known))}"
        )
    partly = unprobed_of(evidence, horizon).rows(named=True)
    for each in partly:
        note(f"{each['what']} {each['why']}")
    findings = findings_of(evidence, horizon)
    rows = [
        {
            "representation": row["arm"] + (" (RANDOM WEIGHTS)" if row["random_weights"] else ""),
            "model": f"{row['model']} {row['size']}",
            "environment": row["environment"],
            "look": row["look"],
            "error": row["measure"],
            "horizon": row["horizon"],
            "mean": row["mean"],
            "sem": row["sem"],
            "runs": row["runs"],
        }
        for row in errors.iter_rows(named=True)
        if row["horizon"] in horizon
    ]
    order = ("environment", "model", "error", "horizon", "mean")
    rows.sort(key=lambda row: (row["look"] != OWN, row["look"], *(row[name] for name in order)))
    sentences = sentences_of(findings)
    found = {
        "rows": rows,
        "findings": sentences,
        "standings": findings.standings,
        "comparisons": findings.comparisons,
        "left_out": [*silent, *partly],
    }
    columns = ("representation", "model", "environment", "look", "error", "horizon", "mean ± sem", "runs")
    tell(json_, found, [{**row, "mean ± sem": mean_sem(row)} for row in rows], columns)
    for sentence in [] if json_ else sentences:
        print(sentence)
