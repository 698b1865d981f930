"""``pvrpipe inspect --picture``: a store at a glance, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.drawing import GREY, INK, PAPER, Panel, Range, Values, colour_of, font, histogram
from pvrpipe.store.files import make_folder, write_whole
from pvrpipe.store.golden import read_golden
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

WIDTH, MARGIN, HEAD, PANEL, TILE = 1400, 24, 92, 400, 168
EPISODES_SHOWN, FRAMES_SHOWN = 3, 8
ACTION_EPISODES = 40  # whose actions are looked at; spread over the store
BINS = 32


def draw(store: Store, file: Path) -> None:
    """Frames, returns by policy, actions, and for embeddings mean and deviation per dimension.

    Raises:
        InvalidValueError: the file is not called ``.png``.
    """
    if file.suffix.lower() != ".png":
        raise InvalidValueError(f"{file}: a picture is a PNG; give a name that ends with .png")
    make_folder(file.parent)
    rows = _frames(store)
    statistics = store.manifest.statistics.get("embedding")
    strip = len(rows) * (TILE + 30) + (30 if rows else 0)
    height = HEAD + strip + PANEL * (2 if statistics is not None else 1) + MARGIN
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    _head(store, picture)
    _strip(picture, rows, HEAD)
    top, middle = HEAD + strip, WIDTH // 2
    _returns(store, Panel(picture, (MARGIN, top, middle, top + PANEL), "Return of an episode, by policy"))
    _actions(store, Panel(picture, (middle, top, WIDTH - MARGIN, top + PANEL), "Actions taken, by dimension"))
    if statistics is not None:
        top += PANEL
        left, right = (MARGIN, top, middle, top + PANEL), (middle, top, WIDTH - MARGIN, top + PANEL)
        _dimensions(Panel(picture, left, "Mean of the embedding, by dimension"), "mean", statistics.mean)
        title = "Standard deviation of the embedding, by dimension"
        _dimensions(Panel(picture, right, title), "standard deviation", statistics.std)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(file, buffer.getvalue())


def _head(store: Store, picture: Image.Image) -> None:
    manifest, page = store.manifest, ImageDraw.Draw(picture)
    made = manifest.embeddings
    random = made is not None and made.encoder.weights.random_seed is not None
    what = f"embedded by {made.encoder.title}" if made is not None else "rollouts"
    title = f"{manifest.rollouts.environment}, {what}{': RANDOM WEIGHTS' if random else ''}"
    page.text((MARGIN, 18), title, INK, font(28))
    about = f"{manifest.episodes:,} episodes · {manifest.rows:,} rows · store {str(manifest.id)[:16]}"
    page.text((MARGIN, 58), about, GREY, font(16))


def _frames(store: Store) -> list[tuple[str, Rows]]:
    """Rows of frames with what they are: of a few episodes, or the golden ones."""
    if store.manifest.column("frame") is None:
        golden = read_golden(store)
        return [] if golden is None else [("golden frames", golden["frame"][:FRAMES_SHOWN])]
    ranked = store.episodes.sort("episode_return")
    picked = dict.fromkeys(np.linspace(len(ranked) - 1, 0, EPISODES_SHOWN).astype(int).tolist())
    found = []
    for rank in picked:
        row = ranked.row(rank, named=True)
        steps = np.unique(np.linspace(0, row["rows"] - 1, FRAMES_SHOWN).astype(int)).tolist()
        shard = store.shard(row["shard"])
        frames = np.concatenate([shard.rows("frame", row["row_start"] + step, 1) for step in steps])
        told = f"episode {row['episode']}, {row['policy']}, return {row['episode_return']:.4g}, steps "
        found.append((told + " ".join(map(str, steps)), frames))
    return found


def _strip(picture: Image.Image, rows: list[tuple[str, Rows]], top: int) -> None:
    page = ImageDraw.Draw(picture)
    for number, (told, frames) in enumerate(rows):
        y = top + number * (TILE + 30)
        page.text((MARGIN, y), told, INK, font(15))
        for column, frame in enumerate(frames):
            tile = Image.fromarray(np.asarray(frame, np.uint8)).convert("RGB")
            pixels = Image.Resampling.NEAREST if tile.width < TILE else Image.Resampling.LANCZOS
            tile.thumbnail((TILE, TILE), pixels)
            if tile.width < TILE:
                tile = tile.resize((TILE - 2, TILE - 2), pixels)
            picture.paste(tile, (MARGIN + column * (TILE + 1), y + 22))


def _returns(store: Store, panel: Panel) -> None:
    groups = {
        str(policy): table["episode_return"].to_numpy().astype(np.float64)
        for (policy,), table in sorted(store.episodes.group_by("policy"))
    }
    histogram(panel, groups, "return", "episodes", min(BINS, max(8, store.manifest.episodes // 2)))


def _actions(store: Store, panel: Panel) -> None:
    """A line per dimension: the share of actions at each value."""
    total = store.manifest.episodes
    picked = np.unique(np.linspace(0, total - 1, ACTION_EPISODES).astype(int)).tolist()
    taken = np.concatenate([store.read_episode(e, ["action"])["action"][:-1] for e in picked]).astype(
        np.float64
    )
    made = store.manifest.rollouts
    x = Range("action", float(min(made.action_low)), float(max(made.action_high)))
    if not np.isfinite([x.low, x.high]).all() or x.low >= x.high:
        x = Range.around("action", taken)
    edges = np.linspace(x.low, x.high, BINS + 1)
    shares = [np.histogram(column, edges)[0] / len(column) for column in taken.T]
    names = [f"dimension {number}" for number in range(len(shares))]
    names = names if len(names) <= 6 else [*names[:5], f"and {len(names) - 5} more"]
    panel.axes(x, Range("share of actions", 0, float(np.max(shares)) * 1.1 or 1.0), names)
    centres = (edges[:-1] + edges[1:]) / 2
    for number, share in enumerate(shares):
        panel.line(centres, share, colour_of(number))


def _dimensions(panel: Panel, label: str, told: Sequence[float]) -> None:
    """A stroke from zero per dimension, over the training rows."""
    values: Values = np.asarray(told, np.float64)
    at: Values = np.arange(len(values), dtype=np.float64)
    nothing = np.zeros(len(values))
    y = Range.around(label, np.append(values, 0.0))
    panel.axes(Range("dimension", -0.5, len(values) - 0.5), y)
    panel.strokes(at, nothing, values, colour_of(0))
