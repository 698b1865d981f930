"""Studies by options, alone or in the place of what a file says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pvrpipe.commands.study_checks import mistakes_of, mistakes_of_plan
from pvrpipe.commands.study_estimate import costs_of
from pvrpipe.commands.study_options import StudyOptions
from pvrpipe.commands.study_plan import plan_of
from pvrpipe.rollouts.variation import FACTORS
from pvrpipe.schemas.study import study_of

from .commands import run
from .test_study import TINY

OPTIONS = {
    "environment": ["dmc:pendulum-swingup"],
    "pvr": ["scratch", "random", "vc1-l"],
    "blocks": ["all", "0-11"],
    "model": ["dreamerv3", "tdmpc2"],
    "seed": [0, 1],
    "shift": ["ood"],
    "encoder": ["linear", "mlp"],
    "updates": [7],
    "horizon": [4, 9],
    "episodes": [6],
    "max-steps": [12],
    "frame-size": [32],
    "length": [5],
    "pretrain-updates": [3],
}
SCALARS = ("updates", "episodes", "max_steps", "frame_size", "length", "pretrain_updates")


def test_options_say_what_a_file_says() -> None:
    given = {name.replace("-", "_"): value for name, value in OPTIONS.items()}
    scalars = {name: given.pop(name)[0] for name in SCALARS}
    by_options, mistakes = study_of(StudyOptions(**given, **scalars).within(None))
    blocks = ["all", "0-11"]
    content: dict[str, Any] = {
        "environments": ["dmc:pendulum-swingup"],
        "shifts": ["ood"],
        "pvrs": ["scratch", "random", {"pvr": "vc1-l", "blocks": blocks}],
        "models": [{"model": name, "updates": 7, "length": 5} for name in ("dreamerv3", "tdmpc2")],
        "encoders": ["linear", "mlp"],
        "seeds": [0, 1],
        "collect": {"episodes": 6, "max_steps": 12, "size": 32},
        "pretrain": {"updates": 3},
        "probe": {"horizons": [4, 9]},
    }
    assert by_options is not None
    assert mistakes == []
    assert by_options == study_of({**content, "name": by_options.name})[0]
    again = StudyOptions(**{**given, "seed": [0]}, **scalars).within(None)
    assert again["name"].startswith("study-")
    assert again["name"] != by_options.name, "another study would take its folder"


def test_options_take_the_place_of_what_a_file_says() -> None:
    content = {**TINY, "shifts": ["ood"], "seeds": [0, 1, 2]}
    asked = StudyOptions(model=["tdmpc2", "dinowm"], seed=[5], updates=9, horizon=[3], policy="ou")
    found = asked.within(content)
    models = [{**TINY["models"][1], "updates": 9}, {"model": "dinowm", "updates": 9}]
    changed = {"seeds": [5], "models": models, "probe": {"horizons": [3]}}
    assert found == {**content, **changed, "collect": {**TINY["collect"], "policy": "ou"}}
    assert StudyOptions().within(content) == content
    for wrong in ({"models": 3, "pvrs": "x", "collect": []}, {"models": [{"model": ["a"]}, 3], "pvrs": [3]}):
        cut = StudyOptions(blocks=["0-3"], updates=1, episodes=1).within(wrong)
        assert study_of(cut)[1], "what is no study was made one"


@pytest.mark.parametrize("given", [[], ["--environment", "dmc:pendulum-swingup"], ["--pvr", "scratch"]])
def test_a_study_of_nothing_says_what_it_needs(given: list[str], tmp_path: Path) -> None:
    done = run("study", *given, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "studies/quick.yaml, or --environment and --pvr" in done.stderr


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_not_finite_is_a_mistake(rate: float) -> None:
    """It was a traceback: the name is a digest of what was given, and no JSON holds it."""
    asked = StudyOptions(environment=["dmc:pendulum-swingup"], pvr=["random"], learning_rate=rate)
    _, mistakes = study_of(asked.within(None))
    assert [line.split(", not")[0] for line in mistakes] == [
        "models[0].learning_rate: input should be a finite number"
    ]


def test_windows_and_contexts_that_no_episode_holds_are_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    """Every run failed, after hours of collecting."""
    asked = StudyOptions(environment=["dmc:pendulum-swingup"], pvr=["random"], max_steps=12)
    content = replace(asked, model=["dreamerv3", "tdmpc2"]).within(None) | {"probe": {"context": 13}}
    wanted, _ = study_of(content)
    assert wanted is not None
    assert mistakes_of_plan(plan_of(wanted, tmp_path, "cpu"), fetch=False) == [
        "models: dreamerv3: a window has 64 rows, an episode 13; give fewer, or more max_steps",
        "probe.context: predictions begin behind 13 rows, an episode 13; give fewer, or more max_steps",
    ]


@pytest.mark.parametrize("others", [["linear"], ["linear", "mlp"]])
def test_a_models_own_map_beside_others_is_a_mistake(others: list[str]) -> None:
    """The same runs were trained twice, and the report compared them."""
    asked = StudyOptions(environment=["dmc:pendulum-swingup"], pvr=["random"], encoder=["auto", *others])
    _, mistakes = study_of(asked.within(None))
    assert mistakes == ["encoders: auto is one of the others, whichever a model has first; leave it out"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"pvr": ["scratch"], "model": ["dinowm"]},
            "models: dinowm 1m: it learns from embeddings, and scratch has none; name another of pvrs",
        ),
        (
            {"pvr": ["random"], "episodes": 1},
            "collect.episodes: of one episode none is held out to be probed on; give 2 or more",
        ),
    ],
)
def test_what_no_run_could_come_of_is_refused_before_anything_is_collected(
    tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    """All was collected, and the study then said of no run that it was waiting, or of every run that it failed."""
    wanted, mistakes = study_of(StudyOptions(environment=["dmc:pendulum-swingup"], **given).within(None))
    assert wanted is not None
    assert mistakes == []
    found = mistakes_of(wanted) + mistakes_of_plan(plan_of(wanted, tmp_path, "cpu"), fetch=False)
    assert found == [told]


def test_a_study_by_options_is_planned_like_any_other(tmp_path: Path) -> None:
    given = [part for name, values in OPTIONS.items() for v in values for part in (f"--{name}", str(v))]
    done = run("study", *given, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # frames and a ResNet have no blocks; of TD-MPC2 there is one map, and of frames none
    assert len(json.loads(done.stdout.splitlines()[-1])["runs"]) == 2 * (2 + 3 * (2 + 1))
    assert not (tmp_path / "data").exists()


def test_names_of_folders_fit_and_stay_apart(tmp_path: Path) -> None:
    """Two looks that vary every factor made one name of 304 letters, and a study failed half way."""
    looks = ["+".join(f"{factor}={severity}" for factor in FACTORS) for severity in (0.25, 0.5, 0.75)]
    asked = StudyOptions(environment=["dmc:pendulum-swingup"], pvr=["random"], variation=looks[:1])
    wanted, mistakes = study_of(replace(asked, shift=looks[1:]).within(None))
    assert wanted is not None
    assert mistakes + mistakes_of(wanted) == []
    plan = plan_of(wanted, tmp_path, "cpu")
    folders = [each.folder for each in (*plan.looks, *plan.encoded)]
    (job, record) = plan.jobs[0]
    names = [part for folder in folders for part in folder.relative_to(tmp_path).parts]
    assert max(map(len, [*names, *record.probes, job.run.name])) <= 255 - len(".metrics-.json.partial")
    assert len(set(folders)) == len(folders) == 6
    assert len(set(record.probes)) == 3


def test_bytes_are_estimated_for_the_precision_they_are_stored_in(tmp_path: Path) -> None:
    taken = {}
    for dtype in ("float16", "float32"):
        asked = StudyOptions(environment=["dmc:pendulum-swingup"], pvr=["random"], episodes=6, max_steps=12)
        wanted, _ = study_of(asked.within(None) | {"embed": {"dtype": dtype}})
        assert wanted is not None
        (taken[dtype],) = (c.bytes for c in costs_of(plan_of(wanted, tmp_path, "cpu")) if c.stage == "embed")
    assert taken == {"float16": 6 * 13 * 512 * 2, "float32": 6 * 13 * 512 * 4}
