"""From a pipeline's file to its stages: which belong to it, and the checked config of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.mistakes import gather
from launch.request import FIRST_ONLY, OWN, TAKEN, Request, read_yaml, refuse_key
from train.compose import compose_words, nearest
from train.config import RunConfig
from train.folder import RunFolder

KEYS = ("recipe", "name", "only_with", "overrides")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage as the pipeline's file has it; the file explains the keys."""

    recipe: str
    name: str
    only_with: str | None
    overrides: list[str]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage to run: `words` are for `train.py`, `config` is what they compose to."""

    name: str
    words: list[str]
    config: RunConfig
    log: Path

    @property
    def folder(self) -> RunFolder:
        """Where the stage leaves its files."""
        return RunFolder(self.config)


def read_pipeline(path: Path) -> list[Entry]:
    """Returns the entries of a pipeline's file.

    Raises:
        ValueError: the file or an entry is malformed.
    """
    listed = read_yaml(path).get("stages")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: has no stages. Give it a list, as recipes/pipelines/megrez_omni.yaml has.")
    entries = [_entry(path, item) for item in listed]
    names = [entry.name for entry in entries]
    doubles = sorted({entry for entry in names if names.count(entry) > 1})
    if doubles:
        raise ValueError(f"{path}: two stages are called {doubles[0]}. Give one of them a name of its own.")
    return entries


def _entry(path: Path, item: Any) -> Entry:
    if not isinstance(item, dict) or not isinstance(item.get("recipe"), str):
        raise ValueError(f"{path}: stages: {item} names no recipe. Write - {{recipe: omni_sft}}.")
    for key in item:
        if key not in KEYS:
            hint = f"{nearest(str(key), list(KEYS))} Known: {', '.join(KEYS)}."
            raise ValueError(f"{path}: stages.{key}: not a known key.{hint}")
    name = item.get("name", item["recipe"])
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"{path}: stages.name={name}: is no name. Use letters, digits and underscores.")
    return Entry(item["recipe"], name, _only_with(path, item), _overrides(path, item))


def _only_with(path: Path, item: dict[str, Any]) -> str | None:
    word = item.get("only_with")
    if word is not None and not isinstance(word, str):
        raise ValueError(f"{path}: stages.only_with={word}: is no word. Write data=demo.")
    return word


def _overrides(path: Path, item: dict[str, Any]) -> list[str]:
    words = item.get("overrides") or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: stages.overrides={words}: is no list of words. Write [train.steps=100].")
    for word in words:
        if refused := refuse_key(word.partition("=")[0], TAKEN | OWN):
            raise ValueError(f"{path}: stages.overrides: {word}: {refused}.")
    return words


def _chosen_entries(request: Request) -> list[Entry]:
    """Returns the entries that belong to the pipeline with the words that were given.

    Raises:
        ValueError: the file is malformed, or a word is for a stage that does not belong.
    """
    entries = read_pipeline(request.pipeline)
    entries = [entry for entry in entries if entry.only_with is None or entry.only_with in request.words]
    names = [entry.name for entry in entries]
    strange = [
        f"{name}:{words[0]}: no stage of that name.{nearest(name, names)} Known: {', '.join(names)}."
        for name, words in request.stage_words.items()
        if name not in names
    ]
    if strange:
        raise ValueError("\n".join(strange))
    return entries


def compose_stages(request: Request) -> list[Stage]:
    """Returns every stage with its config, each starting from the one before it.

    Raises:
        ValueError: with the mistakes of all stages, each line opening with the stages that have it.
    """
    entries = _chosen_entries(request)
    parents = [request.init_from, *(str(request.runs / entry.name) for entry in entries)]
    return gather(
        [
            (entry.name, lambda entry=entry, parent=parent: _compose(request, entry, parent))
            for entry, parent in zip(entries, parents)
        ]
    )


def _compose(request: Request, entry: Entry, parent: str | None) -> Stage:
    shared = request.words
    if parent is not None:
        shared = [word for word in shared if not word.lstrip("+").startswith(FIRST_ONLY)]
    words = [f"recipe={entry.recipe}", *entry.overrides, *shared]
    words += [*request.stage_words.get(entry.name, []), f"run={_quoted(str(request.runs / entry.name))}"]
    if parent is not None:
        words.append(f"init_from={_quoted(parent)}")
    return Stage(entry.name, words, compose_words(words), request.runs / f"{entry.name}.log")


def _quoted(value: str) -> str:
    """Returns a path as Hydra reads it back."""
    return value if re.fullmatch(r"[\w./+@%-]+", value) else "'" + value.replace("'", "\\'") + "'"
