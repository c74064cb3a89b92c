"""The chat template of a tokenizer's folder: whether it writes what ours does, and its default system turn.

A checkpoint brings its own template, and a model goes on learning in the form it has learnt. Ours
(data/template.py) knows what carries loss and where media go, so it renders; the folder's decides what
the default system turn says, and is compared with ours on conversations of text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.config import TemplateConfig
from data.sample import Message, Part
from data.template import render
from data.tokenizer import TextTokenizer

Turns = list[tuple[str, str]]

PROBES: list[Turns] = [
    [("user", "A")],
    [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")],
]
SYSTEM_BEGINS = "<|role_start|>system<|role_end|>"


def adopt_template(config: TemplateConfig, folder: Path | None, tokenizer: TextTokenizer) -> TemplateConfig:
    """Returns the options, with the default system turn of the folder's template where `system` is null.

    Raises:
        ValueError: the folder's template writes conversations otherwise than ours, and `check` is on.
    """
    theirs = _read_template(folder) if folder else None
    if theirs is None or not config.check:
        return config
    try:
        written = [_write(theirs, turns) for turns in PROBES]
    except TemplateError as error:
        raise ValueError(f"{_where(folder)}: its chat template fails ({error}). {_REMEDY}") from error
    own = replace(config, system=_system_of(written[0]))
    _compare(own, written, folder, tokenizer)
    return own if config.system is None else config


_REMEDY = "Use the tokenizer of an omni checkpoint, or data.template.check=false to train in our form."


def _where(folder: Path | None) -> str:
    return f"data.tokenizer={folder}"


def _read_template(folder: Path) -> str | None:
    """Returns a folder's template, from a file of its own or from tokenizer_config.json; None without one."""
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except ValueError as error:
        raise ValueError(f"{_where(folder)}: {config.name} is damaged ({error}). Copy it again.") from error
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _write(template: str, turns: Turns) -> str:
    """Returns a conversation as transformers would write it with this template."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    messages = [{"role": role, "content": text} for role, text in turns]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=False)


def _system_of(text: str) -> str:
    """Returns the default system turn of what a template made of the first probe; "" where it adds none."""
    if not text.startswith(SYSTEM_BEGINS):
        return ""
    return text[len(SYSTEM_BEGINS) :].partition("<|turn_end|>")[0]


def _compare(
    config: TemplateConfig, written: list[str], folder: Path | None, tokenizer: TextTokenizer
) -> None:
    for turns, theirs in zip(PROBES, written):
        messages = [Message(role, [Part("text", text=text)]) for role, text in turns]  # type: ignore[arg-type]
        ours = tokenizer.decode(render(messages, {}, config, tokenizer).input_ids.tolist())
        if ours != theirs:
            raise ValueError(
                f"{_where(folder)}: its chat template writes {theirs!r}, where this program writes {ours!r}. "
                f"{_REMEDY}"
            )
