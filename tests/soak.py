"""Proof that a run may be killed at any moment: `python -m tests.soak --minutes 15`.

A reference run is made first, uninterrupted, on two ranks. Then runs of the same config are killed at
random moments, saves among them, and started again: in one lane always on two ranks, in the other on
one or two and with any number of loader workers. A lane whose run is complete begins another one. In
the end every run is compared with the reference: samples of every global step, in every execution of
it; optimizer steps; losses and weights. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.records import KINDS, prepare, write_records
from tests.train.launching import ROOT, SMALL, Finished, environment, free_port
from train.manifest import PARTIAL, newest_checkpoint, read_manifest, step_of
from train.stopping import EXIT_STOPPED

TOLERANCE = 1e-5
"""Relative, for losses of a run whose number of ranks changed at random: roundings add up over its steps."""
LAUNCHER_SECONDS = 30.0
"""How long a rank may wait to meet one that died while it started: only a launcher, here the soak, tells."""
END_SECONDS = 60.0
"""Within this all ranks must have ended after one was killed, or after SIGTERM."""
KINDS_OF_KILL = ("SIGKILL of all ranks", "SIGKILL of one rank", "SIGTERM")
MOMENTS = ("start", "training", "save")
WEIGHTS_OF_MOMENTS = (1, 4, 3)


@dataclass
class Report:
    """What happened. `faults` must be empty."""

    kills: Counter[str] = field(default_factory=Counter)
    kills_during_a_save: int = 0
    resumes: int = 0
    runs_completed: Counter[str] = field(default_factory=Counter)
    steps_compared: int = 0
    steps_executed: int = 0
    steps_executed_again: int = 0
    samples_lost: int = 0
    samples_repeated: int = 0
    slowest_end_seconds: float = 0.0
    largest_loss_difference: dict[str, float] = field(default_factory=dict)
    final_loss_difference: dict[str, float] = field(default_factory=dict)
    largest_weight_difference: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report in words."""
        kills = ", ".join(f"{kind} {count}" for kind, count in self.kills.items())
        again = self.steps_executed_again
        lines = [
            f"kills                {self.kills.total()} ({kills}); {self.kills_during_a_save} during a save",
            f"resumes              {self.resumes}",
            f"completed runs       {dict(self.runs_completed)}",
            f"samples lost         {self.samples_lost}",
            f"samples repeated     {self.samples_repeated}",
            f"steps                {self.steps_executed} executed, {again} of them again; "
            f"{self.steps_compared} compared",
            f"slowest end          {self.slowest_end_seconds:.1f} s after a rank was killed or SIGTERM",
        ]
        for lane in self.runs_completed:
            lines.append(
                f"lane {lane:15s} relative difference: final loss {self.final_loss_difference[lane]:.1e}, "
                f"any loss {self.largest_loss_difference[lane]:.1e}; of a weight, absolute, "
                f"{self.largest_weight_difference[lane]:.1e}"
            )
        return [*lines, *(f"FAULT {fault}" for fault in self.faults)]


@dataclass
class Job:
    """One start of a run: its ranks, each a process that leads a session of its own."""

    folder: Path
    log: Path
    ranks: int
    words: tuple[str, ...]
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self) -> None:
        address = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with self.log.open("w") as log:
            for rank in range(self.ranks):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", f"run={self.folder}", *self.words],
                        cwd=ROOT,
                        env=environment() | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def kill(self, how: str, rank: int) -> None:
        """Sends a signal to all ranks, or to `rank` where `how` says so."""
        for number, process in enumerate(self.processes):
            if how == "SIGTERM":
                process.terminate()
            elif how == "SIGKILL of all ranks" or number == rank:
                process.kill()

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Returns whether all ranks ended within some time; ends what is left of them."""
        deadline = time.monotonic() + seconds
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = not self.is_running
        for process in self.processes:  # loader workers of a killed rank, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return ended

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes]


@dataclass
class Lane:
    """Runs of one kind, one after another."""

    name: str
    folder: Path
    changes: bool
    number: int = 0
    starts: int = 0

    @property
    def run(self) -> Path:
        return self.folder / f"run-{self.number}"


class Soak:
    """Kills, starts again and compares."""

    def __init__(self, out: Path, seed: int, steps: int) -> None:
        self.out = out
        self.draw = random.Random(seed)
        self.report = Report()
        self.executed: dict[Path, set[int]] = {}
        shards = prepare(write_records(out / "records", [*KINDS] * 40, seed=seed), out / "shards")
        self.words = (
            *SMALL,
            f"data.path={shards}",
            f"train.steps={steps}",
            "train.packs_per_step=2",
            "zero=zero2",
            "checkpoint.every=10",
            "log.samples=true",
            "data.holdout=0.1",
            "eval.every=50",
        )
        self.lanes = [Lane("fixed", out / "fixed", False), Lane("changing", out / "changing", True)]
        for lane in self.lanes:
            lane.folder.mkdir()

    def make_reference(self) -> None:
        """Makes the run that the others must equal."""
        folder = self.out / "reference"
        folder.mkdir()
        job = Job(folder / "run", folder / "run.log", 2, (*self.words, "data.workers=0"))
        job.start()
        if not job.wait(24 * 3600) or not is_complete(job.folder):
            raise RuntimeError(f"{job.log}: the reference run failed:\n{job.log.read_text()[-2000:]}")
        self.reference = Finished(job.folder, 0, "")
        self.keys = read_samples(job.folder)

    def attempt(self, lane: Lane, *, kill: bool) -> None:
        """Starts a lane's run once, and kills it at a random moment unless it ends before."""
        if is_complete(lane.run):
            lane.number += 1
        job = self._job_of(lane)
        first = step_of(newest) if (newest := newest_checkpoint(lane.run / "checkpoints")) else 0
        before = inode(lane.run / "samples.jsonl")
        job.start()
        told = f"{lane.name} {lane.number}: {job.ranks} ranks, {job.words[-1]}, from step {first}; "
        if kill:
            told += self._kill(job, *self._how_and_when())
        elif not job.wait(24 * 3600) or not is_complete(job.folder):
            self._fault(f"{told}exit statuses {job.codes}; see {job.log}")
        else:
            told += "not killed"
        # A start that came as far as its first step has cut back what the one before left.
        if inode(lane.run / "samples.jsonl") != before:
            self._account(job, first)
        print(f"{told}, at step {max(read_samples(lane.run), default=0)}", flush=True)
        if is_complete(lane.run):
            self._compare(lane)

    def _job_of(self, lane: Lane) -> Job:
        ranks, workers = (self.draw.choice((1, 2)), self.draw.choice((0, 1, 2))) if lane.changes else (2, 0)
        lane.starts += 1
        log = lane.folder / f"start-{lane.starts:03d}.log"
        return Job(lane.run, log, ranks, (*self.words, f"data.workers={workers}"))

    def _how_and_when(self) -> tuple[str, str]:
        return self.draw.choice(KINDS_OF_KILL), self.draw.choices(MOMENTS, WEIGHTS_OF_MOMENTS)[0]

    def _kill(self, job: Job, how: str, moment: str) -> str:
        """Waits for the moment, kills, waits for the end, and tells what was done."""
        if not self._wait_for(job, moment):
            job.wait(0)
            if not is_complete(job.folder):
                self._fault(f"{job.folder}: ended by itself with {job.codes}; see {job.log}")
            return "ended before it could be killed"
        trains = has_trained(job)
        saves = trains and save_under_way(job.folder)  # before that it may be what a killed start left
        started = time.monotonic()
        job.kill(how, self.draw.randrange(job.ranks))
        if not job.wait(END_SECONDS if trains else LAUNCHER_SECONDS) and trains:
            self._fault(f"{job.folder}: ranks still ran {END_SECONDS:.0f} s after {how}; see {job.log}")
        seconds = time.monotonic() - started
        if how == "SIGTERM" and trains:
            self._check_stopped(job)
        self.report.kills[how] += 1
        self.report.kills_during_a_save += saves
        self.report.slowest_end_seconds = max(self.report.slowest_end_seconds, seconds)
        when = "during a save" if saves else "while it trained" if trains else "while it started"
        return f"{how} {when}, ended in {seconds:.1f} s"

    def _wait_for(self, job: Job, moment: str) -> bool:
        """Returns whether the run still lives when the moment has come."""
        if moment == "start":
            until = time.monotonic() + self.draw.uniform(0.5, 6)
            return self._while_alive(job, lambda: time.monotonic() < until)
        if not self._while_alive(job, lambda: not has_trained(job)):
            return False
        until = time.monotonic() + self.draw.uniform(0, 8)
        if not self._while_alive(job, lambda: time.monotonic() < until):
            return False
        return moment != "save" or self._while_alive(job, lambda: not save_under_way(job.folder))

    def _while_alive(self, job: Job, goes_on) -> bool:
        while goes_on():
            if not all(process.poll() is None for process in job.processes):
                job.wait(END_SECONDS)
                return False
            time.sleep(0.003)
        return True

    def _check_stopped(self, job: Job) -> None:
        """After SIGTERM the last finished step is saved, and all ranks say so; or the run is complete."""
        if is_complete(job.folder):
            return
        saved = newest_checkpoint(job.folder / "checkpoints")
        last = max(read_samples(job.folder))
        if saved is None or step_of(saved) != last or set(job.codes) != {EXIT_STOPPED}:
            self._fault(
                f"{job.folder}: SIGTERM stopped it at step {last} with exit statuses {job.codes}, but "
                f"{saved} is the newest checkpoint; see {job.log}"
            )

    def _account(self, job: Job, first: int) -> None:
        """Compares the samples of every step that a start from step `first` executed with the reference's."""
        steps = {step: keys for step, keys in read_samples(job.folder).items() if step > first}
        resumed = f"Goes on after step {first} from" in job.log.read_text(errors="replace")
        if steps and first and not resumed:
            self._fault(f"{job.folder}: did not go on from step {first}; see {job.log}")
        if sorted(steps) != list(range(first + 1, first + 1 + len(steps))):
            self._fault(
                f"{job.folder}: steps {sorted(steps)} are not in a row from {first + 1}; see {job.log}"
            )
        done = self.executed.setdefault(job.folder, set())
        for step in (step for step, keys in steps.items() if keys != self.keys[step]):
            self._fault(f"{job.folder}: step {step} has other samples than the reference; see {job.log}")
        self.report.resumes += resumed
        self.report.steps_executed += len(steps)
        self.report.steps_executed_again += len(done & set(steps))
        done |= set(steps)

    def _compare(self, lane: Lane) -> None:
        """Compares a complete run with the reference."""
        run, whole = Finished(lane.run, 0, ""), self.reference
        self._compare_samples(read_samples(lane.run))
        if [record["step"] for record in run.records] != [record["step"] for record in whole.records]:
            self._fault(f"{lane.run}: other steps in metrics.jsonl than the reference")
            return
        for what, left, right in (
            ("optimizer steps", optimizer_steps(lane.run), optimizer_steps(whole.folder)),
            ("counts of samples", run.stage["samples"], whole.stage["samples"]),
        ):
            if left != right:
                self._fault(f"{lane.run}: {what} {left}, of the reference {right}")
        self._compare_numbers(lane, run)
        self.report.steps_compared += len(run.losses)
        self.report.runs_completed[lane.name] += 1

    def _compare_samples(self, keys: dict[int, list[str]]) -> None:
        for step in sorted(set(keys) | set(self.keys)):
            mine, theirs = Counter(keys.get(step, [])), Counter(self.keys.get(step, []))
            self.report.samples_lost += (theirs - mine).total()
            self.report.samples_repeated += (mine - theirs).total()

    def _compare_numbers(self, lane: Lane, run: Finished) -> None:
        whole, report = self.reference, self.report
        losses = [abs(a - b) / abs(b) for a, b in zip(run.losses, whole.losses)]
        mine, theirs = run.weights(), whole.weights()
        apart = max(float((mine[key] - theirs[key]).abs().max()) for key in theirs)
        for most, value in (
            (report.largest_loss_difference, max(losses)),
            (report.final_loss_difference, losses[-1]),
            (report.largest_weight_difference, apart),
        ):
            most[lane.name] = max(most.get(lane.name, 0.0), value)
        same = run.losses == whole.losses and run.grad_norms == whole.grad_norms and apart == 0
        same = same and run.stage["evaluation"] == whole.stage["evaluation"]
        if not lane.changes and not same:
            self._fault(f"{lane.run}: not bit-equal to the reference")
        if max(losses) > TOLERANCE:
            self._fault(f"{lane.run}: a loss is {max(losses):.1e} from the reference's")

    def _fault(self, text: str) -> None:
        self.report.faults.append(text)
        print(f"FAULT {text}", flush=True)


def is_complete(run: Path) -> bool:
    """Whether a run has ended with its result."""
    return (run / "final" / "stage.json").is_file()


def read_samples(run: Path) -> dict[int, list[str]]:
    """Returns the samples of every step that a run's folder tells of; a line cut short counts as none."""
    path = run / "samples.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            found[entry["step"]] = entry["samples"]
    return found


def has_trained(job: Job) -> bool:
    """Whether this start of a run has finished a step."""
    return "\nstep " in job.log.read_text(errors="replace")


def inode(path: Path) -> int:
    """Returns what tells a file from another one of the same name; 0 where there is none."""
    return path.stat().st_ino if path.is_file() else 0


def save_under_way(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(f"{PARTIAL}step-*"))


def optimizer_steps(run: Path) -> int:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    return read_manifest(newest)["optimizer_steps"]


def soak(minutes: float, seed: int, out: Path, steps: int) -> Report:
    """Runs the whole soak in the empty folder `out` and returns what happened."""
    work = Soak(out, seed, steps)
    print("making the reference run", flush=True)
    work.make_reference()
    began = time.monotonic()
    turn = 0
    while time.monotonic() < began + 60 * minutes:
        print(f"{(time.monotonic() - began) / 60:5.1f} min  ", end="", flush=True)
        work.attempt(work.lanes[turn % 2], kill=True)
        turn += 1
    for lane in work.lanes:
        if not is_complete(lane.run):
            print("to its end  ", end="", flush=True)
            work.attempt(lane, kill=False)
        if not work.report.runs_completed[lane.name]:
            work.report.faults.append(f"lane {lane.name}: no run was completed")
    return work.report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 where nothing was lost, repeated or other than in the reference."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2],
        epilog="example: python -m tests.soak --minutes 15 --json soak.json",
    )
    parser.add_argument(
        "--minutes", type=float, required=True, help="how long to kill; the reference is extra"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, the moments and the kinds of kills")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run")
    parser.add_argument(
        "--out", type=Path, help="empty folder for the runs, kept (default: one that is removed)"
    )
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args(arguments)
    out = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    out.mkdir(parents=True, exist_ok=True)
    report = soak(options.minutes, options.seed, out, options.steps)
    print("\n".join(report.lines()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(vars(report), indent=1))
    if not options.out and not report.faults:
        shutil.rmtree(out)
    wrong = report.faults or report.samples_lost or report.samples_repeated
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
