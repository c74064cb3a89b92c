"""The tokenizer: a built-in byte-level BPE of 2048 ids, or the one of a checkpoint folder.

The built-in one has the special tokens of the released model (arXiv 2502.15803) as its last ids
and suits `model=tiny`; data/make_tokenizer.py made it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

BUILT_IN = Path(__file__).parent / "assets" / "tokenizer.json"

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""What a folder may hold of a tokenizer. The first is all that is needed."""

SPECIAL_TOKENS = (
    "<|eos|>",
    "<|unk|>",
    "<|pad|>",
    "<|role_start|>",
    "<|role_end|>",
    "<|turn_end|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image_pad|>",
    "<|video_start|>",
    "<|video_end|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
    "<|function_start|>",
    "<|function_end|>",
)
"""Special tokens of the released model, in the order of their ids."""


class TextTokenizer:
    """Text to ids and back. Special tokens come from `special` alone, never out of a text.

    Args:
        spec: the content of a tokenizer.json.
    """

    def __init__(self, spec: bytes):
        self._spec = spec
        self.fingerprint = hashlib.sha256(spec).hexdigest()
        content = json.loads(spec)
        # Only tokens marked special can be escaped, so that every added one has to be.
        for token in content.get("added_tokens") or []:
            token["special"] = True
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def __reduce__(self):
        return TextTokenizer, (self._spec,)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; the name of a special token in it is text like any other."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, special tokens written by their names."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def special(self, name: str) -> int:
        """Returns the id of the special token `name`.

        Raises:
            ValueError: this tokenizer has no such token.
        """
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(
                f"data.tokenizer: it has no token {name!r}. Use the tokenizer of an omni checkpoint, "
                "or null for the built-in one."
            )
        return token


class TextStream:
    """Turns ids into text as they come, and never gives out a part of a character."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._said: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Returns the text that this id completes; nothing while a character lacks bytes."""
        self._waiting.append(token)
        text = self._text()
        # Bytes that are no whole character yet are decoded as a replacement character at the end.
        return "" if text.endswith("\ufffd") else self._give_out(text)

    def end(self) -> str:
        """Returns what is left, with a replacement character for bytes that make none."""
        return self._give_out(self._text())

    def _text(self) -> str:
        # Decoded behind what came before: some tokenizers treat the first token of a text otherwise.
        before = self._tokenizer.decode(self._said)
        return self._tokenizer.decode(self._said + self._waiting)[len(before) :]

    def _give_out(self, text: str) -> str:
        if self._waiting:
            self._said, self._waiting = self._waiting, []
        return text


def choose_folder(named: str | None, run: str | None, weights: str | None, llm: str | None) -> str | None:
    """Returns the tokenizer's folder: the one named, else what comes with the weights a stage starts from.

    Those are an earlier run, a release folder or a language model; None is the built-in tokenizer.
    """
    if named is not None:
        return named
    final = Path(run or "") / "final"
    if run and (final / FILES[0]).is_file():
        return str(final)
    return weights or llm


def copy_tokenizer(folder: str | None, into: Path) -> None:
    """Copies the files of a tokenizer, with its chat template if it has one, into another folder."""
    source = BUILT_IN.parent if folder is None else Path(folder)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, into / name)


def load_tokenizer(folder: str | None) -> TextTokenizer:
    """Returns the tokenizer of a checkpoint folder (its tokenizer.json); None is the built-in one.

    Raises:
        ValueError: the folder has no readable tokenizer.json.
    """
    path = BUILT_IN if folder is None else Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer={folder}: there is no file {path}. "
            "Use a checkpoint folder that holds tokenizer.json, or null for the built-in one."
        )
    try:
        return TextTokenizer(path.read_bytes())
    except Exception as error:  # tokenizers raises bare Exception on a malformed file
        raise ValueError(
            f"data.tokenizer={folder}: {path} is not a tokenizer ({error}). "
            "Save it again with transformers' save_pretrained."
        ) from error
