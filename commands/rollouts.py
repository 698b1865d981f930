"""``collect`` and ``envs``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvrpipe.commands.options import (
    DATA,
    Address,
    Debug,
    Engine,
    Format,
    Json,
    Overwrite,
    Root,
    Seed,
    ShardRows,
    Workers,
    check_engine,
)
from pvrpipe.commands.terminal import note, tell, watching
from pvrpipe.schemas.errors import InvalidValueError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from pvrpipe.store.reading import Store


def collect(
    env: Annotated[
        str | None,
        typer.Argument(
            help="Environment, e.g. dmc:walker-walk; `pvrpipe envs` lists them. Default: dmc:pendulum-swingup."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Rollout store to write.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of a side of the square frames; default: 256, or as replayed.")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="Number or name of a camera; default: the usual one there.")
    ] = None,
    action_repeat: Annotated[
        int | None,
        typer.Option(help="Simulator steps per action, rewards summed; default: what is usual there."),
    ] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes to collect; default: 24.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Transitions per episode; default: the task's limit.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="random, ou, pink, mpc, scripted, a preset (medium, expert, mixed), or a mixture such as "
            "random:0.5,mpc@0.5+0.3:0.5. Default: mixed, or random where nothing better is known."
        ),
    ] = None,
    variation: Annotated[
        str, typer.Option(help="none, id, ood, FACTOR=SEVERITY such as camera=0.3, or a mixture.")
    ] = "none",
    replay: Annotated[
        str | None,
        typer.Option(help="A rollout store whose trajectories are seen anew, instead of playing new ones."),
    ] = None,
    shard_rows: ShardRows = None,
    format_: Format = "parquet",
    append: Annotated[
        bool, typer.Option("--append", help="Let a finished store grow to --episodes, as a new revision.")
    ] = False,
    seed: Seed = 0,
    engine: Engine = "ray",
    address: Address = None,
    workers: Workers = None,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Episodes that the environment may fail in; others take their place.")
    ] = 3,
    episode_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which an episode counts as hung; needs Ray.")
    ] = None,
    overwrite: Overwrite = False,
    root: Root = DATA,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Collect rollouts of an environment into a store, or see stored ones anew.

    Example: pvrpipe collect dmc:walker-walk --episodes 100 --policy mixed --variation id
    """
    from pvrpipe.rollouts import collect as stage
    from pvrpipe.rollouts.environments import DEFAULT_ENVIRONMENT
    from pvrpipe.store.workspace import Workspace

    check_engine(engine, address, workers)
    running = stage.Engine(engine, address, workers, max_failures, episode_timeout)
    if replay is not None:
        refuse_with_replay(
            policy=policy,
            episodes=episodes,
            action_repeat=action_repeat,
            max_steps=max_steps,
            append=append,
            seed=seed or None,
            shard_rows=shard_rows,
            format=format_ if format_ != "parquet" else None,
        )
        source, env, out = replayed(replay, env, out)
        out = out or Workspace(root).rollouts(env + replay_label(size, camera, variation))
        with watching("replay", "frames", f"seeing {replay} anew in {out}") as progress:
            result = stage.replay(
                source,
                out,
                running,
                size=size,
                camera=camera,
                variation=variation,
                overwrite=overwrite,
                progress=progress,
            )
    else:
        env = DEFAULT_ENVIRONMENT if env is None else env
        if ":" not in env and "/" in env:
            raise InvalidValueError(
                f"{env} is a place; name the environment first: pvrpipe collect {DEFAULT_ENVIRONMENT} {env}"
            )
        out = out or Workspace(root).rollouts(env + (f"-{variation}" if variation != "none" else ""))
        config = stage.CollectConfig(
            environment=env,
            size=256 if size is None else size,
            camera=camera,
            action_repeat=action_repeat,
            episodes=24 if episodes is None else episodes,
            max_steps=max_steps,
            policy=usual_policy(env) if policy is None else policy,
            variation=variation,
            seed=seed,
            shard_rows=shard_rows,
            shard_format=format_,
        )
        with watching("collect", "frames", f"collecting {env} into {out}") as progress:
            result = stage.collect(
                config, out, running, overwrite=overwrite, append=append, progress=progress
            )
    if append and result.resumed_shards == result.shards:
        note(f"{out} has {result.episodes} episodes already; nothing was collected, give more --episodes")
    if result.failed:
        note(
            f"the environment failed in {result.failed} episodes; `pvrpipe inspect {out}` says where and how"
        )
    tell(
        json_,
        result,
        [result],
        ("store", "episodes", "rows", "shards", "resumed_shards", "failed", "frames_per_second"),
    )


def envs(
    family: Annotated[
        str | None,
        typer.Argument(help="Only those of a family: dmc, metaworld, miniworld, maniskill, ale, gym."),
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the environments, and what installs those that are not there.

    Example: pvrpipe envs dmc
    """
    from pvrpipe.rollouts.environments import list_environments, missing_families, prefixes

    if family is not None and family not in prefixes():
        raise UnknownNameError.among("family of environments", family, prefixes())
    names, missing = list_environments(family), missing_families()
    if family in missing:
        raise MissingExtraError(missing[family])
    tell(json_, {"envs": names, "missing": missing}, [{"env": name} for name in names], ("env",))
    for cure in [] if family else missing.values():
        note(cure)


def refuse_with_replay(**given: object) -> None:
    """A replay takes all but the look from the store that is replayed."""
    for option, value in given.items():
        if value not in (None, False):
            raise InvalidValueError(
                f"--{option.replace('_', '-')} does not go with --replay, which shows what is stored; leave it out"
            )


def replayed(replay: str, env: str | None, out: Path | None) -> tuple[Store, str, Path | None]:
    """The store that is replayed, its environment, and the output: with one argument, that is the output."""
    from pvrpipe.store.reading import Store

    source = Store.open(replay, kind="rollouts")
    environment = source.manifest.rollouts.environment
    if env is not None and out is None and ":" not in env:
        return source, environment, Path(env)
    if env not in (None, environment):
        raise InvalidValueError(f"{replay} holds {environment}, not {env}; name that, or leave it out")
    return source, environment, out


def replay_label(size: int | None, camera: str | None, variation: str) -> str:
    """What tells a replayed store from its source."""
    told = (f"size{size}" if size else "", camera or "", variation if variation != "none" else "")
    return "-" + ("-".join(part for part in told if part) or "again")


def usual_policy(env: str) -> str:
    """The best mixture that is known for a family of environments."""
    from pvrpipe.rollouts.presets import FAMILIES

    return "mixed" if env.partition(":")[0] in FAMILIES else "random:0.5,pink:0.5"
