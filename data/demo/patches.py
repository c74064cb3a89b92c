"""A word for every patch of a picture: what a stand-in for a trained vision encoder learns from."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data.demo.scenes import (
    COLOURS,
    SHAPES,
    SIDE_PIXELS,
    Box,
    draw_scene,
    make_scene,
    outline_of,
    to_jpeg,
)
from data.demo.signs import BOARD, WORDS, Sign, draw_board, make_number, make_panel

PATCH_PIXELS = 14
NONE = "none"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = (NONE, *DIGITS, *WORDS, *(colour + shape for colour in COLOURS for shape in SHAPES))
LEAST_COVERAGE = {"scene": 0.3, "number": 0.5}
"""Share of a patch that an object, or the box of a digit, must cover to give it its name."""


def labelled_scene(rng: np.random.Generator, held_out: bool) -> tuple[bytes, str]:
    """Returns a scene as JPEG and its patch labels in reading order, such as `none redcircle ...`."""
    scene = make_scene(rng, held_out)
    jpeg, boxes = draw_scene(scene, rng)
    names = [thing.colour + thing.shape for thing in scene.objects]
    outlines = [outline_of(thing.shape, box) for thing, box in zip(scene.objects, boxes)]
    return jpeg, _label(names, outlines, LEAST_COVERAGE["scene"])


def labelled_number(rng: np.random.Generator, held_out: bool) -> tuple[bytes, str]:
    """Returns what `label_board` does of a number or, one time in three, of a document's panel."""
    make = make_number if rng.random() < 2 / 3 else make_panel
    return label_board(make(rng, held_out), rng)


def label_board(sign: Sign, rng: np.random.Generator) -> tuple[bytes, str]:
    """Returns a board as JPEG and its patch labels in reading order, such as `none seven ...`."""
    picture, characters = draw_board(sign, BOARD, rng)
    names = [DIGITS[int(name)] if name.isdigit() else name for name, _ in characters]
    return to_jpeg(picture, rng), _label(
        names, [_corners(box) for _, box in characters], LEAST_COVERAGE["number"]
    )


def _corners(box: Box) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label(names: list[str], outlines: list[list[tuple[float, float]]], least: float) -> str:
    covered = np.stack([_coverage(outline) for outline in outlines])
    most = covered.argmax(axis=0)
    enough = covered.max(axis=0) >= least
    return " ".join(names[name] if good else NONE for name, good in zip(most.flat, enough.flat))


def _coverage(outline: list[tuple[float, float]]) -> np.ndarray:
    """Returns the share of every patch that lies inside the outline. Shapes: [rows, columns]."""
    mask = Image.new("L", (SIDE_PIXELS, SIDE_PIXELS))
    ImageDraw.Draw(mask).polygon(outline, fill=1)
    rows = SIDE_PIXELS // PATCH_PIXELS
    return np.asarray(mask).reshape(rows, PATCH_PIXELS, rows, PATCH_PIXELS).mean(axis=(1, 3))
