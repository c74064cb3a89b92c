"""Ends a rank that makes no progress: one that hangs alone, or waits for another that hangs or is gone.

A collective that waits for a lost rank cannot be ended from inside Python, so a thread of its own looks
on. It tells what the rank was at before it ends the process; the launcher then ends the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from data.loader import StepBatches

EXIT_HUNG = 70
"""Exit status of a rank that made no progress (sysexits' "internal software error")."""

REPORT_SECONDS = 20.0
"""How long the report may take: it may be the very disk or pipe it goes to that hangs."""


class Watchdog:
    """Looks on from the first step that is handed over until `stop`.

    Engine and loop give a sign before everything they do that may wait for others. Quiet time is counted
    in looks, not by the clock: a job that was suspended as a whole has not hung.
    """

    def __init__(self, seconds: float | None, rank: int, folder: Path) -> None:
        self.seconds = seconds
        self.rank = rank
        self.file = folder / f"rank-{rank:05d}.txt"
        self._work: StepBatches | None = None
        self._what = ""
        self._quiet_seconds = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def sign(self, what: str) -> None:
        """Says what this rank does next; it has made progress."""
        self._what = what
        self._quiet_seconds = 0.0

    def begin(self, work: StepBatches) -> None:
        """Says which step begins; the first one starts the watch."""
        first, self._work = self._work is None, work
        self.sign("beginning the step")
        if first and self.seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Looks on no longer."""
        self._stopped.set()
        if self._thread is not None:
            # Else it may be the last that holds a batch, and tensors freed while Python ends abort it.
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        assert self.seconds is not None
        look_seconds = min(self.seconds / 10, 5.0)
        while not self._stopped.wait(look_seconds):
            self._quiet_seconds += look_seconds
            if self._quiet_seconds >= self.seconds:
                report = threading.Thread(target=self._report, name="hang-report", daemon=True)
                report.start()
                report.join(REPORT_SECONDS)
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        self._write(sys.stderr)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:  # of several starts
            self._write(file)

    def _write(self, file: TextIO) -> None:
        assert self._work is not None
        head = f"rank {self.rank}, step {self._work.step}: no progress for {self._quiet_seconds:.0f} s in"
        names = [f"{info.source}/{info.key}" for batch in self._work.batches for info in batch.samples]
        file.write(
            f"{head} {self._what}. This rank ends; {self.file} keeps what follows.\n"
            f"{time.strftime('%F %T')}, samples of this rank: {' '.join(names) or 'none'}\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
