from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pack import Candidate, fill_row

LENGTH = 64

candidates = st.lists(
    st.builds(
        Candidate,
        length=st.integers(1, LENGTH),
        slices=st.integers(0, 6),
        audio_seconds=st.sampled_from([0.0, 0.1, 0.7, 3.3, 12.5]),
    ),
    min_size=1,
    max_size=40,
)


def total(buffer, places) -> int:
    return sum(buffer[place].length for place in places)


@given(candidates, st.none() | st.integers(1, 8), st.none() | st.floats(0.5, 15))
def test_a_row_never_overflows_and_the_oldest_is_always_in_it(buffer, max_slices, max_audio_seconds):
    places = fill_row(buffer, LENGTH, max_slices, max_audio_seconds)
    assert places[0] == 0
    assert places == sorted(set(places)) and places[-1] < len(buffer)
    assert total(buffer, places) <= LENGTH


@given(candidates, st.none() | st.integers(1, 8), st.none() | st.floats(0.5, 15))
def test_pack_never_exceeds_any_budget_unless_its_oldest_alone_does(buffer, max_slices, max_audio_seconds):
    places = fill_row(buffer, LENGTH, max_slices, max_audio_seconds)
    for column, budget in (("slices", max_slices), ("audio_seconds", max_audio_seconds)):
        if budget is None:
            continue
        used = [getattr(buffer[place], column) for place in places]
        if used[0] > budget:
            assert not any(used[1:]), "a sample over the budget shares its pack with another that uses it"
        else:
            assert sum(used) <= budget + 1e-9


@given(st.lists(st.integers(1, 24), min_size=1, max_size=9))
@settings(max_examples=300)
def test_no_subset_with_the_oldest_fills_a_row_better(lengths):
    buffer = [Candidate(length) for length in lengths]
    others = range(1, len(buffer))
    best = max(
        filled
        for count in range(len(buffer))
        for chosen in combinations(others, count)
        if (filled := total(buffer, (0, *chosen))) <= LENGTH
    )
    assert total(buffer, fill_row(buffer, LENGTH)) == best


@given(st.lists(st.integers(1, 24), min_size=1, max_size=9))
@settings(max_examples=300)
def test_of_equal_fills_the_newest_samples_are_left_out(lengths):
    buffer = [Candidate(length) for length in lengths]
    places = fill_row(buffer, LENGTH)
    filled = total(buffer, places)
    equal = [
        (0, *chosen)
        for count in range(len(buffer))
        for chosen in combinations(range(1, len(buffer)), count)
        if total(buffer, (0, *chosen)) == filled
    ]
    assert tuple(places) == min(equal, key=lambda chosen: chosen[::-1])


def test_budgets_that_nothing_touches_change_nothing():
    buffer = [Candidate(length, slices=1, audio_seconds=1.0) for length in (9, 31, 7, 40, 24, 17)]
    assert fill_row(buffer, LENGTH, 100, 100.0) == fill_row(buffer, LENGTH) == [0, 1, 4]


@pytest.mark.parametrize("budgets", [(3, None), (None, 3.0)])
def test_samples_without_media_join_one_that_is_over_budget(budgets):
    buffer = [Candidate(10, 4, 4.0), Candidate(20, 1, 1.0), Candidate(30), Candidate(24)]
    assert fill_row(buffer, LENGTH, *budgets) == [0, 2, 3]
