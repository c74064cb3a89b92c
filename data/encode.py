"""From a `Sample` to an `EncodedSample`: slicing, log-mel and chat template in one place.

`Encoder.lay_out` works from sizes alone, for counting; `Encoder.encode`, in the workers, lays out
too, and then decodes what is left, which must have the promised sizes: so they cannot differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from PIL import Image

from data.config import DataConfig, Oversize
from data.geometry import Clip, MediaConfig, Slicing, cut_audio, slice_image
from data.media import decode_audio, decode_image
from data.mel import log_mel
from data.sample import EncodedSample, MediaSize, Sample, SampleError, modality_of
from data.template import (
    AudioSpan,
    ImageSpan,
    Rendered,
    before_last_answer,
    render,
    through_last_answer,
    truncate,
)
from data.tokenizer import TextTokenizer

LAYOUT_VERSION = 2
"""Part of the fingerprint. Raise it when the same input comes to give other tokens."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a sample asks of a row and of the encoders, after truncation.

    `supervised` tokens carry loss, `frames` are encoder frames (50 a second).
    """

    length: int
    supervised: int
    slices: int
    patches: int
    frames: int
    modality: str


@dataclass(slots=True)
class Layout:
    """A sample as tokens, and how each of its pictures and recordings is cut, by name."""

    rendered: Rendered
    slicings: dict[str, Slicing] = field(default_factory=dict)
    clips: dict[str, list[Clip]] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """Returns the counts of what is left of the sample."""
        spans = self.rendered.spans
        slicings = [self.slicings[span.media] for span in spans if span.kind == "image"]
        clips = [clip for span in spans if span.kind == "audio" for clip in self.clips[span.media]]
        return Counts(
            length=len(self.rendered.input_ids),
            supervised=self.rendered.num_supervised,
            slices=sum(slicing.num_slices for slicing in slicings),
            patches=sum(slicing.num_patches for slicing in slicings),
            frames=sum(clip.frames for clip in clips),
            modality=modality_of(span.kind for span in spans),
        )


class Encoder:
    """Encodes samples under one configuration. Picklable, for spawned workers."""

    def __init__(self, config: DataConfig, media: MediaConfig, tokenizer: TextTokenizer):
        self.config = config
        self.media = media
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides a sample's tokens: the key of cached token counts."""
        parts = {
            "layout": LAYOUT_VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "template": asdict(self.config.template),
            "media": asdict(self.media),
            "length": self.config.pack.length,
            "oversize": self.config.pack.oversize,
            "limits": [self.config.limits.parts, self.config.limits.text_bytes],
        }
        text = json.dumps(parts, sort_keys=True, default=lambda choice: choice.value)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, sample: Sample, source: str, sizes: dict[str, MediaSize]) -> EncodedSample:
        """Returns the sample as tokens, patches and mel frames; what truncation cut is not decoded.

        Raises:
            SampleError: the sample cannot be used, or a medium has another size than in `sizes`.
        """
        return self.fill(self.lay_out(sample, sizes), sample, source, sizes)

    def fill(self, layout: Layout, sample: Sample, source: str, sizes: dict[str, MediaSize]) -> EncodedSample:
        """Returns the sample as it was laid out, its media decoded.

        Raises:
            SampleError: a medium is missing, cannot be used, or has another size than in `sizes`.
        """
        _check_media(sample, sample.media, self.config.limits.parts)
        encoded = EncodedSample(
            sample.key,
            source,
            layout.counts.modality,
            layout.rendered.input_ids,
            layout.rendered.labels,
            slice_starts=layout.rendered.slice_starts,
            clip_starts=layout.rendered.clip_starts,
        )
        for span in layout.rendered.spans:
            data, size = sample.media[span.media], sizes[span.media]
            if span.kind == "image":
                self._add_image(encoded, data, size, layout.slicings[span.media])
            else:
                self._add_audio(encoded, data, size, layout.clips[span.media])
        return encoded

    def lay_out(self, sample: Sample, sizes: dict[str, MediaSize]) -> Layout:
        """Returns the tokens of a sample and how its media are cut, from their sizes.

        Raises:
            SampleError: the sample cannot be used, or is longer than a row and not to be truncated.
        """
        layout = self._render(sample, sizes)
        layout.rendered = self._fit(layout.rendered)
        return layout

    def lay_out_prompt(self, sample: Sample, sizes: dict[str, MediaSize]) -> Layout:
        """Returns what stands before the sample's last answer: the next token would be its first.

        Raises:
            SampleError: the sample cannot be used, has no answer, or is longer than a row until there.
        """
        until = replace(sample, messages=through_last_answer(sample.messages))
        layout = self._render(until, sizes)
        layout.rendered = before_last_answer(layout.rendered)
        if len(layout.rendered.input_ids) > self.config.pack.length:
            raise _oversize(len(layout.rendered.input_ids), self.config.pack.length)
        return layout

    def _render(self, sample: Sample, sizes: dict[str, MediaSize]) -> Layout:
        _check_media(sample, sizes, self.config.limits.parts)
        _check_text(sample, self.config.limits.text_bytes)
        slicings = {
            name: slice_image(sizes[name].width, sizes[name].height, self.media.image)
            for name in _names(sample, "image")
        }
        clips = {
            name: cut_audio(sizes[name].num_samples, self.media.audio) for name in _names(sample, "audio")
        }
        queries = self.media.image.queries
        spans: dict[str, ImageSpan | AudioSpan] = {
            name: ImageSpan(slicing.grid, queries) for name, slicing in slicings.items()
        }
        spans |= {name: AudioSpan(tuple(clip.span for clip in cut)) for name, cut in clips.items()}
        rendered = render(sample.messages, spans, self.config.template, self.tokenizer)
        return Layout(rendered, slicings, clips)

    def _fit(self, rendered: Rendered) -> Rendered:
        if not rendered.num_supervised:
            raise SampleError(
                "no token carries loss. Give it an assistant message or a document text",
                cause="no_supervised",
            )
        pack = self.config.pack
        if len(rendered.input_ids) <= pack.length or pack.oversize is Oversize.truncate:
            return truncate(rendered, pack.length)
        raise _oversize(len(rendered.input_ids), pack.length)

    def _add_image(self, encoded: EncodedSample, data: bytes, size: MediaSize, slicing: Slicing) -> None:
        image = decode_image(data, self.config.limits)
        _check_size(MediaSize("image", *image.size), size)
        encoded.slices += cut_image(image, slicing)
        encoded.grids += slicing.patch_grids

    def _add_audio(self, encoded: EncodedSample, data: bytes, size: MediaSize, clips: list[Clip]) -> None:
        waveform = decode_audio(data, self.config.limits)
        _check_size(MediaSize("audio", num_samples=len(waveform)), size)
        for clip in clips:
            window = waveform[clip.start : clip.stop]
            encoded.clips.append(log_mel(window, self.media.audio, clip.mel_frames))
            encoded.clip_tokens.append(clip.tokens)


def _oversize(length: int, most: int) -> SampleError:
    return SampleError(
        f"{length} tokens, longer than data.pack.length={most}. Shorten it or raise data.pack.length",
        cause="oversize",
    )


def _check_size(found: MediaSize, promised: MediaSize) -> None:
    if found != promised:
        raise SampleError(
            f"its media changed: {found}, but {promised} was indexed. Index the folder again",
            cause="length_changed",
        )


def _names(sample: Sample, kind: str) -> list[str]:
    """Returns the names of the sample's media of one kind, in order, each once."""
    parts = (part for message in sample.messages for part in message.parts)
    return list(dict.fromkeys(part.media for part in parts if part.kind == kind))


def _check_media(sample: Sample, known, most: int) -> None:
    count = sum(len(message.parts) for message in sample.messages)
    if count > most:
        raise SampleError(f"{count} parts, more than data.limits.parts={most}. Split it", cause="parts")
    for name in _names(sample, "image") + _names(sample, "audio"):
        if name not in known:
            raise SampleError(f"media {name!r} is named but not there. Pack it again", cause="media_missing")


def _check_text(sample: Sample, most: int) -> None:
    count = sum(len(part.text.encode()) for message in sample.messages for part in message.parts)
    if count > most:
        raise SampleError(
            f"{count} bytes of text, more than data.limits.text_bytes={most}. Split it",
            cause="text_too_large",
        )


def cut_image(image: Image.Image, slicing: Slicing) -> list[np.ndarray]:
    """Returns the patches of every slice of an RGB picture: the overview, then the tiles row-major.

    Shapes: uint8 [patches, 3 * patch_pixels^2] each.
    """
    patch = slicing.patch_pixels
    slices = [patchify(np.asarray(image.resize(slicing.overview, Image.Resampling.BICUBIC)), patch)]
    if slicing.grid is None or slicing.tile is None:
        return slices
    (columns, rows), (width, height) = slicing.grid, slicing.tile
    whole = np.asarray(image.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
    for row in range(rows):
        for column in range(columns):
            tile = whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
            slices.append(patchify(tile, patch))
    return slices


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Returns the patches of a picture row-major, each channel-major like a convolution's weight.

    Shapes: pixels uint8 [height, width, 3]; result uint8 [patches, 3 * patch^2].
    """
    height, width, channels = pixels.shape
    blocks = pixels.reshape(height // patch, patch, width // patch, patch, channels)
    return blocks.transpose(0, 2, 4, 1, 3).reshape(-1, channels * patch * patch)
