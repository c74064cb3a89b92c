"""The batch script of one stage: what SLURM reads and a person can read too."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import ClusterConfig

PATIENCE_SECONDS = 30
"""How long ranks may live on after the first has ended, before srun ends them."""

PREFLIGHT_PATIENCE = 2
"""The same in a preflight, in waits of its own: it waits for missing ranks itself and names them."""

SCRIPT = r"""#!/usr/bin/env bash
# {title}
# Written by python -m launch.slurm. Code: {code}
{options}

say() {{ echo "$(date '+%F %T')  $*"; }}

# Runs a command as every rank: on_every_rank SECONDS FOLDER COMMAND... When one rank has ended, the others
# have SECONDS to do so too. Returns the highest exit status, or 2, a mistake, where any rank ended with that.
on_every_rank() {{
  before=$(stat -c %s {log})
  srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait="$1"{srun} bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={ranks}
    cd "$0" && exec "$@"' "${{@:2}}" &
  srun=$!
  [ $stop ] && pass_on
  until wait $srun; status=$?; ! kill -0 $srun 2>/dev/null; do :; done
  # Ranks that wait for one that made a mistake are killed in the end, with a higher status than its own.
  tail -c "+$((before + 1))" {log} | grep -q '^srun: error: .*: Exited with exit code 2$' && status=2
  return $status
}}

# Passes a signal on to the ranks, again and again: one that srun has not started yet misses it.
pass_on() {{ (while kill -$signal $srun 2>/dev/null; do sleep 5; done) & }}

# Runs a command of SLURM, for a minute where its controller does not answer.
patiently() {{
  for pause in 2 3 5 10 20 20 ''; do
    "$@" && return
    [ $pause ] && sleep $pause
  done
  return 1
}}

newest() {{ find {run}/checkpoints -path '*/step-*/manifest.json' 2>/dev/null | sort | tail -n 1; }}

# Counts the starts in a row that went back into the queue without a newer checkpoint than they had found.
count_vain() {{
  vain=$(cat {vain} 2>/dev/null)
  if [ "$(newest)" = "$at_start" ]; then vain=$((vain + 1)); else vain=0; fi
  echo $vain > {vain}
}}

# Puts the job back into the queue. One that was cancelled stays so, and so does one that gets nowhere.
requeue() {{
  state=$(patiently scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
  count_vain
  [ $vain = 0 ] && found=saved || found='nothing was saved'
  case $state in
    JobState=RUNNING) ;;
    '') say "$found; SLURM does not answer. $by_hand"; exit 75 ;;
    *) exit 75 ;;
  esac
  if [ $vain -gt {retries} ]; then
    say "$found in $vain starts in a row. Raise cluster.time, or lower checkpoint.every."
    exit 1
  fi
  say "$found; back into the queue"
  patiently scontrol requeue "$SLURM_JOB_ID" || say "Cannot requeue. $by_hand"
  exit 75
}}
by_hand='To go on, type the same launch.slurm command again.'

# SLURM sends USR1 {save} s before the time limit. A preflight ends at once; ranks that train save and end.
stop=
signal=TERM
trap 'stop=yes; pass_on' USR1
trap 'stop=yes' TERM

at_start=$(newest)
[ ${{SLURM_RESTART_COUNT:-0}} = 0 ] && rm -f {vain}
{setup}
nodes=$(patiently scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{nodes%%$'\n'*}}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
say "job $SLURM_JOB_ID, start $((1 + ${{SLURM_RESTART_COUNT:-0}})) on $SLURM_JOB_NODELIST"

# Names a bad node; every wait in it is bounded. What was bad in passing gets a second look.
for look in 1 2; do
  TORCH_CPP_LOG_LEVEL=FATAL on_every_rank {preflight_patience} {code} {python} -m train.preflight \
    --folder {run} --nodes "${{nodes//$'\n'/,}}" --devices {devices} --timeout {preflight}
  status=$?
  case $stop$status in
    yes* | 138 | 143) requeue ;;
    0) break ;;
  esac
done
[ $status = 0 ] || exit 1
signal=USR1

# Ranks that fail are started again, with {retries} failures in a row that brought no new checkpoint at most.
wasted=0
while [ $wasted -le {retries} ]; do
  [ $stop ] && requeue
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
  say "the ranks ended with exit status $status"
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

    @property
    def log(self) -> Path:
        """Where the output of all starts goes."""
        return self.script.with_suffix(".log")


def batch_script(job: Job, cluster: ClusterConfig, python: str) -> str:
    """Returns the text of a job's script."""
    return SCRIPT.format(
        title=job.title,
        options="\n".join(f"#SBATCH {option}" for option in _options(job, cluster)),
        code=shlex.quote(str(job.code)),
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
        preflight=cluster.preflight_seconds,
        preflight_patience=PREFLIGHT_PATIENCE * cluster.preflight_seconds,
        devices=cluster.gpus_per_node,
        log=shlex.quote(str(job.log)),
        vain=shlex.quote(str(job.script.with_suffix(".vain"))),
        retries=cluster.retries,
    )


SETUP_FAILS = """trap 'say "cluster.setup: $BASH_COMMAND: ended with $?. Mend it."; exit 2' ERR"""
"""What ends a job whose setup fails: what runs without it may be another Python, or none."""


def _setup(cluster: ClusterConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    setup = [SETUP_FAILS, *cluster.setup, "trap - ERR"] if cluster.setup else []
    return [*setup, *exports]


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Returns the options of sbatch, those of the cluster last."""
    options = {
        "job-name": job.name,
        "output": shlex.quote(str(job.log)),
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
