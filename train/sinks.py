"""Where log records go: always a JSON Lines file and the console, and Weights & Biases on request.

Only the main rank opens sinks. A record is a dict of numbers, texts and such dicts, as
`train.meters` makes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from train.config import LogConfig, WandbMode
from train.folder import naming

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records, one per log line."""

    def write(self, record: Record) -> None:
        """Keeps or shows one record."""

    def close(self) -> None:
        """Finishes; nothing may be written afterwards."""


@dataclass(frozen=True, slots=True)
class SinkRun:
    """What sinks need to know of the run. `step` is where it starts or goes on from."""

    folder: Path
    step: int
    total_steps: int
    log: LogConfig
    config: Record = field(default_factory=dict)


class JsonlSink:
    """Appends one line of strict JSON per record to `path`, flushed at once.

    On a resume at `step`, lines of later steps are dropped first (they will be written again), and
    with them a last line that a crash cut short.
    """

    def __init__(self, path: Path, step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_until(path, step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends the record."""
        with naming(self._path):
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`, and broken ones, from a JSON Lines file; atomic."""

    def stays(line: str) -> bool:
        try:
            return json.loads(line).get("step", 0) <= step
        except json.JSONDecodeError:
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    beside = path.with_name(path.name + ".part")
    with naming(beside):
        beside.write_text("".join(line + "\n" for line in lines if stays(line)), encoding="utf-8")
    os.replace(beside, path)


class ConsoleSink:
    """Shows a progress bar with the time left on a terminal, one plain line per record elsewhere."""

    def __init__(self, step: int, total_steps: int, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                initial=step, total=total_steps, unit="step", file=self._stream, dynamic_ncols=True
            )

    def write(self, record: Record) -> None:
        """Shows the record; one with a held-out loss also leaves a line above the bar."""
        if self._bar is None:
            print(format_line(record, self._total), file=self._stream, flush=True)
            return
        self._bar.set_postfix_str("  ".join(_shown_parts(record)), refresh=False)
        self._bar.update(record["step"] - self._bar.n)
        self._bar.refresh()  # update() alone leaves out what comes within a tenth of a second
        if "held_out" in record:
            self._bar.write(format_line(record, self._total), file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def format_line(record: Record, total_steps: int) -> str:
    """Returns a record as one line for people."""
    parts = [f"step {record['step']}/{total_steps}"]
    left = (total_steps - record["step"]) * record["seconds_per_step"]
    return "  ".join([*parts, *_shown_parts(record), f"eta {format_seconds(left)}"])


def _shown_parts(record: Record) -> list[str]:
    shown: dict[str, Callable[[Any], str]] = {
        "loss": lambda value: f"loss {value:.4f}",
        "lr": lambda value: f"lr {_highest(value):.3g}",
        "grad_norm": lambda value: f"grad {value:.3g}",
        "tokens_per_second": lambda value: f"{_thousands(value)} tok/s",
        "fill": lambda value: f"fill {value:.1%}",
        "mfu": lambda value: f"mfu {value:.1%}",
        "data_wait_share": lambda value: f"wait {value:.1%}",
        "memory_gib": lambda value: f"mem {value:.1f}G",
        "held_out": lambda value: f"held-out loss {_loss(value)}",
    }
    parts = [show(record[name]) for name, show in shown.items() if record.get(name) is not None]
    parts += [f"{name} not finite" for name in record.get("nonfinite", [])]
    for name in ("bad_samples", "skipped_steps"):
        if record.get(name):
            parts.append(f"{name.replace('_', ' ')} {record[name]}")
    return parts


def _highest(rate: float | dict[str, float]) -> float:
    """Returns the learning rate, or the highest of several modules."""
    return max(rate.values()) if isinstance(rate, dict) else rate


def _loss(held_out: Record) -> str:
    return "none" if held_out["loss"] is None else f"{held_out['loss']:.4f}"


def _thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """Returns a duration in its two largest units: `3m20s`, `2h05m`, `1d03h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hour}h{minute:02d}m"
    return f"{minute}m{second:02d}s" if minutes else f"{second}s"


def _jsonl(run: SinkRun) -> Sink:
    return JsonlSink(run.folder / "metrics.jsonl", run.step)


def _console(run: SinkRun) -> Sink:
    return ConsoleSink(run.step, run.total_steps)


def _wandb(run: SinkRun) -> Sink:
    # Imported only on request: it takes a second, and the other sinks need none of it.
    from train.wandb_sink import WandbSink

    return WandbSink(run.folder, run.log.wandb.value, run.log.wandb_project, run.config)


SINKS: dict[str, Callable[[SinkRun], Sink]] = {"jsonl": _jsonl, "console": _console, "wandb": _wandb}


def build_sinks(run: SinkRun) -> list[Sink]:
    """Returns the sinks of a run: file and console always, Weights & Biases unless `log.wandb` is off."""
    names = ["jsonl", "console"] + (["wandb"] if run.log.wandb is not WandbMode.off else [])
    return [SINKS[name](run) for name in names]
