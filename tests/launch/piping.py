"""Starts pipelines as a person would, and ends them in every way there is."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.train.launching import ROOT, SMALL, environment
from train.sinks import Record

ENTRIES = """\
stages:
  - {recipe: vision_align, overrides: ["data.tags=[]"]}
  - {recipe: vision_tune, overrides: ["data.tags=[]", train.steps=12]}
  - {recipe: omni_sft, only_with: seed=7}
"""
"""Two stages on pictures, and one that comes only with a word."""
LENGTH = ("train.steps=40", "checkpoint.every=2")
EVALUATION = (
    "data.holdout=0.2",
    "eval.samples=2",
    "eval.max_new_tokens=2",
    "+eval.metrics.picture_cer=folder.cer",
    "+eval.metrics.picture_loss=folder.loss",
)
PATIENCE_SECONDS = 120


def write_pipeline(folder: Path, text: str = ENTRIES) -> Path:
    """Writes a pipeline's file and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def words(runs: Path, data: Path, *more: str) -> list[str]:
    """Returns the words of a small pipeline."""
    return [
        *SMALL,
        *EVALUATION,
        f"data.path={data}",
        "train.packs_per_step=2",
        *LENGTH,
        f"runs={runs}",
        *more,
    ]


IMPATIENT = (
    "import sys; from launch import pipeline, process; "
    "process.PATIENCE_SECONDS = 8.0; sys.exit(pipeline.main(sys.argv[1:]))"
)
"""A pipeline that waits eight seconds for processes of an earlier start."""


def start(pipeline: Path, given: list[str], impatient: bool = False) -> subprocess.Popen:
    """Starts a pipeline whose output can be read."""
    return subprocess.Popen(
        [
            sys.executable,
            *(["-c", IMPATIENT] if impatient else ["-m", "launch.pipeline"]),
            str(pipeline),
            *given,
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a pipeline, checks its exit status, and returns its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Waits until something has happened while a pipeline works."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Waits until a stage has logged a step."""
    wait_until(process, lambda: any(record["step"] >= step for record in records_of(run)))


def records_of(run: Path) -> list[Record]:
    """Returns the whole lines of a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def kill_tree(process: subprocess.Popen) -> None:
    """Kills a process and all that it started."""
    tree = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


def stage_of(run: Path) -> Record:
    """Returns the stage.json of a run."""
    return json.loads((run / "final" / "stage.json").read_text())


def running_in(run: Path) -> list[int]:
    """Returns the processes that have a run's folder on their command line."""
    found = []
    for each in psutil.process_iter(["pid", "cmdline"]):
        if any(f"run={run}" == word for word in each.info["cmdline"] or []) and each.pid != os.getpid():
            found.append(each.pid)
    return found


def launcher_in(run: Path) -> int:
    """Returns the one of `running_in` that started the others: accelerate's launcher."""
    found = [pid for pid in running_in(run) if "accelerate.commands.launch" in psutil.Process(pid).cmdline()]
    assert len(found) == 1, found
    return found[0]


def is_alive(pid: int) -> bool:
    """Returns whether a process runs: one that has ended may wait to be buried for long."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
