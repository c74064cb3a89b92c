"""Plans a run from the index alone: which samples share a pack, and which packs make a global step.

Every rank computes the same plan, whatever the number of ranks and workers: a weighted mixture of
sources, each shuffled by a seed, flows through a small buffer from which rows are filled exactly.
The whole state is a few kilobytes of JSON, so a run can go on from any step, on any machine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from typing import Any

import numpy as np

from data.config import PackConfig
from data.pack import Candidate, fill_row
from data.sample import Pack, SampleRef
from data.shuffle import shuffled_windows, windows_from

_BLOCK = 1024
"""Draws turned into Python objects at a time: enough to be fast, few enough not to be felt."""


@dataclass(slots=True)
class SourceTable:
    """What the planner knows of one source: a row per sample, sorted by shard and row.

    Without a weight the source is passed `epochs` times in one epoch of the mixture.

    Shapes: shard, row, length, slices int32 [n]; cost float64 [n]; audio_seconds float32 [n].
    """

    name: str
    shard: np.ndarray
    row: np.ndarray
    length: np.ndarray
    cost: np.ndarray
    slices: np.ndarray
    audio_seconds: np.ndarray
    weight: float | None = None
    epochs: float = 1.0

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The packs of one global step. `step` counts from 1; a last step is filled up with empty packs."""

    step: int
    packs: list[Pack]


class Planner:
    """Hands out the steps of a run, one after the other.

    Draw n comes from the source that is furthest behind its share of n draws. That needs no
    randomness, because every source is shuffled inside: no source is ever ahead by a whole sample,
    and the counts are exact at the end of a mixture epoch. One epoch of a mixture with explicit
    weights is as many draws as there are samples.

    Args:
        tables: the sources; their order breaks ties, so it is part of the plan.
        pack: length of a row, size of the buffer, budgets.
        packs_per_step: packs of a global step, over all ranks. Packs are the same for any number.
        seed: seed of all shuffling.
        shuffle_shards: shards whose samples are shuffled together.
        epochs: mixture epochs after which the run ends; None goes on forever.
        fingerprint: digest of what else decides the lengths (shards, tokenizer, template, media).

    Raises:
        ValueError: a source is empty or has a sample that fits no row; only some sources have a
            weight; a budget is below the mixture's mean; `epochs` ends before the first sample.
    """

    def __init__(
        self,
        tables: list[SourceTable],
        pack: PackConfig,
        packs_per_step: int,
        seed: int,
        shuffle_shards: int,
        epochs: float | None,
        fingerprint: str,
    ):
        if not tables:
            raise ValueError("data.sources: no source is left to draw from. Name at least one.")
        for table in tables:
            _check_table(table, pack.length)
        self._tables = tables
        self._pack = pack
        self._packs_per_step = packs_per_step
        self._seed = seed
        self._shuffle_shards = shuffle_shards
        shares = _shares(tables)
        weighted = tables[0].weight is not None
        self._epoch_draws = Fraction(sum(map(len, tables))) if weighted else sum(shares, Fraction(0))
        self._total = math.inf if epochs is None else _total_draws(epochs, self._epoch_draws)
        # Whole numbers in the same proportion, so that no rounding ever moves a draw.
        denominator = math.lcm(*(share.denominator for share in shares))
        self._shares = [int(share * denominator) for share in shares]
        self._whole = sum(self._shares)
        _check_budgets(tables, self._shares, pack)
        self._fingerprint = self._describe(fingerprint)
        self._start()

    def next_step(self) -> StepPlan | None:
        """Returns the next step with exactly `packs_per_step` packs, or None at the end of the run."""
        packs: list[Pack] = []
        while len(packs) < self._packs_per_step and (row := self._next_row()):
            packs.append(Pack(tuple(map(self._ref, row))))
        if not packs:
            return None
        self._step += 1
        packs.extend([Pack(())] * (self._packs_per_step - len(packs)))
        return StepPlan(self._step, packs)

    def num_steps(self) -> int | None:
        """Returns the number of steps of the whole run, exactly, by planning the rest of it dry.

        None for a run without end. Takes some seconds per million samples that are left.
        """
        if self._total == math.inf:
            return None
        rest = copy.copy(self)
        rest.restore(self.state())
        num_rows = 0
        while rest._next_row():
            num_rows += 1
        return self._step + math.ceil(num_rows / self._packs_per_step)

    @property
    def epoch(self) -> float:
        """Mixture epochs that were handed out in packs."""
        return float(sum(self._samples) / self._epoch_draws)

    def shards_ahead(self, sources: set[str]) -> list[tuple[str, int]]:
        """Returns (source, shard) of all that the plan reads next, in about this order.

        First what samples that wait in the buffer are in, then the window of every source, then the one
        after that, unless the run ends before.
        """
        waiting = [
            (table.name, int(table.shard[candidate.index]))
            for candidate in self._buffer
            if (table := self._tables[candidate.source]).name in sources
        ]
        windows: tuple[list[tuple[str, int]], ...] = ([], [])
        for number, table in enumerate(self._tables):
            if table.name in sources:
                for window, shards in zip(windows, self._windows_of(number)):
                    window += [(table.name, shard) for shard in shards]
        return list(dict.fromkeys(waiting + windows[0] + windows[1]))

    def _windows_of(self, number: int) -> list[list[int]]:
        """Returns the shards of a source's window and of the next one, worked out once a window."""
        table, draws = self._tables[number], self._draws_of[number]
        known = self._ahead[number]
        if known is None or draws >= known[0]:
            place = divmod(draws, len(table))
            windows = windows_from(table.name, table.shard, self._seed, self._shuffle_shards, *place)
            (current, left), (following, _) = next(windows), next(windows)
            is_last = self._total - self._draws <= left
            known = draws + left, [current, [] if is_last else following]
            self._ahead[number] = known
        return known[1]

    def state(self) -> dict[str, Any]:
        """Returns all that is needed to go on from here, as plain JSON, the same on every rank."""
        sources = {}
        for table, draws, samples, tokens in zip(self._tables, self._draws_of, self._samples, self._tokens):
            epoch, position = divmod(draws, len(table))
            sources[table.name] = {
                "epoch": epoch,
                "position": position,
                "draws": draws,
                "samples": samples,
                "tokens": tokens,
            }
        return {
            "step": self._step,
            "sources": sources,
            "buffer": [[waiting.source, waiting.index, waiting.epoch] for waiting in self._buffer],
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state()`.

        Raises:
            ValueError: the state is of another plan; the text names everything that changed.
        """
        _check_fingerprint(state["fingerprint"], self._fingerprint)
        sources = [state["sources"][table.name] for table in self._tables]
        self._start(
            step=state["step"],
            draws_of=[source["draws"] for source in sources],
            samples=[source["samples"] for source in sources],
            tokens=[source["tokens"] for source in sources],
        )
        self._buffer = [self._candidate(*reference) for reference in state["buffer"]]

    def _start(
        self,
        step: int = 0,
        draws_of: list[int] | None = None,
        samples: list[int] | None = None,
        tokens: list[int] | None = None,
    ) -> None:
        zeros = [0] * len(self._tables)
        self._step = step
        self._draws_of = draws_of or zeros.copy()
        self._draws = sum(self._draws_of)
        self._samples = samples or zeros.copy()
        self._tokens = tokens or zeros.copy()
        self._buffer: list[Candidate] = []
        self._ahead: list[tuple[int, list[list[int]]] | None] = [None] * len(self._tables)
        # What every source is owed, in samples / whole.
        self._owed = [
            share * self._draws - draws * self._whole for share, draws in zip(self._shares, self._draws_of)
        ]
        self._streams = [
            _stream(table, number, self._seed, self._shuffle_shards, *divmod(draws, len(table)))
            for number, (table, draws) in enumerate(zip(self._tables, self._draws_of))
        ]

    def _next_row(self) -> list[Candidate]:
        buffer = self._buffer
        while len(buffer) < self._pack.buffer and self._draws < self._total:
            buffer.append(self._draw())
        if not buffer:
            return []
        places = fill_row(buffer, self._pack.length, self._pack.max_slices, self._pack.max_audio_seconds)
        row = [buffer[place] for place in places]
        for place in reversed(places):
            del buffer[place]
        for taken in row:
            self._samples[taken.source] += 1
            self._tokens[taken.source] += taken.length
        return row

    def _draw(self) -> Candidate:
        owed = [debt + share for debt, share in zip(self._owed, self._shares)]
        source = owed.index(max(owed))
        owed[source] -= self._whole
        self._owed = owed
        self._draws += 1
        self._draws_of[source] += 1
        return next(self._streams[source])

    def _candidate(self, source: int, index: int, epoch: int) -> Candidate:
        table = self._tables[source]
        return Candidate(
            int(table.length[index]),
            int(table.slices[index]),
            float(table.audio_seconds[index]),
            source,
            index,
            epoch,
        )

    def _ref(self, taken: Candidate) -> SampleRef:
        table, index = self._tables[taken.source], taken.index
        return SampleRef(
            table.name,
            int(table.shard[index]),
            int(table.row[index]),
            taken.length,
            float(table.cost[index]),
            taken.epoch,
        )

    def _describe(self, fingerprint: str) -> dict[str, Any]:
        """Returns everything the order of packs depends on, by the name a person knows it by."""
        described: dict[str, Any] = {
            "seed": self._seed,
            "data.shuffle_shards": self._shuffle_shards,
            "data.pack.length": self._pack.length,
            "data.pack.buffer": self._pack.buffer,
            "data.pack.max_slices": self._pack.max_slices,
            "data.pack.max_audio_seconds": self._pack.max_audio_seconds,
            "data.sources": [table.name for table in self._tables],
        }
        for table in self._tables:
            where = f"data.sources.{table.name}"
            described[f"{where}.weight"] = table.weight
            described[f"{where}.epochs"] = table.epochs
            described[f"{where} (samples)"] = len(table)
            described[f"{where} (tokens)"] = int(table.length.sum(dtype=np.int64))
        described["data (shards, tokenizer, template, media)"] = fingerprint
        return described


def _stream(
    table: SourceTable, number: int, seed: int, shuffle_shards: int, epoch: int, position: int
) -> Iterator[Candidate]:
    """Yields the samples of a source forever, from any place in any epoch."""
    while True:
        for window in shuffled_windows(table.name, table.shard, seed, shuffle_shards, epoch, position):
            for start in range(0, len(window), _BLOCK):
                index = window[start : start + _BLOCK]
                columns = (table.length, table.slices, table.audio_seconds)
                values = (column[index].tolist() for column in columns)
                yield from map(Candidate, *values, repeat(number), index.tolist(), repeat(epoch))
        epoch, position = epoch + 1, 0


def _shares(tables: list[SourceTable]) -> list[Fraction]:
    """Returns in what proportion the sources are drawn, as exact as they were written."""
    unweighted = [table.name for table in tables if table.weight is None]
    if not unweighted:
        return [Fraction(str(table.weight)) for table in tables]
    if len(unweighted) < len(tables):
        raise ValueError(
            f"data.sources.{unweighted[0]}.weight=null: others have a weight. Give every source one, or none."
        )
    return [Fraction(str(table.epochs)) * len(table) for table in tables]


def _total_draws(epochs: float, epoch_draws: Fraction) -> int:
    total = round(Fraction(str(epochs)) * epoch_draws)
    if total < 1:
        raise ValueError(
            f"train.epochs={epochs}: ends before the first of {round(epoch_draws)} samples. Use 1 or more."
        )
    return total


def _check_table(table: SourceTable, length: int) -> None:
    where = f"data.sources.{table.name}"
    if not len(table):
        raise ValueError(f"{where}: no sample is left. Check its tags and its index, or remove the source.")
    worst = int(table.length.argmax())
    if table.length[worst] > length:
        raise ValueError(
            f"{where}: row {table.row[worst]} of shard {table.shard[worst]} has "
            f"{table.length[worst]} tokens, more than data.pack.length={length}. "
            f"Set data.pack.oversize to drop or truncate."
        )
    assert table.length.min() > 0, "a sample without tokens"
    assert (np.diff(table.shard) >= 0).all(), "shards out of order"


def _check_budgets(tables: list[SourceTable], shares: list[int], pack: PackConfig) -> None:
    """Refuses a budget that the mixture exceeds on average: samples would pile up and rows stay empty."""

    def mean(column: str) -> float:
        drawn = (share * float(getattr(table, column).mean()) for share, table in zip(shares, tables))
        return sum(drawn) / sum(shares)

    for name, column in (("max_slices", "slices"), ("max_audio_seconds", "audio_seconds")):
        budget = getattr(pack, name)
        if budget is None:
            continue
        per_pack = mean(column) * pack.length / mean("length")
        if budget < per_pack:
            raise ValueError(
                f"data.pack.{name}={budget}: below the mixture's mean of {per_pack:.1f} a pack, "
                f"so rows would stay empty. Use {math.ceil(1.3 * per_pack)} or more: 1.3 times the mean "
                "fills rows."
            )


def _check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    changed = [
        f"{where}={current.get(where)!r}: the saved run was planned with {saved.get(where)!r}."
        for where in dict.fromkeys([*saved, *current])
        if saved.get(where) != current.get(where)
    ]
    if changed:
        raise ValueError("\n".join([*changed, "Set it back to go on exactly, or start a new run."]))
