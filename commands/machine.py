"""``doctor`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvrpipe.commands.options import DATA, Debug, Engine, Json, Root, Seed
from pvrpipe.commands.terminal import ERROR_COLUMNS, tell


def doctor(root: Root = DATA, json_: Json = False, debug: Debug = False) -> None:
    """Check what pvrpipe needs of this machine, and print the command that mends what fails.

    Example: pvrpipe doctor
    """
    from pvrpipe.commands.doctor import examine

    checks = examine(root)
    ok = all(check.ok for check in checks if check.needed)
    tell(json_, {"ok": ok, "checks": checks}, checks, ("check", "ok", "found", "mend"))
    if not ok:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Argument(help="Workspace of the demonstration.")] = Path("demo"),
    episodes: Annotated[int, typer.Option(help="Episodes to collect.")] = 12,
    max_steps: Annotated[int, typer.Option(help="Transitions per episode.")] = 200,
    updates: Annotated[int, typer.Option(help="Gradient steps per network.")] = 300,
    engine: Engine = "ray",
    seed: Seed = 0,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Go the whole way on a real environment: collect, pretrain, embed, train, probe, compare.

    Example: pvrpipe demo
    """
    from pvrpipe.commands.demo import DemoConfig, demonstrate

    rows = demonstrate(out, DemoConfig(episodes, max_steps, updates, seed, engine))
    tell(json_, {"table": rows}, rows, ("pvr", "model", *ERROR_COLUMNS))
