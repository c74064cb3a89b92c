"""When a stage that crashed is started again: not after a mistake, and not for ever without progress."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from train.stopping import EXIT_STOPPED

EXIT_MISTAKE = 2
"""Exit status of what a person has to mend; another start would end the same way."""


@dataclass(slots=True)
class Restarts:
    """Counts the starts of a stage that crashed without leaving a newer checkpoint than they found."""

    allowed: int
    wasted: int = 0

    def allow(self, status: int, found_step: int, left_step: int) -> bool:
        """Returns whether a stage that ended with `status` is started again; never where none is allowed."""
        self.wasted = 0 if left_step > found_step else self.wasted + 1
        return status != EXIT_MISTAKE and 0 < self.allowed >= self.wasted


def newest_step(checkpoints: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0 where there is none."""
    return max((int(path.parent.name[5:]) for path in checkpoints.glob("step-*/manifest.json")), default=0)


def rank_status(code: int, output: list[str]) -> int:
    """Returns the exit status of the ranks, which a launcher reports in its output and hides behind a 1.

    A mistake counts even if others crashed because of it; a request to end only if all followed it.
    """
    statuses = [int(status) for line in output for status in re.findall(r"exitcode\s*: (-?\d+) \(pid", line)]
    if EXIT_MISTAKE in statuses:
        return EXIT_MISTAKE
    return EXIT_STOPPED if statuses and set(statuses) == {EXIT_STOPPED} else code
