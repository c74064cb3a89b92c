"""Side index of tar shards: where every sample's members are, how large its media are, what is wrong.

Every `shard-000000.tar` has a `shard-000000.index.parquet` beside it. Raw sizes are kept, not
token counts, so that another tokenizer or slicing needs no new index.

    python -m data.index DIR --format caption
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.config import LimitsConfig
from data.layouts import LAYOUTS
from data.sample import MediaSize
from data.scan import Row, measure_rows, scan_shard

INDEX_VERSION = 1
"""Raised when the columns or their meaning change; other versions must be indexed again."""

UNFINISHED = ".unfinished"
"""File that marks a folder of shards as not whole yet."""

SUFFIX = ".index.parquet"
ROWS_PER_TASK = 32


def _struct_list(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([pa.field(name, kind) for name, kind in fields.items()]))


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("members", _struct_list(name=pa.string(), offset=pa.int64(), size=pa.int64())),
        ("images", _struct_list(name=pa.string(), width=pa.int32(), height=pa.int32())),
        ("audios", _struct_list(name=pa.string(), num_samples=pa.int64())),
        ("text_chars", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("cause", pa.string()),
        ("message", pa.string()),
    ]
)


class _StructLists:
    """A column of lists of structs: a name and whole numbers each."""

    def __init__(self, column: pa.ChunkedArray, *numbers: str):
        lists = column.combine_chunks()
        self._starts = lists.offsets.to_numpy()
        self._names = lists.values.field("name")
        self._numbers = [lists.values.field(name).to_numpy() for name in numbers]

    def items(self, row: int) -> Iterator[tuple]:
        """Yields (name, number, ...) of every struct of a row."""
        for place in range(self._starts[row], self._starts[row + 1]):
            yield self._names[place].as_py(), *(int(numbers[place]) for numbers in self._numbers)


class ShardIndex:
    """The index of one shard. Only the footer is read at first; columns come when asked for.

    Attributes: `path` and `name` of the tar, `num_rows`, `format` (layout of its members),
    `num_bytes` of the tar, `fingerprint` (hash of the rows).
    """

    def __init__(self, path: str):
        self.path = path
        self.name = os.path.basename(path)
        footer = _read_footer(path)
        self.num_rows: int = footer["num_rows"]
        self.format: str = footer["format"]
        self.num_bytes: int = footer["num_bytes"]
        self.fingerprint: str = footer["fingerprint"]

    def __getstate__(self) -> dict:
        """Leaves the columns behind: a worker reads those of the shards that it touches."""
        kept = ("path", "name", "num_rows", "format", "num_bytes", "fingerprint")
        return {name: self.__dict__[name] for name in kept}

    @cached_property
    def _table(self) -> pa.Table:
        table = pq.read_table(index_path(self.path), partitioning=None)
        footer = json.loads((table.schema.metadata or {}).get(b"shard", b"{}"))
        if footer.get("fingerprint") != self.fingerprint:
            raise RuntimeError(f"{index_path(self.path)}: has changed while in use. Start the run again.")
        return table

    @cached_property
    def _members(self) -> _StructLists:
        return _StructLists(self._table.column("members"), "offset", "size")

    @cached_property
    def _images(self) -> _StructLists:
        return _StructLists(self._table.column("images"), "width", "height")

    @cached_property
    def _audios(self) -> _StructLists:
        return _StructLists(self._table.column("audios"), "num_samples")

    @cached_property
    def keys(self) -> list[str]:
        """Keys of all rows."""
        return self._table.column("key").to_pylist()

    @cached_property
    def text_chars(self) -> np.ndarray:
        """Characters of text. Shapes: int64 [num_rows]."""
        return self._table.column("text_chars").to_numpy()

    @cached_property
    def errors(self) -> dict[int, tuple[str, str]]:
        """Cause and message of every quarantined row."""
        bad = np.flatnonzero(self._table.column("cause").is_valid().to_numpy())
        found = self._table.select(["cause", "message"]).take(bad).to_pydict()
        return dict(zip(bad.tolist(), zip(found["cause"], found["message"])))

    def tags(self, row: int) -> tuple[str, ...]:
        """Tags of a row."""
        return tuple(self._table.column("tags")[row].as_py())

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of every member of a row, by part name."""
        return {name: (offset, size) for name, offset, size in self._members.items(row)}

    def sizes(self, row: int) -> dict[str, MediaSize]:
        """Sizes of every picture and recording of a row, by the name it has in `Sample.media`."""
        found = {
            name: MediaSize("image", width=width, height=height)
            for name, width, height in self._images.items(row)
        }
        for name, num_samples in self._audios.items(row):
            found[name] = MediaSize("audio", num_samples=num_samples)
        return found

    def totals(self) -> tuple[int, int]:
        """Pictures, and samples of audio at 16 kHz, of all rows that are not quarantined."""
        good = self._table.filter(self._table.column("cause").is_null())
        images = pa.compute.list_flatten(good.column("images"))
        audios = pa.compute.list_flatten(good.column("audios"))
        return len(images), sum(clip["num_samples"] for clip in audios.to_pylist())


class FolderIndex:
    """The shards of one folder and their indexes. Small to pickle."""

    def __init__(self, path: str, shards: list[ShardIndex]):
        self.path = path
        self.shards = shards
        self.format = shards[0].format

    @property
    def num_rows(self) -> int:
        """Rows of all shards, quarantined ones included."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hash of the content of all indexes; the same wherever the folder lies."""
        names = [[INDEX_VERSION, shard.name, shard.fingerprint] for shard in self.shards]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def load_folder(path: str) -> FolderIndex:
    """Returns the index of a folder of shards, having checked that every shard is there as indexed.

    Raises:
        ValueError: the folder is missing, empty or unfinished, or a shard has no valid index.
    """
    tars = list_shards(path)
    indexed = {name[: -len(SUFFIX)] for name in os.listdir(path) if name.endswith(SUFFIX)}
    missing = sorted(indexed - {os.path.basename(tar)[: -len(".tar")] for tar in tars})
    if missing:
        raise ValueError(
            f"{path}/{missing[0]}.tar: is indexed but not there. "
            f"Put it back, or remove {missing[0]}{SUFFIX}."
        )
    shards = [ShardIndex(tar) for tar in tars]
    for shard in shards:
        if shard.format != shards[0].format:
            raise ValueError(
                f"{shard.path}: is of format {shard.format}, others here of {shards[0].format}. "
                f"Give each format a folder of its own."
            )
    return FolderIndex(path, shards)


def list_shards(path: str) -> list[str]:
    """Returns the paths of a folder's tars, by name.

    Raises:
        ValueError: it is no folder of shards, or one that is not finished.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path}: there is no such folder. Make it with `python -m data.prepare`.")
    names = sorted(os.listdir(path))
    if UNFINISHED in names:
        raise ValueError(f"{path}: was not finished. Run `python -m data.prepare` again.")
    tars = [os.path.join(path, name) for name in names if name.endswith(".tar")]
    if not tars:
        raise ValueError(f"{path}: holds no .tar shards. Make some with `python -m data.prepare`.")
    return tars


def index_path(shard: str) -> str:
    """Returns where the index of a tar lies."""
    return shard[: -len(".tar")] + SUFFIX


def _read_footer(shard: str) -> dict:
    """Returns what the index says of its shard, checked against the shard's size."""
    advice = f"Run `python -m data.index {os.path.dirname(shard) or '.'}`"
    try:
        metadata = pq.read_metadata(index_path(shard))
        footer = json.loads((metadata.metadata or {})[b"shard"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{shard}: has no index. {advice} (with --format for shards made by others)."
        ) from error
    except (pa.ArrowInvalid, ValueError, KeyError) as error:
        raise ValueError(f"{index_path(shard)}: is no index of a shard ({error}). {advice}.") from error
    if footer["version"] != INDEX_VERSION:
        raise ValueError(f"{index_path(shard)}: is of index version {footer['version']}, not "
                         f"{INDEX_VERSION}. {advice}.")
    num_bytes = os.path.getsize(shard)
    if num_bytes != footer["num_bytes"]:
        raise ValueError(
            f"{shard}: has {num_bytes} bytes, but {footer['num_bytes']} when it was indexed. {advice}."
        )
    return {**footer, "num_rows": metadata.num_rows}


Mapper = Callable[[Callable, list], Iterator]


def build_index(
    shard: str,
    format: str,
    limits: LimitsConfig,
    mapper: Mapper = map,
    progress: Callable[[int], object] = lambda rows: None,
) -> None:
    """Decodes all of a shard once and writes its index beside it, whole or not at all.

    Args:
        shard: path of the tar.
        format: layout of its members, one of `LAYOUTS`.
        limits: what one sample may ask.
        mapper: `map`, or that of a process pool.
        progress: called with the number of rows done.
    """
    before = os.stat(shard)
    groups = scan_shard(shard, limits)
    tasks = [groups[start : start + ROWS_PER_TASK] for start in range(0, len(groups), ROWS_PER_TASK)]
    rows: list[Row] = []
    for measured in mapper(partial(measure_rows, shard, layout=format, limits=limits), tasks):
        rows += measured
        progress(len(measured))
    footer = {
        "version": INDEX_VERSION,
        "format": format,
        "num_bytes": before.st_size,
        "mtime_ns": before.st_mtime_ns,
        "fingerprint": _fingerprint(format, rows),
    }
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"shard": json.dumps(footer)}))
    unfinished = index_path(shard) + ".part"
    try:
        pq.write_table(table, unfinished, compression="zstd")
        os.replace(unfinished, index_path(shard))
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _fingerprint(format: str, rows: list[Row]) -> str:
    # Messages are left out: they may quote a library, and another version words them otherwise.
    digest = hashlib.sha256(format.encode())
    for row in rows:
        digest.update(json.dumps({**row, "message": None}, sort_keys=True).encode())
    return digest.hexdigest()


def index_shards(shards: list[str], format: str, limits: LimitsConfig, workers: int) -> None:
    """Builds the index of every shard in `workers` processes, with a progress bar.

    Raises:
        RuntimeError: a process died.
    """
    with process_map(workers) as mapper, tqdm(desc="checking", unit=" samples") as bar:
        for number, shard in enumerate(shards):
            bar.set_postfix_str(f"shard {number + 1} of {len(shards)}")
            build_index(shard, format, limits, mapper, bar.update)
