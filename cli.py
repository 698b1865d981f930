"""The command line: parse, call one function, print. ``--json`` prints one object as the last line of stdout.

The commands are in ``commands/``, a file for each stage.
"""

from __future__ import annotations

import errno
import os
import sys

import typer

from pvrpipe.commands import embeddings, importing, machine, models, rollouts, stores, studies, sweeps
from pvrpipe.schemas.errors import PvrpipeError, one_line

STOPPED = 130  # what typer returns for Ctrl-C

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich"
)
app.command()(rollouts.collect)
app.command("import")(importing.import_)
app.command()(embeddings.embed)
app.command("train-model")(models.train_model)
app.command()(sweeps.sweep)
app.command()(models.probe)
app.command()(studies.study)
app.command()(studies.report)
app.command()(studies.compare)
app.command()(models.runs)
app.command()(embeddings.pretrain)
for command in (
    stores.inspect,
    stores.preview,
    stores.verify,
    stores.push,
    stores.pull,
    stores.merge,
    stores.split,
    stores.convert,
    stores.card,
    rollouts.envs,
    embeddings.pvrs,
    machine.doctor,
    machine.demo,
):
    app.command()(command)


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 1, a stop leaves what is finished."""
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # Ray's own log files keep the rest
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each retry of a hub that does not answer
    try:
        status = app(standalone_mode=False)
    except KeyboardInterrupt:  # before typer looks for it
        status = STOPPED
    except PvrpipeError as error:
        if "--debug" in sys.argv:
            raise
        fail(one_line(error), 1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own: wrong usage
            error.show()
            sys.exit(error.exit_code)
        if "--debug" not in sys.argv and (limit := _limit_of_the_machine(error)):
            fail(limit, 1)
        raise
    if status == STOPPED:
        again = "without --overwrite " if "--overwrite" in sys.argv else ""
        fail(
            f"stopped; what is finished is kept. Run the same command {again}again to go on from there.",
            STOPPED,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _limit_of_the_machine(error: Exception) -> str | None:
    """What was asked for is more than there is memory for, or longer than a name can be."""
    # torch's, of a GPU and of a CPU, are no MemoryError; and torch need not be loaded here
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or torchs:
        return (
            f"memory does not suffice ({one_line(error)[:120]}); give a smaller --batch, --length or --size"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:80]}… is longer than the name of a file can be; give a shorter one"
    return None


def fail(message: str, status: int) -> None:
    """Say it on stderr and leave."""
    print(f"pvrpipe: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
