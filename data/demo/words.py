"""The demo's tokenizer: every word and every Chinese character is one token."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

from data.demo.texts import BLANK, every_text
from data.make_tokenizer import train_tokenizer

MOST_IDS = 1024
WORD = re.compile(r"[A-Za-z]+|[^\x00-\x7f]")
INSIDE_FIRST = 3
"""A word without its leading space counts this often, so that letters are merged before spaces are."""


def make_tokenizer() -> Tokenizer:
    """Returns a byte-level tokenizer whose merges build the demo's words and nothing else."""
    return train_tokenizer(_lines(find_words(every_text())), MOST_IDS)


def find_words(texts: Iterable[str]) -> list[str]:
    """Returns the words, Chinese characters and marks of texts, each once, by first use."""
    return list(dict.fromkeys(word for text in texts for word in WORD.findall(text)))


def _lines(words: list[str]) -> Iterable[str]:
    # Nothing but single words: training ends by itself when each is one token.
    yield f" {BLANK}"
    for word in words:
        yield from [word] * INSIDE_FIRST
        if word.isascii():
            yield f" {word}"
