import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import WebDataset

from data.config import LimitsConfig
from data.index import UNFINISHED, load_folder
from data.index import main as index
from data.layouts import Quarantined, native_members, parse_members
from data.sample import Message, Part, Sample, SampleError
from data.scan import index_shards
from data.shards import ShardReader, whole_folder
from tests.records import write_shards


def text_sample(key: str, text: str = "hello") -> Sample:
    return Sample(key, [Message("document", [Part("text", text)])], {}, ("text",), f"lines.jsonl:{key}")


def written(samples, out, **sizes):
    """Writes and indexes samples; returns the loaded folder."""
    paths = write_shards(samples, str(out), **sizes)
    index_shards(paths, "native", LimitsConfig(), workers=1)
    return load_folder(str(out))


@pytest.fixture
def folder(tmp_path):
    return written(
        [text_sample(f"k{n}", f"text {n}") for n in range(10)], tmp_path / "set", samples_per_shard=4
    )


def read_key(reader):
    return reader.read(1, 2).key


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
parts = st.one_of(
    st.builds(lambda text: Part("text", text), texts),
    st.builds(lambda number: Part("image", media=f"{number}.jpg"), st.integers(0, 3)),
)
samples = st.builds(
    lambda key, question, answer, tags, origin: Sample(
        key,
        [Message("user", question), Message("assistant", [Part("text", answer)])],
        {part.media: part.media.encode() for part in question if part.media},
        tuple(tags),
        origin,
    ),
    st.text("abc123-", min_size=1),
    st.lists(parts, min_size=1, max_size=6),
    texts,
    st.lists(texts, max_size=3),
    texts,
)


@given(sample=samples)
def test_members_give_back_the_sample(sample):
    members = native_members(sample)
    assert parse_members("native", sample.key, members, members.__getitem__) == Sample(
        sample.key, sample.messages, {}, sample.tags, sample.origin
    )
    assert {name: members[name] for name in sample.media} == sample.media


@settings(deadline=None, max_examples=10)
@given(counts=st.lists(st.integers(1, 3000), min_size=1, max_size=12), per_shard=st.integers(1, 5))
def test_every_sample_is_in_exactly_one_shard_within_both_bounds(counts, per_shard, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    made = [text_sample(f"k{n}", "x" * count) for n, count in enumerate(counts)]
    paths = write_shards(made, str(out), samples_per_shard=per_shard, bytes_per_shard=4000)
    keys = []
    for path in paths:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert 1 <= len(members) <= per_shard
        assert sum(member.size for member in members[:-1]) < 4000
        keys += [member.name.partition(".")[0] for member in members]
    assert keys == [sample.key for sample in made]


def test_shards_are_plain_webdataset_tars(tmp_path):
    out = tmp_path / "set"
    sample = text_sample("k0")
    sample.media = {"0.jpg": b"bytes"}
    (path,) = write_shards([sample], str(out))
    (read,) = list(WebDataset(path, shardshuffle=False))
    assert read["__key__"] == "k0" and read["0.jpg"] == b"bytes" and b"hello" in read["json"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    made = [text_sample(f"k{n}") for n in range(5)]
    (first,) = write_shards(made, str(tmp_path / "a"))
    time.sleep(0.01)
    (second,) = write_shards(made, str(tmp_path / "b"))
    with open(first, "rb") as one, open(second, "rb") as two:
        assert one.read() == two.read()


def test_every_row_is_read_back(folder):
    reader = ShardReader(folder)
    found = [reader.read(n, row) for n, shard in enumerate(folder.shards) for row in range(shard.num_rows)]
    assert found == [text_sample(f"k{n}", f"text {n}") for n in range(10)]


def test_media_is_not_read_unless_asked_for(tmp_path, monkeypatch):
    picture = b"\x42" * 5000
    question = Message("user", [Part("image", media="0.jpg"), Part("text", "?")])
    sample = Sample("k", [question, Message("assistant", [Part("text", "yes")])], {"0.jpg": picture})
    (path,) = write_shards([sample], str(tmp_path / "set"))
    monkeypatch.setattr("data.scan.image_size", lambda data, limits: (1, 1))
    index_shards([path], "native", LimitsConfig(), workers=1)
    reader = ShardReader(load_folder(str(tmp_path / "set")))
    sizes, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or real(fd, size, at))
    without = reader.read(0, 0, media=False)
    assert without.media == {} and without.messages == sample.messages and 5000 not in sizes
    assert reader.read(0, 0).media == {"0.jpg": picture} and 5000 in sizes


def test_number_of_open_files_is_bounded(tmp_path):
    folder = written([text_sample(f"k{n}") for n in range(12)], tmp_path / "set", samples_per_shard=1)
    reader = ShardReader(folder, max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*range(12), *range(12)]:
        assert reader.read(shard, 0).key == f"k{shard}"
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_threads_share_a_reader_with_fewer_open_files_than_shards(tmp_path):
    folder = written(
        [text_sample(f"k{n}", "x" * 500) for n in range(8)], tmp_path / "set", samples_per_shard=1
    )
    reader = ShardReader(folder, max_open=1)
    wrong = []

    def read_all():
        for shard in [*range(8)] * 20:
            if reader.read(shard, 0).key != f"k{shard}":
                wrong.append(shard)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not reader.read(0, 0).media


def test_reader_travels_to_a_spawned_process_and_is_small(folder):
    reader = ShardReader(folder)
    reader.read(0, 0)
    assert len(pickle.dumps(reader)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_key, (reader,)) == "k6"


def test_quarantined_row_is_refused_with_its_own_cause(tmp_path):
    bad = Quarantined("k1", "marks_mismatch", "3 image marks but 2 images", "a.jsonl:7")
    folder = written([text_sample("k0"), bad], tmp_path / "set")
    with pytest.raises(SampleError, match=r"^3 image marks but 2 images \(a.jsonl:7\)$") as caught:
        ShardReader(folder).read(0, 1)
    assert caught.value.cause == "marks_mismatch"


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 600)])
def test_shard_that_vanished_or_shrank_is_named_with_source_and_key(folder, damage):
    reader = ShardReader(folder, source="coco")
    damage(folder.shards[1].path)
    with pytest.raises(SampleError, match=r"^coco/shard-000001\.tar/k4: ") as caught:
        reader.read(1, 0)
    assert caught.value.cause == "shard_unreadable"
    assert reader.read(0, 0).key == "k0"


def test_shard_that_shrinks_while_open_is_named(folder):
    reader = ShardReader(folder, source="coco")
    reader.read(1, 0)
    os.truncate(folder.shards[1].path, 600)
    with pytest.raises(SampleError, match=r"^coco/shard-000001\.tar/k7: the file ends"):
        reader.read(1, 3)


def test_folder_that_holds_something_is_never_overwritten(tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        write_shards([text_sample("k")], str(out))
    assert (out / "mine").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1


def test_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "set").mkdir()
    assert written([text_sample("k")], tmp_path / "set").num_rows == 1


def failing(error: BaseException):
    yield text_sample("k0")
    raise error


def test_error_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(KeyboardInterrupt()), str(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_clear_error_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_shards(failing(OSError(errno.ENOSPC, "No space left")), str(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from data.sample import Message, Part, Sample
from data.shards import fill_folder, whole_folder
def samples():
    for number in range(10**6):
        yield Sample(f"k{number}", [Message("document", [Part("text", "x" * 100)])])
        if number == 50:
            print("writing", flush=True)
            time.sleep(60)
with whole_folder(sys.argv[1]) as folder:
    fill_folder(samples(), folder, samples_per_shard=10)
"""


@pytest.fixture
def killed(tmp_path):
    """A process that is killed after it wrote some shards; gives the final folder's name."""
    out = tmp_path / "set"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    yield out, process
    process.kill()
    process.wait()


def test_killed_writer_leaves_no_folder_that_is_taken_for_whole(killed, capsys):
    out, process = killed
    with pytest.raises(ValueError, match="another process is filling it"):
        write_shards([text_sample("k")], str(out))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    unfinished = f"{out}.unfinished"
    assert os.listdir(unfinished)
    with pytest.raises(ValueError, match="was not finished"):
        load_folder(unfinished)
    assert index([unfinished]) == 1 and "was not finished" in capsys.readouterr().err
    assert written([text_sample("k")], out).num_rows == 1
    assert not os.path.exists(unfinished)


def test_folder_killed_between_renaming_and_unmarking_is_refused_and_made_anew(tmp_path):
    out = tmp_path / "set"
    written([text_sample("old")], out)
    (out / UNFINISHED).touch()
    with pytest.raises(ValueError, match="was not finished"):
        load_folder(str(out))
    assert written([text_sample("new")], out).shards[0].keys == ["new"]


def test_folder_of_someone_else_beside_is_never_emptied(tmp_path):
    beside = tmp_path / "set.unfinished"
    beside.mkdir()
    (beside / "mine").write_text("keep")
    with pytest.raises(ValueError, match="not ours"), whole_folder(str(tmp_path / "set")):
        pass
    assert (beside / "mine").read_text() == "keep"


def test_folder_that_appears_while_we_write_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="already exists"), whole_folder(str(out)):
        out.mkdir()
        (out / "precious.txt").write_text("years of work")
    assert (out / "precious.txt").read_text() == "years of work" and os.listdir(tmp_path) == ["out"]
