"""Makes the folder of demo data: a tokenizer, and indexed shards of every source for both splits.

A sample is decided by its source, split and number alone, so that any number of processes makes the
same bytes. Every source is written whole or not at all, and one that is there is kept: a build that
was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.config import LimitsConfig
from data.demo import pictures, signs, spoken, texts, words
from data.index import UNFINISHED, FolderIndex, load_folder, summarize
from data.sample import Sample
from data.scan import Mapper, build_index
from data.shard_index import ShardIndex
from data.shards import fill_folder, whole_folder

VERSION = 2
"""Counts up when the same options give other data."""

SAMPLES_PER_SHARD = 1000
SAMPLES_PER_TASK = 50
LEAST_SAMPLES = 4
FACTS = "demo.json"
"""File of a complete folder: version, options, counts."""
BEGUN = "demo.unfinished.json"
"""The same file before the folder is complete."""
PART = ".part"
TOKENIZER = "tokenizer/tokenizer.json"

Make = Callable[[np.random.Generator, bool], Sample]


class Source(NamedTuple):
    """How a source is made, its tag, and its samples for training and for evaluation."""

    make: Make
    tag: str
    train: int
    held_out: int


SOURCES = {
    "text": Source(texts.make_text, "text", 64_000, 200),
    "patches": Source(pictures.make_patches, "patch_labels", 6_000, 200),
    "scene": Source(pictures.make_caption, "caption", 6_000, 200),
    "vqa": Source(pictures.make_vqa, "vqa", 6_000, 200),
    "binding": Source(pictures.make_binding, "binding", 500, 200),
    "ocr": Source(pictures.make_ocr, "ocr", 7_000, 200),
    "chart": Source(pictures.make_chart, "chart", 3_000, 200),
    "asr_en": Source(spoken.make_asr_en, "asr", 3_500, 200),
    "asr_zh": Source(spoken.make_asr_zh, "asr", 2_500, 200),
    "spoken_question": Source(spoken.make_spoken_question, "spoken_question", 2_000, 200),
    "spoken_instruction": Source(spoken.make_spoken_instruction, "audio_sft", 900, 200),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the data: a font for Chinese signs, a command that speaks, the share of all counts."""

    font: str | None = None
    tts_command: str | None = None
    scale: float = 1.0

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, each line starting with its option."""
        found = []
        if not 0 < self.scale <= 1:
            found.append(f"--scale={self.scale}: must be above 0 and at most 1. Use 1, or 0.01 for a trial.")
        if self.font is not None and not Path(self.font).is_file():
            found.append(f"--font={self.font}: there is no such file. Name a .ttf, .ttc or .otf file.")
        return found

    @property
    def facts(self) -> dict:
        """What two builds must share to be the same."""
        font = self.font and hashlib.sha256(Path(self.font).read_bytes()).hexdigest()
        return {"version": VERSION, **asdict(self), "font": font, "samples": count_samples(self.scale)}


class Task(NamedTuple):
    """Samples `start` to `stop` of a source."""

    source: str
    held_out: bool
    start: int
    stop: int


def build(out: str, options: Options, workers: int) -> dict:
    """Fills the folder `out`, or goes on filling it; returns the facts in its `demo.json`.

    Raises:
        ValueError: an option is not possible, or `out` holds something else.
        RuntimeError: the disk is full, espeak-ng is not there, or a process died.
    """
    if problems := options.problems():
        raise ValueError("\n".join(problems))
    folder, facts = Path(out), options.facts
    if is_complete(out):
        _check_complete(folder, facts)
        return facts
    _begin(folder, facts)
    _write_whole(folder / TOKENIZER, words.make_tokenizer().to_str())
    _write_sources(folder, options, workers)
    (folder / BEGUN).rename(folder / FACTS)
    return facts


def is_complete(out: str) -> bool:
    """Returns whether a build of `out` came to its end."""
    return (Path(out) / FACTS).exists()


def _check_complete(folder: Path, facts: dict) -> None:
    _check_same(folder, FACTS, facts)
    try:
        for split, sources in facts["samples"].items():
            for source in sources:
                load_folder(str(folder / split / source))
    except ValueError as error:
        raise ValueError(f"OUT={folder}: is damaged ({error}) Remove it and run again.") from error


def _check_same(folder: Path, name: str, facts: dict) -> None:
    found = json.loads((folder / name).read_text())
    for key, value in facts.items():
        if found.get(key) != value:
            raise ValueError(
                f"OUT={folder}: was begun with {key}={found.get(key)}, not {value}. "
                "Remove it or choose another folder."
            )


def _begin(folder: Path, facts: dict) -> None:
    """Marks an empty folder as ours, or checks that it is and was begun with the same options."""
    if (folder / BEGUN).exists():
        _check_same(folder, BEGUN, facts)
        return
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {BEGUN + PART}):
        raise ValueError(f"OUT={folder}: already holds something. Remove it or choose another folder.")
    _write_whole(folder / BEGUN, json.dumps(facts, indent=2))


def _write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + PART)
    unfinished.write_text(text)
    unfinished.replace(path)


def count_samples(scale: float) -> dict[str, dict[str, int]]:
    """Returns how many samples each source has, by split."""

    def scaled(count: int) -> int:
        return max(LEAST_SAMPLES, round(count * scale))

    return {
        "train": {name: scaled(source.train) for name, source in SOURCES.items()},
        "held_out": {name: scaled(source.held_out) for name, source in SOURCES.items()},
    }


def _write_sources(folder: Path, options: Options, workers: int) -> None:
    counts = count_samples(options.scale)
    total = sum(sum(sources.values()) for sources in counts.values())
    with (
        _process_map(options, workers) as mapper,
        tqdm(desc="demo data", total=total, unit=" samples") as bar,
    ):
        for split, sources in counts.items():
            for source, count in sources.items():
                bar.set_postfix_str(f"{split}/{source}")
                _write_source(folder / split / source, source, split == "held_out", count, mapper, bar)


def _write_source(path: Path, source: str, held_out: bool, count: int, mapper: Mapper, bar: tqdm) -> None:
    if path.exists() and not (path / UNFINISHED).exists():
        bar.update(count)
        return
    starts = range(0, count, SAMPLES_PER_TASK)
    tasks = [Task(source, held_out, start, min(start + SAMPLES_PER_TASK, count)) for start in starts]
    with whole_folder(str(path)) as unfinished:
        made = _watched(mapper(make_samples, tasks), bar)
        shards = fill_folder(made, unfinished, SAMPLES_PER_SHARD)
        for shard in shards:
            build_index(shard, "native", LimitsConfig(), mapper)
        summary = summarize(FolderIndex(unfinished, [ShardIndex(shard) for shard in shards]))
        assert not summary["bad"], summary


def _watched(made: Iterable[list[Sample]], bar: tqdm) -> Iterator[Sample]:
    for samples in made:
        yield from samples
        bar.update(len(samples))


def make_samples(task: Task) -> list[Sample]:
    """Returns the samples of a task, complete with keys and tags."""
    return [make_sample(task.source, task.held_out, number) for number in range(task.start, task.stop)]


def make_sample(source: str, held_out: bool, number: int) -> Sample:
    """Returns one sample: the same in every process."""
    rng = np.random.default_rng([zlib.crc32(source.encode()), held_out, number])
    sample = SOURCES[source].make(rng, held_out)
    sample.key = f"{source}-{number:06d}"
    sample.tags = (SOURCES[source].tag,)
    return sample


@contextmanager
def _process_map(options: Options, workers: int) -> Iterator[Mapper]:
    _prepare_process(options)  # here as well: what is wrong with an option is said before any process starts
    if workers == 1:
        yield map
        return
    start = partial(_start_process, options)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"--workers={workers}: a process died, for lack of memory or in a codec. Use --workers 1."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_process(options: Options) -> None:
    signs.use_font(options.font)
    spoken.initialise(options.tts_command)


def _start_process(options: Options) -> None:
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _prepare_process(options)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed perhaps: a pool does not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a process of its own"
    wait([parent.sentinel])
    os._exit(1)
