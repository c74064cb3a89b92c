import itertools

import numpy as np

from data.demo import pictures, scenes, sentences, spoken
from data.demo.charts import describe as describe_chart
from data.demo.charts import make_chart
from data.demo.patches import LABELS
from data.demo.signs import make_sign
from data.demo.texts import (
    BLANK,
    CHATS,
    HEARD,
    blank,
    every_text,
    make_copy,
    make_instruction,
    make_text,
    recite,
)
from data.demo.words import MOST_IDS, find_words, make_tokenizer

TOKENIZER = make_tokenizer()


def texts(held_out, count=3000):
    """Returns what is asked and answered in text samples; documents have no answer."""
    samples = [make_text(np.random.default_rng(number), held_out) for number in range(count)]
    return [[message.parts[0].text for message in sample.messages] for sample in samples]


def without_blanks(asked):
    return asked.replace(f" {BLANK}", "").replace(f"{BLANK} ", "").replace(BLANK, "")


def bare(asked):
    """Returns what is seen or heard, without blanks and spaces."""
    return asked.split("\n")[0].replace(BLANK, "").replace(" ", "")


def answered(make, count=400):
    samples = (make(np.random.default_rng(number), False) for number in range(count))
    return [
        [part.text for part in message.parts if part.text]
        for sample in samples
        for message in sample.messages
    ]


def test_prompts_are_exactly_those_of_the_pictures():
    written = {asked.split("\n")[-1] for asked, *_ in texts(False)}
    for make in (pictures.make_caption, pictures.make_vqa, pictures.make_ocr, pictures.make_chart):
        shown = {question for (question,) in answered(make)[::2]}
        assert len(shown & written) / len(shown) > 0.95
    assert {prompt for prompts in sentences.ASR_PROMPTS.values() for prompt in prompts} <= written


def test_what_is_heard_stands_alone_where_nothing_is_written_beside_it():
    rngs = map(np.random.default_rng, range(600))
    asked = {without_blanks(make_instruction(rng, False)[0]) for rng in rngs}
    for instruction, _ in sentences.instructions()[:20]:
        assert f"{HEARD}{instruction}\n" in asked
    asked = {without_blanks(asked) for asked, *_ in texts(False)}
    assert any(text.endswith(f"\n{HEARD}what is on the left\n") for text in asked)


def test_a_scene_in_words_and_its_answer_say_the_same():
    checked = 0
    for asked, *answer in texts(False):
        if asked.endswith(pictures.DESCRIBE):
            described = set(without_blanks(asked).split("\n")[0].split())
            told = set(answer[0].replace(",", "").split()) - {"a", "above", "below"}
            assert told <= described
            checked += 1
    assert checked > 200


def test_held_out_texts_tell_only_of_what_no_training_sample_shows():
    trained, held_out = (
        {bare(asked) for asked, *answer in texts(split) if answer} for split in (False, True)
    )
    spoken_ones = {bare(HEARD + instruction) for instruction, _ in sentences.instructions()}
    assert not (trained & held_out) - spoken_ones
    for number in range(500):
        rng = np.random.default_rng(number)
        assert bare(scenes.describe(scenes.make_scene(rng, False))) not in held_out
        assert bare(describe_chart(make_chart(rng, False))) not in held_out
        assert bare(HEARD + sentences.english_sentence(rng, False)) not in held_out


def test_blanks_never_change_the_order_of_words():
    for number in range(200):
        spread = blank(["left", "red", "circle"], np.random.default_rng(number)).split()
        assert [word for word in spread if word != BLANK] == ["left", "red", "circle"]
        assert len(spread) <= 9


def test_documents_recite_a_list_in_order():
    said = {recite(np.random.default_rng(number)) for number in range(300)}
    assert any(text.startswith("monday tuesday wednesday") for text in said)
    assert all(len(text.split()) >= 3 for text in said)


def test_what_is_copied_is_what_is_shown_and_often_repeats():
    repeated = 0
    for number in range(300):
        asked, answer = make_copy(np.random.default_rng(number), False)
        shown = without_blanks(asked.removeprefix(HEARD)).split("\n")[0]
        assert shown.replace(" ", "") == answer.replace(" ", "")
        words = answer.split() if " " in answer else list(answer)
        repeated += len(set(words)) < len(words)
    assert repeated > 100


def test_nothing_held_out_is_copied():
    held_out = {text.replace(" ", "") for text in spoken_sentences() if sentences.is_held_out(text)}
    signs = (make_sign(np.random.default_rng(number), True) for number in range(3000))
    held_out |= {sign.text.replace(" ", "") for sign in signs}
    copied = {make_copy(np.random.default_rng(number), False)[1] for number in range(6000)}
    assert not {text.replace(" ", "") for text in copied} & held_out


def test_no_text_says_a_sentence_that_is_spoken_in_evaluation_only():
    held_out = {text.replace(" ", "") for text in spoken_sentences() if sentences.is_held_out(text)}
    assert len(held_out) > 1500
    said = {text for pair in (*CHATS, *sentences.instructions()) for text in pair}
    said |= {recite(np.random.default_rng(number)) for number in range(3000)}
    said |= {text for exchange in texts(False) for text in exchange if HEARD not in text}
    assert not {text.replace(" ", "") for text in said} & held_out


def spoken_sentences():
    """Yields all sentences that can be transcribed."""
    for count in (2, 3, 4):
        yield from map(" ".join, itertools.product(sentences.DIGITS, repeat=count))
        yield from map("".join, itertools.product(sentences.DIGITS_ZH, repeat=count))
    which = (*sentences.COLOURS, *sentences.PLACES)
    yield from map(" ".join, itertools.product(sentences.VERBS, ["the"], which, sentences.NOUNS))
    amounts = [*map(" ".join, itertools.product(sentences.NUMBERS, sentences.COLOURS, sentences.SHAPES))]
    yield from (*amounts, *map(" ".join, itertools.product(sentences.VERBS, amounts)))
    counted = itertools.product(sentences.NUMBERS_ZH, "个", sentences.COLOURS_ZH, "色", sentences.SHAPES_ZH)
    ordered = itertools.product(sentences.VERBS_ZH, sentences.COLOURS_ZH, ["色的"], sentences.NOUNS_ZH)
    yield from map("".join, (*counted, *ordered))


def test_recited_numbers_are_never_those_of_held_out_signs_and_sentences():
    for number in range(3000):
        text = recite(np.random.default_rng(number))
        assert not sentences.is_held_out(text) and not sentences.is_held_out(text.replace(" ", ""))


def test_every_word_is_one_token_with_a_space_and_without():
    for word in find_words(every_text()):
        assert len(TOKENIZER.encode(word).ids) == 1, word
        if word.isascii():
            assert len(TOKENIZER.encode(f" {word}").ids) == 1, word
    assert len(TOKENIZER.encode(f" {BLANK}").ids) == 1
    assert TOKENIZER.get_vocab_size() <= MOST_IDS


def test_no_sample_holds_a_word_that_the_tokenizer_does_not_know():
    known = set(find_words(every_text()))
    makers = [pictures.make_caption, pictures.make_vqa, pictures.make_binding, pictures.make_ocr]
    makers += [pictures.make_chart, pictures.make_patches, make_text]
    for make, held_out in itertools.product(makers, (False, True)):
        for number in range(200):
            sample = make(np.random.default_rng(number), held_out)
            said = [part.text for message in sample.messages for part in message.parts]
            assert set(find_words(said)) <= known
    for make in (spoken.make_asr_en, spoken.make_asr_zh, spoken.make_spoken_instruction):
        assert set(find_words(itertools.chain(*answered(make, 30)))) <= known


def test_patch_labels_become_one_token_a_patch():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = " ".join(rng.choice(LABELS, 64))
        assert len(TOKENIZER.encode(labels).ids) == 64


def test_chinese_characters_and_digits_never_merge():
    for text in ("三个红色圆形", "零一二三四五六七八九", "请转写这段音频。", "0123456789"):
        assert [TOKENIZER.decode([token]) for token in TOKENIZER.encode(text).ids] == list(text)
