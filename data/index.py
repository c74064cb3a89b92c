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
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.layouts import LAYOUTS
from data.media import SAMPLE_RATE_HZ
from data.options import add_shared_options, positive, read_limits, read_tags
from data.sample import MediaSize
from data.scan import (
    INDEX_VERSION,
    SCHEMA,
    asked,
    digest_of_ends,
    index_path,
    index_shards,
)
from data.shard_cache import CachedShard, ShardCache
from data.urls import INDEX_SUFFIX

UNFINISHED = ".unfinished"
"""File that marks a folder of shards as not whole yet."""

_NUMBERS = {"members": ("offset", "size"), "images": ("width", "height"), "audios": ("num_samples",)}
"""Whole numbers in the columns of structs."""

MOST = 2**40
"""Above every number that an index may hold: bytes of a tar, or years of sound."""

SHARDS_IN_MEMORY = 16
"""Shards of a folder whose columns a process keeps (3 MiB for 10,000 rows) unless the folder is told."""

NUM_NAMED = 3
"""How many bad samples a summary names."""


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


class _Columns:
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
        return _StructLists(self.table.column("members"), *_NUMBERS["members"])

    @cached_property
    def images(self) -> _StructLists:
        return _StructLists(self.table.column("images"), *_NUMBERS["images"])

    @cached_property
    def audios(self) -> _StructLists:
        return _StructLists(self.table.column("audios"), *_NUMBERS["audios"])

    @cached_property
    def keys(self) -> list[str]:
        return self.table.column("key").to_pylist()

    @cached_property
    def errors(self) -> dict[int, tuple[str, str]]:
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
        self.load = lru_cache(1)(_Columns)

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
        self.load = lru_cache(1)(_Columns)

    @property
    def _columns(self) -> _Columns:
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


class FolderIndex:
    """The shards of one folder and their indexes. Small to pickle.

    The shards of a remote source lie in `cache`, or come there when they are opened. Columns of the
    `shards_in_memory` shards that were used last are kept, in each process.
    """

    def __init__(self, path: str, shards: list[ShardIndex], cache: ShardCache | None = None):
        self.path = path
        self.shards = shards
        self.cache = cache
        self.format = shards[0].format
        self.keep(SHARDS_IN_MEMORY)

    def __setstate__(self, state: dict) -> None:
        """Begins to keep columns anew."""
        self.__dict__ |= state
        self.keep(self.shards_in_memory)

    def keep(self, shards: int) -> None:
        """Drops all columns, and from now on those of all but `shards` shards."""
        self.shards_in_memory = shards
        load = lru_cache(shards)(_Columns)
        for shard in self.shards:
            shard.load = load

    def has(self, shard: int) -> bool:
        """Returns whether a shard can be opened at once."""
        return self.cache is None or self.cache.has(self.shards[shard].cached)

    def open(self, shard: int) -> int:
        """Returns a descriptor of a shard's tar, which is fetched if need be.

        Raises:
            FileNotFoundError: it is gone.
            Absent, RuntimeError: it cannot be fetched.
        """
        if self.cache is None:
            return os.open(self.shards[shard].path, os.O_RDONLY)
        return self.cache.open(self.shards[shard].cached)

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
    indexed = {name[: -len(INDEX_SUFFIX)] for name in os.listdir(path) if name.endswith(INDEX_SUFFIX)}
    missing = sorted(indexed - {os.path.basename(tar)[: -len(".tar")] for tar in tars})
    if missing:
        raise ValueError(
            f"{path}/{missing[0]}.tar: is indexed but not there. "
            f"Put it back, or remove {missing[0]}{INDEX_SUFFIX}."
        )
    shards = [ShardIndex(tar) for tar in tars]
    check_formats(shards)
    return FolderIndex(path, shards)


def check_formats(shards: list[ShardIndex]) -> None:
    """Raises ValueError where not all shards are of one format."""
    for shard in shards:
        if shard.format != shards[0].format:
            raise ValueError(
                f"{shard.url or shard.path}: is of format {shard.format}, others here of {shards[0].format}. "
                f"Give each format a folder of its own."
            )


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


def _is_current(shard: str, wanted: dict) -> bool:
    try:
        footer = _read_footer(shard)
        _check_shard(shard, footer)
    except ValueError:
        return False
    return {name: footer.get(name) for name in wanted} == wanted


def _index(options: argparse.Namespace) -> dict:
    """Indexes what is not indexed yet; returns the summary of the folder."""
    limits, tags = read_limits(options.limit), read_tags(options.tags)
    wanted = asked(options.format, limits, tags)
    shards = list_shards(options.folder)
    stale = [shard for shard in shards if options.again or not _is_current(shard, wanted)]
    if len(stale) < len(shards):
        kept = len(shards) - len(stale)
        print(f"{kept} of {len(shards)} shards are indexed already; --again does them anew.", file=sys.stderr)
    index_shards(stale, options.format, limits, options.workers, tags)
    return summarize(load_folder(options.folder))


def summarize(folder: FolderIndex) -> dict:
    """Returns what a folder holds, for people and programs: counts, causes, the first bad samples."""
    causes: Counter[str] = Counter()
    named: list[str] = []
    pictures = num_samples = 0
    for shard in folder.shards:
        totals = shard.totals()
        pictures, num_samples = pictures + totals[0], num_samples + totals[1]
        causes.update(cause for cause, _ in shard.errors.values())
        for row, (_, message) in list(shard.errors.items())[: NUM_NAMED - len(named)]:
            named.append(f"{os.path.basename(folder.path)}/{shard.name}/{shard.keys[row]}: {message}.")
    return {
        "path": folder.path,
        "format": folder.format,
        "samples": folder.num_rows,
        "good": folder.num_rows - causes.total(),
        "bad": dict(causes.most_common()),
        "first_bad": named,
        "pictures": pictures,
        "audio_hours": num_samples / SAMPLE_RATE_HZ / 3600,
        "shards": len(folder.shards),
        "bytes": sum(shard.num_bytes for shard in folder.shards),
    }


def describe(summary: dict) -> str:
    """Returns a summary as a few lines of text."""
    num_bad = summary["samples"] - summary["good"]
    lines = [
        f"{summary['path']}: {summary['samples']:,} samples, {summary['good']:,} good, {num_bad:,} bad",
        f"  {summary['pictures']:,} pictures, {summary['audio_hours']:.2f} h of audio, "
        f"{summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB",
    ]
    lines += [f"  bad: {cause} {count:,}" for cause, count in summary["bad"].items()]
    lines += [f"  {line}" for line in summary["first_bad"]]
    if num_bad:
        lines.append("  Bad samples are quarantined: they stay in the index and are left out of training.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Indexes a folder of shards made by others; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.index",
        description="Index the tar shards of a folder: decode everything once, and note sizes and errors.",
        epilog="example: python -m data.index /data/cc3m --format caption",
    )
    parser.add_argument("folder", help="folder of .tar shards")
    parser.add_argument("--format", default="native", choices=list(LAYOUTS), help="how members make a sample")
    add_shared_options(parser)
    parser.add_argument("--again", action="store_true", help="also index shards whose index is up to date")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes that decode")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    try:
        summary = _index(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary) if options.json else describe(summary))
    return 0 if summary["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
