"""Where the weights of a model that a command names are read from, one by one, whole or in parts."""

from __future__ import annotations

import json

from train.checkpoint import PieceReader, newest_checkpoint
from train.folder import RunFolder
from train.request import ModelRequest
from train.weights import WeightReader


def open_weights(model: ModelRequest) -> tuple[WeightReader | PieceReader, int]:
    """Returns a reader of the model's weights, and the step of training that they are from.

    A released folder does not say its step, which counts as 0.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    if model.weights is not None:
        return WeightReader(model.weights), 0
    return open_run(RunFolder(model.config))


def open_run(folder: RunFolder) -> tuple[WeightReader | PieceReader, int]:
    """Returns the weights of a finished stage, else of the newest checkpoint, and their step.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    if folder.is_complete:
        return WeightReader(folder.final), json.loads(folder.stage_file.read_text())["steps"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"run={folder.path}: has no weights yet. Wait for its first checkpoint.")
    reader = PieceReader(newest)
    return reader, reader.manifest["step"]
