"""Deals the packs of a global step to ranks and micro-batches, by cost.

A pure function of the packs and the shape of the run: no rank has to ask another.
"""

from __future__ import annotations

import heapq

from data.sample import Pack


def deal(packs: list[Pack], world_size: int, micro_batch_packs: int) -> list[list[list[Pack]]]:
    """Returns the packs of every rank, cut into micro-batches: rank -> micro-batch -> packs.

    Longest processing time first: the costliest pack that is left goes to the rank with the least
    work among those that still have room, so that all ranks get equally many packs (with unequal
    numbers they would wait for each other forever). The packs of a rank are sorted by cost, so
    the i-th micro-batches of all ranks are alike.

    Raises:
        ValueError: the packs cannot be dealt in equal numbers.
    """
    share = world_size * micro_batch_packs
    if len(packs) % share:
        nearest = -(-len(packs) // share) * share
        raise ValueError(
            f"train.packs_per_step={len(packs)}: not a multiple of {world_size} ranks x "
            f"train.micro_batch_packs={micro_batch_packs}. Use {nearest}."
        )
    per_rank = len(packs) // world_size
    costs = [pack.cost for pack in packs]
    hands: list[list[Pack]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for place in sorted(range(len(packs)), key=lambda place: (-costs[place], place)):
        load, rank = heapq.heappop(loads)
        hands[rank].append(packs[place])
        if len(hands[rank]) < per_rank:
            heapq.heappush(loads, (load + costs[place], rank))
    return [
        [hand[first : first + micro_batch_packs] for first in range(0, per_rank, micro_batch_packs)]
        for hand in hands
    ]
