"""Loads a corrupted source beside clean ones, as a run does, and compares with the clean run."""

import contextlib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.config import DataConfig, Oversize, PackConfig, SourceConfig
from data.encode import Encoder
from data.loader import Loader
from data.sample import Batch, Dropped
from tests.data.corpus import MEDIA, TOKENIZER, loader_of, planner_of, tables_of
from tests.fuzz.cases import Case
from tests.fuzz.sources import LIMITS

PROJECT_FORM = re.compile(r"\S[^\n]*?: .+\. .+\.", re.DOTALL)
"""What every error says: where, what is wrong, what to do."""


def _known_causes() -> set[str]:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE)
    return {cause for row in rows for cause in re.findall(r"`(\w+)`", row)}


CAUSES = _known_causes()


@dataclass
class Loaded:
    """What a run delivered: content by (source, key), and its ledger; or why it was refused.

    `worker_bytes` is the peak of its largest worker process.
    """

    delivered: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    ledger: list[Dropped] = field(default_factory=list)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    refusal: str = ""
    worker_bytes: int = 0


def load(
    folders: dict[str, str], case: Case | None = None, workers: int = 0, found: Loaded | None = None
) -> Loaded:
    """Returns what one epoch over the folders gives, in `found` where that is given.

    Raises:
        Exception: whatever is no refusal in the project's own form.
    """
    found = found or Loaded()
    try:
        _load(folders, case, workers, found)
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError) or not PROJECT_FORM.match(str(error)):
            raise
        found.refusal = str(error)
    return found


def _load(folders: dict[str, str], case: Case | None, workers: int, found: Loaded) -> None:
    config = DataConfig(
        sources={name: SourceConfig(path=path) for name, path in folders.items()},
        pack=PackConfig(length=512, oversize=Oversize.truncate, buffer=8),
        limits=LIMITS,
        workers=workers,
        cache=case.cache if case else None,
    )
    tables = tables_of(config)
    found.ledger += tables.quarantined
    for name, folder in tables.folders.items():
        found.rows.update((name, key) for shard in folder.shards for key in shard.keys)
    loader = loader_of(config, tables, planner_of(config, tables), encoder=Encoder(config, MEDIA, TOKENIZER))
    _measure_at_end(loader, found)
    strike = case.strike if case else None
    for step in loader:
        for batch in step.batches:
            for info, digest in zip(batch.samples, digests(batch)):
                found.delivered.setdefault((info.source, info.key), []).append(digest)
            found.ledger += batch.dropped
        if strike:
            strike()
            strike = None
    loader.close()


def _measure_at_end(loader: Loader, found: Loaded) -> None:
    """Makes a loader enter the peak of its workers before it ends them, whatever it ends for."""
    close = loader.close

    def measure() -> None:
        workers = getattr(loader._dataloader._iterator, "_workers", [])
        for worker in workers:
            with contextlib.suppress(FileNotFoundError, IndexError):  # it is dead already
                found.worker_bytes = max(found.worker_bytes, memory("VmHWM", worker.pid))
        close()

    loader.close = measure


def memory(name: str, pid: int | str = "self") -> int:
    """Returns what a process holds now (`VmRSS`) or at most so far (`VmHWM`), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def digests(batch: Batch) -> list[str]:
    """Returns a hash of the tokens, targets and media tensors of every sample of a batch."""
    ends = batch.cu_seqlens
    flat = batch.input_ids.view(-1)
    found = []
    for number in range(len(batch.samples)):
        mine = batch.sample == number
        segment = int(torch.searchsorted(ends, batch.supervised[mine][0].to(ends.dtype), right=True))
        start, stop = int(ends[segment - 1]), int(ends[segment])
        content = hashlib.sha256(flat[start:stop].numpy().tobytes())
        content.update(batch.targets[mine].numpy().tobytes())
        for tensor in _media_between(batch, start, stop):
            content.update(tensor.contiguous().numpy().tobytes())
        found.append(content.hexdigest())
    return found


def _media_between(batch: Batch, start: int, stop: int) -> list[torch.Tensor]:
    pieces: list[tuple[int, torch.Tensor]] = []
    if len(batch.vision.index):
        firsts = batch.vision.index.view(-1, MEDIA.image.queries)[:, 0].tolist()
        ends = batch.vision.cu_seqlens.tolist()
        pieces += [(place, batch.vision.pixels[ends[n] : ends[n + 1]]) for n, place in enumerate(firsts)]
    frames = batch.audio.cu_seqlens.diff().tolist()
    column = 0
    for place, count in zip(batch.audio.bos_index.tolist(), frames):
        pieces.append((place, batch.audio.mel[:, column : column + 2 * count]))
        column += 2 * count + 2
    return [tensor for place, tensor in sorted(pieces, key=lambda piece: piece[0]) if start <= place < stop]


def violations(case: Case, clean: dict[tuple[str, str], list[str]], found: Loaded) -> list[str]:
    """Returns which laws the run broke, one line each."""
    broken = [
        f"cause {entry.cause!r} is not in docs/data.md"
        for entry in found.ledger
        if entry.cause not in CAUSES and entry.key not in case.free
    ]
    broken += [
        f"blamed on memory: {entry.message}" for entry in found.ledger if "MemoryError" in entry.message
    ]
    broken += [
        f"{entry.source}/{entry.key} is clean, yet {entry.cause}"
        for entry in found.ledger
        if entry.source != case.source
    ]
    if found.refusal:
        return broken + ([] if case.may_refuse else [f"refused: {found.refusal}"])
    bad = {(entry.source, entry.key) for entry in found.ledger}
    truncated = any(entry.cause == "shard_truncated" for entry in found.ledger)
    for identity, content in clean.items():
        source, key = identity
        got = found.delivered.get(identity, [])
        if source == case.source and key in case.free:
            continue
        if source == case.source and key in case.touched:
            if not got and identity not in bad and not truncated:
                broken.append(f"{source}/{key} was damaged, and is neither delivered nor in the ledger")
        elif source == case.source and key in case.exposed:
            if not got and identity not in bad and not truncated:
                broken.append(f"{source}/{key} is lost silently")
            if any(digest != content[0] for digest in got):
                broken.append(f"{source}/{key} is intact, yet other content was delivered")
        elif got != content:
            what = "was not delivered" if not got else "differs" if len(got) == 1 else "came more than once"
            broken.append(f"{source}/{key} is intact, yet it {what}")
    return broken + _unaccounted(case, found)


def _unaccounted(case: Case, found: Loaded) -> list[str]:
    """Returns what is said against rows that came neither as a sample nor into the ledger."""
    seen = Counter({identity: len(content) for identity, content in found.delivered.items()})
    seen.update((entry.source, entry.key) for entry in found.ledger)
    broken = [
        f"row {source}/{key}: came {seen[source, key]} times, not {count}"
        for (source, key), count in found.rows.items()
        if seen[source, key] != count
    ]
    num_rows = sum(count for (source, _), count in found.rows.items() if source == case.source)
    if case.rows is not None and num_rows != case.rows:
        broken.append(f"{num_rows} rows for {case.rows} records")
    return broken
