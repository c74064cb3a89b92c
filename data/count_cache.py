"""Token counts of indexed shards, cached per tokenizer, template and media options.

The index knows sizes, not tokens; what a sample takes of a row is counted here once, without
touching media, and kept as plain arrays beside the shards (or under `data.cache`).
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.encode import Counts, Encoder
from data.index import FolderIndex
from data.remote import fetch_counts
from data.sample import SampleError
from data.shards import ShardReader
from data.urls import shown

MODALITIES = ("text", "image", "audio", "image+audio")
"""Names behind the codes of `ShardCounts.modality`."""

POOL_FROM = 2000
"""Samples above which counting is worth starting processes."""

DIGEST_BYTES = 32
"""A hash of the content stands first in a file of counts: zip notices only some of the damage."""

_COLUMNS = ("length", "supervised", "slices", "patches", "frames")


@dataclass(slots=True)
class ShardCounts:
    """Counts of every row of a shard (zeros where it cannot be used), and why a row cannot be used.

    Shapes: length, supervised, slices, patches, frames int32 [rows]; modality uint8 [rows], a place
    in `MODALITIES`; bad int64 [bad rows], cause and message strings of the same length.
    """

    length: np.ndarray
    supervised: np.ndarray
    slices: np.ndarray
    patches: np.ndarray
    frames: np.ndarray
    modality: np.ndarray
    bad: np.ndarray
    cause: np.ndarray
    message: np.ndarray


def count_folder(folder: FolderIndex, encoder: Encoder, where: str, cache: str | None) -> list[ShardCounts]:
    """Returns the counts of every shard of the source at `where`, from the cache where they are there.

    Raises:
        ValueError: the counts cannot be written.
        RuntimeError: a shard cannot be read.
    """
    place = _cache_folder(folder, encoder, cache)
    found, missing = _read_all(place, folder)
    if missing:
        _make_folder(place, folder, where)
    if missing and folder.cache:
        fetch_counts(folder, place.name, {shard: _file(place, folder, shard) for shard in missing})
        found, missing = _read_all(place, folder)
    if missing:
        num_rows = sum(folder.shards[shard].num_rows for shard in missing)
        with tqdm(total=num_rows, desc=f"count tokens of {where}", unit="sample") as bar:
            for shard, counts in _count_shards(folder, encoder, missing):
                found[shard] = counts
                _write(place, folder, shard, counts)
                bar.update(folder.shards[shard].num_rows)
    return [counts for counts in found if counts is not None]


def _read_all(place: Path, folder: FolderIndex) -> tuple[list[ShardCounts | None], list[int]]:
    """Returns the counts that are there, and the shards that have none."""
    found = [_read(place, folder, shard) for shard in range(len(folder.shards))]
    return found, [shard for shard, counts in enumerate(found) if counts is None]


def _count_shards(
    folder: FolderIndex, encoder: Encoder, shards: list[int]
) -> Iterator[tuple[int, ShardCounts]]:
    processes = _num_processes(folder, shards)
    if processes == 1 or sum(folder.shards[shard].num_rows for shard in shards) <= POOL_FROM:
        yield from ((shard, count_shard(folder, shard, encoder)) for shard in shards)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (folder, encoder)) as pool:
        jobs = {pool.submit(_count_in_process, shard): shard for shard in shards}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_processes(folder: FolderIndex, shards: list[int]) -> int:
    """Returns how many processes count: no more than there are cores for us, or room for what they read."""
    mine = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    most = min(len(shards), len(mine))
    if folder.cache:  # each holds a shard in it
        most = min(most, folder.cache.limit_bytes // max(folder.shards[shard].num_bytes for shard in shards))
    return max(most, 1)


_process: tuple[FolderIndex, Encoder] | None = None
"""What a counting process works on: sent once, since a tokenizer is slow to build."""


def _start_process(folder: FolderIndex, encoder: Encoder) -> None:
    global _process
    _process = folder, encoder


def _count_in_process(shard: int) -> ShardCounts:
    assert _process is not None, "the process was not initialised"
    return count_shard(_process[0], shard, _process[1])


def count_shard(folder: FolderIndex, shard: int, encoder: Encoder) -> ShardCounts:
    """Returns the counts of one shard, reading texts but no media.

    Raises:
        RuntimeError: the shard cannot be read.
    """
    reader = ShardReader(folder, max_open=1)
    index = folder.shards[shard]
    rows: list[Counts | None] = []
    bad: list[tuple[int, str, str]] = []
    for row in range(index.num_rows):
        try:
            sample = reader.read(shard, row, media=False)
            rows.append(encoder.lay_out(sample, index.sizes(row)).counts)
        except SampleError as error:
            if error.cause == "shard_unreadable":
                raise RuntimeError(f"{error}.") from error
            rows.append(None)
            bad.append((row, error.cause, str(error)))
        except OSError as error:
            advice = "Check the disk and the mount."
            raise RuntimeError(f"{index.path}: cannot be read ({error}). {advice}") from error
    columns = {name: np.array([getattr(r, name, 0) for r in rows], dtype=np.int32) for name in _COLUMNS}
    return ShardCounts(
        **columns,
        modality=np.array([MODALITIES.index(r.modality) if r else 0 for r in rows], dtype=np.uint8),
        bad=np.array([row for row, _, _ in bad], dtype=np.int64),
        cause=np.array([cause for _, cause, _ in bad], dtype=np.str_),
        message=np.array([message for _, _, message in bad], dtype=np.str_),
    )


def _cache_folder(folder: FolderIndex, encoder: Encoder, cache: str | None) -> Path:
    fingerprint = encoder.fingerprint[:16]
    if cache is None:
        return Path(folder.path) / ".counts" / fingerprint
    # Sources may share shard names, so each has a folder of its own.
    path = folder.path if folder.cache else os.path.realpath(folder.path)
    source = hashlib.blake2b(path.encode(), digest_size=6).hexdigest()
    return Path(cache) / "counts" / source / fingerprint


def _make_folder(place: Path, folder: FolderIndex, where: str) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"{where}.path={shown(folder.path)}: token counts cannot be written to {place} "
            f"({error.strerror}). Set data.cache=DIR to a folder that you may write to."
        ) from error


def _file(place: Path, folder: FolderIndex, shard: int) -> Path:
    return place / f"{folder.shards[shard].name}.counts"


def _write(place: Path, folder: FolderIndex, shard: int, counts: ShardCounts) -> None:
    path = _file(place, folder, shard)
    # Several machines may write here, and containers give all of their processes the same few ids.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    arrays = {field.name: getattr(counts, field.name) for field in fields(counts)}
    content = io.BytesIO()
    np.savez(content, index=np.array(folder.shards[shard].fingerprint), **arrays)
    try:
        partial.write_bytes(_digest(content.getvalue()) + content.getvalue())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        advice = "Free some space there, or set data.cache=DIR to another disk."
        raise ValueError(f"{path}: token counts cannot be written ({error.strerror}). {advice}") from error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _read(place: Path, folder: FolderIndex, shard: int) -> ShardCounts | None:
    """Returns cached counts, or None if there are none for this very index."""
    try:
        content = _file(place, folder, shard).read_bytes()
        digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if digest != _digest(content):
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if str(arrays["index"]) != folder.shards[shard].fingerprint:
                return None
            return ShardCounts(**{field.name: arrays[field.name] for field in fields(ShardCounts)})
    except (OSError, ValueError, KeyError):
        return None  # absent or damaged: counted anew
