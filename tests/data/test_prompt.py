"""Prompts: all that stands before the last answer, encoded as for training, and blanked twins."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.blank import blank
from data.collate import collate
from data.encode import Encoder
from data.index import load_folder
from data.mel import log_mel
from data.prompt import PromptReader, prompt_text
from data.sample import IGNORE, MediaSize, Message, Part, Sample, SampleError, SampleRef
from data.template import answer_text
from tests.data.corpus import (
    MEDIA,
    TOKENIZER,
    data_config,
    image_bytes,
    mixed_records,
    overwrite_silently,
    prepare_folder,
    wav_bytes,
    write_media,
)

SIZES = {
    "a.jpg": MediaSize("image", width=120, height=50),
    "b.wav": MediaSize("audio", num_samples=20000),
}
MEDIA_BYTES = {"a.jpg": image_bytes(120, 50), "b.wav": wav_bytes(20000)}


def encoder_of(length=512):
    return Encoder(data_config(length=length), MEDIA, TOKENIZER)


def turn(role, text, *media):
    parts = [Part("image" if name.endswith("jpg") else "audio", media=name) for name in media]
    return Message(role, [*parts, Part("text", text=text)])


def sample_of(*messages):
    return Sample("k", list(messages), dict(MEDIA_BYTES))


def llava(question, image):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "A test."}]
    return {"conversations": turns, "image": image}


def noise_bytes(seed, width, height):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


TALK = sample_of(
    turn("user", "What is this?", "a.jpg"),
    turn("assistant", "A lake."),
    turn("user", "And what is said?", "b.wav"),
    turn("assistant", "Boats drift past."),
)


def test_prompt_and_reference_together_are_the_training_sample():
    encoder = encoder_of()
    whole = encoder.encode(TALK, "source", SIZES)
    prompt = encoder.fill(encoder.lay_out_prompt(TALK, SIZES), TALK, "source", SIZES)
    assert answer_text(TALK.messages) == "Boats drift past."
    answer = [*TOKENIZER.encode(answer_text(TALK.messages)), TOKENIZER.special("<|turn_end|>")]
    assert [*prompt.input_ids.tolist(), *answer] == whole.input_ids.tolist()
    assert (prompt.labels == IGNORE).all()
    for name in ("slices", "clips"):
        assert all(np.array_equal(*pair) for pair in zip(getattr(prompt, name), getattr(whole, name)))
    for name in ("grids", "slice_starts", "clip_starts", "clip_tokens"):
        assert getattr(prompt, name) == getattr(whole, name)


def test_what_follows_the_last_answer_is_no_part_of_its_prompt():
    encoder = encoder_of()
    longer = sample_of(*TALK.messages, turn("user", "Thanks!", "a.jpg"))
    assert np.array_equal(
        encoder.lay_out_prompt(longer, SIZES).rendered.input_ids,
        encoder.lay_out_prompt(TALK, SIZES).rendered.input_ids,
    )


def test_empty_answer_has_a_prompt_too():
    asked = sample_of(turn("user", "Say nothing."), turn("assistant", ""))
    layout = encoder_of().lay_out_prompt(asked, {})
    assert TOKENIZER.decode(layout.rendered.input_ids.tolist()).endswith(
        "<|role_start|>assistant<|role_end|>"
    )
    assert answer_text(asked.messages) == ""


def test_prompt_shows_its_media_as_marks():
    layout = encoder_of().lay_out_prompt(TALK, SIZES)
    text = prompt_text(layout.rendered, TOKENIZER)
    assert text.endswith(
        "<|role_start|>user<|role_end|><image>\nWhat is this?<|turn_end|>"
        "<|role_start|>assistant<|role_end|>A lake.<|turn_end|>"
        "<|role_start|>user<|role_end|>Audio 1: <audio>\nAnd what is said?<|turn_end|>"
        "<|role_start|>assistant<|role_end|>"
    )


@pytest.mark.parametrize(
    ("sample", "length", "cause"),
    [
        (Sample("k", [Message("document", [Part("text", text="Once.")])]), 512, "no_supervised"),
        (sample_of(turn("user", "Hello?")), 512, "no_supervised"),
        (TALK, 64, "oversize"),
    ],
)
def test_sample_without_an_answerable_question_is_refused_by_cause(sample, length, cause):
    with pytest.raises(SampleError) as error:
        encoder_of(length).lay_out_prompt(sample, SIZES)
    assert error.value.cause == cause


def test_reader_gives_prompts_in_order_and_names_those_it_cannot_use(tmp_path):
    path = prepare_folder(tmp_path, mixed_records(tmp_path, 8), tmp_path / "shards")
    folder = load_folder(path)
    index = folder.shards[0]
    row = next(row for row in range(8) if any(size.kind == "image" for size in index.sizes(row).values()))
    place, size = next(
        member for name, member in index.members(row).items() if name.endswith((".jpeg", ".png", ".jpg"))
    )
    overwrite_silently(index.path, place, b"\0" * size)
    reader = PromptReader({"mixed": folder}, encoder_of())
    work = reader.read([SampleRef("mixed", 0, row, 0) for row in range(8)])
    assert [(item.key, item.source) for item in work.batch.dropped] == [(index.keys[row], "mixed")]
    assert [prompt.ref.row for prompt in work.prompts] == [n for n in range(8) if n != row]
    assert [info.key for info in work.batch.samples] == [prompt.key for prompt in work.prompts]
    assert sum(info.tokens for info in work.batch.samples) == work.batch.input_ids.numel()
    nothing = reader.read([SampleRef("mixed", 0, row, 0)])
    assert nothing.prompts == [] and nothing.batch.input_ids.tolist() == [[TOKENIZER.special("<|pad|>")]]


def test_shard_that_is_gone_is_no_fault_of_a_sample(tmp_path):
    path = prepare_folder(tmp_path, mixed_records(tmp_path, 4), tmp_path / "shards")
    folder = load_folder(path)
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(RuntimeError, match="the file is gone"):
        PromptReader({"mixed": folder}, encoder_of()).read([SampleRef("mixed", 0, 0, 0)])


def test_blanked_batch_is_what_grey_pictures_and_silent_clips_of_the_same_shapes_give():
    encoder = encoder_of()
    encoded = encoder.encode(TALK, "source", SIZES)
    quiet = dataclasses.replace(
        encoded,
        slices=[np.full_like(patches, 128) for patches in encoded.slices],
        clips=[
            log_mel(np.zeros(clip.shape[1] * 160, dtype=np.float32), MEDIA.audio, clip.shape[1])
            for clip in encoded.clips
        ],
    )
    assert len(encoded.slices) > 1 and len(encoded.clips) > 1
    seen, wanted = (collate([[item]], 512, MEDIA, 0, "token") for item in (encoded, quiet))
    found = blank(seen)
    for part in ("vision", "audio"):
        for entry in dataclasses.fields(getattr(found, part)):
            ours, theirs = (getattr(getattr(batch, part), entry.name) for batch in (found, wanted))
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, entry.name
    assert not torch.equal(found.vision.pixels, seen.vision.pixels)
    assert not torch.equal(found.audio.mel, seen.audio.mel)
    assert found.input_ids is seen.input_ids and found.targets is seen.targets


def test_prompts_that_differ_in_nothing_when_blank_are_there_once(tmp_path):
    images = [write_media(tmp_path, f"{n}.png", noise_bytes(n, 90, 41)) for n in range(3)]
    wide = write_media(tmp_path, "wide.png", noise_bytes(3, 160, 41))
    records = [llava("What is this?", name) for name in [*images, wide]] + [llava("How many?", images[0])]
    folder = load_folder(prepare_folder(tmp_path, records, tmp_path / "shards"))
    reader = PromptReader({"mixed": folder}, encoder_of())
    refs = [SampleRef("mixed", 0, row, 0) for row in range(5)]
    assert reader.read(refs).blank is None
    work = reader.read(refs, blanked=True)
    assert work.blank is not None and work.blank_rows == [0, 0, 0, 1, 2]
    for ref, row in zip(refs, work.blank_rows):
        alone = reader.read([ref], blanked=True)
        assert alone.blank is not None
        assert work.blank.samples[row].tokens == alone.batch.input_ids.numel()
        assert torch.equal(blank(alone.batch).vision.pixels, alone.blank.vision.pixels)
        assert torch.equal(alone.batch.input_ids, alone.blank.input_ids)
