"""Training curves of every model on one task: collected, embedded and trained here, drawn as a PNG.

    python benchmarks/curves.py dmc:pendulum-swingup --updates 200 --out docs/curves-pendulum-swingup.png

An autoencoder trained on the frames and a ResNet-18 of random weights, with the three models; and two models from
scratch on the frames. Drawn are losses of held-out windows: of reward, which all models have (cross-entropies of two
kinds of two-hot, so compare curves of one model), and each model's own of dynamics. Everything is kept in ``--data``
and goes on from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretraining import PretrainConfig, pretrain
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.store.drawing import PAPER, Panel, Range, colour_of
from pvrpipe.store.workspace import Workspace
from pvrpipe.worldmodel.metrics_log import METRICS
from pvrpipe.worldmodel.training import TrainConfig, train

#: Batch, length and rate by model; smaller from scratch, where convolutions cost ten times a linear map.
SETTINGS = {
    "dreamerv3": {"batch": 16, "length": 32, "learning_rate": 1e-3, "warmup": 50},
    "tdmpc2": {"batch": 128, "learning_rate": 1e-3},
    "dinowm": {"batch": 32, "learning_rate": 1e-3},
}
SCRATCH = {"dreamerv3": {"batch": 8, "length": 16}, "tdmpc2": {"batch": 32}}
DYNAMICS = {"dreamerv3": "kl", "tdmpc2": "consistency", "dinowm": "embedding"}
Curves = dict[str, list[tuple[int, dict[str, float]]]]  # by representation: updates, and losses then


def stores(workspace: Workspace, task: str, episodes: int, steps: int) -> dict[str, Path]:
    """What is trained on, by name."""
    rollouts, own = workspace.rollouts(task), workspace.pvr(task, "autoencoder")
    policy = "random:0.2,ou:0.2,mpc:0.3,mpc+0.3:0.3"
    collect(
        CollectConfig(task, size=64, episodes=episodes, max_steps=steps, policy=policy),
        rollouts,
        Engine("inline"),
    )
    pretrain(rollouts, own, PretrainConfig(updates=300))
    outputs = [
        (EncoderRequest(str(own)), workspace.embeddings(task, "autoencoder")),
        (EncoderRequest("resnet18", "random:0"), workspace.embeddings(task, "resnet18-random")),
    ]
    embed(rollouts, outputs, EmbedConfig(engine="inline"))
    names = ("autoencoder", "resnet18, random weights")
    return {"from scratch": rollouts} | dict(zip(names, (folder for _, folder in outputs), strict=True))


def curves(workspace: Workspace, task: str, model: str, held: dict[str, Path], updates: int) -> Curves:
    """Losses of held-out windows of one model on every store that it can learn from."""
    found: Curves = {}
    for number, (name, store) in enumerate(held.items()):
        scratch = name == "from scratch"
        if scratch and model not in SCRATCH:
            continue
        settings = {**SETTINGS[model], **(SCRATCH[model] if scratch else {})}
        every = {"log_every": 10, "save_every": 10}
        run = workspace.run(f"{task}-{number}-{model}")
        train(TrainConfig(model, updates=updates, **settings, **every), store, run)
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        found[name] = [(line["update"], line["val"]) for line in lines if "val" in line]
    return found


def draw(task: str, told: dict[str, Curves], path: Path) -> None:
    """A row for each model: reward on the left, dynamics on the right."""
    width, height = 700, 330
    picture = Image.new("RGB", (2 * width, height * len(told)), PAPER)
    for row, (model, curves_of) in enumerate(told.items()):
        last = ("from scratch",)  # which not every model has, so that the others keep their colours
        by_store = {
            name: curves_of[name] for name in sorted(curves_of, key=lambda name: (name in last, name))
        }
        for column, loss in enumerate(("reward", DYNAMICS[model])):
            box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
            panel = Panel(picture, box, f"{model}, {task}: held-out {loss}")
            values = [np.array([losses[loss] for _, losses in curve]) for curve in by_store.values()]
            updates = [np.array([update for update, _ in curve], float) for curve in by_store.values()]
            x_range, y_range = (
                Range.around(label, np.concatenate(of))
                for label, of in (("updates", updates), ("loss", values))
            )
            panel.axes(x_range, y_range, list(by_store))
            for number, (x, y) in enumerate(zip(updates, values, strict=True)):
                panel.line(x, y, colour_of(number))
    picture.save(path)


def main() -> None:
    """Train, draw, print the last losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--data", type=Path, default=Path("data/curves"))
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    workspace = Workspace(options.data)
    held = stores(workspace, options.task, options.episodes, options.steps)
    told = {model: curves(workspace, options.task, model, held, options.updates) for model in SETTINGS}
    draw(options.task, told, options.out)
    last = {model: {name: curve[-1][1] for name, curve in by.items()} for model, by in told.items()}
    print(json.dumps({"benchmark": "curves", "task": options.task, "updates": options.updates, "last": last}))


if __name__ == "__main__":
    main()
