"""Finds the samples of a tar by its headers alone, also of one that was cut off or made to do harm."""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from data.config import LimitsConfig

MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""Key and part name, split at the first dot of the last path component, as webdataset does."""

HEADER_BYTES = 2**20
"""What one header of a tar may be long, names and extended headers included."""


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


def scan_shard(path: str, limits: LimitsConfig) -> list[Group]:
    """Returns the samples of a tar in order; if it is cut off, a last group says so."""
    groups: list[Group] = []
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
                whole = _collect(tar, size, groups)
                # tarfile ends quietly at a damaged header; only zeros up to the last byte are a real end.
                problem = "" if whole and _ends_in_zeros(file, tar.offset) else "no end mark"
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # tarfile raises much for hostile headers: RecursionError, IndexError, ...
            problem = str(error)
    for group in groups:
        if len(group.members) > limits.parts:
            group.refuse(
                "too_many_parts", f"{len(group.members)} members, more than data.limits.parts={limits.parts}"
            )
    if problem:
        end = Group("rest-of-shard")
        end.refuse(
            "shard_truncated", f"the tar is cut off or damaged after {len(groups)} samples ({problem})"
        )
        groups.append(end)
    return groups


class _Headers:
    """A tar as tarfile may read it: header by header, none of them longer than `HEADER_BYTES`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Returns the next bytes, unless a header asks for too many or for less than none."""
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _ends_in_zeros(file: BinaryIO, place: int) -> bool:
    file.seek(place)
    blocks = iter(lambda: file.read(2**20), b"")
    first = next(blocks, b"")
    return len(first) >= 512 and not any(first) and not any(any(block) for block in blocks)


def _collect(tar: tarfile.TarFile, size: int, groups: list[Group]) -> bool:
    """Adds every member to its group; returns False where one reaches beyond the end of the file."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep all headers of the shard
        if member.size < 0 or tar.offset <= member.offset:
            return False  # some versions of tarfile would read the same header for ever
        if not member.isreg() or member.issparse():
            continue
        if member.offset_data + member.size > size:
            return False
        _add_member(groups, member)
    return True


def _add_member(groups: list[Group], member: tarfile.TarInfo) -> None:
    name = writable(member.name)
    unsafe = name.startswith("/") or ".." in name.split("/")
    split = MEMBER_NAME.fullmatch(name)
    if split is None and not unsafe:
        return  # neither webdataset nor anyone else takes a name without an ending for a sample
    key, part = split.groups() if split else (name, "")
    part = part.lower()
    if not groups or groups[-1].key != key:
        groups.append(Group(key))
    group = groups[-1]
    if unsafe:
        group.refuse("member_name", f"member name {name[:100]!r} leads outside the shard")
    if name != member.name:
        group.refuse("member_name", f"member name {member.name[:100]!r} is not UTF-8")
    if part in group.members:
        group.refuse("duplicate_member", f"two members are named {member.name[:100]!r}")
    group.members[part] = (member.offset_data, member.size)


def writable(text: str) -> str:
    """Returns text with escapes for what is not valid Unicode, which no index could hold."""
    return text.encode(errors="backslashreplace").decode()
