import io
import json
import wave

import pytest
from PIL import Image

from data.index import main as index
from data.sample import Message, Part, Sample
from data.show import main
from tests.records import write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    picture, clip = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (640, 480)).save(picture, "JPEG")
    with wave.open(clip, "wb") as writer:
        writer.setparams((1, 2, 16000, 40000, "NONE", ""))
        writer.writeframes(bytes(80000))
    question = [Part("image", media="0.jpg"), Part("audio", media="1.wav"), Part("text", text="What?")]
    turns = [Message("user", question), Message("assistant", [Part("text", text="It is 黑.")])]
    media = {"0.jpg": picture.getvalue(), "1.wav": clip.getvalue()}
    samples = [Sample("a", turns, media), Sample("b", turns[1:])]
    out = str(tmp_path_factory.mktemp("show") / "shards")
    write_shards(samples, out)
    index([out, "--format", "native"])
    return ["recipe=omni_sft", "model=tiny", f"data.path={out}"]


def shown(capsys, *words):
    capsys.readouterr()
    main(list(words))
    return capsys.readouterr().out


def test_the_answer_and_its_end_stand_in_brackets_and_media_are_one_line_each(folder, capsys):
    out = shown(capsys, *folder, "key=a")
    assert "[[It is 黑.<|turn_end|>]]" in out and out.count("[[") == 1
    assert "<|role_start|>user<|role_end|><image 640x480: " in out
    assert "Audio 1: <audio 2.50 s: 1 clip, 64 tokens>\nWhat?<|turn_end|>" in out


def test_json_holds_the_whole_text_and_counts(folder, capsys):
    found = json.loads(shown(capsys, *folder, "key=folder/shard-000000.tar/a", "--json"))
    supervised = [piece["text"] for piece in found["pieces"] if piece["supervised"]]
    assert supervised == ["It is 黑.<|turn_end|>"]
    assert [span["media"] for span in found["spans"]] == ["0.jpg", "1.wav"]
    assert found["counts"]["slices"] == found["spans"][0]["items"]
    assert found["counts"]["frames"] == 125


def test_without_a_key_the_first_keys_of_every_source_are_listed(folder, capsys):
    assert json.loads(shown(capsys, *folder, "--json")) == {"folder": ["a", "b"]}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["key=c"], 2, "key=c: no source has it"),
        (["data.pakc.length=3"], 2, "data.pakc"),
        (["key=a", "data.pack.length=64"], 1, "oversize"),
    ],
)
def test_what_cannot_be_shown_is_explained(folder, capsys, words, status, message):
    with pytest.raises(SystemExit) as caught:
        main([*folder, *words])
    assert caught.value.code == status
    assert message in capsys.readouterr().err
