"""Media among words: the features of pictures and clips take the places of their placeholders."""

from __future__ import annotations

from torch import Tensor

from data.sample import AudioBatch, VisionBatch
from train.model.audio import Audio
from train.model.vision import Vision


def place_media(x: Tensor, vision: VisionBatch, audio: AudioBatch, see: Vision, hear: Audio) -> Tensor:
    """Returns what enters the language model: the words `x`, with media in their places.

    Both towers run even where nothing is to be seen or heard.

    Shapes: x and result [T, D].
    """
    x = _place(x, vision.index, see(vision))
    tokens, marks = hear(audio)
    x = _place(x, audio.index, tokens)
    x = _place(x, audio.bos_index, marks[:1].expand(len(audio.bos_index), -1))
    return _place(x, audio.eos_index, marks[1:].expand(len(audio.eos_index), -1))


def _place(x: Tensor, index: Tensor, features: Tensor) -> Tensor:
    if not len(index):
        features = features[:0]
    return x.index_copy(0, index, features.to(x.dtype))
