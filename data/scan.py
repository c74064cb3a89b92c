"""Makes the side index of a tar shard: finds its samples, decodes every one once, writes the sizes.

So what cannot be decoded is known before training. Decoding runs in worker processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.config import LimitsConfig
from data.layouts import ReadMember, parse_members
from data.media import audio_num_samples, image_size
from data.sample import Part, Sample, SampleError
from data.tar_members import Group, scan_shard, writable
from data.urls import INDEX_SUFFIX

MESSAGE_CHARS = 500
ROWS_PER_TASK = 32

INDEX_VERSION = 2
"""Raised when the columns or their meaning change; other versions must be indexed again."""

END_BYTES = 64 * 2**10
"""How much of each end of a tar is compared where its time has changed since it was indexed."""


def _struct_list(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([pa.field(name, kind) for name, kind in fields.items()]))


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("members", _struct_list(name=pa.string(), offset=pa.int64(), size=pa.int64())),
        ("images", _struct_list(name=pa.string(), width=pa.int32(), height=pa.int32())),
        ("audios", _struct_list(name=pa.string(), num_samples=pa.int64())),
        ("tags", pa.list_(pa.string())),
        ("cause", pa.string()),
        ("message", pa.string()),
    ]
)


class Row(TypedDict):
    """One row of an index file. `digest` (of the member bytes that were read) is for the fingerprint only."""

    key: str
    members: list[dict]
    images: list[dict]
    audios: list[dict]
    digest: str
    tags: list[str]
    cause: str | None
    message: str | None


def measure_rows(
    path: str, groups: list[Group], layout: str, limits: LimitsConfig, tags: tuple[str, ...] = ()
) -> list[Row]:
    """Returns an index row for each group, after decoding all of its media; `tags` are added to its own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [_measure(descriptor, group, layout, limits, tags) for group in groups]
    finally:
        os.close(descriptor)


def _measure(descriptor: int, group: Group, layout: str, limits: LimitsConfig, tags: tuple[str, ...]) -> Row:
    row = _row(group)
    content = hashlib.sha256()
    most = 2 * max(limits.text_bytes, limits.image_bytes, limits.audio_bytes)  # media may stand in the json

    def read(name: str) -> bytes:
        offset, size = group.members[name]
        if size > most:
            raise SampleError(
                f"{name} has {size} bytes, more than data.limits allows", cause="text_too_large"
            )
        data = os.pread(descriptor, size, offset)
        content.update(data)
        return data

    try:
        _fill(row, read, group, layout, limits, tags)
    except SampleError as error:
        row["cause"], row["message"] = writable(error.cause), writable(str(error))[:MESSAGE_CHARS]
    except OSError:
        raise  # the disk's affair: decoders' errors come as SampleError
    except MemoryError as error:
        advice = "Use fewer --workers, or lower one of --limit."
        raise RuntimeError(f"{group.key}: memory ran out at this sample. {advice}") from error
    except Exception as error:
        # The sample border: whatever hostile bytes provoke must not end the indexing.
        message = writable(f"{type(error).__name__}: {error}")
        row["cause"], row["message"] = "unexpected", message[:MESSAGE_CHARS]
    row["digest"] = content.hexdigest()
    return row


def _row(group: Group) -> Row:
    members = [{"name": name, "offset": at, "size": size} for name, (at, size) in group.members.items()]
    return Row(
        key=group.key, members=members, images=[], audios=[], digest="", tags=[], cause=None, message=None
    )


def _fill(
    row: Row, read: ReadMember, group: Group, layout: str, limits: LimitsConfig, tags: tuple[str, ...]
) -> None:
    if group.cause:
        raise SampleError(group.message, cause=group.cause)
    sample = parse_members(layout, group.key, group.members, read)
    row["tags"] = list(dict.fromkeys(sample.tags + tags))
    parts = [part for message in sample.messages for part in message.parts]
    media = {part.media: part for part in parts if part.kind != "text"}
    if len(media) > limits.parts:
        raise SampleError(
            f"{len(media)} media, more than data.limits.parts={limits.parts}", cause="too_many_parts"
        )
    for name, part in media.items():
        if name in group.members:
            _check_bytes(name, part.kind, group.members[name][1], limits)
        data = sample.media[name] if name in sample.media else read(name)
        _measure_media(row, sample, part, data, limits)


def _check_bytes(name: str, kind: str, size: int, limits: LimitsConfig) -> None:
    """Refuses a medium before it is read into memory."""
    most = limits.image_bytes if kind == "image" else limits.audio_bytes
    if size > most:
        raise SampleError(
            f"{name}: it has {size} bytes, more than data.limits.{kind}_bytes={most}",
            cause=f"{kind}_too_large",
        )


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


def index_path(shard: str) -> str:
    """Returns where the index of a tar lies."""
    return shard[: -len(".tar")] + INDEX_SUFFIX


def digest_of_ends(shard: str) -> str:
    """Returns a hash of the first and last 64 KiB of a tar."""
    digest = hashlib.sha256()
    with open(shard, "rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(os.fstat(file.fileno()).st_size - END_BYTES, 0))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def asked(format: str, limits: LimitsConfig, tags: tuple[str, ...]) -> dict:
    """Returns the part of an index's footer that says what was asked for."""
    return {"format": format, "limits": asdict(limits), "tags": list(tags)}


Mapper = Callable[[Callable, list], Iterable]


def build_index(
    shard: str,
    format: str,
    limits: LimitsConfig,
    mapper: Mapper = map,
    progress: Callable[[float], object] = lambda share: None,
    tags: tuple[str, ...] = (),
) -> None:
    """Decodes all of a shard once and writes its index beside it, whole or not at all.

    Args:
        shard: path of the tar.
        format: layout of its members, one of `LAYOUTS`.
        limits: what one sample may ask.
        mapper: `map`, or that of a process pool.
        progress: called with the share of the shard that was just done.
        tags: given to every sample, beside its own.
    """
    before, ends = os.stat(shard), digest_of_ends(shard)
    groups = scan_shard(shard, limits)
    tasks = [groups[start : start + ROWS_PER_TASK] for start in range(0, len(groups), ROWS_PER_TASK)]
    rows: list[Row] = []
    for measured in mapper(partial(measure_rows, shard, layout=format, limits=limits, tags=tags), tasks):
        rows += measured
        progress(len(measured) / len(groups))
    footer = {
        "version": INDEX_VERSION,
        **asked(format, limits, tags),
        "num_bytes": before.st_size,
        "mtime_ns": before.st_mtime_ns,
        "ends": ends,
        "fingerprint": _fingerprint(format, rows),
    }
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"shard": json.dumps(footer)}))
    _write(table, index_path(shard), before.st_mode & 0o666)


def _write(table: pa.Table, path: str, mode: int) -> None:
    try:
        _write_whole(table, path, mode)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise RuntimeError(
            f"{path}: cannot be written ({reason}). Free some space, or get the right to write there, "
            f"and run again: what is indexed already stays."
        ) from error


def _write_whole(table: pa.Table, path: str, mode: int) -> None:
    # A name of its own, so that two processes that index the same shard do not collide.
    descriptor, unfinished = tempfile.mkstemp(
        prefix=f"{os.path.basename(path)}.", suffix=".part", dir=os.path.dirname(path) or "."
    )
    os.close(descriptor)
    try:
        pq.write_table(table, unfinished, compression="zstd", write_page_checksum=True)
        os.chmod(unfinished, mode)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _fingerprint(format: str, rows: list[Row]) -> str:
    # Messages are left out: they may quote a library, and another version words them otherwise.
    digest = hashlib.sha256(format.encode())
    for row in rows:
        digest.update(json.dumps({**row, "message": None}, sort_keys=True).encode())
    return digest.hexdigest()


def index_shards(
    shards: list[str], format: str, limits: LimitsConfig, workers: int, tags: tuple[str, ...] = ()
) -> None:
    """Builds the index of every shard in `workers` processes, with a progress bar."""
    sizes = [os.path.getsize(shard) for shard in shards]
    with (
        _process_map(workers) as mapper,
        tqdm(desc="checking", total=sum(sizes), unit="B", unit_scale=True) as bar,
    ):
        for number, (shard, size) in enumerate(zip(shards, sizes), start=1):
            bar.set_postfix_str(f"shard {number} of {len(shards)}")
            build_index(
                shard, format, limits, mapper, lambda share, size=size: bar.update(share * size), tags
            )


@contextmanager
def _process_map(workers: int) -> Iterator[Mapper]:
    if workers <= 1:
        yield map
        return
    pool = MeasuringPool(workers)
    try:
        yield pool.map
    finally:
        pool.close()


class MeasuringPool:
    """Processes that measure rows. One that dies of a sample, in a codec, costs that sample alone."""

    def __init__(self, workers: int):
        self._workers = workers
        self._start(workers)

    def _start(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def map(
        self, measure: Callable[[list[Group]], list[Row]], tasks: list[list[Group]]
    ) -> Iterator[list[Row]]:
        """Yields the rows of every task; after a death, those of the groups that are left one by one."""
        num_done = 0
        try:
            for rows in self._pool.map(measure, tasks):
                num_done += 1
                yield rows
        except BrokenProcessPool:
            self._start_one(measure)
            for task in tasks[num_done:]:
                yield [row for group in task for row in self._measure_alone(measure, group)]
            self.close()
            self._start(self._workers)

    def _start_one(self, measure: Callable[[list[Group]], list[Row]]) -> None:
        self._start(1)
        try:
            self._pool.submit(measure, []).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "--workers: a process dies before it has decoded anything. Look whether memory ran out."
            ) from error

    def _measure_alone(self, measure: Callable[[list[Group]], list[Row]], group: Group) -> list[Row]:
        try:
            return self._pool.submit(measure, [group]).result()
        except BrokenProcessPool:
            self._start_one(measure)
            row = _row(group)
            message = "the process that decoded it died, in a codec or for lack of memory"
            row["cause"], row["message"] = "decoder_died", message
            return [row]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)
