"""What an export is made from: a run, or a released folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.chat_template import adopt_template
from data.config import RELEASED_SYSTEM, TemplateConfig
from data.geometry import MediaConfig
from data.tokenizer import BUILT_IN, load_tokenizer
from train.compose import reword, to_run_config
from train.config import RunConfig
from train.model.config import ModelConfig
from train.parent import tokenizer_folder
from train.release import read_json, sizes_of, template_of

TOKENIZER = "tokenizer.json"


@dataclass(slots=True)
class Source:
    """A model and where its parts are.

    `tokenizer` is a folder; `release` the released folder that the weights descend from, whose other
    files go along; `stage` the stage.json of a finished run. `config` is None for a released folder.
    """

    folder: Path
    model: ModelConfig
    media: MediaConfig
    template: TemplateConfig
    tokenizer: Path
    release: Path | None = None
    config: RunConfig | None = None
    stage: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path) -> Source:
    """Returns what the run in `folder` has to export.

    Raises:
        ValueError: it is no run, or has no weights yet.
    """
    config = _run_config(folder)
    stage_file = folder / "final" / "stage.json"
    if not stage_file.is_file() and not any(folder.glob("checkpoints/step-*/manifest.json")):
        raise ValueError(f"run={folder}: has no weights yet. Wait for its first checkpoint.")
    named = tokenizer_folder(config)
    tokenizer = Path(named) if named else BUILT_IN.parent
    return Source(
        folder,
        config.model,
        config.media,
        settled_template(config.data.template, tokenizer),
        tokenizer,
        release_of(folder),
        config,
        json.loads(stage_file.read_text()) if stage_file.is_file() else {},
    )


def settled_template(template: TemplateConfig, tokenizer: Path) -> TemplateConfig:
    """Returns the template's options as they are used: what they leave to the tokenizer's folder filled in.

    Raises:
        ValueError: the folder has no tokenizer, or a template that writes otherwise than ours.
    """
    adopted = adopt_template(template, tokenizer, load_tokenizer(str(tokenizer)))
    return replace(adopted, system=RELEASED_SYSTEM) if adopted.system is None else adopted


def read_weights(folder: Path) -> Source:
    """Returns what a released folder has to export.

    Raises:
        ValueError: it is none, or of a model that is not built here.
    """
    if not folder.is_dir():
        raise ValueError(f"weights={folder}: there is no such folder. Name one that holds a released model.")
    content = read_json(folder)
    where = str(folder / "config.json")
    model, media = sizes_of(content, where)
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"weights={folder}: holds no {TOKENIZER}. Put the model's own one there.")
    template = settled_template(template_of(content, where), folder)
    return Source(folder, model, media, template, folder, folder)


def _run_config(folder: Path) -> RunConfig:
    kept = folder / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"run={folder}: holds no config.yaml. Name the folder of a run of train.py.")
    try:
        made_with = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(kept))
        assert isinstance(made_with, DictConfig)
        made_with.run = str(folder)  # it may have been moved
        return to_run_config(made_with)
    except OmegaConfBaseException as error:
        raise ValueError(reword(error)) from error


def release_of(run: Path) -> Path | None:
    """Returns the released folder that a run, or the first of its parents, started from.

    Raises:
        ValueError: that folder, or a parent that would name it, is gone.
    """
    passed: set[Path] = set()
    while run not in passed:
        passed.add(run)
        kept = OmegaConf.load(run / "config.yaml")
        weights, parent = OmegaConf.select(kept, "model.weights"), OmegaConf.select(kept, "init_from")
        if weights:
            return _there(Path(weights), "config.json", f"model.weights={weights}", run)
        if not parent:
            return None
        run = _there(Path(parent), "config.yaml", f"init_from={parent}", run)
    return None


def _there(folder: Path, file: str, where: str, run: Path) -> Path:
    if not (folder / file).is_file():
        raise ValueError(
            f"{where}: {run} started from it, and it is gone; its tokenizer and other files belong into the "
            "export. Put it back."
        )
    return folder
