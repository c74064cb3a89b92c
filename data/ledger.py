"""What happened to bad samples: every one by name, counted per source and cause.

The ledger stands beside the planner's state: that one is equal on all ranks, a ledger is what one
rank saw, and its state holds only what was dropped in a step. `merge` joins the ledgers of all ranks
at a save; the merged state is restored on rank 0 alone, so that sums over ranks stay right.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.sample import Dropped

JUDGED_FROM = 100
"""Samples below which the share of bad ones is judged as if so many had been delivered."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One bad sample. `step` is the global step it was dropped in; 0 means left out beforehand."""

    step: int
    source: str
    shard: str
    key: str
    cause: str
    message: str


class Ledger:
    """Bad samples of a run, and how many good ones were delivered beside them.

    `good` and `bad` count samples that came as far as a pack; quarantined ones are in `entries` alone.
    """

    def __init__(self):
        self.entries: list[Entry] = []
        self.good = 0
        self.bad = 0
        self._quarantined: set[tuple[str, str, str]] = set()

    def add(self, dropped: Dropped, step: int) -> None:
        """Enters a sample dropped in `step`, or quarantined before the run (step 0, entered once)."""
        identity = (dropped.source, dropped.shard, dropped.key)
        if step == 0:
            if identity in self._quarantined:
                return
            self._quarantined.add(identity)
        self.bad += step > 0
        self.entries.append(Entry(step, *identity, dropped.cause, dropped.message))

    def add_good(self, count: int) -> None:
        """Counts samples that were delivered whole."""
        self.good += count

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Bad samples per source and cause, quarantined ones included."""
        found: dict[str, Counter[str]] = {}
        for entry in self.entries:
            found.setdefault(entry.source, Counter())[entry.cause] += 1
        return {source: dict(causes.most_common()) for source, causes in sorted(found.items())}

    def check(self, max_bad_share: float, good: int | None = None, bad: int | None = None) -> None:
        """Stops a run that loses too much. `good` and `bad` are sums over ranks, else this ledger's own.

        Fewer than `JUDGED_FROM` delivered samples count as `JUDGED_FROM`, so that one bad sample in
        the first pack does not look like a catastrophe; a share of 0 stops at the first one.

        Raises:
            ValueError: the share of bad samples among the delivered ones exceeds `max_bad_share`.
        """
        num_bad = self.bad if bad is None else bad
        num_seen = num_bad + (self.good if good is None else good)
        if num_bad <= max_bad_share * max(num_seen, JUDGED_FROM):
            return
        causes = Counter(entry.cause for entry in self.entries if entry.step > 0)
        named = ", ".join(f"{cause} {count}" for cause, count in causes.most_common(5))
        raise ValueError(
            f"data.max_bad_share={max_bad_share}: {num_bad} of {num_seen} samples delivered so far were bad"
            f"{f' (here: {named})' if named else ''}. Mend the data named in the ledger, or raise the share."
        )

    def state(self) -> dict[str, Any]:
        """Returns what was delivered and dropped as JSON values.

        Quarantined samples are left out: there may be very many, and every start finds them again.
        """
        return {"good": self.good, "entries": [asdict(entry) for entry in self.entries if entry.step > 0]}

    def restore(self, state: dict[str, Any]) -> None:
        """Adds the content of `state`, which `state()` or a merge of several returned."""
        self.good += state["good"]
        for values in state["entries"]:
            entry = Entry(**values)
            self.add(Dropped(entry.source, entry.shard, entry.key, entry.cause, entry.message), entry.step)

    @classmethod
    def merge(cls, states: list[dict[str, Any]]) -> Ledger:
        """Returns one ledger of the states of all ranks, in order of steps."""
        merged = cls()
        for state in states:
            merged.restore(state)
        merged.entries.sort(key=lambda entry: entry.step)
        return merged

    def write(self, path: str | Path) -> None:
        """Writes one JSON line per bad sample, atomically."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as file:
            for entry in self.entries:
                file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        partial.replace(path)
