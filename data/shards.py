"""Tar shards: written whole or not at all, and read one sample at a time without scanning.

A folder of shards is built beside its final name, under a mark that `data.index` refuses, and
renamed when it is complete. Shards are plain webdataset tars.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.index import UNFINISHED, FolderIndex
from data.layouts import Quarantined, native_members, parse_members
from data.sample import Sample, SampleError
from data.shard_index import ShardIndex
from data.transport import Absent

SAMPLES_PER_SHARD = 10_000
BYTES_PER_SHARD = 512 * 2**20
MAX_OPEN = 64


@contextmanager
def whole_folder(out: str) -> Iterator[str]:
    """Gives a new folder to fill, which becomes `out` when the block ends without an error.

    Raises:
        ValueError: `out` already holds something, or another process is filling it.
    """
    final, unfinished = Path(out), Path(f"{out.rstrip('/')}.unfinished")
    _check_free(final, out)
    _make(unfinished, out)
    with open(_claim(unfinished), "wb") as mark:
        _lock(mark, out)
        try:
            _clear(unfinished)
            yield str(unfinished)
            _check_free(final, out)  # again: something may have been put there in the meantime
            if (final / UNFINISHED).exists():
                shutil.rmtree(final)
            elif final.exists():
                final.rmdir()
            unfinished.rename(final)
            (final / UNFINISHED).unlink()
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise RuntimeError(f"out={out}: the disk is full. Free some space and run again.") from error
            raise


def _make(folder: Path, out: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out={out}: cannot be made ({error.strerror}). Choose a folder that you may write to."
        ) from error


def _check_free(final: Path, out: str) -> None:
    if final.exists() and not (final / UNFINISHED).exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"out={out}: already exists. Remove it or choose another folder.")


def _claim(folder: Path) -> Path:
    """Returns the mark of an unfinished folder, having made sure that we are free to empty it."""
    mark = folder / UNFINISHED
    if any(folder.iterdir()) and not mark.exists():
        raise ValueError(f"out={folder}: holds files that are not ours. Remove it or choose another --out.")
    return mark


def _lock(mark: BinaryIO, out: str) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"out={out}: another process is filling it. Wait for it, or stop it.") from error


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != UNFINISHED:
            path.unlink()


def fill_folder(
    samples: Iterable[Sample | Quarantined],
    folder: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    bytes_per_shard: int = BYTES_PER_SHARD,
) -> list[str]:
    """Writes samples as `shard-000000.tar`, ... into an existing folder; returns the paths."""
    # It imports torch, which takes seconds, and readers of shards do without it.
    from webdataset.writer import TarWriter

    paths: list[str] = []
    remaining = iter(samples)
    sample = next(remaining, None)
    while sample is not None:
        paths.append(os.path.join(folder, f"shard-{len(paths):06d}.tar"))
        num_samples = num_bytes = 0
        # A fixed time and owner: the same samples give the same bytes.
        with open(paths[-1], "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            while sample is not None and num_samples < samples_per_shard and num_bytes < bytes_per_shard:
                num_bytes += tar.write({"__key__": sample.key, **native_members(sample)})
                num_samples += 1
                sample = next(remaining, None)
    return paths


class _Descriptor:
    """An open file that closes when nobody uses it any more, so eviction cannot pull it from a reader."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


class ShardReader:
    """Reads samples of an indexed folder by shard and row. Opens files when first needed, keeps some.

    Shards in a cache are not kept open, since that would keep them there. Picklable: in another process
    it opens files anew. `note_fetching` is told when a wait for a remote shard begins and ends.
    """

    def __init__(self, folder: FolderIndex, source: str | None = None, max_open: int | None = None):
        self.folder = folder
        self.source = os.path.basename(folder.path.rstrip("/")) if source is None else source
        self.max_open = max_open if max_open is not None else 0 if folder.cache else MAX_OPEN
        self.note_fetching: Callable[[bool], None] = lambda is_fetching: None
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        """Leaves open files behind."""
        return ShardReader, (self.folder, self.source, self.max_open)

    def read(self, shard: int, row: int, media: bool = True) -> Sample:
        """Returns a sample; with `media=False` no media member is read and `Sample.media` is empty.

        Raises:
            SampleError: the row is quarantined, or the shard is gone or changed (`shard_unreadable`).
        """
        index = self.folder.shards[shard]
        if row in index.errors:
            cause, message = index.errors[row]
            raise SampleError(message, cause=cause)
        key, members = index.keys[row], index.members(row)

        def read(name: str) -> bytes:
            return self._read_member(shard, key, *members[name])

        sample = parse_members(index.format, key, members, read)
        sample.tags = index.tags(row)  # its own, and those given when it was indexed
        names = {part.media for message in sample.messages for part in message.parts if part.media}
        inlined = sample.media
        sample.media = {}
        if media:
            sample.media = {name: inlined[name] if name in inlined else read(name) for name in sorted(names)}
        return sample

    def _read_member(self, shard: int, key: str, offset: int, size: int) -> bytes:
        index = self.folder.shards[shard]
        descriptor = self._descriptor(shard, index, key)
        pieces: list[bytes] = []
        while size > 0:
            piece = os.pread(descriptor.number, size, offset)
            if not piece:
                raise self._unreadable(index, key, f"the file ends before byte {offset}")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _descriptor(self, shard: int, index: ShardIndex, key: str) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            try:
                descriptor = _Descriptor(self._fetch(shard))
            except FileNotFoundError as error:
                raise self._unreadable(index, key, "the file is gone") from error
            except (OSError, MemoryError):
                raise
            except Exception as error:
                # Stores raise errors of their own; none of them is a sample's fault.
                what = "" if isinstance(error, (Absent, RuntimeError)) else f"{type(error).__name__}: "
                where = f"{self.source}/{index.name}/{key}"
                problem = f"{where}: {what}{str(error).rstrip('.')}"
                raise SampleError(problem, cause="shard_unreadable") from error
            num_bytes = os.fstat(descriptor.number).st_size
            if num_bytes != index.num_bytes:
                raise self._unreadable(index, key, f"the file has {num_bytes} bytes, not {index.num_bytes}")
            self._open[shard] = descriptor
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
            return descriptor

    def _fetch(self, shard: int) -> int:
        if self.folder.has(shard):
            return self.folder.open(shard)
        self.note_fetching(True)
        try:
            return self.folder.open(shard)
        finally:
            self.note_fetching(False)

    def _unreadable(self, index: ShardIndex, key: str, problem: str) -> SampleError:
        advice = f"Restore the shard, or run `python -m data.index {self.folder.path}`"
        if index.url:
            advice = "Start the same command again, which fetches the shard again"
        where = f"{self.source}/{index.name}/{key}"
        return SampleError(f"{where}: {problem}. {advice}", cause="shard_unreadable")
