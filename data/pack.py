"""Fills one row from a buffer of samples: always the oldest, then an exact subset sum.

A set of reachable sums is one Python integer, so adding a sample to it is a shift and an or.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A drawn sample that waits for a row. `source`, `index` and `epoch` tell the planner which it is."""

    length: int
    slices: int = 0
    audio_seconds: float = 0.0
    source: int = 0
    index: int = 0
    epoch: int = 0


def fill_row(
    buffer: Sequence[Candidate],
    length: int,
    max_slices: int | None = None,
    max_audio_seconds: float | None = None,
) -> list[int]:
    """Returns the places (ascending) of the samples of `buffer` (oldest first) that fill a row best.

    Place 0 is always taken. Of several fills with the same total, the newest samples are left out
    first. Without budgets no other fill with place 0 has a larger total; with budgets the media are
    taken oldest first until a budget is used up, so that all subsets are allowed, and a fuller row
    with other media may exist.

    A sample that alone exceeds a budget is taken only as the oldest, and then no other sample that
    uses this budget joins it.

    Units: `length` and the lengths of the samples in tokens.
    """
    room = length - buffer[0].length
    if max_slices is None and max_audio_seconds is None:
        return [0, *_best_subset(buffer, range(1, len(buffer)), room)]
    return [0, *_best_subset(buffer, _admit(buffer, max_slices, max_audio_seconds), room)]


def _admit(buffer: Sequence[Candidate], max_slices: int | None, max_audio_seconds: float | None) -> list[int]:
    """Returns places that fit the budgets all together, so that every subset of them does too."""
    slices = float("inf") if max_slices is None else max_slices
    seconds = float("inf") if max_audio_seconds is None else max_audio_seconds
    slices -= buffer[0].slices
    seconds -= buffer[0].audio_seconds
    admitted = []
    for place in range(1, len(buffer)):
        _, used_slices, used_seconds, *_ = buffer[place]
        if (used_slices <= slices or not used_slices) and (used_seconds <= seconds or not used_seconds):
            slices -= used_slices
            seconds -= used_seconds
            admitted.append(place)
    return admitted


def _best_subset(buffer: Sequence[Candidate], places: Sequence[int], room: int) -> list[int]:
    # Bit r of `free` says that r tokens of room can be left. Counting down instead of up lets
    # overfull rows fall off the right end by themselves and makes bit 0 the exact fill.
    free = 1 << room
    before = []
    for place in places:
        if free & 1:
            break
        before.append(free)
        free |= free >> buffer[place].length
    left = (free & -free).bit_length() - 1
    taken = []
    for place, reachable in zip(reversed(places[: len(before)]), reversed(before)):
        if not reachable >> left & 1:
            taken.append(place)
            left += buffer[place].length
    return sorted(taken)
