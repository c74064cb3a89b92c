"""What an export is made from: a run, or a released folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.chat_template import adopt_template
from data.config import RELEASED_SYSTEM, TemplateConfig
from data.geometry import MediaConfig
from data.tokenizer import BUILT_IN, FILES, load_tokenizer
from train.config import RunConfig
from train.folder import RunFolder
from train.model.config import ModelConfig
from train.parent import released_folder, tokenizer_folder
from train.request import ModelRequest, read_model

TOKENIZER = FILES[0]


@dataclass(slots=True)
class Source:
    """A model and where its parts are.

    `tokenizer` is a folder; `release` the released folder that the weights descend from, whose other
    files go along; `stage` the stage.json of a finished run. `config` is None for a released folder.
    """

    request: ModelRequest
    template: TemplateConfig
    tokenizer: Path
    release: Path | None
    stage: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run or the released folder."""
        return self.request.weights or Path(self.request.config.run)

    @property
    def config(self) -> RunConfig | None:
        """The config of the run."""
        return None if self.request.weights else self.request.config

    @property
    def model(self) -> ModelConfig:
        """Sizes of the model."""
        return self.request.config.model

    @property
    def media(self) -> MediaConfig:
        """How media become tokens."""
        return self.request.config.media


def read_source(words: list[str]) -> Source:
    """Returns what `run=DIR` or `weights=DIR` has to export.

    Raises:
        ValueError: there is no such model, it has no weights yet, or what belongs to it is gone.
    """
    request = read_model(words)
    config = request.config
    tokenizer = Path(tokenizer_folder(config) or BUILT_IN.parent)
    template = settled_template(config.data.template, tokenizer)
    if request.weights is not None:
        return Source(request, template, tokenizer, request.weights)
    folder = RunFolder(config)
    stage = json.loads(folder.stage_file.read_text()) if folder.is_complete else {}
    return Source(request, template, tokenizer, _release_of(request, stage), stage)


def settled_template(template: TemplateConfig, tokenizer: Path) -> TemplateConfig:
    """Returns the template's options as they are used: what they leave to the tokenizer's folder filled in.

    Raises:
        ValueError: the folder has no tokenizer, or a template that writes otherwise than ours.
    """
    adopted = adopt_template(template, tokenizer, load_tokenizer(str(tokenizer)))
    return replace(adopted, system=RELEASED_SYSTEM) if adopted.system is None else adopted


def _release_of(request: ModelRequest, stage: dict[str, Any]) -> Path | None:
    """Returns the released folder that a run, or the first of its parents, started from."""
    named = stage["release"] if stage else released_folder(request.config)
    if named is None:
        return None
    if not (Path(named) / "config.json").is_file():
        raise ValueError(
            f"{request.name}: descends from {named}, which is gone; its files other than weights belong into "
            "the export. Put it back."
        )
    return Path(named)
