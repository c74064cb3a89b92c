"""Mistakes of many stages, told together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

Item = TypeVar("Item")


def gather(tasks: list[tuple[str, Callable[[], Item]]]) -> list[Item]:
    """Returns the results of tasks, a stage's name with each.

    Raises:
        ValueError: with the mistakes of all of them. One that several stages share is told once, with
            their names.
    """
    results: list[Item] = []
    found: dict[str, dict[str, None]] = {}
    for name, task in tasks:
        try:
            results.append(task())
        except ValueError as error:
            for mistake in _split(str(error)):
                found.setdefault(mistake, {})[name] = None
    if found:
        raise ValueError("\n".join(f"{_say([*names], len(tasks))}: {text}" for text, names in found.items()))
    return results


def _split(text: str) -> list[str]:
    """Returns the mistakes of an error's text: a line each, with the indented lines below it."""
    return re.split(r"\n(?! )", text)


def _say(names: list[str], num_stages: int) -> str:
    return "every stage" if len(names) == num_stages > 1 else ", ".join(names)
