"""Exact match and error rates, in English and Chinese."""

import random

import pytest

from train.measures import character_error_rate, corpus_scores, score, word_error_rate


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "cer", "wer"),
    [
        ("a red circle", "a red circle", True, 0, 0),
        ("A red  circle", " a RED circle\n", True, 0, 0),
        ("a red circle.", "a red circle", False, 1 / 13, 1 / 3),
        ("a red circle", "a red square", False, 5 / 12, 1 / 3),
        ("a red circle", "", False, 1, 1),
        ("one", "one two three four five", False, 1, 1),
        ("三个红色圆形", "三个红色圆形", True, 0, 0),
        ("三个 红色圆形", "三个红色圆形", False, 0, 0),
        ("三个红色圆形", "三个蓝色圆形", False, 1 / 6, 1 / 6),
        ("カタカナ", "カタナ", False, 1 / 4, 1 / 4),
        ("", "", True, 0, 0),
        ("", "anything", False, 1, 1),
        ("0", "0", True, 0, 0),
    ],
)
def test_scores_of_known_pairs(reference, answer, exact, cer, wer):
    assert score(reference, answer).exact is exact
    assert character_error_rate(reference, answer) == pytest.approx(cer)
    assert word_error_rate(reference, answer) == pytest.approx(wer)


def levenshtein(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_character_edits_are_the_edit_distance_capped_at_the_reference():
    draw = random.Random(0)
    for _ in range(200):
        reference, answer = ("".join(draw.choices("ab c红", k=draw.randint(1, 12))) for _ in range(2))
        found = score(reference, answer).characters
        expected, given = (" ".join(text.split()) for text in (reference, answer))
        if "红" in expected:
            expected, given = expected.replace(" ", ""), given.replace(" ", "")
        length = max(len(expected), 1)
        assert (found.edits, found.length) == (min(levenshtein(expected, given), length), length)


def test_rate_of_a_corpus_weighs_a_sample_by_its_length_and_lets_no_ramble_outweigh():
    found = corpus_scores([score("abcdefgh", "abcdefgh"), score("ab", "x" * 1000)])
    assert found == {"exact": 0.5, "cer": 0.2, "wer": 0.5, "samples": 2}
