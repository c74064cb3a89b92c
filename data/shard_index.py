"""The index of one shard: read as far as it is asked for, and checked.

Whatever a damaged or foreign file holds, it is refused here, with what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.layouts import LAYOUTS
from data.sample import MediaSize
from data.scan import INDEX_VERSION, SCHEMA, digest_of_ends, index_path
from data.shard_cache import CachedShard

_NUMBERS = {"members": ("offset", "size"), "images": ("width", "height"), "audios": ("num_samples",)}
"""Whole numbers in the columns of structs."""

MOST = 2**40
"""Above every number that an index may hold: bytes of a tar, or years of sound."""


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

    def numbers(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns each number of all structs of the rows where the mask `rows` is true."""
        chosen = np.repeat(rows, np.diff(self._starts))
        return [numbers[chosen] for numbers in self._numbers]


class Columns:
    """What stands in the rows of a shard's index."""

    def __init__(self, shard: ShardIndex):
        path = index_path(shard.path)
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            if _parse_footer(file.metadata).get("fingerprint") != shard.fingerprint:
                raise RuntimeError(f"{path}: has changed while in use. Start the run again.")
            self.table = file.read().cast(SCHEMA)
            _check_rows(self.table, shard.num_bytes)
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            advice = f"{_advice(shard.path)} --again`."
            if shard.url:
                version_note(Path(path)).unlink(missing_ok=True)  # so that it is fetched again
                advice = _ADVICE_FROM_AFAR
            raise RuntimeError(f"{path}: cannot be read ({_first_line(error)}). {advice}") from error

    @cached_property
    def members(self) -> _StructLists:
        """Names, offsets and sizes in bytes."""
        return _StructLists(self.table.column("members"), *_NUMBERS["members"])

    @cached_property
    def images(self) -> _StructLists:
        """Names, widths and heights in pixels."""
        return _StructLists(self.table.column("images"), *_NUMBERS["images"])

    @cached_property
    def audios(self) -> _StructLists:
        """Names and numbers of samples at 16 kHz."""
        return _StructLists(self.table.column("audios"), *_NUMBERS["audios"])

    @cached_property
    def keys(self) -> list[str]:
        """Keys of all rows."""
        return self.table.column("key").to_pylist()

    @cached_property
    def errors(self) -> dict[int, tuple[str, str]]:
        """Cause and message of every quarantined row."""
        bad = np.flatnonzero(self.table.column("cause").is_valid().to_numpy())
        found = self.table.select(["cause", "message"]).take(bad).to_pydict()
        return dict(zip(bad.tolist(), zip(found["cause"], found["message"])))


class ShardIndex:
    """The index of one shard. Only the footer is read at first; columns come when asked for.

    They go again when those of other shards of its folder are asked for. A remote shard has a `url`; its
    tar comes and goes at `path`, and only its index is there now.

    Attributes: `path` and `name` of the tar, `num_rows`, `format` (layout of its members),
    `num_bytes` of the tar, `fingerprint` (hash of the rows).
    """

    def __init__(self, path: str, url: str = ""):
        self.path = path
        self.url = url
        self.name = os.path.basename(path)
        footer = _read_footer(path, url)
        if not url:
            _check_shard(path, footer)
        self.num_rows: int = footer["num_rows"]
        self.format: str = footer["format"]
        self.num_bytes: int = footer["num_bytes"]
        self.fingerprint: str = footer["fingerprint"]
        self._mtime_ns: int = footer["mtime_ns"]
        self._ends: str = footer["ends"]
        self.load = lru_cache(1)(Columns)

    @property
    def cached(self) -> CachedShard:
        """What a cache must know of a remote shard."""
        return CachedShard(self.url, self.path, self.num_bytes, self._mtime_ns, self._ends)

    def __getstate__(self) -> dict:
        """Leaves the columns behind: a worker reads those of the shards that it touches."""
        return {name: value for name, value in self.__dict__.items() if name != "load"}

    def __setstate__(self, state: dict) -> None:
        """Has no columns yet."""
        self.__dict__ |= state
        self.load = lru_cache(1)(Columns)

    @property
    def _columns(self) -> Columns:
        return self.load(self)

    @property
    def keys(self) -> list[str]:
        """Keys of all rows."""
        return self._columns.keys

    @property
    def errors(self) -> dict[int, tuple[str, str]]:
        """Cause and message of every quarantined row."""
        return self._columns.errors

    def tags(self, row: int) -> tuple[str, ...]:
        """Tags of a row."""
        return tuple(self._columns.table.column("tags")[row].as_py())

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of every member of a row, by part name."""
        return {name: (offset, size) for name, offset, size in self._columns.members.items(row)}

    def sizes(self, row: int) -> dict[str, MediaSize]:
        """Sizes of every picture and recording of a row, by the name it has in `Sample.media`."""
        columns = self._columns
        found = {
            name: MediaSize("image", width=width, height=height)
            for name, width, height in columns.images.items(row)
        }
        for name, num_samples in columns.audios.items(row):
            found[name] = MediaSize("audio", num_samples=num_samples)
        return found

    def totals(self) -> tuple[int, int]:
        """Pictures, and samples of audio at 16 kHz, of all rows that are not quarantined."""
        columns = self._columns
        good = columns.table.column("cause").is_null().to_numpy()
        (widths, _), (num_samples,) = columns.images.numbers(good), columns.audios.numbers(good)
        return len(widths), int(num_samples.sum())


def _check_rows(table: pa.Table, num_bytes: int) -> None:
    """Refuses values that no indexing gives, whose use would end elsewhere and strangely.

    Raises:
        ValueError: there are such values.
    """
    table.validate(full=True)
    for name in ("key", "members", "images", "audios", "tags"):
        if any(array.null_count for array in _flattened(table.column(name).combine_chunks())):
            raise ValueError(f"a row has no {name}, or only a part")
    all_rows = np.ones(table.num_rows, dtype=bool)
    for name, fields in _NUMBERS.items():
        least = 0 if name == "members" else 1
        for values in _StructLists(table.column(name), *fields).numbers(all_rows):
            if len(values) and not least <= values.min() <= values.max() <= MOST:
                raise ValueError(f"{name} have numbers from {values.min()} to {values.max()}")
    offsets, sizes = _StructLists(table.column("members"), *_NUMBERS["members"]).numbers(all_rows)
    if np.any(sizes > num_bytes - offsets):
        raise ValueError("a member lies outside of the tar")


def _flattened(array: pa.Array) -> Iterator[pa.Array]:
    """Yields an array and all that are nested in it."""
    yield array
    if pa.types.is_list(array.type):
        yield from _flattened(array.values)
    elif pa.types.is_struct(array.type):
        for place in range(array.type.num_fields):
            yield from _flattened(array.field(place))


def _advice(shard: str) -> str:
    return f"Run `python -m data.index {os.path.dirname(shard) or '.'}"


_ADVICE_FROM_AFAR = (
    "Start the same command again, which fetches it again. If that does not help, run `python -m data.index` "
    "where the shards were made, and upload the indexes."
)


def version_note(index: Path) -> Path:
    """Returns where the version of a fetched index is noted; without the note it is fetched again."""
    return index.with_name(f".{index.name}.version")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _parse_footer(metadata: pq.FileMetaData) -> dict:
    """Returns what stands in a parquet file about its shard.

    Raises:
        ValueError: it is not what an index says.
    """
    footer = json.loads((metadata.metadata or {}).get(b"shard", b"null"))
    if not isinstance(footer, dict):
        raise ValueError("it says nothing of a shard")
    return footer


_FOOTER = {"format": str, "num_bytes": int, "mtime_ns": int, "ends": str, "fingerprint": str}
"""What a footer must hold beside its version."""


def _check_footer(footer: dict, columns: list[str]) -> None:
    for name, kind in _FOOTER.items():
        if not isinstance(footer.get(name), kind):
            raise ValueError(f"its {name} is missing or of the wrong kind")
    if footer["format"] not in LAYOUTS:
        raise ValueError(f"its format {footer['format'][:40]!r} is not known")
    if columns != SCHEMA.names:
        raise ValueError(f"its columns are {', '.join(columns)[:200]}")


def _read_footer(shard: str, url: str = "") -> dict:
    """Returns what the index says of its shard, which lies at `url` if it is remote."""
    advice = _ADVICE_FROM_AFAR.rstrip(".") if url else f"{_advice(shard)}`"
    try:
        metadata = pq.read_metadata(index_path(shard))
        footer = _parse_footer(metadata)
        if footer.get("version") == INDEX_VERSION:
            _check_footer(footer, metadata.schema.to_arrow_schema().names)
    except FileNotFoundError as error:
        raise ValueError(
            f"{shard}: has no index. {advice} (with --format for shards made by others)."
        ) from error
    except (pa.ArrowException, OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's affair; what is damaged comes without a number
        reason = _first_line(error)
        raise ValueError(f"{index_path(shard)}: is no index of a shard ({reason}). {advice}.") from error
    if footer.get("version") != INDEX_VERSION:
        raise ValueError(
            f"{index_path(shard)}: is of index version {footer.get('version')}, not {INDEX_VERSION}. "
            f"{advice}."
        )
    return {**footer, "num_rows": metadata.num_rows}


def _check_shard(shard: str, footer: dict) -> None:
    """Raises ValueError where a shard is not what its index says, by size, time and ends."""
    status = os.stat(shard)
    if status.st_size != footer["num_bytes"]:
        raise ValueError(
            f"{shard}: has {status.st_size} bytes, but {footer['num_bytes']} when it was indexed. "
            f"{_advice(shard)}`."
        )
    # A copy has another time and the same content.
    if status.st_mtime_ns != footer["mtime_ns"] and digest_of_ends(shard) != footer["ends"]:
        raise ValueError(f"{shard}: has other content than when it was indexed. {_advice(shard)}`.")


def is_current(shard: str, wanted: dict) -> bool:
    """Returns whether a shard is there as indexed, and indexed as `wanted`."""
    try:
        footer = _read_footer(shard)
        _check_shard(shard, footer)
    except ValueError:
        return False
    return {name: footer.get(name) for name in wanted} == wanted
