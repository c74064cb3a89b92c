"""Remote shards: the samples of a local folder, whatever the store does, and never more than the limit."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import torch

from data.config import SourceConfig
from data.download import Patience
from data.fetch_ahead import FetchAhead
from data.index import load_folder
from data.remote import check_room, load_remote, load_source, room_needed
from data.shard_cache import NoRoom, ShardCache
from data.shards import ShardReader
from data.transport import Absent, open_store, read_pieces
from data.urls import expand, index_url, is_remote, shard_name, shown
from tests.data.corpus import (
    MEDIA,
    TOKENIZER,
    data_config,
    loader_of,
    planner_of,
    prepare_folder,
    record,
    tables_of,
    wav_bytes,
    write_media,
)
from tests.data.stores import s3_store, size_of, web_store
from tests.data.test_loader import SpoilingEncoder

ROOT = Path(__file__).resolve().parents[2]
QUICK = Patience(stall_seconds=2.0, attempts=3, first_pause_seconds=0.01, room_seconds=1.0)
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight shards of equal size: two clips and a text each."""
    folder = tmp_path_factory.mktemp("remote")
    clip = write_media(folder, "a.wav", wav_bytes(8000))
    records = [record(n, audio=clip if n % 3 else None) for n in range(3 * NUM_SHARDS)]
    return Path(prepare_folder(folder, records, folder / "shards", samples_per_shard=3))


@pytest.fixture
def store(shards):
    with web_store(shards) as store:
        yield store


@pytest.fixture
def cache(tmp_path):
    return ShardCache(str(tmp_path / "cache"), 10**9, QUICK)


def named(store) -> str:
    return f"{store.url}/shard-{{000000..{NUM_SHARDS - 1:06d}}}.tar"


def samples(folder):
    reader = ShardReader(folder, "s")
    return [reader.read(n, row) for n, shard in enumerate(folder.shards) for row in range(shard.num_rows)]


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.rglob("*.tar"))


def test_ranges_are_expanded_and_names_found():
    assert expand("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert len(expand("{0..2}/{00..09}.tar")) == 30 and expand("a${B}.tar") == ["a${B}.tar"]
    command = "pipe:curl -sf 'https://host/x.tar.d/a-01.tar?key=1' | cat"
    assert shard_name(command) == "a-01.tar"
    assert index_url(command) == command.replace("a-01.tar?", "a-01.index.parquet?")
    assert [is_remote(path) for path in ("s3://a/b", "pipe:cat x.tar", "shards/a", "C:/x")] == [1, 1, 0, 0]


def test_what_is_shown_of_a_url_tells_the_shard_and_no_secret():
    assert shown("s3://bucket/folder") == "s3://bucket/folder" and shown("shards/a?b") == "shards/a?b"
    assert shown("https://me:secret@h/a/x-01.tar?sv=1&sig=secret") == "https://h/a/x-01.tar?..."
    assert shown("https://h/get?token=secret&file=x-01.tar") == "https://h/get?... x-01.tar"
    for command in (
        "curl -H 'Authorization: secret' https://me:secret@h/x-01.tar?sig=secret",
        "TOKEN=secret KEY='secret secret' /usr/bin/curl -u me:secret h/x-01.tar",
    ):
        assert shown(f"pipe:{command}") == "pipe:curl ... x-01.tar"
        assert shown(index_url(f"pipe:{command}")) == "pipe:curl ... x-01.index.parquet"
    assert shown("pipe:$(secret it's x-01.tar") == "pipe:command ... x-01.tar"


def test_no_secret_of_a_url_is_told_or_kept(shards, store, cache, capfd):
    paths = [f"{named(store)}?sig=secret", f"pipe:KEY=secret cat {shards}/shard-{{000000..000001}}.tar"]
    store.faults["shard-000001.tar"] = ["error"] * 9
    for path in paths:
        folder = load_remote(path, cache)
        if path.startswith("pipe:"):
            folder.shards[1].url = f"pipe:KEY=secret false {shards}/shard-000001.tar"
        with pytest.raises(RuntimeError, match=r"shard-000001\.tar.*: cannot be fetched") as error:
            folder.open(1)
        mark = cache.place_of(path) / "source"
        assert "secret" not in f"{error.value} {mark.read_text()}" and mark.stat().st_mode & 0o777 == 0o600
    said = capfd.readouterr().err
    assert "Attempt 2 of 3" in said and "secret" not in said
    with pytest.raises(ValueError, match="no index beside it") as error:
        load_remote(f"{store.url}/other.tar?sig=secret", cache)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://host name/x.tar", f"http://{'a' * 64}.org/x.tar", "http://h:secret/x.tar"]
)
def test_a_url_that_cannot_be_right_is_refused_at_once(url, cache, capfd):
    with pytest.raises(ValueError, match="is no valid URL"):
        load_remote(url, cache)
    assert "Attempt" not in capfd.readouterr().err


def test_a_config_refuses_what_cannot_work():
    config = data_config("x")
    config.sources = {"web": SourceConfig(path="https://host/shards")}
    assert ["cache=null" in line for line in config.problems()] == [True]
    assert "cannot be listed there" in config.sources["web"].problems()[0]
    config.sources["web"].path = "https://host/x-{9..0}.tar"
    assert "{9..0} holds no number" in config.sources["web"].problems()[0]
    with pytest.raises(ValueError, match="holds no number"):
        load_remote(config.sources["web"].path, ShardCache("/nowhere", 1))
    config.cache, config.cache_gib = "somewhere", 0.0
    assert any("cache_gib=0.0" in line for line in config.problems())


@pytest.mark.parametrize("how", ["web", "pipe", "file"])
def test_remote_samples_and_digest_are_those_of_the_folder(shards, store, cache, how):
    tars = f"{shards}/shard-{{000000..{NUM_SHARDS - 1:06d}}}.tar"
    path = {"web": named(store), "pipe": f"pipe:cat {tars}", "file": f"file://{shards}"}[how]
    folder, local = load_remote(path, cache), load_folder(str(shards))
    assert folder.digest == local.digest and samples(folder) == samples(local)
    assert len(names(cache.root)) == NUM_SHARDS


@pytest.mark.parametrize("fault", ["stall", "cut", "error", "short", "long"])
def test_a_store_that_fails_twice_costs_nothing(shards, store, cache, fault, capfd):
    store.faults["shard-000001.tar"] = [fault, fault]
    store.faults["shard-000002.index.parquet"] = ["error", "cut"]
    assert samples(load_remote(named(store), cache)) == samples(load_folder(str(shards)))
    said = capfd.readouterr().err
    assert said.count("shard-000001.tar: ") == 2 and "Attempt 3 of 3" in said
    if fault in ("stall", "cut", "short"):  # they go on where they broke off
        assert store.asked("shard-000001.tar")[0] == 0 < store.asked("shard-000001.tar")[1]


def test_a_server_without_ranges_is_asked_for_all_again(shards, store, cache):
    store.faults["shard-000001.tar"] = ["cut", "whole"]
    assert samples(load_remote(named(store), cache)) == samples(load_folder(str(shards)))


@pytest.mark.parametrize("fault", ["stall", "error", "long"])
def test_after_the_last_attempt_the_error_names_url_and_cause(store, cache, fault):
    folder = load_remote(named(store), cache)
    store.faults["shard-000001.tar"] = [fault] * 9
    cause = {"stall": "timed out", "error": "500", "long": "more than"}[fault]
    with pytest.raises(RuntimeError, match=rf"shard-000001\.tar: cannot be fetched.*{cause}.*3 attempts"):
        folder.open(1)


def test_what_is_not_there_is_an_error_at_once(shards, store, cache, tmp_path):
    with pytest.raises(ValueError, match=r"shard-000008\.tar: has no index beside it"):
        load_remote(f"{store.url}/shard-{{000007..000008}}.tar", cache)
    assert store.asked("shard-000008.index.parquet") == []
    folder = load_remote(named(store), cache)
    store.folder = tmp_path
    with pytest.raises(Absent, match="404"):
        folder.open(1)


def test_a_command_that_fails_is_told_with_what_it_said(shards, cache):
    path = f"pipe:cat {shards}/shard-{{000000..000000}}.tar"
    folder = load_remote(path, cache)
    shard = folder.shards[0]
    shard.url = "pipe:echo no way >&2; exit 3; cat x.tar"
    with pytest.raises(RuntimeError, match=r"status 3 \(no way\)"):
        folder.open(0)
    shard.url = f"pipe:head -c 1000 {shards}/shard-000000.tar; sleep 30"
    with pytest.raises(RuntimeError, match=r"nothing came for 2 s"):
        folder.open(0)


def test_indexes_are_fetched_again_only_when_they_change(shards, cache, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    with web_store(copy) as store:
        load_remote(named(store), cache)
        load_remote(named(store), cache)
        assert len(store.asked("shard-000003.index.parquet")) == 1
        os.utime(copy / "shard-000003.index.parquet", (1, 1))
        load_remote(named(store), cache)
        assert len(store.asked("shard-000003.index.parquet")) == 2


@pytest.mark.parametrize("place", [-20, 3000])
def test_a_damaged_index_in_the_cache_is_fetched_again_by_the_next_start(shards, store, cache, place):
    folder = load_remote(named(store), cache)
    index = Path(folder.shards[1].path).with_suffix("").with_suffix(".index.parquet")
    data = bytearray(index.read_bytes())
    data[place % len(data)] ^= 0xFF
    index.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError), match=r"Start the same command again, which fetches"):
        samples(load_remote(named(store), cache))
    assert samples(load_remote(named(store), cache)) == samples(load_folder(str(shards)))


def test_a_shard_of_other_content_is_refused_and_an_earlier_one_replaced(shards, cache, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    with web_store(copy) as store:
        folder = load_remote(named(store), cache)
        os.close(folder.open(1))
        data = bytearray((copy / "shard-000001.tar").read_bytes())
        data[600] ^= 1
        (copy / "shard-000001.tar").write_bytes(data)
        os.utime(folder.shards[1].path, (1, 1))  # no longer what the index says
        with pytest.raises(RuntimeError, match=r"shard-000001\.tar: has other content"):
            folder.open(1)
        (copy / "shard-000001.tar").write_bytes((shards / "shard-000001.tar").read_bytes())
        os.close(folder.open(1))


@pytest.mark.parametrize("change", [-9000, -100, 512])
def test_a_shard_of_another_length_is_told_at_once(shards, cache, tmp_path, change, capfd):
    copy = shutil.copytree(shards, tmp_path / "copy")
    with web_store(copy) as store:
        folder = load_remote(named(store), cache)
        store.faults["shard-000001.tar"] = ["cut"]
        data = (copy / "shard-000001.tar").read_bytes()
        (copy / "shard-000001.tar").write_bytes((data + bytes(512))[: len(data) + change])
        with open(folder.shards[1].cached.partial, "wb") as file:
            file.write(data[:-5000])  # what an earlier process left
        with pytest.raises(RuntimeError, match=r"shard-000001\.tar: has other content .*upload both"):
            folder.open(1)
    assert capfd.readouterr().err.count("Attempt") <= 1


def test_a_store_that_knows_no_timeout_is_not_waited_for_forever(shards, cache, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    quick = ShardCache(cache.folder, 10**9, replace(QUICK, stall_seconds=0.3))
    folder = load_remote(f"file://{copy}", quick)
    tar = copy / "shard-000001.tar"
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(RuntimeError, match=r"cannot be fetched \(TimeoutError; 3 attempts"):
        folder.open(1)
    os.close(os.open(tar, os.O_WRONLY))  # lets go of those who wait


def test_a_slow_store_is_asked_for_small_pieces_and_a_fast_one_for_large_ones(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(15 * 2**20))
    store, path = open_store(f"file://{file}")
    monkeypatch.setattr(type(store), "cat_file", slowed(type(store).cat_file, 0.1))

    def sizes(stall_seconds):
        return [len(piece) >> 20 for piece in read_pieces(f"file://{path}", 0, 15 * 2**20, stall_seconds)]

    assert sizes(60.0) == [1, 2, 4, 8] and sizes(0.7) == [1] * 15


def slowed(question, seconds):
    def slow(*args, **options):
        time.sleep(seconds)
        return question(*args, **options)

    return slow


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache=.*file: cannot be used \(Not a directory\)"):
        load_remote(named(store), ShardCache(str(tmp_path / "file"), 10**9, QUICK))


def _read_randomly(folder, seed):
    draw, reader = random.Random(seed), ShardReader(folder, "s")
    for _ in range(60):
        shard = draw.randrange(NUM_SHARDS)
        assert reader.read(shard, draw.randrange(3))


def test_processes_share_the_cache_within_its_limit_and_fetch_nothing_twice_at_once(shards, store, cache):
    sizes = sorted(path.stat().st_size for path in shards.glob("*.tar"))
    limit = sum(sizes[-4:])
    folder = load_remote(named(store), ShardCache(cache.folder, limit, Patience(room_seconds=60)))
    readers = [get_context("fork").Process(target=_read_randomly, args=(folder, n)) for n in range(3)]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        most = max(most, size_of(cache.root))
        time.sleep(0.001)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert sizes[0] < most <= limit < sum(sizes)
    assert store.most_at_once == 1
    assert len(store.requests) > 2 * NUM_SHARDS  # some were evicted and fetched again


def test_what_is_in_use_stays_and_the_longest_unused_goes_first(shards, store, cache):
    sizes = [(shards / f"shard-{n:06d}.tar").stat().st_size for n in range(NUM_SHARDS)]
    folder = load_remote(named(store), ShardCache(cache.folder, 3 * max(sizes), QUICK))
    kept = folder.open(0)
    for shard in (1, 2, 1, 3):
        os.close(folder.open(shard))
    assert names(cache.root) == [f"shard-00000{n}.tar" for n in (0, 1, 3)]
    others = [folder.open(shard) for shard in (1, 3)]
    with pytest.raises(NoRoom, match=r"data\.cache_gib=.*are in use"):
        folder.open(4)
    os.close(kept)
    os.close(folder.open(4))
    assert "shard-000000.tar" not in names(cache.root)
    for number in others:
        os.close(number)


@pytest.mark.parametrize("place", ["captions", "0123456789abcdef", "../shards/captions"])
def test_shards_that_somebody_else_put_there_are_neither_removed_nor_counted(shards, store, cache, place):
    foreign = cache.root / place
    shutil.copytree(shards, foreign)
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    folder = load_remote(named(store), ShardCache(cache.folder, largest, QUICK))
    for shard in range(NUM_SHARDS):
        os.close(folder.open(shard))
    assert len(names(foreign)) == NUM_SHARDS
    assert len(names(cache.place_of(folder.path))) == 1


@pytest.fixture
def nfs_locks(monkeypatch):
    """Locks as NFS gives them: an exclusive one to who may write, a shared one to who may read."""
    flock = fcntl.flock

    def strict(file, operation):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_WRONLY if operation & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)


def test_a_cache_on_nfs_makes_room_and_waits_for_it(shards, store, cache, nfs_locks):
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    folder = load_remote(named(store), ShardCache(cache.folder, largest, QUICK))
    os.close(folder.open(0))
    kept = folder.open(1)
    assert names(cache.root) == ["shard-000001.tar"]
    release = threading.Timer(0.3, os.close, [kept])
    release.start()
    os.close(folder.open(2))
    release.join()
    assert names(cache.root) == ["shard-000002.tar"]


def test_who_looks_whether_room_is_asked_for_is_not_taken_for_one_who_asks(shards, store, cache):
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    folder = load_remote(named(store), ShardCache(cache.folder, largest, QUICK))
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: folder.cache.is_room_asked_for(), range(4000)))
        kept = folder.open(0)
        waiting = [pool.submit(folder.open, 1), pool.submit(folder.open, 1)]
        while not folder.cache.is_room_asked_for():
            time.sleep(0.001)
        os.close(kept)
        for job in waiting:
            os.close(job.result())
    assert not folder.cache.is_room_asked_for()


def test_a_disk_without_locks_or_times_is_refused_at_the_start(store, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        with pytest.raises(ValueError, match=r"data\.cache=.*: the disk there does not lock files\. Name"):
            load_remote(named(store), cache)
    utime, folder = os.utime, load_remote(named(store), cache)

    def to_two_seconds(path, ns=None):
        ns = ns or (time.time_ns(), time.time_ns())
        utime(path, ns=tuple(ns - ns % 2_000_000_000 for ns in ns))

    monkeypatch.setattr(os, "utime", to_two_seconds)
    with pytest.raises(ValueError, match=r"data\.cache=.*does not keep the times of files"):
        load_remote(named(store), cache)
    monkeypatch.setattr(os, "utime", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"data\.cache=.*does not keep the times of files"):
        folder.open(0)


def _open_shard(folder, shard):
    folder.open(shard)


def test_a_fetch_that_was_killed_goes_on_where_it_stopped(store, cache):
    folder = load_remote(named(store), ShardCache(cache.folder, 10**9, Patience()))
    store.faults["shard-000002.tar"] = ["stall"]
    victim = get_context("fork").Process(target=_open_shard, args=(folder, 2))
    victim.start()
    while not size_of(cache.root):
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    os.close(folder.open(2))
    first, second = store.asked("shard-000002.tar")
    assert first == 0 < second


def test_a_cache_below_two_windows_is_refused_with_the_number(shards, store, cache):
    folder = load_remote(named(store), cache)
    sizes = sorted(path.stat().st_size for path in shards.glob("*.tar"))
    assert room_needed([folder], 2) == sum(sizes[-4:]) and room_needed([folder, folder], 4) == sum(sizes)
    needed = sum(sizes[-4:]) / 2**30
    check_room([folder], 2, needed)
    with pytest.raises(ValueError, match=rf"data\.cache_gib=1e-06: .* have {needed:.3g} GiB"):
        check_room([folder], 2, 1e-6)
    config = data_config("x", cache=cache.folder, cache_gib=1e-6)
    with pytest.raises(ValueError, match="Use at least"):  # at once, and not after counting tokens
        load_source(named(store), config)


def batches(config, state=None, steps=None):
    """Returns per step the tokens and mel frames, and the planner's state after the last of `steps`."""
    tables = tables_of(config)
    planner = planner_of(config, tables, packs_per_step=2, epochs=2.0, state=state)
    loader, found = loader_of(config, tables, planner), []
    for work in loader:
        found += [(work.step, batch.input_ids, batch.audio.mel) for batch in work.batches]
        state = work.planner_state
        if work.step == steps:
            break
    loader.close()
    return found, state


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other)
    )


def test_a_loader_gives_the_same_from_afar_and_goes_on_with_an_empty_cache(shards, store, tmp_path):
    local = data_config(str(shards), length=128, shuffle_shards=2)
    sizes = sorted(path.stat().st_size for path in shards.glob("*.tar"))
    remote = data_config(named(store), length=128, shuffle_shards=2, workers=2)
    remote.sources = {"shards": SourceConfig(path=named(store))}
    remote.cache, remote.cache_gib = str(tmp_path / "cache"), sum(sizes[-4:]) / 2**30
    most, ended = 0, threading.Event()

    def watch():
        nonlocal most
        while not ended.is_set():
            most = max(most, size_of(tmp_path / "cache"))
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    whole, _ = batches(local)
    store.faults["shard-000004.tar"] = ["cut", "error"]
    first, state = batches(remote, steps=2)
    assert not active_children()  # neither workers nor what fetches for them
    shutil.rmtree(tmp_path / "cache")
    second, _ = batches(remote, state=state)
    ended.set()
    watching.join()
    assert same(first + second, whole) and len(whole) > 6
    assert 0 < most <= sum(sizes[-4:]) and store.most_at_once == 1


def test_shards_of_several_folders_may_have_the_same_names(shards, cache, tmp_path):
    (tmp_path / "part-0").symlink_to(shards)
    clip = write_media(tmp_path, "b.wav", wav_bytes(16000))
    others = [record(n, answer="another", audio=clip) for n in range(6)]
    prepare_folder(tmp_path, others, tmp_path / "part-1", samples_per_shard=3)
    first, second = (load_folder(str(tmp_path / f"part-{n}")) for n in (0, 1))
    with web_store(tmp_path) as store:
        path = f"{store.url}/part-{{0..1}}/shard-{{000000..000001}}.tar"
        folder = load_remote(path, cache)
        assert samples(folder) == samples(first)[:6] + samples(second)
        for part in (0, 1):
            tables_of(data_config(str(tmp_path / f"part-{part}")))  # counts its tokens
        remote = data_config("x", cache=str(tmp_path / "other"))
        remote.sources = {"both": SourceConfig(path=path)}
        store.requests.clear()
        counted = tables_of(remote)
        assert [index.num_rows for index in counted.folders["both"].shards] == [3, 3, 3, 3]
        assert store.requests and not [name for name, _ in store.requests if name.endswith(".tar")]


def spoiled(config, tables, way):
    encoder = SpoilingEncoder(config, MEDIA, TOKENIZER)
    (folder,) = tables.folders.values()
    encoder.key, encoder.way = folder.shards[3].keys[0], way
    return encoder


def test_a_decoder_that_hangs_on_a_fetched_shard_is_told_in_time(shards, store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(FetchAhead, "want", lambda *_: None)  # workers fetch all by themselves
    remote = data_config("x", length=128, workers=1, timeout_seconds=4.0, cache=str(tmp_path / "cache"))
    remote.sources = {"shards": SourceConfig(path=named(store))}
    tables = tables_of(remote)
    encoder = spoiled(remote, tables, "hang")
    for number in range(NUM_SHARDS):
        place = tables.folders["shards"].cache.place_of(named(store))
        (place / f"shard-{number:06d}.tar").unlink(missing_ok=True)
    loader = loader_of(remote, tables, planner_of(remote, tables), encoder=encoder)
    told = rf"^shards/shard-000003\.tar/{encoder.key}: a loader worker hangs .*timeout_seconds=4"
    with pytest.raises(RuntimeError, match=told):
        list(loader)


def test_a_worker_waits_longer_than_the_timeout_for_a_slow_store(shards, store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr("data.loader.LOOK_SECONDS", 0.5)
    monkeypatch.setattr(FetchAhead, "want", lambda *_: None)
    remote = data_config("x", length=128, workers=1, timeout_seconds=2.0, cache=str(tmp_path / "cache"))
    remote.sources = {"shards": SourceConfig(path=named(store))}
    tables = tables_of(remote)
    (folder,) = tables.folders.values()
    folder.cache = ShardCache(folder.cache.folder, 10**9, replace(QUICK, stall_seconds=5.0))
    (folder.cache.place_of(folder.path) / "shard-000003.tar").unlink(missing_ok=True)
    store.faults["shard-000003.tar"] = ["stall"]
    steps = list(loader_of(remote, tables, planner_of(remote, tables)))
    assert len(store.asked("shard-000003.tar")) >= 2 and steps


def test_an_error_of_its_own_that_a_store_raises_ends_the_run_and_drops_nothing(store, shards, tmp_path):
    remote = data_config("x", length=128, cache=str(tmp_path / "cache"))
    remote.sources = {"shards": SourceConfig(path=named(store))}
    tables = tables_of(remote)
    (folder,) = tables.folders.values()
    shutil.rmtree(folder.cache.root)
    folder.cache.make_place(folder.path)
    for index in shards.glob("*.index.parquet"):
        shutil.copy(index, folder.cache.place_of(folder.path))
    for shard in folder.shards:
        shard.url = shard.url.replace("127.0.0.1", "a" * 64)  # no host has such a name: a UnicodeError
    loader = loader_of(remote, tables, planner_of(remote, tables))
    with pytest.raises(RuntimeError, match=r"shards/shard-00000\d\.tar/\w+: .*"):
        list(loader)


def test_a_command_is_read_through_a_descriptor_beyond_1023(shards, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this machine allows no such descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]
    try:
        folder = load_remote(f"pipe:cat {shards}/shard-{{000000..000001}}.tar", cache)
        assert len(samples(folder)) == 6
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_token_counts_that_lie_beside_the_shards_are_taken(shards, store, tmp_path):
    tables = tables_of(data_config(str(shards)))
    remote = data_config(named(store))
    remote.sources = {"shards": SourceConfig(path=named(store))}
    remote.cache = str(tmp_path / "cache")
    assert tables_of(remote).fingerprint == tables.fingerprint
    assert not any(store.asked(f"shard-{number:06d}.tar") for number in range(NUM_SHARDS))


def test_the_plan_names_the_shards_it_reads_next(shards):
    config = data_config(str(shards), length=128, shuffle_shards=2)
    tables = tables_of(config)
    planner = planner_of(config, tables, packs_per_step=1, epochs=3.0)
    ahead, num_steps = set(), 0
    while (plan := planner.next_step()) is not None:
        read = {(ref.source, ref.shard) for pack in plan.packs for ref in pack.refs}
        assert num_steps == 0 or read <= ahead | set(planner.shards_ahead({"shards"}))
        ahead = set(planner.shards_ahead({"shards"}))
        assert planner.shards_ahead(set()) == []
        num_steps += 1
    assert num_steps > 10


def test_a_store_that_stays_away_stops_the_loader_and_names_the_shard(store, shards, tmp_path, monkeypatch):
    remote = data_config(named(store), length=128)
    remote.sources = {"shards": SourceConfig(path=named(store))}
    remote.cache = str(tmp_path / "cache")
    tables = tables_of(remote)
    for folder in tables.folders.values():
        shutil.rmtree(folder.cache.root)
        place = folder.cache.make_place(folder.path)
        for index in shards.glob("*.index.parquet"):
            shutil.copy(index, place)
        folder.cache = ShardCache(folder.cache.folder, 10**9, QUICK)
    store.faults.update({f"shard-{n:06d}.tar": ["error"] * 99 for n in range(NUM_SHARDS)})
    loader = loader_of(remote, tables, planner_of(remote, tables))
    with pytest.raises(RuntimeError, match=r"shards/shard-00000\d\.tar/.*cannot be fetched .*500"):
        list(loader)


READ_FROM_S3 = """
import json, os, sys
from data.download import Patience
from data.remote import load_remote
from data.shard_cache import ShardCache
from data.shards import ShardReader
from data.transport import open_store

cache = ShardCache(sys.argv[1], 10**9, Patience(stall_seconds=2, attempts=4, first_pause_seconds=0.1))
folder = load_remote("s3://data/shards", cache)
reader = ShardReader(folder, "s")
keys = [reader.read(n, r).key for n, shard in enumerate(folder.shards) for r in range(shard.num_rows)]
print(json.dumps([folder.digest, keys]))
with open(folder.shards[1].cached.partial, "wb") as file:  # of a longer one, from an earlier process
    file.write(bytes(folder.shards[1].num_bytes - 1))
os.unlink(folder.shards[1].path)
store, path = open_store(folder.shards[1].url)
store.pipe_file(path, b"short")
try:
    folder.open(1)
except RuntimeError as error:
    print(error)
for path in ("s3://data/nothing", "s3://nothing"):
    try:
        load_remote(path, cache)
    except ValueError as error:
        print(error)
"""


def test_shards_of_an_s3_server_are_listed_and_read_whatever_happens_on_the_way(shards, tmp_path):
    with s3_store(shards, ["cut", "error", "stall", "error", "cut", "cut"]) as env:
        command = [sys.executable, "-c", READ_FROM_S3, str(tmp_path / "cache")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, changed, *problems = done.stdout.splitlines()
    assert changed.startswith("s3://data/shards/shard-000001.tar: has other content")
    local = load_folder(str(shards))
    assert json.loads(found) == [local.digest, [sample.key for sample in samples(local)]]
    assert [problem.split(": ")[0] for problem in problems] == ["s3://data/nothing", "s3://nothing"]


def test_a_local_source_loads_nothing_that_speaks_to_stores():
    code = "import sys, data.loader, data.counts; print([m for m in ('fsspec', 's3fs') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    torch_alone = [
        sys.executable,
        "-c",
        "import sys, torch; print([m for m in ('fsspec', 's3fs') if m in sys.modules])",
    ]
    assert loaded == subprocess.run(torch_alone, capture_output=True, text=True, check=True).stdout


def test_a_protocol_without_its_library_names_the_extra(tmp_path):
    config = data_config("x")
    config.cache = str(tmp_path)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[remote\]'"), contextlib.suppress(NoRoom):
        load_source("abfs://container/shards", config)
