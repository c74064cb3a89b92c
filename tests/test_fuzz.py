"""Corrupted data of every kind break no law: python -m tests.fuzz looks for more."""

import pytest

from tests.fuzz.__main__ import describe, fuzz
from tests.fuzz.cases import KINDS


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_crash_nothing_hide_nothing_and_cost_no_intact_sample(count):
    report = fuzz(count, seed=count, kinds=list(KINDS))
    print(describe(report))
    assert not report.violations, describe(report)
    assert sum(outcomes.total() for outcomes in report.outcomes.values()) == count
