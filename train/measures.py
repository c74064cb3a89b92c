"""How far an answer is from its reference: exact match, character and word error rate.

Texts are compared after `normalise`: white space at the ends goes, runs of it become one space, and
case is folded. Punctuation stays, since a model is trained to give it. Where the reference holds
Chinese or Japanese characters there are no words to count: both rates compare characters, without spaces.

Edits are capped at the length of the reference, so a rate is never above 1: a model that has seen
nothing rambles, and one long answer would outweigh all others. The rate of many samples is the sum of their
capped edits over the sum of their lengths. An empty reference has length 1: an empty answer is right,
any other wrong.

Source: edit distances by jiwer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jiwer

_WITHOUT_SPACES = re.compile(r"[\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Kana and Chinese characters."""


@dataclass(frozen=True, slots=True)
class Edits:
    """Edits from a reference of `length` units to an answer, capped at that length."""

    edits: int
    length: int

    @property
    def rate(self) -> float:
        """Share of the reference that is wrong, from 0 to 1."""
        return self.edits / self.length


@dataclass(frozen=True, slots=True)
class Score:
    """One answer against its reference."""

    exact: bool
    characters: Edits
    words: Edits


def normalise(text: str) -> str:
    """Returns the text as it is compared."""
    return " ".join(text.split()).casefold()


def score(reference: str, answer: str) -> Score:
    """Returns how an answer compares to its reference."""
    expected, given = normalise(reference), normalise(answer)
    exact = expected == given
    if _WITHOUT_SPACES.search(expected):
        characters = _edits(list(expected.replace(" ", "")), list(given.replace(" ", "")))
        return Score(exact, characters, characters)
    return Score(exact, _edits(list(expected), list(given)), _edits(expected.split(), given.split()))


def character_error_rate(reference: str, answer: str) -> float:
    """Returns the capped character error rate of one answer."""
    return score(reference, answer).characters.rate


def word_error_rate(reference: str, answer: str) -> float:
    """Returns the capped word error rate of one answer; by characters for Chinese."""
    return score(reference, answer).words.rate


def corpus_scores(scores: Iterable[Score]) -> dict[str, float | int]:
    """Returns `exact`, `cer`, `wer` and `samples` of many answers; at least one is needed."""
    found = list(scores)
    return {
        "exact": sum(one.exact for one in found) / len(found),
        "cer": _corpus_rate(one.characters for one in found),
        "wer": _corpus_rate(one.words for one in found),
        "samples": len(found),
    }


def _corpus_rate(parts: Iterable[Edits]) -> float:
    parts = list(parts)
    return sum(part.edits for part in parts) / sum(part.length for part in parts)


def _edits(expected: list[str], given: list[str]) -> Edits:
    length = max(len(expected), 1)
    if not expected or not given:
        return Edits(min(max(len(expected), len(given)), length), length)
    return Edits(min(_distance(expected, given), length), length)


def _distance(expected: list[str], given: list[str]) -> int:
    # jiwer counts words of a text, so every unit is written as one word of its own.
    numbers = {unit: str(place) for place, unit in enumerate(dict.fromkeys([*expected, *given]))}
    reference, answer = (" ".join(numbers[unit] for unit in units) for units in (expected, given))
    found = jiwer.process_words(reference, answer)
    return found.substitutions + found.deletions + found.insertions
