"""A run that is asked to end finishes its step, saves, says why and where, and ends with status 75."""

import json
import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.train.launching import ROOT, SMALL, Finished, command, environment, launch
from train.stopping import REASONS, StopRequests, reason_of, seconds_since_start

WORDS = (*SMALL, "train.steps=4000", "train.packs_per_step=2", "checkpoint.every=5000", "log.every=1")


def start(folder, words, processes: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, words, processes),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, folder, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def saved_steps(folder) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/manifest.json"))


def test_sigusr1_then_the_time_limit_save_and_the_run_goes_on(tmp_path, text_shards):
    folder, words = tmp_path / "run", (*WORDS, f"data.path={text_shards}", "eval.every=1", "data.holdout=0.2")
    process = start(folder, words)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    (saved,) = saved_steps(folder)
    said = re.search(r"step (\d+): asked to stop; saved in (\S+) \((.+)\)\. Start the same", output)
    assert said and said.groups() == (
        str(saved),
        f"{folder}/checkpoints/step-{saved:08d}",
        "SIGUSR1",
    )
    # An evaluation that was due is left to the next start: there is no time for it now.
    assert Finished(folder, 0, "").records[-1]["step"] == saved - 1
    again = launch(folder, *words, "train.max_minutes=0.001", code=75)
    assert f"Goes on after step {saved}" in again.output and "(train.max_minutes)" in again.output
    assert saved_steps(folder)[-1] == saved and again.records[-1]["step"] == saved - 1
    again = launch(folder, *words, "train.max_minutes=0.001", "eval.every=5000", code=75)
    steps = [record["step"] for record in again.records]
    assert steps == [*range(1, saved + 2)] and saved_steps(folder)[-1] == saved + 1


def test_a_signal_in_an_evaluation_ends_it_and_the_next_start_makes_it(tmp_path, mixed_shards):
    words = (*SMALL, f"data.path={mixed_shards}", "data.holdout=0.8", "train.packs_per_step=2")
    words = (*words, "train.steps=4", "checkpoint.every=1000", "eval.samples=100", "eval.batch=2")
    long, folder = "eval.max_new_tokens=150", tmp_path / "run"
    for every, step in ((2, 2), (1000, 4)):  # in the middle of the run, and at its end
        process = start(folder, (*words, long, f"eval.every={every}"))
        wait_for_step(process, folder, step - 1)
        time.sleep(2.0)  # a step takes a tenth of that, this evaluation much longer
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75 and f"step {step}: asked to stop; saved in" in output
        assert saved_steps(folder)[-1] == step
        assert Finished(folder, 0, "").records[-1]["step"] == step - 1
    assert not (folder / "final").exists() and not (folder / "eval").exists()
    again = launch(folder, *words, "eval.max_new_tokens=2")
    assert "Goes on after step 4" in again.output
    assert [record["step"] for record in again.records] == [1, 2, 3, 4]
    assert again.records[-1]["held_out"]["answers"] == again.stage["evaluation"]["answers"]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them_with_the_same_checkpoint(tmp_path, text_shards):
    folder = tmp_path / "run"
    process = start(folder, (*WORDS, f"data.path={text_shards}", "zero=zero2"), processes=2)
    wait_for_step(process, folder, 3)
    ranks = [each for each in psutil.Process(process.pid).children() if "train.py" in each.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert output.count("asked to stop; saved in") == 2 and "exitcode  : 75" in output
    (saved,) = saved_steps(folder)
    assert json.loads((folder / f"checkpoints/step-{saved:08d}/manifest.json").read_text())["world_size"] == 2


def test_a_signal_while_the_run_loads_ends_it_at_once(tmp_path, text_shards):
    folder = tmp_path / "run"
    process = start(folder, (*WORDS, f"data.path={text_shards}"))
    while not (folder / "config.yaml").is_file():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "before the first step; nothing to save" in output
    assert saved_steps(folder) == []


def test_flags_of_all_ranks_become_one_reason():
    assert reason_of([0.0, 0.0, 0.0]) == ""
    assert reason_of([2.0, 0.0, 1.0]) == "SIGTERM and train.max_minutes"
    assert StopRequests(None).flags() == [0.0] * len(REASONS)
    assert StopRequests(1e9).flags() == [0.0] * len(REASONS) != StopRequests(1e-9).flags()


def test_the_time_limit_counts_from_the_start_of_the_process():
    lived = time.time() - psutil.Process().create_time()
    assert seconds_since_start() == pytest.approx(lived, abs=2.0)
