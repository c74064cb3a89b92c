"""Data sets in the hub's layouts, made by `datasets` and pyarrow, become the shards that files would."""

import contextlib
import datetime
import http.server
import io
import json
import socket
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Features, Image, List, Value
from huggingface_hub import HfFileSystem

from data.download import Patience
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


class Hub(http.server.ThreadingHTTPServer):
    """Answers for the data set `a/b` of one picture, x.jpg; what else is asked for is not there.

    `fault` is what becomes of a request for a file: a status, or `cut` in the middle; `faults` of them.
    """

    daemon_threads = True

    def __init__(self, fault, faults):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.fault, self.faults, self.asked = fault, faults, 0

    def handle_error(self, request, client_address):
        pass


class _HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        entry = {"type": "file", "path": "x.jpg", "size": len(JPEG), "oid": "0" * 40}
        if self.path.startswith("/api/datasets/a/b/tree"):
            self.answer(200, json.dumps([entry, entry | {"path": "gone.jpg"}]).encode())
        elif self.path.startswith("/api/datasets/a/b/revision"):
            self.answer(200, json.dumps({"id": "a/b", "sha": "0" * 40, "tags": []}).encode())
        elif not self.path.endswith("/resolve/main/x.jpg"):
            self.answer(404, b"")
        else:
            self.server.asked += 1
            fault = self.server.fault if self.server.asked <= self.server.faults else 200
            content = b"" if fault in (403, 429) else JPEG  # 503 says something that is no text
            self.answer(200 if fault == "cut" else fault, content, cut=fault == "cut")

    def answer(self, status, content, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def hub_at(monkeypatch, url):
    """Makes `hf://` speak to a server at `url`, without any pause."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("data.hub.PATIENCE", Patience(attempts=3))
    HfFileSystem.clear_instance_cache()
    yield
    HfFileSystem.clear_instance_cache()


def prepared_from(hub_path, tmp_path):
    """Prepares a picture of its own and one that is a file of the hub."""
    features = Features({"image": Image(), "caption": Value("string")})
    media = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": hub_path}]
    source = parquet(tmp_path / "in", features, {"image": media, "caption": ["one", "two"]})
    return prepared(source, tmp_path / "out", "--format", "caption")


@contextlib.contextmanager
def serving(fault, faults):
    hub = Hub(fault, faults)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@pytest.mark.parametrize(("fault", "faults"), [(503, 4), (429, 8), ("cut", 3)])
def test_a_hub_that_fails_for_a_while_costs_no_sample(tmp_path, monkeypatch, fault, faults):
    with serving(fault, faults) as hub, hub_at(monkeypatch, f"http://127.0.0.1:{hub.server_port}"):
        assert prepared_from("hf://datasets/a/b@main/x.jpg", tmp_path) == 0
    good, causes = read_all(tmp_path / "out")
    assert [turns(sample)[1] for sample in good] == [("assistant", ["one"]), ("assistant", ["two"])]
    assert not causes and hub.asked > faults


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_a_hub_that_goes_on_failing_ends_the_command_and_makes_no_bad_row(
    tmp_path, monkeypatch, capsys, fault
):
    with serving(fault, 10_000) as hub, hub_at(monkeypatch, f"http://127.0.0.1:{hub.server_port}"):
        assert prepared_from("hf://datasets/a/b@main/x.jpg", tmp_path) == 1
    told = capsys.readouterr().err
    assert "error: in/train[1]: hf://datasets/a/b@main/x.jpg: cannot be fetched (" in told
    assert "3 attempts in a row). Look at the store and the network" in told
    assert not (tmp_path / "out").exists()


def test_a_hub_that_nobody_answers_for_ends_the_command(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with hub_at(monkeypatch, f"http://127.0.0.1:{port}"):
        assert prepared_from("hf://datasets/a/b@main/x.jpg", tmp_path) == 1
    assert "x.jpg: cannot be fetched (ConnectError: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.jpg", "gone.jpg"])
def test_what_the_hub_does_not_have_is_a_bad_row(tmp_path, monkeypatch, name):
    with serving(200, 0) as hub, hub_at(monkeypatch, f"http://127.0.0.1:{hub.server_port}"):
        assert prepared_from(f"hf://datasets/a/b@main/{name}", tmp_path) == 0
    good, causes = read_all(tmp_path / "out")
    assert len(good) == 1 and causes == {"media_missing"}


def test_a_hub_that_refuses_is_not_asked_again_and_ends_the_command(tmp_path, monkeypatch, capsys):
    with serving(403, 10_000) as hub, hub_at(monkeypatch, f"http://127.0.0.1:{hub.server_port}"):
        assert prepared_from("hf://datasets/a/b@main/x.jpg", tmp_path) == 1
    assert "the hub refuses it (HfHubHTTPError: 403 Forbidden" in capsys.readouterr().err
    assert hub.asked == 1


def test_a_connection_that_breaks_between_rows_is_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    from huggingface_hub.errors import HTTPError  # what the errors of its web client derive from

    def cast(self, features):
        raise HTTPError("the server hung up")

    monkeypatch.setattr("datasets.IterableDataset.cast", cast)
    source = parquet(tmp_path / "in", Features({"text": Value("string")}), {"text": ["a"]})
    assert prepared(source, tmp_path / "out", "--format", "text") == 1
    told = capsys.readouterr().err
    assert "cannot be read after row 0 (HTTPError: the server hung up). Look at the data set" in told
