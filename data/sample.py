"""What flows from a record to the model. The legend of shape letters is used everywhere:

B  rows (packs) of a micro-batch         L  tokens of a row (`data.pack.length`)
T  B * L, the rows laid end to end       S  supervised positions of a micro-batch
N  media items (slices or clips)         P  patches of all slices, concatenated
F  log-mel frames, concatenated          Q  tokens a slice becomes (queries)
D  width of the language model           V  vocabulary
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a position that carries no loss (PyTorch's convention)."""


class SampleError(ValueError):
    """Bad data of one sample. `cause` is a short stable word for the ledger, such as `image_corrupt`."""

    def __init__(self, message: str, *, cause: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return _rebuild_sample_error, (str(self), self.cause)


def _rebuild_sample_error(message: str, cause: str) -> SampleError:
    return SampleError(message, cause=cause)


@dataclass(slots=True)
class Part:
    """A piece of a message: text, or the name of a picture or clip in `Sample.media`."""

    kind: Literal["text", "image", "audio"]
    text: str = ""
    media: str = ""


@dataclass(slots=True)
class Message:
    """One turn. Role `document` is plain text outside any conversation: all of it is supervised."""

    role: Literal["system", "user", "assistant", "document"]
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class MediaSize:
    """What the index knows of a picture (pixels, after EXIF rotation) or clip (samples at 16 kHz)."""

    kind: Literal["image", "audio"]
    width: int = 0
    height: int = 0
    num_samples: int = 0


@dataclass(slots=True)
class Sample:
    """One record, media still encoded bytes (JPEG, WAV, ...)."""

    key: str
    messages: list[Message]
    media: dict[str, bytes] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    origin: str = ""


def modality_of(kinds) -> str:
    """Returns the modality name of a set of part kinds."""
    found = set(kinds)
    return "+".join(kind for kind in ("image", "audio") if kind in found) or "text"


@dataclass(slots=True)
class EncodedSample:
    """A sample as tokens and media arrays, ready to be packed.

    Shapes: input_ids, labels int32 [tokens]; labels equal the token itself where it is supervised,
    else `IGNORE` (not shifted). slices: uint8 [patches, 3 * patch_pixels^2] each, channel-major
    like a convolution weight, with grids (rows, columns). slice_starts: first of the Q placeholder
    tokens of each slice. clips: float32 [mel_bins, 2 * frames] each; clip_starts: position of the
    bos token of each clip, whose span is bos, tokens, eos.
    """

    key: str
    source: str
    modality: str
    input_ids: np.ndarray
    labels: np.ndarray
    slices: list[np.ndarray] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    slice_starts: list[int] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)
    clip_tokens: list[int] = field(default_factory=list)
    clip_starts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample is and how long it is: all the planner ever handles.

    `length` is tokens in the row (after truncation). `cost` is any additive measure of work.
    """

    source: str
    shard: int
    row: int
    length: int
    cost: float = 0.0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples that share one row. Their lengths add up to at most `data.pack.length`."""

    refs: tuple[SampleRef, ...]

    @property
    def length(self) -> int:
        """Tokens in use."""
        return sum(ref.length for ref in self.refs)

    @property
    def cost(self) -> float:
        """Work of all samples."""
        return sum(ref.cost for ref in self.refs)


@dataclass(slots=True)
class Dropped:
    """A sample that was dropped in its place, or quarantined by the index: one ledger entry."""

    source: str
    shard: str
    key: str
    cause: str
    message: str


@dataclass(slots=True)
class SampleInfo:
    """What is kept of a delivered sample beside its tensors; `tokens` and `supervised` are counts."""

    key: str
    source: str
    modality: str
    tokens: int
    supervised: int


@dataclass(slots=True)
class VisionBatch:
    """All slices of a micro-batch, concatenated.

    Shapes: pixels uint8 [P, 3 * patch_pixels^2]; position_ids int64 [P]; coordinates int64 [P, 2]
    (row, column of the patch in its slice); cu_seqlens int32 [N + 1]; index int64 [N * Q], places
    in the T tokens of the micro-batch.
    """

    pixels: torch.Tensor
    position_ids: torch.Tensor
    coordinates: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    index: torch.Tensor
    grids: list[tuple[int, int]]


@dataclass(slots=True)
class AudioBatch:
    """All clips of a micro-batch, concatenated along time with two zero frames after every clip.

    Shapes: mel float32 [mel_bins, F], F = sum(2 * frames_i + 2); gap bool [F], True on the zero
    frames; keep int64 [sum frames], which outputs of the strided convolution are real; position_ids
    int64 [sum frames]; cu_seqlens int32 [N + 1] over those; pool int64 [sum tokens], first of the
    two frames that each token averages (of the kept ones; the frame itself without pool);
    index int64 [sum tokens], bos_index and eos_index int64 [N], places in the T tokens.
    """

    mel: torch.Tensor
    gap: torch.Tensor
    keep: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    pool: torch.Tensor
    index: torch.Tensor
    bos_index: torch.Tensor
    eos_index: torch.Tensor


@dataclass(slots=True)
class Batch:
    """One micro-batch of B packs, every index computed on the CPU.

    Shapes: input_ids, position_ids int64 [B, L]; cu_seqlens int32 [segments + 1] over T = B * L,
    padding tails being segments of their own; supervised int64 [S], places in T whose *next* token
    carries loss; targets int64 [S], that token; weights float32 [S], its share before division by
    the global sum; sample int64 [S], which entry of `samples` it belongs to.
    `vision` and `audio` are never None: without media they hold one blank item and an empty index,
    because every rank must call every encoder in every step.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    supervised: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sample: torch.Tensor
    vision: VisionBatch
    audio: AudioBatch
    samples: list[SampleInfo]
    dropped: list[Dropped]

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with every tensor on `device`, copied without blocking."""
        return move(self, device)


def move(item, device):
    """Returns a copy of a batch dataclass with its tensors, and those of its parts, on `device`."""
    values = {}
    for entry in dataclasses.fields(item):
        value = getattr(item, entry.name)
        if dataclasses.is_dataclass(value):
            value = move(value, device)
        elif hasattr(value, "to"):
            value = value.to(device, non_blocking=True)
        values[entry.name] = value
    return type(item)(**values)
