"""The chat template: messages and media spans in, token ids and their loss mask out.

Source: the released model's template (arXiv 2502.15803 and its public inference code): no BOS, no
newline between turns, in a message first the pictures, then the recordings, then the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data.config import RELEASED_SYSTEM, AudioText, TemplateConfig
from data.sample import IGNORE, Message, Part, SampleError
from data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Room that a picture takes: an overview and `grid` (columns, rows) tiles of `queries` tokens each."""

    grid: tuple[int, int] | None
    queries: int

    @property
    def items(self) -> int:
        """Slices."""
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """Room that a recording takes: tokens of every clip, its bos and eos included."""

    clips: tuple[int, ...]

    @property
    def items(self) -> int:
        """Clips."""
        return len(self.clips)


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where a picture or recording stands: tokens [start, stop), start and end marks included.

    `media` is its name in the sample, `items` the number of its slices or clips.
    """

    kind: Literal["image", "audio"]
    media: str
    start: int
    stop: int
    items: int


@dataclass(slots=True)
class Rendered:
    """A conversation as tokens.

    Shapes: input_ids, labels int32 [tokens]; labels equal the token where it is supervised, else
    `IGNORE` (not shifted). slice_starts: first placeholder of every slice. clip_starts: position of
    the bos token of every clip.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    slice_starts: list[int]
    clip_starts: list[int]
    spans: list[MediaSpan]

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss. Nothing predicts the first token, so it never does."""
        return int((self.labels[1:] != IGNORE).sum())


def render(
    messages: list[Message],
    spans: dict[str, ImageSpan | AudioSpan],
    config: TemplateConfig,
    tokenizer: TextTokenizer,
) -> Rendered:
    """Returns the tokens of `messages`, with loss on every answer through its `<|turn_end|>`.

    `spans` holds the room of every picture and recording by its name. A message of role `document`
    stands outside the chat: its parts in their order, then `<|eos|>`, with loss on all but media.
    """
    writer = _Writer(tokenizer, config)
    system = RELEASED_SYSTEM if config.system is None else config.system
    if system and messages and messages[0].role not in ("system", "document"):
        messages = [Message("system", [Part("text", text=system)]), *messages]
    for message in messages:
        if message.role == "document":
            _write_document(writer, message, spans)
        else:
            _write_turn(writer, message, spans, config)
    return writer.finish()


def _write_document(writer: _Writer, message: Message, spans: dict[str, ImageSpan | AudioSpan]) -> None:
    for part in message.parts:
        if part.kind == "text":
            writer.text(part.text, supervised=True)
        else:
            writer.media(part.media, spans[part.media])
    writer.mark("<|eos|>", supervised=True)


def _write_turn(
    writer: _Writer, message: Message, spans: dict[str, ImageSpan | AudioSpan], config: TemplateConfig
) -> None:
    writer.mark("<|role_start|>")
    writer.text(message.role)
    writer.mark("<|role_end|>")
    for kind in ("image", "audio"):
        for part in message.parts:
            if part.kind == kind:
                writer.media(part.media, spans[part.media])
    answer = message.role == "assistant"
    heard = any(part.kind == "audio" for part in message.parts)
    if answer or not heard or config.audio_text is AudioText.append:
        writer.text(_joined_text(message), supervised=answer)
    writer.mark("<|turn_end|>", supervised=answer)


def _joined_text(message: Message) -> str:
    """Returns the text of a turn; where a picture or recording stood in it, there is a newline."""
    text, broken = "", False
    for part in message.parts:
        if part.kind != "text":
            broken = True
        elif part.text:
            text += "\n" * (broken and bool(text)) + part.text
            broken = False
    return text


@dataclass(slots=True)
class _Writer:
    """Gathers tokens. Text waits until its neighbour is known, so that joined pieces tokenise as one."""

    tokenizer: TextTokenizer
    config: TemplateConfig
    ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    slice_starts: list[int] = field(default_factory=list)
    clip_starts: list[int] = field(default_factory=list)
    spans: list[MediaSpan] = field(default_factory=list)
    recordings: int = 0
    waiting: str = ""
    waiting_supervised: bool = False

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self.waiting_supervised:
            self._flush()
            self.waiting_supervised = supervised
        self.waiting += text

    def mark(self, name: str, supervised: bool = False) -> None:
        self._flush()
        self._put([self.tokenizer.special(name)], supervised)

    def media(self, name: str, span: ImageSpan | AudioSpan) -> None:
        if isinstance(span, AudioSpan):
            self.recordings += 1
            self.text(f"Audio {self.recordings}: ")
        self._flush()
        start = len(self.ids)
        if isinstance(span, ImageSpan):
            self._image(span)
        else:
            self._audio(span)
        kind = "image" if isinstance(span, ImageSpan) else "audio"
        self.spans.append(MediaSpan(kind, name, start, len(self.ids), span.items))
        self.text("\n")

    def _image(self, span: ImageSpan) -> None:
        self._slice(span.queries)
        if span.grid is None:
            return
        columns, rows = span.grid
        if self.config.slice_start:
            self.mark(self.config.slice_start)
        for row in range(rows):
            if row:
                self.text("\n")
            for _ in range(columns):
                self._slice(span.queries)
        if self.config.slice_end:
            self.mark(self.config.slice_end)

    def _slice(self, queries: int) -> None:
        self.mark("<|image_start|>")
        self.slice_starts.append(len(self.ids))
        self._placeholders(queries)
        self.mark("<|image_end|>")

    def _audio(self, span: AudioSpan) -> None:
        self.mark("<|audio_start|>")
        for tokens in span.clips:
            self.clip_starts.append(len(self.ids))
            self._placeholders(tokens)
        self.mark("<|audio_end|>")

    def _placeholders(self, count: int) -> None:
        self._put([self.tokenizer.special("<|unk|>")] * count, False)

    def _flush(self) -> None:
        if self.waiting:
            self._put(self.tokenizer.encode(self.waiting), self.waiting_supervised)
            self.waiting = ""

    def _put(self, ids: list[int], supervised: bool) -> None:
        self.ids += ids
        self.supervised += [supervised] * len(ids)

    def finish(self) -> Rendered:
        self._flush()
        ids = np.asarray(self.ids, dtype=np.int32)
        labels = np.where(np.asarray(self.supervised, dtype=bool), ids, np.int32(IGNORE))
        return Rendered(ids, labels, self.slice_starts, self.clip_starts, self.spans)


def truncate(rendered: Rendered, length: int) -> Rendered:
    """Returns `rendered` cut to at most `length` tokens, ending with its last supervised token.

    What follows that token would be work without loss. Media are never supervised, so the cut
    never falls inside a media span, and those behind it are gone.

    Raises:
        SampleError: no supervised token is left.
    """
    if len(rendered.input_ids) <= length:
        return rendered
    supervised = np.flatnonzero(rendered.labels[1:length] != IGNORE)
    if not supervised.size:
        raise SampleError(
            f"{len(rendered.input_ids)} tokens, and none of the first {length} carries loss. "
            "Shorten the sample or raise data.pack.length",
            cause="oversize",
        )
    stop = int(supervised[-1]) + 2
    return Rendered(
        rendered.input_ids[:stop],
        rendered.labels[:stop],
        [start for start in rendered.slice_starts if start < stop],
        [start for start in rendered.clip_starts if start < stop],
        [span for span in rendered.spans if span.start < stop],
    )


def through_last_answer(messages: list[Message]) -> list[Message]:
    """Returns the messages up to the last one of the assistant.

    Raises:
        SampleError: there is none.
    """
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if not places:
        raise SampleError("no assistant message, so there is nothing to answer", cause="no_supervised")
    return messages[: places[-1] + 1]


def answer_text(messages: list[Message]) -> str:
    """Returns the text of the last answer, as it is trained."""
    return _joined_text(through_last_answer(messages)[-1])


def before_last_answer(rendered: Rendered) -> Rendered:
    """Returns what stands before the last run of supervised tokens, without any label.

    Pictures and recordings of the assistant's own turn stand before its text, so they stay.
    """
    last = np.flatnonzero(rendered.labels != IGNORE)[-1]
    before = np.flatnonzero(rendered.labels[:last] == IGNORE)
    stop = int(before[-1]) + 1
    labels = np.full(stop, IGNORE, dtype=np.int32)
    return Rendered(
        rendered.input_ids[:stop], labels, rendered.slice_starts, rendered.clip_starts, rendered.spans
    )
