"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from train.config import OptimConfig, Schedule


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Returns what the peak learning rate is multiplied by in `step`, which counts from 1.

    Linear warm-up that ends at 1, then `cosine` or `constant`, or `wsd`: constant and a linear
    decay over the last share of steps. The decay would reach `min_factor` in the step after the
    last, so that no step is spent at zero.
    """
    assert step >= 1, "steps count from 1"
    warmup_steps = _share(config.warmup, total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    if config.schedule is Schedule.constant:
        return 1.0
    if config.schedule is Schedule.cosine:
        progress = _progress(step, warmup_steps, total_steps)
        remaining = (1 + math.cos(math.pi * progress)) / 2
    else:
        decay_steps = _share(config.decay_share, total_steps)
        remaining = 1 - _progress(step, total_steps - decay_steps, total_steps)
    return config.min_factor + (1 - config.min_factor) * remaining


def _share(share: float, total_steps: int) -> int:
    # Rounded up as in the Hugging Face trainer; 0.07 * 100 is 7.000000000000001 and must stay 7.
    return math.ceil(share * total_steps - 1e-9)


def _progress(step: int, start: int, end: int) -> float:
    """Returns how much of the steps after `start` through `end` is over before `step`, in [0, 1]."""
    return min(max((step - 1 - start) / max(end - start, 1), 0.0), 1.0)
