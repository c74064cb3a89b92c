"""Where the weights of a model that a command names are read from, one by one, whole or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.adapters import add_adapters
from train.checkpoint import PieceReader
from train.config import RunConfig
from train.first_weights import open_first_weights
from train.folder import RunFolder
from train.manifest import DamagedError, check_checkpoint, newest_checkpoint
from train.model.initial import RandomWeights
from train.model.omni import meta_model
from train.model.stand_in import MODEL_OF
from train.request import ModelRequest
from train.stage import FrozenFromStart
from train.stored import read_result
from train.weights import FirstWeightsReader, MergedReader, StoredReader, WeightReader


def open_weights(model: ModelRequest) -> tuple[Any, int]:
    """Returns a reader of the model's weights, and the step of training that they are from.

    A released folder does not say its step, which counts as 0.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    if model.weights is not None:
        return WeightReader(model.weights), 0
    return open_run(model.config)


def open_run(config: RunConfig) -> tuple[Any, int]:
    """Returns the weights of a finished stage, else of the newest checkpoint, and their step.

    Adapters are merged.

    Raises:
        ValueError: there are none, a file is missing or damaged, or what an unfinished stage started
            from is gone.
    """
    folder = RunFolder(config)
    if folder.is_complete:
        found = read_result(folder.final, f"run={folder.path}")
        return StoredReader(found, folder.final), json.loads(folder.stage_file.read_text())["steps"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"run={folder.path}: has no weights yet. Wait for its first checkpoint.")
    check_whole(newest)
    pieces = PieceReader(newest)
    whole = FrozenFromStart(config, pieces, open_first(config))
    if config.lora.rank:
        whole = MergedReader(whole, config.lora.scale)
    return whole, pieces.manifest["step"]


def check_whole(checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint is damaged."""
    try:
        check_checkpoint(checkpoint)
    except DamagedError as error:
        raise ValueError(f"{error}. Start the run again: it sets {checkpoint.name} aside.") from error


def open_first(config: RunConfig) -> FirstWeightsReader:
    """Returns the weights that a stage begins with."""
    model = meta_model(config.model, config.media, MODEL_OF[config.objective.value])
    add_adapters(model, config.lora)
    return FirstWeightsReader(open_first_weights(config), RandomWeights(model, config.seed))
