"""The process that runs cases one after the other, under limits that its parent watches."""

import os
import random
import resource
import shutil
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.fuzz.cases import Case, make_case
from tests.fuzz.laws import Loaded, load, violations

ADDRESS_SPACE_BYTES = 3 * 2**30
"""What a case may reserve beyond what the process has when it starts."""

PEAK_BYTES = 256 * 2**20
"""What a case may use beyond what the process has when it starts. Its own data are below 1 MiB."""

WORKERS_EVERY = 50
"""One case in so many is loaded by two real worker processes."""


def serve(connection: Connection, root: str, clean: dict[str, str], seed: int, log: str) -> None:
    """Answers each (kind, number) with an outcome and the laws that were broken, until None comes."""
    sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stderr
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    expected = load(clean).delivered
    _limit()
    while (asked := connection.recv()) is not None:
        connection.send(run(*asked, Path(root), clean, seed, expected))


def _limit() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE_BYTES, resource.RLIM_INFINITY))


def run(
    kind: str, number: int, root: Path, clean: dict[str, str], seed: int, expected: dict
) -> tuple[str, str, list[str]]:
    """Returns what was done, what became of it and which laws were broken."""
    folder = root / f"case{number}"
    folder.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, way = _memory("VmRSS"), "?"
    try:
        case = make_case(kind, random.Random(f"{seed}/{kind}/{number}"), clean, folder)
        way = f"{case.source} {case.way}"
        workers = 2 if number % WORKERS_EVERY == WORKERS_EVERY - 1 else 0
        found = load({**clean, case.source: case.path}, case, workers)
        broken, outcome = violations(case, expected, found), _outcome(case, found)
    except Exception:
        broken, outcome = [traceback.format_exc()], "crash"
    if (grown := _memory("VmHWM") - before) > PEAK_BYTES:
        broken.append(f"memory grew by {grown / 2**20:.0f} MiB")
    shutil.rmtree(folder)
    return way, outcome, broken


def _outcome(case: Case, found: Loaded) -> str:
    if found.refusal:
        return "refused"
    causes = sorted({entry.cause for entry in found.ledger})
    return ", ".join(causes) if causes else "delivered"


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
