"""Jobs on a real SLURM of two nodes: stopped, preempted, cancelled, killed and chained."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch.piping import EVALUATION, records_of, stage_of, write_pipeline
from tests.train.launching import ROOT, SMALL, environment, launch

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS = 60
WORDS = (*SMALL, "train.packs_per_step=2", f"train.steps={STEPS}", "checkpoint.every=1000")
ON_NODES = ("cluster=local", "nodes=2")
PATIENCE_SECONDS = 240


def submit(cluster, *words: str, code: int = 0) -> str:
    """Runs the command as a person does; returns what it says."""
    command = [sys.executable, "-m", "launch.slurm", *words]
    env = environment() | {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(cluster, run: Path, data: Path, *more: str) -> str:
    """Submits a stage on both nodes; returns its job."""
    submit(cluster, "recipe=omni_sft", *ON_NODES, *WORDS, f"data.path={data}", f"run={run}", *more)
    (job,) = jobs_of(run).values()
    return job


def jobs_of(home: Path) -> dict[str, str]:
    return json.loads((home / "jobs" / "1" / "jobs.json").read_text())


def log_of(run: Path) -> str:
    file = run / "jobs" / "1" / "omni_sft.log"
    return file.read_text(errors="replace") if file.is_file() else ""


def wait_for_step(cluster, run: Path, step: int) -> None:
    cluster.wait_until(lambda: any(each["step"] >= step for each in records_of(run)), PATIENCE_SECONDS)


def wait_for_state(cluster, job: str, *states: str) -> None:
    cluster.wait_until(lambda: cluster.job(job)["JobState"] in states, PATIENCE_SECONDS)


def assert_whole(run: Path, losses: list[float]) -> None:
    """Every step is there once, with the loss of a run that nothing stopped."""
    records = records_of(run)
    assert [each["step"] for each in records] == list(range(1, STEPS + 1))
    assert [each["loss"] for each in records] == pytest.approx(losses, rel=1e-5)


@pytest.fixture(autouse=True)
def nodes_are_free_again(cluster):
    """Ends the jobs that a test has left, so that the next one finds the nodes free."""
    yield
    cluster.call("scancel", "--user", "root")
    cluster.wait_until(lambda: not cluster.call("squeue", "-h").strip(), 60)


@pytest.fixture(scope="session")
def losses(mixed_shards, tmp_path_factory):
    """Losses of the same run on one machine, not stopped."""
    folder = tmp_path_factory.mktemp("reference")
    return launch(folder, "recipe=omni_sft", *WORDS, f"data.path={mixed_shards}", "zero=none").losses


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_job_that_is_asked_to_end_comes_back_and_loses_nothing(
    cluster, mixed_shards, losses, tmp_path, zero
):
    job = start(cluster, tmp_path / "run", mixed_shards, f"zero={zero}", "data.workers=1")
    wait_for_step(cluster, tmp_path / "run", 3)
    cluster.call("scancel", "--signal=TERM", job)
    wait_for_state(cluster, job, "PENDING")
    wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "1"), log_of(
        tmp_path / "run"
    )
    assert log_of(tmp_path / "run").count("Goes on after step") == 1
    assert_whole(tmp_path / "run", losses)


def test_a_controller_that_does_not_answer_for_a_while_ends_no_job(cluster, mixed_shards, tmp_path):
    run = tmp_path / "run"
    job = start(cluster, run, mixed_shards, "zero=none", "train.steps=100000")
    wait_for_step(cluster, run, 3)
    with cluster.silent_controller():
        os.kill(rank_process(run, 0), signal.SIGTERM)  # scancel would need the controller
        cluster.wait_until(lambda: "slurm_load_jobs error" in log_of(run), 120)
    wait_for_another_start(cluster, run, 1)
    cluster.call("scancel", job)
    assert log_of(run).count("saved; back into the queue") == 1


def test_a_rank_that_is_killed_is_noticed_and_the_job_goes_on(cluster, mixed_shards, losses, tmp_path):
    run = tmp_path / "run"
    job = start(cluster, run, mixed_shards, "zero=zero2", "checkpoint.every=2")
    wait_for_step(cluster, run, 5)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    cluster.wait_until(lambda: "the ranks ended with exit status 137" in log_of(run), 60)
    wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "0"), log_of(run)
    assert_whole(run, losses)


def rank_process(run: Path, rank: int) -> int:
    """Returns the process of a rank, which runs the copy of the code."""
    for each in psutil.process_iter(["cmdline"]):
        line = each.info["cmdline"] or []
        if str(run / "jobs/1/code/train.py") in line and each.environ().get("RANK") == str(rank):
            return each.pid
    raise AssertionError("there is no such rank")


def test_a_preempted_job_and_one_out_of_time_come_back_and_a_cancelled_one_does_not(
    cluster, mixed_shards, tmp_path
):
    run = tmp_path / "run"
    more = ("zero=none", "train.steps=100000", "data.workers=1", "cluster.time=0:03:00")
    job = start(cluster, run, mixed_shards, *more)
    wait_for_step(cluster, run, 3)
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    wait_for_another_start(cluster, run, 1)
    wait_for_another_start(cluster, run, 2)  # one to two minutes later: its time is up
    cluster.call("scancel", job)
    wait_for_state(cluster, job, "CANCELLED")
    cluster.wait_until(lambda: not cluster.call("squeue", "-h", "-j", job).strip(), PATIENCE_SECONDS)
    assert log_of(run).count("saved; back into the queue") == 2
    steps = [each["step"] for each in records_of(run)]
    assert steps == list(range(1, len(steps) + 1))


def wait_for_another_start(cluster, run: Path, count: int) -> None:
    """Waits until a job has gone on so many times, and trains again."""
    cluster.wait_until(lambda: log_of(run).count("Goes on after step") == count, PATIENCE_SECONDS)
    wait_for_step(cluster, run, records_of(run)[-1]["step"] + 2)


def test_a_mistake_is_refused_before_anything_is_submitted(cluster, mixed_shards, tmp_path):
    known = cluster.call("squeue", "-h", "-a", "-t", "all")
    for word, beginning in (
        ("train.stepps=3", "train.stepps: not a known key. Did you mean 'train.steps'?"),
        ("train.packs_per_step=3", "train.packs_per_step=3: not divisible among 2 ranks"),
        ("data.path=nowhere", "data.sources.folder.path=nowhere: "),
        ("init_from=nowhere", "init_from=nowhere: there is no such folder."),
    ):
        words = (*WORDS, f"data.path={mixed_shards}", f"run={tmp_path / 'run'}", word)
        assert submit(cluster, "recipe=omni_sft", *ON_NODES, *words, code=2).startswith(beginning)
    assert cluster.call("squeue", "-h", "-a", "-t", "all") == known
    assert not any(tmp_path.iterdir())


def test_what_slurm_refuses_leaves_nothing(cluster, mixed_shards, tmp_path):
    words = (*WORDS, f"data.path={mixed_shards}", f"run={tmp_path / 'run'}", "cluster.partition=none_such")
    said = submit(cluster, "recipe=omni_sft", *ON_NODES, *words, code=2)
    assert "sbatch: refuses omni_sft" in said and "partition" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["run", ".lock"]


def test_a_job_that_never_saves_ends_after_some_starts(cluster, mixed_shards, tmp_path):
    run = tmp_path / "run"
    job = start(cluster, run, mixed_shards, "zero=none", "cluster.retries=1")
    for number in (1, 2):
        cluster.wait_until(lambda number=number: f"start {number} on" in log_of(run), PATIENCE_SECONDS)
        cluster.call("scancel", "--batch", "--signal=USR1", job)  # long before there is anything to save
    wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExitCode"]) == ("FAILED", "1:0"), log_of(run)
    assert log_of(run).count("nothing was saved; back into the queue") == 1
    assert "nothing was saved in 2 starts in a row. Raise cluster.time" in log_of(run)


DEAF = """#!/usr/bin/env bash
if [[ "$*" == {script} && ! -e "$0.$RANK" ]]; then
  trap '' USR1
  touch "$0.$RANK"
  sleep {seconds}
  trap - USR1
fi
exec {python} "$@"
"""
"""A Python whose first start of a script misses signals for a while, as a rank does before srun starts it."""


@pytest.mark.parametrize(("script", "seconds"), [("'-m train.preflight '*", 300), ("*/train.py' '*", 4)])
def test_a_signal_that_comes_while_ranks_start_is_not_lost(
    cluster, mixed_shards, losses, tmp_path, script, seconds
):
    run, deaf = tmp_path / "run", tmp_path / "deaf"
    deaf.write_text(DEAF.format(script=script, seconds=seconds, python=sys.executable))
    deaf.chmod(0o755)
    job = start(cluster, run, mixed_shards, "zero=none", f"cluster.python={deaf}")
    cluster.wait_until(lambda: len(list(tmp_path.glob("deaf.*"))) == 2, PATIENCE_SECONDS)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_until(lambda: "back into the queue" in log_of(run), 60)
    wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert_whole(run, losses)


def test_a_mistake_of_one_rank_ends_the_job_though_another_hangs(cluster, mixed_shards, tmp_path):
    run = tmp_path / "run"
    job = start(cluster, run, mixed_shards, "zero=none")
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another start would that trains there
        cluster.wait_until(lambda: waits_for_lock(run), PATIENCE_SECONDS)
        os.kill(rank_process(run, 1), signal.SIGSTOP)
        wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExitCode"]) == ("FAILED", "2:0"), log_of(run)
    assert log_of(run).count("another start trains there") == 1 and "Killed" in log_of(run)


def waits_for_lock(run: Path) -> bool:
    try:
        files = psutil.Process(rank_process(run, 0)).open_files()
    except (AssertionError, psutil.Error):
        return False
    return str(run / ".lock") in [file.path for file in files]


def test_a_line_of_the_setup_that_fails_ends_the_job(cluster, mixed_shards, tmp_path):
    run = tmp_path / "run"
    job = start(cluster, run, mixed_shards, "zero=none", "cluster.setup=[cd /no_such_folder]")
    wait_for_state(cluster, job, "COMPLETED", "FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "cluster.setup: cd /no_such_folder: ended with 1. Mend it." in log_of(run)


def test_a_job_that_was_submitted_by_hand_keeps_others_out(cluster, mixed_shards, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "omni_sft"
    words = ("recipe=omni_sft", *ON_NODES, *WORDS, f"data.path={mixed_shards}", f"run={run}", "zero=none")
    cluster.call("scancel", start(cluster, run, mixed_shards, "zero=none"))
    monkeypatch.chdir(run / "jobs" / "1")
    job = cluster.call("sbatch", "--parsable", "--hold", "omni_sft.sh").strip()
    said = submit(cluster, *words, code=2)
    assert said == f"{run}: job {job} is not over yet. Wait for it, or scancel {job}.\n"
    command = [sys.executable, "-m", "launch.pipeline", "megrez_omni", *SMALL, f"data.path={mixed_shards}"]
    env = environment() | {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    done = subprocess.run(
        [*command, f"runs={run.parent}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and f"job {job} is not over yet" in done.stderr
    cluster.call("scancel", job)


def test_a_pipeline_is_a_chain_of_jobs_and_is_not_submitted_twice(cluster, picture_shards, tmp_path):
    pipeline, runs = write_pipeline(tmp_path), tmp_path / "runs"
    words = (f"pipeline={pipeline}", *ON_NODES, *SMALL, *EVALUATION, f"data.path={picture_shards}")
    words = (*words, f"runs={runs}", "train.packs_per_step=2", "train.steps=4", "zero=zero2")
    submit(cluster, *words)
    align, tune = jobs_of(runs).values()
    assert f"afterok:{align}" in cluster.job(tune)["Dependency"]
    assert f"job {align}, {tune} is not over yet" in submit(cluster, *words, code=2)
    wait_for_state(cluster, tune, "COMPLETED", "FAILED", "CANCELLED")
    assert cluster.job(tune)["JobState"] == "COMPLETED"
    assert (
        stage_of(runs / "vision_tune")["parent"]["weights_digest"]
        == stage_of(runs / "vision_align")["weights_digest"]
    )
    assert submit(cluster, *words).count("already complete") == 2
    command = [sys.executable, "-m", "launch.pipeline", str(pipeline), f"runs={runs}", "--table"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "picture_loss" in shown
