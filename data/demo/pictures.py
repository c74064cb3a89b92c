"""Samples of a picture, a question and an answer."""

from __future__ import annotations

import numpy as np

from data.demo import charts, patches, scenes, signs
from data.sample import Message, Part, Sample

DESCRIBE = "Describe the picture."
READ = "Read the text."
LABEL = "Label every patch."
PICTURE = "0.jpg"


def make_caption(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a scene that is to be described."""
    scene = scenes.make_scene(rng, held_out)
    return _sample(scenes.draw_scene(scene, rng)[0], DESCRIBE, scenes.caption(scene))


def make_vqa(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a scene with a question about what is where."""
    scene = scenes.make_scene(rng, held_out)
    return _sample(scenes.draw_scene(scene, rng)[0], *scenes.ask_position(scene, rng))


def make_binding(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a scene with a question that names one attribute and asks for another."""
    scene = scenes.make_scene(rng, held_out)
    found = scenes.binding_questions(scene)
    return _sample(scenes.draw_scene(scene, rng)[0], *found[rng.integers(len(found))])


def make_ocr(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a sign that is to be read."""
    sign = signs.make_sign(rng, held_out)
    return _sample(signs.draw_sign(sign, rng), READ, sign.text)


def make_chart(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a chart with a question."""
    chart = charts.make_chart(rng, held_out)
    return _sample(charts.draw_chart(chart, rng), *charts.ask(chart, rng))


def make_patches(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a scene (three in five) or a number whose every patch is to be named."""
    make = patches.labelled_scene if rng.random() < 0.4 else patches.labelled_number
    jpeg, labels = make(rng, held_out)
    return _sample(jpeg, LABEL, labels)


def _sample(jpeg: bytes, question: str, answer: str) -> Sample:
    user = Message("user", [Part("image", media=PICTURE), Part("text", question)])
    return Sample("", [user, Message("assistant", [Part("text", answer)])], {PICTURE: jpeg})
