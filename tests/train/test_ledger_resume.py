"""The ledger of a run that was killed and went on is that of one never killed."""

import json

import pytest

from data.index import load_folder
from tests.data.corpus import overwrite_silently
from tests.records import KINDS, prepare, write_records
from tests.train.launching import SMALL, launch
from tests.train.test_resume import kill_at


def spoiled(folder):
    """Returns shards of 48 samples: one is quarantined, five are damaged behind the index."""
    records = write_records(folder / "records", [*KINDS] * 12)
    (folder / "records/1.jpg").write_bytes(b"no picture")
    path = prepare(records, folder / "shards")
    (shard,) = load_folder(str(path)).shards
    for row in (5, 14, 23, 30, 41):
        offset, size = next(place for name, place in shard.members(row).items() if name != "json")
        overwrite_silently(shard.path, offset, bytes(size))
    return path


@pytest.mark.slow
def test_the_ledger_after_a_kill_and_a_resume_is_that_of_a_run_never_killed(tmp_path):
    words = (
        *SMALL,
        f"data.path={spoiled(tmp_path)}",
        *("data.max_bad_share=1.0", "train.steps=10", "train.packs_per_step=2", "checkpoint.every=2"),
    )
    launch(tmp_path / "whole", *words)
    kill_at(tmp_path / "killed", 5, words, processes=1)
    assert "Goes on after step" in launch(tmp_path / "killed", *words).output
    whole, killed = ((tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    entries = [json.loads(line) for line in whole.splitlines()]
    assert all(entry["cause"] and entry["message"] for entry in entries)
    assert sorted({entry["step"] == 0 for entry in entries}) == [False, True]
