"""Which samples a run takes: by tag, held-out share and use; and what is left out, by reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from data.config import DataConfig, Oversize, SourceConfig
from data.count_cache import MODALITIES, ShardCounts, count_folder
from data.encode import Encoder
from data.geometry import MediaConfig
from data.index import FolderIndex
from data.plan import SourceTable
from data.remote import load_source
from data.sample import Dropped
from data.shard_index import ShardIndex
from data.urls import shown

SAMPLES_PER_FRAME = 320
"""Waveform samples behind a frame of the audio encoder: two log-mel columns of 160."""

_REPEAT = re.compile(r"(?<=^[0-9a-f]{16})-[0-9]+$")
"""What our keys, hashes of a record, end with when the record comes again: it must share their fate."""

CostFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Work of samples from their tokens, patches and encoder frames."""


@dataclass(slots=True)
class Tables:
    """All that the planner and the loader need to know of the data of a run.

    `report` holds, per source, samples, tokens, supervised tokens, samples per modality, and how
    many samples were left out per reason. `digest` stands for the shards alone; `fingerprint`, for
    the planner, for the exact samples and lengths too.
    """

    tables: list[SourceTable] = field(default_factory=list)
    folders: dict[str, FolderIndex] = field(default_factory=dict)
    quarantined: list[Dropped] = field(default_factory=list)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of the content of all sources, wherever they lie."""
        content = {name: folder.digest for name, folder in self.folders.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of the shards, the samples taken of them, and their lengths."""
        content = hashlib.sha256(self.digest.encode())
        for table in self.tables:
            content.update(json.dumps([table.name, len(table)]).encode())
            for column in (table.shard, table.row, table.length):
                content.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return content.hexdigest()


@dataclass(slots=True)
class _Choice:
    """One source and how its rows are chosen. `held` says which share is taken: None is all.

    `tags` are those of the stage: samples with none of them are left to other stages.
    """

    name: str
    where: str
    source: SourceConfig
    folder: FolderIndex
    held: bool | None
    tags: list[str]
    excluded: Counter[str] = field(default_factory=Counter)


def build_tables(
    config: DataConfig,
    media: MediaConfig,
    encoder: Encoder,
    *,
    split: Literal["train", "held_out"],
    cost: CostFunction,
    takes: Callable[[str], bool],
    evaluates_all: bool = True,
) -> Tables:
    """Returns the samples of a split. Token counts are made now if they are not cached.

    `train` takes all training sources without their held-out share (`data.holdout`, by a hash of the
    key); `held_out` takes that share and the sources of `data.held_out`, these whatever `data.tags` are
    (unless `evaluates_all` is false): so every stage can be measured by the same. `takes` says whether
    samples of a modality are of use: under a frozen language model, text alone trains nothing.

    A source without any sample of the stage's tags is left out, as long as there are others.

    Raises:
        ValueError: a source is missing, damaged, or has no sample left.
    """
    tables, empty = Tables(), []
    for choice in _choices(config, split, evaluates_all):
        counts = count_folder(choice.folder, encoder, choice.where, config.cache)
        taken = [
            _select(config, choice, shard, counts[shard], takes, tables.quarantined)
            for shard in range(len(counts))
        ]
        choice.folder.keep(config.shuffle_shards)  # so many are read at a time; none has been yet
        table = _table(choice, counts, taken, cost, media.audio.sample_rate_hz)
        tables.folders[choice.name] = choice.folder
        tables.report[choice.name] = _report(choice, counts, taken)
        if len(table):
            tables.tables.append(table)
        elif not (choice.held and choice.name in config.sources):
            empty.append(choice)
    for choice in sorted(empty, key=_is_for_other_stages):
        if not tables.tables or not _is_for_other_stages(choice):
            raise ValueError(_nothing_left(choice))
    return tables


def _is_for_other_stages(choice: _Choice) -> bool:
    return bool(choice.tags) and not any(_has_tag(index, choice.tags).any() for index in choice.folder.shards)


def _choices(config: DataConfig, split: Literal["train", "held_out"], evaluates_all: bool) -> list[_Choice]:
    both = sorted(set(config.sources) & set(config.held_out))
    if both and config.holdout:
        raise ValueError(
            f"data.held_out.{both[0]}: is the name of a training source that holds out a share too. "
            "Choose another, or set data.holdout=0.0."
        )
    held = None if not config.holdout else split == "held_out"
    chosen = []
    if split == "train" or held:
        chosen += [
            _choice(name, f"data.sources.{name}", source, held, config.tags, config)
            for name, source in config.sources.items()
        ]
    if split == "held_out":
        chosen += [
            _choice(name, f"data.held_out.{name}", source, None, [] if evaluates_all else config.tags, config)
            for name, source in config.held_out.items()
        ]
        for choice in chosen:  # every sample once, whatever its share in training
            choice.source = replace(choice.source, weight=None, epochs=1.0)
    return chosen


def _choice(
    name: str, where: str, source: SourceConfig, held: bool | None, tags: list[str], config: DataConfig
) -> _Choice:
    try:
        return _Choice(name, where, source, load_source(source.path, config), held, tags)
    except ValueError as error:
        text = str(error).removeprefix(f"{shown(source.path)}: ")
        raise ValueError(f"{where}.path={shown(source.path)}: {text}") from error


def _select(
    config: DataConfig,
    choice: _Choice,
    shard: int,
    counts: ShardCounts,
    takes: Callable[[str], bool],
    quarantined: list[Dropped],
) -> np.ndarray:
    """Returns the rows of a shard that are taken, and notes what is not.

    Shapes: int64 [rows taken].
    """
    index = choice.folder.shards[shard]
    taken = np.ones(index.num_rows, dtype=bool)

    def exclude(reason: str, rows: np.ndarray) -> None:
        nonlocal taken
        choice.excluded[reason] += int((taken & rows).sum())
        taken &= ~rows

    for wanted in (choice.tags, choice.source.tags):
        if wanted:
            exclude("tags", ~_has_tag(index, wanted))
    if choice.held is not None:
        held = _is_held_out(index, config.holdout)
        exclude("not_held_out" if choice.held else "held_out", ~held if choice.held else held)
    for row, cause, message in zip(counts.bad.tolist(), counts.cause.tolist(), counts.message.tolist()):
        if taken[row]:
            _refuse_oversize(config, choice, index.keys[row], cause, message)
            choice.excluded[cause] += 1
            if cause == "oversize" and config.pack.oversize is Oversize.drop:
                continue  # dropped as asked: no bad sample
            quarantined.append(Dropped(choice.name, index.name, index.keys[row], cause, message))
    taken[counts.bad] = False
    for code, modality in enumerate(MODALITIES):
        if not takes(modality):
            exclude(f"{modality} (trains nothing)", counts.modality == code)
    return np.flatnonzero(taken)


def _refuse_oversize(config: DataConfig, choice: _Choice, key: str, cause: str, message: str) -> None:
    if cause == "oversize" and config.pack.oversize is Oversize.error:
        raise ValueError(
            f"data.pack.oversize=error: sample {choice.name}/{key} has {message}. "
            f"Or use data.pack.oversize=truncate or drop."
        )


def _has_tag(index: ShardIndex, wanted: list[str]) -> np.ndarray:
    chosen = set(wanted)
    return np.array([not chosen.isdisjoint(index.tags(row)) for row in range(index.num_rows)], dtype=bool)


def _is_held_out(index: ShardIndex, share: float) -> np.ndarray:
    """Returns which rows belong to the held-out share: by the key alone, so that it never changes."""
    keys = (_REPEAT.sub("", key) for key in index.keys) if index.format == "native" else index.keys
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.array([int.from_bytes(digest, "big") < share * 2**64 for digest in digests], dtype=bool)


def _table(
    choice: _Choice,
    counts: list[ShardCounts],
    taken: list[np.ndarray],
    cost: CostFunction,
    sample_rate_hz: int,
) -> SourceTable:
    columns = {
        name: np.concatenate([getattr(shard, name)[rows] for shard, rows in zip(counts, taken)])
        for name in ("length", "patches", "frames", "slices")
    }
    length, patches, frames = columns["length"], columns["patches"], columns["frames"]
    return SourceTable(
        name=choice.name,
        shard=np.repeat(np.arange(len(taken), dtype=np.int32), [len(rows) for rows in taken]),
        row=np.concatenate(taken).astype(np.int32),
        length=length,
        cost=np.asarray(cost(length, patches, frames), dtype=np.float64),
        slices=columns["slices"],
        audio_seconds=(frames * (SAMPLES_PER_FRAME / sample_rate_hz)).astype(np.float32),
        weight=choice.source.weight,
        epochs=choice.source.epochs,
    )


def _report(choice: _Choice, counts: list[ShardCounts], taken: list[np.ndarray]) -> dict[str, Any]:
    modality = Counter(
        MODALITIES[code] for shard, rows in zip(counts, taken) for code in shard.modality[rows].tolist()
    )
    return {
        "samples": sum(len(rows) for rows in taken),
        "tokens": sum(int(shard.length[rows].sum()) for shard, rows in zip(counts, taken)),
        "supervised": sum(int(shard.supervised[rows].sum()) for shard, rows in zip(counts, taken)),
        "modality": dict(modality.most_common()),
        "excluded": {reason: count for reason, count in choice.excluded.most_common() if count},
    }


def _nothing_left(choice: _Choice) -> str:
    """Returns why a source has no sample left, and what to do."""
    reasons = {reason: count for reason, count in choice.excluded.most_common() if count}
    if set(reasons) <= {"tags"}:
        shards = choice.folder.shards
        tags = {tag for shard in shards for row in range(shard.num_rows) for tag in shard.tags(row)}
        known = f"Known tags: {', '.join(sorted(tags)) or 'none'}"
        where, wanted = "data.tags", choice.tags
        if not wanted or not tags.isdisjoint(wanted):
            where, wanted = f"{choice.where}.tags", choice.source.tags
        return (
            f"{where}=[{', '.join(wanted)}]: no sample of source {choice.name!r} has "
            f"{'this tag' if len(wanted) == 1 else 'one of these tags'}. {known}. Use {where}=[] to take all."
        )
    named = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    return (
        f"{choice.where}.path={shown(choice.source.path)}: none of its {choice.folder.num_rows} samples is "
        f"left ({named}). Remove the source, or mend it."
    )
