"""How well a world model predicts held-out episodes, open loop (Schneider et al. 2024, section 4.4).

The model filters the first ``context`` rows of an episode and then predicts along the episode's actions
without seeing another observation.

* Dynamics error: how far each predicted latent is from the one filtered from the true observations.
  DreamerV3: mean of forward and backward KL between prior and posterior, in nats, no free nats.
  TD-MPC2: mean squared error of the latent. DINO-WM: mean squared error of the standardised embedding.
* Reward error: ``|r - r̂|``.

Both accumulated over the rows of a horizon, or up to the episode's end where that comes first, and per
step. The study does not say whether its prior is rolled out or one step ahead, nor how latent dimensions
are reduced; here it is rolled out, KL is summed over the categoricals and MSE averaged over the latent.

Two controls stand beside each number. ``shuffled_actions``: the same model, the same chance, along the
same actions in another order of time; a model that uses actions is worse there. ``no_change``: the latent
of the last context row held still, and the mean reward of the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.schemas.differences import differences
from pvrpipe.schemas.errors import InvalidValueError, RunError, UnknownNameError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.files import write_whole
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.batches import OBSERVED, chance, open_observations, tensors_of
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.models import WorldModel, suitable_threads
from pvrpipe.worldmodel.training import load_model

SPLITS = ("train", "val")
TOGETHER = 32  # episodes predicted in one batch, fewer where
BATCH_NUMBERS = 1 << 26  # the observations of a batch would be more numbers than this
VARIANTS = ("model", "shuffled_actions", "no_change")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Errors of N episodes at the rows after the context: (N, T) each, and which of them exist."""

    dynamics: dict[str, Floats]
    reward: dict[str, Floats]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Padded:
    """Episodes side by side, padded with zeros to the longest: (N, T, ...), and their numbers of rows."""

    batch: dict[str, Tensor]
    rows: NDArray[np.int64]


def probe(
    run: Path | str,
    store: Path | str | None = None,
    *,
    horizons: Sequence[int] = (33, 500),
    context: int = 1,
    split: str = "val",
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Probe a run and write ``metrics.json`` into its folder.

    Args:
        run: the run's folder.
        store: embeddings of the same encoder; the run's own if None.
        horizons: rows to accumulate over.
        context: rows seen before predicting.
        split: which episodes.
        seed: decides the samples and the shuffled actions.
        device: where to compute.
        progress: told episodes done and to do.

    Returns:
        ``run``, ``model``, ``size``, ``pvr``, ``store``, ``store_id``, ``split``, ``context``, ``seed``,
        ``episodes``, and ``dynamics_error`` and ``reward_error``, each by horizon::

            {"33": {"accumulated": {"mean": …, "sem": …}, "per_step": {"mean": …, "sem": …},
                    "shuffled_actions": {"accumulated": {…}, "per_step": {…}},
                    "no_change": {"accumulated": {…}, "per_step": {…}},
                    "steps": {"mean": …, "sem": …}, "complete": episodes that reach the horizon}}

        Means and standard errors are over episodes; the standard error of one episode is None.

    Raises:
        RunError: no run, or a store of another encoder; the message says which fields differ.
        InvalidValueError: no episode of the split is longer than the context.
    """
    folder, device = Path(run), torch.device(device)
    if context < 1 or not horizons or min(horizons) < 1:
        raise InvalidValueError(
            f"--horizon is {list(horizons)} behind a context of {context}; all must be at least 1"
        )
    if split not in SPLITS:
        raise UnknownNameError.among("split", split, SPLITS)
    model, record = load_model(folder, device)
    held_out = open_observations(record.store if store is None else store)
    _check_encoder(record, held_out)
    of_split = held_out.episodes.filter(held_out.episodes["split"] == split)
    numbers = of_split.filter(of_split["rows"] > context)["episode"].to_list()
    if not numbers:
        raise InvalidValueError(
            f"{held_out.path} has no {split} episode longer than {context} rows; give another --split"
        )
    usual = training_reward(held_out)
    parts = []
    columns = (OBSERVED[held_out.manifest.kind], "action", "reward", *model.columns)
    row = record.setting.observation.width * int(of_split["rows"].max())  # type: ignore[arg-type]
    together = max(1, min(TOGETHER, BATCH_NUMBERS // row))
    with suitable_threads(model, device):
        for start in range(0, len(numbers), together):
            batch = padded(
                held_out, numbers[start : start + together], columns, record.setting.observation, device
            )
            parts.append(open_loop_errors(model, batch, context, usual, (seed, start)))
            progress(min(start + together, len(numbers)), len(numbers), "episodes")
    report = {
        "run": str(folder),
        "model": record.config["model"],
        "size": record.config["size"],
        "pvr": record.pvr,
        "random_weights": record.random_weights,
        "store": str(held_out.path),
        "store_id": held_out.manifest.id,
        "split": split,
        "context": context,
        "seed": seed,
        "episodes": len(numbers),
        "dynamics_error": {str(h): summary([p.dynamics for p in parts], parts, h) for h in horizons},
        "reward_error": {str(h): summary([p.reward for p in parts], parts, h) for h in horizons},
    }
    write_whole(folder / runs.PROBE, (canonical_json(report) + "\n").encode())
    return report


@torch.no_grad()
def open_loop_errors(
    model: WorldModel, episodes: Padded, context: int, usual_reward: float, key: tuple[int, ...]
) -> Errors:
    """Errors of the model and of both controls at every row after the context.

    Args:
        model: any world model.
        episodes: N of them.
        context: rows seen before predicting, at least 1.
        usual_reward: what predicting no change says of every reward.
        key: seed of the samples and of the shuffled actions.
    """
    action, reward = episodes.batch["action"], episodes.batch["reward"][:, context:].cpu().double().numpy()
    state, latents = model.filter(episodes.batch, chance(*key, 0))
    begin, truth = state(context - 1), latents[:, context:]
    shuffled = shuffled_actions(action, episodes.rows, context, np.random.default_rng((*key, 1)))
    dynamics, rewards = {}, {}
    for name, along in (("model", action), ("shuffled_actions", shuffled)):
        predicted, expected = model.predict(begin, along[:, context - 1 : -1], chance(*key, 2))
        dynamics[name] = model.divergence(predicted, truth).cpu().double().numpy()
        rewards[name] = np.abs(expected.cpu().double().numpy() - reward)
    held = latents[:, context - 1 : context].expand_as(truth)
    dynamics["no_change"] = model.divergence(held, truth).cpu().double().numpy()
    rewards["no_change"] = np.abs(usual_reward - reward)
    mask = np.arange(context, action.shape[1]) < episodes.rows[:, None]
    return Errors(dynamics, rewards, mask)


def accumulate(errors: Floats, mask: NDArray[np.bool_], horizon: int) -> tuple[Floats, Floats]:
    """Sum and mean of each episode's errors over its first ``horizon`` rows that exist.

    Args:
        errors: (N, T).
        mask: (N, T), True where the row exists; at least one in every episode.
        horizon: rows at most.

    Returns:
        (N,) accumulated and (N,) per step.
    """
    kept = mask[:, :horizon]
    total = np.where(kept, errors[:, :horizon], 0.0).sum(1)
    return total, total / kept.sum(1)


def mean_sem(values: Floats) -> dict[str, float | None]:
    """Mean and standard error over episodes (N,)."""
    sem = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "sem": None if sem is None else float(sem)}


def summary(errors: list[dict[str, Floats]], parts: list[Errors], horizon: int) -> dict[str, Any]:
    """One horizon's entry of the report, over all parts together."""
    out: dict[str, Any] = {}
    for variant in VARIANTS:
        pairs = [accumulate(e[variant], p.mask, horizon) for e, p in zip(errors, parts, strict=True)]
        total, per_step = (np.concatenate(column) for column in zip(*pairs, strict=True))
        numbers = {"accumulated": mean_sem(total), "per_step": mean_sem(per_step)}
        out |= numbers if variant == "model" else {variant: numbers}
    steps = np.concatenate([p.mask[:, :horizon].sum(1) for p in parts])
    return {**out, "steps": mean_sem(steps.astype(np.float64)), "complete": int((steps == horizon).sum())}


def shuffled_actions(
    action: Tensor, rows: NDArray[np.int64], context: int, random: np.random.Generator
) -> Tensor:
    """Each episode's actions from the last context row on, in another order of time: (N, T, A) -> same."""
    order = np.tile(np.arange(action.shape[1]), (len(rows), 1))
    for lane, count in enumerate(rows):
        random.shuffle(order[lane, context - 1 : count - 1])  # nothing is done from the last row
    lanes = torch.arange(len(rows)).unsqueeze(1)
    return action[lanes, torch.from_numpy(order)]


def padded(
    store: Store,
    numbers: Sequence[int],
    columns: Sequence[str],
    observation: Observation,
    device: torch.device,
) -> Padded:
    """Read whole episodes and lay them side by side."""
    episodes = [store.read_episode(n, columns) for n in numbers]
    rows = np.array([len(e["reward"]) for e in episodes])
    arrays = {}
    for name in columns:
        first = episodes[0][name]
        arrays[name] = np.zeros((len(episodes), rows.max(), *first.shape[1:]), first.dtype)
        for lane, episode in enumerate(episodes):
            arrays[name][lane, : rows[lane]] = episode[name]
    return Padded(tensors_of(arrays, device, observation), rows)


def training_reward(store: Store) -> float:
    """Mean reward of a transition in the training episodes, from the episode table alone."""
    train = store.episodes.filter(store.episodes["split"] == "train")
    returns, lengths = train["episode_return"].to_numpy(), train["length"].to_numpy()
    return float(returns.sum() / max(1, lengths.sum()))


def _check_encoder(record: runs.RunRecord, store: Store) -> None:
    """Refuse observations that are not comparable with those the run was trained on."""
    specification = store.manifest.specification
    own = specification.encoder if isinstance(specification, EmbeddingSpecification) else None
    if (record.encoder is None) != (own is None):
        learned = "frames" if record.encoder is None else f"embeddings of {record.pvr}"
        raise RunError(
            f"the run was trained on {learned}, which {store.path} does not hold; give a store that does"
        )
    if record.encoder is None or own is None:
        return
    if differ := differences(record.encoder.model_dump(), own.model_dump(), "there"):
        raise RunError(
            f"the run was trained on another encoder than that of {store.path} ({differ}); "
            "give a store that was embedded as the run's own was"
        )
