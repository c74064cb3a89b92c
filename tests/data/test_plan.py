from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import PackConfig
from data.deal import deal
from data.plan import Planner, SourceTable


def table(
    name="text", size=60, shards=5, weight=None, epochs=1.0, slices=0, seconds=0.0, length=(1, 40), seed=0
) -> SourceTable:
    random = np.random.default_rng([seed, size, *name.encode()])
    # Shards of unequal size with gaps between their numbers, as after dropping samples and shards.
    shard = np.sort(random.integers(0, shards, size)).astype(np.int32) * 3
    row = np.concatenate([np.arange(count) for count in np.unique(shard, return_counts=True)[1]])
    return SourceTable(
        name=name,
        shard=shard,
        row=row.astype(np.int32),
        length=random.integers(*length, size).astype(np.int32),
        cost=random.uniform(1, 2, size),
        slices=random.integers(0, slices + 1, size).astype(np.int32),
        audio_seconds=random.uniform(0, seconds, size).astype(np.float32),
        weight=weight,
        epochs=epochs,
    )


def planner(tables, *, length=128, buffer=16, packs=4, seed=0, shuffle=2, epochs=1.0, digest="a", **budgets):
    pack = PackConfig(length=length, buffer=buffer, **budgets)
    return Planner(tables, pack, packs, seed, shuffle, epochs, digest)


def steps(plan: Planner, limit: int | None = None) -> list:
    return list(islice(iter(plan.next_step, None), limit))


def refs(found) -> list:
    return [ref for step in found for pack in step.packs for ref in pack.refs]


def mixture() -> list[SourceTable]:
    return [
        table("image", 70, slices=6),
        table("audio", 45, shards=3, seconds=20.0, epochs=2),
        table("text", 90, shards=7, epochs=0.5),
    ]


def keys(found) -> list[tuple]:
    return [(ref.source, ref.shard, ref.row) for ref in found]


def test_every_sample_of_every_source_is_drawn_exactly_once_an_epoch():
    tables = [table("a", 50), table("b", 7, shards=2), table("c", 113, shards=9)]
    once = [(t.name, s, r) for t in tables for s, r in zip(t.shard.tolist(), t.row.tolist())]
    assert sorted(keys(refs(steps(planner(tables))))) == sorted(once)
    assert Counter(keys(refs(steps(planner(tables, epochs=3))))) == Counter(once * 3)


def test_a_source_is_passed_as_often_as_its_epochs_say():
    found = refs(steps(planner(mixture())))
    seen = Counter(ref.source for ref in found)
    assert seen == {"image": 70, "audio": 90, "text": 45}
    passes = {name: set(Counter(keys(r for r in found if r.source == name)).values()) for name in seen}
    assert passes == {"image": {1}, "audio": {2}, "text": {1}}
    assert {ref.epoch for ref in found if ref.source == "audio"} == {0, 1}


def test_a_reference_carries_what_the_table_says():
    tables = mixture()
    by_key = {
        (t.name, int(t.shard[i]), int(t.row[i])): (int(t.length[i]), float(t.cost[i]))
        for t in tables
        for i in range(len(t))
    }
    for ref in refs(steps(planner(tables))):
        assert by_key[ref.source, ref.shard, ref.row] == (ref.length, ref.cost)


@given(st.lists(st.floats(0.01, 10).map(lambda x: round(x, 3)), min_size=1, max_size=6), st.integers(20, 400))
@settings(max_examples=30, deadline=None)
def test_no_source_is_ever_far_from_its_weight(weights, limit):
    tables = [table(f"s{i}", 30, weight=weight) for i, weight in enumerate(weights)]
    plan = planner(tables, epochs=None)
    counts = np.zeros(len(weights))
    share = np.array(weights) / sum(weights)
    for number in range(1, limit + 1):
        counts[plan._draw().source] += 1
        ahead = counts - number * share
        assert ahead.max() < 1
        assert ahead.min() > -len(weights)


def test_an_epoch_of_a_weighted_mixture_is_as_many_draws_as_samples():
    tables = [table("a", 30, weight=3), table("b", 90, weight=1)]
    assert Counter(ref.source for ref in refs(steps(planner(tables)))) == {"a": 90, "b": 30}
    assert len(refs(steps(planner(tables, epochs=0.25)))) == 30


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
def test_number_of_steps_is_exact_from_any_step_and_leaves_the_plan_alone(epochs):
    plan = planner(mixture(), epochs=epochs)
    count = plan.num_steps()
    assert count is not None and count > 2
    for number in range(1, count + 1):
        assert plan.next_step().step == number
        assert plan.num_steps() == count
    assert plan.next_step() is None and plan.next_step() is None
    assert plan.num_steps() == count
    assert refs(steps(planner(mixture(), epochs=epochs))) == refs(steps(planner(mixture(), epochs=epochs)))


def test_a_run_without_epochs_never_ends():
    plan = planner([table("a", 3, weight=1.0)], epochs=None)
    assert plan.num_steps() is None
    assert len(steps(plan, 50)) == 50
    assert max(ref.epoch for ref in refs(steps(plan, 1))) > 10


def test_the_last_step_is_filled_up_with_empty_packs():
    found = steps(planner(mixture(), packs=7))
    assert all(len(step.packs) == 7 for step in found)
    assert all(pack.refs for step in found[:-1] for pack in step.packs)
    filled = [bool(pack.refs) for pack in found[-1].packs]
    assert filled == sorted(filled, reverse=True) and not all(filled) and any(filled)


def test_what_was_drawn_is_what_the_packs_hold():
    plan = planner(mixture(), epochs=2)
    found = steps(plan, 3)
    for name, drawn in plan.state()["sources"].items():
        mine = [ref for ref in refs(found) if ref.source == name]
        assert (drawn["samples"], drawn["tokens"]) == (len(mine), sum(ref.length for ref in mine))
    assert plan.epoch == pytest.approx(len(refs(found)) / 205)
    steps(plan)
    assert plan.epoch == 2.0


@pytest.mark.parametrize("budgets", [{}, {"max_slices": 25, "max_audio_seconds": 90.0}])
def test_a_restored_plan_continues_identically_from_every_step(budgets):
    plan = planner(mixture(), epochs=3, **budgets)
    states = [json.dumps(plan.state())]
    found = []
    while step := plan.next_step():
        found.append(step)
        states.append(json.dumps(plan.state()))
    for number, state in enumerate(states):
        other = planner(mixture(), epochs=3, **budgets)
        steps(other, 2)
        other.restore(json.loads(state))
        assert json.dumps(other.state()) == state
        assert steps(other) == found[number:]
        assert other.state() == plan.state()


def test_a_restored_plan_goes_on_in_steps_of_another_size():
    whole = [pack for step in steps(planner(mixture(), epochs=2)) for pack in step.packs if pack.refs]
    first = planner(mixture(), epochs=2, packs=4)
    head = [pack for step in steps(first, 2) for pack in step.packs]
    second = planner(mixture(), epochs=2, packs=3)
    second.restore(first.state())
    assert head + [pack for step in steps(second) for pack in step.packs if pack.refs] == whole


def test_a_saved_run_can_be_made_longer_or_shorter():
    plan = planner(mixture(), epochs=2)
    head = steps(plan, 5)
    longer = planner(mixture(), epochs=3)
    longer.restore(plan.state())
    assert len(refs(head)) + len(refs(steps(longer))) == 3 * 205
    shorter = planner(mixture(), epochs=0.1)
    shorter.restore(plan.state())
    assert len(refs(steps(shorter))) == len(plan.state()["buffer"])
    assert shorter.next_step() is None


def test_a_state_is_kilobytes_of_json():
    plan = planner([table(str(i), 2000, shards=50) for i in range(8)], buffer=128, length=1024)
    steps(plan, 5)
    assert len(json.dumps(plan.state())) < 6000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed=1: the saved run was planned with 0."),
        ({"length": 256}, "data.pack.length=256: the saved run was planned with 128."),
        ({"digest": "b"}, "='b': the saved run was planned with 'a'."),
        ({"shuffle": 3}, "data.shuffle_shards=3:"),
        ({"max_slices": 60}, "data.pack.max_slices=60: the saved run was planned with None."),
    ],
)
def test_a_state_of_another_plan_is_refused_with_what_changed(change, named):
    state = json.loads(json.dumps(planner(mixture()).state()))
    with pytest.raises(ValueError) as error:
        planner(mixture(), **change).restore(state)
    assert named in str(error.value)
    assert str(error.value).count("the saved run was planned with") == 1


def test_a_state_of_other_sources_is_refused_with_what_changed():
    state = planner(mixture()).state()
    tables = [*mixture()[:2], table("text", 91, shards=7, epochs=0.5), table("more")]
    with pytest.raises(ValueError, match=r"data.sources.text \(samples\)=91: .* 90") as error:
        planner(tables).restore(state)
    assert "'text', 'more']: the saved run was planned with ['image', 'audio', 'text']" in str(error.value)


def shuffled(seed=0, shuffle=2, epochs=1.0, name="a") -> list[tuple]:
    """The order of draws: with a buffer of one, every row is the next draw."""
    plan = planner([table(name, 200, shards=12)], buffer=1, seed=seed, shuffle=shuffle, epochs=epochs)
    return keys(refs(steps(plan)))


def test_order_is_equal_for_equal_seeds_and_differs_by_seed_epoch_and_source():
    assert shuffled() == shuffled()
    assert shuffled(seed=1) != shuffled()
    twice = shuffled(epochs=2.0)
    assert twice[:200] == shuffled()
    assert twice[200:] != twice[:200] and sorted(twice[200:]) == sorted(twice[:200])
    places = [shard_row[1:] for shard_row in shuffled()]
    assert places != sorted(places)


def test_only_a_window_of_shards_is_shuffled_together():
    shards = [shard for _, shard, _ in shuffled(shuffle=3)]
    sizes = Counter(shards)
    seen, start = set(), 0
    while start < len(shards):
        window = set(list(dict.fromkeys(shards[start:]))[:3])
        stop = start + sum(sizes[shard] for shard in window)
        assert set(shards[start:stop]) == window and not window & seen
        assert stop - start == 1 or shards[start:stop] != sorted(shards[start:stop])
        seen, start = seen | window, stop
    assert seen == set(shards)


def test_order_is_pinned_so_that_saved_runs_go_on_after_an_upgrade():
    tables = [
        SourceTable(
            name="pinned",
            shard=np.repeat(np.arange(3, dtype=np.int32), 3),
            row=np.tile(np.arange(3, dtype=np.int32), 3),
            length=np.ones(9, np.int32),
            cost=np.ones(9),
            slices=np.zeros(9, np.int32),
            audio_seconds=np.zeros(9, np.float32),
        )
    ]
    found = refs(steps(planner(tables, buffer=1, seed=7)))
    assert " ".join(f"{ref.shard}{ref.row}" for ref in found) == "20 01 02 22 00 21 10 12 11"


def test_the_oldest_is_always_in_the_next_pack_and_no_delay_exceeds_the_buffer():
    tables = [table("a", 3000, shards=30, length=(20, 900))]
    single = planner(tables, length=4096, buffer=1)
    order = {key: number for number, key in enumerate(keys(refs(steps(single))))}
    found = steps(planner(tables, length=4096, buffer=64))
    packs = [[order[key] for key in keys(pack.refs)] for step in found for pack in step.packs if pack.refs]
    waiting = set(range(len(order)))
    handed_out = 0
    for pack in packs:
        assert pack == sorted(pack) and pack[0] == min(waiting)
        waiting -= set(pack)
        for number in pack:
            assert handed_out - number < 64
        handed_out += len(pack)
    assert not waiting


def test_rows_are_full_until_the_buffer_runs_dry_and_no_row_is_wasted():
    tables = [table("a", 2000, length=(20, 900)), table("b", 3000, length=(50, 400))]
    found = steps(planner(tables, length=4096, buffer=128))
    packs = [pack for step in found for pack in step.packs if pack.refs]
    assert all(pack.length == 4096 for pack in packs[:-16])
    assert len(packs) == math.ceil(sum(pack.length for pack in packs) / 4096)


@given(
    seed=st.integers(0, 99),
    max_slices=st.none() | st.integers(30, 60),
    max_audio_seconds=st.none() | st.floats(100, 200),
    buffer=st.integers(1, 40),
)
@settings(max_examples=25, deadline=None)
def test_no_pack_of_a_run_exceeds_any_budget_and_nothing_is_lost(seed, max_slices, max_audio_seconds, buffer):
    tables = mixture()
    media = {
        (t.name, int(t.shard[i]), int(t.row[i])): (int(t.slices[i]), float(t.audio_seconds[i]))
        for t in tables
        for i in range(len(t))
    }
    plan = planner(
        tables, seed=seed, buffer=buffer, max_slices=max_slices, max_audio_seconds=max_audio_seconds
    )
    found = steps(plan)
    for pack in (pack for step in found for pack in step.packs):
        assert pack.length <= 128
        used = [media[key] for key in keys(pack.refs)]
        assert max_slices is None or sum(slices for slices, _ in used) <= max_slices
        assert max_audio_seconds is None or sum(s for _, s in used) <= max_audio_seconds + 1e-6
    assert Counter(ref.source for ref in refs(found)) == {"image": 70, "audio": 90, "text": 45}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_plan_does_not_change_with_the_number_of_ranks(world_size):
    for step in steps(planner(mixture(), packs=8)):
        hands = deal(step.packs, world_size, 1)
        dealt = [pack for hand in hands for batch in hand for pack in batch]
        assert Counter(dealt) == Counter(step.packs)


def refused(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        planner(*args, **kwargs)
    return str(error.value)


def test_a_sample_longer_than_a_row_is_refused_by_name():
    tables = [table("a"), table("b", length=(65, 66))]
    assert refused(tables, length=64) == (
        "data.sources.b: row 0 of shard 0 has 65 tokens, more than data.pack.length=64. "
        "Set data.pack.oversize to drop or truncate."
    )


def test_an_empty_source_is_refused_by_name():
    empty = SourceTable("b", *(np.zeros(0, np.int32) for _ in range(3)), *(np.zeros(0) for _ in range(3)))
    assert refused([table("a"), empty]).startswith("data.sources.b: no sample is left.")
    assert refused([]).startswith("data.sources: no source is left")


def test_weights_for_some_sources_only_are_refused():
    assert refused([table("a", weight=1.0), table("b")]).startswith("data.sources.b.weight=null: ")


def test_a_run_that_ends_before_its_first_sample_is_refused():
    assert refused([table("a", 3)], epochs=0.1).startswith("train.epochs=0.1: ends before the first of 3")


def test_a_budget_below_the_mean_of_the_mixture_is_refused():
    even = table("a", 40, length=(10, 11))
    even.slices[:] = 1
    even.audio_seconds[:] = 0.75
    other = table("b", 40, length=(30, 31), weight=None)
    # A draw has 0.5 slices and 20 tokens on average, so a row of 128 tokens has 3.2 slices.
    assert refused([even, other], max_slices=3) == (
        "data.pack.max_slices=3: below the mixture's mean of 3.2 a pack, so rows would stay empty. "
        "Use 5 or more: 1.3 times the mean fills rows."
    )
    assert refused([even, other], max_audio_seconds=2.0).startswith("data.pack.max_audio_seconds=2.0: below")
    planner([even, other], max_slices=4, max_audio_seconds=2.4)
    even.weight, other.weight = 1.0, 4.0
    planner([even, other], max_slices=1)
