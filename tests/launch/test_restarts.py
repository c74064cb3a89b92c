"""A stage that crashes is started again by its pipeline, unless that leads nowhere."""

import os
import signal
import time

import pytest

from launch.restarts import Restarts, newest_step, rank_status
from tests.launch.piping import (
    finish,
    is_alive,
    launcher_in,
    records_of,
    running_in,
    start,
    wait_for_step,
    wait_until,
    words,
    write_pipeline,
)

ONE_STAGE = 'stages: [{recipe: vision_align, overrides: ["data.tags=[]"]}]'


def test_crashes_are_counted_until_one_leaves_a_newer_checkpoint():
    restarts = Restarts(2)
    assert restarts.allow(137, 0, 0) and restarts.allow(1, 0, 0) and restarts.wasted == 2
    assert restarts.allow(1, 0, 10) and restarts.wasted == 0
    assert restarts.allow(70, 10, 10) and restarts.allow(70, 10, 10) and not restarts.allow(70, 10, 10)
    assert not Restarts(2).allow(2, 0, 10) and not Restarts(0).allow(1, 0, 0)


def test_the_status_of_ranks_is_found_behind_that_of_their_launcher():
    def said(*statuses):
        return [f"  exitcode  : {status} (pid: {number})" for number, status in enumerate(statuses)]

    assert rank_status(1, said(75, 75)) == 75 and rank_status(1, said(75, 1)) == 1
    assert rank_status(1, said(1, 2)) == 2 and rank_status(1, said(-9)) == 1
    assert rank_status(75, []) == 75 and rank_status(2, ["exit"]) == 2


def test_a_half_written_checkpoint_is_no_progress(tmp_path):
    (tmp_path / "step-00000004").mkdir()
    assert newest_step(tmp_path) == 0
    (tmp_path / "step-00000004" / "manifest.json").touch()
    assert newest_step(tmp_path) == 4


def test_a_stage_that_crashes_again_and_again_without_progress_ends_its_pipeline(tmp_path, picture_shards):
    runs = tmp_path / "runs"
    process = start(write_pipeline(tmp_path, ONE_STAGE), words(runs, picture_shards, "retries=1"))
    for number in range(2):
        wait_until(process, lambda: running_in(runs / "vision_align"))  # it loads
        (rank,) = running_in(runs / "vision_align")
        os.kill(rank, signal.SIGKILL)
        if number == 0:
            wait_until(process, lambda rank=rank: not is_alive(rank))
    output = finish(process, code=137)
    again = "vision_align: crashed with exit status 137. Starts again from step 0 (1 of retries=1 used"
    assert output.count("Starts again") == 1 and again in output
    assert again in (runs / "vision_align.log").read_text()
    assert "failed with exit status 137" in output


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_step_is_noticed_and_the_stage_finishes(tmp_path, picture_shards):
    runs = tmp_path / "runs"
    run = runs / "vision_align"
    given = words(runs, picture_shards, "accelerate=cpu2", "zero=zero2", "train.steps=60")
    process = start(write_pipeline(tmp_path, ONE_STAGE), given)
    wait_for_step(process, run, 9)
    ranks = [pid for pid in running_in(run) if pid != launcher_in(run)]
    os.kill(ranks[-1], signal.SIGKILL)
    killed = time.monotonic()
    while "Starts again" not in (line := process.stdout.readline()):
        assert line
    print(f"noticed after {time.monotonic() - killed:.1f} s")
    assert "Starts again from step" in line and "(0 of retries=2 used" in line
    finish(process)
    print(f"finished after {time.monotonic() - killed:.1f} s")
    assert [record["step"] for record in records_of(run)] == [*range(1, 61)]
