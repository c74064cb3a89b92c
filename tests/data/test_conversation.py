"""A conversation: what stands before a question, and files that cannot be part of it."""

import io
import os
import wave

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig, LimitsConfig, PackConfig
from data.conversation import Conversation, describe
from data.encode import Encoder
from data.prompt import prompt_text
from data.sample import MediaSize, Message, Part, Sample
from data.tokenizer import load_tokenizer
from tests.records import jpeg, wav
from tests.train.tiny_model import MEDIA

ENCODER = Encoder(DataConfig(pack=PackConfig(length=2**31)), MEDIA, load_tokenizer(None))


def fresh(most_tokens=4096, **limits):
    return Conversation(MEDIA, LimitsConfig(**limits), most_tokens)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a cat.jpg").write_bytes(jpeg(rng, 60, 40))
    (tmp_path / "word.wav").write_bytes(wav(rng, 0.5))
    return tmp_path


def test_a_question_is_the_prompt_of_the_same_sample(files):
    conversation = fresh()
    assert describe(conversation.attach("image", files / "a cat.jpg")) == "picture of 60x40 pixels"
    first = conversation.ask("What is it?", ENCODER)
    conversation.answered("A cat.")
    assert describe(conversation.attach("audio", files / "word.wav")) == "recording of 0.5 s"
    second = conversation.ask("", ENCODER)
    image, audio = (files / "a cat.jpg").read_bytes(), (files / "word.wav").read_bytes()
    messages = [
        Message("user", [Part("image", media="i"), Part("text", "What is it?")]),
        Message("assistant", [Part("text", "A cat.")]),
        Message("user", [Part("audio", media="a")]),
        Message("assistant", [Part("text", "anything")]),
    ]
    sizes = {"i": MediaSize("image", 60, 40), "a": MediaSize("audio", num_samples=8000)}
    for length, question in ((2, first), (4, second)):
        sample = Sample("x", messages[:length], {"i": image, "a": audio})
        layout = ENCODER.lay_out_prompt(sample, sizes)
        wanted = ENCODER.fill(layout, sample, "x", sizes)
        assert question.input_ids.tolist() == wanted.input_ids.tolist()
        assert all((one == other).all() for one, other in zip(question.slices, wanted.slices, strict=True))
        assert all((one == other).all() for one, other in zip(question.clips, wanted.clips, strict=True))
    assert len(second.slices) == len(first.slices) > 0 and second.clips
    assert prompt_text(layout.rendered, ENCODER.tokenizer).count("<image>") == 1
    conversation.clear()
    assert not conversation.ask("What is it?", ENCODER).slices


def test_what_was_asked_without_an_answer_is_not_part_of_the_conversation(files):
    conversation = fresh()
    conversation.attach("image", files / "a cat.jpg")
    conversation.ask("What is it?", ENCODER)
    alone = conversation.ask("And now?", ENCODER)
    assert (
        not alone.slices and alone.input_ids.tolist() == fresh().ask("And now?", ENCODER).input_ids.tolist()
    )


def test_a_conversation_that_is_too_long_is_refused_and_can_go_on():
    conversation = fresh(most_tokens=200)
    with pytest.raises(ValueError) as error:
        conversation.ask("word " * 300, ENCODER)
    count = len(fresh().ask("word " * 300, ENCODER).input_ids)
    assert str(error.value) == (
        f"conversation={count} tokens: longer than the 200 that the model has positions for. "
        "Ask for less at once, or begin a new one with /clear."
    )
    assert len(conversation.ask("word", ENCODER).input_ids) < 200


def empty_wav():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
    return buffer.getvalue()


def bomb():
    """A small PNG of 400 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "image": {
        "text.jpg": (b"no picture", "the picture is none of JPEG, PNG, WEBP, GIF, BMP. Use another one."),
        "empty.jpg": (b"", "the picture is empty (0 bytes). Use another one."),
        "cut.jpg": (jpeg(np.random.default_rng(0), 60, 40)[:-300], "the picture is cut off after"),
        "bomb.png": (bomb(), "the picture has 20000x20000 pixels, more than data.limits.image_pixels"),
        "thin.png": (None, "picture of 10000x1 pixels gives a slice of"),
        "large.jpg": (b"x" * 3_000_001, "has 3000001 bytes, more than data.limits.image_bytes=3000000. Make"),
    },
    "audio": {
        "text.wav": (b"no sound at all, really none", "the recording is damaged"),
        "empty.wav": (empty_wav(), "the recording is empty (no samples). Use another one."),
        "nothing.wav": (b"", "the recording is empty (0 bytes). Use another one."),
        "short.wav": (wav(np.random.default_rng(0), 0.01), "clip of 160 samples is too short for one token."),
        "long.wav": (wav(np.random.default_rng(0), 6), "the recording is longer than"),
        "cut.wav": (wav(np.random.default_rng(0), 1)[:-1000], "the recording is cut off: 1000 bytes"),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BAD for name in BAD[kind]])
def test_a_file_that_cannot_be_used_is_refused_and_leaves_nothing_behind(tmp_path, kind, name):
    content, problem = BAD[kind][name]
    path = tmp_path / name
    if content is None:
        Image.new("RGB", (10000, 1)).save(path)
    else:
        path.write_bytes(content)
    conversation = fresh(image_bytes=3_000_000, audio_seconds=5.0)
    with pytest.raises(ValueError) as error:
        conversation.attach(kind, path)
    assert str(error.value).startswith(f"{kind}={path}: {problem}") and str(error.value).endswith(".")
    assert not conversation.attached


def test_a_path_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused = {
        tmp_path / "none.jpg": "there is no such file. Check the path.",
        tmp_path: "is a folder. Name a file.",
        tmp_path / "pipe": "is not a plain file. Name one.",
        tmp_path / ("x" * 300): "cannot be read (File name too long). Check the path.",
        tmp_path / "none" / "a.jpg": "there is no such file. Check the path.",
    }
    for path, problem in refused.items():
        with pytest.raises(ValueError) as error:
            fresh().attach("image", path)
        assert str(error.value) == f"image={path}: {problem}"


def test_more_parts_than_a_sample_may_have_are_refused(files):
    encoder = Encoder(DataConfig(limits=LimitsConfig(parts=3)), MEDIA, load_tokenizer(None))
    conversation = fresh()
    for _ in range(4):
        conversation.attach("image", files / "a cat.jpg")
    with pytest.raises(ValueError, match=r"^conversation: 5 parts, more than data.limits.parts=3. Split it"):
        conversation.ask("What?", encoder)
