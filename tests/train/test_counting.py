"""Ranks of two machines count the tokens of a source: once where they share a disk, else once on each."""

import subprocess
import sys

import pytest

from tests.data.corpus import prepare_folder, record
from tests.train.launching import ROOT, environment, free_port


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_every_shard_is_counted_by_one_rank_of_each_disk(tmp_path, shared):
    records = [record(number) for number in range(20)]
    path = prepare_folder(tmp_path, records, tmp_path / "x", samples_per_shard=10)
    notes, port = tmp_path / "notes", str(free_port())
    source = path if shared else f"pipe:cat {path}/shard-{{000000..000001}}.tar"
    caches = [tmp_path / "one", tmp_path / ("one" if shared else "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.counting_rank", source, str(caches[rank // 2]), str(notes)],
            cwd=ROOT,
            env=environment()
            | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(4)
    ]
    assert [process.wait(120) for process in processes] == [0] * 4
    counted = notes.read_text().splitlines()
    mine = ["rank 0 shard 0", "rank 0 shard 1"]
    assert counted == (mine if shared else [*mine, "rank 2 shard 0", "rank 2 shard 1"])
