"""RUNS/pipeline.json: how long stages have taken over all starts, and what they were started from."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Origin:
    """What a stage is made from: digests of its data by config path, and of its parent's weights."""

    data_index_digests: dict[str, str]
    parent_weights_digest: str | None


@dataclass(slots=True)
class History:
    """What is known of the stages of a folder of runs. `seconds` of an interrupted stage are kept too."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    origins: dict[str, Any] = field(default_factory=dict)

    def origin(self, name: str) -> Origin | None:
        """Returns what a stage was started from, where it was."""
        return Origin(**self.origins[name]) if name in self.origins else None

    def start(self, name: str, origin: Origin, *, goes_on: bool, afresh: bool) -> None:
        """Notes a stage's start: `goes_on` from a checkpoint, or `afresh`, without even a folder.

        What it took before its first checkpoint counts too, unless it was removed since.
        """
        if not goes_on:
            self.origins[name] = dataclasses.asdict(origin)
        self.seconds[name] = 0.0 if afresh else self.seconds.get(name, 0.0)
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        write_json(self.path, {"seconds": self.seconds, "origins": self.origins})


def load_history(runs: Path) -> History:
    """Returns the history of a folder of runs, empty at first."""
    path = runs / "pipeline.json"
    return History(path, **(json.loads(path.read_text()) if path.is_file() else {}))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
