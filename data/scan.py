"""What is in one tar shard: its samples' members, and the sizes of every picture and recording.

Runs in worker processes while an index is built. Every sample is decoded whole once, so that
what cannot be decoded is known before training.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field
from typing import TypedDict

from data.config import LimitsConfig
from data.layouts import parse_members
from data.media import audio_num_samples, image_size
from data.sample import Part, Sample, SampleError

MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""Key and part name, split at the first dot of the last path component, as webdataset does."""

MESSAGE_CHARS = 500


@dataclass(slots=True)
class Group:
    """Members of one sample: offset and size in bytes by part name. `cause` is set if it is unusable."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    cause: str = ""
    message: str = ""

    def refuse(self, cause: str, message: str) -> None:
        """Marks the sample as unusable; the first reason stays."""
        if not self.cause:
            self.cause, self.message = cause, message


class Row(TypedDict):
    """One row of an index file."""

    key: str
    members: list[dict]
    images: list[dict]
    audios: list[dict]
    text_chars: int
    tags: list[str]
    cause: str | None
    message: str | None


def scan_shard(path: str, limits: LimitsConfig) -> list[Group]:
    """Returns the samples of a tar in order; if it is cut off, a last group says so."""
    groups: list[Group] = []
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                whole = _collect(tar, size, groups)
                file.seek(tar.offset)
                # tarfile ends quietly at a damaged header; only a block of zeros is a real end.
                problem = "" if whole and file.read(512) == bytes(512) else "no end mark"
        except (tarfile.TarError, ValueError, OverflowError) as error:
            problem = str(error)
    for group in groups:
        if len(group.members) > limits.parts:
            group.refuse(
                "too_many_parts", f"{len(group.members)} members, more than data.limits.parts={limits.parts}"
            )
    if problem:
        end = Group("rest-of-shard")
        end.refuse("shard_truncated", f"the tar is cut off or damaged after {len(groups)} samples ({problem})")
        groups.append(end)
    return groups


def _collect(tar: tarfile.TarFile, size: int, groups: list[Group]) -> bool:
    """Adds every member to its group; returns False where one reaches beyond the end of the file."""
    while (member := tar.next()) is not None:
        tar.members = []  # or tarfile would keep all headers of the shard
        if not member.isreg() or member.issparse():
            continue
        if member.offset_data + member.size > size:
            return False
        _add_member(groups, member)
    return True


def _add_member(groups: list[Group], member: tarfile.TarInfo) -> None:
    unsafe = member.name.startswith("/") or ".." in member.name.split("/")
    split = MEMBER_NAME.fullmatch(member.name)
    if split is None and not unsafe:
        return  # neither webdataset nor anyone else takes a name without an ending for a sample
    key, part = split.groups() if split else (member.name, "")
    part = part.lower()
    if not groups or groups[-1].key != key:
        groups.append(Group(key))
    group = groups[-1]
    if unsafe:
        group.refuse("member_name", f"member name {member.name[:100]!r} leads outside the shard")
    if part in group.members:
        group.refuse("duplicate_member", f"two members are named {member.name[:100]!r}")
    group.members[part] = (member.offset_data, member.size)


def measure_rows(path: str, groups: list[Group], layout: str, limits: LimitsConfig) -> list[Row]:
    """Returns an index row for each group, after decoding all of its media."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [_measure(descriptor, group, layout, limits) for group in groups]
    finally:
        os.close(descriptor)


def _measure(descriptor: int, group: Group, layout: str, limits: LimitsConfig) -> Row:
    members = [{"name": name, "offset": at, "size": size} for name, (at, size) in group.members.items()]
    row = Row(
        key=group.key, members=members, images=[], audios=[], text_chars=0, tags=[], cause=None, message=None
    )
    try:
        _fill(row, descriptor, group, layout, limits)
    except SampleError as error:
        row["cause"], row["message"] = error.cause, str(error)[:MESSAGE_CHARS]
    except OSError:
        raise  # the disk's affair: decoders' errors come as SampleError
    except Exception as error:
        # The sample border: whatever hostile bytes provoke must not end the indexing.
        row["cause"], row["message"] = "unexpected", f"{type(error).__name__}: {error}"[:MESSAGE_CHARS]
    return row


def _fill(row: Row, descriptor: int, group: Group, layout: str, limits: LimitsConfig) -> None:
    if group.cause:
        raise SampleError(group.message, cause=group.cause)

    def read(name: str) -> bytes:
        offset, size = group.members[name]
        return os.pread(descriptor, size, offset)

    sample = parse_members(layout, group.key, group.members, read)
    row["tags"] = list(sample.tags)
    parts = [part for message in sample.messages for part in message.parts]
    row["text_chars"] = sum(len(part.text) for part in parts)
    media = {part.media: part for part in parts if part.kind != "text"}
    if len(media) > limits.parts:
        raise SampleError(
            f"{len(media)} media, more than data.limits.parts={limits.parts}", cause="too_many_parts"
        )
    for name, part in media.items():
        data = sample.media[name] if name in sample.media else read(name)
        _measure_media(row, sample, part, data, limits)


def _measure_media(row: Row, sample: Sample, part: Part, data: bytes, limits: LimitsConfig) -> None:
    try:
        if part.kind == "image":
            width, height = image_size(data, limits)
            row["images"].append({"name": part.media, "width": width, "height": height})
        else:
            row["audios"].append({"name": part.media, "num_samples": audio_num_samples(data, limits)})
    except SampleError as error:
        origin = f" ({sample.origin})" if sample.origin else ""
        raise SampleError(f"{part.media}: {error}{origin}", cause=error.cause) from error
