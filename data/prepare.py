"""Turns records and the files they name into indexed tar shards.

    python -m data.prepare records.jsonl --format megrez --out shards
    python -m data.prepare hf:NAME --format asr --map text=sentence --out shards

Every record gets a row: what cannot be used is kept with the cause, and left out of training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

from data.config import LimitsConfig
from data.formats import FORMATS
from data.hub import HUB, read_hub
from data.index import FolderIndex, describe, summarize
from data.layouts import Quarantined
from data.options import add_shared_options, positive, read_limits, read_map, read_tags
from data.records import Record, SampleMaker, count_records, find_files, read_records
from data.sample import Sample
from data.scan import index_shards
from data.shard_index import ShardIndex
from data.shards import SAMPLES_PER_SHARD, fill_folder, whole_folder

SPLIT = "train"


def prepare(options: argparse.Namespace) -> dict:
    """Writes and indexes the shards of `options`; returns the summary of `data.index`.

    Raises:
        ValueError: there are no records, none is usable, or `out` already holds something.
        RuntimeError: the disk is full, or a decoding process died.
    """
    limits = read_limits(options.limit)
    records = _hub_records(options) if options.sources[0].startswith(HUB) else _file_records(options)
    with whole_folder(options.out) as folder:
        shards = fill_folder(_samples(records, options, limits), folder, options.samples_per_shard)
        if not shards:
            raise ValueError(f"{options.sources[0]}: holds no records. Check the file.")
        index_shards(shards, "native", limits, options.workers)
        summary = summarize(FolderIndex(options.out, [ShardIndex(shard) for shard in shards]))
        if not summary["good"]:
            raise ValueError(f"{describe(summary)}\n{options.out}: nothing is usable. It was not written.")
    return summary


def _samples(
    records: Records, options: argparse.Namespace, limits: LimitsConfig
) -> Iterator[Sample | Quarantined]:
    maker = SampleMaker(options.format, read_tags(options.tags), limits)
    total = records.total or None
    with tqdm(desc="writing", total=total, unit=" records") as bar:
        for record, folder in records.each:
            yield maker.make(record, folder)
            bar.update()


class Records(NamedTuple):
    """Records, each with the folder that its media are in, and about how many there are."""

    each: Iterator[tuple[Record, str]]
    total: int = 0


def _file_records(options: argparse.Namespace) -> Records:
    if options.config or options.map or options.split != SPLIT:
        raise ValueError("--config, --split, --map: are for data sets. Write the source as hf:NAME.")
    files = [file for source in options.sources for file in find_files(source, options.format)]
    each = (
        (record, options.prefix or os.path.dirname(path) or ".")
        for path, name in files
        for record in read_records(path, name)
    )
    return Records(each, sum(count_records(path) for path, _ in files))


def _hub_records(options: argparse.Namespace) -> Records:
    columns = read_map(options.map)
    if wrong := [source for source in options.sources if not source.startswith(HUB)]:
        raise ValueError(f"{wrong[0]}: is a file, and others here are data sets. Prepare them one by one.")
    each = (
        (record, options.prefix or source[len(HUB) :])
        for source in options.sources
        for record in read_hub(source, options.config, options.split, columns)
    )
    return Records(each)


def main(arguments: list[str] | None = None) -> int:
    """Prepares what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turn records and the pictures and clips they name into indexed tar shards.",
        epilog="example: python -m data.prepare records.jsonl --format megrez --out shards/chat --tags chat",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help=".jsonl or .json files; for text also folders; hf:NAME or hf:FOLDER for a data set of the hub",
    )
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what a record looks like")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--prefix", help="folder that media paths start from (default: that of the file)")
    parser.add_argument("--config", help="of a data set: which configuration")
    parser.add_argument("--split", default=SPLIT, help=f"of a data set: which split (default: {SPLIT})")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="of a data set: take a field of the format from this column, such as text=sentence (repeatable)",
    )
    add_shared_options(parser)
    parser.add_argument("--samples-per-shard", type=positive, default=SAMPLES_PER_SHARD)
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes that decode")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    try:
        summary = prepare(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary) if options.json else describe(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
