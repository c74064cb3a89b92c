"""The preflight as nodes run it: what is good, and who is named when something is bad."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.launching import ROOT, environment, free_port
from train.preflight.node_facts import Facts, find_problems


class Ranks:
    """Two ranks on nodes of their own, each started as srun would."""

    def __init__(self) -> None:
        self.port = free_port()

    def start(self, rank: int, folder: Path, *more: str, seconds: int = 60) -> subprocess.Popen:
        command = [sys.executable, "-m", "train.preflight", "--folder", str(folder), "--nodes", "node1,node2"]
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        return subprocess.Popen(
            [*command, "--timeout", str(seconds), "--size-mib", "4", *more],
            cwd=ROOT,
            env=environment() | place | {"TORCH_CPP_LOG_LEVEL": "FATAL"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, first: Path, second: Path, *more: str) -> tuple[int, str]:
        """Returns the exit status and output of the first of both ranks, in the folders they are given."""
        processes = [self.start(rank, folder, *more) for rank, folder in enumerate((first, second))]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert processes[0].returncode == processes[1].returncode and not outputs[1]
        return processes[0].returncode, outputs[0]


def alone(process: subprocess.Popen) -> str:
    """Returns what a rank says that must end badly without the other."""
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    return output


def test_sound_nodes_are_good_and_the_wire_is_measured(tmp_path):
    code, output = Ranks().run(tmp_path, tmp_path, "--json")
    report = json.loads(output)
    assert code == 0 and report["problems"] == [] and report["gigabytes_per_second"] > 0
    assert [each["node"] for each in report["facts"]] == ["node1", "node2"]
    assert not any(tmp_path.iterdir())


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    assert "BAD  node2 (rank 1): does not answer within 2 s." in alone(Ranks().start(0, tmp_path, seconds=2))


@pytest.mark.slow
def test_a_first_rank_that_does_not_answer_is_named(tmp_path):
    said = alone(Ranks().start(1, tmp_path, seconds=2))
    assert "BAD  node2 (rank 1): cannot reach node1 (rank 0) at 127.0.0.1:" in said


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_and_no_rank_hangs_on_the_stranger(tmp_path):
    ranks = Ranks()
    with socket.create_server(("127.0.0.1", ranks.port)):
        assert f"BAD  node1 (rank 0): port {ranks.port} is taken there." in alone(
            ranks.start(0, tmp_path, seconds=3)
        )
        assert "BAD  node2 (rank 1): cannot reach node1" in alone(ranks.start(1, tmp_path, seconds=3))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_names_its_node(tmp_path):
    code, output = Ranks().run(tmp_path, Path("/proc/no_run"))  # nobody can write there, not even root
    assert code == 1 and "BAD  node2 (rank 1): cannot write in" in output and "BAD  node1" not in output


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_named(tmp_path):
    code, output = Ranks().run(tmp_path / "one", tmp_path / "other")
    assert code == 1 and "BAD  node1 (rank 0): does not see in" in output


def test_a_file_in_the_place_of_the_folder_is_bad_and_named(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "train.preflight", "--folder", str(tmp_path / "file" / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"cannot write in {tmp_path}/file/run (" in done.stdout
    assert "preflight: bad" in done.stdout and "Traceback" not in done.stderr


def test_a_node_without_the_gpus_of_the_job_is_bad(tmp_path):
    code, output = Ranks().run(tmp_path, tmp_path, "--devices", "2")
    assert code == 1 and "BAD  node1 (rank 0): sees 0 of 2 GPUs." in output
    assert "BAD  node2 (rank 1): sees 0 of 2 GPUs." in output and "all-reduce" not in output


@pytest.mark.slow
def test_an_all_reduce_that_does_not_end_accuses_nobody(tmp_path):
    ranks = Ranks()
    more = ("--size-mib", "1024")  # more than can be summed in that time
    processes = [ranks.start(rank, tmp_path, *more, seconds=3) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[0].returncode == 1 and not outputs[1]
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("BAD")]
    assert line.startswith("BAD  all ranks: the all-reduce does not end within 3 s.")


def test_half_an_environment_is_refused(tmp_path):
    env = {**environment(), "RANK": "0"}
    command = [sys.executable, "-m", "train.preflight", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("WORLD_SIZE: is not set beside RANK.")


SOUND = Facts(
    rank=0,
    node="node1",
    num_devices=8,
    device="H100",
    device_gib=79.0,
    device_total_gib=79.2,
    host_gib=900.0,
    disk_gib=500.0,
    versions={"torch": "2.9.0"},
    faults=[],
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device_gib": 40.0}, "39.2 GiB of its device are taken."),
        ({"host_gib": 0.5}, "0.5 GiB of memory are free."),
        ({"disk_gib": 0.0}, "0.0 GiB of the folder's disk are free."),
        ({"clock_seconds": -3.0}, "its clock is -3.0 s off the first rank's."),
        ({"num_devices": 7}, "devices 7 x H100 there, 8 x H100 on others."),
        ({"versions": {"torch": "2.8.0"}}, "torch 2.8.0 there, 2.9.0 on others."),
        ({"faults": ["its device fails."]}, "its device fails."),
    ],
)
def test_the_node_that_differs_is_named(change, said):
    facts = [replace(SOUND, rank=rank, node=f"node{rank + 1}") for rank in range(3)]
    assert find_problems(facts) == []
    (problem,) = find_problems([*facts[:2], replace(facts[2], **change)])
    assert problem.startswith(f"node3 (rank 2): {said}")
