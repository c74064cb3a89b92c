"""A run's folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `final/`, and who may write there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from train.compose import to_plain, to_yaml
from train.config import Resume, RunConfig

FREE = (
    "run",
    "resume",
    "parents",
    "zero",
    "train.micro_batch_packs",
    "train.max_skipped_steps",
    "train.on_spikes",
    "train.max_minutes",
    "train.hang_seconds",
    "optim.spike_factor",
    "data.max_bad_share",
    "data.workers",
    "data.prefetch",
    "data.timeout_seconds",
    "data.cache",
    "data.cache_gib",
    "eval",
    "checkpoint",
    "log",
    "model.recompute",
)
"""What may change when a run goes on: where, how fast and how patiently, not what is computed."""


LOCK_SECONDS = 30.0
"""How long a start waits for another process to leave its run: one that was killed may take a moment."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds a file's path to an OSError that does not say where, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class RunFolder:
    """Paths of a run and the rules for starting in it."""

    def __init__(self, config: RunConfig) -> None:
        self._lock: FileIO | None = None
        self.path = Path(config.run)
        self.config_file = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.spikes = self.path / "spikes"
        self.hangs = self.path / "hangs"
        self.samples = self.path / "samples.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.stage_file = self.final / "stage.json"

    @property
    def is_complete(self) -> bool:
        """Whether the stage has ended here before."""
        return self.stage_file.is_file()

    def check(self, config: RunConfig) -> None:
        """Raises ValueError where this run may not write here, naming every difference."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run={self.path}: is a file. Name a folder.")
        if config.resume is Resume.never and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"run={self.path}: not empty, and resume=never starts afresh in an empty folder only. "
                "Name another folder, or use resume=auto."
            )
        if not self.config_file.is_file():
            return
        found = differences(
            _comparable(OmegaConf.to_container(OmegaConf.load(self.config_file))),
            _comparable(to_plain(config)),
            FREE,
        )
        if found:
            raise ValueError(
                f"run={self.path}: holds another config. Name another folder, or take back:\n"
                + "\n".join(f"  {path}: {old} there, {new} now" for path, old, new in found)
            )

    def lock(self) -> None:
        """Keeps the run for this process until it ends, however it ends (main rank only).

        It tells nothing on file systems that know no locks.

        Raises:
            ValueError: another process trains there; names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a+b", buffering=0)
        if not take_lock(self._lock, LOCK_SECONDS):
            self._lock.seek(0)
            raise ValueError(
                f"run={self.path}: another start trains there ({self._lock.read().decode()}). "
                "End it, or name another folder."
            )
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"{socket.gethostname()}, process {os.getpid()}{f', job {job}' if job else ''}"
        with suppress(OSError):  # a full disk is told where it matters
            self._lock.truncate(0)
            self._lock.write(holder.encode())

    def create(self, config: RunConfig) -> None:
        """Makes the folder and writes `config.yaml` (main rank only)."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        partial = self.path / ".config.yaml.partial"
        with naming(partial):
            partial.write_text(to_yaml(config))
        partial.replace(self.config_file)

    def record_at(self, step: int) -> dict[str, Any] | None:
        """Returns the record of a step as `metrics.jsonl` has it; None where it has none."""
        if not self.metrics.is_file():
            return None
        for line in reversed(self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a crash cut it short
                continue
            if record["step"] == step:
                return record
        return None


def take_lock(
    file: IO[bytes] | FileIO, seconds: float = 0.0, stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Returns whether the lock of an open file could be had within some seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end or stopped():
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True


def _comparable(config: Any) -> dict[str, Any]:
    """Returns a config without the steps of other stages, and with one way to write a parent's folder."""
    steps = config["train"].get("stage_steps", {})
    own = {name: steps[name] for name in steps if name == config["stage"]}
    parent = config["init_from"] and str(Path(config["init_from"]).resolve())
    return config | {"train": config["train"] | {"stage_steps": own}, "init_from": parent}


def differences(old: Any, new: Any, free: tuple[str, ...], path: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (path, old value, new value) of all that two configs, as plain dicts, do not share.

    What lies at or below one of the paths `free` may differ.
    """
    if path in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            below = f"{path}.{key}" if path else str(key)
            found += differences(old.get(key), new.get(key), free, below)
        return found
    return [] if old == new else [(path, old, new)]
