"""Whole shards of remote sources on a local disk: within a limit, shared by all processes of a machine.

The files themselves carry the locks, so that nothing is left behind by a process that is killed:
who reads a shard holds a shared lock on it, who fetches one an exclusive lock on its unfinished file,
and only what nobody holds is ever removed, the longest unused first.

Some network disks (NFS) want a file open for writing for an exclusive lock, and for reading for a shared one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data.download import OtherContent, Patience, download, say
from data.scan import digest_of_ends
from data.urls import shown

LOOK_SECONDS = 0.1
"""How often a process looks whether another has fetched a shard, or whether there is room now."""


QUIET_SECONDS = 10.0
"""How long it waits for room without a word: others may take so long to let go."""


MARK = "source"
"""File in the folder of a source; it says which one."""

_PLACE = re.compile(r"[0-9a-f]{16}")


_ODD_SECOND = 1_234_567_891
"""A time that disks which count in twos do not keep."""


class NoRoom(RuntimeError):
    """All that lies in the cache is in use."""


@dataclass(frozen=True, slots=True)
class CachedShard:
    """A remote shard, where it is kept, and how to know it: as its index says."""

    url: str
    path: str
    num_bytes: int
    mtime_ns: int
    ends: str

    @property
    def partial(self) -> str:
        """Where it is written while it comes; the name tells how much room it will need."""
        folder, name = os.path.split(self.path)
        return os.path.join(folder, f".{name}.{self.num_bytes}.partial")

    def is_at(self, status: os.stat_result) -> bool:
        """Returns whether a file is this shard: it gets the time of the original when it is complete."""
        same_time = status.st_mtime_ns // 10**9 == self.mtime_ns // 10**9  # not every disk keeps the rest
        return status.st_nlink > 0 and status.st_size == self.num_bytes and same_time


@dataclass(frozen=True, slots=True)
class ShardCache:
    """The folder `folder`/remote-shards, which holds at most `limit_bytes` of shards of any sources."""

    folder: str
    limit_bytes: int
    patience: Patience = field(default_factory=Patience)

    @property
    def root(self) -> Path:
        """Where shards and indexes lie, in a folder for each source."""
        return Path(self.folder) / "remote-shards"

    def place_of(self, source: str) -> Path:
        """Returns the folder of a source, given its URL."""
        return self.root / hashlib.blake2b(source.rstrip("/").encode(), digest_size=8).hexdigest()

    def make_place(self, source: str) -> Path:
        """Returns the same, made and marked as ours: nothing is removed from a folder without the mark."""
        place = self.place_of(source)
        place.mkdir(parents=True, exist_ok=True)
        mark = place / MARK
        mark.touch(mode=0o600)
        mark.write_text(f"{shown(source)}\n")  # for people who wonder what lies here
        return place

    def check_disk(self) -> None:
        """Raises ValueError if the disk has no locks, or does not keep the times of files to the second."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks = _is_locked(file.name)
                os.utime(file.name, ns=(0, _ODD_SECOND * 10**9))
                keeps_times = os.stat(file.name).st_mtime_ns // 10**9 == _ODD_SECOND
        except OSError as error:
            problem = f"the disk there cannot be used ({error.strerror or error})"
        else:
            if locks and keeps_times:
                return
            problem = "the disk there does not " + ("keep the times of files" if locks else "lock files")
        raise ValueError(f"data.cache={self.folder}: {problem}. Name a folder on a local disk.")

    def has(self, shard: CachedShard) -> bool:
        """Returns whether a shard is here, for now."""
        try:
            return shard.is_at(os.stat(shard.path))
        except FileNotFoundError:
            return False

    def open(self, shard: CachedShard) -> int:
        """Returns a descriptor of a shard, fetched if need be. It stays in the cache while that is open.

        Raises:
            NoRoom: for a long time nothing could make place for it.
            Absent, RuntimeError: it cannot be fetched.
        """
        while True:
            with contextlib.suppress(NoRoom):
                if (number := self.open_now(shard)) is not None:
                    return number
                time.sleep(LOOK_SECONDS)  # another process is fetching it
                continue
            if (number := self._wait_for_room(shard)) is not None:
                return number

    def _wait_for_room(self, shard: CachedShard) -> int | None:
        """Asks those who keep shards only for later to let go, until there is room; returns as `open_now`."""
        started, told = time.monotonic(), False
        with open(self._asked, "a+b") as asked:
            while True:
                # Where another has it, room is asked for already.
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(asked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    return self.open_now(shard)
                except NoRoom as error:
                    waited_seconds = time.monotonic() - started
                    if waited_seconds >= self.patience.room_seconds:
                        raise
                    if waited_seconds >= QUIET_SECONDS and not told:
                        say(f"{error} Waits up to {self.patience.room_seconds:g} s for room.")
                        told = True
                time.sleep(LOOK_SECONDS)

    def is_room_asked_for(self) -> bool:
        """Returns whether somebody has to read a shard for which there is no room."""
        self._asked.touch()
        return _is_locked(self._asked)

    @property
    def _asked(self) -> Path:
        return self.root / ".asked"

    def open_now(self, shard: CachedShard) -> int | None:
        """Returns the same; None while another process is fetching the shard.

        Raises:
            NoRoom: all that could make place for it is in use.
            Absent, RuntimeError: it cannot be fetched.
        """
        number = self._open_present(shard)
        if number is None:
            with self._claim(shard) as partial:
                if partial is not None:
                    self._fetch(shard, partial)
            number = self._open_present(shard)
        return number

    def _open_present(self, shard: CachedShard) -> int | None:
        try:
            number = os.open(shard.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(number, fcntl.LOCK_SH)
        status = os.fstat(number)
        if shard.is_at(status):
            os.utime(number, ns=(time.time_ns(), status.st_mtime_ns))
            return number
        os.close(number)
        with self._locked(), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(shard.path), status):  # an earlier version
                os.unlink(shard.path)
        return None

    @contextlib.contextmanager
    def _claim(self, shard: CachedShard) -> Iterator[IO[bytes] | None]:
        """Gives the unfinished file of a shard, locked and with room for all of it; None if another has it.

        Raises:
            NoRoom: there is none.
        """
        with self._locked():
            partial = _open_locked(shard.partial)
            if partial is not None and os.path.exists(shard.path):
                os.unlink(shard.partial)
                partial.close()  # another process was faster
                partial = None
            if partial is not None:
                try:
                    self._make_room(shard)
                except NoRoom:
                    if not os.fstat(partial.fileno()).st_size:
                        os.unlink(shard.partial)
                    partial.close()
                    raise
        try:
            yield partial
        finally:
            if partial is not None:
                partial.close()

    def _fetch(self, shard: CachedShard, partial: IO[bytes]) -> None:
        for _ in range(2):  # what lay there may have been the beginning of an earlier version
            download(shard.url, partial, shard.num_bytes, self.patience)
            if digest_of_ends(shard.partial) == shard.ends:
                os.utime(shard.partial, ns=(time.time_ns(), shard.mtime_ns))
                os.fsync(partial.fileno())  # else a machine that goes down may leave a whole file of zeros
                with self._locked():
                    os.rename(shard.partial, shard.path)
                if not shard.is_at(os.fstat(partial.fileno())):  # it would be fetched again and again
                    raise RuntimeError(
                        f"data.cache={self.folder}: the disk there does not keep the times of files. "
                        "Name a folder on a local disk."
                    )
                return
            partial.truncate(0)
        raise OtherContent(shard.url)

    def _make_room(self, shard: CachedShard) -> None:
        """Removes what nobody uses until there is room for a shard. The cache must be locked."""
        needed = shard.num_bytes - self.limit_bytes
        files = []
        for entry in _files(self.root):
            if entry.path == shard.partial:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                size = _reserved(entry.name) if entry.name.endswith(".partial") else status.st_size
                needed += size
                files.append((status.st_atime_ns, size, entry.path))
        for _, size, path in sorted(files):
            if needed <= 0:
                return
            if _remove_unused(path):
                needed -= size
        if needed > 0:
            raise NoRoom(
                f"data.cache_gib={self.limit_bytes / 2**30:g}: all shards in {self.root} are in use, and "
                f"{shown(shard.url)} needs {shard.num_bytes / 2**30:.3g} GiB. Raise it."
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _open_locked(path: str) -> IO[bytes] | None:
    """Returns a file to append to, made if need be and locked; None if another process has it."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_locked(path: str | Path) -> bool:
    """Returns whether somebody has the exclusive lock of a file. Those who ask do not see each other."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove_unused(path: str) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


def _files(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yields all shards in the cache, whole and unfinished ones; never what somebody else put there."""
    for source in os.scandir(root):
        if _PLACE.fullmatch(source.name) and os.path.isfile(os.path.join(source.path, MARK)):
            yield from (entry for entry in os.scandir(source) if entry.name.endswith((".tar", ".partial")))


def _reserved(name: str) -> int:
    """Returns how long an unfinished shard will be, by its name."""
    return int(name.split(".")[-2])
