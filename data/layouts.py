"""Members of a tar shard <-> sample: our own layout, and the common ones of others.

Our own (`native`): `<key>.json` holds messages, tags and origin; media are `<key>.0.jpg`,
`<key>.1.wav`, ..., referred to by part name ("0.jpg"). The others are the formats of
data/formats.py with members in place of files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data.formats import (
    DEFAULT_TAGS,
    MediaKind,
    MediaSource,
    check_messages,
    make_sample,
    openai,
    read_record,
)
from data.sample import Message, Part, Sample, SampleError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
AUDIO_ENDINGS = ("wav", "flac", "mp3", "ogg", "opus", "m4a")

ReadMember = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record that never became a sample. It keeps its row, so that ledgers show it."""

    key: str
    cause: str
    message: str
    origin: str = ""


class MemberMedia(MediaSource):
    """Media of one sample, as members of its shard."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.names = tuple(names)

    def part(self, kind: MediaKind, reference: str) -> Part:
        """Returns the part for the member of that name; its bytes are left where they are."""
        if reference not in self.names:
            raise SampleError(
                f"{kind} {reference!r} is not a member of the sample. Members: {', '.join(self.names)}",
                cause="media_missing",
            )
        return Part(kind, media=reference)


def parse_members(layout: str, key: str, names: Iterable[str], read: ReadMember) -> Sample:
    """Returns the sample of a shard's members without reading any media member.

    Args:
        layout: one of `LAYOUTS`.
        key: the sample's key in the shard.
        names: part names of its members.
        read: returns the bytes of a member.

    Raises:
        SampleError: the members are no sample, or a quarantined one.
    """
    media = MemberMedia(names)
    if layout == "native":
        record = _read_json(media, read)
        tags, origin = _texts(record.get("tags", [])), str(record.get("origin", ""))
        messages = _native(record, media)
        return make_sample(key, messages, media, tags, origin)
    record = LAYOUTS[layout](media, read)
    messages = read_record(layout, record, media)
    return make_sample(key, messages, media, DEFAULT_TAGS.get(layout, ()), "")


def native_members(item: Sample | Quarantined) -> dict[str, bytes]:
    """Returns the members, by part name, that hold a sample or quarantined record in our own layout."""
    if isinstance(item, Quarantined):
        error = {"cause": item.cause, "message": item.message}
        return {"json": _to_json({"error": error, "origin": item.origin})}
    messages = [_message_to_json(message) for message in item.messages]
    record = {"messages": messages, "tags": list(item.tags), "origin": item.origin}
    return {"json": _to_json(record), **item.media}


def _native(record: dict, media: MediaSource) -> list[Message]:
    error = record.get("error")
    if isinstance(error, dict):
        origin = f" ({record['origin']})" if record.get("origin") else ""
        cause = str(error.get("cause"))
        known = re.fullmatch(r"\w{1,40}", cause)
        raise SampleError(f"{error.get('message')}{origin}", cause=cause if known else "record_malformed")
    messages = openai(record, media)
    check_messages(messages)
    return messages


def _message_to_json(message: Message) -> dict:
    parts = [{"type": part.kind, part.kind: part.text or part.media} for part in message.parts]
    return {"role": message.role, "content": parts}


def _to_json(record: dict) -> bytes:
    # Plain ASCII: even text that is not valid Unicode survives, to be refused by name when read.
    return json.dumps(record).encode()


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise SampleError("tags is not a list of strings", cause="record_malformed")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"a tag is not valid Unicode ({error.reason})", cause="record_malformed") from error
    return tuple(values)


def _read_json(media: MemberMedia, read: ReadMember) -> dict:
    if "json" not in media.names:
        raise SampleError(
            f"there is no json member. Members: {', '.join(media.names)}", cause="record_malformed"
        )
    data = read("json")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the json member cannot be parsed ({error})", cause="record_malformed") from error
    if not isinstance(record, dict):
        raise SampleError("the json member is not an object", cause="record_malformed")
    return record


def _caption_record(media: MemberMedia, read: ReadMember) -> dict:
    return {**_text_fields(media, read, "caption"), "image": _only(media, IMAGE_ENDINGS, "picture")}


def _asr_record(media: MemberMedia, read: ReadMember) -> dict:
    return {**_text_fields(media, read, "text"), "audio": _only(media, AUDIO_ENDINGS, "clip")}


def _text_record(media: MemberMedia, read: ReadMember) -> dict:
    return _text_fields(media, read, "text")


def _text_fields(media: MemberMedia, read: ReadMember, name: str) -> dict:
    """Returns the json member, if there is one, with the text of a txt or caption member put in."""
    fields = _read_json(media, read) if "json" in media.names else {}
    for member in ("txt", "caption"):
        if member in media.names:
            try:
                return {**fields, name: read(member).decode().strip()}
            except UnicodeDecodeError as error:
                raise SampleError(f"{member} is not UTF-8 ({error})", cause="record_malformed") from error
    return fields


def _only(media: MemberMedia, endings: tuple[str, ...], noun: str) -> str:
    found = [name for name in media.names if name.rpartition(".")[2] in endings]
    if len(found) != 1:
        raise SampleError(
            f"{len(found)} members are a {noun}, not one. Members: {', '.join(media.names)}",
            cause="record_malformed",
        )
    return found[0]


LAYOUTS: dict[str, Callable[[MemberMedia, ReadMember], dict]] = {
    "native": _read_json,
    "megrez": _read_json,
    "llava": _read_json,
    "openai": _read_json,
    "caption": _caption_record,
    "asr": _asr_record,
    "text": _text_record,
}
