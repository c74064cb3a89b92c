from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.deal import deal
from data.sample import Pack, SampleRef


def pack(number: int, cost: float) -> Pack:
    return Pack((SampleRef("source", 0, number, 1, cost),))


def realistic_step(num_packs: int, seed: int) -> list[Pack]:
    """Packs of 8.6 samples on average, of 63 to 177 TFLOP."""
    rng = random.Random(seed)
    packs = []
    for number in range(num_packs):
        count = max(1, round(rng.gauss(8.6, 2.5)))
        whole = min(177.0, max(63.0, rng.gauss(119.0, 28.0)))
        cuts = sorted(rng.random() for _ in range(count - 1))
        costs = [whole * (b - a) for a, b in zip([0.0, *cuts], [*cuts, 1.0])]
        packs.append(Pack(tuple(SampleRef("s", number, row, 1, cost) for row, cost in enumerate(costs))))
    return packs


def loads(hands) -> list[float]:
    return [sum(pack.cost for batch in hand for pack in batch) for hand in hands]


@given(
    world_size=st.integers(1, 8),
    micro_batches=st.integers(1, 4),
    micro_batch_packs=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_rank_gets_equally_many_packs_and_none_is_lost(
    world_size, micro_batches, micro_batch_packs, data
):
    count = world_size * micro_batches * micro_batch_packs
    costs = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.5, 100.0]), min_size=count, max_size=count))
    packs = [pack(number, cost) for number, cost in enumerate(costs)]
    hands = deal(packs, world_size, micro_batch_packs)
    assert [[len(batch) for batch in hand] for hand in hands] == [
        [micro_batch_packs] * micro_batches
    ] * world_size
    dealt = [pack.refs[0].row for hand in hands for batch in hand for pack in batch]
    assert sorted(dealt) == list(range(count))
    assert deal(packs, world_size, micro_batch_packs) == hands


@pytest.mark.parametrize("world_size", [8, 64])
def test_slowest_rank_is_within_five_percent_of_the_mean_with_four_packs_each(world_size):
    for seed in range(20):
        work = loads(deal(realistic_step(4 * world_size, seed), world_size, 1))
        assert max(work) / (sum(work) / world_size) <= 1.05


def test_micro_batches_of_the_same_place_are_alike_on_all_ranks():
    hands = deal(realistic_step(256, 0), 64, 1)
    spread = []
    for place in range(4):
        costs = [hand[place][0].cost for hand in hands]
        spread.append(max(costs) / (sum(costs) / 64))
    everything = [hand[place][0].cost for hand in hands for place in range(4)]
    assert max(spread) < max(everything) / (sum(everything) / 256) - 0.1


def test_empty_packs_are_spread_over_the_ranks():
    packs = [pack(number, 1.0) for number in range(4)] + [Pack(())] * 12
    assert loads(deal(packs, 4, 2)) == [1.0] * 4


def test_packs_that_cannot_be_dealt_evenly_are_refused():
    packs = [pack(number, 1.0) for number in range(10)]
    with pytest.raises(ValueError) as error:
        deal(packs, 4, 2)
    assert str(error.value) == (
        "train.packs_per_step=10: not a multiple of 4 ranks x train.micro_batch_packs=2. Use 16."
    )
