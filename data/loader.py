"""Turns the plan into micro-batches of this rank, with stateless worker processes.

The rank itself plans and deals (metadata only); workers read, decode, encode and collate. A planner
state is released only together with the batches of its step, so prefetched steps never count as done.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Sampler

from data.config import DataConfig
from data.deal import deal
from data.encode import Encoder
from data.geometry import MediaConfig
from data.index import FolderIndex
from data.plan import Planner, StepPlan
from data.sample import Batch, SampleRef
from data.worker import Loaded, MicroBatches, Progress, WorkItem, start_worker


@dataclass(slots=True)
class StepBatches:
    """All micro-batches of one global step on this rank.

    `planner_state` resumes after this step. `drawn` is tokens per source since the run began and
    `fill` the used share of this step's packs, both over all ranks. `wait_seconds` is how long the
    rank waited for its batches.
    """

    step: int
    batches: list[Batch]
    planner_state: dict[str, Any]
    drawn: dict[str, int]
    fill: float
    wait_seconds: float


class _Schedule(Sampler):
    """Yields this rank's work items in order and remembers what is under way."""

    def __init__(self, planner: Planner, rank: int, world_size: int, micro_batch_packs: int, length: int):
        self.planner = planner
        self.rank = rank
        self.world_size = world_size
        self.micro_batch_packs = micro_batch_packs
        self.length = length
        self.steps: deque[tuple[StepBatches, int]] = deque()
        self.items: deque[WorkItem] = deque()

    def __iter__(self) -> Iterator[WorkItem]:
        self.steps.clear()
        self.items.clear()
        number = 0
        while (plan := self.planner.next_step()) is not None:
            mine = deal(plan.packs, self.world_size, self.micro_batch_packs)[self.rank]
            self.steps.append((self._announce(plan), len(mine)))
            for packs in mine:
                self.items.append(WorkItem(number, packs))
                number += 1
                yield self.items[-1]

    def _announce(self, plan: StepPlan) -> StepBatches:
        state = self.planner.state()
        drawn = {name: source["tokens"] for name, source in state["sources"].items()}
        filled = [pack.length for pack in plan.packs if pack.refs]
        return StepBatches(plan.step, [], state, drawn, sum(filled) / (len(filled) * self.length), 0.0)


class Loader:
    """Iterates over the steps of a plan as `StepBatches` of one rank.

    The planner is read ahead of the batches: to iterate again, or to stop early and go on, first
    `planner.restore` the `planner_state` of the last step that was handed over.
    """

    def __init__(
        self,
        planner: Planner,
        folders: dict[str, FolderIndex],
        encoder: Encoder,
        *,
        config: DataConfig,
        media: MediaConfig,
        pad_id: int,
        micro_batch_packs: int,
        loss: str,
        rank: int = 0,
        world_size: int = 1,
    ):
        length = config.pack.length
        self._config = config
        self._schedule = _Schedule(planner, rank, world_size, micro_batch_packs, length)
        self._progress = Progress(config.workers)
        options = {"length": length, "media": media, "pad_id": pad_id, "loss": loss}
        self._dataset = MicroBatches(folders, encoder, options, self._progress)
        self._dataloader = self._build()

    def _build(self) -> DataLoader:
        workers = self._config.workers
        parallel: dict[str, Any] = {}
        if workers:
            parallel = {
                "multiprocessing_context": "spawn",
                "persistent_workers": True,
                "prefetch_factor": self._config.prefetch,
                "timeout": self._config.timeout_seconds,
                "worker_init_fn": start_worker,
            }
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._schedule,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: else the loader would draw from the global one of the model.
            generator=torch.Generator(),
            **parallel,
        )

    def __iter__(self) -> Iterator[StepBatches]:
        """Yields step after step until the plan ends.

        Raises:
            RuntimeError: a worker hung, died, or could not read a shard; names the samples.
        """
        try:
            loaded = iter(self._dataloader)
            _watch(self)
            while True:
                started = time.perf_counter()
                if (batch := self._next(loaded)) is None:
                    return
                step, micro_batches = self._schedule.steps.popleft()
                step.batches.append(batch)
                while len(step.batches) < micro_batches and (batch := self._next(loaded)) is not None:
                    step.batches.append(batch)
                step.wait_seconds = time.perf_counter() - started
                yield step
        except Exception:
            self.close()
            raise

    def _next(self, loaded: Iterator[Loaded]) -> Batch | None:
        try:
            result = next(loaded)
        except StopIteration:
            return None
        except RuntimeError as error:
            if (explained := self.explain(error)) is None:
                raise
            raise explained from error
        self._schedule.items.popleft()
        if result.failure:
            raise RuntimeError(result.failure)
        return result.batch

    def owns(self, error: RuntimeError) -> bool:
        """Returns whether a torch error is about a worker of this loader."""
        return not self._progress.pids().isdisjoint(_pids(error))

    def explain(self, error: RuntimeError) -> RuntimeError | None:
        """Returns a torch error about a hung or dead worker with the names of the samples it was at."""
        text = str(error).strip()
        if not text.startswith("DataLoader") or not self._schedule.items:
            return None
        names = ", ".join(self._dataset.name(ref) for ref in self._under_way(_pids(error)))
        if "timed out" in text:
            advice = f"Leave it out, or raise data.timeout_seconds={self._config.timeout_seconds}."
        else:
            advice = "Look whether memory or shared memory (/dev/shm) ran out."
        return RuntimeError(f"{names}: a loader worker failed while it loaded this. {advice} ({text})")

    def _under_way(self, pids: set[int]) -> list[SampleRef]:
        """Returns what the workers `pids` are at, else what the awaited micro-batch is at or is made of."""
        items = {item.number: item for item in self._schedule.items}
        awaited = self._schedule.items[0]
        rows = [row for row in self._progress.rows() if row[1] in items]
        chosen = [row for row in rows if row[0] in pids] or [row for row in rows if row[1] == awaited.number]
        if chosen:
            return [items[number].packs[pack].refs[place] for _, number, pack, place in chosen]
        return [ref for pack in awaited.packs for ref in pack.refs]

    def close(self) -> None:
        """Ends the workers. Iterating again would start new ones."""
        iterator = self._dataloader._iterator
        self._dataloader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        # Workers are deaf to SIGTERM, so one that hangs is still there.
        for process in multiprocessing.active_children():
            if process.pid in self._progress.pids():
                process.kill()
                process.join()


_watched: WeakSet[Loader] = WeakSet()


def _watch(loader: Loader) -> None:
    """Lets the error about a killed worker name its samples, wherever in the rank it surfaces.

    Torch raises that error from a handler of SIGCHLD, so outside the loader too: it is wrapped here.
    """
    _watched.add(loader)
    torch_handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(torch_handler):
        return
    if isinstance(torch_handler, partial) and torch_handler.func is _name_dead_worker:
        return
    signal.signal(signal.SIGCHLD, partial(_name_dead_worker, torch_handler))


def _name_dead_worker(torch_handler: Callable[[int, Any], Any], signum: int, frame: Any) -> None:
    try:
        torch_handler(signum, frame)
    except RuntimeError as error:
        for loader in _watched:
            if loader.owns(error) and (explained := loader.explain(error)):
                raise explained from error
        raise


def _pids(error: RuntimeError) -> set[int]:
    found = re.search(r"pid(?:\(s\))? ([\d, ]+)\)", str(error))
    return {int(pid) for pid in found.group(1).split(",")} if found else set()
