"""Options that `data.prepare` and `data.index` share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math

from data.config import LimitsConfig


def positive(text: str) -> int:
    """Returns a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--tags` and `--limit`."""
    parser.add_argument("--tags", default="", help="tags of every sample, such as caption,zh")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one of data.limits, such as audio_seconds=7200 (may be repeated)",
    )


def read_tags(text: str) -> tuple[str, ...]:
    """Returns the tags of a list with commas."""
    return tuple(tag.strip() for tag in text.split(",") if tag.strip())


def read_map(pairs: list[str]) -> dict[str, str]:
    """Returns the columns by the fields they stand for, each given as FIELD=COLUMN.

    Raises:
        ValueError: one is not of that form.
    """
    found = {}
    for pair in pairs:
        field, _, column = pair.partition("=")
        if not (field and column):
            raise ValueError(f"--map {pair}: is not FIELD=COLUMN. Write it like text=sentence.")
        found[field] = column
    return found


def read_limits(changes: list[str]) -> LimitsConfig:
    """Returns the default limits with the changes, each NAME=VALUE, made.

    Raises:
        ValueError: a name is not known, or a value not possible.
    """
    limits = LimitsConfig()
    known = [field.name for field in dataclasses.fields(LimitsConfig)]
    for change in changes:
        name, _, value = change.partition("=")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0) or known
            raise ValueError(
                f"--limit {change}: there is no limit {name!r}. "
                f"Use one of {', '.join(known)} (nearest: {nearest[0]})."
            )
        kind = type(getattr(limits, name))
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            noun = "a whole number" if kind is int else "a finite number"
            raise ValueError(f"--limit {change}: {value!r} is not {noun}. Use {name}=NUMBER.")
        setattr(limits, name, number)
    problems = limits.problems()
    if problems:
        raise ValueError(f"--limit {problems[0]}")
    return limits
