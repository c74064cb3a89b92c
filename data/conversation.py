"""A conversation as it grows: questions with pictures and recordings from files, and the answers to them.

What stands in it is a `Sample` like any other, so a question takes the way of a training sample through
limits, decoders, template and encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import LimitsConfig
from data.formats import MediaKind
from data.geometry import MediaConfig, cut_audio, slice_image
from data.media import SAMPLE_RATE_HZ, audio_num_samples, image_size
from data.sample import EncodedSample, MediaSize, Message, Part, Sample, SampleError

if TYPE_CHECKING:
    from data.encode import Encoder  # it imports torch, which attaching a file does without

ADVICE = {
    "image_too_large": "Make it smaller",
    "audio_too_large": "Cut it",
    "audio_too_long": "Cut it",
    "parts": "Begin a new conversation",
}
"""What to do about a cause whose message does not say it."""


class Conversation:
    """Turns and their media. What is attached waits for the next question."""

    def __init__(self, media: MediaConfig, limits: LimitsConfig, most_tokens: int):
        self.config = media
        self.limits = limits
        self.most_tokens = most_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets everything, also what is attached."""
        self.messages: list[Message] = []
        self.attached: list[Part] = []
        self._media: dict[str, bytes] = {}
        self._sizes: dict[str, MediaSize] = {}

    def attach(self, kind: MediaKind, path: Path) -> MediaSize:
        """Reads a picture or recording for the next question, and returns its size.

        Raises:
            ValueError: it cannot be read or used; the conversation is as before.
        """
        with _said_of(f"{kind}={path}"):
            data = _read(path, kind, self.limits)
            size = self._measure(kind, data)
        name = f"{kind}{len(self._media)}"
        self._media[name], self._sizes[name] = data, size
        self.attached.append(Part(kind, media=name))
        return size

    def _measure(self, kind: MediaKind, data: bytes) -> MediaSize:
        if kind == "image":
            width, height = image_size(data, self.limits)
            slice_image(width, height, self.config.image)
            return MediaSize("image", width, height)
        num_samples = audio_num_samples(data, self.limits)
        cut_audio(num_samples, self.config.audio)
        return MediaSize("audio", num_samples=num_samples)

    def ask(self, text: str, encoder: Encoder) -> EncodedSample:
        """Returns all that the model is to answer: what was said, then `text` with what is attached.

        It becomes part of the conversation with its answer (`answered`).

        Raises:
            ValueError: it cannot be used, or is longer than `most_tokens`; what was attached is gone.
        """
        question = Message("user", [*self.attached, *([Part("text", text)] if text else [])])
        self._question, self.attached = question, []
        messages = [*self.messages, question, Message("assistant", [])]
        sample = Sample("question", messages, self._media)
        with _said_of("conversation"):
            layout = encoder.lay_out_prompt(sample, self._sizes)
        length = len(layout.rendered.input_ids)
        if length > self.most_tokens:
            raise ValueError(
                f"conversation={length} tokens: longer than the {self.most_tokens} that the model has "
                "positions for. Ask for less at once, or begin a new one with /clear."
            )
        with _said_of("conversation"):
            return encoder.fill(layout, sample, "conversation", self._sizes)

    def answered(self, text: str) -> None:
        """Adds the last question and its answer to the conversation."""
        self.messages += [self._question, Message("assistant", [Part("text", text)])]


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Raises what is wrong with a file or a question as a ValueError that begins with `where`."""
    try:
        yield
    except SampleError as error:
        text = str(error)
        advice = "" if ". " in text else f". {ADVICE.get(error.cause, 'Use another one')}"
        raise ValueError(f"{where}: {text}{advice}.") from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}). Check the path.") from error
    except MemoryError as error:
        raise ValueError(f"{where}: needs more memory than there is. Use a smaller one.") from error
    except Exception as error:
        # The sample border: whatever a decoder throws at hostile bytes must not end the conversation.
        raise ValueError(f"{where}: {type(error).__name__}: {error}. Use another one.") from error


def _read(path: Path, kind: MediaKind, limits: LimitsConfig) -> bytes:
    if path.is_dir():
        raise SampleError("is a folder. Name a file", cause="media_missing")
    if not path.exists():
        raise SampleError("there is no such file. Check the path", cause="media_missing")
    if not path.is_file():  # reading a pipe or a device might never end
        raise SampleError("is not a plain file. Name one", cause="media_missing")
    most = limits.image_bytes if kind == "image" else limits.audio_bytes
    if path.stat().st_size > most:
        raise SampleError(
            f"has {path.stat().st_size} bytes, more than data.limits.{kind}_bytes={most}",
            cause=f"{kind}_too_large",
        )
    return path.read_bytes()


def describe(size: MediaSize) -> str:
    """Returns what a person calls a picture or recording of this size."""
    if size.kind == "image":
        return f"picture of {size.width}x{size.height} pixels"
    return f"recording of {size.num_samples / SAMPLE_RATE_HZ:.1f} s"
