"""What a person asked to export: the words of the command line. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

from train.compose import nearest
from train.export.origin import Source, read_source
from train.request import MODEL_WORDS

KEYS = (*MODEL_WORDS, "out", "format", "dtype", "max_shard")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Format(Enum):
    """Form of the folder: for code that reads the release, or with code of its own for transformers."""

    megrez = "megrez"
    transformers = "transformers"


class Dtype(Enum):
    """What weights are stored in."""

    bf16 = "bfloat16"
    fp32 = "float32"


@dataclass(slots=True)
class Request:
    """What is to be exported, and how."""

    source: Source
    out: Path
    form: Format
    dtype: Dtype = Dtype.bf16
    shard_bytes: int = 5 * 10**9


def read_request(words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: a word cannot be used, or there is no such model.
    """
    given = _by_key(words)
    out = Path(_needed(given, "out", "exports/omni_sft"))
    form = _choice(Format, "format", _needed(given, "format", "transformers"))
    dtype = _choice(Dtype, "dtype", given.get("dtype", Dtype.bf16.name))
    shard_bytes = _read_bytes(given.get("max_shard", "5GB"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out}: is there already, and not empty. Name a new folder.")
    source = read_source([f"{key}={given[key]}" for key in MODEL_WORDS if key in given])
    return Request(source, out, form, dtype, shard_bytes)


def _by_key(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"{word}: is not KEY=VALUE. Use words such as run=DIR out=DIR.")
        if key not in KEYS:
            raise ValueError(f"{key}: not a known key.{nearest(key, list(KEYS))} Known: {', '.join(KEYS)}.")
        if key in given:
            raise ValueError(f"{word}: {key} is given twice. Give it once.")
        given[key] = value
    return given


def _needed(given: dict[str, str], key: str, example: str) -> str:
    if key not in given:
        raise ValueError(f"{key}: it is not set. Set it, as in {key}={example}.")
    return given[key]


Choice = TypeVar("Choice", bound=Enum)


def _choice(kind: type[Choice], key: str, name: str) -> Choice:
    if name not in kind.__members__:
        known = list(kind.__members__)
        raise ValueError(
            f"{key}={name!r}: not a known value.{nearest(name, known)} Known: {', '.join(known)}."
        )
    return kind[name]


def _read_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"max_shard={text}: is no size. Use one such as 5GB, 500MB or 2GiB.")
    return int(float(found[1]) * UNITS[(found[2] or "").upper()])
