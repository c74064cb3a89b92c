"""What is said in the demo: English and Chinese sentences, and spoken instructions with their answers.

Everything is small on purpose: about thirty words and thirty characters, put together in hundreds of
ways, so that a tiny model hears each of them often and still has to hear every one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

ASR_PROMPTS = {"en": ("Transcribe this clip.",), "zh": ("请转写这段音频。",)}
"""Instructions to write down what is said, by the language that is spoken; as in the format `asr`."""

HELD_OUT_ONE_IN = 10
"""One sentence in this many is for evaluation only."""

COLOURS = ("red", "green", "blue", "yellow", "black")
SHAPES = ("circles", "squares", "triangles", "stars")
VERBS = ("open", "close", "take", "find", "bring")
NOUNS = ("door", "box", "book", "cup", "bag")
PLACES = ("left", "right")
DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = DIGITS[1:]

COLOURS_ZH = ("红", "绿", "蓝", "黄", "黑")
SHAPES_ZH = ("圆形", "方形", "星形")
VERBS_ZH = ("打开", "拿", "看")
NOUNS_ZH = ("门", "书", "包")
DIGITS_ZH = "零一二三四五六七八九"
NUMBERS_ZH = "一两三四五六七八九"

OPPOSITES = (
    ("left", "right"),
    ("up", "down"),
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("yes", "no"),
)
COLOURS_OF_THINGS = (("the sky", "blue"), ("grass", "green"), ("the sun", "yellow"), ("coal", "black"))
ENGLISH_INSTRUCTIONS = (
    ("say hello", "hello"),
    ("say thank you", "thank you"),
    ("say good morning", "good morning"),
    ("count to three", "one two three"),
    ("count down from three", "three two one"),
    ("name three colours", "red green blue"),
    ("which animal barks", "a dog"),
    ("which animal says meow", "a cat"),
    ("what do we drink", "water"),
    ("where do fish live", "in the sea"),
)
CHINESE_INSTRUCTIONS = (
    ("请说你好", "你好"),
    ("请说谢谢", "谢谢"),
    ("请数到三", "一二三"),
    ("天空是什么颜色", "蓝色"),
    ("草是什么颜色", "绿色"),
    ("太阳是什么颜色", "黄色"),
    ("左的反面是什么", "右"),
    ("大的反面是什么", "小"),
    ("鱼住在哪里", "水里"),
)
SUMS_ZH = ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (3, 4), (5, 3), (4, 5))

Form = Callable[[np.random.Generator], str]


def english_sentence(rng: np.random.Generator, held_out: bool) -> str:
    """Returns two to four lower-case words, of the tenth that is held out or of the other nine."""
    return _draw(rng, (_command, _amount, _digits), (0.4, 0.4, 0.2), held_out)


def chinese_sentence(rng: np.random.Generator, held_out: bool) -> str:
    """Returns two to six Chinese characters, of the tenth that is held out or of the other nine."""
    return _draw(rng, (_digits_zh, _amount_zh, _command_zh), (0.5, 0.3, 0.2), held_out)


def is_held_out(sentence: str) -> bool:
    """Returns whether a sentence is for evaluation only: the same in every process and on every machine."""
    digest = hashlib.blake2b(sentence.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def instructions() -> list[tuple[str, str]]:
    """Returns spoken instructions, each with its one right answer; the Chinese ones come last."""
    after = [(f"what comes after {first}", second) for first, second in pairwise(DIGITS)]
    before = [(f"what comes before {second}", first) for first, second in pairwise(DIGITS)]
    opposites = [(f"opposite of {word}", answer) for pair in OPPOSITES for word, answer in (pair, pair[::-1])]
    colours = [(f"what colour is {thing}", colour) for thing, colour in COLOURS_OF_THINGS]
    sums = [(f"{DIGITS_ZH[a]}加{DIGITS_ZH[b]}等于几", DIGITS_ZH[a + b]) for a, b in SUMS_ZH]
    return [*after, *before, *opposites, *colours, *ENGLISH_INSTRUCTIONS, *sums, *CHINESE_INSTRUCTIONS]


def _draw(
    rng: np.random.Generator,
    forms: Sequence[Form],
    shares: Sequence[float],
    held_out: bool,
) -> str:
    """Returns a sentence of the split: forms are drawn by share, and what the other split owns again."""
    form = forms[int(rng.choice(len(forms), p=shares))]
    while is_held_out(sentence := form(rng)) != held_out:
        pass
    return sentence


def _one_of(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _command(rng: np.random.Generator) -> str:
    which = _one_of(rng, (*COLOURS, *PLACES))
    return f"{_one_of(rng, VERBS)} the {which} {_one_of(rng, NOUNS)}"


def _amount(rng: np.random.Generator) -> str:
    words = [_one_of(rng, NUMBERS), _one_of(rng, COLOURS), _one_of(rng, SHAPES)]
    if rng.random() < 0.5:
        words.insert(0, _one_of(rng, VERBS))
    return " ".join(words)


def _digits(rng: np.random.Generator) -> str:
    return " ".join(_one_of(rng, DIGITS) for _ in range(rng.integers(2, 5)))


def _digits_zh(rng: np.random.Generator) -> str:
    return "".join(_one_of(rng, DIGITS_ZH) for _ in range(rng.integers(2, 5)))


def _amount_zh(rng: np.random.Generator) -> str:
    return f"{_one_of(rng, NUMBERS_ZH)}个{_one_of(rng, COLOURS_ZH)}色{_one_of(rng, SHAPES_ZH)}"


def _command_zh(rng: np.random.Generator) -> str:
    return f"{_one_of(rng, VERBS_ZH)}{_one_of(rng, COLOURS_ZH)}色的{_one_of(rng, NOUNS_ZH)}"
