"""Steps that change nothing: when a gradient is too large, and what is kept of such a step.

`RUN/spikes/step-00000123/` holds `spike.json` (the step's numbers and its samples, each with its loss) and
the samples themselves in a webdataset tar, so that `python -m train.replay` can run the step again even
where the data has moved on.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.index import FolderIndex
from data.loader import StepBatches
from data.sample import Sample, SampleError, SampleRef
from data.shards import ShardReader, fill_folder
from train.engine import Engine, StepResult
from train.meters import strict_json

NUM_NORMS = 100
"""Applied updates whose gradient norms make the median."""

NUM_NEEDED = 20
"""How many of them there must be before a step can be an outlier."""

NUM_KEPT = 20
"""Spikes that are kept; the oldest go first."""

FILE = "spike.json"


class GradientNorms:
    """The gradient norms of the last applied updates. `factor` None lets every finite one through."""

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.applied: deque[float] = deque(maxlen=NUM_NORMS)

    def limit(self) -> float:
        """Returns the largest norm that may be applied now."""
        if self.factor is None or len(self.applied) < NUM_NEEDED:
            return math.inf
        return self.factor * statistics.median(self.applied)

    def restore(self, applied: list[float]) -> None:
        """Takes the norms that a checkpoint kept."""
        self.applied = deque(applied, maxlen=NUM_NORMS)


@dataclass(frozen=True, slots=True)
class SeenSample:
    """A sample of a step, where it was, and what `spike.json` says of it."""

    ref: SampleRef
    line: dict[str, Any]

    @property
    def name(self) -> str:
        """Returns `source/key`."""
        return f"{self.line['source']}/{self.line['key']}"

    @property
    def is_finite(self) -> bool:
        """Returns whether its loss was."""
        return self.line["finite"]


def look_at_samples(
    work: StepBatches, losses: list[Tensor], folders: dict[str, FolderIndex], rank: int
) -> list[SeenSample]:
    """Returns this rank's samples of a step, each with its mean loss; dropped ones are left out.

    Shapes: losses [S] for each micro-batch, as `Engine.forward` returns them.
    """
    seen: list[SeenSample] = []
    for micro_batch, (packs, batch, row_losses) in enumerate(zip(work.packs, work.batches, losses)):
        sums = row_losses.new_zeros(len(batch.samples)).double()
        sums.index_add_(0, batch.sample.to(sums.device), row_losses.detach().double())
        delivered = list(zip(batch.samples, sums.tolist()))
        for number, pack in enumerate(packs):
            for ref in pack.refs:
                shard = folders[ref.source].shards[ref.shard]
                place = (rank, micro_batch, number)
                if delivered and _is(delivered[0][0], ref, shard.keys[ref.row]):
                    seen.append(_seen(ref, place, shard.name, *delivered.pop(0)))
    return seen


def _is(info, ref: SampleRef, key: str) -> bool:
    return (info.source, info.key, info.tokens) == (ref.source, key, ref.length)


def _seen(ref: SampleRef, place: tuple[int, int, int], shard: str, info, loss_sum: float) -> SeenSample:
    loss = loss_sum / max(info.supervised, 1)
    line = {
        **dict(zip(("rank", "micro_batch", "pack"), place)),
        "source": ref.source,
        "shard": shard,
        "key": info.key,
        "modality": info.modality,
        "tokens": info.tokens,
        "supervised": info.supervised,
        "loss": loss if math.isfinite(loss) else None,
        "finite": math.isfinite(loss),
    }
    return SeenSample(ref, line)


def keep_spike(
    engine: Engine,
    folder: Path,
    work: StepBatches,
    losses: list[Tensor],
    folders: dict[str, FolderIndex],
    facts: dict[str, Any],
) -> list[SeenSample]:
    """Keeps the samples of a skipped step of all ranks in `folder`, and returns them, on every rank.

    A disk that is full costs the copy, not the run.
    """
    mine = look_at_samples(work, losses, folders, engine.rank)
    seen = [sample for samples in engine.gather_objects(mine) for sample in samples]
    if engine.is_main:
        try:
            _write(folder / f"step-{work.step:08d}", seen, folders, {"step": work.step, **facts})
            _prune(folder)
        except OSError as error:
            print(f"{error.filename or folder}: {error.strerror or error}. This step's samples are not kept.")
    return seen


def describe_skip(step: int, result: StepResult, limit: float, seen: list[SeenSample]) -> str:
    """Returns what a person is told of a skipped step."""
    blamed = sorted({sample.name for sample in seen if not sample.is_finite})
    named = blamed or sorted({sample.name for sample in seen})
    shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    why = "loss or gradient is not finite"
    if math.isfinite(result.grad_norm):
        why = f"gradient norm {result.grad_norm:.4g} is above {limit:.4g} (optim.spike_factor)"
    return f"step {step}: {why}; nothing was changed. Samples: {shown}"


def _write(
    folder: Path, seen: list[SeenSample], folders: dict[str, FolderIndex], facts: dict[str, Any]
) -> None:
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = _write_samples(partial, seen, folders)
    lines = [{**sample.line, "row": rows.get(_place(sample.ref))} for sample in seen]
    content = {**strict_json(facts), "samples": lines}
    (partial / FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier start that came here too
    partial.rename(folder)


def _place(ref: SampleRef) -> tuple[str, int, int]:
    return ref.source, ref.shard, ref.row


def _write_samples(
    folder: Path, seen: list[SeenSample], folders: dict[str, FolderIndex]
) -> dict[tuple[str, int, int], int]:
    """Writes each sample once into one tar; returns the row of each in it."""
    readers = {source: ShardReader(folders[source], source) for source in {s.ref.source for s in seen}}
    samples: list[Sample] = []
    rows: dict[tuple[str, int, int], int] = {}
    for ref in (sample.ref for sample in seen):
        if _place(ref) in rows:
            continue
        try:
            sample = readers[ref.source].read(ref.shard, ref.row, media=True)
        except SampleError:  # it could be read a moment ago; its line then has no row
            continue
        rows[_place(ref)] = len(samples)
        sample.key = f"{len(samples):06d}-{sample.key}"  # two sources may have the same key
        samples.append(sample)
    if samples:
        fill_folder(samples, str(folder), samples_per_shard=len(samples), bytes_per_shard=2**62)
    return rows


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step-*"))[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
