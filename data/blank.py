"""The same batch with nothing to look at or listen to: what comes from the media shows in the difference."""

from __future__ import annotations

from dataclasses import replace

import torch

from data.sample import Batch

GREY = 128
"""A pixel in the middle of 0..255."""

SILENT_MEL = -1.5
"""Every log-mel value of a silent clip (data/mel.py): the floor of 1e-10, so (log10(1e-10) + 4) / 4."""


def blank(batch: Batch) -> Batch:
    """Returns the batch with grey pictures and silent clips of the same shapes; nothing else differs."""
    pixels, mel = batch.vision.pixels, batch.audio.mel
    silence = torch.full_like(mel, SILENT_MEL).masked_fill(batch.audio.gap, 0.0)
    return replace(
        batch,
        vision=replace(batch.vision, pixels=torch.full_like(pixels, GREY)),
        audio=replace(batch.audio, mel=silence),
    )
