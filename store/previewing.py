"""``pvrpipe preview``: what happened in some episodes, as a sheet of frames and as a film with its curves."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.drawing import FAINT, GREY, INK, PAPER, Range, Values, colour_of, font
from pvrpipe.store.files import make_folder, write_whole
from pvrpipe.store.filming import write_film
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

EPISODES_SHOWN, FRAMES_SHOWN = 3, 8  # where nobody says which, and how many of each on the sheet
TILE, GAP, HEAD, CURVE, LABEL = 192, 6, 46, 66, 17  # pixels
CURVES = 2 * (CURVE + LABEL + GAP)
ACTIONS_SHOWN = 6
CHUNK = 32  # rows read at once
CURSOR = (213, 94, 0)

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Previewed:
    """What was drawn."""

    store: str
    sheet: str
    film: str
    episodes: list[int]
    frames: int


def preview(
    store: Store,
    sheet: Path,
    film: Path,
    episodes: Sequence[int] = (),
    beside: Store | None = None,
    rate: float | None = None,
) -> Previewed:
    """Draw a contact sheet and a film.

    Args:
        store: with frames.
        sheet: the picture to write, a ``.png``.
        film: to write, an ``.mp4`` or a ``.gif``.
        episodes: which; default: the best, the middle and the worst by return.
        beside: a store with the same rows, shown beside the first, as ``collect --replay`` makes it.
        rate: frames per second of the film; default: as fast as it happened, at most 30.

    Raises:
        InvalidValueError: no frames, no such episode, a pair that is none, or a name of an unknown kind.
    """
    if sheet.suffix.lower() != ".png" or film.suffix.lower() not in (".mp4", ".gif"):
        raise InvalidValueError(f"{sheet}, {film}: a sheet is a .png, a film an .mp4 or a .gif; name them so")
    stores = [store] if beside is None else [store, beside]
    for shown in stores:
        if shown.manifest.column("frame") is None:
            raise InvalidValueError(
                f"{shown.path} holds embeddings, which nobody can look at; preview the rollouts they were made from"
            )
    if beside is not None:
        refuse_strangers(store, beside)
    chosen = _chosen(store, episodes)
    strips = [_Strip(stores, episode) for episode in chosen]
    make_folder(sheet.parent)
    make_folder(film.parent)
    buffer = io.BytesIO()
    _sheet(store, strips).save(buffer, "PNG")
    write_whole(sheet, buffer.getvalue())
    shown_rate = rate or min(30.0, 1 / store.manifest.rollouts.control_timestep)
    frames = write_film(film, _film(strips), shown_rate)
    return Previewed(str(store.path), str(sheet), str(film), chosen, frames)


def refuse_strangers(store: Store, beside: Store) -> None:
    """A pair has the same episodes, row for row.

    Raises:
        InvalidValueError: these have not.
    """
    same = ["episode", "rows", "seed", "policy", "episode_return"]
    if not store.episodes.select(same).equals(beside.episodes.select(same)):
        raise InvalidValueError(
            f"{beside.path} does not show the episodes of {store.path}; make a pair with "
            f"`pvrpipe collect --replay {store.path}`"
        )


def _chosen(store: Store, episodes: Sequence[int]) -> list[int]:
    if not episodes:
        ranked = store.episodes.sort("episode_return")["episode"].to_list()
        return [ranked[i] for i in dict.fromkeys(np.linspace(len(ranked) - 1, 0, EPISODES_SHOWN).astype(int))]
    for episode in episodes:
        if not 0 <= episode < store.manifest.episodes:
            raise InvalidValueError(
                f"{store.path} has no episode {episode}; it has 0 to {store.manifest.episodes - 1}"
            )
    return list(episodes)


class _Strip:
    """One episode: its curves, and its frames in all stores that are shown."""

    def __init__(self, stores: Sequence[Store], episode: int) -> None:
        self._stores, self._row = stores, stores[0].episodes.row(episode, named=True)
        self.rows = int(self._row["rows"])
        self._played = stores[0].read_episode(episode, ["reward", "action"])
        self.framed = TILE * len(stores) + GAP * (len(stores) - 1)  # pixels across
        self.width = max(self.framed, TILE + TILE // 2)  # with room for a title
        self._narrow = self.curves(self.width)
        looks = (store.episodes.row(episode, named=True)["variation"] for store in stores)
        self._looks = " | ".join(looks)

    def title(self, page: ImageDraw.ImageDraw, x: int, y: int) -> None:
        """Which episode, who played it, and how it went."""
        row = self._row
        page.text((x, y), f"episode {row['episode']}, {row['policy']}", INK, font(15))
        page.text((x, y + 20), f"return {row['episode_return']:.4g}, {self._looks}", GREY, font(13))

    def frames(self, first: int, count: int) -> Iterator[Image.Image]:
        """Consecutive rows, those of all stores beside each other."""
        count = min(count, self.rows - first)
        rows = [_frames_of(store, self._row["episode"], first, count) for store in self._stores]
        for images in zip(*rows, strict=True):
            yield beside_each_other([_tile(image) for image in images])

    def curves(self, width: int) -> Image.Image:
        """Reward and actions over time."""
        return _curves(width, self._played)

    def curves_at(self, row: int) -> Image.Image:
        """The same, as wide as the frames, with a cursor at a row."""
        picture = self._narrow.copy()
        x = round(row / max(1, self.rows - 1) * (self.width - 1))
        ImageDraw.Draw(picture).line((x, 0, x, picture.height), CURSOR, 2)
        return picture


def _frames_of(store: Store, episode: int, first: int, count: int) -> Rows:
    """Rows of frames of an episode; a store may be cut into shards otherwise than the one beside it."""
    row = store.episodes.row(episode, named=True)
    return store.shard(row["shard"]).rows("frame", row["row_start"] + first, count)


def beside_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of equal height in one."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    whole, x = Image.new("RGB", (width, pictures[0].height), PAPER), 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + GAP
    return whole


def _tile(frame: Rows) -> Image.Image:
    picture = Image.fromarray(np.asarray(frame, np.uint8)).convert("RGB")
    kind = Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS
    return picture.resize((TILE, TILE), kind)


def _curves(width: int, rows: dict[str, Rows]) -> Image.Image:
    """Two charts, one above the other: the reward, and the actions within their range."""
    picture = Image.new("RGB", (width, CURVES), PAPER)
    reward = np.asarray(rows["reward"], np.float64)
    _chart(picture, 0, "reward", [reward], Range.around("reward", reward))
    action = np.asarray(rows["action"][:-1], np.float64).reshape(len(reward) - 1, -1)
    shown = list(action.T[:ACTIONS_SHOWN])
    hidden = action.shape[1] - len(shown)
    label = f"action ({hidden} more)" if hidden > 0 else "action"
    _chart(picture, CURVES // 2, label, shown, Range.around("action", action))
    return picture


def _chart(picture: Image.Image, top: int, label: str, lines: Sequence[Values], values: Range) -> None:
    """Lines within a frame, below what they are."""
    page, right = ImageDraw.Draw(picture), picture.width - 1
    least, most = min(line.min() for line in lines), max(line.max() for line in lines)
    page.text((0, top), f"{label}, {least:.3g} to {most:.3g}", GREY, font(12))
    top += LABEL
    high, scale = values.high, (CURVE - 3) / (values.high - values.low)
    page.rectangle((0, top, right, top + CURVE - 1), outline=FAINT)
    if values.low < 0 < high:
        page.line((0, top + 1 + high * scale, right, top + 1 + high * scale), FAINT)
    for number, line in enumerate(lines):
        x = np.linspace(0, right, len(line)) if len(line) > 1 else np.array([0.0])
        y = top + 1 + (high - line) * scale
        page.line(list(zip(x.tolist(), y.tolist(), strict=True)), colour_of(number), 2, joint="curve")


def _sheet(store: Store, strips: Sequence[_Strip]) -> Image.Image:
    """Frames of each episode, evenly spaced, above its curves."""
    wide = strips[0].framed
    across = FRAMES_SHOWN if wide < 2 * TILE else FRAMES_SHOWN // 2
    block = HEAD + TILE + GAP + CURVES + 3 * GAP
    width = 2 * GAP + across * (wide + GAP)
    picture = Image.new("RGB", (width, 2 * GAP + 30 + block * len(strips)), PAPER)
    page = ImageDraw.Draw(picture)
    manifest = store.manifest
    about = f"{manifest.rollouts.environment}, {manifest.episodes:,} episodes, store {str(manifest.id)[:16]}"
    page.text((GAP, GAP), about, INK, font(20))
    for number, strip in enumerate(strips):
        y = 30 + GAP + number * block
        strip.title(page, GAP, y)
        for column, row in enumerate(np.linspace(0, strip.rows - 1, across).astype(int).tolist()):
            picture.paste(next(strip.frames(row, 1)), (GAP + column * (wide + GAP), y + HEAD))
        picture.paste(strip.curves(width - 3 * GAP), (GAP, y + HEAD + TILE + GAP))
    return picture


def _film(strips: Sequence[_Strip]) -> Iterator[Frame]:
    """All episodes side by side, row by row; one that has ended stays at its last row."""
    last = max(strip.rows for strip in strips)
    playing = [_held(strip) for strip in strips]
    for row in range(last):
        columns = []
        for strip, frames in zip(strips, playing, strict=True):
            column = Image.new("RGB", (strip.width, HEAD + TILE + GAP + CURVES), PAPER)
            strip.title(ImageDraw.Draw(column), 0, 4)
            column.paste(next(frames), (0, HEAD))
            column.paste(strip.curves_at(min(row, strip.rows - 1)), (0, HEAD + TILE + GAP))
            columns.append(column)
        yield np.asarray(beside_each_other(columns))


def _held(strip: _Strip) -> Iterator[Image.Image]:
    """The frames of an episode, read in stretches; then the last one for ever."""
    picture = Image.new("RGB", (strip.width, TILE), PAPER)
    for first in range(0, strip.rows, CHUNK):
        for picture in strip.frames(first, CHUNK):
            yield picture
    while True:
        yield picture
