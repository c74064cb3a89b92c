import io
import json
import os
import wave

import pytest
from PIL import Image

from data.index import load_folder
from data.prepare import main
from data.shards import ShardReader


@pytest.fixture
def source(tmp_path):
    """A folder with a picture, a cut picture, a clip, and a function that writes records."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (50, 20)).save(folder / "a.jpg")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-40])
    with wave.open(str(folder / "a.wav"), "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
        writer.writeframes(bytes(2 * 16000 * 36))

    def write(records, name="records.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n")
        return str(folder / name)

    return write


def record(text, **media):
    return {
        "conversations": [
            {"role": "user", "content": {"text": text, **media}},
            {"role": "assistant", "content": "yes"},
        ]
    }


MIXED = [
    record("one", image="a.jpg"),
    "{broken",
    record("two", audio="a.wav"),
    record("three", image="gone.jpg"),
    record("four", image="cut.jpg"),
    record("five"),
]


def prepared(path, out, *words):
    return main([path, "--format", "megrez", "--out", str(out), "--workers", "1", *words])


def test_every_record_becomes_a_row_and_bad_ones_carry_their_cause(source, tmp_path, capsys):
    assert prepared(source(MIXED), tmp_path / "out", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 6 and summary["good"] == 3 and summary["pictures"] == 1
    assert summary["bad"] == {"record_malformed": 1, "media_missing": 1, "image_truncated": 1}
    assert summary["audio_hours"] == pytest.approx(0.01)
    shard = load_folder(str(tmp_path / "out")).shards[0]
    assert sorted(shard.errors) == [1, 3, 4]
    assert [shard.errors[row][1].rsplit("(", 1)[1] for row in (1, 3, 4)] == [
        f"records.jsonl:{line})" for line in (2, 4, 5)
    ]


def test_summary_names_the_first_three_bad_samples_and_says_they_stay(source, tmp_path, capsys):
    assert prepared(source([record("one"), *["{broken"] * 5]), tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "6 samples, 1 good, 5 bad" in out and "bad: record_malformed 5" in out
    assert out.count("  out/shard-000000.tar/") == 3 and "are quarantined" in out


def test_samples_come_back_as_the_records_said(source, tmp_path):
    assert prepared(source(MIXED), tmp_path / "out", "--tags", "chat, zh", "--samples-per-shard", "4") == 0
    folder = load_folder(str(tmp_path / "out"))
    assert [shard.num_rows for shard in folder.shards] == [4, 2]
    sample = ShardReader(folder).read(0, 0)
    assert sample.tags == ("chat", "zh") and sample.origin == "records.jsonl:1"
    assert [part.text or part.media for part in sample.messages[0].parts] == ["0.jpg", "one"]
    assert sample.media["0.jpg"] == (tmp_path / "in" / "a.jpg").read_bytes()


def test_preparing_again_gives_the_same_keys_and_index(source, tmp_path):
    path = source(MIXED)
    digests = []
    for name in ("one", "two"):
        assert prepared(path, tmp_path / name) == 0
        digests.append(load_folder(str(tmp_path / name)).digest)
    assert digests[0] == digests[1]


def test_prefix_is_where_media_paths_start(source, tmp_path):
    path = source([record("one", image="in/a.jpg")])
    assert prepared(path, tmp_path / "no") == 1
    assert prepared(path, tmp_path / "yes", "--prefix", str(tmp_path)) == 0


def test_several_files_make_one_folder(source, tmp_path):
    paths = [source([record("a")], "a.jsonl"), source([record("b")], "b.jsonl")]
    assert main([*paths, "--format", "megrez", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert load_folder(str(tmp_path / "out")).num_rows == 2


@pytest.mark.parametrize(
    ("records", "message"), [([], "holds no records"), (["{broken"], "nothing is usable. It was not written")]
)
def test_nothing_usable_is_an_error_and_leaves_no_folder(source, tmp_path, capsys, records, message):
    assert prepared(source(records), tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "there is no such file"), ("a.jpg", "is none of .jsonl, .json"), ("", "is a folder")],
)
def test_source_that_is_no_record_file_is_an_error(source, tmp_path, capsys, name, message):
    source([])
    assert prepared(str(tmp_path / "in" / name), tmp_path / "out") == 1
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["in"]


def test_full_disk_while_indexing_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    assert prepared(source(MIXED), tmp_path / "out") == 1
    assert "the disk is full" in capsys.readouterr().err and os.listdir(tmp_path) == ["in"]


def test_folder_of_text_files_becomes_documents(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(f"text {name}")
    words = [str(tmp_path / "in"), "--format", "text", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 0
    sample = ShardReader(load_folder(str(tmp_path / "out"))).read(0, 1)
    assert sample.messages[0].role == "document" and sample.messages[0].parts[0].text == "text b"


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: python -m data.prepare" in io.StringIO(capsys.readouterr().out).read()


def test_deeply_nested_line_is_quarantined_and_the_rest_is_prepared(source, tmp_path, capsys):
    depths = [100, *range(800, 1000), 100_000]
    lines = [f'{{"conversations": {"[" * depth}{"]" * depth}}}' for depth in depths]
    assert prepared(source([record("one"), *lines]), tmp_path / "out", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["good"] == 1 and summary["bad"] == {"record_malformed": len(depths)}


def test_limits_can_be_changed(source, tmp_path, capsys):
    words = ["--limit", "audio_seconds=30", "--limit", "image_pixels=10", "--json"]
    assert prepared(source(MIXED), tmp_path / "out", *words) == 0
    bad = json.loads(capsys.readouterr().out)["bad"]
    assert bad["audio_too_long"] == 1 and bad["image_too_large"] == 1


def test_limit_that_is_not_known_is_an_error(source, tmp_path, capsys):
    assert prepared(source(MIXED), tmp_path / "out", "--limit", "pictures=3") == 1
    assert "there is no limit 'pictures'" in capsys.readouterr().err
