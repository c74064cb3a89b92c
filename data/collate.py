"""Lays encoded samples into the rows of a micro-batch and computes every index the model needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data.geometry import MediaConfig, position_ids
from data.sample import IGNORE, AudioBatch, Batch, Dropped, EncodedSample, SampleInfo, VisionBatch

GAP_FRAMES = 2
"""Zero mel frames after every clip: they keep the stride of 2, and convolutions see no neighbour."""


@dataclass(slots=True)
class BlankSegment:
    """A sample dropped in its place: its tokens become padding without labels, so nothing shifts."""

    length: int
    info: Dropped


Packs = list[list[EncodedSample | BlankSegment]]


@dataclass(slots=True)
class _Slice:
    """One slice and the places of its placeholders in the micro-batch."""

    pixels: np.ndarray
    grid: tuple[int, int]
    start: int


@dataclass(slots=True)
class _Clip:
    """One clip and the place of its bos token in the micro-batch."""

    mel: np.ndarray
    tokens: int
    start: int


def collate(packs: Packs, length: int, media: MediaConfig, pad_id: int, loss: str) -> Batch:
    """Returns one micro-batch of `packs`, each a row of `length` tokens.

    `loss` is what a supervised token weighs: `token` 1, `sample` 1/n and `sqrt` n^-0.5 of its
    sample's n. Targets are the next token of the same segment. Slices of equal size and clips of
    equal length stand next to each other, since the indices make their order free.

    Shapes: see `Batch`.
    """
    assert loss in ("token", "sample", "sqrt"), loss
    rows = _Rows(len(packs), length, pad_id)
    for row, pack in enumerate(packs):
        place, end = row * length, (row + 1) * length
        assert sum(_length(item) for item in pack) <= length, "a pack is longer than its row"
        for item in pack:
            if isinstance(item, BlankSegment):
                rows.add_blank(item, place)
            else:
                rows.add_sample(item, place, loss)
            place += _length(item)
        rows.add_padding(end - place, place)
    return rows.batch(media)


def _length(item: EncodedSample | BlankSegment) -> int:
    return item.length if isinstance(item, BlankSegment) else len(item.input_ids)


class _Rows:
    """The rows of a micro-batch laid end to end, filled segment by segment."""

    def __init__(self, num_rows: int, length: int, pad_id: int):
        self.shape = (num_rows, length)
        self.input_ids = np.full(num_rows * length, pad_id, dtype=np.int64)
        self.position_ids = np.zeros(num_rows * length, dtype=np.int64)
        self.segments: list[int] = []
        self.supervised: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.sample: list[np.ndarray] = []
        self.samples: list[SampleInfo] = []
        self.dropped: list[Dropped] = []
        self.slices: list[_Slice] = []
        self.clips: list[_Clip] = []

    def add_padding(self, length: int, place: int) -> None:
        if length:
            self.segments.append(length)
            self.position_ids[place : place + length] = np.arange(length)

    def add_blank(self, blank: BlankSegment, place: int) -> None:
        self.add_padding(blank.length, place)
        self.dropped.append(blank.info)

    def add_sample(self, item: EncodedSample, place: int, loss: str) -> None:
        length = len(item.input_ids)
        self.add_padding(length, place)
        self.input_ids[place : place + length] = item.input_ids
        positions = np.flatnonzero(item.labels[1:] != IGNORE)
        count = len(positions)
        weight = {"token": 1.0, "sample": 1.0 / max(count, 1), "sqrt": max(count, 1) ** -0.5}[loss]
        self.supervised.append(positions + place)
        self.targets.append(item.labels[positions + 1])
        self.weights.append(np.full(count, weight))
        self.sample.append(np.full(count, len(self.samples)))
        self.samples.append(SampleInfo(item.key, item.source, item.modality, length, count))
        self.slices += [
            _Slice(pixels, grid, place + start)
            for pixels, grid, start in zip(item.slices, item.grids, item.slice_starts)
        ]
        self.clips += [
            _Clip(mel, tokens, place + start)
            for mel, tokens, start in zip(item.clips, item.clip_tokens, item.clip_starts)
        ]

    def batch(self, media: MediaConfig) -> Batch:
        return Batch(
            input_ids=torch.from_numpy(self.input_ids).view(self.shape),
            position_ids=torch.from_numpy(self.position_ids).view(self.shape),
            cu_seqlens=_cumulative(self.segments),
            max_seqlen=max(self.segments, default=0),
            supervised=_joined(self.supervised, torch.int64),
            targets=_joined(self.targets, torch.int64),
            weights=_joined(self.weights, torch.float32),
            sample=_joined(self.sample, torch.int64),
            vision=_vision(sorted(self.slices, key=lambda item: item.grid), media),
            audio=_audio(sorted(self.clips, key=lambda item: item.mel.shape[1]), media),
            samples=self.samples,
            dropped=self.dropped,
        )


def _vision(slices: list[_Slice], media: MediaConfig) -> VisionBatch:
    geometry = media.image
    if slices:
        pixels = np.concatenate([item.pixels for item in slices])
        grids = [item.grid for item in slices]
    else:
        pixels = np.zeros((4, 3 * geometry.patch_pixels**2), dtype=np.uint8)
        grids = [(2, 2)]
    sizes = [rows * columns for rows, columns in grids]
    ids = [position_ids(rows, columns, geometry.table_side) for rows, columns in grids]
    coordinates = [np.indices(grid).reshape(2, -1).T for grid in grids]
    index = [item.start + np.arange(geometry.queries) for item in slices]
    return VisionBatch(
        pixels=torch.from_numpy(pixels),
        position_ids=_joined(ids, torch.int64),
        coordinates=_joined(coordinates, torch.int64),
        cu_seqlens=_cumulative(sizes),
        max_seqlen=max(sizes),
        index=_joined(index, torch.int64),
        grids=grids,
    )


def _audio(clips: list[_Clip], media: MediaConfig) -> AudioBatch:
    mels = [item.mel for item in clips] or [np.zeros((media.audio.mel_bins, 4), dtype=np.float32)]
    stride = 2 if media.audio.pool else 1
    frames = [mel.shape[1] // 2 for mel in mels]
    tokens = [item.tokens for item in clips] or [2 // stride]
    gap_after = np.zeros((media.audio.mel_bins, GAP_FRAMES), dtype=np.float32)
    firsts = np.cumsum([0, *frames[:-1]])
    # The strided convolution halves the gap too: one output a clip is not kept.
    kept = [first + clip + np.arange(count) for clip, (first, count) in enumerate(zip(firsts, frames))]
    gap = [np.arange(2 * count + GAP_FRAMES) >= 2 * count for count in frames]
    starts = np.array([item.start for item in clips], dtype=np.int64)
    counts = np.array([item.tokens for item in clips], dtype=np.int64)
    return AudioBatch(
        mel=torch.from_numpy(np.concatenate([part for mel in mels for part in (mel, gap_after)], axis=1)),
        gap=_joined(gap, torch.bool),
        keep=_joined(kept, torch.int64),
        position_ids=_joined([np.arange(count) for count in frames], torch.int64),
        cu_seqlens=_cumulative(frames),
        max_seqlen=max(frames),
        pool=_joined([f + stride * np.arange(count) for f, count in zip(firsts, tokens)], torch.int64),
        index=_joined([start + 1 + np.arange(n) for start, n in zip(starts, counts)], torch.int64),
        bos_index=torch.from_numpy(starts),
        eos_index=torch.from_numpy(starts + 1 + counts),
    )


def _cumulative(sizes: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32))


def _joined(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    if not parts:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.concatenate(parts)).to(dtype)
