"""One stage as a process: started, told to end, and never left behind to fight with the next start.

The stage's log is its output, opened once and locked. A lock belongs to the open file, which every
process of the stage inherits as its output; so it is free again when the last of them has ended, even
those of a pipeline that was killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from train.folder import take_lock

PATIENCE_SECONDS = 40.0
"""How long processes of an earlier start may take to end. The launcher gives ranks 30 to save."""

GRACE_SECONDS = 1.0
"""How long they may take without a word about it."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when the one that started it is gone."""


class StageProcess:
    """A running stage whose output goes to `log`."""

    def __init__(self, command: list[str], log: BinaryIO) -> None:
        self._log = log
        self.start = log.tell()
        """Where in the log the output of this start begins, in bytes."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that a Ctrl-C reaches the pipeline alone, which passes it on
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
        )

    def poll(self) -> int | None:
        """Returns the exit status as a shell has it, or None while the stage runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def ask_to_end(self) -> None:
        """Sends SIGTERM: the ranks save after the step they are in, and end."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends every process of the stage at once. Ranks are in sessions of their own."""
        self._process.kill()
        kill_holders(Path(self._log.name))
        self._process.wait()

    def tail(self, num_lines: int = 30) -> list[str]:
        """Returns the last lines of this start's output; of a progress bar only what stayed."""
        with open(self._log.name, "rb") as file:
            file.seek(self.start)
            text = file.read().decode(errors="replace")
        return [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")][-num_lines:]


def _end_with_parent() -> Callable[[], None]:
    """Returns what a child runs first, so that it gets SIGTERM when the pipeline is gone, however it went."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def run() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before we had asked
            os._exit(1)

    return run


@contextmanager
def opened_log(
    path: Path, tell: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> Iterator[BinaryIO]:
    """Opens and locks a stage's log, when the last process of an earlier start has ended.

    Once `stopped` is true it waits no more: the log may then still be another's.

    Raises:
        RuntimeError: such processes live on and cannot be ended from here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        if not take_lock(log, GRACE_SECONDS):
            _outlive(log, path, tell, stopped)
        yield log


def _outlive(log: BinaryIO, path: Path, tell: Callable[[str], None], stopped: Callable[[], bool]) -> None:
    """Waits for processes of an earlier start: they were told to end and may be saving."""
    tell(f"{path}: processes of an earlier start still end. Waiting for them.")
    if take_lock(log, PATIENCE_SECONDS, stopped) or stopped():
        return
    kill_holders(path)
    if not take_lock(log, 10.0):
        raise RuntimeError(f"{path}: processes of an earlier start live on. End them and start again.")


def kill_holders(log: Path) -> None:
    """Kills the processes whose output is `log`. Only Linux tells which they are."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            same = os.path.samefile(folder / "fd" / "1", log)
        except OSError:  # it has ended, or is someone else's
            continue
        if same:
            with suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)


@contextmanager
def locked(runs: Path) -> Iterator[None]:
    """Holds a folder of runs for this command alone. Its stages do not inherit this lock.

    Raises:
        ValueError: another command works there.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".lock").open("a+b") as file:
        if not take_lock(file):
            file.seek(0)
            raise ValueError(
                f"{runs}: another command works there ({file.read().decode()}). "
                "Wait for it, or name another folder."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()}".encode())
        file.flush()
        yield
