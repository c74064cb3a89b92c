"""Turns the plan into micro-batches of this rank, with stateless worker processes.

The rank itself plans and deals (metadata only); workers read, decode, encode and collate. A planner
state is released only together with the batches of its step, so prefetched steps never count as done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any
from weakref import finalize

import torch
from torch.utils.data import DataLoader, Sampler

from data.config import DataConfig
from data.deal import deal
from data.encode import Encoder
from data.fetch_ahead import FetchAhead
from data.forkserver import worker_context
from data.geometry import MediaConfig
from data.index import FolderIndex
from data.plan import Planner, StepPlan
from data.sample import Batch, Pack, SampleRef
from data.worker import Loaded, MicroBatches, Progress, WorkItem, start_worker

LOOK_SECONDS = 5.0
"""How often a waiting rank looks whether all of its workers are alive."""


@dataclass(slots=True)
class StepBatches:
    """All micro-batches of one global step on this rank.

    `packs` are what the micro-batches were made of. `planner_state` resumes after this step. Over all
    ranks: `epoch` and `drawn` are mixture epochs and tokens per source since the run began, `fill` is the
    used share of this step's packs. `wait_seconds` is how long the rank waited for its batches.
    """

    step: int
    batches: list[Batch]
    planner_state: dict[str, Any]
    epoch: float
    drawn: dict[str, int]
    fill: float
    wait_seconds: float
    packs: list[list[Pack]] = field(default_factory=list)


class _Schedule(Sampler):
    """Yields this rank's work items in order and remembers what is under way."""

    def __init__(
        self,
        planner: Planner,
        ahead: FetchAhead,
        rank: int,
        world_size: int,
        micro_batch_packs: int,
        length: int,
    ):
        self.planner = planner
        self.ahead = ahead
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
            self.steps.append((self._announce(plan, mine), len(mine)))
            if self.ahead.sources:
                self.ahead.want(self._shards(mine))
            for packs in mine:
                self.items.append(WorkItem(number, packs))
                number += 1
                yield self.items[-1]

    def _shards(self, mine: list[list[Pack]]) -> list[tuple[str, int]]:
        """Returns what will be read: by what is under way, by this step, and by the plan after it."""
        under_way = [item.packs for item in self.items] + mine
        refs = [ref for packs in under_way for pack in packs for ref in pack.refs]
        shards = [(ref.source, ref.shard) for ref in refs if ref.source in self.ahead.sources]
        return list(dict.fromkeys(shards + self.planner.shards_ahead(self.ahead.sources)))

    def _announce(self, plan: StepPlan, mine: list[list[Pack]]) -> StepBatches:
        state = self.planner.state()
        drawn = {name: source["tokens"] for name, source in state["sources"].items()}
        filled = [pack.length for pack in plan.packs if pack.refs]
        return StepBatches(
            step=plan.step,
            batches=[],
            planner_state=state,
            epoch=self.planner.epoch,
            drawn=drawn,
            fill=sum(filled) / (len(filled) * self.length),
            wait_seconds=0.0,
            packs=mine,
        )


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
        self.folders = folders
        self._config = config
        self._ahead = FetchAhead(folders)
        self._schedule = _Schedule(planner, self._ahead, rank, world_size, micro_batch_packs, length)
        self._progress = Progress(config.workers)
        options = {"length": length, "media": media, "pad_id": pad_id, "loss": loss}
        self._dataset = MicroBatches(folders, encoder, options, self._progress)
        self._dataloader = self._build()
        # A rank that fails elsewhere would wait at its exit for workers that are deaf to SIGTERM.
        finalize(self, _end_workers, self._dataloader)

    def _build(self) -> DataLoader:
        workers = self._config.workers
        parallel: dict[str, Any] = {}
        if workers:
            parallel = {
                "multiprocessing_context": worker_context(),
                "persistent_workers": True,
                "prefetch_factor": self._config.prefetch,
                "timeout": min(LOOK_SECONDS, self._config.timeout_seconds),
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
        deadline = time.monotonic() + self._config.timeout_seconds
        while True:
            try:
                result = next(loaded, None)
                break
            except (RuntimeError, OSError, EOFError) as error:
                timed_out = "DataLoader timed out" in str(error)
                dead = self._dead_workers(patience_seconds=0.0 if timed_out else 1.0)
                if not dead and not timed_out:
                    raise
                if dead or time.monotonic() > deadline:
                    raise self._blame(dead) from error
                if self._progress.is_fetching(self._schedule.items[0].number):  # it has patience of its own
                    deadline = time.monotonic() + self._config.timeout_seconds
        if result is None:
            return None
        self._schedule.items.popleft()
        if result.failure:
            raise RuntimeError(result.failure)
        return result.batch

    def _dead_workers(self, patience_seconds: float) -> list[Any]:
        # A rank may notice a broken connection just before the worker at its other end is gone.
        workers = getattr(self._dataloader._iterator, "_workers", [])
        wait([worker.sentinel for worker in workers], patience_seconds)
        return [worker for worker in workers if not worker.is_alive()]

    def _blame(self, dead: list[Any]) -> RuntimeError:
        """Returns the error for dead workers, or for a hung one, with the names of their samples."""
        names = ", ".join(self._dataset.name(ref) for ref in self._under_way({w.pid for w in dead}))
        if dead:
            code = dead[0].exitcode
            how = f"died at this (signal {-code})" if code < 0 else f"died at this (exit code {code})"
            advice = "Look whether memory or shared memory (/dev/shm) ran out."
        else:
            how = "hangs at this"
            advice = f"Leave it out, or raise data.timeout_seconds={self._config.timeout_seconds}."
        return RuntimeError(f"{names}: a loader worker {how}. {advice}")

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
        """Ends the workers and what fetches for them. Iterating again would start new ones."""
        _end_workers(self._dataloader)
        self._ahead.close()


def _end_workers(dataloader: DataLoader) -> None:
    iterator: Any = dataloader._iterator
    dataloader._iterator = None
    if iterator is None:
        return
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():  # it hangs, and is deaf to SIGTERM
            worker.kill()
            worker.join()
