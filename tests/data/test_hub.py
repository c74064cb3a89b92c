"""Data sets in the hub's layouts, made by `datasets` and pyarrow, become the shards that files would."""

import datetime
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Features, Image, List, Value

from data.index import load_folder
from data.prepare import main
from data.shards import ShardReader
from tests.data.corpus import image_bytes, wav_bytes

JPEG, WAV = image_bytes(40, 30), wav_bytes(8000)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def parquet(folder: Path, features: Features, columns: dict, split: str = "train") -> str:
    """Writes a data set as `Dataset.to_parquet` does (which needs a decoder of sound), for `hf:`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns, schema=features.arrow_schema), folder / f"{split}-00000-of-00001.parquet"
    )
    return f"hf:{folder}"


def prepared(source, out, *words):
    return main([source, "--out", str(out), "--workers", "1", *words])


def read_all(out):
    folder = load_folder(str(out))
    reader, (shard,) = ShardReader(folder), folder.shards
    good = [reader.read(0, row) for row in range(shard.num_rows) if row not in shard.errors]
    return good, {cause for cause, _ in shard.errors.values()}


def turns(sample):
    return [
        (message.role, [part.text or sample.media[part.media] for part in message.parts])
        for message in sample.messages
    ]


def test_parquet_with_pictures_becomes_captions(tmp_path):
    features = Features({"picture": Image(), "words": Value("string"), "when": Value("timestamp[s]")})
    media = [
        {"bytes": JPEG, "path": "a.jpg"},
        {"bytes": JPEG[:60], "path": None},
        None,
        {"bytes": JPEG, "path": None},
    ]
    columns = {
        "picture": media,
        "words": ["one", "two", "three", "four"],
        "when": [datetime.datetime(2024, 1, 1)] * 4,
    }
    source = parquet(tmp_path / "in", features, columns)
    words = ("--format", "caption", "--map", "image=picture", "--map", "caption=words", "--tags", "zh")
    assert prepared(source, tmp_path / "out", *words) == 0
    good, causes = read_all(tmp_path / "out")
    assert [turns(sample) for sample in good] == [
        [("user", [JPEG]), ("assistant", [text])] for text in ("one", "four")
    ]
    assert good[0].tags == ("caption", "zh") and good[0].origin == "in/train[0]"
    assert "record_malformed" in causes and len(causes) == 2


def test_conversations_with_several_media_come_whole(tmp_path):
    features = Features(
        {
            "images": List(Image()),
            "audio": Audio(),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
        }
    )
    text = "<image><image><audio>\nWhat?"
    talk = [{"from": "human", "value": text}, {"from": "gpt", "value": "That."}]
    columns = {
        "images": [
            [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": image_bytes(50, 20, "PNG"), "path": "b.png"}]
        ],
        "audio": [{"bytes": WAV, "path": "a.wav"}],
        "conversations": [talk],
    }
    source = parquet(tmp_path / "in", features, columns, split="test")
    assert prepared(source, tmp_path / "no", "--format", "llava") == 1
    assert prepared(source, tmp_path / "out", "--format", "llava", "--split", "test") == 0
    (sample,), causes = read_all(tmp_path / "out")
    assert turns(sample)[0] == ("user", [JPEG, image_bytes(50, 20, "PNG"), WAV, "What?"]) and not causes
    assert sorted(sample.media) == ["0.jpg", "1.png", "2.wav"]


def test_a_folder_of_pictures_with_metadata(tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.jpg", "text": "one"})
    )
    assert prepared(f"hf:{tmp_path / 'in'}", tmp_path / "out", "--format", "caption") == 0
    (sample,), _ = read_all(tmp_path / "out")
    assert turns(sample) == [("user", [JPEG]), ("assistant", ["one"])]


def test_a_folder_of_recordings_with_metadata(tmp_path):
    (tmp_path / "in").mkdir(parents=True)
    (tmp_path / "in" / "a.wav").write_bytes(WAV)
    (tmp_path / "in" / "metadata.csv").write_text("file_name,sentence\na.wav,good morning\n")
    words = ("--format", "asr", "--map", "text=sentence")
    assert prepared(f"hf:{tmp_path / 'in'}", tmp_path / "out", *words) == 0
    (sample,), _ = read_all(tmp_path / "out")
    assert turns(sample) == [("user", [WAV, "Transcribe this clip."]), ("assistant", ["good morning"])]


def test_jsonl_names_files_of_its_folder_and_none_outside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    lines = [{"image": path, "caption": "one"} for path in ("a.jpg", "../b.jpg", str(tmp_path / "b.jpg"))]
    (tmp_path / "in" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert prepared(f"hf:{tmp_path / 'in'}", tmp_path / "out", "--format", "caption") == 0
    good, causes = read_all(tmp_path / "out")
    assert len(good) == 1 and causes == {"path_outside"}


def test_a_picture_of_a_row_cannot_name_a_file_outside_either(tmp_path):
    (tmp_path / "b.jpg").write_bytes(JPEG)
    media = [{"bytes": None, "path": str(tmp_path / "b.jpg")}, {"bytes": JPEG, "path": "../c.jpg"}]
    features = Features({"image": Image(), "caption": ClassLabel(names=["cat", "dog"])})
    source = parquet(tmp_path / "in", features, {"image": media, "caption": [0, 1]})
    assert prepared(source, tmp_path / "out", "--format", "caption") == 0
    (sample,), causes = read_all(tmp_path / "out")
    assert turns(sample)[1] == ("assistant", ["dog"]) and causes == {"path_outside"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--map", "text=none"), "--map none: is no column of hf:"),
        (("--map", "text"), "--map text: is not FIELD=COLUMN"),
        (("--split", "nowhere"), "--split nowhere: cannot be opened"),
        (("--config", "other"), "--config other, --split train: cannot be opened"),
    ],
)
def test_what_is_not_there_is_an_error(tmp_path, capsys, words, message):
    source = parquet(tmp_path / "in", Features({"text": Value("string")}), {"text": ["a"]})
    assert prepared(source, tmp_path / "out", "--format", "text", *words) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_options_of_data_sets_are_refused_for_files(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert prepared(str(tmp_path / "a.jsonl"), tmp_path / "out", "--format", "text", "--split", "x") == 1
    assert "are for data sets" in io.StringIO(capsys.readouterr().err).read()


def test_a_name_that_the_hub_does_not_answer_for_is_an_error(tmp_path, capsys):
    assert prepared("hf:nobody/nothing", tmp_path / "out", "--format", "text") == 1
    assert "error: hf:nobody/nothing, --split train: cannot be opened" in capsys.readouterr().err
