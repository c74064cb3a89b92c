"""Data that mean harm: bombs, endless clips, lying headers and indexes, paths that lead outside."""

import io
import json
import os
import signal
import struct
import tarfile
import zlib
from functools import partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.config import LimitsConfig
from data.index import load_folder, main
from data.media import audio_num_samples, decode_image, image_size
from data.sample import SampleError
from data.scan import MeasuringPool, build_index, index_path
from data.tar_members import scan_shard
from tests.data.corpus import (
    data_config,
    image_bytes,
    loader_of,
    planner_of,
    prepare_folder,
    record,
    tables_of,
    wav_bytes,
    write_media,
)
from tests.data.dying import die_of_one
from tests.fuzz.damage import header

LIMITS = LimitsConfig()
MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def hangs_are_errors():
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(240)
    yield
    signal.alarm(0)


@pytest.fixture
def grown():
    """A function that returns by how many bytes memory grew at most since the test began."""

    def memory(name):
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to measure memory")
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    return lambda: memory("VmHWM") - before


def picture(kind):
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, kind)
    return bytearray(file.getvalue())


def png_bomb():
    """60,000 x 60,000 pixels in a few KB, of which the first rows are there."""
    rows = zlib.compress(bytes(7501 * 600), 9)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif_bomb():
    """A small screen, and a first frame far beyond it."""
    data = picture("GIF")
    place = data.index(b"\x2c")
    struct.pack_into("<HH", data, place + 5, 60_000, 60_000)
    return bytes(data)


def webp_bomb():
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "WEBP", exif=b"Exif\0\0")
    data = bytearray(file.getvalue())
    data[24:30] = (2**24 - 1).to_bytes(3, "little") * 2
    return bytes(data)


def jpeg_bomb():
    data = picture("JPEG")
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65_000, 65_000)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_bomb, gif_bomb, webp_bomb, jpeg_bomb])
def test_decompression_bombs_are_refused_without_being_decoded(bomb, grown):
    data = bomb()
    allowed = grown() + 64 * MEBIBYTE
    for read in (image_size, decode_image):
        with pytest.raises(SampleError) as caught:
            read(data, LIMITS)
        assert caught.value.cause in ("image_too_large", "image_corrupt")
    assert grown() < allowed


def test_jpeg_of_endless_scans_is_refused():
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    assert decode_image(data, LIMITS).size == (64, 64)
    bomb = data[:start] + data[start:-2] * 2000 + data[-2:]
    with pytest.raises(SampleError, match="scans"):
        image_size(bomb, LIMITS)


def test_palette_picture_without_a_palette_is_known_as_damaged_before_training():
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "PNG")
    data = file.getvalue()
    place = data.index(b"PLTE")
    without = data[: place - 4] + data[place + 8 + int.from_bytes(data[place - 4 : place], "big") :]
    for read in (image_size, decode_image):
        with pytest.raises(SampleError, match="palette"):
            read(without, LIMITS)


def flac(rate, seconds):
    """Returns silence in frames of 65,535 samples, 15 bytes each."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        stream = output.add_stream("flac", rate=rate, layout="mono", options={"frame_size": "65535"})
        for start in range(0, rate * seconds, 65_535):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 65_535), "<i2"), format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("rate", [100, 2000])
def test_ten_hours_of_sound_in_some_kilobytes_are_refused_within_bounds(rate, grown):
    data = flac(rate, 10 * 3600)
    assert len(data) < 200_000
    allowed = grown() + 512 * MEBIBYTE  # of 100 Hz, one frame is 11 minutes, or 40 MiB at 16 kHz
    with pytest.raises(SampleError) as caught:
        audio_num_samples(data, LIMITS)
    assert caught.value.cause == "audio_too_long" and grown() < allowed


@pytest.mark.parametrize("rate", [1, 99, 10**6 + 1, 2**28, 2**29])
def test_rate_that_no_recording_has_is_refused_before_it_is_resampled(rate, grown):
    data = bytearray(wav_bytes(8000))
    struct.pack_into("<I", data, 24, rate)
    with pytest.raises(SampleError) as caught:
        audio_num_samples(bytes(data), LIMITS)
    assert caught.value.cause == "audio_corrupt" and grown() < 64 * MEBIBYTE


def lying_wav():
    data = bytearray(wav_bytes(8000))
    struct.pack_into("<I", data, 40, 10**9)
    return bytes(data)


def hostile_records(media):
    """Records that each must be quarantined, by the cause."""
    (media.parent / "secret.png").write_bytes(image_bytes(20, 20, "PNG"))
    os.symlink(media.parent / "secret.png", media / "link.png")
    many = record("parts", audio=None)
    many["conversations"] += [dict(turn) for turn in many["conversations"]] * 50_000
    marks = record("marks", question="<image>" * 100_000)
    return {
        "path_outside": record("dots", image="../secret.png"),
        "path_outside ": record("absolute", image=str(media.parent / "secret.png")),
        "path_outside  ": record("symlink", image="link.png"),
        "parts": many,
        "too_many_parts": {**marks, "image": ["ok.png"] * 100_000},
        "image_too_large": record("bomb", image=write_media(media, "bomb.png", png_bomb())),
        "audio_too_long": record("hours", audio=write_media(media, "hours.flac", flac(2000, 36_000))),
        "audio_truncated": record("lie", audio=write_media(media, "lie.wav", lying_wav())),
    }


def test_hostile_records_are_in_the_ledger_by_cause_and_good_ones_are_delivered(tmp_path, grown):
    media = tmp_path / "media"
    media.mkdir()
    write_media(media, "ok.png", image_bytes(20, 20, "PNG"))
    bad = hostile_records(media)
    good = [record(number, image="ok.png") for number in range(4)]
    path = prepare_folder(media, [*good[:2], *bad.values(), *good[2:]], tmp_path / "web")
    config = data_config(path)
    tables = tables_of(config)
    assert [entry.cause for entry in tables.quarantined] == [cause.strip() for cause in bad]
    (step,) = loader_of(config, tables, planner_of(config, tables))
    assert sum(len(batch.samples) for batch in step.batches) == 4
    assert grown() < 512 * MEBIBYTE


def tar_of(path, *blocks):
    path.write_bytes(b"".join(blocks) + bytes(10_240))
    return str(path)


def member(name, data):
    return header(name, len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0")


GOOD = member("good.txt", b"a document")
BOMBS = {
    "100,000 members of one key": b"".join(header(f"many.{n}.jpg", 0) for n in range(100_000)),
    "a size beyond the end": header("k.txt", 2**60),
    "a size below zero": header("k.txt", -512),
    "a size of minus one block more": header("k.txt", -1024),
    "names of names without end": (header("l", 10, b"L") + b"k.txt".ljust(512, b"\0")) * 5000,
    "a name of 8 GiB": header("l", 8 * 2**30 - 1, b"L"),
    "an extended header of 8 GiB": header("p", 8 * 2**30 - 1, b"x"),
    "an extended header below zero": header("p", -(2**20), b"x"),
    "zeros in the middle": bytes(1024),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_tar_bombs_cost_what_follows_them_and_are_told(tmp_path, name, grown):
    path = tar_of(tmp_path / "shard-000000.tar", GOOD, BOMBS[name], member("after.txt", b"another"))
    allowed = grown() + 200 * MEBIBYTE
    build_index(path, "text", LIMITS)
    shard = load_folder(str(tmp_path)).shards[0]
    causes = [shard.errors.get(row, ("good", ""))[0] for row in range(shard.num_rows)]
    if name.startswith("100,000"):
        assert causes == ["good", "too_many_parts", "good"]
    else:
        assert causes == ["good", "shard_truncated"]
    assert grown() < allowed


def test_members_with_names_of_folders_links_and_holes_are_no_trap(tmp_path):
    sparse = header("s.txt", 512, b"S") + bytes(512)
    links = header("l.txt", 0, b"2") + header("h.txt", 0, b"1") + header("d.txt/", 0, b"5")
    outside = member("../../up.txt", b"x") + member("/root.txt", b"x") + member("a/../b.txt", b"x")
    nested = member("deep/" * 15 + "k.txt", b"nested")
    path = tar_of(tmp_path / "shard-000000.tar", sparse, links, outside, nested, GOOD)
    groups = scan_shard(path, LIMITS)
    assert [group.cause for group in groups] == ["member_name"] * 3 + ["", ""]
    assert groups[-2].key == "deep/" * 15 + "k" and groups[-1].key == "good"


def test_member_beyond_the_limits_is_refused_before_it_is_read(tmp_path, grown):
    path = tmp_path / "shard-000000.tar"
    with path.open("wb") as file:
        file.write(GOOD)
        for name in ("big.txt", "pic.jpg"):
            file.write(header(name, 2**30))
            file.seek(2**30, os.SEEK_CUR)
        file.write(member("pic.txt", b"a picture") + bytes(10_240))
    for layout, causes in (
        ("text", ["text_too_large"]),
        ("caption", ["record_malformed", "image_too_large"]),
    ):
        build_index(str(path), layout, LIMITS)
        shard = load_folder(str(tmp_path)).shards[0]
        assert [cause for cause, _ in shard.errors.values()][-len(causes) :] != []
        assert set(causes) <= {cause for cause, _ in shard.errors.values()}
    assert grown() < 64 * MEBIBYTE


@pytest.fixture
def two_shards(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    write_media(media, "a.png", image_bytes(90, 60, "PNG"))
    write_media(media, "a.wav", wav_bytes(9000))
    records = [record(number, image="a.png", audio="a.wav") for number in range(8)]
    return prepare_folder(media, records, tmp_path / "web", samples_per_shard=4)


GONE = r"^web/shard-00000\d\.tar/\w+: the file is gone\. Restore"
SHORT = r"^web/shard-00000\d\.tar/\w+: the file (has 1000|ends before)"


@pytest.mark.parametrize(
    ("strike", "message", "workers"),
    [
        (os.unlink, GONE, 0),  # a worker may have opened both shards by then, and would go on reading
        (lambda path: os.truncate(path, 1000), SHORT, 0),
        (lambda path: os.truncate(path, 1000), SHORT, 1),
    ],
)
def test_shard_lost_in_the_middle_of_a_run_stops_it_by_name(two_shards, strike, message, workers):
    config = data_config(two_shards, workers=workers, shuffle_shards=1, prefetch=1)
    tables = tables_of(config)
    loader = loader_of(config, tables, planner_of(config, tables, packs_per_step=1, epochs=5.0))
    steps = iter(loader)
    next(steps)
    for shard in tables.folders["web"].shards:
        strike(shard.path)
    with pytest.raises(RuntimeError, match=message):
        for _ in steps:
            pass


def test_index_made_again_before_a_worker_reads_it_stops_the_run_and_blames_no_sample(two_shards):
    config = data_config(two_shards, workers=1)
    tables = tables_of(config)
    loader = loader_of(config, tables, planner_of(config, tables))
    assert main([two_shards, "--again", "--workers", "1", "--tags", "new"]) == 0
    with pytest.raises(
        RuntimeError, match=r"^\S+index\.parquet: has changed while in use\. Start the run again\.$"
    ):
        next(iter(loader))


def lie(path, column, field, change):
    """Changes a number in the first row of an index."""
    table = pq.read_table(index_path(path))
    rows = table.to_pylist()
    item = next(item for item in rows[0][column] if column != "members" or item["name"].endswith("png"))
    item[field] = change(item[field])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), index_path(path))
    return rows[0]["key"]


@pytest.mark.parametrize(
    ("column", "field", "change", "causes"),
    [
        ("members", "size", lambda size: size // 2, {"image_truncated"}),
        ("members", "offset", lambda offset: offset + 3, {"image_corrupt"}),
        ("images", "width", lambda width: width * 3, {"length_changed"}),
        ("audios", "num_samples", lambda samples: samples + 40_000, {"length_changed"}),
    ],
)
def test_wrong_length_in_the_index_costs_its_sample_alone(two_shards, column, field, change, causes):
    key = lie(f"{two_shards}/shard-000000.tar", column, field, change)
    config = data_config(two_shards)
    tables = tables_of(config)
    batches = [
        batch for step in loader_of(config, tables, planner_of(config, tables)) for batch in step.batches
    ]
    dropped = [*tables.quarantined, *(entry for batch in batches for entry in batch.dropped)]
    assert [entry.key for entry in dropped] == [key] and dropped[0].cause in causes
    assert sum(len(batch.samples) for batch in batches) == 7


@pytest.mark.parametrize(
    ("column", "field", "value"),
    [
        ("members", "offset", -5),
        ("members", "size", 2**50),
        ("images", "width", 0),
        ("audios", "num_samples", 2**60),
        ("members", "name", None),
    ],
)
def test_index_of_impossible_numbers_is_refused_and_made_again(two_shards, column, field, value):
    lie(f"{two_shards}/shard-000000.tar", column, field, lambda _: value)
    with pytest.raises(RuntimeError, match=r"shard-000000\.index\.parquet: cannot be read .* --again`"):
        tables_of(data_config(two_shards))
    assert main([two_shards, "--again", "--workers", "1"]) == 0
    assert tables_of(data_config(two_shards)).report["web"]["samples"] == 8


def test_flipped_bytes_in_an_index_are_never_believed(two_shards):
    path = Path(index_path(f"{two_shards}/shard-000000.tar"))
    whole = path.read_bytes()

    def content():
        tables = tables_of(data_config(two_shards))
        return [shard.keys for shard in tables.folders["web"].shards], tables.tables[0].length.tolist()

    clean, believed = content(), 0
    for place in range(4, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        try:
            believed += content() != clean
        except (ValueError, RuntimeError) as error:
            assert "Run `python -m data.index" in str(error), error
    assert not believed


def test_footer_of_an_index_that_says_nonsense_is_refused(two_shards):
    path = index_path(f"{two_shards}/shard-000000.tar")
    table = pq.read_table(path)
    footer = json.loads(table.schema.metadata[b"shard"])
    for said in (
        [],
        {},
        {**footer, "format": "none"},
        {**footer, "num_bytes": "9"},
        {**footer, "ends": None},
    ):
        pq.write_table(table.replace_schema_metadata({"shard": json.dumps(said)}), path)
        with pytest.raises(ValueError, match=r"Run `python -m data\.index"):
            load_folder(two_shards)
    pq.write_table(table.rename_columns(["k", *table.column_names[1:]]), path)
    with pytest.raises(ValueError, match=r"Run `python -m data\.index"):
        load_folder(two_shards)


def test_sample_that_kills_a_decoder_is_quarantined_and_all_others_are_indexed(tmp_path):
    path = tar_of(tmp_path / "shard-000000.tar", *(member(f"k{n}.txt", b"a document") for n in range(40)))
    pool = MeasuringPool(2)
    for function, dead in ((die_of_one, ["k3"]), (None, [])):  # the pool goes on after a death
        build_index(
            path,
            "text",
            LIMITS,
            lambda f, tasks, function=function: pool.map(partial(function, f) if function else f, tasks),
        )
        shard = load_folder(str(tmp_path)).shards[0]
        assert [shard.keys[row] for row in shard.errors] == dead
        assert all(cause == "decoder_died" for cause, _ in shard.errors.values())
        assert shard.keys == [f"k{n}" for n in range(40)]
    pool.close()


def test_concatenated_tars_do_not_lose_the_second_silently(tmp_path):
    one, two = (tar_of(tmp_path / name, GOOD) for name in ("a", "b"))
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(Path(one).read_bytes() + Path(two).read_bytes())
    assert [group.cause for group in scan_shard(str(path), LIMITS)] == ["", "shard_truncated"]
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["good.txt"]
