"""Makes the built-in tokenizer: `python -m data.make_tokenizer --out data/assets/tokenizer.json`.

English comes from Python's own documentation topics, Chinese from the word frequencies of jieba
(MIT), so that anyone can make it again offline. The same Python and package versions give the
same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.tokenizer import SPECIAL_TOKENS

VOCAB_SIZE = 2048
CHARACTERS = 450
"""Chinese characters that are to be one token each: the most frequent ones."""

# Qwen2's pattern: single digits, and a word keeps one leading space or mark.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chinese_characters() -> list[tuple[str, int]]:
    """Returns the most frequent Chinese characters with their counts in jieba's corpus."""
    found = importlib.util.find_spec("jieba")
    if found is None or not found.submodule_search_locations:
        raise ValueError("jieba: it is not installed. Run pip install -e '.[dev]'.")
    words = Path(found.submodule_search_locations[0]) / "dict.txt"
    counts: Counter[str] = Counter()
    for line in words.read_text(encoding="utf-8").splitlines():
        word, count, _ = line.split(" ")
        for character in word:
            if "\u4e00" <= character <= "\u9fff":
                counts[character] += int(count)
    return counts.most_common(CHARACTERS)


def corpus() -> Iterator[str]:
    """Yields English texts, then every frequent Chinese character often enough to become a token."""
    for name in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[name]
    characters = chinese_characters()
    # One character a line, so that every merge goes into characters and none into words. The floor
    # lifts the rarest above the tail of English merges.
    most = characters[0][1]
    for character, count in characters:
        yield "\n".join([character] * (200 + 1000 * count // most))


def make_tokenizer() -> Tokenizer:
    """Returns the built-in tokenizer."""
    return train_tokenizer(corpus(), VOCAB_SIZE, show_progress=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Returns a tokenizer of at most `vocab_size` ids: bytes, merges, then the special tokens as the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
    return tokenizer


def main() -> None:
    """Trains and writes the file."""
    parser = argparse.ArgumentParser(
        description="Makes the built-in tokenizer, offline.",
        epilog="Example: python -m data.make_tokenizer --out data/assets/tokenizer.json",
    )
    parser.add_argument("--out", required=True, help="file to write")
    path = Path(parser.parse_args().out)
    tokenizer = make_tokenizer()
    tokenizer.save(str(path))
    print(f"{path}: {tokenizer.get_vocab_size()} ids, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
