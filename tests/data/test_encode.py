import dataclasses
import io
import pickle
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import WhisperFeatureExtractor

from data.config import AudioText, DataConfig, LimitsConfig, Oversize, PackConfig, TemplateConfig
from data.encode import Encoder, cut_image, patchify
from data.geometry import AudioGeometry, ImageGeometry, LongAudio, MediaConfig, slice_image
from data.sample import IGNORE, MediaSize, Message, Part, Sample, SampleError
from data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(None)
MEDIA = MediaConfig(
    image=ImageGeometry(slice_pixels=56, max_slices=4, queries=4, table_side=16),
    audio=AudioGeometry(mel_bins=80, window_seconds=1),
)
UNK = TOKENIZER.special("<|unk|>")


def jpeg(width, height):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def wav(num_samples):
    samples = np.random.default_rng(num_samples).integers(-9000, 9000, num_samples, dtype=np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16000, num_samples, "NONE", ""))
        writer.writeframes(samples.tobytes())
    return file.getvalue(), samples.astype(np.float32) / 32768


def encoder(length=4096, oversize=Oversize.error, template=None, media=MEDIA):
    config = DataConfig(
        pack=PackConfig(length=length, oversize=oversize), template=template or TemplateConfig()
    )
    return Encoder(config, media, TOKENIZER)


def question(*media, text="What?", answer="This."):
    parts = [Part("image" if name.endswith("jpg") else "audio", media=name) for name in media]
    return [
        Message("user", [*parts, Part("text", text=text)]),
        Message("assistant", [Part("text", text=answer)]),
    ]


@st.composite
def samples(draw):
    """A conversation with real media and the sizes an index would hold of them."""
    media, sizes, messages = {}, {}, []
    for turn in range(draw(st.integers(1, 3))):
        names = []
        for number in range(draw(st.integers(0, 2))):
            if draw(st.booleans()):
                name, size = f"{turn}{number}.jpg", draw(st.tuples(st.integers(8, 150), st.integers(8, 150)))
                media[name], sizes[name] = jpeg(*size), MediaSize("image", *size)
            else:
                name, length = f"{turn}{number}.wav", draw(st.integers(700, 40000))
                media[name], sizes[name] = wav(length)[0], MediaSize("audio", num_samples=length)
            names.append(name)
        messages += question(*names, text=draw(st.text(max_size=40)), answer=draw(st.text(max_size=40)))
    return Sample("key", messages, media), sizes


@settings(max_examples=60, deadline=None)
@given(samples(), st.sampled_from([128, 256, 4096]))
def test_counts_from_sizes_are_those_of_the_encoded_sample(sample_and_sizes, length):
    sample, sizes = sample_and_sizes
    coder = encoder(length, Oversize.truncate)
    try:
        counts = coder.lay_out(sample, sizes).counts
    except SampleError as error:
        with pytest.raises(SampleError) as caught:
            coder.encode(sample, "source", sizes)
        assert caught.value.cause == error.cause == "oversize"
        return
    encoded = coder.encode(sample, "source", sizes)
    assert counts.length == len(encoded.input_ids) == len(encoded.labels) <= length
    assert counts.supervised == (encoded.labels[1:] != IGNORE).sum() > 0
    assert counts.slices == len(encoded.slices) == len(encoded.grids) == len(encoded.slice_starts)
    assert counts.patches == sum(len(pixels) for pixels in encoded.slices)
    assert counts.frames == sum(mel.shape[1] // 2 for mel in encoded.clips)
    assert len(encoded.clips) == len(encoded.clip_tokens) == len(encoded.clip_starts)
    assert counts.modality == encoded.modality
    for pixels, (rows, columns) in zip(encoded.slices, encoded.grids):
        assert pixels.shape == (rows * columns, 3 * 14 * 14) and pixels.dtype == np.uint8
    filled = [start + i for start in encoded.slice_starts for i in range(4)]
    for start, tokens in zip(encoded.clip_starts, encoded.clip_tokens):
        filled += [start + i for i in range(tokens + 2)]
    assert sorted(filled) == np.flatnonzero(encoded.input_ids == UNK).tolist()


def test_a_tile_holds_the_pixels_of_its_place_in_the_resized_picture():
    image = Image.open(io.BytesIO(jpeg(640, 480))).convert("RGB")
    slicing = slice_image(640, 480, ImageGeometry())
    slices = cut_image(image, slicing)
    width, height = slicing.tile
    resized = image.resize((2 * width, height), Image.Resampling.BICUBIC)
    right = np.asarray(resized.crop((width, 0, 2 * width, height)))
    assert len(slices) == 3
    assert np.array_equal(slices[2], patchify(right, 14))
    overview = np.asarray(image.resize(slicing.overview, Image.Resampling.BICUBIC))
    assert np.array_equal(slices[0], patchify(overview, 14))


def test_patches_are_row_major_and_channel_major_inside():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        block = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert patches[number].tolist() == [*block[..., 0].flat, *block[..., 1].flat, *block[..., 2].flat]


def test_a_long_recording_becomes_clips_in_one_span_each_with_its_own_mel():
    data, waveform = wav(40_000)
    encoded = encoder().encode(
        Sample("k", question("a.wav"), {"a.wav": data}),
        "s",
        {"a.wav": MediaSize("audio", num_samples=40_000)},
    )
    assert encoded.clip_tokens == [25, 25, 12]
    assert np.diff(encoded.clip_starts).tolist() == [27, 27]
    extractor = WhisperFeatureExtractor(feature_size=80)
    for number, mel in enumerate(encoded.clips):
        part = waveform[number * 16000 : (number + 1) * 16000]
        expected = extractor(part, sampling_rate=16000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(mel, expected[:, : mel.shape[1]], atol=1e-5, rtol=0)


def test_a_picture_used_twice_is_encoded_in_both_places():
    encoded = encoder().encode(
        Sample("k", question("a.jpg", "a.jpg"), {"a.jpg": jpeg(40, 40)}),
        "s",
        {"a.jpg": MediaSize("image", 40, 40)},
    )
    assert len(encoded.slices) == 2
    assert np.array_equal(encoded.slices[0], encoded.slices[1])


LONG = Sample("number-7", question(text="a", answer="1234567890" * 20))


def test_oversize_drop_is_a_fault_of_the_sample():
    with pytest.raises(SampleError) as caught:
        encoder(128, Oversize.drop).lay_out(LONG, {})
    assert caught.value.cause == "oversize"


def test_oversize_truncate_fills_the_row_with_what_is_supervised():
    assert encoder(128, Oversize.truncate).lay_out(LONG, {}).counts.length == 128


def test_media_behind_the_cut_are_dropped_with_their_features():
    messages = question("a.jpg", answer="1" * 70) + question("b.jpg", text="x" * 70)
    sample = Sample("k", messages, {"a.jpg": jpeg(40, 40), "b.jpg": jpeg(50, 50)})
    sizes = {"a.jpg": MediaSize("image", 40, 40), "b.jpg": MediaSize("image", 50, 50)}
    encoded = encoder(128, Oversize.truncate).encode(sample, "s", sizes)
    assert len(encoded.slices) == len(encoded.slice_starts) == 1


def test_media_behind_the_cut_are_not_decoded():
    messages = question("a.jpg", answer="1" * 70) + question("b.jpg", "c.wav", text="x" * 70)
    sample = Sample("k", messages, {"a.jpg": jpeg(40, 40), "b.jpg": b"damaged", "c.wav": b"damaged"})
    sizes = {"a.jpg": MediaSize("image", 40, 40), "b.jpg": MediaSize("image", 50, 50)}
    sizes["c.wav"] = MediaSize("audio", num_samples=9000)
    assert len(encoder(128, Oversize.truncate).encode(sample, "s", sizes).slices) == 1
    with pytest.raises(SampleError) as caught:
        encoder(4096).encode(sample, "s", sizes)
    assert caught.value.cause == "image_corrupt"


@pytest.mark.parametrize(
    ("name", "data", "promised"),
    [
        ("a.jpg", jpeg(40, 40), MediaSize("image", 40, 41)),
        ("a.wav", wav(9000)[0], MediaSize("audio", num_samples=9001)),
    ],
)
def test_media_of_another_size_than_indexed_are_a_fault_even_where_the_tokens_are_as_many(
    name, data, promised
):
    with pytest.raises(SampleError) as caught:
        encoder().encode(Sample("k", question(name), {name: data}), "s", {name: promised})
    assert caught.value.cause == "length_changed"


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([Message("user", [Part("text", text="Hi")])], "no_supervised"),
        ([Message("document", [])], "no_supervised"),
        ([], "no_supervised"),
        (question("gone.jpg"), "media_missing"),
        (question("gone.wav"), "media_missing"),
        ([Message("assistant", [Part("text", text="a")] * 300)], "parts"),
        (question(answer="\u4f60" * 700_000), "text_too_large"),
    ],
)
def test_a_sample_that_cannot_be_used_says_why(messages, cause):
    for use in (lambda s: encoder().lay_out(s, {}), lambda s: encoder().encode(s, "s", {})):
        with pytest.raises(SampleError) as caught:
            use(Sample("k", messages))
        assert caught.value.cause == cause


def test_fingerprint_changes_with_all_that_decides_tokens_and_with_nothing_else():
    audio = dataclasses.replace(MEDIA.audio, long_audio=LongAudio.truncate)
    image = dataclasses.replace(MEDIA.image, queries=5)
    variants = [
        encoder(),
        encoder(length=128),
        encoder(oversize=Oversize.drop),
        encoder(template=TemplateConfig(audio_text=AudioText.drop)),
        encoder(template=TemplateConfig(system="other")),
        encoder(media=MediaConfig(image=image, audio=MEDIA.audio)),
        encoder(media=MediaConfig(image=MEDIA.image, audio=audio)),
        Encoder(DataConfig(limits=LimitsConfig(parts=9)), MEDIA, TOKENIZER),
        Encoder(DataConfig(limits=LimitsConfig(text_bytes=9)), MEDIA, TOKENIZER),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    same = Encoder(DataConfig(workers=7, path="elsewhere"), MEDIA, TOKENIZER)
    assert same.fingerprint == variants[0].fingerprint


def test_a_pickled_encoder_encodes_alike():
    sample = Sample("k", question("a.jpg"), {"a.jpg": jpeg(30, 60)})
    copy = pickle.loads(pickle.dumps(encoder()))
    assert copy.fingerprint == encoder().fingerprint
    sizes = {"a.jpg": MediaSize("image", 30, 60)}
    ours, theirs = encoder().encode(sample, "s", sizes), copy.encode(sample, "s", sizes)
    assert np.array_equal(ours.input_ids, theirs.input_ids)
    assert np.array_equal(ours.slices[0], theirs.slices[0])
