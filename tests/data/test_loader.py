import copy
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.deal import deal
from data.encode import Encoder
from data.index import load_folder
from data.sample import SampleError
from data.worker import Loaded
from tests.data.corpus import (
    MEDIA,
    TOKENIZER,
    data_config,
    image_bytes,
    loader_of,
    mixed_records,
    overwrite_silently,
    planner_of,
    prepare_folder,
    record,
    tables_of,
    write_media,
)

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Sixty mixed samples in three shards, counted."""
    root = tmp_path_factory.mktemp("mixed")
    return prepare_folder(
        root / "media", mixed_records(root / "media", 60), root / "mixed", samples_per_shard=20
    )


def run(config, *, rank=0, world_size=1, state=None, steps=None, encoder=None, micro_batch_packs=1):
    """Returns the steps that a fresh loader delivers, at most `steps`."""
    tables = tables_of(config)
    loading = loader_of(
        config,
        tables,
        planner_of(config, tables, state=state),
        rank=rank,
        world_size=world_size,
        encoder=encoder,
        micro_batch_packs=micro_batch_packs,
    )
    delivered = []
    for step in loading:
        delivered.append(step)
        if len(delivered) == steps:
            break
    loading.close()
    return delivered


def content(item):
    """Returns a batch as nested plain values, to compare."""
    if isinstance(item, torch.Tensor):
        return item.dtype, item.tolist()
    if dataclasses.is_dataclass(item):
        return [content(getattr(item, field.name)) for field in dataclasses.fields(item)]
    return [content(value) for value in item] if isinstance(item, list) else item


def keys_of(steps):
    return sorted(info.key for step in steps for batch in step.batches for info in batch.samples)


def workers_alive():
    return [process for process in multiprocessing.active_children() if process.is_alive()]


class SpoilingEncoder(Encoder):
    """Encodes, but treats the sample `key` in a bad way."""

    key = ""
    way = ""

    def encode(self, sample, source, sizes):
        if sample.key != self.key:
            return super().encode(sample, source, sizes)
        if self.way == "hang":
            time.sleep(1000)
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.way == "refuse":
            raise SampleError("looks bad", cause="image_corrupt")
        if self.way == "bug":
            raise ZeroDivisionError("oh")
        if self.way == "disk":
            raise OSError("unreadable picture")
        if self.way == "memory":
            raise MemoryError
        encoded = super().encode(sample, source, sizes)
        if self.way == "longer":
            encoded.input_ids = np.append(encoded.input_ids, 1)
        return encoded


def spoiling(config, way, key=None):
    encoder = SpoilingEncoder(config, MEDIA, TOKENIZER)
    folder = load_folder(config.sources["mixed"].path)
    encoder.key = key or folder.shards[1].keys[3]
    encoder.way = way
    return encoder


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [2, 3])
def test_batches_are_the_same_for_any_number_of_workers(mixed, workers):
    inline = run(data_config(mixed))
    parallel = run(data_config(mixed, workers=workers, prefetch=2))
    assert len(inline) == len(parallel) > 2
    for one, other in zip(inline, parallel):
        assert content(one.batches) == content(other.batches)
        assert (one.step, one.planner_state, one.drawn, one.fill) == (
            other.step,
            other.planner_state,
            other.drawn,
            other.fill,
        )
    assert not workers_alive()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_deliver_the_plan(mixed, world_size):
    config = data_config(mixed)
    tables = tables_of(config)
    planner = planner_of(config, tables)
    ranks = [run(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for place, steps in enumerate(zip(*ranks)):
        plan = planner.next_step()
        assert plan is not None
        planned = sorted(
            tables.folders[ref.source].shards[ref.shard].keys[ref.row]
            for pack in plan.packs
            for ref in pack.refs
        )
        assert keys_of(steps) == planned
        assert {step.step for step in steps} == {place + 1}
        assert {len(step.batches) for step in steps} == {4 // world_size}
        assert all(step.planner_state == planner.state() for step in steps)
    assert planner.next_step() is None


def test_micro_batches_are_dealt_in_order(mixed):
    config = data_config(mixed)
    tables = tables_of(config)
    plan = planner_of(config, tables).next_step()
    assert plan is not None
    (step, *_) = run(config, rank=1, world_size=2, micro_batch_packs=2)
    (packs,) = deal(plan.packs, 2, 2)[1]
    (batch,) = step.batches
    folders = tables.folders
    assert [info.key for info in batch.samples] == [
        folders[ref.source].shards[ref.shard].keys[ref.row] for pack in packs for ref in pack.refs
    ]
    assert batch.input_ids.shape == (2, 512)


@pytest.fixture(scope="module")
def interrupted(mixed):
    """All steps of a run, and the state after two steps of one that had prefetched more."""
    first = run(data_config(mixed, workers=1, prefetch=8), steps=2)
    whole = run(data_config(mixed))
    assert keys_of(first) == keys_of(whole[:2])
    return whole, first[-1].planner_state


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 2), (0, 4), (2, 1)])
def test_resume_delivers_exactly_the_remaining_samples(mixed, interrupted, workers, world_size):
    whole, state = interrupted
    config = data_config(mixed, workers=workers)
    rest = [run(config, rank=rank, world_size=world_size, state=state) for rank in range(world_size)]
    for expected, steps in zip(whole[2:], zip(*rest), strict=True):
        assert keys_of(steps) == keys_of([expected])


def test_prefetched_steps_are_not_in_the_state_that_is_handed_over(mixed):
    config = data_config(mixed, workers=1, prefetch=8)
    tables = tables_of(config)
    planner = planner_of(config, tables)
    loading = loader_of(config, tables, planner)
    step = next(iter(loading))
    assert (step.step, step.planner_state["step"]) == (1, 1)
    assert planner.state()["step"] > 1
    loading.close()


def test_a_restored_planner_is_iterated_again_with_the_same_workers(mixed):
    config = data_config(mixed, workers=1)
    tables = tables_of(config)
    planner = planner_of(config, tables)
    start = copy.deepcopy(planner.state())
    loading = loader_of(config, tables, planner)
    first = [content(step.batches) for step in loading]
    pids = {process.pid for process in workers_alive()}
    planner.restore(start)
    assert [content(step.batches) for step in loading] == first
    assert {process.pid for process in workers_alive()} == pids
    loading.close()
    assert not workers_alive()


@pytest.mark.parametrize(
    ("way", "cause"),
    [
        ("refuse", "image_corrupt"),
        ("longer", "length_changed"),
        ("bug", "unexpected"),
        ("disk", "unexpected"),
    ],
)
def test_bad_sample_becomes_blank_in_its_place_and_shifts_nothing(mixed, way, cause):
    config = data_config(mixed)
    encoder = spoiling(config, way)
    whole, spoiled = run(config), run(config, encoder=encoder)
    dropped = [item for step in spoiled for batch in step.batches for item in batch.dropped]
    assert [(item.source, item.shard, item.key, item.cause) for item in dropped] == [
        ("mixed", "shard-000001.tar", encoder.key, cause)
    ]
    for one, other in zip(whole, spoiled, strict=True):
        assert one.planner_state == other.planner_state
        for batch, damaged in zip(one.batches, other.batches, strict=True):
            assert torch.equal(batch.cu_seqlens, damaged.cu_seqlens)
            assert batch.position_ids.equal(damaged.position_ids)
            assert [i for i in batch.samples if i.key != encoder.key] == damaged.samples
            if not damaged.dropped:
                assert content(batch) == content(damaged)


def test_picture_of_another_size_behind_the_index_is_dropped_as_length_changed(tmp_path):
    name = write_media(tmp_path, "a.png", image_bytes(160, 160, "PNG"))
    path = prepare_folder(tmp_path, [record(0, image=name), record(1)], tmp_path / "mixed")
    config = data_config(path)
    tables = tables_of(config)
    shard = tables.folders["mixed"].shards[0]
    offset, size = shard.members(0)["0.png"]
    other = image_bytes(56, 56)
    assert len(other) <= size
    overwrite_silently(shard.path, offset, other)
    (step,) = run(config)
    dropped = [item for batch in step.batches for item in batch.dropped]
    assert [(item.key, item.cause) for item in dropped] == [(shard.keys[0], "length_changed")]
    assert keys_of([step]) == [shard.keys[1]]


def test_hung_worker_is_told_by_the_name_of_its_sample(mixed, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    config = data_config(mixed, workers=1, timeout_seconds=4.0)
    encoder = spoiling(config, "hang")
    with pytest.raises(
        RuntimeError,
        match=rf"^mixed/shard-000001\.tar/{encoder.key}: a loader worker hangs .*timeout_seconds=4",
    ):
        run(config, encoder=encoder)
    assert not workers_alive()


def test_killed_worker_is_told_by_the_name_of_its_sample(mixed, monkeypatch):
    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.5)
    config = data_config(mixed, workers=2)
    encoder = spoiling(config, "kill")
    with pytest.raises(
        RuntimeError, match=rf"^mixed/shard-000001\.tar/{encoder.key}: a loader worker died at this .signal 9"
    ):
        run(config, encoder=encoder)
    assert not workers_alive()


def test_workers_go_on_when_the_job_is_asked_to_stop(mixed):
    config = data_config(mixed, workers=1)
    steps = run(config, encoder=spoiling(config, "terminate"))
    assert keys_of(steps) == keys_of(run(data_config(mixed)))


def test_failing_disk_stops_the_run_and_names_the_sample(mixed, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    config = data_config(mixed)
    tables = tables_of(config)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(RuntimeError, match=r"^mixed/shard-\d+\.tar/\w+: cannot be read .*Input/output error"):
        next(iter(loader_of(config, tables, planner_of(config, tables))))


def test_shard_that_is_gone_stops_the_run_and_is_named(tmp_path):
    path = prepare_folder(tmp_path, [record(number) for number in range(3)], tmp_path / "text")
    config = data_config(path)
    tables = tables_of(config)
    os.remove(tables.folders["text"].shards[0].path)
    with pytest.raises(RuntimeError, match=r"^text/shard-000000\.tar/\w+: the file is gone\. Restore"):
        next(iter(loader_of(config, tables, planner_of(config, tables))))


def test_lack_of_memory_stops_the_run_and_names_the_sample(mixed):
    config = data_config(mixed)
    encoder = spoiling(config, "memory")
    with pytest.raises(RuntimeError, match=rf"^mixed/shard-000001\.tar/{encoder.key}: memory ran out"):
        run(config, encoder=encoder)


KILLED_RANK = """
import os, signal, sys
from multiprocessing.forkserver import _forkserver
from tests.data.corpus import *

if __name__ == "__main__":
    config = data_config(sys.argv[1], workers=2)
    tables = tables_of(config)
    loader = loader_of(config, tables, planner_of(config, tables))
    next(iter(loader))
    workers = loader._dataloader._iterator._workers
    print(_forkserver._forkserver_pid, *(worker.pid for worker in workers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_and_their_forkserver_end_with_a_rank_that_was_killed(mixed, tmp_path):
    with (tmp_path / "pids").open("w+") as out:
        rank = subprocess.run(
            [sys.executable, "-c", KILLED_RANK, mixed], stdout=out, timeout=60, cwd=CHECKOUT
        )
        out.seek(0)
        pids = [int(pid) for pid in out.read().split()]
    assert (rank.returncode, len(pids)) == (-signal.SIGKILL, 3)
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


FAILING_RANK = """
import sys
from tests.data.corpus import *

if __name__ == "__main__":
    config = data_config(sys.argv[1], workers=1)
    tables = tables_of(config)
    loader = loader_of(config, tables, planner_of(config, tables))
    next(iter(loader))
    print(*(worker.pid for worker in loader._dataloader._iterator._workers), flush=True)
    raise SystemExit(7)
"""


def test_rank_that_fails_elsewhere_ends_at_once_with_its_workers(mixed):
    rank = subprocess.run(
        [sys.executable, "-c", FAILING_RANK, mixed],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        cwd=CHECKOUT,
    )
    assert rank.returncode == 7
    pid = int(rank.stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_pinning_reaches_every_tensor_and_keeps_the_rest(mixed, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = run(data_config(mixed), steps=1)[0].batches[0]
    copied = Loaded(batch).pin_memory().batch
    assert content(copied) == content(batch)
    assert len(pinned) == 7 + 5 + 9
    assert copied.vision.pixels is not batch.vision.pixels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_where_there_is_a_gpu(mixed, workers):
    (step,) = run(data_config(mixed, workers=workers), steps=1)
    assert step.batches[0].input_ids.is_pinned()
    assert step.batches[0].vision.pixels.is_pinned()


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_of_the_rank_alone(mixed, workers):
    before = torch.get_rng_state()
    run(data_config(mixed, workers=workers), steps=1)
    assert torch.get_rng_state().equal(before)


def test_fill_and_drawn_are_of_the_whole_global_step(mixed):
    config = data_config(mixed)
    tables = tables_of(config)
    ranks = [run(config, rank=rank, world_size=2) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert (one.fill, one.drawn) == (other.fill, other.drawn)
    assert ranks[0][-1].drawn == {"mixed": int(tables.tables[0].length.sum())}
    assert ranks[0][0].fill > 0.98
    assert ranks[0][-1].epoch == 1.0
