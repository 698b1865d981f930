"""The world models by name, and what training and probing ask of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.worldmodel import dinowm, dreamerv3, tdmpc2
from pvrpipe.worldmodel.actions import Bounds
from pvrpipe.worldmodel.distributions import TwoHot
from pvrpipe.worldmodel.inputs import BACKBONE, Observation
from pvrpipe.worldmodel.predictions import Filtered, Imagined

SMALL = 2_000_000  # parameters
SIZES = {"dreamerv3": tuple(dreamerv3.SIZES), "tdmpc2": tuple(tdmpc2.SIZES), "dinowm": tuple(dinowm.SIZES)}


class WorldModel(Protocol):
    """A ``torch.nn.Module`` that learns from windows and predicts whole episodes.

    ``N`` episodes of ``T`` rows, alignment as in :mod:`pvrpipe.schemas.axes`. A batch has ``observation`` (…, *shape),
    ``action``, ``reward``, ``is_first``, ``is_terminal`` and the model's further ``columns``. A state is whatever the
    model needs to go on from a row, a latent whatever it compares predictions by.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the store that it reads besides."""

    @property
    def rows_before(self) -> int:
        """Rows that a window needs in front of those it trains on."""

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, rows_before + T, ...) -> the loss and its terms."""

    def draw(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Any:
        """All chance in the loss of a batch: tensors."""

    def losses(self, batch: Mapping[str, Tensor], drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``loss``, a function of tensors alone, which can be compiled."""

    def filter(self, batch: Mapping[str, Tensor], random: torch.Generator) -> Filtered:
        """Episodes (N, T, ...) -> state, latents and features of each row, from the rows up to it."""

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> Imagined:
        """A row's state (N, F) and the actions from there (N, T, A) -> latents and rewards of the next rows."""

    @property
    def two_hot(self) -> TwoHot:
        """The distribution of its rewards."""

    @property
    def divergence(self) -> str:
        """The one of its divergences that the study plots."""

    def divergences(self, predicted: Tensor, filtered: Tensor) -> dict[str, Tensor]:
        """How far predicted latents are from filtered ones, by name: (N, T, ...) twice -> (N, T) each."""

    def average(self, latents: Tensor) -> Tensor:
        """The latent that says the same of every row: (N, ...) -> (...)."""


@dataclass(frozen=True)
class Setting:
    """What a store decides about a model that is trained on it."""

    observation: Observation
    action: int
    """A"""
    state: int
    """S, 0 where there is none"""
    steps: int
    """transitions of the longest episode"""
    episodic: bool
    """whether any episode ended before its time"""
    frames: Observation | None = None
    """what a row shows to a backbone, which makes the observation of it"""
    bounds: Bounds | None = None
    """of actions, see :func:`pvrpipe.worldmodel.actions.bounds_of`"""

    @property
    def shown(self) -> Observation:
        """What a row of the store shows."""
        return self.frames or self.observation


@contextlib.contextmanager
def suitable_threads(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute on one thread while a small model is used on the CPU.

    Below two million parameters a second thread gains 15 to 30 % on an idle machine and loses a factor of
    ten where anything else runs, because each small product then waits for both. One thread also gives
    the same bits on every number of cores.
    """
    before = torch.get_num_threads()
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if small and device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are the model's own: all but what of a backbone does not learn."""
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if value.requires_grad or not name.startswith(BACKBONE)
    }


def parameter_count(model: nn.Module) -> int:
    """Numbers in the parameters that are the model's own."""
    own = own_tensors(model)
    return sum(p.numel() for name, p in model.named_parameters() if name in own)


def check_names(model: str, size: str) -> None:
    """Raise UnknownNameError, naming the nearest, unless there is such a model in such a size."""
    if model not in SIZES:
        raise UnknownNameError.among("world model", model, SIZES)
    if size not in SIZES[model]:
        raise UnknownNameError.among(f"{model} size", size, SIZES[model])


def build_model(
    model: str,
    size: str,
    setting: Setting,
    *,
    seed: int,
    encoder: str = "auto",
    symlog_inputs: bool = True,
    burn_in: int = 0,
    proprioception: bool = False,
) -> dreamerv3.DreamerV3 | tdmpc2.TDMPC2 | dinowm.DinoWM:
    """A model with freshly drawn weights; the same seed gives the same weights, whatever was drawn before."""
    check_names(model, size)
    observation, action = setting.observation, setting.action
    if proprioception and not setting.state:
        raise InvalidValueError("--proprioception: the store has no state column; leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model == "dreamerv3":
            return dreamerv3.DreamerV3(
                size, observation, action, encoder=encoder, symlog_inputs=symlog_inputs, burn_in=burn_in
            )
        if model == "tdmpc2":
            return tdmpc2.TDMPC2(
                size, observation, action, encoder=encoder, steps=setting.steps, episodic=setting.episodic
            )
        seen = setting.state if proprioception else 0
        return dinowm.DinoWM(size, observation, action, encoder=encoder, proprioception=seen)
