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
from functools import lru_cache

from data.layouts import LAYOUTS
from data.media import SAMPLE_RATE_HZ
from data.options import add_shared_options, positive, read_limits, read_tags
from data.scan import INDEX_VERSION, asked, index_shards
from data.shard_cache import ShardCache
from data.shard_index import Columns, ShardIndex, is_current
from data.urls import INDEX_SUFFIX

UNFINISHED = ".unfinished"
"""File that marks a folder of shards as not whole yet."""

SHARDS_IN_MEMORY = 16
"""Shards of a folder whose columns a process keeps (3 MiB for 10,000 rows) unless the folder is told."""

NUM_NAMED = 3
"""How many bad samples a summary names."""


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
        load = lru_cache(shards)(Columns)
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


def _index(options: argparse.Namespace) -> dict:
    """Indexes what is not indexed yet; returns the summary of the folder."""
    limits, tags = read_limits(options.limit), read_tags(options.tags)
    wanted = asked(options.format, limits, tags)
    shards = list_shards(options.folder)
    stale = [shard for shard in shards if options.again or not is_current(shard, wanted)]
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
