import dataclasses
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from data import count_cache
from data.config import DataConfig, Oversize, PackConfig, SourceConfig
from data.count_cache import count_folder, count_shard
from data.counts import _is_held_out, build_tables
from data.encode import Encoder
from data.index import load_folder
from data.shard_index import ShardIndex
from data.shards import ShardReader
from tests.data.corpus import (
    MEDIA,
    TOKENIZER,
    data_config,
    mixed_records,
    planner_of,
    prepare_folder,
    record,
    tables_of,
)
from tests.data.test_index import loads_of


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Forty mixed samples in four shards, one of them quarantined by the index."""
    root = tmp_path_factory.mktemp("mixed")
    records = mixed_records(root / "media", 40)
    records[7] = record(7, image="missing.jpeg")
    return prepare_folder(root / "media", records, root / "mixed", samples_per_shard=10)


@pytest.fixture
def cached(mixed, tmp_path):
    """A config whose counts go to a folder of the test."""
    return data_config(mixed, cache=str(tmp_path / "cache"))


def keys_of(tables):
    return {
        (table.name, tables.folders[table.name].shards[shard].keys[row])
        for table in tables.tables
        for shard, row in zip(table.shard, table.row)
    }


def test_counts_equal_what_encoding_gives(cached):
    encoder = Encoder(cached, MEDIA, TOKENIZER)
    folder = load_folder(cached.sources["mixed"].path)
    reader = ShardReader(folder)
    (table,) = tables_of(cached).tables
    assert len(table) == 39
    for shard, row, length, slices in zip(table.shard, table.row, table.length, table.slices):
        encoded = encoder.encode(
            reader.read(int(shard), int(row)), "mixed", folder.shards[int(shard)].sizes(int(row))
        )
        assert (len(encoded.input_ids), len(encoded.slices)) == (length, slices)


def test_second_build_counts_nothing_and_is_equal(cached, monkeypatch):
    first = tables_of(cached)

    def refuse(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(count_cache, "count_shard", refuse)
    second = tables_of(cached)
    assert first.fingerprint == second.fingerprint
    assert first.report == second.report
    assert first.quarantined == second.quarantined


def test_cache_of_another_template_or_index_is_never_used(cached, monkeypatch):
    counted = []

    def count(folder, shard, encoder):
        counted.append(shard)
        return count_shard(folder, shard, encoder)

    monkeypatch.setattr(count_cache, "count_shard", count)
    folder = load_folder(cached.sources["mixed"].path)
    encoder = Encoder(cached, MEDIA, TOKENIZER)
    count_folder(folder, encoder, "here", cached.cache)
    assert counted == [0, 1, 2, 3]
    folder.shards[2].fingerprint = "indexed again"
    count_folder(folder, encoder, "here", cached.cache)
    assert counted == [0, 1, 2, 3, 2]
    other = dataclasses.replace(cached, template=dataclasses.replace(cached.template, system="Be brief."))
    counted.clear()
    count_folder(load_folder(folder.path), Encoder(other, MEDIA, TOKENIZER), "here", cached.cache)
    assert counted == [0, 1, 2, 3]


def test_damaged_cache_file_is_counted_anew(cached):
    first = tables_of(cached)
    files = sorted(Path(cached.cache).rglob("*.tar.counts"))
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    assert tables_of(cached).fingerprint == first.fingerprint


def test_pool_counts_the_same_as_one_process(mixed, tmp_path, monkeypatch):
    inline = tables_of(data_config(mixed, cache=str(tmp_path / "inline")))
    monkeypatch.setattr(count_cache, "POOL_FROM", 10)
    pooled = tables_of(data_config(mixed, cache=str(tmp_path / "pooled")))
    assert pooled.fingerprint == inline.fingerprint
    assert pooled.quarantined == inline.quarantined


@pytest.mark.parametrize(("limit_bytes", "most"), [(10_000, 3), (2_900, 2), (500, 1), (None, 3)])
def test_no_more_processes_count_than_there_are_cores_shards_and_room(monkeypatch, limit_bytes, most):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(96)))
    cache = SimpleNamespace(limit_bytes=limit_bytes) if limit_bytes else None
    shards = [SimpleNamespace(num_bytes=num_bytes) for num_bytes in (100, 1000, 1200, 5000)]
    folder = cast(Any, SimpleNamespace(cache=cache, shards=shards))
    assert count_cache._num_processes(folder, [0, 1, 2]) == most
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 7})
    assert count_cache._num_processes(folder, [0, 1, 2]) == min(most, 2)


def test_each_worker_reads_the_columns_of_a_shard_about_once_and_keeps_those_of_a_window(
    tmp_path, monkeypatch
):
    path = prepare_folder(
        tmp_path, [record(number) for number in range(1200)], tmp_path / "x", samples_per_shard=50
    )
    pack = PackConfig(length=512, buffer=8)  # a small part of a window, as with shards of 10,000
    config = data_config(path, shuffle_shards=4, holdout=0.1, pack=pack)
    loaded, alive = loads_of(monkeypatch)
    tables = tables_of(config)
    assert not alive, "those who choose the samples keep nothing"
    loaded.clear()
    planner = planner_of(config, tables, packs_per_step=1)
    workers = [pickle.loads(pickle.dumps(tables.folders["x"])) for _ in range(2)]
    read = 0
    while plan := planner.next_step():
        for ref in (ref for pack in plan.packs for ref in pack.refs):
            assert workers[plan.step % 2].shards[ref.shard].keys[ref.row]
            read += 1
        assert len(alive) <= 2 * 4
    # Twenty-four shards each, and at the borders of windows some samples of the one before.
    assert read > 1000 and 48 <= len(loaded) < 60


def test_unwritable_cache_asks_for_another_folder(mixed, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Set data\.cache=DIR"):
        tables_of(data_config(mixed, cache=str(tmp_path / "file")))


def test_counts_lie_beside_the_shards_and_the_folder_stays_readable(tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(5)], tmp_path / "text")
    tables_of(data_config(path))
    assert len(list(Path(path, ".counts").rglob("*.tar.counts"))) == 1
    assert not list(Path(path, ".counts").rglob("*.partial"))
    assert load_folder(path).num_rows == 5


def test_bad_rows_are_quarantined_with_their_cause(cached):
    tables = tables_of(cached)
    (dropped,) = tables.quarantined
    assert (dropped.source, dropped.shard, dropped.cause) == ("mixed", "shard-000000.tar", "media_missing")
    assert tables.report["mixed"]["excluded"] == {"media_missing": 1}
    assert sum(tables.report["mixed"]["modality"].values()) == 39
    assert tables.report["mixed"]["tokens"] == int(tables.tables[0].length.sum())
    json.dumps(tables.report)


def test_holdout_splits_every_source_without_overlap_or_loss(cached):
    config = dataclasses.replace(cached, holdout=0.3)
    train, held = keys_of(tables_of(config)), keys_of(tables_of(config, "held_out"))
    assert not train & held
    assert train | held == keys_of(tables_of(cached))
    assert 3 <= len(held) <= 21


def test_holdout_keeps_its_samples_when_its_share_grows(cached):
    small = keys_of(tables_of(dataclasses.replace(cached, holdout=0.2), "held_out"))
    large = keys_of(tables_of(dataclasses.replace(cached, holdout=0.5), "held_out"))
    assert small < large


def test_repeats_of_a_record_are_all_held_out_or_all_trained_on(tmp_path):
    path = prepare_folder(tmp_path, [record(number % 10) for number in range(40)], tmp_path / "text")
    config = data_config(path, holdout=0.5)
    train, held = (
        {key.partition("-")[0] for _, key in keys_of(tables_of(config, split))}
        for split in ("train", "held_out")
    )
    assert train and held and not train & held


def test_keys_of_others_that_end_in_a_number_are_held_out_one_by_one():
    index = SimpleNamespace(format="native", keys=[f"photo-{number}" for number in range(100)])
    assert 20 < _is_held_out(cast(ShardIndex, index), 0.5).sum() < 80


def test_counts_are_written_under_a_name_that_no_other_process_uses(cached, monkeypatch):
    names = []
    write = Path.write_bytes

    def record_name(path, content):
        names.append(str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", record_name)
    folder = load_folder(cached.sources["mixed"].path)
    for place in ("one", "one"):
        counts = count_shard(folder, 0, Encoder(cached, MEDIA, TOKENIZER))
        count_cache._make_folder(Path(cached.cache or "", place), folder, "here")
        count_cache._write(Path(cached.cache or "", place), folder, 0, counts)
    assert len(set(names)) == 2


def test_holdout_of_tiny_data_may_be_empty(tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(3)], tmp_path / "text")
    tables = tables_of(data_config(path, holdout=1e-9), "held_out")
    assert tables.tables == []
    assert tables.report["text"]["samples"] == 0


def test_held_out_source_is_taken_whole_and_only_for_evaluation(cached, tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(6)], tmp_path / "exam")
    config = dataclasses.replace(cached, held_out={"exam": SourceConfig(path=path)})
    assert [table.name for table in tables_of(config).tables] == ["mixed"]
    held = tables_of(config, "held_out")
    assert [(table.name, len(table)) for table in held.tables] == [("exam", 6)]


def test_samples_of_a_modality_that_is_of_no_use_are_left_out_and_counted(cached):
    tables = tables_of(cached, takes=lambda modality: modality != "text")
    assert tables.report["mixed"]["excluded"]["text (trains nothing)"] == 10
    assert "text" not in tables.report["mixed"]["modality"]


def test_sample_with_any_wanted_tag_is_taken(tmp_path):
    one = prepare_folder(tmp_path, [record(n) for n in range(4)], tmp_path / "one", tags="ocr,zh")
    two = prepare_folder(tmp_path, [record(n) for n in range(3)], tmp_path / "two", tags="caption")
    tables = tables_of(data_config(one, two, tags=["caption", "zh"]))
    assert [len(table) for table in tables.tables] == [4, 3]
    with pytest.raises(ValueError) as error:
        tables_of(data_config(one, tags=["caption"]))
    assert str(error.value) == (
        "data.tags=[caption]: no sample of source 'one' has this tag. "
        "Known tags: ocr, zh. Use data.tags=[] to take all."
    )
    config = data_config(one)
    config.sources["one"].tags = ["en"]
    with pytest.raises(ValueError, match=r"^data\.sources\.one\.tags=\[en\]: no sample"):
        tables_of(config)


def test_source_without_the_tags_of_the_stage_is_left_to_other_stages(tmp_path):
    one = prepare_folder(tmp_path, [record(n) for n in range(4)], tmp_path / "one", tags="ocr,zh")
    two = prepare_folder(tmp_path, [record(n) for n in range(3)], tmp_path / "two", tags="caption")
    config = data_config(one, two, tags=["caption"])
    tables = tables_of(config)
    assert [(table.name, len(table)) for table in tables.tables] == [("two", 3)]
    assert tables.report["one"]["excluded"] == {"tags": 4}
    config.sources["two"].tags = ["en"]  # a source that nobody can ever use is a mistake
    with pytest.raises(ValueError, match=r"^data\.sources\.two\.tags=\[en\]: no sample"):
        tables_of(config)


def test_sources_for_evaluation_are_taken_whatever_the_tags_of_the_stage(tmp_path):
    train = prepare_folder(tmp_path, [record(n) for n in range(6)], tmp_path / "train", tags="caption")
    exam = prepare_folder(tmp_path, [record(n) for n in range(8)], tmp_path / "exam", tags="ocr")
    config = data_config(train, tags=["caption"], held_out={"exam": SourceConfig(path=exam)})
    assert [len(table) for table in tables_of(config, "held_out").tables] == [8]
    encoder = Encoder(config, MEDIA, TOKENIZER)
    with pytest.raises(ValueError, match=r"^data\.tags=\[caption\]: no sample of source 'exam'"):
        build_tables(
            config,
            MEDIA,
            encoder,
            split="held_out",
            cost=lambda length, patches, frames: length,
            takes=lambda modality: True,
            evaluates_all=False,
        )


def test_share_of_training_sources_is_filtered_by_tags_and_needs_a_name_of_its_own(tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(9)], tmp_path / "train", tags="caption")
    held = {"train": SourceConfig(path=path)}
    assert [len(t) for t in tables_of(data_config(path, held_out=held), "held_out").tables] == [9]
    with pytest.raises(ValueError, match=r"^data\.held_out\.train: is the name of a training source"):
        tables_of(data_config(path, held_out=held, holdout=0.5), "held_out")


@pytest.mark.parametrize(
    ("weight", "epochs", "problem"),
    [
        (2.0, 3.0, "epochs=3.0: weight=2.0 decides already. Set one of them."),
        (float("nan"), 1.0, "weight=nan: must be a finite number. Use 1."),
        (float("inf"), 1.0, "weight=inf: must be a finite number. Use 1."),
        (None, float("nan"), "epochs=nan: must be a finite number. Use 1."),
    ],
)
def test_share_of_a_source_that_means_nothing_is_a_problem(weight, epochs, problem):
    assert SourceConfig(path="x", weight=weight, epochs=epochs).problems() == [problem]


def test_missing_folder_is_named_by_its_setting(tmp_path):
    path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError) as error:
        tables_of(DataConfig(sources={"x": SourceConfig(path=path)}))
    assert str(error.value).startswith(f"data.sources.x.path={path}: there is no such folder.")


def test_source_without_a_usable_sample_is_refused_with_the_reasons(tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(3)], tmp_path / "text")
    with pytest.raises(ValueError, match=r"none of its 3 samples is left \(text \(trains nothing\) 3\)"):
        tables_of(data_config(path), takes=lambda modality: modality != "text")


def test_oversize_sample_is_an_error_dropped_or_cut_as_asked(tmp_path):
    records = [record(n, answer="word " * (300 if n == 2 else 3)) for n in range(4)]
    path = prepare_folder(tmp_path, records, tmp_path / "long")

    def tables(oversize):
        return tables_of(data_config(path, pack=PackConfig(length=256, oversize=oversize)))

    with pytest.raises(ValueError, match=r"^data\.pack\.oversize=error: sample long/\w+ has \d+ tokens"):
        tables(Oversize.error)
    dropped = tables(Oversize.drop)
    assert (len(dropped.tables[0]), dropped.report["long"]["excluded"]) == (3, {"oversize": 1})
    assert not dropped.quarantined
    assert np.array_equal(np.sort(tables(Oversize.truncate).tables[0].length)[-1:], [256])


def test_oversize_sample_that_is_not_taken_is_no_error(tmp_path):
    long = prepare_folder(tmp_path, [record(1, answer="word " * 300), record(2)], tmp_path / "long")
    held = {key for _, key in keys_of(tables_of(data_config(long, length=4096, holdout=0.5), "held_out"))}
    split = "train" if load_folder(long).shards[0].keys[0] in held else "held_out"
    config = data_config(long, length=256, holdout=0.5)
    assert tables_of(config, split).report["long"]["excluded"].get("oversize", 0) == 0


def test_shard_that_cannot_be_read_is_not_cached_as_bad_samples(tmp_path):
    path = prepare_folder(tmp_path, [record(n) for n in range(3)], tmp_path / "text")
    config = data_config(path)
    folder = load_folder(path)
    os.rename(folder.shards[0].path, tmp_path / "away.tar")
    with pytest.raises(RuntimeError, match="the file is gone"):
        count_folder(folder, Encoder(config, MEDIA, TOKENIZER), "data.sources.text", None)
    assert not list(Path(path).rglob("*.tar.counts"))
    os.rename(tmp_path / "away.tar", folder.shards[0].path)
    assert len(tables_of(config).tables[0]) == 3


def test_digest_is_of_the_content_and_not_of_the_place(mixed, cached, tmp_path):
    digest = tables_of(cached).digest
    os.symlink(mixed, tmp_path / "mixed")
    moved = data_config(str(tmp_path / "mixed"), cache=cached.cache)
    assert tables_of(moved).digest == digest
    assert tables_of(dataclasses.replace(cached, holdout=0.3)).fingerprint != tables_of(cached).fingerprint
