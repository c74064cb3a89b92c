import io

import numpy as np
from PIL import Image

from data.demo.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    ask_position,
    binding_questions,
    caption,
    describe,
    draw_scene,
    make_scene,
    position_questions,
)


def rngs(count):
    return (np.random.default_rng(number) for number in range(count))


def scenes(held_out, count=3000):
    return [make_scene(rng, held_out) for rng in rngs(count)]


def test_a_held_out_scene_is_never_made_for_training():
    trained, held_out = set(scenes(False)), set(scenes(True))
    assert not trained & held_out
    assert {scene.arrangement for scene in held_out} == set(PLACES)
    assert 0.07 < len(held_out) / (2 * 20 * 19 + 20) < 0.13


def test_training_shows_every_object_at_every_place():
    seen = {(place, str(thing)) for scene in scenes(False) for place, thing in scene.placed}
    pairs = {
        (place, f"{c} {s}") for place in PLACES["pair"] + PLACES["stack"] for c in COLOURS for s in SHAPES
    }
    assert pairs <= seen


def test_the_same_generator_draws_the_same_picture():
    first, second = ([draw_scene(make_scene(rng, False), rng) for rng in rngs(5)] for _ in range(2))
    assert first == second
    assert len({picture for picture, _ in first}) == 5


def test_every_object_has_its_colour_at_its_place():
    for rng in rngs(50):
        scene = make_scene(rng, False)
        picture, boxes = draw_scene(scene, rng)
        pixels = np.asarray(Image.open(io.BytesIO(picture)), dtype=int)
        assert pixels.shape == (112, 112, 3)
        for thing, (left, top, right, bottom) in zip(scene.objects, boxes):
            assert min(left, top) >= 0 and max(right, bottom) <= 112
            # The middle of the triangle's box is inside it too.
            found = pixels[round(top + bottom) // 2, round(left + right) // 2]
            assert min(COLOURS, key=lambda name: np.abs(found - COLOURS[name]).sum()) == thing.colour


def test_objects_never_overlap():
    for rng in rngs(300):
        scene = make_scene(rng, False)
        boxes = draw_scene(scene, rng)[1]
        if len(boxes) == 2:
            axis = 0 if scene.arrangement == "pair" else 1
            assert boxes[0][axis + 2] <= boxes[1][axis]


def test_captions_and_descriptions_tell_all_scenes_apart():
    told = set(scenes(False))
    assert len({caption(scene) for scene in told}) == len({describe(scene) for scene in told}) == len(told)


def test_a_question_has_one_answer():
    for scene in scenes(False, 200):
        for asked in (position_questions(scene), binding_questions(scene)):
            assert len({question for question, _ in asked}) == len(asked)


def test_a_question_that_binds_names_what_is_there_once():
    for scene in scenes(False, 200):
        told = [str(thing).split() for thing in scene.objects]
        for question, answer in binding_questions(scene):
            words = question.rstrip("?").split()
            fitting = [thing for thing in told if set(thing) & set(words)]
            if not question.startswith("Where"):
                assert len(fitting) == 1 and answer in fitting[0]


def test_guessing_by_the_question_alone_is_poor():
    answers = {}
    for rng in rngs(4000):
        question, answer = ask_position(make_scene(rng, False), rng)
        answers.setdefault(question, []).append(answer)
    right = sum(max(map(given.count, set(given))) for given in answers.values())
    assert right / 4000 < 0.3
