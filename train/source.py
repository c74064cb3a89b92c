"""Where the weights of a model that a command names are read from, one by one, whole or in parts."""

from __future__ import annotations

import json

from train.checkpoint import PieceReader, newest_checkpoint
from train.config import RunConfig
from train.folder import RunFolder
from train.request import ModelRequest
from train.stored import read_result
from train.weights import MergedReader, StoredReader, WeightReader

Reader = WeightReader | StoredReader | MergedReader | PieceReader
"""What reads whole weights under the names of the release."""


def open_weights(model: ModelRequest) -> tuple[Reader, int]:
    """Returns a reader of the model's weights, and the step of training that they are from.

    Of a run they are those of the finished stage, else of the newest checkpoint; adapters are merged. A
    released folder does not say its step, which counts as 0.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    if model.weights is not None:
        return WeightReader(model.weights), 0
    folder = RunFolder(model.config)
    if folder.is_complete:
        found = read_result(folder.final, model.name)
        return StoredReader(found, folder.final), json.loads(folder.stage_file.read_text())["steps"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"{model.name}: has no weights yet. Wait for its first checkpoint.")
    reader = PieceReader(newest)
    return merged(reader, model.config), reader.manifest["step"]


def merged(reader, config: RunConfig):
    """Returns a reader of the whole model that the config's adapters and the layers below them make."""
    return MergedReader(reader, config.lora.scale) if config.lora.rank else reader
