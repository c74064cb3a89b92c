"""Requests to end a run early: SIGTERM, SIGUSR1 and a time limit. What stops on one rank stops on all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

EXIT_STOPPED = 75
"""Exit status of a run that was asked to end and may go on (sysexits' "try again later")."""

REASONS = ("SIGTERM", "SIGUSR1", "train.max_minutes")
"""What may ask a run to end, in the order of `StopRequests.flags`."""


class StopAsked(Exception):
    """A rank was asked to end while all were at what can be left. The message says by what."""


class StopRequests:
    """What asked this rank to end. Between ranks the flags travel in the one sum of every step.

    A signal while the run still loads ends the process at once: there is nothing to save. Once it trains
    (`training`), the step is finished and saved first.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.training = False
        self._limit_seconds = None if max_minutes is None else 60 * max_minutes
        self._asked: dict[str, bool] = dict.fromkeys(REASONS, False)

    def listen(self) -> None:
        """Takes the signals over."""
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._take)

    def _take(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        self._asked[name] = True
        if not self.training:
            # Not print: the signal may have come in the middle of one.
            os.write(1, f"asked to stop ({name}) before the first step; nothing to save.\n".encode())
            os._exit(EXIT_STOPPED)  # others may wait for this rank: leaving in order could take for ever

    def flags(self) -> list[float]:
        """Returns for each of `REASONS` whether it asks this rank to end."""
        if self._limit_seconds is not None:
            self._asked["train.max_minutes"] = seconds_since_start() >= self._limit_seconds
        return [float(self._asked[reason]) for reason in REASONS]

    def check(self, sum_over_ranks: Callable[[list[float]], list[float]]) -> None:
        """Raises StopAsked on all ranks if any of them was asked to end. Every rank must call it."""
        if reason := reason_of(sum_over_ranks(self.flags())):
            raise StopAsked(reason)


def reason_of(flags: list[float]) -> str:
    """Returns what asks to end, of flags summed over ranks; nothing if nothing does."""
    return " and ".join(reason for reason, count in zip(REASONS, flags) if count)


def seconds_since_start() -> float:
    """Returns how old this process is, so that a time limit counts imports and loading."""
    if not hasattr(time, "CLOCK_BOOTTIME"):  # not Linux
        return time.monotonic() - _IMPORTED
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks_at_start = int(fields[19])  # field 22 of proc(5): starttime; the name before it may hold anything
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_at_start / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()
