"""Charts of coloured bars and of a line, with questions whose answers can be seen by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data.demo.scenes import COLOURS, OVERSAMPLING, SIDE_PIXELS, Question, tint, to_jpeg
from data.demo.sentences import is_held_out

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right"), 4: ("left", "second", "third", "right")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
HEIGHTS = (1, 2, 3, 4, 5)
TRENDS = {
    "it rises": (1, 3, 5, 7, 9),
    "it falls": (9, 7, 5, 3, 1),
    "it peaks": (1, 5, 9, 5, 1),
    "it dips": (9, 5, 1, 5, 9),
}
"""What the line does, with its level at five points before noise."""

LINE_SHARE = 0.3
BASE, UNIT = 102, 18
"""Where bars stand, from the top, and the height of one unit: pixels."""


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars from left to right: colours and heights, all different."""

    colours: tuple[str, ...]
    heights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A line through five levels from 0 to 10, and what it does: a key of `TRENDS`."""

    trend: str
    levels: tuple[int, ...]


Chart = Bars | Line


def make_chart(rng: np.random.Generator, held_out: bool) -> Chart:
    """Returns a random chart whose values are of the tenth that is held out, or of the other nine."""
    make = _line if rng.random() < LINE_SHARE else _bars
    while is_held_out(describe(chart := make(rng))) != held_out:
        pass
    return chart


def _bars(rng: np.random.Generator) -> Bars:
    number = int(rng.choice([2, 3, 4], p=[0.1, 0.8, 0.1]))
    colours = rng.choice(list(COLOURS), number, replace=False).tolist()
    return Bars(tuple(colours), tuple(rng.choice(HEIGHTS, number, replace=False).tolist()))


def _line(rng: np.random.Generator) -> Line:
    trend = list(TRENDS)[rng.integers(len(TRENDS))]
    noise = rng.integers(-1, 2, size=5)
    return Line(trend, tuple((np.asarray(TRENDS[trend]) + noise).clip(0, 9).tolist()))


def describe(chart: Chart) -> str:
    """Returns the words that stand for the picture in texts, such as `bars red 3 blue 5 black 1`."""
    if isinstance(chart, Line):
        return " ".join(["line", *map(str, chart.levels)])
    bars = zip(chart.colours, chart.heights)
    return " ".join(["bars", *(f"{colour} {height}" for colour, height in bars)])


def questions(chart: Chart) -> list[Question]:
    """Returns every question about the chart with its answer."""
    if isinstance(chart, Line):
        return [("What does the line do?", chart.trend)]
    return [*colour_questions(chart), *height_questions(chart), count_question(chart)]


def colour_questions(bars: Bars) -> list[Question]:
    """Returns questions for the colour at a place."""
    places = PLACES[len(bars.colours)]
    return [(f"What colour is the {place} bar?", colour) for place, colour in zip(places, bars.colours)]


def height_questions(bars: Bars) -> list[Question]:
    """Returns questions for the place of the tallest and the shortest bar."""
    places = PLACES[len(bars.heights)]
    tallest, shortest = (places[bars.heights.index(pick(bars.heights))] for pick in (max, min))
    return [("Which bar is the tallest?", tallest), ("Which bar is the shortest?", shortest)]


def count_question(bars: Bars) -> Question:
    """Returns the question for the number of bars."""
    return "How many bars are there?", NUMBERS[len(bars.colours)]


def ask(chart: Chart, rng: np.random.Generator) -> Question:
    """Returns one of the chart's questions, mostly of those hard to guess."""
    if isinstance(chart, Line):
        return questions(chart)[0]
    kind = rng.choice(["colour", "height", "count"], p=[0.6, 0.34, 0.06])
    if kind == "count":
        return count_question(chart)
    asked = colour_questions(chart) if kind == "colour" else height_questions(chart)
    return asked[rng.integers(len(asked))]


def draw_chart(chart: Chart, rng: np.random.Generator) -> bytes:
    """Returns the picture as JPEG."""
    side = SIDE_PIXELS * OVERSAMPLING
    picture = Image.new("RGB", (side, side), tint(rng))
    draw = ImageDraw.Draw(picture)
    _rectangle(draw, (4, BASE, SIDE_PIXELS - 4, BASE + 1), (90, 90, 90))
    if isinstance(chart, Line):
        _draw_line(draw, chart, rng)
    else:
        _draw_bars(draw, chart, rng)
    return to_jpeg(picture.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BOX), rng)


def _draw_bars(draw: ImageDraw.ImageDraw, bars: Bars, rng: np.random.Generator) -> None:
    step = (SIDE_PIXELS - 8) / len(bars.colours)
    width = min(step - 6, 26) * rng.uniform(0.85, 1.0)
    for number, (colour, height) in enumerate(zip(bars.colours, bars.heights)):
        middle = 4 + step * (number + 0.5) + rng.uniform(-2, 2)
        box = (middle - width / 2, BASE - UNIT * height, middle + width / 2, BASE)
        _rectangle(draw, box, COLOURS[colour])


def _draw_line(draw: ImageDraw.ImageDraw, line: Line, rng: np.random.Generator) -> None:
    colour = COLOURS[list(COLOURS)[rng.integers(len(COLOURS))]]
    xs = np.linspace(12, SIDE_PIXELS - 12, len(line.levels))
    points = [(x, BASE - 8 - 9 * level) for x, level in zip(xs, line.levels)]
    scaled = [(float(x) * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
    draw.line(scaled, fill=colour, width=int(rng.integers(4, 7)) * OVERSAMPLING, joint="curve")


def _rectangle(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: tuple[int, int, int]
) -> None:
    left, top, right, bottom = (value * OVERSAMPLING for value in box)
    draw.rectangle((left, top, right, bottom), fill=colour)
