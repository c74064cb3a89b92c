"""One start at a time trains in a run's folder, and the lock goes with the process that has it."""

import signal
import subprocess
import time

import psutil
import pytest

from tests.train.launching import ROOT, SMALL, command, environment, launch

WORDS = ("recipe=omni_sft", *SMALL, "train.packs_per_step=2", "train.steps=100000", "zero=none")


@pytest.mark.slow
def test_a_second_start_is_refused_and_one_after_a_kill_goes_on_at_once(tmp_path, mixed_shards):
    run = tmp_path / "run"
    words = (*WORDS, f"data.path={mixed_shards}", "data.workers=1", "checkpoint.every=2")
    first = subprocess.Popen(command(run, words, 1), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    said = launch(run, *words, code=2).output
    assert f"run={run}: another start trains there (" in said and f", process {first.pid})." in said
    workers = psutil.Process(first.pid).children(recursive=True)
    assert workers
    # A worker that is stopped outlives its rank: it must not have inherited the lock.
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    first.kill()
    first.wait()
    started = time.monotonic()
    try:
        again = launch(run, *words, "train.max_minutes=0.01", code=75)
        assert "Goes on after step" in again.output and time.monotonic() - started < 30
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
