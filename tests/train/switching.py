"""Switches of topology: runs that go on otherwise than they began, and how far their losses are apart."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.train.launching import ROOT, SMALL, Finished, launch

SWITCH_STEP, STEPS = 10, 30
BOUND = 1e-5
PAGE = ROOT / "docs" / "numerics.md"
HEAD = "| switch after step 10 | before | after | largest relative difference of a loss |"


@dataclass(frozen=True)
class Topology:
    """What may change when a run goes on."""

    zero: str
    ranks: int
    workers: int = 0
    micro_batch: int = 1

    @property
    def words(self) -> tuple[str, ...]:
        return (
            f"zero={self.zero}",
            f"data.workers={self.workers}",
            f"train.micro_batch_packs={self.micro_batch}",
        )

    def __str__(self) -> str:
        return (
            f"{self.zero}, ranks {self.ranks}, loader workers {self.workers}, micro-batch {self.micro_batch}"
        )


ALONE, PAIR, SPREAD = Topology("zero2", 1, 1), Topology("zero2", 2, 2), Topology("zero3", 2)
SWITCHES = {
    "none (bit-equal), one rank": (ALONE, ALONE),
    "none (bit-equal), ZeRO-2": (PAIR, PAIR),
    "none (bit-equal), ZeRO-3": (SPREAD, SPREAD),
    "ranks 1 to 2": (ALONE, Topology("zero2", 2, 1)),
    "ranks 2 to 1": (PAIR, Topology("zero2", 1, 2)),
    "ZeRO 2 to 3": (PAIR, Topology("zero3", 2, 2)),
    "ZeRO 3 to 2": (SPREAD, Topology("zero2", 2)),
    "ZeRO 3 to 1": (SPREAD, Topology("zero1", 2)),
    "loader workers 2 to 0": (PAIR, Topology("zero2", 2, 0)),
    "loader workers 1 to 3": (ALONE, Topology("zero2", 1, 3)),
    "micro-batch 1 to 2": (PAIR, Topology("zero2", 2, 2, 2)),
    "all at once": (SPREAD, Topology("none", 1, 2, 4)),
}


class Runs:
    """Uninterrupted runs, each made once, and the runs that go on from a checkpoint of theirs."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self._folder = folder
        self._words = (
            *SMALL,
            f"data.path={shards}",
            f"train.steps={STEPS}",
            "train.packs_per_step=4",
            "optim.lr=1e-3",
            f"checkpoint.every={SWITCH_STEP}",
            "checkpoint.keep=3",
        )
        self.whole = functools.cache(self._whole)

    def _whole(self, topology: Topology) -> Finished:
        folder = self._folder / f"whole-{len(list(self._folder.iterdir()))}"
        return launch(folder, *self._words, *topology.words, processes=topology.ranks)

    def switched(self, before: Topology, after: Topology) -> Finished:
        """Returns a run that `before` made as far as `SWITCH_STEP`, and `after` to the end."""
        whole = self.whole(before)
        folder = self._folder / f"switched-{len(list(self._folder.iterdir()))}"
        shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("final"))
        for later in (2 * SWITCH_STEP, STEPS):
            shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
        run = launch(folder, *self._words, *after.words, processes=after.ranks)
        assert f"Goes on after step {SWITCH_STEP}" in run.output
        return run


def difference(run: Finished, whole: Finished) -> float:
    """Returns the largest relative difference of a loss after the switch."""
    assert len(run.losses) == len(whole.losses) == STEPS
    pairs = list(zip(run.losses, whole.losses))[SWITCH_STEP:]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def write_table(differences: dict[str, float]) -> None:
    """Writes what was measured into the page."""
    lines = [HEAD, "|---|---|---|---:|"]
    for name, value in differences.items():
        before, after = SWITCHES[name]
        lines.append(f"| {name} | {before} | {after} | {value:.1e} |")
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(HEAD)
    stop = text.index("\n\n", start)
    PAGE.write_text(text[:start] + "\n".join(lines) + text[stop:], encoding="utf-8")


def read_table() -> dict[str, float]:
    """Returns the differences that the page tells."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(HEAD)
    rows = [line.split("|")[1:-1] for line in text[start : text.index("\n\n", start)].splitlines()[2:]]
    return {row[0].strip(): float(row[-1]) for row in rows}
