"""Seeded shuffling that starts anywhere: only one window of shards is ever in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np


def shuffled_windows(
    name: str, shard: np.ndarray, seed: int, shuffle_shards: int, epoch: int, position: int
) -> Iterator[np.ndarray]:
    """Yields the row indices of one epoch of source `name` from `position` on, a window at a time.

    The shards are permuted, and the samples of every `shuffle_shards` of them together, so that a
    remote shard is wanted during one window only.

    Shapes: shard int32 [n], sorted, the shard of every row; yields int64 [samples of the window].
    """
    for number, (starts, stops) in enumerate(_windows(name, shard, seed, shuffle_shards, epoch)):
        size = int((stops - starts).sum())
        if position < size:
            bounds = zip(starts.tolist(), stops.tolist())
            rows = np.concatenate([np.arange(start, stop) for start, stop in bounds])
            yield rows[permutation(size, f"{seed} {epoch} {number} {name}")][position:]
        position = max(0, position - size)


def windows_from(
    name: str, shard: np.ndarray, seed: int, shuffle_shards: int, epoch: int, position: int
) -> Iterator[tuple[list[int], int]]:
    """Yields the shards of the window at `position` and how many samples are left in it; then, for ever,
    those of the windows that follow.
    """
    while True:
        for starts, stops in _windows(name, shard, seed, shuffle_shards, epoch):
            size = int((stops - starts).sum())
            if position < size:
                yield shard[starts].tolist(), size - position
            position = max(0, position - size)
        epoch += 1


def _windows(
    name: str, shard: np.ndarray, seed: int, shuffle_shards: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields where the rows of each shard of a window start and stop, one window after the other."""
    starts = np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))
    stops = np.append(starts[1:], len(shard))
    order = permutation(len(starts), f"{seed} {epoch} shards {name}")
    for first in range(0, len(order), shuffle_shards):
        chosen = order[first : first + shuffle_shards]
        yield starts[chosen], stops[chosen]


def permutation(size: int, key: str) -> np.ndarray:
    """Returns a permutation of `size` numbers that depends on `key` alone, int64 [size]."""
    # NumPy keeps the raw bits of a generator the same in every release, but not what `permutation`
    # makes of them, and a run must go on after an upgrade.
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.argsort(np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size), kind="stable")
