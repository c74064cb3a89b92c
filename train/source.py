"""Where the weights of a model that a command names are read from, one by one, whole or in parts."""

from __future__ import annotations

import json

from train.checkpoint import PieceReader, newest_checkpoint
from train.folder import RunFolder
from train.request import ModelRequest
from train.weights import WeightReader


def open_weights(model: ModelRequest) -> tuple[WeightReader | PieceReader, int]:
    """Returns a reader of the model's weights, and the step of training that they are from.

    Of a run they are those of the finished stage, else of the newest checkpoint; a released folder does
    not say its step, which counts as 0.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    if model.weights is not None:
        return WeightReader(model.weights), 0
    folder = RunFolder(model.config)
    if folder.is_complete:
        return WeightReader(folder.final), json.loads(folder.stage_file.read_text())["steps"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"{model.name}: has no weights yet. Wait for its first checkpoint.")
    reader = PieceReader(newest)
    return reader, reader.manifest["step"]
