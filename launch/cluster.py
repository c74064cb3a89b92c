"""What `configs/cluster/NAME.yaml` says of a SLURM cluster."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.request import find_file, read_yaml
from train.compose import ROOT, nearest

TIME = r"(\d+-)?\d+:\d\d(:\d\d)?"
"""A time limit as SLURM reads it. A bare number, which it takes for minutes, is none."""

WORD = "cluster."
"""Beginning of the words of a command line that replace a key of the file."""


LEAST = {
    "gpus_per_node": 0,
    "cpus_per_rank": 1,
    "save_seconds": 1,
    "retries": 0,
    "preflight_seconds": 1,
}


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """A SLURM cluster. The files of configs/cluster explain the keys.

    `ranks_per_node` None is one for each GPU, or one on a node without. `save_seconds` is how long before
    the time limit the ranks are asked to save and end. Ranks that fail are started again within the job,
    until `retries` + 1 starts in a row have brought no new checkpoint; so many also go back into the queue.
    `preflight_seconds` is its longest wait for a node. `python` is the command that starts it on a node;
    None is the one that submits.
    """

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    cpus_per_rank: int = 8
    save_seconds: int = 300
    retries: int = 2
    preflight_seconds: int = 600
    python: str | None = None
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)

    @property
    def num_ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = self._problems_of_time()
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)}: must be at least {least}.")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            found.append(f"ranks_per_node={self.ranks_per_node}: must be at least 1. Use null.")
        if 0 < self.gpus_per_node < self.num_ranks:
            found.append(f"ranks_per_node={self.num_ranks}: more than gpus_per_node={self.gpus_per_node}.")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                found.append(f"env.{name}: is no name of a variable. Use letters, digits and underscores.")
        for name in ("sbatch", "srun"):
            found += [
                f"{name}: {option}: is no option. Write it as --exclusive, for example."
                for option in getattr(self, name)
                if not option.startswith("-")
            ]
        return found

    def _problems_of_time(self) -> list[str]:
        if not re.fullmatch(TIME, self.time):
            return [f"time={self.time}: is no time limit. Write it in quotes: '24:00:00' or '2-00:00:00'."]
        if re.fullmatch(r"\d+:\d\d", self.time):
            return [f"time={self.time}: SLURM reads minutes:seconds. Write {self.time}:00."]
        most = _seconds(self.time) // 2
        if self.save_seconds > most:
            text = f"more than half of time={self.time}. Use {most} at most, or a longer time."
            return [f"save_seconds={self.save_seconds}: {text}"]
        return []


def _seconds(time: str) -> int:
    """Returns the seconds of a time limit with hours; the last part may be left out after days."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = (*map(int, clock.split(":")), 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def load_cluster(name: str, words: list[str]) -> ClusterConfig:
    """Returns the cluster of that name; `words` such as time=1:00:00 replace keys of its file.

    Raises:
        ValueError: with every mistake on a line of its own.
    """
    given: Any = read_yaml(find_file("cluster", name, ROOT / "configs" / "cluster"))
    known = [entry.name for entry in dataclasses.fields(ClusterConfig)]
    keys = [*given, *(word.partition("=")[0].partition(".")[0] for word in words)]
    if strange := [key for key in keys if key not in known]:
        raise ValueError(
            "\n".join(
                f"{WORD}{key}: not a known key.{nearest(key, known)} Known: {', '.join(known)}."
                for key in strange
            )
        )
    # YAML 1.1 would read 1:00:00 as a number of seconds.
    quoted = [re.sub(rf"^(\w+)=({TIME})$", r"\1='\2'", word) for word in words]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), given, OmegaConf.from_dotlist(quoted))
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{WORD}{error.full_key}: {str(error).splitlines()[0]}. Mend cluster={name}."
        ) from error
    assert isinstance(cluster, ClusterConfig)
    if found := cluster.problems():
        raise ValueError("\n".join(WORD + line for line in found))
    return cluster
