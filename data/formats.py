"""Records of public formats -> messages: one function a format, listed in `FORMATS`.

A function takes a record (a parsed JSON object) and a `MediaSource`, which knows where the record's
pictures and clips are: files of a folder, or members of a tar shard. Text is carried over as it is;
strings that look like special tokens are the tokenizer's affair.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

from data.sample import Message, Part, Sample, SampleError

MediaKind = Literal["image", "audio"]
Role = Literal["system", "user", "assistant", "document"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "document": "document",
}
"""Names of roles in records, and ours."""

EXTENSIONS = {
    "jpeg": "jpg",
    "mpeg": "mp3",
    "mp4": "m4a",
    "x-m4a": "m4a",
    "x-wav": "wav",
    "wave": "wav",
    "x-flac": "flac",
}
"""Media subtypes and file endings that differ from the ending used in shards."""


class MediaSource:
    """Finds the media of one sample. Bytes that a record carries itself are kept in `inlined`."""

    def __init__(self) -> None:
        self.inlined: dict[str, bytes] = {}

    def part(self, kind: MediaKind, reference: str) -> Part:
        """Returns the part for a picture or clip that the record refers to.

        Raises:
            SampleError: there is no such media.
        """
        raise NotImplementedError

    def inline(self, kind: MediaKind, data: bytes, extension: str) -> Part:
        """Returns the part for media whose bytes stand in the record itself."""
        name = f"inline{len(self.inlined)}.{extension}"
        self.inlined[name] = data
        return Part(kind, media=name)


Reader = Callable[[dict, MediaSource], list[Message]]


def megrez(record: dict, media: MediaSource) -> list[Message]:
    """Returns the messages of a Megrez-Omni record: `conversations` of role and content.

    Content is a string, or text, image and audio; pictures come first, then clips, then the text.
    """
    messages = []
    for turn in _turns(record, "conversations"):
        content = turn.get("content")
        fields = {"text": content} if isinstance(content, str) else content
        if not isinstance(fields, dict):
            raise _malformed(f"content is {_kind(content)}, not a string or an object")
        unknown = sorted(set(fields) - {"text", "image", "audio"})
        if unknown:
            raise _malformed(f"content has a field {unknown[0]!r}. Known: text, image, audio")
        parts = [media.part("image", path) for path in _references(fields.get("image"), "image")]
        parts += [media.part("audio", path) for path in _references(fields.get("audio"), "audio")]
        messages.append(Message(_role(turn.get("role")), parts + _text_parts(fields.get("text"))))
    return messages


def llava(record: dict, media: MediaSource) -> list[Message]:
    """Returns the messages of a LLaVA or ShareGPT record, whose text marks media by `<image>`, `<audio>`.

    Raises:
        SampleError: there are not as many marks as media (cause `marks_mismatch`).
    """
    turns: list[tuple[Role, Any]] = [
        (_role(turn.get("from")), turn.get("value")) for turn in _turns(record, "conversations")
    ]
    values = [value for _, value in turns if isinstance(value, str)]
    if len(values) < len(turns):
        raise _malformed("value of a turn is not a string")
    waiting: dict[str, Iterator[str]] = {}
    for kind in ("image", "audio"):
        listed = record.get(kind, record.get(f"{kind}s"))
        references = _references(listed, kind)
        num_marks = sum(value.count(f"<{kind}>") for value in values)
        if num_marks != len(references):
            raise SampleError(
                f"{_count(num_marks, f'{kind} mark')} but {_count(len(references), kind)}",
                cause="marks_mismatch",
            )
        waiting[kind] = iter(references)
    return [
        Message(role, list(_marked_parts(value, waiting, media))) for (role, _), value in zip(turns, values)
    ]


def _marked_parts(value: str, waiting: dict[str, Iterator[str]], media: MediaSource) -> Iterable[Part]:
    pieces = re.split(r"<(image|audio)>", value)
    for number, piece in enumerate(pieces):
        if number % 2:
            kind = cast(MediaKind, piece)
            yield media.part(kind, next(waiting[kind]))
        elif text := (piece.strip() if len(pieces) > 1 else piece):
            # The line break that usually follows a mark belongs to the mark.
            yield Part("text", text)


def openai(record: dict, media: MediaSource) -> list[Message]:
    """Returns the messages of a chat record: content is a string or a list of typed parts.

    Media are paths or `data:` URLs in `image_url` and `audio_url`, base64 in `input_audio`,
    or plain references in `image` and `audio`, as in our own shards.
    """
    messages = []
    for turn in _turns(record, "messages"):
        content = turn.get("content")
        if isinstance(content, str):
            parts = _text_parts(content)
        elif isinstance(content, list):
            parts = [part for item in content for part in _typed_parts(item, media)]
        else:
            raise _malformed(f"content is {_kind(content)}, not a string or a list")
        messages.append(Message(_role(turn.get("role")), parts))
    return messages


def _typed_parts(item: Any, media: MediaSource) -> list[Part]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return _text_parts(item.get("text"))
    if kind in ("image", "audio"):
        return [_referred(kind, item.get(kind), media)]
    if kind in ("image_url", "audio_url"):
        value = item.get(kind)
        return [
            _referred(
                "image" if kind == "image_url" else "audio",
                value.get("url") if isinstance(value, dict) else value,
                media,
            )
        ]
    if kind == "input_audio":
        value = item.get(kind)
        if not isinstance(value, dict):
            raise _malformed(f"input_audio is {_kind(value)}, not an object")
        if "data" not in value:
            return [_referred("audio", value.get("url"), media)]
        if str(value["data"]).startswith("data:"):
            return [_referred("audio", value["data"], media)]
        return [media.inline("audio", _base64(value["data"]), extension_of(value.get("format")))]
    raise _malformed(
        f"a part has type {kind!r}. Known: text, image_url, audio_url, input_audio, image, audio"
    )


def _referred(kind: MediaKind, reference: Any, media: MediaSource) -> Part:
    if not isinstance(reference, str) or not reference:
        raise _malformed(f"the {kind} reference is {_kind(reference)}, not a path or URL")
    if re.match(r"https?://", reference, re.IGNORECASE):
        raise SampleError(
            f"{kind} {reference[:80]!r} is on the web. Download it and refer to the file",
            cause="media_missing",
        )
    if not reference.startswith("data:"):
        return media.part(kind, reference)
    header, comma, payload = reference.partition(",")
    if not comma or not header.endswith(";base64"):
        raise _malformed(f"the data: URL of the {kind} is not base64")
    subtype = header[len("data:") :].split(";")[0].rpartition("/")[2]
    return media.inline(kind, _base64(payload), extension_of(subtype))


def caption(record: dict, media: MediaSource) -> list[Message]:
    """Returns a picture, an optional `prompt`, and its `caption` (or `text`) as the answer."""
    answer = _first(record, "caption", "text")
    parts = [media.part("image", path) for path in _references(record.get("image"), "image")]
    if not parts:
        raise _malformed("there is no image")
    question = Message("user", parts + _text_parts(record.get("prompt")))
    return [question, Message("assistant", _text_parts(answer))]


def asr(record: dict, media: MediaSource) -> list[Message]:
    """Returns a clip, an instruction to transcribe it, and its `text` (or `transcript`) as the answer.

    Source: ASR data rewritten as instructions, arXiv 2502.15803.
    """
    answer = _first(record, "text", "transcript")
    parts = [media.part("audio", path) for path in _references(record.get("audio"), "audio")]
    if not parts:
        raise _malformed("there is no audio")
    chinese = str(record.get("language") or "").lower().startswith(("zh", "cmn", "chinese"))
    instruction = "请转写这段音频。" if chinese else "Transcribe this clip."
    return [
        Message("user", [*parts, Part("text", instruction)]),
        Message("assistant", _text_parts(answer)),
    ]


def text(record: dict, media: MediaSource) -> list[Message]:
    """Returns one plain document from `text`."""
    return [Message("document", _text_parts(_first(record, "text")))]


FORMATS: dict[str, Reader] = {
    "megrez": megrez,
    "llava": llava,
    "openai": openai,
    "caption": caption,
    "asr": asr,
    "text": text,
}

DEFAULT_TAGS: dict[str, tuple[str, ...]] = {"caption": ("caption",), "asr": ("asr",), "text": ("text",)}


def read_record(format: str, record: Any, media: MediaSource) -> list[Message]:
    """Returns the checked messages of a record.

    Raises:
        SampleError: the record is malformed, or there is nothing to learn in it (`no_assistant`).
    """
    if not isinstance(record, dict):
        raise _malformed(f"the record is {_kind(record)}, not an object")
    messages = FORMATS[format](record, media)
    # An empty system turn is common in ShareGPT files and means that there is none.
    messages = [message for message in messages if message.parts or message.role != "system"]
    check_messages(messages)
    return messages


def check_messages(messages: list[Message]) -> None:
    """Checks that every turn says something, that text is valid and that there is an answer to learn."""
    for number, message in enumerate(messages):
        if not message.parts:
            raise _malformed(f"turn {number} ({message.role}) is empty")
        for part in message.parts:
            if part.kind != "text" and message.role != "user":
                raise _malformed(f"turn {number} ({message.role}) holds {part.kind}. Only user turns may")
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise _malformed(f"turn {number} is not valid Unicode ({error.reason})") from error
    if not any(message.role in ("assistant", "document") for message in messages):
        raise SampleError("there is no assistant turn, so nothing to learn", cause="no_assistant")


def make_sample(
    key: str, messages: list[Message], media: MediaSource, tags: tuple[str, ...], origin: str
) -> Sample:
    """Returns a sample that holds the media found so far."""
    return Sample(key, messages, dict(media.inlined), tags, origin)


def extension_of(name: Any) -> str:
    """Returns the file ending (no dot) that media of this path, ending or subtype have in a shard."""
    ending = re.split(r"[./]", str(name or "").lower())[-1]
    ending = EXTENSIONS.get(ending, ending)
    return ending if re.fullmatch(r"[a-z0-9]{1,8}", ending) else "bin"


def _turns(record: dict, name: str) -> list[dict]:
    turns = record.get(name)
    if not isinstance(turns, list) or not turns:
        raise _malformed(f"{name} is {_kind(turns)}, not a list of turns")
    for turn in turns:
        if not isinstance(turn, dict):
            raise _malformed(f"a turn is {_kind(turn)}, not an object")
    return turns


def _role(name: Any) -> Role:
    if not isinstance(name, str) or name not in ROLES:
        raise _malformed(f"role {name!r} is not known. Known: {', '.join(ROLES)}")
    return ROLES[name]


def _references(value: Any, kind: str) -> list[str]:
    listed = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for reference in listed:
        if not isinstance(reference, str) or not reference:
            raise _malformed(f"the {kind} reference is {_kind(reference)}, not a path")
    return listed


def _text_parts(value: Any) -> list[Part]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise _malformed(f"text is {_kind(value)}, not a string")
    return [Part("text", value)]


def _first(record: dict, *names: str) -> str:
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise _malformed(f"{' or '.join(names)} is {_kind(value)}, not a text with something in it")
    return value


def _base64(payload: Any) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _malformed(f"media is not valid base64 ({error})") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "missing"}
    return "empty" if value in ("", [], {}) else names.get(type(value), "a number")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _malformed(problem: str) -> SampleError:
    return SampleError(problem, cause="record_malformed")
