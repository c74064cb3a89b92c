"""Config node `lora`: which linear layers stay as they are and learn through low-rank adapters. Never
imports torch.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field

from train.model.shapes import Shapes

LAYERS = {
    "llm": "llm.model.layers.",
    "vision_encoder": "vision.vpm.encoder.layers.",
    "audio_encoder": "audio.audio.blocks.",
}
"""Where the transformer layers of a module are; adapters sit nowhere else."""

TARGETS = {
    "llm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "vision_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "audio_encoder": ("query", "key", "value", "out", "mlp.0", "mlp.2"),
}
"""Ends of the names of every linear layer in there."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters: a layer computes W x + alpha / rank * B A x, and only A and B train.

    `rank` 0 is none. `modules` get them in the layers that `targets` end the names of (empty: in all
    linear layers); they must be among those that a stage tunes.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: ["llm"])

    @property
    def adapted(self) -> tuple[str, ...]:
        """The modules whose own weights stay frozen, and whose adapters train."""
        return tuple(self.modules) if self.rank else ()

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @property
    def pattern(self) -> str:
        """A regular expression that fits the whole names of the adapted layers, and no other."""
        roots = "|".join(re.escape(LAYERS[module]) for module in self.modules)
        known = {target: None for module in self.modules for target in TARGETS[module]}
        ends = "|".join(re.escape(target) for target in self.targets or known)
        return rf"({roots})\d+\.([^.]+\.)?({ends})"

    def weights(self, shapes: Shapes) -> Shapes:
        """Returns those of the weights that get an adapter, with their shapes."""
        pattern = re.compile(self.pattern + r"\.weight")
        return {name: shape for name, shape in shapes.items() if self.rank and pattern.fullmatch(name)}

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        if self.rank < 0:
            return [f"rank={self.rank}: must not be negative. Use 0 for no adapters, or 16."]
        if not self.rank:
            changed = [name for name in ("alpha", "targets", "modules") if self._differs(name)]
            return [f"{name}: lora.rank=0, so there are no adapters. Set lora.rank=16." for name in changed]
        found = []
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            found.append(f"alpha={self.alpha}: must be above 0. Use 16.")
        if not self.modules:
            found.append(f"modules=[]: nothing would get adapters. Name some of {', '.join(LAYERS)}.")
        known = list(LAYERS)
        wrong = [_unknown("modules", name, known) for name in self.modules if name not in known]
        return found + (wrong or self._problems_of_targets())

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != getattr(LoraConfig(), name)

    def _problems_of_targets(self) -> list[str]:
        known = [target for module in self.modules for target in TARGETS[module]]
        found = [_unknown("targets", name, known) for name in self.targets if name not in known]
        for module in self.modules:
            if self.targets and not set(self.targets) & set(TARGETS[module]):
                names = ", ".join(TARGETS[module])
                found.append(f"modules: no target is a layer of {module}. Name one of {names}.")
        return found


def _unknown(key: str, name: str, known: list[str]) -> str:
    if name.endswith("_proj") and key == "modules":
        return f"modules={name!r}: is a connector, which trains whole. Take it out; tune_{name} decides."
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key}={name!r}: not known.{hint} Known: {', '.join(dict.fromkeys(known))}."
