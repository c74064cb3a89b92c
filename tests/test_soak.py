"""A minute of the soak: nothing lost, nothing repeated, whenever runs are killed."""

import pytest

from tests.soak import soak


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_one_that_never_was(tmp_path):
    report = soak(minutes=1.5, seed=1, out=tmp_path, steps=60)
    assert report.faults == []
    assert report.samples_lost == report.samples_repeated == 0
    assert report.kills.total() >= 1 and report.steps_executed >= 60
    assert set(report.runs_completed) == {"fixed", "changing"}
    assert report.largest_weight_difference["fixed"] == report.largest_loss_difference["fixed"] == 0
