import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from data.demo.signs import BOARD, BOARDS, CHINESE, draw_board, draw_sign, make_number, make_sign, use_font
from data.geometry import ImageGeometry, slice_image

TINY = ImageGeometry(patch_pixels=14, slice_pixels=112, max_slices=4, queries=16, table_side=16)
LATIN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.fixture
def font(tmp_path):
    """Uses a font in which every Chinese character is a bar of its own width."""
    names = {f"bar{number}": 100 + 30 * number for number in range(len(CHINESE))}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, CHINESE), names)))
    builder.setupGlyf({".notdef": bar(50), **{name: bar(width) for name, width in names.items()}})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "bars.ttf")
    use_font(str(tmp_path / "bars.ttf"))
    yield
    use_font(None)


def bar(width):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (width, 800), (width, 0)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


def signs(held_out, count=1500):
    return [make_sign(np.random.default_rng(number), held_out) for number in range(count)]


def test_a_held_out_text_is_never_made_for_training():
    trained, held_out = ({sign.text for sign in signs(split)} for split in (False, True))
    assert not trained & held_out
    assert len(trained) > 700 and len(held_out) > 100


def test_texts_are_numbers_and_documents():
    texts = [sign.text for sign in signs(False)]
    numbers = [text for text in texts if re.fullmatch(r"\d{2,3}", text)]
    documents = [text for text in texts if re.fullmatch(r"[a-z]+ \d{1,2} [a-z]+ \d{1,2}", text)]
    assert len(numbers) + len(documents) == len(texts)
    assert 0.8 < len(numbers) / len(texts) < 0.87


def test_documents_are_cut_into_slices_and_numbers_never_are():
    seen = set()
    for number, sign in enumerate(signs(False, 200)):
        picture = Image.open(io.BytesIO(draw_sign(sign, np.random.default_rng([1, number]))))
        slices = slice_image(*picture.size, TINY).num_slices
        assert slices == (3 if len(sign.panels) == 2 else 1)
        seen.add(picture.size)
    assert seen == {*BOARDS, (224, 112), (112, 224)}


def test_every_character_is_drawn_inside_the_picture_and_its_own_box():
    for number in range(200):
        rng = np.random.default_rng(number)
        sign = make_number(rng, False)
        picture, boxes = draw_board(sign, BOARD, rng)
        assert "".join(character for character, _ in boxes) == sign.text
        pixels = np.asarray(picture, dtype=int)
        inked = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 200
        for _, (left, top, right, bottom) in boxes:
            assert min(left, top) >= 0 and max(right, bottom) <= 112
            box = np.zeros_like(inked)
            box[round(top) - 2 : round(bottom) + 3, round(left) : round(right) + 1] = True
            assert (inked & box).sum() > 40
            inked &= ~box
        assert inked.sum() <= 8


def test_a_font_adds_chinese_signs(font):
    texts = [sign.text for sign in signs(False, 400)]
    chinese = [text for text in texts if not text.isascii()]
    assert 0.12 < len(chinese) / len(texts) < 0.28
    assert all(2 <= len(text) <= 3 and set(text) <= set(CHINESE) for text in chinese)
    rng = np.random.default_rng(0)
    sign = next(sign for sign in signs(False, 400) if not sign.text.isascii())
    picture, boxes = draw_board(sign, BOARD, rng)
    assert np.asarray(picture).std() > 10 and max(right for _, (_, _, right, _) in boxes) <= 112


def test_a_font_without_chinese_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=rf"DejaVuSans.ttf: has no .*{CHINESE[0]}.*simplified Chinese"):
        use_font(str(LATIN))
    use_font(None)


def test_a_file_that_is_no_font_is_refused(tmp_path):
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"font.ttf: cannot be read"):
        use_font(str(tmp_path / "font.ttf"))
    use_font(None)
