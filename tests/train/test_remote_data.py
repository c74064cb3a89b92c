"""A run on shards of an S3 server has the numbers of a local one, also killed and with its cache gone."""

import shutil
import threading

import pytest

from tests.data.stores import s3_store, size_of
from tests.records import KINDS, prepare, write_records
from tests.train.launching import SMALL, Finished, launch
from tests.train.test_resume import kill_at

SHUFFLE_SHARDS = 2


@pytest.mark.slow
def test_two_ranks_share_a_small_cache_and_lose_nothing_when_killed(tmp_path, monkeypatch):
    records = write_records(tmp_path / "records", [*KINDS] * 12)
    shards = prepare(records, tmp_path / "shards", "--samples-per-shard", "6")
    sizes = sorted(path.stat().st_size for path in shards.glob("*.tar"))
    limit = sum(sizes[-2 * SHUFFLE_SHARDS :])
    common = (*SMALL, "train.steps=12", "train.packs_per_step=2", "checkpoint.every=3", "zero=zero2")
    common = (*common, "optim.lr=1e-3", f"data.shuffle_shards={SHUFFLE_SHARDS}")
    cache = tmp_path / "cache"
    most, ended = 0, threading.Event()

    def watch():
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, size_of(cache))

    watching = threading.Thread(target=watch)
    watching.start()
    whole = launch(tmp_path / "local", *common, f"data.path={shards}", processes=2)
    words = (*common, "data.path=s3://data/shards", f"data.cache={cache}")
    with s3_store(shards, ["error", "cut"] * 3) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        refused = launch(tmp_path / "remote", *words, "data.cache_gib=1e-5", code=None)
        assert refused.code and "Use at least" in refused.output
        words = (*words, f"data.cache_gib={limit / 2**30}")
        kill_at(tmp_path / "remote", 5, words, 2)
        shutil.rmtree(cache)
        again = launch(tmp_path / "remote", *words, processes=2)
    ended.set()
    watching.join()
    assert "Goes on after step" in again.output
    assert again.losses == whole.losses and again.grad_norms == whole.grad_norms
    assert 0 < most <= limit < sum(sizes)


def test_a_store_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    url = "http://127.0.0.1:9/shard-{000000..000001}.tar"
    words = (*SMALL, f'data.path="{url}"')
    refused = launch(tmp_path / "run", *words, code=None)
    assert refused.code and "data.cache=null: http://127.0.0.1:9" in refused.output
    assert "Traceback" not in refused.output and not Finished(tmp_path / "run", 0, "").folder.exists()
