"""The embedding stage on Ray Data: an actor pool over shards, on a GPU where there is one."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data

from pvrpipe.pipeline.embedding import ShardEmbedder, ShardTimes, Target
from pvrpipe.schemas.addresses import check_answers
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.quiet import quiet_start
from pvrpipe.store.places import Place, place_of


class _Actor:
    """A :class:`ShardEmbedder` that Ray Data feeds one shard at a time."""

    def __init__(self, rollouts: Place | str, targets: Sequence[Target]) -> None:
        self.embedder = ShardEmbedder(rollouts, targets)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outcome = self.embedder.attempt(int(batch["shard"][0]))
        return {"outcome": np.array([pickle.dumps(outcome)], object)}


def run_on_ray(
    rollouts: Place | str,
    targets: Sequence[Target],
    todo: Sequence[int],
    address: str | None,
    workers: int | None,
) -> Iterator[ShardTimes | PvrpipeError]:
    """Embed shards on a Ray cluster; what each cost, as it is done.

    A lost actor is replaced and its shard done again by Ray Data; a shard either was committed or was
    not, so nothing is written twice.
    """
    started = not ray.is_initialized()
    address = address or os.environ.get("RAY_ADDRESS")
    if started:
        if address:
            check_answers(address)
        with quiet_start():
            ray.init(
                address=address or "local",  # None would join whatever cluster somebody runs on this machine
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    try:
        yield from _run(rollouts, targets, todo, workers)
    finally:
        if started:
            ray.shutdown()


def _run(
    rollouts: Place | str, targets: Sequence[Target], todo: Sequence[int], workers: int | None
) -> Iterator[ShardTimes | PvrpipeError]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    on_gpu = targets[0].request.resolved_device().type == "cuda"
    resources = ray.cluster_resources()
    pool = workers or int(resources.get("GPU" if on_gpu else "CPU", 1))
    shards = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    outcomes = shards.map_batches(
        _Actor,
        fn_constructor_args=(place_of(rollouts).resolve(), list(targets)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(pool, len(todo)))),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    for row in outcomes.iter_rows():
        yield pickle.loads(row["outcome"])
