"""The law of damaged data: 2,000 mixed samples, 40 of them damaged in eight ways."""

import struct
import time
from collections import Counter
from dataclasses import replace

import pytest

from data.ledger import Ledger
from tests.data.corpus import (
    data_config,
    image_bytes,
    loader_of,
    mixed_records,
    overwrite_silently,
    planner_of,
    prepare_folder,
    record,
    tables_of,
    wav_bytes,
    write_media,
)

NUM_SAMPLES = 2000
EVERY = 50
"""One record in so many is damaged, in turn in each of the ways."""


def truncated_jpeg(folder, number):
    data = image_bytes(150, 90)
    return record(number, image=write_media(folder, f"bad{number}.jpeg", data[: len(data) // 2]))


def flipped_png(folder, number):
    data = bytearray(image_bytes(90, 60, "PNG"))
    for place in range(60, len(data) - 20, 7):
        data[place] ^= 0xFF
    return record(number, image=write_media(folder, f"bad{number}.png", bytes(data)))


def text_as_picture(folder, number):
    return record(number, image=write_media(folder, f"bad{number}.jpg", b"404 not found\n" * 20))


def lying_wav(folder, number):
    data = bytearray(wav_bytes(8000))
    data[40:44] = struct.pack("<I", 10**6)
    return record(number, audio=write_media(folder, f"bad{number}.wav", bytes(data)))


def empty_clip(folder, number):
    return record(number, audio=write_media(folder, f"bad{number}.wav", wav_bytes(0)))


def missing_file(folder, number):
    return record(number, image=f"nowhere{number}.jpeg")


def surplus_mark(folder, number):
    return record(
        number,
        question="<image>\n<image>\nCompare.",
        image=write_media(folder, "ok.png", image_bytes(9, 9, "PNG")),
    )


def overwritten_later(folder, number):
    return record(number, image=write_media(folder, f"later{number}.jpeg", image_bytes(120, 80)))


WAYS = {
    truncated_jpeg: "image_truncated",
    flipped_png: "image_corrupt",
    text_as_picture: "image_corrupt",
    lying_wav: "audio_truncated",
    empty_clip: "audio_empty",
    missing_file: "media_missing",
    surplus_mark: "marks_mismatch",
    overwritten_later: "image_corrupt",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Config of the prepared folder, keys of all samples, and cause by key of the damaged ones."""
    root = tmp_path_factory.mktemp("damaged")
    media = root / "media"
    records = mixed_records(media, NUM_SAMPLES)
    ways = {}
    for turn, number in enumerate(range(EVERY // 2, NUM_SAMPLES, EVERY)):
        ways[number] = list(WAYS)[turn % len(WAYS)]
        records[number] = ways[number](media, number)
    config = data_config(prepare_folder(media, records, root / "web"), length=1024)
    tables = tables_of(config)
    shards = tables.folders["web"].shards
    keys = [key for shard in shards for key in shard.keys]
    for number, way in ways.items():
        if way is overwritten_later:
            shard, row = divmod(number, 400)
            overwrite(shards[shard], row, "0.jpg")
    return config, keys, {keys[number]: WAYS[way] for number, way in ways.items()}


def overwrite(shard, row, member):
    """Spoils a picture inside the tar, so that neither the index nor the shard's size tells."""
    offset, size = shard.members(row)[member]
    overwrite_silently(shard.path, offset, b"\x00" * size)


def epoch(config, *, state=None, rank=0, world_size=1, steps=None):
    """Returns the steps of one epoch, the keys delivered in them and the ledger of the run."""
    tables = tables_of(config)
    ledger = Ledger()
    for dropped in tables.quarantined:
        ledger.add(dropped, step=0)
    loader = loader_of(
        config,
        tables,
        planner_of(config, tables, packs_per_step=8, state=state),
        rank=rank,
        world_size=world_size,
        micro_batch_packs=2,
    )
    delivered, done = [], []
    for step in loader:
        done.append(step)
        for batch in step.batches:
            delivered += [info.key for info in batch.samples]
            for dropped in batch.dropped:
                ledger.add(dropped, step.step)
        ledger.good = len(delivered)
        if len(done) == steps:
            break
    loader.close()
    return done, delivered, ledger


@pytest.mark.parametrize("workers", [1, 2])
def test_every_damaged_sample_is_in_the_ledger_and_every_other_is_delivered_once(damaged, workers):
    config, keys, bad = damaged
    config = replace(config, workers=workers)
    assert (len(keys), len(bad)) == (NUM_SAMPLES, 40)
    started = time.perf_counter()
    steps, delivered, ledger = epoch(config)
    seconds = time.perf_counter() - started
    assert {entry.key: entry.cause for entry in ledger.entries} == bad
    assert len(ledger.entries) == 40
    assert Counter(delivered) == Counter(set(keys) - set(bad))
    assert ledger.counts["web"] == Counter(bad.values())
    assert ledger.bad == 5  # what only the worker could see
    fill = sum(step.fill for step in steps[:-1]) / (len(steps) - 1)
    print(
        f"\n{workers} workers: {len(steps)} steps, fill {fill:.4%}, {len(delivered) / seconds:.0f} samples/s"
    )
    assert fill >= 0.995
    ledger.check(0.05)


def test_interrupted_epoch_goes_on_elsewhere_with_exactly_the_remaining_samples(damaged):
    config, keys, bad = damaged
    first, delivered, ledger = epoch(replace(config, workers=2), steps=5)
    state = first[-1].planner_state
    ledgers = [ledger]
    for rank in range(2):
        _, more, ledger = epoch(replace(config, workers=1), state=state, rank=rank, world_size=2)
        delivered += more
        ledgers.append(ledger)
    assert Counter(delivered) == Counter(set(keys) - set(bad))
    merged = Ledger.merge([ledger.state() for ledger in ledgers])
    assert len(merged.entries) == 5  # those left out beforehand are found again by every start
    for dropped in tables_of(config).quarantined:
        merged.add(dropped, step=0)
    assert {entry.key: entry.cause for entry in merged.entries} == bad
    assert (merged.good, len(merged.entries)) == (NUM_SAMPLES - 40, 40)


def test_plan_of_an_epoch_holds_every_usable_sample_once(damaged):
    config, _, _ = damaged
    tables = tables_of(config)
    planner = planner_of(config, tables, packs_per_step=8)
    started = time.perf_counter()
    rows = []
    while (plan := planner.next_step()) is not None:
        rows += [(ref.shard, ref.row) for pack in plan.packs for ref in pack.refs]
        planner.state()
    microseconds = (time.perf_counter() - started) / len(rows) * 1e6
    print(f"\nplanning: {microseconds:.1f} microseconds a sample with a state every step (aim: 20)")
    (table,) = tables.tables
    assert sorted(rows) == list(zip(table.shard.tolist(), table.row.tolist()))
