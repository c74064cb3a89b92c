"""Files of records, and the pictures and clips that they name.

A record's origin is `file:line` (or `file[number]` in a JSON list); its key is a hash of its content,
so that it stays the same when the file is prepared again, sorted or appended to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import LimitsConfig
from data.formats import DEFAULT_TAGS, MediaKind, MediaSource, extension_of, read_record
from data.layouts import Quarantined
from data.sample import Part, Sample, SampleError

NESTED = "the record is nested too deeply"

_ABSENT = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,  # a socket
    errno.EACCES,
    errno.EPERM,
)
"""Why a file cannot be read today or tomorrow. All else is the machine's failure, and may pass."""


Held = Callable[[], bytes]
"""Reads a picture or clip that comes with a record; raises ValueError where it is not there."""


@dataclass(slots=True)
class Record:
    """A parsed record, or the raw text of one that could not be parsed, with the reason.

    `raw` is the line it came from, where it has one of its own; `held` the media that came with it, by
    the reference it has for them.
    """

    value: Any
    origin: str
    problem: str = ""
    raw: bytes = b""
    held: dict[str, Held] = field(default_factory=dict)


class FolderMedia(MediaSource):
    """Media of one record, as files below a folder or `held` by it. Their bytes are read and numbered."""

    def __init__(self, folder: str, limits: LimitsConfig, held: dict[str, Held] | None = None):
        super().__init__()
        self.folder = os.path.realpath(folder)
        self.limits = limits
        self.held = held or {}

    def part(self, kind: MediaKind, reference: str) -> Part:
        """Returns the part of a file, having read it.

        Raises:
            SampleError: it is outside the folder, missing, or too large, or there are too many.
            RuntimeError: the machine or the network fails at it.
        """
        self._check_count()
        return self.inline(kind, self._read(kind, reference), extension_of(os.path.splitext(reference)[1]))

    def inline(self, kind: MediaKind, data: bytes, extension: str) -> Part:
        """Returns the part for bytes that stand in the record itself.

        Raises:
            SampleError: there are too many.
        """
        self._check_count()
        name = f"{len(self.inlined)}.{extension}"
        self.inlined[name] = data
        return Part(kind, media=name)

    def _check_count(self) -> None:
        if len(self.inlined) >= self.limits.parts:
            raise SampleError(
                f"the record names more media than data.limits.parts={self.limits.parts}",
                cause="too_many_parts",
            )

    def _read(self, kind: MediaKind, reference: str) -> bytes:
        try:
            if reference in self.held:
                data = self.held[reference]()
                self._check_size(kind, reference, len(data))
                return data
            path = os.path.realpath(os.path.join(self.folder, reference))
            if os.path.commonpath([self.folder, path]) != self.folder:
                advice = (
                    "Use --prefix with a folder that holds it"
                    if os.path.isabs(reference)
                    else "Copy it there"
                )
                raise SampleError(
                    f"{kind} {reference!r} leads outside {self.folder}. {advice}",
                    cause="path_outside",
                )
            with open(path, "rb", opener=_open_plainly) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise SampleError(f"{kind} {reference!r} is not a file", cause="media_missing")
                self._check_size(kind, reference, status.st_size)
                return file.read()
        except SampleError:
            raise
        except (OSError, ValueError) as error:
            problem = f"{kind} {reference!r} cannot be read ({error})"
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                advice = "Look at the disk and its mount, and start the same command again."
                raise RuntimeError(f"{problem}. {advice}") from error
            raise SampleError(problem, cause="media_missing") from error

    def _check_size(self, kind: MediaKind, reference: str, num_bytes: int) -> None:
        most = self.limits.image_bytes if kind == "image" else self.limits.audio_bytes
        if num_bytes > most:
            raise SampleError(
                f"{kind} {reference!r} has {num_bytes} bytes, more than data.limits.{kind}_bytes={most}",
                cause=f"{kind}_too_large",
            )


def _open_plainly(path: str, flags: int) -> int:
    # Opening a named pipe would wait for its writer for ever.
    return os.open(path, flags | os.O_NONBLOCK)


class SampleMaker:
    """Turns records into samples with unique, lasting keys."""

    def __init__(self, format: str, tags: tuple[str, ...], limits: LimitsConfig):
        self.format = format
        self.tags = tuple(dict.fromkeys(DEFAULT_TAGS.get(format, ()) + tags))
        self.limits = limits
        self._seen: set[int] = set()
        self._repeats: dict[int, int] = {}

    def make(self, record: Record, folder: str) -> Sample | Quarantined:
        """Returns the sample of a record, or why there is none.

        Raises:
            RuntimeError: the machine or the network fails at its media, which is no fault of the record.
        """
        problem = record.problem
        try:
            content = json.dumps(record.value, sort_keys=True).encode()
        except RecursionError:
            content, problem = record.raw or record.origin.encode(), NESTED
        key = self._key(content)
        media = FolderMedia(folder, self.limits, record.held)
        try:
            if problem:
                raise SampleError(problem, cause="record_malformed")
            messages = read_record(self.format, record.value, media)
        except SampleError as error:
            return Quarantined(key, error.cause, str(error), record.origin)
        except RecursionError:
            return Quarantined(key, "record_malformed", NESTED, record.origin)
        except RuntimeError as error:
            raise RuntimeError(f"{record.origin}: {error}") from error
        return Sample(key, messages, media.inlined, self.tags, record.origin)

    def _key(self, content: bytes) -> str:
        digest = hashlib.blake2b(content, digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        if number not in self._seen:
            self._seen.add(number)
            return digest.hex()
        self._repeats[number] = self._repeats.get(number, 0) + 1
        return f"{digest.hex()}-{self._repeats[number]}"


def find_files(source: str, format: str) -> list[tuple[str, str]]:
    """Returns path and name (for origins) of the record files that `source` stands for.

    That is the file itself; for `text` also a folder, with all .txt files in and below it.

    Raises:
        ValueError: there are none.
    """
    if os.path.isdir(source):
        if format != "text":
            raise ValueError(f"{source}: is a folder, which only --format text takes. Name the record file.")
        texts = sorted(Path(source).rglob("*.txt"))
        if not texts:
            raise ValueError(f"{source}: holds no .txt files. Check the path.")
        return [(str(path), str(path.relative_to(source))) for path in texts]
    if not os.path.isfile(source):
        raise ValueError(f"{source}: there is no such file or folder. Check the path.")
    known = (".jsonl", ".json", ".txt") if format == "text" else (".jsonl", ".json")
    if not source.endswith(known):
        raise ValueError(
            f"{source}: is none of {', '.join(known)}. Convert it to one record a line (.jsonl)."
        )
    return [(source, os.path.basename(source))]


def count_records(path: str) -> int:
    """Returns about how many records a file holds, for a progress bar; 0 where that is not known."""
    if path.endswith(".json"):
        return 0
    if path.endswith(".txt"):
        return 1
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_records(path: str, name: str) -> Iterator[Record]:
    """Yields the records of a .jsonl, .json (a list) or .txt (one document) file.

    Raises:
        ValueError: a .json file is not a list.
    """
    if path.endswith(".jsonl"):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{name}:{number}")
    elif path.endswith(".json"):
        yield from _read_list(path, name)
    else:
        yield _read_text(path, name)


def _read_list(path: str, name: str) -> Iterator[Record]:
    parsed = _parse(Path(path).read_bytes(), name)
    if parsed.problem or not isinstance(parsed.value, list):
        problem = parsed.problem or "not a list"
        raise ValueError(f"{path}: {problem}. Use a JSON list of records, or one record a line as .jsonl.")
    for number, value in enumerate(parsed.value):
        yield Record(value, f"{name}[{number}]")


def _read_text(path: str, name: str) -> Record:
    data = Path(path).read_bytes()
    try:
        return Record({"text": data.decode("utf-8-sig")}, name)
    except UnicodeDecodeError as error:
        return Record(data.hex(), name, f"the text is not UTF-8 ({error.reason} at byte {error.start})")


def _parse(data: bytes, origin: str) -> Record:
    try:
        return Record(json.loads(data.decode("utf-8-sig")), origin, raw=data)
    except (ValueError, RecursionError) as error:
        return Record(data.hex(), origin, f"not valid JSON ({error})")
