"""The world models by name, and what training and probing ask of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from pvrpipe.schemas.errors import UnknownNameError
from pvrpipe.worldmodel import dreamerv3, tdmpc2

SMALL = 2_000_000  # parameters
SIZES = {"dreamerv3": tuple(dreamerv3.SIZES), "tdmpc2": tuple(tdmpc2.SIZES)}


class WorldModel(Protocol):
    """A ``torch.nn.Module`` that learns from windows and predicts whole episodes.

    ``N`` episodes of ``T`` rows, alignment as in :mod:`pvrpipe.schemas.axes`. ``state`` is whatever the
    model needs to go on from a row, ``latent`` whatever it compares predictions by.
    """

    rows_before: ClassVar[int]  # rows a window needs in front of those it trains on

    def loss(self, batch: Mapping[str, Tensor], random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, rows_before + T, ...) -> the loss and its terms."""

    def filter(self, embedding: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, T, D), (N, T, A) -> states (N, T, F) and latents (N, T, ...), each from the rows up to it."""

    def predict(self, state: Tensor, action: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row's state (N, F) and the actions from there (N, T, A) -> latents and rewards of the next rows."""

    def divergence(self, predicted: Tensor, filtered: Tensor) -> Tensor:
        """How far predicted latents are from filtered ones: (N, T, ...) twice -> (N, T)."""


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


def check_names(model: str, size: str) -> None:
    """Raise UnknownNameError, naming the nearest, unless there is such a model in such a size."""
    if model not in SIZES:
        raise UnknownNameError.among("world model", model, SIZES)
    if size not in SIZES[model]:
        raise UnknownNameError.among(f"{model} size", size, SIZES[model])


def build_model(
    model: str, size: str, embedding: int, action: int, *, symlog_inputs: bool, seed: int
) -> dreamerv3.DreamerV3 | tdmpc2.TDMPC2:
    """A model with freshly drawn weights; the same seed gives the same weights, whatever was drawn before."""
    check_names(model, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model == "dreamerv3":
            return dreamerv3.DreamerV3(size, embedding, action, symlog_inputs=symlog_inputs)
        return tdmpc2.TDMPC2(size, embedding, action)
