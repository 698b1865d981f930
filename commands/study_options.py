"""A study by options: what its file would say, or what is to stand in the place of what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pvrpipe.commands.training_options import MODELS, SIZES
from pvrpipe.schemas.errors import NotAStudyError, PvrpipeError

MODEL = "dreamerv3"  # of a study that names none


@dataclass(frozen=True)
class StudyOptions:
    """The axes of a study, each repeatable, and the fields that decide how long it takes."""

    name: Annotated[
        str | None,
        typer.Option(help="Of its folder and page; default: the file's, or a digest of the options."),
    ] = None
    environment: Annotated[list[str] | None, typer.Option(help="That `pvrpipe envs` lists; repeatable.")] = (
        None
    )
    variation: Annotated[
        list[str] | None, typer.Option(help="Look that models are trained on; repeatable.")
    ] = None
    shift: Annotated[
        list[str] | None, typer.Option(help="Look that they are probed on besides; repeatable.")
    ] = None
    pvr: Annotated[
        list[str] | None,
        typer.Option(help="scratch, autoencoder, random, a name of `pvrpipe pvrs`, or a path; repeatable."),
    ] = None
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Blocks that are kept of every transformer: all, 0-11; repeatable."),
    ] = None
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Map from an embedding to the model: auto, linear, mlp; repeatable."),
    ] = None
    model: Annotated[list[str] | None, typer.Option(help=f"{MODELS}; repeatable.")] = None
    size: Annotated[list[str] | None, typer.Option(help=f"{SIZES}; repeatable.")] = None
    seed: Annotated[list[int] | None, typer.Option(help="Of weights and batches; repeatable.")] = None
    episodes: Annotated[int | None, typer.Option(help="To collect in each environment.")] = None
    max_steps: Annotated[int | None, typer.Option(help="Transitions of an episode.")] = None
    frame_size: Annotated[int | None, typer.Option(help="Pixels of a side of what is collected.")] = None
    policy: Annotated[str | None, typer.Option(help="That collects.")] = None
    pretrain_updates: Annotated[int | None, typer.Option(help="Gradient steps of the autoencoder.")] = None
    updates: Annotated[int | None, typer.Option(help="Gradient steps of every model.")] = None
    batch: Annotated[int | None, typer.Option(help="Windows in a batch of every model.")] = None
    length: Annotated[int | None, typer.Option(help="Rows of a window of every model.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of every model.")] = None
    horizon: Annotated[list[int] | None, typer.Option(help="Rows to accumulate over; repeatable.")] = None

    def within(self, content: dict[str, Any] | None) -> dict[str, Any]:
        """A study's content with these options in the place of what it says; without one, what they alone say.

        Raises:
            NotAStudyError: there is no content, and none is made by these options.
        """
        if content is None and not (self.environment and self.pvr):
            raise NotAStudyError(
                "a study needs its YAML file, such as studies/quick.yaml, or --environment and --pvr"
            )
        found = dict(content or {"models": [{"model": MODEL}]})
        found |= _given(
            name=self.name,
            environments=self.environment,
            variations=self.variation,
            shifts=self.shift,
            encoders=self.encoder,
            seeds=self.seed,
            pvrs=self.pvr,
        )
        if self.blocks:
            found["pvrs"] = self._cut(found.get("pvrs"))
        collect = _given(
            size=self.frame_size, episodes=self.episodes, max_steps=self.max_steps, policy=self.policy
        )
        pretrain, probe = _given(updates=self.pretrain_updates), _given(horizons=self.horizon)
        for part, given in (("collect", collect), ("pretrain", pretrain), ("probe", probe)):
            if given:
                found[part] = _with(found.get(part, {}), given)
        found["models"] = self._models(found.get("models"))
        if content is None and self.name is None:
            from pvrpipe.commands.study_plan import digest

            # As text: what is no JSON may be in it, and is refused later.
            found["name"] = f"study-{digest(str(found))}"
        return found

    def _cut(self, pvrs: Any) -> Any:
        """Representations that have blocks, in those that were asked for; if none has, each is refused later."""
        if not isinstance(pvrs, list):
            return pvrs
        entries = [{"pvr": entry} if isinstance(entry, str) else entry for entry in pvrs]
        having = [entry for entry in entries if _has_blocks(entry)] or entries
        return [_with(entry, {"blocks": self.blocks}) if entry in having else entry for entry in entries]

    def _models(self, models: Any) -> Any:
        """Those that were asked for, as the file has them if it has them, every one with what was given for all."""
        if self.model:
            named = {entry["model"]: entry for entry in _named(models)}
            models = [named.get(name, {"model": name}) for name in self.model]
        given = _given(
            sizes=self.size,
            updates=self.updates,
            batch=self.batch,
            length=self.length,
            learning_rate=self.learning_rate,
        )
        return [_with(entry, given) for entry in models] if given and isinstance(models, list) else models


def _given(**values: Any) -> dict[str, Any]:
    """What was given of some options; an empty list is none."""
    return {name: value for name, value in values.items() if value is not None and value != []}


def _with(part: Any, given: dict[str, Any]) -> Any:
    """A part of a study's content with values in it; what is no part is left for who reads it to refuse."""
    return {**part, **given} if isinstance(part, dict) else part


def _has_blocks(entry: Any) -> bool:
    from pvrpipe.pipeline.zoo import find_pvr

    try:
        return isinstance(entry, dict) and find_pvr(str(entry.get("pvr"))).is_transformer
    except PvrpipeError:
        return False


def _named(models: Any) -> Iterator[dict[str, Any]]:
    for entry in models if isinstance(models, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("model"), str):
            yield entry
