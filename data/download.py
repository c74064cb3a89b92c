"""Brings a file from where a URL points, however often the way there breaks.

A connection that stalls, is cut or answers with an error is tried again after a growing pause, from
the byte where it broke off. What waiting cannot mend (no such file, no permission) ends at once.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import IO, TypeVar

from data.transport import FIRST_PIECE_BYTES, WrongLength, find_length, read_pieces
from data.urls import shown

REPORT_SECONDS = 30.0
"""How long a file may take before its progress is told, and again after each such time."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a store: for its next byte, and between `attempts` that bring nothing.

    `room_seconds` is for room in a cache whose shards are all in use.
    """

    stall_seconds: float = 60.0
    attempts: int = 8
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 60.0
    room_seconds: float = 600.0

    def pause_seconds(self, attempt: int) -> float:
        """Returns how long to pause after an attempt, counted from 1."""
        return min(self.first_pause_seconds * 2 ** (attempt - 1), self.longest_pause_seconds)


class OtherContent(RuntimeError):
    """A shard is not the one that was indexed."""

    def __init__(self, url: str):
        super().__init__(
            f"{shown(url)}: has other content than when it was indexed. "
            "Index it again where it was made, upload both, and start a new run."
        )


def ask(url: str, question: Callable[[], Result], patience: Patience, *, moved: Callable[[], bool]) -> Result:
    """Returns the answer to a question about `url`, asked again and again where the machine fails.

    Args:
        url: for messages.
        question: raises OSError where asking again may help.
        patience: when to give up.
        moved: says whether the last attempt brought something, so that it counts as the first.

    Raises:
        Absent: it does not exist or may not be read.
        RuntimeError: all attempts failed.
    """
    attempt = 1
    while True:
        try:
            return question()
        except (OSError, HTTPException) as error:
            cause = (str(error) or type(error).__name__).replace(url, shown(url))
        attempt = 1 if moved() else attempt
        if attempt >= patience.attempts:
            raise RuntimeError(
                f"{shown(url)}: cannot be fetched ({cause}; {attempt} attempts in a row). "
                "Look at the store and the network, and start the same command again."
            )
        pause = patience.pause_seconds(attempt)
        attempt += 1
        say(f"{shown(url)}: {cause}. Attempt {attempt} of {patience.attempts} in {pause:g} s.")
        time.sleep(pause)


def download(url: str, file: IO[bytes], num_bytes: int | None, patience: Patience) -> None:
    """Writes all of a URL to the end of `file`, which may hold its first part already.

    Args:
        url: what to fetch.
        file: without a buffer of its own, so that what came stays when the process is killed.
        num_bytes: how long it must be; None takes what comes.
        patience: when to give up.

    Raises:
        Absent: it does not exist or may not be read.
        OtherContent: it has another length.
        RuntimeError: it did not come in spite of all attempts, or cannot be written.
    """
    last = _size(file)
    progress = _Progress(url, num_bytes)

    def attempt() -> None:
        if num_bytes is None or _size(file) > num_bytes:
            file.truncate(0)  # of unknown length: what was cut off might be of another version
        if _size(file) == num_bytes:
            return
        try:
            _append(url, file, num_bytes, patience, progress)
        except WrongLength as error:  # of the file, or of this one answer
            if num_bytes and find_length(url, patience.stall_seconds) not in (None, num_bytes):
                raise OtherContent(url) from error
            raise

    def moved() -> bool:
        nonlocal last
        before, last = last, _size(file)
        return last - before >= FIRST_PIECE_BYTES

    ask(url, attempt, patience, moved=moved)


def fetch_bytes(url: str, patience: Patience) -> bytes:
    """Returns all of a URL; raises like `download`."""
    file = io.BytesIO()
    download(url, file, None, patience)
    return file.getvalue()


def say(line: str) -> None:
    """Tells a person how fetching goes: on stderr, from whatever process."""
    print(line, file=sys.stderr, flush=True)


def _append(
    url: str, file: IO[bytes], num_bytes: int | None, patience: Patience, progress: _Progress
) -> None:
    have = _size(file)
    for piece in read_pieces(url, have, num_bytes, patience.stall_seconds):
        have += len(piece)
        if num_bytes is not None and have > num_bytes:
            file.truncate(0)
            raise WrongLength(f"more than {num_bytes} bytes came")
        _write(file, piece)
        progress.report(have)
    if num_bytes is not None and have < num_bytes:
        raise WrongLength(f"{have} of {num_bytes} bytes came")


def _write(file: IO[bytes], piece: bytes) -> None:
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:  # the disk's affair: fetching again would not help
        raise RuntimeError(
            f"{file.name}: cannot be written ({error.strerror}). Free some space, or lower data.cache_gib."
        ) from error


def _size(file: IO[bytes]) -> int:
    return file.seek(0, io.SEEK_END)


class _Progress:
    """Tells how far a long download is, every half minute."""

    def __init__(self, url: str, num_bytes: int | None):
        self.url = url
        self.num_bytes = num_bytes
        self.started = self.told = time.monotonic()

    def report(self, have: int) -> None:
        now = time.monotonic()
        if now - self.told >= REPORT_SECONDS:
            self.told = now
            of = f" of {self.num_bytes / 1e6:,.0f}" if self.num_bytes else ""
            say(f"{shown(self.url)}: fetching, {have / 1e6:,.0f}{of} MB after {now - self.started:.0f} s.")
