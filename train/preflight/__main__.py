"""Checks the nodes of a job before it starts, and names the bad one:

python -m train.preflight --folder runs/omni_sft

Alone it checks this machine. Started as every rank, by torchrun or by srun with RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT set, it checks all nodes and what lies between them. No wait is longer than `--timeout`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from train.compose import readable_errors
from train.preflight.node_facts import Facts, find_problems, look_around, marker, table
from train.preflight.wire import Wire, bounded, gigabytes_per_second, measure

LOOK_SECONDS = 0.05
LEAVE_SECONDS = 5.0
SEEN_SECONDS = 20.0
"""How long a file of another node may take to be seen in a shared folder."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is, of how many, and where they meet. `nodes` are names of nodes, if they are known."""

    rank: int
    world_size: int
    per_node: int
    host: str
    port: int
    nodes: list[str]

    def node(self, rank: int) -> str:
        """Returns the name of a rank's node."""
        number = rank // self.per_node
        return self.nodes[number] if number < len(self.nodes) else f"node {number}"

    def name(self, rank: int) -> str:
        """Returns a rank and its node."""
        return f"{self.node(rank)} (rank {rank})"


def read_place(nodes: list[str]) -> Place:
    """Returns this rank's place from the launcher's environment; a world of one without.

    Raises:
        ValueError: the environment is only half there.
    """
    if "RANK" not in os.environ:
        return Place(0, 1, 1, "127.0.0.1", 0, nodes or [socket.gethostname()])
    absent = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ValueError(f"{absent[0]}: is not set beside RANK. Start this with torchrun or srun.")
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        host=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        nodes=nodes,
    )


def _answers(host: str, port: int, seconds: float) -> bool:
    """Returns whether anything listens there within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return True
        except OSError:  # not yet, or a name that leads nowhere
            time.sleep(0.2)
    return False


class Absent(Exception):
    """Ranks that do not answer."""


class Meeting:
    """The ranks' meeting point, a key/value store on the first rank, at which no wait is endless."""

    def __init__(self, place: Place, seconds: float) -> None:
        self.place = place
        self._seconds = seconds
        if place.rank and not _answers(place.host, place.port, seconds):
            raise Absent(self._explain(""))
        try:
            self.store = bounded(self._open, seconds)
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise Absent(self._explain(str(error))) from error

    def _open(self) -> TCPStore:
        place = self.place
        return TCPStore(
            place.host,
            place.port,
            place.world_size,
            is_master=place.rank == 0,
            timeout=timedelta(seconds=self._seconds),
            wait_for_workers=False,
        )

    def _explain(self, text: str) -> str:
        place = self.place
        if place.rank:
            where = f"{place.name(0)} at {place.host}:{place.port}"
            return f"{place.name(place.rank)}: cannot reach {where} within {self._seconds:.0f} s."
        if "in use" in text or "EADDRINUSE" in text:
            return f"{place.name(0)}: port {place.port} is taken there. End what listens on it."
        return f"{place.name(0)}: cannot listen on {place.host}:{place.port}: {text.splitlines()[0]}"

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Returns every rank's value.

        Raises:
            Absent: some did not give theirs in time; it names them.
        """
        place = self.place
        self.store.set(f"{what}/{place.rank}", json.dumps(value))
        absent = self._wait(what, self._seconds)
        if absent:
            late = f"does not answer within {self._seconds:.0f} s. See whether its node is up."
            raise Absent("\n".join(f"{place.name(rank)}: {late}" for rank in absent))
        return [json.loads(self.store.get(f"{what}/{rank}")) for rank in range(place.world_size)]

    def leave(self) -> None:
        """Goes; the first rank, which keeps the store, goes last."""
        self.store.set(f"left/{self.place.rank}", "")
        if self.place.rank == 0:
            self._wait("left", min(self._seconds, LEAVE_SECONDS))

    def _wait(self, what: str, seconds: float) -> list[int]:
        """Returns the ranks that have not set something within some seconds."""
        end = time.monotonic() + seconds
        absent = list(range(self.place.world_size))
        while absent and time.monotonic() < end:
            absent = [rank for rank in absent if not self.store.check([f"{what}/{rank}"])]
            time.sleep(LOOK_SECONDS if absent else 0)
        return absent


@dataclass(slots=True)
class Report:
    """What was found: the facts of all ranks that answered, the slowest all-reduce, and what is wrong."""

    facts: list[Facts]
    problems: list[str]
    all_reduce_mib: float | None = None
    all_reduce_seconds: float | None = None
    gigabytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Demands:
    """What is checked: the GPUs of a node, the folder, an all-reduce of a size; and the longest wait."""

    devices: int
    folder: Path
    size_mib: float
    seconds: float


def check_nodes(place: Place, wanted: Demands) -> Report:
    """Checks everything with all other ranks; what fails first is reported alone."""
    report = Report([look_around(place.rank, place.node(place.rank), wanted.folder)], [])
    if place.world_size > 1:
        try:
            _check_together(place, report, wanted)
        except Absent as error:
            report.problems += str(error).splitlines()
        except RuntimeError:  # the store is gone, and with it the first rank
            report.problems.append(f"{place.name(0)}: has gone in the middle of the check. See what it says.")
    report.problems += find_problems(report.facts, wanted.devices)
    return report


def _check_together(place: Place, report: Report, wanted: Demands) -> None:
    meeting = Meeting(place, wanted.seconds)
    report.facts = [Facts(**each) for each in meeting.exchange("facts", asdict(report.facts[0]))]
    if not find_problems(report.facts, wanted.devices):
        _check_between(meeting, report, wanted)
    meeting.leave()


def _check_between(meeting: Meeting, report: Report, wanted: Demands) -> None:
    """Checks what only ranks that are sound can check together: the shared folder and the wire."""
    place, folder, size_mib = meeting.place, wanted.folder, wanted.size_mib
    unseen = meeting.exchange("unseen", _unseen(folder, place.world_size))
    report.problems += [
        f"{place.name(rank)}: does not see in {folder} what {place.name(missed[0])} wrote there. Share it."
        for rank, missed in enumerate(unseen)
        if missed
    ]
    wire = measure(meeting.store, place.rank, place.world_size, size_mib, wanted.seconds)
    _add_wire(place, report, [Wire(**each) for each in meeting.exchange("wire", asdict(wire))], size_mib)


def _unseen(folder: Path, world_size: int) -> list[int]:
    """Returns the ranks whose files cannot be seen in the folder, after some patience."""
    end = time.monotonic() + SEEN_SECONDS
    unseen = list(range(world_size))
    while unseen and time.monotonic() < end:
        unseen = [rank for rank in unseen if not marker(folder, rank).exists()]
        time.sleep(LOOK_SECONDS if unseen else 0)
    return unseen


def _add_wire(place: Place, report: Report, wires: list[Wire], size_mib: float) -> None:
    """Adds what the ranks measured together."""
    report.problems += _faults(place, [wire.fault for wire in wires])
    for facts, wire in zip(report.facts, wires):
        facts.clock_seconds = round(wire.clock_seconds, 4)
    slowest = max(wire.seconds for wire in wires)
    if not report.problems:
        report.all_reduce_mib = size_mib
        report.all_reduce_seconds = slowest
        report.gigabytes_per_second = gigabytes_per_second(size_mib, slowest, place.world_size)


def _faults(place: Place, faults: list[str | None]) -> list[str]:
    """Returns what failed on which rank; none is named where all see the same, as when one of them hangs."""
    if faults[0] and len(set(faults)) == 1:
        return [f"all ranks: {faults[0]} Which of them is at fault cannot be told."]
    return [f"{place.name(rank)}: {fault}" for rank, fault in enumerate(faults) if fault]


def show(report: Report, place: Place, as_json: bool) -> None:
    """Prints the report."""
    if as_json:
        print(json.dumps(asdict(report), indent=1), flush=True)
        return
    print(table(report.facts))
    if report.gigabytes_per_second and report.all_reduce_seconds:
        print(
            f"all-reduce of {report.all_reduce_mib:g} MiB over {place.world_size} ranks: the sums are right, "
            f"{report.all_reduce_seconds * 1e3:.1f} ms, {report.gigabytes_per_second:.2f} GB/s"
        )
    for problem in report.problems:
        print(f"BAD  {problem}")
    print("preflight: bad" if report.problems else "preflight: good", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.preflight",
        description="Check the nodes of a job: devices, memory, disk, clocks, versions and the network.",
        epilog="Example: python -m train.preflight --folder runs/omni_sft",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="what all ranks must see and write in"
    )
    parser.add_argument(
        "--devices", type=int, default=0, metavar="N", help="GPUs that each node must show (0)"
    )
    parser.add_argument("--nodes", default="", help="names of the nodes in order: node1,node2")
    parser.add_argument("--size-mib", type=float, default=64, help="size of the all-reduce (64)")
    parser.add_argument(
        "--timeout", type=float, default=120, help="longest wait for other ranks, in seconds (120)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Checks the nodes; returns 0 where all are good, else 1."""
    options = build_parser().parse_args(arguments)
    with readable_errors():
        place = read_place([name for name in options.nodes.split(",") if name])
    wanted = Demands(options.devices, options.folder, options.size_mib, options.timeout)
    report = check_nodes(place, wanted)
    with suppress(OSError):  # a folder that cannot be written has been found bad
        marker(options.folder, place.rank).unlink()
    # The first rank speaks for all; one that never met it speaks for its node.
    if place.rank == 0 or (len(report.facts) < place.world_size and place.rank % place.per_node == 0):
        show(report, place, options.json)
    return 1 if report.problems else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a collective that hangs would keep the process
