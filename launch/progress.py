"""One line that tells where a pipeline stands, and about how long it will still take."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from launch.history import History
from launch.stages import Stage
from train.sinks import format_seconds

LINE_SECONDS = 15.0
"""How often a new line is printed where none can be rewritten, in a log for example."""

TAIL_BYTES = 1 << 18
"""How much of a metrics.jsonl is read: more than any line of it."""


class Progress:
    """Shows the standing of all stages: rewritten in place on a terminal, else a line now and then."""

    def __init__(self, stages: list[Stage], history: History, stream: TextIO | None = None) -> None:
        self._stages = stages
        self._history = history
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._shown_at = 0.0

    def show(self, stage: Stage) -> None:
        """Shows how far a running stage is, where that is due."""
        now = time.monotonic()
        if not self._rewrites and now - self._shown_at < LINE_SECONDS:
            return
        self._shown_at = now
        line = self._line(stage)
        self._stream.write(f"\r\x1b[K{line[: self._columns()]}" if self._rewrites else f"{line}\n")
        self._stream.flush()

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._stream.write(f"\r\x1b[K{line}\n" if self._rewrites else f"{line}\n")
        self._stream.flush()
        self._shown_at = time.monotonic()

    def head(self, stage: Stage) -> str:
        """Returns which of the stages this is."""
        return f"[{self._stages.index(stage) + 1}/{len(self._stages)}] {stage.name}"

    def _columns(self) -> int:
        return shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten

    def _line(self, stage: Stage) -> str:
        record = last_record(stage.folder.metrics)
        gone = sum(self._history.seconds.get(each.name, 0.0) for each in self._stages)
        parts = [self.head(stage), *_step_parts(stage, record), f"{format_seconds(gone)} gone"]
        return "  ".join([*parts, *self._left(stage, record)])

    def _left(self, stage: Stage, record: dict[str, Any] | None) -> list[str]:
        everything = self.seconds_left(stage, record)
        if everything is not None:
            return [f"about {format_seconds(everything)} left"]
        own = stage_seconds_left(stage, record) if record else None
        return [] if own is None else [f"about {format_seconds(own)} left in this stage"]

    def seconds_left(self, stage: Stage, record: dict[str, Any] | None) -> float | None:
        """Returns a guess at what all stages will still take; None while it cannot be made.

        Steps of coming stages are taken to last as long as those so far: of complete stages with their
        starts and evaluations, of this one without, as its few steps do not outweigh its start.
        """
        before = self._stages[: self._stages.index(stage)]
        own, *coming = [each.config.num_steps or math.nan for each in self._stages[len(before) :]]
        done = [each for each in before if self._history.seconds.get(each.name)]
        seconds = sum(self._history.seconds[each.name] for each in done)
        steps = sum((last_record(each.folder.metrics) or {}).get("step", 0) for each in done)
        if math.isnan(own + sum(coming)) or not (record or steps):
            return None
        step, pace = (record["step"], record["seconds_per_step"]) if record else (0, seconds / steps)
        return (own - step) * pace + sum(coming) * (seconds + step * pace) / (steps + step)


def stage_seconds_left(stage: Stage, record: dict[str, Any]) -> float | None:
    """Returns a guess at what the steps of one stage will still take; None while it cannot be made."""
    step, pace, total = record["step"], record["seconds_per_step"], stage.config.num_steps
    if total:
        return (total - step) * pace
    share = record["epoch"] / (stage.config.train.epochs or 1.0)
    return max(0.0, step * pace * (1 / share - 1)) if share else None


def _step_parts(stage: Stage, record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["starts"]
    total = stage.config.num_steps
    parts = [f"step {record['step']}" + (f"/{total}" if total else "")]
    parts += [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
    # The record of the last step is written after the evaluation: who waits must be told before.
    if total and total - record["step"] <= stage.config.log.every:
        parts.append("saves" if record["step"] == total else "then evaluates and saves")
    return parts


def last_record(metrics: Path) -> dict[str, Any] | None:
    """Returns the last whole line of a metrics.jsonl; None before there is one."""
    if not metrics.is_file():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is still being written
    return json.loads(lines[-1]) if lines else None
