"""Corrupts data a thousand times and checks what becomes of it.

    python -m tests.fuzz --count 1000

Each case runs in a child process under a limit of time and memory; a child that dies or hangs has
broken a law too. A case depends on seed, kind and number alone: --only N runs one again.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tests.fuzz.cases import KINDS
from tests.fuzz.child import serve
from tests.fuzz.sources import build

CASE_SECONDS = 120.0
START_SECONDS = 300.0


@dataclass
class Report:
    """What became of the cases, by kind; `violations` name the case and the law."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[dict] = field(default_factory=list)

    def add(self, kind: str, number: int, way: str, outcome: str, broken: list[str]) -> None:
        """Enters one case."""
        self.outcomes.setdefault(kind, Counter())["violation" if broken else outcome] += 1
        if broken:
            self.violations.append({"kind": kind, "case": number, "way": way, "broken": broken})


class Child:
    """A process that runs cases. It is started anew when it died or had to be killed."""

    def __init__(self, root: Path, clean: dict[str, str], seed: int):
        self.log = root / "child.log"
        self._arguments = (str(root), clean, seed, str(self.log))
        self._process = None

    def run(self, kind: str, number: int) -> tuple[str, str, list[str]]:
        """Returns way, outcome and broken laws of one case."""
        seconds = CASE_SECONDS
        if self._process is None:
            self._start()
            seconds += START_SECONDS
        self._connection.send((kind, number))
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            return "?", "hang", [f"no answer within {seconds:.0f} s: {self._end()}"]
        except (EOFError, ConnectionError):
            return "?", "death", [f"the process died: {self._end()}"]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()

    def _end(self) -> str:
        """Returns how the process ended, having ended it if need be, and what it said last."""
        process, self._process = self._process, None
        assert process is not None
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        return f"exit code {process.exitcode}\n{self.log.read_text()[-2000:]}"

    def close(self) -> None:
        """Ends the process in peace."""
        if self._process is not None:
            self._connection.send(None)
            self._process.join(30)
            if self._process.is_alive():
                self._process.kill()


def fuzz(count: int, seed: int, kinds: list[str], only: int | None = None) -> Report:
    """Runs `count` cases of the kinds in turn, or the one of number `only`, and returns the report."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        child = Child(root, build(root / "clean"), seed)
        numbers = range(count) if only is None else [only]
        with tqdm(numbers, unit="case", disable=None) as bar:
            for number in bar:
                kind = kinds[number % len(kinds)]
                report.add(kind, number, *child.run(kind, number))
                bar.set_postfix_str(f"{len(report.violations)} violations")
        child.close()
    return report


def describe(report: Report) -> str:
    """Returns a report as text."""
    lines = []
    for kind, outcomes in report.outcomes.items():
        lines.append(f"{kind}: {outcomes.total()} cases")
        lines += [f"  {count:5} {outcome}" for outcome, count in outcomes.most_common()]
    for violation in report.violations:
        lines.append(f"VIOLATION {violation['kind']} case {violation['case']} ({violation['way']})")
        lines += [f"  {line}" for broken in violation["broken"] for line in broken.splitlines()]
    lines.append(
        f"{sum(c.total() for c in report.outcomes.values())} cases, {len(report.violations)} violations"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the fuzzer; returns 1 if any law was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Corrupt shards, indexes, media and records, and check that a run bears it.",
        epilog="example: python -m tests.fuzz --count 1000 --seed 1 --kind media",
    )
    parser.add_argument("--count", type=int, default=1000, help="how many corruptions (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes others (default: 0)")
    parser.add_argument("--kind", choices=list(KINDS), help="corrupt these alone (default: all in turn)")
    parser.add_argument("--only", type=int, metavar="N", help="run case number N alone, to look into it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    kinds = [options.kind] if options.kind else list(KINDS)
    report = fuzz(options.count, options.seed, kinds, options.only)
    seconds = time.monotonic() - started
    if options.json:
        values = {"outcomes": report.outcomes, "violations": report.violations, "seconds": round(seconds)}
        print(json.dumps(values))
    else:
        print(describe(report), f"in {seconds:.0f} s")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
