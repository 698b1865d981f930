"""Charts of a few kinds with labelled axes, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

INK, GREY, FAINT, PAPER = (32, 33, 36), (95, 99, 104), (225, 227, 230), (255, 255, 255)
#: Okabe & Ito: told apart by everyone.
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233))
TICKS = 5
NAME, MOST = 20, 0.6  # pixels that a name in a legend takes, and the share of a panel that all of them may
LEFT, RIGHT, TOP, BOTTOM = 84, 22, 44, 60  # around what is plotted, for its labels
Values = NDArray[np.float64]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Range:
    """An axis: what it says, and the values at its ends."""

    label: str
    low: float
    high: float

    @classmethod
    def around(cls, label: str, values: Values) -> Range:
        """From the least to the greatest value."""
        low, high = float(values.min()), float(values.max())
        room = (high - low) * 0.04 or max(abs(high), 1.0) * 0.5
        return cls(label, low - room, high + room)

    def ticks(self) -> list[float]:
        """About five round values."""
        rough = (self.high - self.low) / TICKS
        power = 10 ** np.floor(np.log10(rough))
        step = float(power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999))
        first = np.ceil(self.low / step - 1e-9)
        found = (first + np.arange(int((self.high - self.low) / step) + 2)) * step
        return [float(v) for v in found if v <= self.high + step * 1e-6]


class Panel:
    """A chart in a rectangle of a picture; values become pixels."""

    def __init__(self, picture: Image.Image, box: tuple[int, int, int, int], title: str) -> None:
        self._draw, self._box = ImageDraw.Draw(picture), box
        x0, y0, x1, y1 = box
        self._inner = (x0 + LEFT, y0 + TOP, x1 - RIGHT, y1 - BOTTOM)
        self._draw.text((x0 + LEFT, y0 + 8), title, INK, font(19))
        self._x = self._y = Range("", 0, 1)

    def axes(self, x: Range, y: Range, names: Sequence[str] = ()) -> None:
        """Grid, ticks, labels, and above all values the names of what is drawn, with their colours."""
        left, top, right, bottom = self._inner
        taken = min((NAME * len(names) + NAME // 2) / (bottom - top), MOST) if names else 0.0
        self._x, self._y = x, Range(y.label, y.low, y.low + (y.high - y.low) / (1 - taken))
        y = self._y
        for value, text in _told(y.ticks()):
            at = self._at_y(value)
            self._draw.line((left, at, right, at), FAINT)
            self._draw.text((left - 8, at), text, GREY, font(14), anchor="rm")
        for value, text in _told(x.ticks()):
            at = self._at_x(value)
            self._draw.line((at, bottom, at, bottom + 5), GREY)
            self._draw.text((at, bottom + 8), text, GREY, font(14), anchor="mt")
        self._draw.line((left, bottom, right, bottom), GREY)
        self._draw.text(((left + right) / 2, bottom + 32), x.label, INK, font(15), anchor="mt")
        self._sideways(y.label)
        self._legend(names)

    def bars(self, edges: Values, heights: Values, below: Values, colour: tuple[int, int, int]) -> None:
        """Bars between edges, on top of others."""
        for left, right, height, base in zip(edges[:-1], edges[1:], heights, below, strict=True):
            if height:
                box = (
                    self._at_x(left) + 1,
                    self._at_y(base + height),
                    self._at_x(right) - 1,
                    self._at_y(base),
                )
                self._draw.rectangle(box, colour)

    def line(self, x: Values, y: Values, colour: tuple[int, int, int], width: int = 3) -> None:
        """A line through points."""
        points = [(self._at_x(a), self._at_y(b)) for a, b in zip(x, y, strict=True)]
        self._draw.line(points, colour, width, joint="curve")

    def strokes(self, x: Values, low: Values, high: Values, colour: tuple[int, int, int]) -> None:
        """Vertical strokes from low to high."""
        room = self._at_x(float(x[0]) + 1) - self._at_x(float(x[0]))
        width = max(1, min(40, round(room * 0.8)))
        for at, bottom, top in zip(x, low, high, strict=True):
            self._draw.line(
                (self._at_x(at), self._at_y(bottom), self._at_x(at), self._at_y(top)), colour, width
            )

    def _legend(self, names: Sequence[str]) -> None:
        """In the upper right corner."""
        _, top, right, _ = self._inner
        for row, name in enumerate(names):
            y = top + 4 + NAME * row
            width = self._draw.textlength(name, font(14))
            self._draw.rectangle((right - 30 - width, y - 1, right, y + 18), PAPER)
            self._draw.rectangle((right - 26 - width, y + 3, right - 14 - width, y + 15), colour_of(row))
            self._draw.text((right - 8, y + 9), name, INK, font(14), anchor="rm")

    def _at_x(self, value: float) -> float:
        left, _, right, _ = self._inner
        return float(left + (value - self._x.low) / (self._x.high - self._x.low) * (right - left))

    def _at_y(self, value: float) -> float:
        _, top, _, bottom = self._inner
        return float(bottom - (value - self._y.low) / (self._y.high - self._y.low) * (bottom - top))

    def _sideways(self, text: str) -> None:
        width = int(self._draw.textlength(text, font(15))) + 4
        label = Image.new("RGB", (width, 22), PAPER)
        ImageDraw.Draw(label).text((2, 2), text, INK, font(15))
        turned = label.rotate(90, expand=True)
        _, top, _, bottom = self._inner
        picture: Image.Image = self._draw._image
        picture.paste(turned, (self._box[0] + 6, (top + bottom - width) // 2))


def histogram(panel: Panel, groups: Mapping[str, Values], label: str, counted: str, bins: int) -> None:
    """Stacked bars: how many values of each group fall where."""
    everything = np.concatenate(list(groups.values()))
    x = Range.around(label, everything)
    edges = np.linspace(x.low, x.high, bins + 1)
    counts = [np.histogram(values, edges)[0].astype(np.float64) for values in groups.values()]
    highest = float(np.sum(counts, axis=0).max()) or 1.0
    panel.axes(x, Range(counted, 0, highest * 1.1), list(groups))
    below = np.zeros(bins)
    for number, heights in enumerate(counts):
        panel.bars(edges, heights, below, colour_of(number))
        below += heights


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of a group."""
    return COLOURS[number % len(COLOURS)]


def _told(values: Sequence[float]) -> list[tuple[float, str]]:
    """Values with as few digits as tell them apart."""
    return [(value, f"{value:,.4g}" if abs(value) >= 1e-12 else "0") for value in values]
