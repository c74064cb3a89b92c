import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data.demo.patches import DIGITS, LABELS, NONE, label_board, labelled_number, labelled_scene
from data.demo.signs import make_number, make_panel
from data.geometry import ImageGeometry, slice_image

TINY = ImageGeometry(patch_pixels=14, slice_pixels=112, max_slices=4, queries=16, table_side=16)


def without_repeats(labels):
    return [label for label, _ in itertools.groupby(labels)]


@pytest.mark.parametrize("make", [labelled_scene, labelled_number])
def test_there_is_one_label_for_every_patch(make):
    for number in range(50):
        jpeg, labels = make(np.random.default_rng(number), False)
        slicing = slice_image(*Image.open(io.BytesIO(jpeg)).size, TINY)
        assert slicing.num_slices == 1 and slicing.num_patches == len(labels.split()) == 64
        assert set(labels.split()) <= set(LABELS)
        assert labels == " ".join(labels.split())


@pytest.mark.parametrize("make", [labelled_scene, labelled_number])
def test_a_patch_has_a_name_where_something_is_drawn_and_nowhere_else(make):
    agreed = 0
    for number in range(50):
        jpeg, labels = make(np.random.default_rng(number), False)
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)), dtype=int)
        drawn = (np.abs(pixels - pixels[0, 0]).sum(axis=2) > 150).reshape(8, 14, 8, 14).mean(axis=(1, 3))
        named = np.array([label != NONE for label in labels.split()]).reshape(8, 8)
        # The box of a digit holds paper too.
        assert named.any() and (make is labelled_number or not named[drawn == 0].any())
        agreed += ((drawn > 0.2) == named).mean() / 50
    assert agreed > 0.9


def test_every_digit_of_a_number_gets_patches_in_reading_order():
    names = set()
    for number in range(100):
        rng = np.random.default_rng(number)
        sign = make_number(rng, False)
        text, (_, labels) = sign.text, label_board(sign, rng)
        rows = np.array(labels.split()).reshape(8, 8).tolist()
        fullest = min(rows, key=lambda row: row.count(NONE))
        written = [DIGITS[int(digit)] for digit in text]
        assert without_repeats(label for label in fullest if label != NONE) == without_repeats(written)
        assert {label for row in rows for label in row} - {NONE} == set(written)
        names.update(written)
    assert names == set(DIGITS)


def test_a_panel_is_labelled_with_its_word_above_its_digits():
    for number in range(50):
        rng = np.random.default_rng(number)
        sign = make_panel(rng, False)
        word, digits = sign.panels[0]
        labels = [label for label in label_board(sign, rng)[1].split() if label != NONE]
        written = [DIGITS[int(digit)] for digit in digits]
        assert labels[0] == word and set(labels) == {word, *written}
        assert without_repeats(label == word for label in labels) == [True, False]
