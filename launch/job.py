"""The batch script of one stage: what SLURM reads and a person can read too."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import ClusterConfig

PATIENCE_SECONDS = 30
"""How long ranks may live on after the first has ended, before srun ends them."""

PREFLIGHT_PATIENCE_SECONDS = 600
"""The same in a preflight, which waits for missing ranks itself and names them."""

SCRIPT = r"""#!/usr/bin/env bash
# {title}
# Written by python -m launch.slurm. Code: {code}
{options}

# Runs a command as every rank: on_every_rank SECONDS FOLDER COMMAND... Returns the highest exit status.
# When one rank has ended, the others have SECONDS to do so too.
on_every_rank() {{
  srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait="$1"{srun} bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={ranks}
    cd "$0" && exec "$@"' "${{@:2}}" &
  srun=$!
  until wait $srun; status=$?; ! kill -0 $srun 2>/dev/null; do :; done
  return $status
}}

# Puts the job back into the queue. One that was cancelled stays so.
requeue() {{
  scontrol show job -o "$SLURM_JOB_ID" | grep -q JobState=RUNNING || exit 75
  echo "$(date '+%F %T')  saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || echo "Cannot requeue. To go on: sbatch {script}"
  exit 75
}}

# SLURM sends USR1 {save} s before the time limit; srun passes it on to the ranks, which save and end.
stop=
trap 'stop=yes; kill -USR1 $srun' USR1
trap 'stop=yes' TERM

{setup}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{nodes%%$'\n'*}}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
echo "$(date '+%F %T')  job $SLURM_JOB_ID, start $((1 + ${{SLURM_RESTART_COUNT:-0}})) on $SLURM_JOB_NODELIST"

# Names a bad node; every wait in it is bounded.
TORCH_CPP_LOG_LEVEL=FATAL on_every_rank {preflight_patience} {code} {python} -m train.preflight \
  --folder {run} --nodes "${{nodes//$'\n'/,}}"
status=$?
[ $stop ] && requeue
[ $status = 0 ] || exit 1

# Ranks that fail are started again, with {retries} failures in a row that brought no new checkpoint at most.
newest() {{ find {run}/checkpoints -path '*/step-*/manifest.json' 2>/dev/null | sort | tail -n 1; }}
wasted=0
while [ $wasted -le {retries} ]; do
  found=$(newest)
  on_every_rank {patience} {folder} {python} {code}/train.py \
    {words}
  status=$?
  case $status in
    0) exit 0 ;;                  # complete
    75 | 138 | 143) requeue ;;    # asked to end: saved, or not even begun
    2) exit 2 ;;                  # a mistake that no other start mends
  esac
  [ $stop ] && requeue
  echo "$(date '+%F %T')  the ranks ended with exit status $status"
  if [ "$(newest)" = "$found" ]; then wasted=$((wasted + 1)); else wasted=0; fi
done
exit 1
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One stage as a job. `folder` is where it was submitted, which relative paths are relative to."""

    name: str
    title: str
    words: list[str]
    run: Path
    script: Path
    code: Path
    folder: Path
    num_nodes: int


def batch_script(job: Job, cluster: ClusterConfig, python: str) -> str:
    """Returns the text of a job's script."""
    return SCRIPT.format(
        title=job.title,
        options="\n".join(f"#SBATCH {option}" for option in _options(job, cluster)),
        code=shlex.quote(str(job.code)),
        script=shlex.quote(str(job.script)),
        run=shlex.quote(str(job.run)),
        folder=shlex.quote(str(job.folder)),
        words=" \\\n    ".join(shlex.quote(word) for word in job.words),
        python=cluster.python or shlex.quote(python),
        setup="".join(f"{line}\n" for line in _setup(cluster)),
        srun="".join(f" {option}" for option in cluster.srun),
        cpus=cluster.cpus_per_rank,
        ranks=cluster.num_ranks,
        save=cluster.save_seconds,
        patience=PATIENCE_SECONDS,
        preflight_patience=PREFLIGHT_PATIENCE_SECONDS,
        retries=cluster.retries,
    )


def _setup(cluster: ClusterConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    return [*cluster.setup, *exports]


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Returns the options of sbatch, those of the cluster last."""
    options = {
        "job-name": job.name,
        "output": shlex.quote(str(job.script.with_suffix(".log"))),
        "open-mode": "append",
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": job.num_nodes,
        "ntasks-per-node": cluster.num_ranks,
        "cpus-per-task": cluster.cpus_per_rank,
        "gres": f"gpu:{cluster.gpus_per_node}" if cluster.gpus_per_node else None,
        "time": cluster.time,
        "signal": f"B:USR1@{cluster.save_seconds}",
    }
    found = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*found, "--requeue", *cluster.sbatch]
