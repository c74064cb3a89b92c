"""Signs to read: numbers on a board, and short documents large enough to be cut into slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.demo.scenes import Box, tint, to_jpeg
from data.demo.sentences import COLOURS_ZH, NOUNS_ZH, is_held_out

WORDS = ("exit", "gate", "room", "bus")
CHINESE = tuple(dict.fromkeys("".join((*COLOURS_ZH, *NOUNS_ZH))))
"""Characters of Chinese signs, which are drawn only when there is a font for them."""

BOARD = (112, 112)
BOARDS = ((112, 112), (140, 84), (56, 56))
"""Sizes (width, height) in pixels that stay one slice of 112 x 112 pixels or become one."""
BOARD_SHARES = (0.75, 0.15, 0.1)
DIGIT_PIXELS = (46, 54)
WORD_PIXELS = (32, 38)
CHINESE_PIXELS = (28, 34)
DIGIT_SPACING = 0.06
"""Space between digits, as a share of their height."""
JITTER_PIXELS = 8
BOLD_FROM_PIXELS = 28
"""Characters this large get strokes a pixel wider on each side: thin ones are lost in patches."""
MISSING = "\U0010fffd"
"""A code point that no font draws, so that it looks like any other missing one."""

_font_path: str | None = None


@dataclass(frozen=True, slots=True)
class Sign:
    """What a sign says: one or two panels, each of lines from top to bottom."""

    panels: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """The words in reading order."""
        return " ".join(line for panel in self.panels for line in panel)


@dataclass(slots=True)
class _Line:
    """A line with its size in pixels and its left and middle."""

    text: str
    pixels: int
    left: float = 0.0
    middle: float = 0.0


def use_font(path: str | None) -> None:
    """Sets the font that Chinese signs are drawn with in this process; without one there are none.

    Raises:
        ValueError: it is no font, or one without characters that signs need.
    """
    global _font_path
    _font_path = path
    _font.cache_clear()
    if path is None:
        return
    font = _font(path, CHINESE_PIXELS[1])
    missing = [character for character in CHINESE if _looks(font, character) == _looks(font, MISSING)]
    if missing:
        raise ValueError(f"font={path}: has no {''.join(missing)}. Use a font for simplified Chinese.")


def _looks(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    side = 2 * CHINESE_PIXELS[1]
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((0, 0), character, fill=255, font=font)
    return picture.tobytes()


@cache
def _font(path: str | None, pixels: int) -> ImageFont.FreeTypeFont:
    if path is None:
        font = ImageFont.load_default(pixels)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow: was built without FreeType. Install Pillow from its wheel.")
        return font
    try:
        return ImageFont.truetype(path, pixels)
    except OSError as error:
        raise ValueError(f"font={path}: cannot be read ({error}). Use a .ttf, .ttc or .otf file.") from error


def make_number(rng: np.random.Generator, held_out: bool) -> Sign:
    """Returns a sign of two or three digits, of the tenth of all strings that is held out or not."""
    return _draw_until(lambda: Sign(((_digits(rng, 2, 3),),)), held_out)


def make_panel(rng: np.random.Generator, held_out: bool) -> Sign:
    """Returns one panel of a document, of the tenth of all that is held out or not."""
    return _draw_until(lambda: Sign((_panel(rng),)), held_out)


def make_sign(rng: np.random.Generator, held_out: bool) -> Sign:
    """Returns a number (five in six) or a document; with a font, a fifth are Chinese."""
    if _font_path is not None and rng.random() < 0.2:
        return _draw_until(lambda: Sign((("".join(rng.choice(CHINESE, rng.integers(2, 4))),),)), held_out)
    if rng.random() < 5 / 6:
        return make_number(rng, held_out)
    return _draw_until(lambda: Sign((_panel(rng), _panel(rng))), held_out)


def _draw_until(draw: Callable[[], Sign], held_out: bool) -> Sign:
    while is_held_out((sign := draw()).text) != held_out:
        pass
    return sign


def _digits(rng: np.random.Generator, least: int, most: int) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, rng.integers(least, most + 1)))


def _panel(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(WORDS)), _digits(rng, 1, 2)


def draw_sign(sign: Sign, rng: np.random.Generator) -> bytes:
    """Returns the picture as JPEG: one board, or the panels of a document beside or below each other."""
    if len(sign.panels) == 1:
        return to_jpeg(draw_board(sign, BOARDS[rng.choice(len(BOARDS), p=BOARD_SHARES)], rng)[0], rng)
    step = (BOARD[0], 0) if rng.random() < 0.5 else (0, BOARD[1])
    paper, ink = _paint(rng)
    picture = Image.new("RGB", (BOARD[0] + step[0], BOARD[1] + step[1]), paper)
    for number, panel in enumerate(sign.panels):
        lines = _arrange(panel, BOARD, rng)
        _write(picture, lines, (number * step[0], number * step[1]), ink)
    return to_jpeg(picture, rng)


def draw_board(
    sign: Sign, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Returns the picture of the first panel, and the digit or word of each character with its box."""
    paper, ink = _paint(rng)
    picture = Image.new("RGB", size, paper)
    return picture, _write(picture, _arrange(sign.panels[0], size, rng), (0, 0), ink)


def _paint(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Returns the colours of paper and ink: dark on light."""
    red, green, blue = rng.integers(0, 70, size=3).tolist()
    return tint(rng), (red, green, blue)


def _arrange(lines: tuple[str, ...], size: tuple[int, int], rng: np.random.Generator) -> list[_Line]:
    """Returns the lines around the middle of `size`, sized and jittered so that they stay inside."""
    scale = min(size[0] / BOARD[0], size[1] / BOARD[1], 1.0) if size[0] < BOARD[0] else 1.0
    placed = [_Line(text, round(scale * rng.integers(*_pixels(text)))) for text in lines]
    for number, line in enumerate(placed):
        room = max(0.0, size[0] - _width(line) - 4) / 2
        line.left = 2 + room + min(room, scale * JITTER_PIXELS) * rng.uniform(-1, 1)
        slack = max(0.0, size[1] / len(placed) - line.pixels * 0.8) / 2
        line.middle = size[1] * (number + 0.5) / len(placed)
        line.middle += min(slack, scale * JITTER_PIXELS) * rng.uniform(-0.7, 0.7)
    return placed


def _pixels(text: str) -> tuple[int, int]:
    if text.isascii():
        return DIGIT_PIXELS if text.isdigit() else WORD_PIXELS
    return CHINESE_PIXELS


def _path(text: str) -> str | None:
    return None if text.isascii() else _font_path


def _width(line: _Line) -> float:
    return sum(_advances(line))


def _advances(line: _Line) -> list[float]:
    """Returns how far each character takes the pen, in pixels; digits stand apart."""
    font = _font(_path(line.text), line.pixels)
    apart = line.pixels * DIGIT_SPACING if line.text.isdigit() else 0.0
    return [font.getlength(character) + apart for character in line.text]


def _write(
    picture: Image.Image, lines: list[_Line], corner: tuple[int, int], ink: tuple[int, int, int]
) -> list[tuple[str, Box]]:
    """Draws the lines with `corner` as their origin; returns what `draw_board` does of them."""
    draw, boxes = ImageDraw.Draw(picture), []
    for line in lines:
        font = _font(_path(line.text), line.pixels)
        above, below = font.getbbox(line.text)[1::2]
        left, top = corner[0] + line.left, corner[1] + line.middle - (above + below) / 2
        stroke = int(line.pixels >= BOLD_FROM_PIXELS)
        for character, advance in zip(line.text, _advances(line)):
            draw.text((left, top), character, fill=ink, font=font, stroke_width=stroke)
            name = character if line.text.isdigit() else line.text
            boxes.append((name, (left, top + above, left + advance, top + below)))
            left += advance
    return boxes
