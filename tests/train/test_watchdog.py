"""A rank that hangs, or waits for one that does, says what it was at and ends; so does its launcher."""

import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from data.loader import StepBatches
from tests.train.launching import ROOT, environment
from tests.train.test_stopping import WORDS, start, wait_for_step
from train.watchdog import EXIT_HUNG, Watchdog


def hang_one_rank(folder, words) -> tuple[str, list[psutil.Process], float]:
    """Stops the second of two ranks in the middle of training; returns output, ranks and seconds it took."""
    process = start(folder, words, processes=2)
    wait_for_step(process, folder, 3)
    ranks = [each for each in psutil.Process(process.pid).children() if "train.py" in each.cmdline()]
    numbers = {each.environ()["RANK"]: each for each in ranks}
    numbers["1"].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=150)
    return output, ranks, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_a_rank_that_waits_for_a_stopped_one_reports_and_ends_and_so_does_the_launcher(
    tmp_path, text_shards, zero
):
    folder = tmp_path / "run"
    words = (*WORDS, f"data.path={text_shards}", f"zero={zero}", "train.hang_seconds=15")
    output, ranks, seconds = hang_one_rank(folder, words)
    print(f"{zero}: the launcher ended {seconds:.0f} s after the rank was stopped")
    assert f"exitcode  : {EXIT_HUNG}" in output
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks)
    report = (folder / "hangs" / "rank-00000.txt").read_text()
    assert not (folder / "hangs" / "rank-00001.txt").exists()
    found = re.search(r"rank 0, step (\d+): no progress for (\d+) s in (.+)\. This rank ends", report)
    assert found and int(found[1]) >= 3 and int(found[2]) >= 15
    assert found[0] in output
    assert re.search(r"samples of this rank: folder/\w+", report)
    assert "Current thread" in report and "train/loop.py" in report


def test_what_makes_signs_is_left_alone_and_what_makes_none_is_ended(tmp_path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from data.loader import StepBatches\n"
        "from train.watchdog import Watchdog\n"
        "dog = Watchdog(1.0, 3, Path(sys.argv[1]))\n"
        "time.sleep(2)  # loading may take as long as it likes\n"
        "dog.begin(StepBatches(7, [], {}, 0.0, {}, 1.0, 0.0))\n"
        "for _ in range(10):\n"
        "    time.sleep(0.2)\n"
        "    dog.sign('a forward pass')\n"
        "print('alive', flush=True)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "hangs")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "alive\n" and done.returncode == EXIT_HUNG
    report = (tmp_path / "hangs" / "rank-00003.txt").read_text()
    assert "rank 3, step 7: no progress for 1 s in a forward pass" in report
    assert report.splitlines()[0] in done.stderr


def test_its_thread_has_ended_when_it_is_stopped(tmp_path):
    dog = Watchdog(60.0, 0, tmp_path)
    dog.begin(StepBatches(1, [], {}, 0.0, {}, 1.0, 0.0))
    assert "watchdog" in [thread.name for thread in threading.enumerate()]
    dog.stop()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    Watchdog(60.0, 0, tmp_path).stop()  # nor does one that never began mind
