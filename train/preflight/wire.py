"""What lies between the nodes: clocks side by side, and an all-reduce that is checked and timed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

Result = TypeVar("Result")

ROUNDS = 5
"""How often the all-reduce is timed; the fastest counts."""


@dataclass(slots=True)
class Wire:
    """What one rank measured. `fault` says what failed here; else the rest is known.

    `seconds` is the time of one all-reduce; `clock_seconds` how far this clock is ahead of the first
    rank's, up to the time that a small collective takes.
    """

    fault: str | None = None
    seconds: float = 0.0
    clock_seconds: float = 0.0


def gigabytes_per_second(size_mib: float, seconds: float, world_size: int) -> float:
    """Returns the bus bandwidth: what each rank sends in a ring all-reduce, over its time."""
    return 2 * (world_size - 1) / world_size * size_mib * 2**20 / seconds / 1e9


def bounded(work: Callable[[], Result], seconds: float) -> Result:
    """Returns what `work` returns, or raises what it raises, within some seconds.

    Neither a collective of a GPU nor a connection to a stranger can be interrupted, so they get a thread
    that may be left behind.

    Raises:
        TimeoutError: it takes longer.
    """
    found: list[Result | Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # it is raised where the result is waited for
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"does not end within {seconds:.0f} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def measure(store: Store, rank: int, world_size: int, size_mib: float, seconds: float) -> Wire:
    """Measures with all other ranks; what fails, or hangs for some seconds, is the result's `fault`."""
    try:
        return bounded(lambda: _measure(store, rank, world_size, size_mib, seconds), seconds)
    except TimeoutError as error:
        return Wire(fault=f"the all-reduce {error}. See whether its network is up.")
    except Exception as error:  # whatever a library raises is this rank's fault to report
        return Wire(fault=f"the all-reduce fails: {str(error).splitlines()[0].rstrip('.')}.")


def _measure(store: Store, rank: int, world_size: int, size_mib: float, seconds: float) -> Wire:
    cuda = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("wire", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    clock = _clock(rank, world_size)
    values = torch.empty(int(size_mib * 2**18), device=device)
    times = [_reduce(values, rank, world_size) for _ in range(1 + ROUNDS)]
    expected = world_size * (world_size + 1) / 2
    wrong = int((values != expected).sum())
    fault = f"{wrong} of {values.numel()} sums of the all-reduce are wrong here." if wrong else None
    return Wire(fault, min(times[1:]), clock)


def _clock(rank: int, world_size: int) -> float:
    """Returns how far this clock is ahead of the first rank's, from the fastest of some barriers."""
    best = (float("inf"), 0.0)
    for _ in range(ROUNDS):
        start = time.monotonic()
        dist.all_reduce(torch.zeros(1))
        took = time.monotonic() - start
        mine = torch.zeros(world_size, dtype=torch.float64)
        mine[rank] = time.time()
        dist.all_reduce(mine)
        best = min(best, (took, float(mine[rank] - mine[0])))
    return best[1]


def _reduce(values: torch.Tensor, rank: int, world_size: int) -> float:
    """Sums rank + 1 over all ranks in place; returns the seconds it took."""
    values.fill_(rank + 1)
    dist.all_reduce(torch.zeros(1))  # on the host: all start together
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - start
