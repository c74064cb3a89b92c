import io

import numpy as np
from PIL import Image

from data.demo.charts import BASE, Bars, Line, ask, describe, draw_chart, make_chart, questions
from data.demo.scenes import COLOURS


def charts(held_out, count=2000):
    return [make_chart(np.random.default_rng(number), held_out) for number in range(count)]


def test_held_out_values_are_never_made_for_training():
    trained, held_out = ({describe(chart) for chart in charts(split)} for split in (False, True))
    assert not trained & held_out
    assert len(trained) > 1000 and len(held_out) > 100


def test_colours_and_heights_differ_within_a_chart():
    for chart in charts(False, 300):
        if isinstance(chart, Bars):
            assert len(set(chart.colours)) == len(set(chart.heights)) == len(chart.colours)


def test_answers_follow_from_the_chart():
    found = dict(questions(Bars(("red", "blue", "black"), (3, 5, 1))))
    assert found["What colour is the left bar?"] == "red"
    assert found["What colour is the middle bar?"] == "blue"
    assert found["Which bar is the tallest?"] == "middle"
    assert found["Which bar is the shortest?"] == "right"
    assert found["How many bars are there?"] == "three"


def test_a_line_does_what_it_is_said_to_do():
    for chart in charts(False, 500):
        if isinstance(chart, Line):
            first, _, middle, _, last = chart.levels
            done = {
                "it rises": first < middle < last,
                "it falls": first > middle > last,
                "it peaks": middle > max(first, last),
                "it dips": middle < min(first, last),
            }
            assert [trend for trend, true in done.items() if true] == [chart.trend]


def test_bars_stand_in_their_order_with_their_colours_and_heights():
    drawn = 0
    for number, chart in enumerate(charts(False, 60)):
        if not isinstance(chart, Bars):
            continue
        picture = Image.open(io.BytesIO(draw_chart(chart, np.random.default_rng(number))))
        pixels = np.asarray(picture, dtype=int)[:BASE]
        far = np.abs(pixels - pixels[2, 2]).sum(axis=2) > 150
        step = 104 / len(chart.colours)
        for place, (colour, height) in enumerate(zip(chart.colours, chart.heights)):
            column = round(4 + step * (place + 0.5))
            assert abs(far[:, column].sum() - 18 * height) <= 4
            found = pixels[BASE - 9, column]
            assert min(COLOURS, key=lambda name: np.abs(found - COLOURS[name]).sum()) == colour
        drawn += 1
    assert drawn > 20


def test_guessing_by_the_question_alone_is_poor():
    answers = {}
    for number in range(4000):
        rng = np.random.default_rng(number)
        question, answer = ask(make_chart(rng, False), rng)
        answers.setdefault(question, []).append(answer)
    right = sum(max(map(given.count, set(given))) for given in answers.values())
    assert right / 4000 < 0.36
