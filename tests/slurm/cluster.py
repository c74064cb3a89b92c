"""A real SLURM on this machine: one controller and two nodes, in a folder of its own, ended after use."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("node1", "node2")
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}  # nodes of a test\n"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=20
SlurmdTimeout=60
MinJobAge=3600
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Returns why no SLURM can be started here; None where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs SLURM ({', '.join(absent)} not installed)"
    return None if os.geteuid() == 0 else "needs SLURM, which only root can start here"


class Cluster:
    """A running SLURM. `env` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Starts everything, and returns when both nodes are idle."""
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._start_munge()
        ports = dict(zip(("controller", *NODES), _free_ports(3)))
        text = CONFIG.format(host=socket.gethostname(), folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(text)
        self._run("slurmctld", "-D")
        for node in NODES:
            self._run("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.call("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 60)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {
            "socket": "socket",
            "key-file": "key",
            "log-file": "log",
            "pid-file": "pid",
            "seed-file": "seed",
        }
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._run("munged", "--foreground", "--force", *files)
        self.wait_until((self.folder / "munge.socket").exists, 30)

    def _run(self, *command: str) -> None:
        log = (self.folder / f"{'-'.join(command[:1])}.out").open("ab")
        self._daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    @contextmanager
    def silent_controller(self) -> Iterator[None]:
        """Stops the controller for a while, so that no command gets an answer."""
        controller = next(each for each in self._daemons if "slurmctld" in each.args)
        controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            controller.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends every job, then the daemons."""
        with suppress(subprocess.SubprocessError, AssertionError):
            self.call("scancel", "--user", "root")
            self.wait_until(lambda: not self.call("squeue", "-h").strip(), 30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
                continue
            daemon.kill()

    def call(self, *command: str) -> str:
        """Returns what a command of SLURM prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Returns what SLURM knows of a job, by its own names (JobState, Restarts, ...)."""
        text = self.call("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Waits until something has happened."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"it does not happen within {seconds:.0f} s"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def named_nodes() -> Iterator[None]:
    """Lets the names of the nodes lead to this machine for a while."""
    before = HOSTS.read_text()
    HOSTS.write_text(before.rstrip("\n") + "\n" + HOSTS_LINE)
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, "", 1))


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Runs a cluster for a while."""
    cluster = Cluster(folder)
    with named_nodes():
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
