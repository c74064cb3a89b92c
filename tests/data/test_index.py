import base64
import io
import json
import os
import pickle
import tarfile
import time
import wave
import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import LimitsConfig
from data.index import list_shards, load_folder, main, summarize
from data.options import read_limits
from data.sample import MediaSize
from data.scan import build_index, index_path, index_shards
from data.shard_index import Columns
from data.shards import ShardReader
from data.tar_members import scan_shard


def jpeg(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


def wav(num_samples: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
        writer.writeframes(bytes(2 * num_samples))
    return buffer.getvalue()


def write_tar(path, members) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def caption(key: str, data: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg() if data is None else data), (f"{key}.txt", b"a teal area")]


def indexed(folder, members, format="caption", limits=None):
    """Writes one shard made by others, indexes it and loads the folder."""
    path = write_tar(folder / "shard-000000.tar", members)
    index_shards([path], format, limits or LimitsConfig(), workers=1)
    return load_folder(str(folder))


def causes(folder):
    shard = folder.shards[0]
    return {shard.keys[row]: cause for row, (cause, _) in shard.errors.items()}


def chat_json(*parts: dict) -> bytes:
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "ab"}]}]
    return json.dumps({"messages": [*turns, {"role": "assistant", "content": "cde"}], "tags": ["x"]}).encode()


def text_only() -> list[tuple[str, bytes]]:
    return [("plain.json", chat_json())]


def test_row_holds_sizes_offsets_text_and_tags(tmp_path):
    record = chat_json({"type": "image", "image": "0.jpg"}, {"type": "audio", "audio": "1.wav"})
    members = [("k.0.jpg", jpeg(64, 48)), ("k.1.wav", wav(1234)), ("k.json", record)]
    folder = indexed(tmp_path, [*text_only(), *members], format="native")
    shard = folder.shards[0]
    assert shard.keys == ["plain", "k"] and shard.tags(1) == ("x",)
    assert shard.sizes(1) == {
        "0.jpg": MediaSize("image", width=64, height=48),
        "1.wav": MediaSize("audio", num_samples=1234),
    }
    assert shard.sizes(0) == {} and not shard.errors and folder.format == "native"
    with open(shard.path, "rb") as file:
        for name, data in members:
            offset, size = shard.members(1)[name[2:]]
            file.seek(offset)
            assert file.read(size) == data


keys = st.text("abcXYZ019_-", min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(
    names=st.lists(
        st.tuples(st.sampled_from(["", "train/", "a/b/"]), keys), unique=True, max_size=6, min_size=1
    )
)
def test_index_finds_every_member_of_every_sample(names, tmp_path_factory):
    members = [
        (f"{folder}{key}.{ending}", f"{folder}{key}{ending}".encode())
        for folder, key in names
        for ending in ("txt", "0.jpg", "meta.json")
    ]
    path = write_tar(str(tmp_path_factory.mktemp("tar") / "s.tar"), members)
    groups = scan_shard(path, LimitsConfig())
    assert [group.key for group in groups] == [folder + key for folder, key in names]
    with open(path, "rb") as file:
        content = file.read()
    for group in groups:
        for ending, (offset, size) in group.members.items():
            assert content[offset : offset + size] == f"{group.key}{ending}".encode()


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_tar_cut_anywhere_keeps_the_whole_samples_and_says_so(share, tmp_path_factory):
    path = write_tar(
        str(tmp_path_factory.mktemp("tar") / "s.tar"), [(f"k{n}.txt", b"x" * 700) for n in range(5)]
    )
    end_mark = 5 * (512 + 1024)
    os.truncate(path, int(end_mark * share))
    build_index(path, "caption", LimitsConfig())
    groups = scan_shard(path, LimitsConfig())
    whole = min(5, int(end_mark * share) // (512 + 1024) + (int(end_mark * share) % 1536 >= 512 + 700))
    assert [group.key for group in groups if not group.cause] == [f"k{n}" for n in range(whole)]
    assert [group.cause for group in groups[whole:]] == ["shard_truncated"]


def test_damaged_header_inside_a_tar_does_not_hide_what_follows_silently(tmp_path):
    path = write_tar(str(tmp_path / "s.tar"), [(f"k{n}.txt", b"x" * 500) for n in range(3)])
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(b"garbage " * 64)
    assert [group.cause for group in scan_shard(path, LimitsConfig())] == ["", "shard_truncated"]


def test_bad_samples_stay_as_rows_with_their_cause(tmp_path):
    members = [
        *caption("good"),
        *caption("cut", jpeg()[:-30]),
        *caption("nothing", b""),
        ("lone.txt", b"no picture"),
        ("../up.jpg", jpeg()),
        ("../up.txt", b"x"),
        ("/abs.jpg", jpeg()),
        ("twice.txt", b"a"),
        ("twice.txt", b"b"),
        *[(f"many.{n}.jpg", b"") for n in range(7)],
        *caption("last"),
        ("README", b"a file without an ending is no sample"),
    ]
    folder = indexed(tmp_path, members, limits=LimitsConfig(parts=5))
    assert causes(folder) == {
        "cut": "image_truncated",
        "nothing": "image_empty",
        "lone": "record_malformed",
        "../up": "member_name",
        "/abs": "member_name",
        "twice": "duplicate_member",
        "many": "too_many_parts",
    }
    summary = summarize(folder)
    assert summary["good"] == 2 and summary["pictures"] == 2 and summary["samples"] == 9
    assert summary["first_bad"][0].startswith(
        f"{tmp_path.name}/shard-000000.tar/cut: jpg: the picture is cut off"
    )


def test_bad_media_name_the_line_of_the_record(tmp_path):
    record = json.loads(chat_json({"type": "image", "image": "0.jpg"})) | {"origin": "records.jsonl:12"}
    folder = indexed(tmp_path, [("k.0.jpg", b""), ("k.json", json.dumps(record).encode())], format="native")
    assert folder.shards[0].errors[0][1] == "0.jpg: the picture is empty (0 bytes) (records.jsonl:12)"


def test_whatever_a_decoder_raises_becomes_a_row(tmp_path, monkeypatch):
    def explode(data, limits):
        raise ZeroDivisionError("in a codec")

    monkeypatch.setattr("data.scan.image_size", explode)
    folder = indexed(tmp_path, caption("k"))
    assert folder.shards[0].errors == {0: ("unexpected", "ZeroDivisionError: in a codec")}


def test_shards_of_others_are_read_in_their_own_layout(tmp_path):
    folder = indexed(tmp_path, caption("train/k"))
    sample = ShardReader(folder).read(0, 0)
    assert sample.key == "train/k" and sample.media == {"jpg": jpeg()} and sample.tags == ("caption",)
    assert folder.shards[0].sizes(0) == {"jpg": MediaSize("image", width=40, height=30)}


def test_media_inside_a_record_is_measured_and_read(tmp_path):
    part = {"type": "image_url", "image_url": "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()}
    folder = indexed(tmp_path, [("k.json", chat_json(part))], format="openai")
    assert folder.shards[0].sizes(0) == {"inline0.jpg": MediaSize("image", width=40, height=30)}
    reader = ShardReader(folder)
    assert reader.read(0, 0).media == {"inline0.jpg": jpeg()} and reader.read(0, 0, media=False).media == {}


def test_workers_give_the_same_index_as_one_process(tmp_path):
    members = [member for n in range(70) for member in caption(f"k{n}", None if n % 9 else b"bad")]
    digests = []
    for workers in (1, 2):
        path = write_tar(tmp_path / str(workers) / "shard-000000.tar", members)
        index_shards([path], "caption", LimitsConfig(), workers)
        digests.append(load_folder(os.path.dirname(path)).digest)
    assert digests[0] == digests[1]


def test_digest_changes_with_content_and_not_with_place_or_time(tmp_path):
    first = indexed(tmp_path / "a", caption("k"))
    again = indexed(tmp_path / "b", caption("k"))
    os.utime(again.shards[0].path, (1, 1))
    other = indexed(tmp_path / "c", caption("k", jpeg(41, 30)))
    assert first.digest == load_folder(again.path).digest != other.digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: os.unlink(index_path(tar)), "has no index. Run `python -m data.index "),
        (os.unlink, "is indexed but not there"),
        (lambda tar: os.truncate(tar, 100), "has 100 bytes, but 10240 when it was indexed. Run `python -m"),
        (lambda tar: os.truncate(index_path(tar), 50), "is no index of a shard"),
        (lambda tar: (os.unlink(tar), os.unlink(index_path(tar))), "holds no .tar shards"),
    ],
)
def test_folder_that_is_not_as_indexed_is_refused_with_what_to_do(tmp_path, damage, message):
    folder = indexed(tmp_path / "set", caption("k"))
    write_tar(tmp_path / "set" / "shard-000001.tar", caption("k"))
    index_shards([str(tmp_path / "set" / "shard-000001.tar")], "caption", LimitsConfig(), 1)
    if "holds no" in message:
        damage(str(tmp_path / "set" / "shard-000001.tar"))
    damage(folder.shards[0].path)
    with pytest.raises(ValueError, match="^" + str(tmp_path)) as caught:
        load_folder(folder.path)
    assert message in str(caught.value)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_folder(str(tmp_path / "none"))


def test_two_formats_in_one_folder_are_refused(tmp_path):
    indexed(tmp_path, caption("k"))
    path = write_tar(tmp_path / "shard-000001.tar", text_only())
    index_shards([path], "native", LimitsConfig(), 1)
    with pytest.raises(ValueError, match="is of format native, others here of caption"):
        load_folder(str(tmp_path))


def test_index_of_another_version_is_refused(tmp_path, monkeypatch):
    folder = indexed(tmp_path, caption("k"))
    monkeypatch.setattr("data.shard_index.INDEX_VERSION", 99)
    with pytest.raises(ValueError, match="is of index version 2, not 99"):
        load_folder(folder.path)


def test_failed_indexing_leaves_no_index_behind(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "shard-000000.tar", caption("k"))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    assert main([str(tmp_path), "--format", "caption", "--workers", "1"]) == 1
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_index_that_changes_in_use_is_noticed(tmp_path):
    folder = load_folder(indexed(tmp_path, caption("k")).path)
    indexed(tmp_path, caption("other"))
    with pytest.raises(RuntimeError, match="has changed while in use"):
        _ = folder.shards[0].keys


def test_folder_index_is_small_to_pickle_and_whole_afterwards(tmp_path):
    folder = indexed(tmp_path, [member for n in range(50) for member in caption(f"k{n}")])
    assert folder.shards[0].keys[49] == "k49"
    pickled = pickle.dumps(folder)
    assert len(pickled) < 1000 and pickle.loads(pickled).shards[0].sizes(7) == folder.shards[0].sizes(7)


def loads_of(monkeypatch):
    """Returns the list that every reading of a shard's columns is entered into, and those that are alive."""
    loaded, alive, init = [], weakref.WeakSet(), Columns.__init__

    def note(columns, shard):
        loaded.append(shard.name)
        alive.add(columns)
        init(columns, shard)

    monkeypatch.setattr(Columns, "__init__", note)
    return loaded, alive


@pytest.mark.parametrize("travels", [False, True])
def test_columns_of_only_so_many_shards_are_kept(tmp_path, monkeypatch, travels):
    for number in range(6):
        write_tar(tmp_path / f"shard-{number:06d}.tar", caption(f"k{number}"))
    index_shards(list_shards(str(tmp_path)), "caption", LimitsConfig(), workers=1)
    folder = load_folder(str(tmp_path))
    folder.keep(2)
    folder = pickle.loads(pickle.dumps(folder)) if travels else folder
    loaded, alive = loads_of(monkeypatch)
    for number in (0, 1, 0, 1, 2, 1, 0, 5):
        shard = folder.shards[number]
        assert shard.keys == [f"k{number}"] and shard.sizes(0) and shard.members(0) and not shard.errors
        assert len(alive) <= 2
    assert [int(name[6:12]) for name in loaded] == [0, 1, 2, 0, 5]
    folder.keep(2)
    assert not alive


def test_loading_a_hundred_thousand_rows_takes_less_than_half_a_second(tmp_path):
    folder = indexed(tmp_path, caption("k"))
    table = pq.read_table(index_path(folder.shards[0].path))
    pq.write_table(pa.concat_tables([table] * 100_000).combine_chunks(), index_path(folder.shards[0].path))
    start = time.process_time()
    shard = load_folder(folder.path).shards[0]
    assert len(shard.keys) == 100_000 and shard.sizes(99_999) and shard.members(99_999) and not shard.errors
    assert time.process_time() - start < 0.5


def test_command_indexes_and_prints_json(tmp_path, capsys):
    write_tar(tmp_path / "shard-000000.tar", [*caption("a"), *caption("b", b"")])
    assert main([str(tmp_path), "--format", "caption", "--workers", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["good"], summary["bad"], summary["shards"]) == (1, {"image_empty": 1}, 1)


def test_command_fails_when_nothing_is_good(tmp_path, capsys):
    write_tar(tmp_path / "shard-000000.tar", caption("b", b""))
    assert main([str(tmp_path), "--format", "caption", "--workers", "1"]) == 1
    assert "image_empty 1" in capsys.readouterr().out


def retext(folder, text: bytes):
    """Puts another text of the same length into the first shard, in place; returns its path."""
    path = folder.shards[0].path
    with open(path, "rb") as file:
        content = file.read()
    assert content.count(b"a teal area") == 1 and len(text) == len(b"a teal area")
    with open(path, "wb") as file:
        file.write(content.replace(b"a teal area", text))
    os.utime(path, (1, 1))
    return path


def test_text_of_the_same_length_changes_the_digest(tmp_path):
    first = indexed(tmp_path, caption("k"))
    index_shards([retext(first, b"a blue area")], "caption", LimitsConfig(), workers=1)
    again = load_folder(first.path)
    assert again.digest != first.digest and again.shards[0].fingerprint != first.shards[0].fingerprint


def test_shard_with_other_content_of_the_same_size_is_refused(tmp_path):
    folder = indexed(tmp_path, caption("k"))
    retext(folder, b"a blue area")
    with pytest.raises(
        ValueError, match=r"has other content than when it was indexed\. Run `python -m data.index"
    ):
        load_folder(folder.path)


def test_names_that_are_not_unicode_are_quarantined_and_the_rest_is_indexed(tmp_path):
    tag = json.dumps({**json.loads(chat_json()), "tags": ["\ud800"]}).encode()
    cause = json.dumps({"error": {"cause": "\ud800", "message": "\udfff"}, "origin": "\udcff"}).encode()
    members = [("bad\udcff.json", chat_json()), ("tag.json", tag), ("cause.json", cause), *text_only()]
    folder = indexed(tmp_path, members, format="native")
    assert causes(folder) == {
        "bad\\udcff": "member_name",
        "tag": "record_malformed",
        "cause": "record_malformed",
    }
    assert folder.shards[0].keys[3] == "plain"


def count_indexed(monkeypatch):
    """Returns the list to which the name of every shard is added that is indexed from now on."""
    done = []

    def note(shard, *args, **kwargs):
        done.append(os.path.basename(shard))
        return build_index(shard, *args, **kwargs)

    monkeypatch.setattr("data.scan.build_index", note)
    return done


def test_command_indexes_only_what_is_not_indexed_as_asked(tmp_path, monkeypatch):
    command = [str(tmp_path), "--format", "caption", "--workers", "1"]
    for number in range(2):
        write_tar(tmp_path / f"s{number}.tar", caption(f"k{number}"))
    assert main(command) == 0
    done = count_indexed(monkeypatch)
    assert main(command) == 0 and done == []
    os.unlink(index_path(str(tmp_path / "s1.tar")))
    assert main(command) == 0 and done == ["s1.tar"]
    write_tar(tmp_path / "s0.tar", caption("k0", jpeg(31, 30)))
    assert main(command) == 0 and done == ["s1.tar", "s0.tar"]
    for words in (["--again"], ["--tags", "zh"], ["--limit", "parts=9"]):
        done.clear()
        assert main([*command, *words]) == 0 and done == ["s0.tar", "s1.tar"]


def test_two_that_index_one_shard_at_once_do_not_collide(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", caption("k"))
    write, inner = pq.write_table, []

    def write_twice(table, where, **options):
        write(table, where, **options)
        if not inner:
            inner.append(where)
            build_index(path, "caption", LimitsConfig())

    monkeypatch.setattr(pq, "write_table", write_twice)
    build_index(path, "caption", LimitsConfig())
    assert sorted(os.listdir(tmp_path)) == ["s.index.parquet", "s.tar"]
    assert load_folder(str(tmp_path)).shards[0].keys == ["k"]


def test_given_tags_are_added_to_those_of_the_layout(tmp_path):
    write_tar(tmp_path / "s.tar", caption("k"))
    assert main([str(tmp_path), "--format", "caption", "--workers", "1", "--tags", "zh, caption,web"]) == 0
    folder = load_folder(str(tmp_path))
    assert folder.shards[0].tags(0) == ("caption", "zh", "web") == ShardReader(folder).read(0, 0).tags


def test_text_layout_reads_documents_of_txt_members(tmp_path):
    sample = ShardReader(indexed(tmp_path, [("k.txt", b"some words")], format="text")).read(0, 0)
    assert sample.tags == ("text",) and sample.messages[0].role == "document"
    assert sample.messages[0].parts[0].text == "some words"


def test_caption_layout_takes_bmp(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "BMP")
    folder = indexed(tmp_path, [("k.bmp", buffer.getvalue()), ("k.txt", b"dark")])
    assert folder.shards[0].sizes(0) == {"bmp": MediaSize("image", width=9, height=7)}


def test_limits_can_be_changed(tmp_path):
    write_tar(tmp_path / "s.tar", [*caption("k"), ("c.jpg", jpeg(10, 10)), ("c.txt", b"x")])
    assert main([str(tmp_path), "--format", "caption", "--workers", "1", "--limit", "image_pixels=200"]) == 0
    assert causes(load_folder(str(tmp_path))) == {"k": "image_too_large"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("audio_second=5", "there is no limit 'audio_second'. Use one of .* \\(nearest: audio_seconds\\)"),
        ("parts=many", "'many' is not a whole number"),
        ("parts", "'' is not a whole number"),
        ("audio_seconds=0", "audio_seconds=0.0: must be above 0"),
        ("audio_seconds=nan", "'nan' is not a finite number"),
    ],
)
def test_limit_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^--limit .*{message}"):
        read_limits([change])
