import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import OptimConfig, Schedule
from train.schedule import lr_factor

CONFIGS = st.builds(
    OptimConfig,
    schedule=st.sampled_from(Schedule),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0.01, 0.5),
    min_factor=st.floats(0, 0.9),
)


def factors(total: int, config: OptimConfig) -> list[float]:
    return [lr_factor(step, total, config) for step in range(1, total + 1)]


@given(CONFIGS, st.integers(1, 300))
def test_factor_is_above_zero_in_every_step_and_peaks_at_one(config, total):
    values = factors(total, config)
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1


@given(CONFIGS, st.integers(1, 300))
def test_factor_rises_and_then_never_rises_again(config, total):
    values = factors(total, config)
    top = values.index(1)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


@given(CONFIGS, st.integers(1, 300))
def test_factor_stays_above_min_factor_after_warm_up(config, total):
    values = factors(total, config)
    assert all(value >= config.min_factor - 1e-12 for value in values[values.index(1) :])


def test_warm_up_is_linear_over_its_share_of_all_steps():
    config = OptimConfig(warmup=0.07)
    assert factors(100, config)[:8] == pytest.approx([k / 7 for k in range(1, 8)] + [1.0])


def test_cosine_is_half_way_in_the_middle_and_ends_just_above_min_factor():
    values = factors(1000, OptimConfig(warmup=0.0, min_factor=0.1))
    assert values[500] == pytest.approx(0.55)
    assert 0.1 < values[-1] < 0.1001


def test_constant_never_decays():
    assert set(factors(50, OptimConfig(schedule=Schedule.constant, warmup=0.0))) == {1.0}


def test_wsd_is_flat_and_then_decays_linearly_over_the_last_share():
    values = factors(100, OptimConfig(schedule=Schedule.wsd, warmup=0.1, decay=0.2, min_factor=0.0))
    assert set(values[9:80]) == {1.0}
    assert values[80:] == pytest.approx([1 - k / 20 for k in range(20)])
