import itertools
import subprocess
import sys

import numpy as np
import pytest

from data.demo.sentences import (
    ASR_PROMPTS,
    COLOURS,
    NUMBERS,
    SHAPES,
    VERBS,
    chinese_sentence,
    english_sentence,
    instructions,
    is_held_out,
)
from data.formats import MediaSource, asr
from data.sample import Part


class OneClip(MediaSource):
    def part(self, kind, reference):
        return Part(kind, media=reference)


def drawn(sentence, held_out, count=2000):
    rng = np.random.default_rng(0)
    return [sentence(rng, held_out) for _ in range(count)]


@pytest.mark.parametrize("sentence", [english_sentence, chinese_sentence])
def test_a_held_out_sentence_is_never_trained_on(sentence):
    trained, held_out = set(drawn(sentence, False)), set(drawn(sentence, True))
    assert not trained & held_out
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))
    # Enough of both that nobody learns them by heart.
    assert len(trained) > 700 and len(held_out) > 150


def test_about_a_tenth_of_what_can_be_said_is_held_out():
    amounts = [" ".join(words) for words in itertools.product(VERBS, NUMBERS, COLOURS, SHAPES)]
    assert 0.07 < np.mean([is_held_out(amount) for amount in amounts]) < 0.13


def test_held_out_sentences_use_only_words_of_training():
    words = {word for sentence in drawn(english_sentence, False) for word in sentence.split()}
    assert {word for sentence in drawn(english_sentence, True) for word in sentence.split()} <= words
    assert set("".join(drawn(chinese_sentence, True))) <= set("".join(drawn(chinese_sentence, False)))
    assert len(words) < 40


def test_sentences_are_short_and_plain():
    for sentence in drawn(english_sentence, False):
        assert sentence.isascii() and sentence == sentence.lower() and "  " not in sentence
        assert 2 <= len(sentence.split()) <= 4
    for sentence in drawn(chinese_sentence, False):
        assert 2 <= len(sentence) <= 6 and all("\u4e00" <= character <= "\u9fff" for character in sentence)


def test_the_split_is_the_same_in_every_process():
    program = "from data.demo.sentences import is_held_out; print([is_held_out(str(n)) for n in range(200)])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([is_held_out(str(number)) for number in range(200)])


def test_instructions_have_one_answer_that_is_hard_to_guess():
    listed = instructions()
    asked = [instruction for instruction, _ in listed]
    answers = [answer for _, answer in listed]
    assert len(set(asked)) == len(asked) >= 40
    assert sum(not instruction.isascii() for instruction in asked) >= 10
    assert max(answers.count(answer) for answer in answers) / len(answers) < 0.1
    assert all(1 <= len(answer.split()) <= 3 for answer in answers)


def test_transcription_is_asked_for_as_the_asr_format_does():
    for language, prompts in ASR_PROMPTS.items():
        record = {"audio": "clip.wav", "text": "x", "language": language}
        assert asr(record, OneClip())[0].parts[1].text in prompts
