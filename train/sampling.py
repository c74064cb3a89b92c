"""How an answer is drawn. Imports no torch, so that a mistake is refused before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Sampling:
    """At most `max_new_tokens`, the likeliest ones at temperature 0 (see `train.generate.generate`)."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = sampling_problems(self.temperature, self.top_p)
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1. Use 512.")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed}: must be at least 0 and below 2^63. Use 0.")
        return found


def sampling_problems(temperature: float, top_p: float) -> list[str]:
    """Returns what is wrong with these two, one line each."""
    found = []
    if not 0.0 <= temperature < math.inf:
        found.append(f"temperature={temperature}: must be at least 0. Use 0 for the likeliest token.")
    if not 0.0 < top_p <= 1.0:
        found.append(f"top_p={top_p}: must be above 0 and at most 1. Use 1 to draw from all tokens.")
    return found
