"""What runs in a loader worker: references of samples in, one finished micro-batch out.

Workers hold no state that matters: any worker gives the same micro-batch for the same work item.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from data.collate import BlankSegment, collate
from data.encode import Encoder
from data.index import FolderIndex
from data.sample import Batch, Dropped, EncodedSample, Pack, SampleError, SampleRef
from data.shards import ShardReader


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One micro-batch to load. `number` counts the work items of an iteration."""

    number: int
    packs: list[Pack]


@dataclass(slots=True)
class Loaded:
    """What a worker sends back: a batch, or what the machine failed at (never a matter of data)."""

    batch: Batch | None
    failure: str = ""

    def pin_memory(self) -> Loaded:
        """Returns it with every tensor in pinned memory; torch's pinning thread calls this."""
        return Loaded(None if self.batch is None else _pin(self.batch), self.failure)


def _pin(item: Any) -> Any:
    values = {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.pin_memory()
        elif dataclasses.is_dataclass(value):
            values[name] = _pin(value)
    return type(item)(**values)


class Progress:
    """What every worker is at, in shared memory: so a hung or killed one can be told by its sample.

    Shapes: table int64 [workers, 5]: process id, number of the work item (-1 when idle), the place of
    the sample in it (pack, position), and 1 while its shard is fetched.
    """

    def __init__(self, workers: int):
        self.table = torch.full((max(workers, 1), 5), -1, dtype=torch.int64).share_memory_()

    def note(self, number: int, pack: int = 0, position: int = 0) -> None:
        """Writes down what this process is at."""
        self.table[_worker()] = torch.tensor([os.getpid(), number, pack, position, 0])

    def note_fetching(self, is_fetching: bool) -> None:
        """Writes down whether this process waits for the shard of the sample that it is at."""
        self.table[_worker(), 4] = int(is_fetching)

    def rows(self) -> list[tuple[int, int, int, int]]:
        """Returns (process id, work item, pack, position) of every worker that is at a sample."""
        return [(pid, *place) for pid, *place, _ in self.table.tolist() if place[0] >= 0]

    def is_fetching(self, number: int) -> bool:
        """Returns whether the worker that is at a work item waits for a remote shard."""
        return bool(((self.table[:, 1] == number) & (self.table[:, 4] == 1)).any())


def _worker() -> int:
    info = get_worker_info()
    return info.id if info else 0


class MicroBatches(Dataset):
    """Maps a work item to its micro-batch. Files are opened by the process that reads them."""

    def __init__(
        self,
        folders: dict[str, FolderIndex],
        encoder: Encoder,
        collate_options: dict[str, Any],
        progress: Progress,
    ):
        self.folders = folders
        self.encoder = encoder
        self.collate_options = collate_options
        self.progress = progress
        self._readers: dict[str, ShardReader] = {}

    def __getitem__(self, item: WorkItem) -> Loaded:
        """Returns the micro-batch; bad samples become blank segments in their place.

        What the machine fails at (a disk, a shard that is gone, memory) comes back as `failure`.
        """
        rows: list[list[EncodedSample | BlankSegment]] = []
        try:
            for place, pack in enumerate(item.packs):
                rows.append([])
                for position, ref in enumerate(pack.refs):
                    self.progress.note(item.number, place, position)
                    rows[-1].append(self._load(ref))
        except OSError as error:
            return Loaded(None, f"{self.name(ref)}: cannot be read ({error}). Check the disk and the mount.")
        except MemoryError:
            advice = "Use fewer data.workers, a smaller data.prefetch, or lower data.limits."
            return Loaded(None, f"{self.name(ref)}: memory ran out at this. {advice}")
        except (SampleError, RuntimeError) as error:  # a shard or its index that is gone or has changed
            return Loaded(None, f"{str(error).rstrip('.')}.")
        finally:
            self.progress.note(-1)
        return Loaded(collate(rows, **self.collate_options))

    def name(self, ref: SampleRef) -> str:
        """Returns `source/shard/key` of a reference."""
        shard = self.folders[ref.source].shards[ref.shard]
        return f"{ref.source}/{shard.name}/{shard.keys[ref.row]}"

    def _load(self, ref: SampleRef) -> EncodedSample | BlankSegment:
        shard = self.folders[ref.source].shards[ref.shard]
        key = shard.keys[ref.row]  # reads the index, whose damage is no sample's fault
        try:
            return self._encode(ref)
        except SampleError as error:
            if error.cause == "shard_unreadable":
                raise
            cause, message = error.cause, str(error)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # The sample border: whatever a decoder throws at hostile bytes must not end the run.
            cause, message = "unexpected", f"{type(error).__name__}: {error}"
        info = Dropped(ref.source, shard.name, key, cause, message)
        return BlankSegment(ref.length, info)

    def _encode(self, ref: SampleRef) -> EncodedSample:
        if ref.source not in self._readers:
            self._readers[ref.source] = ShardReader(self.folders[ref.source], ref.source)
            self._readers[ref.source].note_fetching = self.progress.note_fetching
        sample = self._readers[ref.source].read(ref.shard, ref.row, media=True)
        sizes = self.folders[ref.source].shards[ref.shard].sizes(ref.row)
        try:
            encoded = self.encoder.encode(sample, ref.source, sizes)
        except OSError as error:
            # Decoders raise it for bad bytes; only reading a shard is the machine's affair.
            raise SampleError(f"cannot be decoded ({error})", cause="unexpected") from error
        if len(encoded.input_ids) != ref.length:
            raise SampleError(
                f"{len(encoded.input_ids)} tokens, but {ref.length} were counted when the run was planned. "
                f"Index the folder again",
                cause="length_changed",
            )
        return encoded


def start_worker(_worker_id: int) -> None:
    """Makes a worker deaf to requests to end, which SLURM sends to all processes: the rank answers them.

    It ends with its rank, even with one that was killed: torch looks for the process it was forked
    from, which is not the rank but the forkserver.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, name="end-with-rank", daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "a worker is a process of its own"
    wait([rank.sentinel])
    os._exit(1)
