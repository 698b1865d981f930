"""What a study plans: every field of its file reaches what is made, and the commands it names make the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pvrpipe.cli import app
from pvrpipe.commands import study_checks, study_stages
from pvrpipe.commands.study_checks import mistakes_of_plan, unfetched
from pvrpipe.commands.study_plan import Plan, plan_of
from pvrpipe.commands.study_stages import How
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.rollouts.collect import Engine
from pvrpipe.schemas.study import study_of
from pvrpipe.worldmodel.training import TrainConfig

#: Nothing in it is as it is by default.
ALL_ELSE: dict[str, Any] = {
    "name": "else",
    "environments": ["dmc:pendulum-swingup"],
    "variations": ["none", "id"],
    "shifts": ["ood"],
    "collect": {"size": 32, "episodes": 6, "max_steps": 20, "policy": "random", "seed": 3},
    "pvrs": ["scratch", "autoencoder", {"pvr": "random", "weights": "random:5"}],
    "pretrain": {"updates": 2, "size": 16},
    "embed": {"dtype": "float32", "precision": "bf16"},
    "encoders": ["linear", "mlp"],
    "models": [
        {
            "model": "dreamerv3",
            "sizes": ["12m"],
            "updates": 40,
            "batch": 4,
            "length": 6,
            "learning_rate": 2e-3,
            "warmup": 7,
            "precision": "bf16",
            "symlog": False,
            "save_every": 20,
            "scratch": {"batch": 2, "length": 5},
        },
        {"model": "dinowm", "updates": 40, "save_every": 75},
    ],
    "seeds": [4, 9],
    "probe": {"horizons": [3, 8], "context": 2, "splits": ["train", "val"]},
}
#: Its first run and its last.
NAMES = [
    "pendulum-swingup-from-scratch-dreamerv3-12m-s4-689f7881",
    "pendulum-swingup-random-random-5-dinowm-1m-s9-2e9261c3",
]


class AskedError(Exception):
    """What a command would have done."""


def planned(root: Path, **changes: Any) -> Plan:
    wanted, mistakes = study_of({**ALL_ELSE, **changes})
    assert mistakes == []
    assert wanted is not None
    return plan_of(wanted, root, "cpu")


def trained(**changes: Any) -> TrainConfig:
    given = {name: value for name, value in ALL_ELSE["models"][0].items() if name not in ("sizes", "scratch")}
    given |= {"size": "12m", "symlog_inputs": given.pop("symlog"), "log_every": 10}
    return TrainConfig(**{**given, **changes})


def test_every_field_of_a_study_reaches_its_stores(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    own, shifted = plan.looks[:2], plan.looks[2:]
    assert [(look.variation, look.config.variation, look.source) for look in own] == [
        ("none", "none", None),
        ("id", "id", None),
    ]
    assert [(look.variation, look.source) for look in shifted] == [("ood", own[0]), ("ood", own[1])]
    assert {(look.config.seed, look.config.size, look.config.max_steps) for look in own} == {(3, 32, 20)}
    for look in own:
        of_it = [each for each in plan.embeddings if look in (each.look, each.look.source)]
        assert len(of_it) == 4
        assert {(each.request.precision, each.dtype) for each in of_it if each.request} == {
            ("bf16", "float32")
        }
        assert {each.request.weights for each in of_it if each.request} == {"auto", "random:5"}
        # also in a shifted look it is the encoder that was trained on the look of the models
        encoders = {each.pretrained for each in of_it if each.pretrained is not None}
        ((_, config, rollouts),) = encoders
        assert (config.updates, config.size, config.seed, rollouts) == (2, 16, 3, look.folder)


def test_every_field_of_a_study_reaches_its_runs(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    jobs = [job for job, record in plan.jobs if record.variation == "id" and record.model == "dreamerv3"]
    scratch = {"batch": 2, "length": 5, "encoder": "auto"}
    assert [job.config for job in jobs] == [
        *(trained(seed=seed, **scratch) for seed in (4, 9)),
        *(
            trained(seed=s, encoder=e)
            for _ in ("autoencoder", "random")
            for e in ("linear", "mlp")
            for s in (4, 9)
        ),
    ]
    folders = {str(each.folder): each for each in plan.encoded}
    for job, record in plan.jobs:
        assert (job.horizons, job.context, job.split) == ((3, 8), 2, ("train", "val"))
        ((label, elsewhere),) = job.shifts
        assert (label, folders[elsewhere].label) == ("ood", record.pvr)
        assert folders[elsewhere].look.source == folders[job.store].look
        assert job.frames == (str(folders[job.store].look.folder) if record.seed == 4 else "")
        assert record.encoder == ("cnn" if record.pvr == "from scratch" else job.config.encoder)
    # dinowm predicts embeddings: of frames it has no run
    assert {record.pvr for _, record in plan.jobs if record.model == "dinowm"} == {
        "autoencoder",
        "random random:5",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"embed": {"dtype": "float32"}},
        {"embed": {"precision": "bf16"}},
        {"collect": {**ALL_ELSE["collect"], "seed": 4}},
        {"pretrain": {"updates": 3, "size": 16}},
    ],
)
def test_what_decides_a_store_decides_its_folder_and_its_runs(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    pvrs = ["autoencoder"]
    one, other = (
        planned(tmp_path, pvrs=pvrs, embed={}),
        planned(tmp_path, pvrs=pvrs, **{"embed": {}, **changes}),
    )
    assert not {each.folder for each in one.embeddings} & {each.folder for each in other.embeddings}
    assert not {job.run for job, _ in one.jobs} & {job.run for job, _ in other.jobs}


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Commands that end where their work would begin."""
    asked: dict[str, Any] = {}

    def stop(*given: Any, **_: Any) -> None:
        asked["given"] = given
        raise AskedError

    for name in ("worldmodel.training.train", "pipeline.embed.embed"):
        monkeypatch.setattr(f"pvrpipe.{name}", stop)
    monkeypatch.setattr("pvrpipe.rollouts.collect.collect", stop)
    monkeypatch.setattr("pvrpipe.commands.embeddings.environment_of", lambda _: "dmc:pendulum-swingup")
    return asked


def typed(line: str, asked: dict[str, Any]) -> Any:
    """What a command line asks for."""
    with pytest.raises(AskedError):
        typer.main.get_command(app)(shlex.split(line)[1:], standalone_mode=False)
    return asked["given"]


def test_commands_that_a_study_names_ask_for_what_it_makes(tmp_path: Path, stopped: dict[str, Any]) -> None:
    """With `save_every: 20` a run's command wanted other lines in its log, and was refused in the run's folder."""
    plan = planned(tmp_path)
    for job, record in plan.jobs:
        config, store, run = typed(record.commands[0], stopped)
        assert (config, str(store), run) == (job.config, job.store, job.run)
    for look in plan.looks:
        if look.source is None:
            assert typed(look.command, stopped)[:2] == (look.config, look.folder)
    for each in plan.embeddings:
        if each.pretrained is None:
            rollouts, outputs, config = typed(each.command, stopped)[:3]
            assert (str(rollouts), outputs, config.dtype) == (
                str(each.look.folder),
                [(each.request, each.folder)],
                each.dtype,
            )


def test_a_study_computes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` was for pretraining and models; embeddings were computed on a GPU where there was one."""
    plan, asked = planned(tmp_path), dict[str, Any]()

    def stop(*given: Any, **named: Any) -> None:
        asked["given"], asked["named"] = given, named
        raise AskedError

    monkeypatch.setattr(study_stages, "embed", stop)
    how = How(Engine("ray", "somewhere:1", 3), "cuda")
    with pytest.raises(AskedError):
        study_stages._embed(plan.looks[0], [plan.embeddings[-1]], how)
    _, ((request, folder),), config = asked["given"][:3]
    assert (request.device, folder) == ("cuda", plan.embeddings[-1].folder)
    assert (config.engine, config.address, config.workers) == ("ray", "somewhere:1", 3)
    assert config.dtype == "float32"


def test_only_published_weights_are_said_to_be_elsewhere(tmp_path: Path) -> None:
    """The folder of an encoder of one's own, weights and all, was said not to be on this machine yet."""
    spec = find_pvr("mocov3-s").model_dump(mode="json")
    (tmp_path / "pvr.json").write_text(json.dumps({**spec, "source": {"file": "encoder.safetensors"}}))
    assert unfetched(planned(tmp_path / "data", pvrs=["scratch", str(tmp_path)])) == []
    assert unfetched(planned(tmp_path / "data", pvrs=["scratch", "vc1-l"])) == ["vc1-l"]


def test_the_names_of_runs_outlive_new_options(tmp_path: Path) -> None:
    """`--joined` was a part of every name though it was off: finished studies were to be trained anew.

    Whoever adds an option of training adds it to ``LATER``.
    """
    runs = [job.run.name for job, _ in planned(tmp_path, variations=["none"]).jobs]
    assert [runs[0], runs[-1]] == NAMES


def test_weights_are_asked_for_only_where_something_is_to_be_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace goes to a machine without network, and the study goes on there."""
    plan = planned(tmp_path / "data", variations=["none"], shifts=[], pvrs=["scratch", "vc1-l"])
    monkeypatch.setattr(study_checks, "find_weights", lambda _pvr, _weights, name: asked.append(name))
    there, asked = {look.folder for look in plan.looks}, list[str]()
    monkeypatch.setattr(study_checks, "sealed", lambda folder: folder if folder in there else None)
    assert mistakes_of_plan(plan, fetch=True) == []
    assert (asked, unfetched(plan)) == (["vc1-l"], ["vc1-l"])
    there |= {each.folder for each in plan.embeddings}
    asked.clear()
    assert mistakes_of_plan(plan, fetch=True) == []
    assert (asked, unfetched(plan)) == ([], [])
