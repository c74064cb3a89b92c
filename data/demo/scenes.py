"""Scenes of one or two coloured shapes: the pictures, their captions, and questions about them.

Answers follow from positions, which small models learn within minutes. Questions that bind
attributes ("what colour is the circle") are apart, since those take far longer.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data.demo.sentences import is_held_out

SIDE_PIXELS = 112
COLOURS = {
    "red": (222, 24, 24),
    "green": (24, 150, 40),
    "blue": (30, 60, 225),
    "yellow": (242, 190, 0),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"pair": ("left", "right"), "stack": ("top", "bottom"), "single": ("middle",)}
"""The place of each object, by arrangement."""
PREPOSITIONS = {"pair": "on the", "stack": "at the", "single": "in the"}
CAPTION_PLACES = {"pair": (" left", " right"), "stack": (" above", " below"), "single": ("",)}
CENTRES = {"pair": ((28, 56), (84, 56)), "stack": ((56, 28), (56, 84)), "single": ((56, 56),)}
OBJECT_PIXELS = (36, 48)
JITTER_PIXELS = 4
OVERSAMPLING = 2

Box = tuple[float, float, float, float]
Question = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """`arrangement` is a key of `PLACES`; `objects` are in the order of its places."""

    arrangement: str
    objects: tuple[Thing, ...]

    @property
    def placed(self) -> list[tuple[str, Thing]]:
        """Each place with its object."""
        return list(zip(PLACES[self.arrangement], self.objects))


def make_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """Returns a random scene whose combination of arrangement and objects is held out, or is not."""
    while True:
        arrangement = str(rng.choice(["pair", "stack", "single"], p=[0.45, 0.45, 0.1]))
        scene = Scene(arrangement, _things(rng, len(PLACES[arrangement])))
        if is_held_out(describe(scene)) == held_out:
            return scene


def _things(rng: np.random.Generator, number: int) -> tuple[Thing, ...]:
    chosen = rng.choice(len(COLOURS) * len(SHAPES), size=number, replace=False)
    return tuple(Thing(list(COLOURS)[code % len(COLOURS)], SHAPES[code // len(COLOURS)]) for code in chosen)


def draw_scene(scene: Scene, rng: np.random.Generator) -> tuple[bytes, list[Box]]:
    """Returns the picture as JPEG, and the box (left, top, right, bottom) of each object in pixels."""
    boxes = [_place(centre, rng) for centre in CENTRES[scene.arrangement]]
    side = SIDE_PIXELS * OVERSAMPLING
    picture = Image.new("RGB", (side, side), tint(rng))
    for thing, box in zip(scene.objects, boxes):
        outline = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in outline_of(thing.shape, box)]
        ImageDraw.Draw(picture).polygon(outline, fill=_shade(COLOURS[thing.colour], rng))
    return to_jpeg(picture.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BOX), rng), boxes


def _place(centre: tuple[int, int], rng: np.random.Generator) -> Box:
    half = rng.uniform(*OBJECT_PIXELS) / 2
    x, y = np.asarray(centre) + rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
    return float(x - half), float(y - half), float(x + half), float(y + half)


def tint(rng: np.random.Generator) -> tuple[int, int, int]:
    """Returns a random light colour."""
    red, green, blue = rng.integers(222, 256, size=3).tolist()
    return red, green, blue


def _shade(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    shift = rng.integers(-12, 13, size=3)
    red, green, blue = np.clip(np.asarray(colour) + shift, 0, 255).tolist()
    return red, green, blue


def to_jpeg(picture: Image.Image, rng: np.random.Generator) -> bytes:
    """Returns the picture as JPEG of a random good quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(85, 96)))
    return buffer.getvalue()


def outline_of(shape: str, box: Box) -> list[tuple[float, float]]:
    """Returns the corners of a shape that fills `box`, in pixels."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return [(left + width * x, top + height * y) for x, y in _OUTLINES[shape]]


_ARM = (0, 0.34, 0.66, 1)
_CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
_OUTLINES = {
    "circle": [(0.5 + 0.5 * math.cos(t), 0.5 + 0.5 * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 48)],
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.02), (1.0, 0.96), (0.0, 0.96)],
    "cross": [(_ARM[x], _ARM[y]) for x, y in _CROSS],
}


def caption(scene: Scene) -> str:
    """Returns what the picture shows, such as `a red circle left, a blue square right`."""
    places = CAPTION_PLACES[scene.arrangement]
    return ", ".join(f"a {thing}{place}" for thing, place in zip(scene.objects, places))


def describe(scene: Scene) -> str:
    """Returns the words that stand for the picture in texts: `left red circle right blue square`."""
    return " ".join(f"{place} {thing}" for place, thing in scene.placed)


def ask_position(scene: Scene, rng: np.random.Generator) -> Question:
    """Returns one of the scene's positional questions with its answer, mostly of those hard to guess."""
    kinds = (object_questions, attribute_questions, layout_questions)
    questions = kinds[rng.choice(len(kinds), p=(0.6, 0.3, 0.1))](scene)
    return questions[rng.integers(len(questions))]


def position_questions(scene: Scene) -> list[Question]:
    """Returns every question about what is where, with its answer; `ask_position` draws one by share."""
    return object_questions(scene) + attribute_questions(scene) + layout_questions(scene)


def object_questions(scene: Scene) -> list[Question]:
    """Returns questions for the whole object at a place."""
    preposition = PREPOSITIONS[scene.arrangement]
    return [(f"What is {preposition} {place}?", f"a {thing}") for place, thing in scene.placed]


def attribute_questions(scene: Scene) -> list[Question]:
    """Returns questions for the colour or the shape at a place."""
    colours = [(f"What colour is the {place} one?", thing.colour) for place, thing in scene.placed]
    shapes = [(f"What shape is the {place} one?", thing.shape) for place, thing in scene.placed]
    return colours + shapes


def layout_questions(scene: Scene) -> list[Question]:
    """Returns questions for the arrangement."""
    count = ("How many objects are there?", "two" if len(scene.objects) == 2 else "one")
    layout = {"pair": "side by side", "stack": "one above the other", "single": "alone"}
    return [count, ("How are the objects placed?", layout[scene.arrangement])]


def binding_questions(scene: Scene) -> list[Question]:
    """Returns questions that name one attribute of an object and ask for another, where that is unique."""
    found = [(f"Where is the {thing}?", place) for place, thing in scene.placed]
    if len({thing.shape for thing in scene.objects}) == len(scene.objects):
        found += [(f"What colour is the {thing.shape}?", thing.colour) for thing in scene.objects]
    if len({thing.colour for thing in scene.objects}) == len(scene.objects):
        found += [(f"What shape is the {thing.colour} one?", thing.shape) for thing in scene.objects]
    return found
