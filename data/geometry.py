"""How many slices, patches, frames and tokens a picture or a clip becomes.

The only place that knows it: encoders, index, planner and model all ask here.
Nothing in this file touches pixels or waveforms, so it needs neither torch nor PIL.

Source: the Megrez-Omni technical report (arXiv 2502.15803) and the model's public
inference code; the tables in tests/data/test_geometry.py pin the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

import numpy as np

from data.sample import SampleError


class LongAudio(Enum):
    """What happens to audio longer than one encoder window."""

    split = "split"
    truncate = "truncate"
    error = "error"


@dataclass(kw_only=True, slots=True)
class ImageGeometry:
    """Sizes that decide how a picture is cut. `slice_pixels` is a side: a slice has about its square."""

    patch_pixels: int = 14
    slice_pixels: int = 448
    max_slices: int = 9
    queries: int = 64
    table_side: int = 70
    max_side_patches: int = 280

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, each line starting with its own field name."""
        found = [
            f"{name}={getattr(self, name)}: must be at least 1. Use a positive whole number."
            for name in ("patch_pixels", "slice_pixels", "max_slices", "queries", "table_side")
            if getattr(self, name) < 1
        ]
        if self.slice_pixels < self.patch_pixels:
            found.append(
                f"slice_pixels={self.slice_pixels}: smaller than one patch of {self.patch_pixels} pixels. "
                f"Use a multiple of patch_pixels."
            )
        return found


@dataclass(kw_only=True, slots=True)
class AudioGeometry:
    """Sizes of the log-mel front end and of the encoder window behind it."""

    sample_rate_hz: int = 16000
    mel_bins: int = 128
    window_seconds: int = 30
    pool: bool = True
    long_audio: LongAudio = LongAudio.split

    @property
    def window_samples(self) -> int:
        """Samples in one encoder window."""
        return self.sample_rate_hz * self.window_seconds

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, each line starting with its own field name."""
        found = []
        if self.sample_rate_hz != 16000:
            found.append(f"sample_rate_hz={self.sample_rate_hz}: the mel filters are for 16000. Use 16000.")
        if self.mel_bins < 1:
            found.append(f"mel_bins={self.mel_bins}: must be at least 1. Use 128, or 80 for small encoders.")
        if not 1 <= self.window_seconds <= 30:
            found.append(f"window_seconds={self.window_seconds}: must be between 1 and 30. Use 30.")
        return found


@dataclass(kw_only=True, slots=True)
class MediaConfig:
    """Config node `media`: shared by the data side and the model."""

    image: ImageGeometry = field(default_factory=ImageGeometry)
    audio: AudioGeometry = field(default_factory=AudioGeometry)

    def problems(self) -> list[str]:
        """Returns nothing of its own: both parts report for themselves."""
        return []


@dataclass(frozen=True, slots=True)
class Slicing:
    """How one picture is cut. Sizes are (width, height) in pixels; `grid` is (columns, rows)."""

    overview: tuple[int, int]
    grid: tuple[int, int] | None
    tile: tuple[int, int] | None
    patch_pixels: int

    @property
    def num_slices(self) -> int:
        """Overview plus tiles."""
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)

    @property
    def patch_grids(self) -> list[tuple[int, int]]:
        """(rows, columns) in patches of every slice: the overview, then the tiles row-major."""
        sizes = [self.overview]
        if self.grid and self.tile:
            sizes += [self.tile] * (self.grid[0] * self.grid[1])
        return [(height // self.patch_pixels, width // self.patch_pixels) for width, height in sizes]

    @property
    def num_patches(self) -> int:
        """Patches of all slices together."""
        return sum(rows * columns for rows, columns in self.patch_grids)


@lru_cache(maxsize=65536)
def _slice_image(width: int, height: int, patch: int, side: int, most: int) -> Slicing:
    def snap(pixels: float) -> int:
        return max(round(pixels / patch) * patch, patch)

    def fit(w: float, h: float, upscale: bool) -> tuple[int, int]:
        if w * h > side * side or upscale:
            ratio = w / h
            h = int(side / math.sqrt(ratio))
            w = int(h * ratio)
        return snap(w), snap(h)

    multiple = min(math.ceil(width * height / (side * side)), most)
    if multiple <= 1:
        return Slicing(fit(width, height, upscale=True), None, None, patch)
    counts = [c for c in (multiple - 1, multiple, multiple + 1) if c != 1 and c <= most]
    grids = [(x, c // x) for c in counts for x in range(1, c + 1) if c % x == 0]
    log_ratio = math.log(width / height)
    # min() keeps the first of equals, which is the published tie-break.
    grid = min(grids, key=lambda g: abs(log_ratio - math.log(g[0] / g[1])))
    refined = tuple(max(round(size / n) * n, n) for size, n in zip((width, height), grid))
    tile = fit(refined[0] / grid[0], refined[1] / grid[1], upscale=True)
    return Slicing(fit(width, height, upscale=False), grid, tile, patch)


def slice_image(width: int, height: int, geometry: ImageGeometry) -> Slicing:
    """Returns how a picture of `width` x `height` pixels is cut into an overview and tiles.

    Raises:
        SampleError: the picture is so long and thin that a slice side exceeds `max_side_patches`.
    """
    if width < 1 or height < 1:
        raise SampleError(f"picture of {width}x{height} pixels is empty", cause="image_empty")
    slicing = _slice_image(width, height, geometry.patch_pixels, geometry.slice_pixels, geometry.max_slices)
    # The cut rounds sizes down, to nothing for a very wide picture, so its plain ratio counts as well.
    ratio = max(width, height) / min(width, height)
    plain = round(geometry.slice_pixels * math.sqrt(ratio) / geometry.patch_pixels)
    longest = max(plain, *(max(grid) for grid in slicing.patch_grids))
    if longest > geometry.max_side_patches:
        raise SampleError(
            f"picture of {width}x{height} pixels gives a slice of {longest} patches a side, "
            f"more than {geometry.max_side_patches}. Crop it",
            cause="image_aspect",
        )
    return slicing


@lru_cache(maxsize=4096)
def position_ids(rows: int, columns: int, table_side: int) -> np.ndarray:
    """Returns ids into a `table_side`^2 position table for a slice of `rows` x `columns` patches.

    Fractional coordinates i/n are bucketed per axis in the released model's own float32 rounding:
    an integer floor would differ from it at n = 25, 49, 50, 55 and 58.

    Shapes: int64 [rows * columns], row-major.
    """
    return (_buckets(rows, table_side)[:, None] * table_side + _buckets(columns, table_side)).reshape(-1)


def _buckets(count: int, table_side: int) -> np.ndarray:
    # The released model takes its coordinates from `torch.arange(0, 1, float32(1/n))`, which rounds
    # the first of every eight values to float32 and adds the rest in double. That decides on which
    # side of a boundary n = 49 and 58 fall, so it is repeated here.
    step = np.float64(np.float32(1.0 / count))
    index = np.arange(count)
    firsts = (index // 8 * 8 * step).astype(np.float32).astype(np.float64)
    coordinates = (firsts + index % 8 * step).astype(np.float32)
    boundaries = np.arange(1 / table_side, 1.0, 1 / table_side).astype(np.float32)
    return np.searchsorted(boundaries, coordinates, side="right").astype(np.int64)


@dataclass(frozen=True, slots=True)
class Clip:
    """One encoder window of a recording: samples [start, stop) of the 16 kHz waveform.

    `frames` are encoder frames (after the stride of 2), `tokens` what is left after the pool;
    the language model sees `span` = bos + tokens + eos.
    """

    start: int
    stop: int
    frames: int
    tokens: int

    @property
    def mel_frames(self) -> int:
        """Log-mel columns that reach the encoder (twice its frames)."""
        return 2 * self.frames

    @property
    def span(self) -> int:
        """Tokens in the language model, bos and eos included."""
        return self.tokens + 2


def _clip(start: int, stop: int, geometry: AudioGeometry) -> Clip:
    mel_frames = (stop - start) // 160
    frames = (mel_frames - 1) // 2 + 1
    tokens = (frames - 2) // 2 + 1 if geometry.pool else frames
    return Clip(start, stop, frames, tokens)


def cut_audio(num_samples: int, geometry: AudioGeometry) -> list[Clip]:
    """Returns the encoder windows of a recording of `num_samples` at 16 kHz.

    A last window too short for one token is left out.

    Raises:
        SampleError: nothing is left, or the recording is longer than a window and
            `long_audio` is `error`.
    """
    window = geometry.window_samples
    if num_samples > window and geometry.long_audio is LongAudio.error:
        raise SampleError(
            f"clip of {num_samples / geometry.sample_rate_hz:.1f} s is longer than "
            f"{geometry.window_seconds} s and media.audio.long_audio=error. Cut it, or use split or truncate",
            cause="audio_too_long",
        )
    end = min(num_samples, window) if geometry.long_audio is LongAudio.truncate else num_samples
    clips = [_clip(start, min(start + window, end), geometry) for start in range(0, end, window)]
    clips = [clip for clip in clips if clip.tokens > 0]
    if not clips:
        raise SampleError(
            f"clip of {num_samples} samples is too short for one token. Use clips of 0.03 s or more",
            cause="audio_too_short",
        )
    return clips
