"""Faults of a whole run, made for real: a killed rank under a launcher that restarts, a full disk."""

import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.train.launching import ROOT, SMALL, Finished, command, environment
from tests.train.test_stopping import saved_steps

WORDS = (*SMALL, "train.packs_per_step=2", "checkpoint.every=3")


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return [
        each for each in children if each.status() != psutil.STATUS_ZOMBIE and "train.py" in each.cmdline()
    ]


@pytest.mark.slow
def test_accelerate_restarts_after_a_killed_rank_and_not_after_sigterm(tmp_path, text_shards):
    folder = tmp_path / "run"
    words = command(folder, (*WORDS, f"data.path={text_shards}", "zero=zero2", "train.steps=4000"), 2)
    words[words.index("train.py") : words.index("train.py")] = ["--max_restarts", "3"]
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, text=True
        )
    metrics = folder / "metrics.jsonl"

    def wait(happened) -> float:
        began = time.monotonic()
        while not happened():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() - began < 120, log.read_text()
            time.sleep(0.02)
        return time.monotonic() - began

    wait(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 8)
    first = ranks_of(launcher)
    first[0].kill()
    seconds = wait(lambda: len(ranks_of(launcher)) == 2 and not set(ranks_of(launcher)) & set(first))
    print(f"restarted after {seconds:.1f} s")
    wait(lambda: "Goes on after step" in log.read_text())
    began_at = int(re.findall(r"Goes on after step (\d+)", log.read_text())[-1])
    wait(lambda: Finished(folder, 0, "").records[-1]["step"] >= began_at + 3)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=90)
    said = log.read_text()
    assert began_at >= 6 and "asked to stop; saved" in said and said.count("Goes on after step") == 1
    assert not any(each.is_running() for each in first) and not running_ranks(folder)
    steps = [record["step"] for record in Finished(folder, 0, "").records]
    assert steps == [*range(1, saved_steps(folder)[-1] + 1)]


def running_ranks(folder) -> list[int]:
    return [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if f"run={folder}" in (each.info["cmdline"] or [])
    ]
