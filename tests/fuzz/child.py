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
from tests.fuzz.laws import Loaded, load, memory, violations

ADDRESS_SPACE_BYTES = 3 * 2**30
"""What a case may reserve beyond what the process has when it starts."""

PEAK_BYTES = 256 * 2**20
"""What a case may use beyond what the process has when it starts. Its own data are below 1 MiB."""

WORKERS_EVERY = 49
"""One case in so many is loaded by two real worker processes: of every kind, having no divisor in common
with their number."""


def serve(connection: Connection, root: str, clean: dict[str, str], seed: int, log: str) -> None:
    """Answers each (kind, number) with an outcome and the laws that were broken, until None comes."""
    sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stderr
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    expected = load(clean).delivered
    _limit()
    usual = load(clean, workers=2).worker_bytes  # and the workers are under the limit too
    while (asked := connection.recv()) is not None:
        connection.send(run(*asked, Path(root), clean, seed, expected, usual))


def _limit() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE_BYTES, resource.RLIM_INFINITY))


def run(
    kind: str, number: int, root: Path, clean: dict[str, str], seed: int, expected: dict, usual: int
) -> tuple[str, str, list[str]]:
    """Returns what was done, what became of it and which laws were broken.

    `usual` is the peak of a worker that loads the clean sources.
    """
    folder = root / f"case{number}"
    folder.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, way = memory("VmRSS"), "?"
    found = Loaded()
    try:
        case = make_case(kind, random.Random(f"{seed}/{kind}/{number}"), clean, folder)
        way = f"{case.source} {case.way}"
        workers = 2 if number % WORKERS_EVERY == WORKERS_EVERY - 1 else 0
        load({**clean, case.source: case.path}, case, workers, found)
        broken, outcome = violations(case, expected, found), _outcome(case, found)
    except Exception:
        broken, outcome = [traceback.format_exc()], "crash"
    if (grown := max(memory("VmHWM") - before, found.worker_bytes - usual)) > PEAK_BYTES:
        broken.append(f"memory grew by {grown / 2**20:.0f} MiB")
    shutil.rmtree(folder)
    return way, outcome, broken


def _outcome(case: Case, found: Loaded) -> str:
    if found.refusal:
        return "refused"
    causes = sorted({entry.cause for entry in found.ledger})
    return ", ".join(causes) if causes else "delivered"
