"""Which jobs of SLURM write in the folders of runs, however they were submitted."""

from __future__ import annotations

import subprocess
from pathlib import Path

JOBS = "jobs"
"""Folder of a run, or of a pipeline's runs, with a numbered folder for every submission."""


def refuse_live(runs: list[Path]) -> None:
    """Raises ValueError while a job that writes in any of these runs waits or works."""
    if live := live_jobs(runs):
        numbers = " ".join(live)
        raise ValueError(
            f"{runs[0]}: job {', '.join(live)} is not over yet. Wait for it, or scancel {numbers}."
        )


def live_jobs(runs: list[Path]) -> list[str]:
    """Returns the numbers of the jobs that write in any of these runs and are not over.

    They are told by their scripts, which `sbatch` takes by hand too.

    Raises:
        ValueError: SLURM does not answer, so that it cannot be told.
    """
    scripts = {path.resolve() for run in runs for path in _scripts(run)}
    if not scripts:
        return []
    try:
        done = subprocess.run(["squeue", "-h", "--all", "-o", "%A %o"], capture_output=True, text=True)
    except FileNotFoundError:  # no SLURM here
        return []
    if done.returncode:
        said = done.stderr.strip().removeprefix("squeue: error: ").removeprefix("slurm_load_jobs error: ")
        raise ValueError(f"squeue: {said}. Whether a job works in {runs[0]} cannot be told. Try again.")
    jobs = [line.partition(" ") for line in done.stdout.splitlines()]
    return sorted({number for number, _, script in jobs if Path(script).resolve() in scripts}, key=int)


def _scripts(run: Path) -> list[Path]:
    """Returns the scripts of a run's own jobs, and of those it has as a stage of a pipeline."""
    run = run.resolve()
    as_stage = [path for path in run.parent.glob(f"{JOBS}/*/*.sh") if path.stem == run.name]
    return [*run.glob(f"{JOBS}/*/*.sh"), *as_stage]
