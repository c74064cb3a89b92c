"""Submits a stage, or a pipeline with a job per stage, to SLURM:

python -m launch.slurm recipe=omni_sft cluster=gpu8 nodes=2 data=mine
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster import WORD, ClusterConfig, load_cluster
from launch.history import load_history, write_json
from launch.job import Job, batch_script
from launch.jobs import JOBS, refuse_live
from launch.process import locked
from launch.request import read_request
from launch.snapshot import copy_code, describe_code
from launch.stages import Stage, compose_stages
from launch.standing import check_stage, check_stages
from train.compose import compose_words, readable_errors
from train.config import Resume

EXAMPLES = """\
words
  cluster=NAME       a file of configs/cluster, or a path to one
  cluster.KEY=VALUE  another value for a key of that file: cluster.time=4:00:00
  nodes=N            number of nodes (1)
  recipe=NAME        one stage, with words for train.py: model=tiny, data=mine, run=DIR, init_from=RUN
  pipeline=NAME      all stages, a job each, with the words of python -m launch.pipeline

example: python -m launch.slurm recipe=omni_sft cluster=gpu8 nodes=2 data=mine init_from=runs/audio_tune
example: python -m launch.slurm pipeline=megrez_omni cluster=gpu8 nodes=2 data=mine --dry-run

Everything is checked before anything is submitted. Each job runs a copy of the code and goes back into the
queue by itself when its time is up or it is preempted. scancel --signal=TERM JOB does the same by hand.
"""


@dataclass(slots=True)
class Order:
    """What a command line asks for. `words` are those for train.py or the pipeline."""

    cluster: ClusterConfig
    num_nodes: int
    pipeline: str | None
    words: list[str]

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.cluster.num_ranks


@dataclass(slots=True)
class Submission:
    """Checked stages in order, and the folder that all their jobs share."""

    order: Order
    home: Path
    stages: list[Stage]
    jobs: list[Job] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where scripts, logs and the copy of the code go: the first number that is free."""
        taken = [int(path.name) for path in (self.home / JOBS).glob("[0-9]*") if path.name.isdecimal()]
        return (self.home / JOBS / str(max(taken, default=0) + 1)).resolve()

    def plan(self) -> None:
        """Makes the jobs of all stages that are not complete, on paper."""
        folder, commit = self.folder, describe_code()
        nodes = f"{self.order.num_nodes} node{'s' if self.order.num_nodes > 1 else ''}"
        for stage in self.stages:
            if not stage.folder.is_complete:
                title = ", ".join([f"{stage.name} on {nodes}", *([commit] if commit else [])])
                script, run = folder / f"{stage.name}.sh", stage.folder.path.resolve()
                job = Job(
                    stage.name,
                    title,
                    stage.words,
                    run,
                    script,
                    folder / "code",
                    Path.cwd(),
                    self.order.num_nodes,
                )
                self.jobs.append(job)

    def scripts(self) -> list[str]:
        """Returns the text of every job's script."""
        return [batch_script(job, self.order.cluster, sys.executable) for job in self.jobs]

    def submit(self) -> list[str]:
        """Copies the code, writes the scripts and submits them; returns the numbers of the jobs.

        Raises:
            ValueError: SLURM refuses one. Then none stays, nor any file, as after a Ctrl-C.
        """
        folder, ids = self.jobs[0].script.parent, []
        try:
            copy_code(folder / "code")
            for job, script in zip(self.jobs, self.scripts()):
                job.script.write_text(script)
                job.script.chmod(0o755)
                ids.append(_sbatch(job, ids[-1:]))
            write_json(folder / "jobs.json", {job.name: number for job, number in zip(self.jobs, ids)})
        except BaseException:
            for number in ids:
                subprocess.run(["scancel", number], check=False)
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it holds earlier ones
                folder.parent.rmdir()
            raise
        return ids


def _sbatch(job: Job, after: list[str]) -> str:
    """Submits a job that starts when the one before it, if any, is complete; returns its number."""
    command = ["sbatch", "--parsable"]
    if after:
        command += [f"--dependency=afterok:{after[0]}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run([*command, str(job.script)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(
            "sbatch: is not installed here. Use a login node of the cluster, or --dry-run."
        ) from error
    if done.returncode:
        said = done.stderr.strip().removeprefix("sbatch: error: ")
        raise ValueError(f"sbatch: refuses {job.name}: {said}. Mend the cluster's file.")
    return done.stdout.strip().partition(";")[0]


def read_order(words: list[str]) -> Order:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: a word of ours is missing or wrong.
    """
    own: dict[str, str] = {}
    settings, rest = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("cluster", "nodes", "pipeline"):
            own[key] = value
        elif word.startswith(WORD):
            settings.append(word.removeprefix(WORD))
        else:
            rest.append(word)
    nodes = own.get("nodes", "1")
    if not nodes.isdecimal() or int(nodes) < 1:
        raise ValueError(f"nodes={nodes}: must be a whole number above 0. Use 1.")
    if "cluster" not in own:
        raise ValueError("cluster: it is not set. Name a file of configs/cluster, as in cluster=gpu8.")
    return Order(load_cluster(own["cluster"], settings), int(nodes), own.get("pipeline"), rest)


def check_order(order: Order) -> Submission:
    """Composes and checks all that is asked for, as it would be at its start on the nodes.

    Raises:
        ValueError: with all that is wrong.
    """
    if order.pipeline:
        return _check_pipeline(order, order.pipeline)
    config = compose_words(order.words)
    home = Path(config.run)
    stage = Stage(config.stage, order.words, config, home / JOBS)
    _refuse_never([stage])
    if not stage.folder.is_complete:
        check_stage(stage, order.world_size)
    return Submission(order, home, [stage])


def _check_pipeline(order: Order, pipeline: str) -> Submission:
    for word in order.words:
        if word.startswith(("accelerate=", "processes=", "retries=")):
            raise ValueError(
                f"{word}: is for a pipeline without SLURM. Leave it out; the cluster's file has all."
            )
    request = read_request(pipeline, order.words)
    stages = compose_stages(request)
    _refuse_never(stages)
    check_stages(stages, load_history(request.runs), order.world_size)
    return Submission(order, request.runs, stages)


def _refuse_never(stages: list[Stage]) -> None:
    if any(stage.config.resume is Resume.never for stage in stages):
        raise ValueError("resume=never: a job that comes back from the queue must go on. Use resume=auto.")


def run_order(order: Order, dry: bool) -> int:
    """Checks an order, and submits it or shows its scripts; returns the exit status.

    Raises:
        ValueError: before anything is submitted, with all that is wrong.
    """
    submission = check_order(order)
    for stage in submission.stages:
        if stage.folder.is_complete:
            print(f"{stage.name}: already complete. Its result is in {stage.folder.final}.")
    if dry:
        submission.plan()
        print("\n".join(submission.scripts()), end="")
    elif not all(stage.folder.is_complete for stage in submission.stages):
        _submit_alone(submission)
    return 0


def _submit_alone(submission: Submission) -> None:
    """Submits where no other command, and no earlier job, works in the same runs."""
    with locked(submission.home):
        refuse_live([submission.home, *(stage.folder.path for stage in submission.stages)])
        submission.plan()
        for job, number in zip(submission.jobs, submission.submit()):
            print(f"{job.name}: job {number}. Log: {job.log}")


def main(arguments: list[str] | None = None) -> int:
    """Submits a stage or a pipeline; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description="Submit one stage, or a pipeline with a job per stage, to SLURM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="key=value", help="see below")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the scripts")
    options = parser.parse_intermixed_args(arguments)
    with readable_errors():
        return run_order(read_order(options.words), options.dry_run)


if __name__ == "__main__":
    sys.exit(main())
