"""``collect --policy run=FOLDER``: what a trained run would do, as a policy of rollouts.

It stands here, above the stages, because it needs three of them: it acts in an environment, embeds what it sees with
the representation that the run was trained on, and asks the run's model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pvrpipe.commands.training_options import backbone_of
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.rollouts.environments import Environment
from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import InvalidValueError, RunError, UnknownNameError
from pvrpipe.schemas.records import Step
from pvrpipe.schemas.specifications import EncoderIdentity
from pvrpipe.store.files import sha256_of
from pvrpipe.worldmodel.actions import unscaled
from pvrpipe.worldmodel.batches import tensors_of
from pvrpipe.worldmodel.checkpoints import CHECKPOINT
from pvrpipe.worldmodel.runs import read_run
from pvrpipe.worldmodel.tdmpc2_encoders import STACK
from pvrpipe.worldmodel.training import load_model


class RunPolicy:
    """The policy prior of a TD-MPC2 run, without noise; ``+0.3`` and ``~0.1`` add theirs as to any policy.

    Args:
        folder: of the run.

    Raises:
        RunError: there is no run, none that has a policy, or one on embeddings by an encoder that no name finds.
    """

    watches = True

    def __init__(self, folder: str) -> None:
        self.folder, self.record = Path(folder), read_run(Path(folder))
        if self.record.config["model"] != "tdmpc2":
            model = self.record.config["model"]
            raise RunError(
                f"{folder} is a run of {model}, which has no policy; train one with --model tdmpc2"
            )
        if self.record.encoder is not None and self.record.setting.frames is None:
            check_name(self.folder, self.record.encoder.name)
        self.versions = {"policy": f"run {sha256_of(self.folder / CHECKPOINT)}"}

    def __call__(
        self, environment: Environment, rng: np.random.Generator, seen: Callable[[], Step]
    ) -> Iterator[NDArray[np.float32]]:
        """Actions (A,), each by the last three frames; nothing is drawn."""
        del rng
        cpu = torch.device("cpu")
        backbone = backbone_of(self.record, "cpu")
        model, record = load_model(self.folder, cpu, backbone)
        if len(environment.action_low) != record.setting.action:
            raise InvalidValueError(
                f"{self.folder} takes {record.setting.action} actions, {environment.name} "
                f"{len(environment.action_low)}; take a run that was trained on this environment"
            )
        column, encode = (
            ("frame", _as_it_is)
            if record.encoder is None or backbone is not None
            else ("embedding", encoder_of(record.encoder))
        )
        rows: deque[NDArray[Any]] = deque(maxlen=STACK)
        while True:
            rows.append(encode(seen()["frame"][None])[0])
            batch = tensors_of({column: np.stack(rows)[None]}, cpu, record.setting.shown)
            yield unscaled(model.act(batch["observation"])[0], record.setting.bounds).numpy()


def _as_it_is(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return frames


def check_name(folder: Path, name: str) -> None:
    """Raise RunError where a run's encoder is of one's own: where that lies, its embeddings do not say."""
    try:
        find_pvr(name)
    except UnknownNameError:
        raise RunError(
            f"{folder} was trained on embeddings by {name}, which is no name known here; as a policy, train it on the "
            "frames, with `train-model ROLLOUTS --pvr` and the encoder's folder"
        ) from None


def encoder_of(identity: EncoderIdentity) -> Encoder:
    """The encoder that a run was trained on, on this machine's CPU.

    Raises:
        UnknownNameError, WeightsError: it cannot be had by its name.
        RunError: what is here by that name is another encoder.
    """
    seed = identity.weights.random_seed
    weights = "auto" if seed is None else f"random:{seed}"
    request = EncoderRequest(identity.name, weights, device="cpu", batch=1, readout=Readout.of(identity))
    encoder = Encoder(request)
    if encoder.identity.weights.tensors_sha256 != identity.weights.tensors_sha256:
        differ = differences(identity.model_dump(), encoder.identity.model_dump(), "here")
        raise RunError(
            f"{identity.name} is another encoder here ({differ}); embed and train again with this one"
        )
    return encoder
