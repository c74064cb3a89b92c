"""What a rank sees of its node, and what is wrong with it beside the others."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

GIB = 2**30
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "numpy")
"""Libraries that must be the same on all nodes."""

LEAST_DISK_GIB = 1.0
LEAST_HOST_GIB = 1.0
LEAST_DEVICE_SHARE = 0.9
"""How much of a device's memory must be free: what is taken belongs to another process."""


@dataclass(slots=True)
class Facts:
    """One rank's view of its node. Memory and disk are what is free.

    `fault` says what already failed here: the folder or the device. `clock_seconds` is how far its clock is
    from the first rank's.
    """

    rank: int
    node: str
    num_devices: int
    device: str
    device_gib: float
    device_total_gib: float
    host_gib: float
    disk_gib: float
    versions: dict[str, str]
    faults: list[str]
    clock_seconds: float = 0.0


def look_around(rank: int, node: str, folder: Path) -> Facts:
    """Returns what this rank sees; it leaves a file of its own in `folder`."""
    faults: list[str] = []
    device, free, total = _tried(faults, _try_device, ("none", 0, 0))
    disk = _tried(faults, lambda: _try_folder(folder, rank), 0)
    return Facts(
        rank=rank,
        node=node,
        num_devices=torch.cuda.device_count(),
        device=device,
        device_gib=round(free / GIB, 1),
        device_total_gib=round(total / GIB, 1),
        host_gib=round(_free_host_bytes() / GIB, 1),
        disk_gib=round(disk / GIB, 1),
        versions=_versions(),
        faults=faults,
    )


def _tried(faults: list[str], look: Callable, otherwise):
    try:
        return look()
    except (OSError, RuntimeError) as error:
        faults.append(str(error).splitlines()[0])
        return otherwise


def _try_device() -> tuple[str, int, int]:
    """Computes something on this rank's device; returns its name, free and total bytes.

    Raises:
        RuntimeError: there is none for this rank, or it does not compute.
    """
    if not torch.cuda.is_available():
        return "CPU", 0, 0
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise RuntimeError(f"local rank {place} has no device: there are {count}. Start fewer ranks a node.")
    free, total = torch.cuda.mem_get_info(place)
    ones = torch.ones(1024, 1024, device=f"cuda:{place}")
    if not bool((ones @ ones == 1024).all()):
        raise RuntimeError(f"device {place} computes wrong products. Take its node out of service.")
    return torch.cuda.get_device_name(place), free, total


def marker(folder: Path, rank: int) -> Path:
    """Returns the file that a rank leaves in the folder for the others to see."""
    return folder / f".preflight-{rank}"


def _try_folder(folder: Path, rank: int) -> int:
    """Writes this rank's file; returns the free bytes of the disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker(folder, rank).write_text("seen\n")
    except OSError as error:
        raise OSError(
            f"cannot write in {folder} ({error.strerror}). Mend its mount or its rights."
        ) from error
    return shutil.disk_usage(folder).free


def _free_host_bytes() -> int:
    """Returns the bytes that a process could still get; Linux tells it exactly."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def find_problems(facts: list[Facts], devices: int = 0, clock_limit_seconds: float = 1.0) -> list[str]:
    """Returns what is wrong, a line each, opening with the node and rank that have it.

    `devices` is how many GPUs a node must show.
    """
    found = []
    for each in facts:
        where = f"{each.node} (rank {each.rank})"
        if each.num_devices < devices:
            found.append(
                f"{where}: sees {each.num_devices} of {devices} GPUs. See nvidia-smi there, "
                "and whether torch is built for CUDA."
            )
        found += [f"{where}: {text}" for text in [*each.faults, *_lacks(each)]]
        if abs(each.clock_seconds) > clock_limit_seconds:
            found.append(
                f"{where}: its clock is {each.clock_seconds:+.1f} s off the first rank's. Set it by ntp."
            )
    return found + _strangers(facts)


def _lacks(facts: Facts) -> list[str]:
    found = []
    if facts.host_gib < LEAST_HOST_GIB:
        found.append(f"{facts.host_gib} GiB of memory are free. End what takes it.")
    if facts.disk_gib < LEAST_DISK_GIB and not facts.faults:
        found.append(f"{facts.disk_gib} GiB of the folder's disk are free. Make room.")
    if facts.device_gib < LEAST_DEVICE_SHARE * facts.device_total_gib:
        taken = facts.device_total_gib - facts.device_gib
        found.append(f"{taken:.1f} GiB of its device are taken. End what runs there.")
    return found


def _strangers(facts: list[Facts]) -> list[str]:
    """Returns who has other software or devices than most ranks have."""
    traits = {name: [each.versions.get(name, "absent") for each in facts] for name in facts[0].versions}
    traits["devices"] = [f"{each.num_devices} x {each.device}" for each in facts]
    found = []
    for name, values in traits.items():
        usual = Counter(values).most_common(1)[0][0]
        found += [
            f"{each.node} (rank {each.rank}): {name} {value} there, {usual} on others. Make them equal."
            for each, value in zip(facts, values)
            if value != usual
        ]
    return found


def table(facts: list[Facts]) -> str:
    """Returns a row per node: the least that any of its ranks has."""
    rows = [("node", "ranks", "devices", "device GiB", "host GiB", "disk GiB", "clock s")]
    for node in dict.fromkeys(each.node for each in facts):
        here = [each for each in facts if each.node == node]
        free = min(each.device_gib for each in here)
        rows.append(
            (
                node,
                f"{here[0].rank}" if len(here) == 1 else f"{here[0].rank}-{here[-1].rank}",
                f"{here[0].num_devices} x {here[0].device}" if here[0].num_devices else here[0].device,
                f"{free} of {here[0].device_total_gib}" if here[0].device_total_gib else "",
                f"{min(each.host_gib for each in here)}",
                f"{min(each.disk_gib for each in here)}",
                f"{max((each.clock_seconds for each in here), key=abs):+.3f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
