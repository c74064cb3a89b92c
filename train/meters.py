"""What a log line says: sums kept on the device, and one reduction and one host sync per line."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data.sample import Batch

MODALITIES = ("text", "image", "audio", "image+audio")
AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all ranks."""


class LossMeter:
    """Loss sums of supervised tokens: as trained, by source and by modality. Never waits for the device.

    Serves training and evaluation alike. Rows whose loss is not finite are left out and counted.
    """

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.groups = [*(("source", name) for name in sources), *(("modality", name) for name in MODALITIES)]
        self._source = {name: place for place, name in enumerate(sources)}
        self._modality = {name: len(sources) + place for place, name in enumerate(MODALITIES)}
        self.sums = torch.zeros(3 + 2 * len(self.groups), dtype=torch.float64, device=device)

    def add(self, batch: Batch, row_losses: Tensor) -> None:
        """Adds one micro-batch.

        Shapes: row_losses [S], the unweighted loss of every supervised position.
        """
        device, count = self.sums.device, len(self.groups)
        losses = row_losses.detach().double()
        finite = losses.isfinite()
        losses = losses.where(finite, 0.0)
        weights = batch.weights.to(losses).where(finite, 0.0)
        self.sums[:3] += torch.stack([(weights * losses).sum(), weights.sum(), (~finite).sum()])
        for place in (self._source, self._modality):
            kinds = [info.source if place is self._source else info.modality for info in batch.samples]
            group = torch.tensor([place[kind] for kind in kinds], dtype=torch.int64)
            group = group.to(device, non_blocking=True)[batch.sample]
            self.sums[3 : 3 + count].index_add_(0, group, losses)
            self.sums[3 + count :].index_add_(0, group, finite.double())

    def read(self, sums: Sequence[float]) -> dict[str, Any]:
        """Returns `loss`, `loss_by_source` and `loss_by_modality` of (reduced) sums.

        Groups without tokens are left out.
        """
        weighted, weight, nonfinite, *rest = sums
        losses, counts = rest[: len(self.groups)], rest[len(self.groups) :]
        found: dict[str, Any] = {
            "loss": weighted / weight if weight else None,
            "loss_by_source": {},
            "loss_by_modality": {},
        }
        for (kind, name), loss, count in zip(self.groups, losses, counts):
            if count:
                found[f"loss_by_{kind}"][name] = loss / count
        if nonfinite:
            found["nonfinite_tokens"] = int(nonfinite)
        return found

    def reset(self) -> None:
        """Forgets everything."""
        self.sums.zero_()


class Meters:
    """Gathers what happened since the last log line and turns it into one record.

    Args:
        sources: every source's name, in the same order on every rank.
        device: where the losses are.
        peak: FLOP/s of one device, for MFU; None leaves MFU out.
        skipped_steps: count at the start, from a resumed run.
    """

    COUNTS = ("tokens", "samples", "supervised", "flops", "data_seconds")

    def __init__(
        self,
        sources: Sequence[str],
        device: torch.device,
        *,
        peak: float | None = None,
        skipped_steps: int = 0,
    ):
        self.losses = LossMeter(sources, device)
        self.peak = peak
        self.skipped_steps = skipped_steps
        self._device = device
        self._save_seconds = 0.0
        self.start()

    def start(self) -> None:
        """Starts all clocks: once more just before the first step, so that loading is not counted."""
        self._started = time.perf_counter()
        self._reset(self._started)

    def _reset(self, now: float) -> None:
        self.losses.reset()
        self._counts = dict.fromkeys(self.COUNTS, 0.0)
        self._steps = 0
        self._fill = 0.0
        self._window_started = now

    def add(self, batch: Batch, row_losses: Tensor, flops: float) -> None:
        """Adds one micro-batch: its losses [S], its counts and its necessary FLOPs."""
        self.losses.add(batch, row_losses)
        counts = self._counts
        counts["tokens"] += sum(info.tokens for info in batch.samples)
        counts["supervised"] += sum(info.supervised for info in batch.samples)
        counts["samples"] += len(batch.samples)
        counts["flops"] += flops

    def end_step(self, *, fill: float, skipped: bool = False) -> None:
        """Counts an optimizer step; both values are the same on all ranks.

        Args:
            fill: used share of the step's rows. A bad sample keeps its place, so it counts as used.
            skipped: whether no parameter changed.
        """
        self._steps += 1
        self._fill += fill
        self.skipped_steps += skipped

    def waited(self, seconds: float) -> None:
        """Counts time in which this rank had no batch to work on."""
        self._counts["data_seconds"] += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time inside, such as evaluation or a save, out of speeds and MFU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        yield
        self._window_started += time.perf_counter() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Keeps the time inside out of speeds, and counts it as time that saving kept a step waiting."""
        started = time.perf_counter()
        with self.paused():
            yield
        self._save_seconds += time.perf_counter() - started

    def take_save_seconds(self) -> float:
        """Returns the time spent in `saving` since this was last asked."""
        seconds, self._save_seconds = self._save_seconds, 0.0
        return seconds

    def record(
        self, step: int, all_reduce: AllReduce, world_size: int, *, epoch: float = 0.0, **fields: Any
    ) -> dict[str, Any]:
        """Returns the record of the steps since the last one, over all ranks, and starts afresh.

        Every rank must call it. `fields` are added as they are (lr, gradient norms); values that are
        not finite become None and are named under `nonfinite`, so that the record is strict JSON.
        """
        host = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        mine = torch.cat([self.losses.sums, host.to(self._device, non_blocking=True)])
        values = all_reduce(mine).tolist()
        now = time.perf_counter()
        counts: dict[str, float] = dict(zip(self.COUNTS, values[-len(self.COUNTS) :]))
        record = {
            "step": step,
            "epoch": epoch,
            **self.losses.read(values[: -len(self.COUNTS)]),
            **fields,
            **self._speeds(counts, now - self._window_started, world_size),
            "memory_gib": memory_gib(self._device),
            "skipped_steps": self.skipped_steps,
            "seconds": now - self._started,
        }
        self._reset(now)
        return strict_json(record)

    def _speeds(self, counts: dict[str, float], seconds: float, world_size: int) -> dict[str, Any]:
        seconds = max(seconds, 1e-9)
        return {
            "tokens_per_second": counts["tokens"] / seconds,
            "samples_per_second": counts["samples"] / seconds,
            "supervised_share": counts["supervised"] / max(counts["tokens"], 1),
            "fill": self._fill / max(self._steps, 1),
            "mfu": counts["flops"] / (self.peak * world_size * seconds) if self.peak else None,
            "data_wait_share": counts["data_seconds"] / (world_size * seconds),
            "seconds_per_step": seconds / max(self._steps, 1),
        }


def memory_gib(device: torch.device) -> float:
    """Returns this rank's peak memory: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def strict_json(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with NaN and infinities as None, their names listed under `nonfinite`."""
    lost: list[str] = []

    def clean(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: clean(item, f"{name}/{key}" if name else key) for key, item in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(name)
            return None
        return value

    cleaned = clean(record, "")
    return {**cleaned, "nonfinite": lost} if lost else cleaned
