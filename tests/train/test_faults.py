"""Faults of a whole run, made for real: a killed rank under a launcher that restarts, a full disk."""

import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.train.launching import ROOT, SMALL, Finished, command, environment, launch
from tests.train.test_stopping import saved_steps, start, wait_for_step

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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs leave to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk) -> None:
    """Leaves not one block free."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def fill_at_step(folder, step: int, words) -> Finished:
    """Starts a run and fills its disk after a step; returns what became of it."""
    process = start(folder, words)
    wait_for_step(process, folder, step)
    fill(folder.parent)
    output, _ = process.communicate(timeout=60)
    return Finished(folder, process.returncode, output)


@pytest.mark.slow
def test_a_full_or_read_only_disk_is_named_and_costs_no_checkpoint(small_disk, text_shards):
    folder = small_disk / "run"
    words = (*WORDS, f"data.path={text_shards}", "train.steps=400", "checkpoint.every=2", "eval.every=0")
    saving = fill_at_step(folder, 5, words)  # a checkpoint takes more than the page that metrics have left
    assert saving.code not in (0, 75) and "No space left on device" in saving.output
    assert f"{folder}/" in saving.output
    saved = saved_steps(folder)
    assert saved and not list((folder / "checkpoints").glob(".partial*"))
    (small_disk / "filler").unlink()

    words = (*words, "checkpoint.every=1000")
    logging = fill_at_step(folder, saved[-1] + 3, words)
    assert f"Goes on after step {saved[-1]}" in logging.output
    assert logging.code == 2 and f"{folder}/metrics.jsonl: No space left on device." in logging.output
    assert saved_steps(folder) == saved
    (small_disk / "filler").unlink()

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = launch(folder, *words, code=2)
    assert "Read-only file system. Mend it and start again." in refused.output
    assert f"{folder}/" in refused.output and "Traceback" not in refused.output
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)

    again = launch(folder, *words, "train.max_minutes=0.001", code=75)
    assert f"Goes on after step {saved[-1]}" in again.output
    assert [record["step"] for record in again.records] == [*range(1, saved[-1] + 2)]
