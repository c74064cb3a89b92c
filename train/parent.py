"""The run that a stage starts from: is it there, is it finished, does it fit. Imports no torch, so that a
pipeline can ask for all of its stages before anything runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.tokenizer import choose_folder, load_tokenizer
from train.compose import to_plain
from train.config import RunConfig
from train.folder import differences

FITS_ANYWAY = (
    "model.recompute",
    "model.stage_lr",
    "model.weights",
    "model.parts",
    "model.fresh",
    "model.ignore",
)
"""What a parent's model may have otherwise: how it began, is computed and trained, not what it is."""

RANDOM = "random"
"""Among `parents`: a pipeline may begin with this stage, from random weights."""


def read_parent(config: RunConfig) -> dict[str, Any] | None:
    """Returns the stage.json of the run that `init_from` names, or None without it.

    Raises:
        ValueError: the parent is missing, unfinished, or of a stage, model or tokenizer that does not fit.
    """
    if config.init_from is None:
        return None
    run = Path(config.init_from)
    if not run.is_dir():
        raise ValueError(f"init_from={run}: there is no such folder. Name the run of an earlier stage.")
    stage_file = run / "final" / "stage.json"
    if not stage_file.is_file():
        raise ValueError(
            f"init_from={run}: its stage is not complete (no final/stage.json). Finish it first."
        )
    stage = json.loads(stage_file.read_text())
    where = f"init_from={run}"
    kept: Any = OmegaConf.to_container(OmegaConf.load(run / "final" / "config.yaml"))
    found = refuse_stage(config, stage["stage"], where) + refuse_model(config, kept, where)
    if stage.get("tokenizer_digest", tokenizer_digest(config)) != tokenizer_digest(config):
        found.append(
            f"{where}: learnt with another tokenizer than data.tokenizer={config.data.tokenizer}. "
            f"Use its own ({kept['data']['tokenizer']}), as it was, or null."
        )
    if found:
        raise ValueError("\n".join(found))
    return stage


def refuse_stage(config: RunConfig, stage: str, where: str) -> list[str]:
    """Returns what is wrong with starting from `stage`; `where` opens the line."""
    if stage in config.parents:
        return []
    return [
        f"{where}: is the result of {stage}, but {config.stage} starts from {_allowed(config)}. "
        "Name such a run, or change parents."
    ]


def refuse_random(config: RunConfig) -> list[str]:
    """Returns what is wrong with a pipeline that begins with this stage and no parent."""
    if RANDOM in config.parents:
        return []
    return [
        f"init_from=null: nothing comes before {config.stage}, which starts from {_allowed(config)} and not "
        "from random weights. Name such a run, or put its stage before this one."
    ]


def _allowed(config: RunConfig) -> str:
    named = ["random weights" if parent == RANDOM else parent for parent in config.parents]
    return ", ".join(named) or "nothing"


def refuse_model(config: RunConfig, other: dict[str, Any], where: str) -> list[str]:
    """Returns how the model of another run's config, as plain dicts, differs from the one of `config`."""
    found = differences(_model_nodes(other), _model_nodes(to_plain(config)), FITS_ANYWAY)
    if not found:
        return []
    named = [f"  {path}: {old} there, {new} now" for path, old, new in found]
    return ["\n".join([f"{where}: holds another model than was asked for. Use the same:", *named])]


def _model_nodes(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("model", "media")}


def tokenizer_digest(config: RunConfig) -> str:
    """Returns a digest of the tokenizer's file, as it was when first asked for.

    Raises:
        ValueError: there is no such tokenizer.
    """
    return _fingerprint(tokenizer_folder(config))


def tokenizer_folder(config: RunConfig) -> str | None:
    """Returns the folder of the tokenizer that a run uses; None is the built-in one."""
    model = config.model
    return choose_folder(config.data.tokenizer, config.init_from, model.weights, model.parts.llm)


def released_folder(config: RunConfig) -> str | None:
    """Returns the released folder that a run, or the first of its parents, started from."""
    if config.init_from is None:
        return config.model.weights
    return json.loads((Path(config.init_from) / "final" / "stage.json").read_text()).get("release")


@functools.cache  # a large one takes half a second to read, and a pipeline asks for every stage
def _fingerprint(folder: str | None) -> str:
    return load_tokenizer(folder).fingerprint
