import io
import struct
import wave
import zlib

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import LimitsConfig
from data.media import UPRIGHT, audio_num_samples, decode_audio, decode_image, image_size
from data.sample import SampleError

LIMITS = LimitsConfig()
NOISE = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE).resize((96, 64))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tone(rate: int, seconds: float) -> np.ndarray:
    return (np.sin(np.arange(int(rate * seconds)) * 2 * np.pi * 440 / rate) * 8000).astype("<i2")


def wav(rate: int = 16000, channels: int = 1, seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setparams((channels, 2, rate, 0, "NONE", ""))
        writer.writeframes(np.repeat(tone(rate, seconds), channels).tobytes())
    return buffer.getvalue()


def compressed(container: str, codec: str, rate: int, seconds: float = 0.6) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="stereo")
        samples = np.repeat(tone(rate, seconds), 2).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = rate
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "stereo", rate, context.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(piece))
    return buffer.getvalue()


PICTURES = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "progressive JPEG": encoded(PICTURE, "JPEG", progressive=True),
    "PNG": encoded(PICTURE, "PNG"),
    "WebP": encoded(PICTURE, "WEBP"),
    "GIF": encoded(PICTURE, "GIF"),
}
RECORDINGS = {
    "wav": wav(44100, 2, 0.6),
    "mp3": compressed("mp3", "libmp3lame", 44100),
    "flac": compressed("flac", "flac", 48000),
    "opus": compressed("ogg", "libopus", 48000),
    "m4a": compressed("ipod", "aac", 44100),
}


def cause_of(function, data: bytes, limits: LimitsConfig = LIMITS) -> str:
    with pytest.raises(SampleError) as caught:
        function(data, limits)
    return caught.value.cause


def outcome(function, data: bytes):
    try:
        return function(data, LIMITS)
    except SampleError as error:
        return error.cause


@pytest.mark.parametrize("name", PICTURES)
def test_every_format_decodes_to_rgb_near_the_original(name):
    image = decode_image(PICTURES[name], LIMITS)
    assert image.mode == "RGB" and image.size == (96, 64) == image_size(PICTURES[name], LIMITS)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(PICTURE).astype(int))
    assert difference.mean() < 20


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA"])
def test_every_pixel_mode_keeps_its_colour(mode):
    grey = Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode)
    data = encoded(grey, "JPEG" if mode == "CMYK" else "PNG")
    assert np.asarray(decode_image(data, LIMITS)).min() >= 250


def test_transparent_pixels_become_white_and_half_transparent_ones_pale():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = np.asarray(decode_image(encoded(image, "PNG"), LIMITS))
    assert pixels[0, 0].tolist() == [255, 255, 255] and 125 <= pixels[0, 1, 0] <= 129


def test_palette_transparency_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(decode_image(encoded(image, "GIF", transparency=1), LIMITS)).min() == 255


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128 * 256, 65535]], np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG"), LIMITS))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_in_picture_and_size(orientation):
    upright = Image.new("RGB", (48, 32))
    upright.paste((255, 255, 255), (0, 0, 16, 16))
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(UPRIGHT[inverse]) if inverse > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    shown = np.asarray(decode_image(data, LIMITS))
    assert shown.shape == (32, 48, 3) and image_size(data, LIMITS) == (48, 32)
    assert shown[:14, :14].min() > 200 and shown[18:].max() < 60


def test_damaged_exif_leaves_the_picture_as_it_lies():
    data = encoded(PICTURE, "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode_image(data, LIMITS).size == image_size(data, LIMITS) == (96, 64)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMITS).getpixel((4, 4)) == (255, 0, 0)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(PICTURES)), share=st.floats(0, 0.99))
def test_picture_cut_anywhere_is_an_error_of_decoding_and_of_sizing(name, share):
    data = PICTURES[name][: int(len(PICTURES[name]) * share)]
    cause = cause_of(decode_image, data)
    assert cause == cause_of(image_size, data)
    assert cause in ("image_empty", "image_truncated", "image_corrupt")


def test_truncated_jpeg_has_its_own_cause():
    assert cause_of(decode_image, PICTURES["JPEG"][:-40]) == "image_truncated"


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(sorted(PICTURES)),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_size_of_damaged_picture_is_that_of_the_decoded_one_or_the_same_error(name, flips):
    data = bytearray(PICTURES[name])
    for place, value in flips:
        data[int(place * len(data))] = value
    decoded = outcome(decode_image, bytes(data))
    assert outcome(image_size, bytes(data)) == (decoded if isinstance(decoded, str) else decoded.size)


def test_decompression_bomb_is_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = bytearray(encoded(PICTURE, "PNG"))
    png[16:29] = header
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    assert cause_of(decode_image, bytes(png)) == cause_of(image_size, bytes(png)) == "image_too_large"


def test_limits_are_of_pixels_and_of_bytes_and_inclusive():
    data = PICTURES["PNG"]
    exact = LimitsConfig(image_pixels=96 * 64, image_bytes=len(data))
    assert decode_image(data, exact).size == (96, 64)
    assert cause_of(image_size, data, LimitsConfig(image_pixels=96 * 64 - 1)) == "image_too_large"
    assert cause_of(image_size, data, LimitsConfig(image_bytes=len(data) - 1)) == "image_too_large"


def test_empty_and_foreign_bytes_have_their_own_causes():
    assert cause_of(decode_image, b"") == "image_empty"
    assert cause_of(decode_image, b"<svg></svg>" * 20) == "image_corrupt"
    assert cause_of(decode_image, encoded(PICTURE, "TIFF")) == "image_corrupt"


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_format_decodes_to_mono_at_16_khz(name):
    waveform = decode_audio(RECORDINGS[name], LIMITS)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - 0.6 * 16000) < 0.08 * 16000
    spectrum = np.abs(np.fft.rfft(waveform[1000:9000]))
    assert abs(spectrum.argmax() * 16000 / 8000 - 440) < 5


@pytest.mark.parametrize("name", RECORDINGS)
def test_number_of_samples_is_exactly_the_length_of_the_waveform(name):
    data = RECORDINGS[name]
    assert (
        audio_num_samples(data, LIMITS) == len(decode_audio(data, LIMITS)) == audio_num_samples(data, LIMITS)
    )


@settings(deadline=None, max_examples=25)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 96000]),
    channels=st.integers(1, 8),
    num=st.integers(800, 5000),
)
def test_any_rate_and_channels_give_the_length_at_16_khz(rate, channels, num):
    data = wav(rate, channels, num / rate + 1e-9)
    length = audio_num_samples(data, LIMITS)
    assert length == len(decode_audio(data, LIMITS)) and abs(length - num * 16000 / rate) <= 1


def test_16_khz_mono_is_taken_as_it_is():
    waveform = decode_audio(wav(seconds=0.25), LIMITS)
    np.testing.assert_array_equal(waveform, tone(16000, 0.25).astype(np.float32) / 32768)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(RECORDINGS)), share=st.floats(0, 0.8))
def test_recording_cut_by_a_fifth_or_more_is_an_error_of_decoding_and_of_measuring(name, share):
    data = RECORDINGS[name][: int(len(RECORDINGS[name]) * share)]
    cause = cause_of(decode_audio, data)
    assert cause == cause_of(audio_num_samples, data)
    assert cause in ("audio_empty", "audio_truncated", "audio_corrupt")


@pytest.mark.parametrize("missing", [1, 2, 4, 1000])
def test_wav_that_promises_more_samples_than_there_are_is_truncated(missing):
    assert cause_of(decode_audio, wav(seconds=0.2)[:-missing]) == "audio_truncated"


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_written_into_a_pipe_has_no_size_and_is_whole(size):
    data = bytearray(wav(seconds=0.2))
    data[40:44] = struct.pack("<I", size)
    assert audio_num_samples(bytes(data), LIMITS) == 3200


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(RECORDINGS)),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_recording_gives_the_same_length_or_the_same_error(name, flips):
    data = bytearray(RECORDINGS[name])
    for place, value in flips:
        data[int(place * len(data))] = value
    decoded = outcome(decode_audio, bytes(data))
    assert outcome(audio_num_samples, bytes(data)) == (decoded if isinstance(decoded, str) else len(decoded))


def test_tags_in_another_encoding_do_not_matter():
    title = struct.pack("<4sI", b"INAM", 4) + b"caf\xe9"
    data = bytearray(wav(seconds=0.2) + struct.pack("<4sI4s", b"LIST", 4 + len(title), b"INFO") + title)
    data[4:8] = struct.pack("<I", len(data) - 8)
    assert audio_num_samples(bytes(data), LIMITS) == 3200


def test_m4a_without_a_codec_is_an_error_and_no_crash():
    data = RECORDINGS["m4a"].replace(b"\0\0\0\x10smhd", b"\0\0\0\x41smhd")
    assert cause_of(decode_audio, data) == "audio_corrupt"


def test_recording_beyond_the_limit_is_refused_and_one_at_the_limit_is_not():
    data = wav(seconds=0.5)
    assert audio_num_samples(data, LimitsConfig(audio_seconds=0.5)) == 8000
    assert cause_of(audio_num_samples, data, LimitsConfig(audio_seconds=0.4999)) == "audio_too_long"
    assert cause_of(audio_num_samples, data, LimitsConfig(audio_bytes=len(data) - 1)) == "audio_too_large"


def test_decoding_stops_early_at_the_limit(monkeypatch):
    decoded = []
    real = av.AudioResampler.resample

    class Counting:
        def __init__(self, *args, **kwargs):
            self.resampler = av_resampler(*args, **kwargs)

        def resample(self, frame):
            decoded.append(frame)
            return real(self.resampler, frame)

    av_resampler = av.AudioResampler
    monkeypatch.setattr(av, "AudioResampler", Counting)
    data = wav(8000, 1, 60.0)
    assert cause_of(decode_audio, data, LimitsConfig(audio_seconds=1.0)) == "audio_too_long"
    assert sum(frame.samples for frame in decoded if frame) < 2 * 8000


def test_empty_and_foreign_recordings_have_their_own_causes():
    assert cause_of(decode_audio, b"") == "audio_empty"
    assert cause_of(decode_audio, wav(seconds=0)) == "audio_empty"
    assert cause_of(decode_audio, b"no sound at all" * 100) == "audio_corrupt"


def test_playlist_is_never_opened(tmp_path):
    (tmp_path / "secret.wav").write_bytes(wav())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"
    assert cause_of(decode_audio, playlist.encode()) == "audio_corrupt"
    concat = f"ffconcat version 1.0\nfile '{tmp_path}/secret.wav'\n"
    assert cause_of(decode_audio, concat.encode()) == "audio_corrupt"


def test_values_that_are_not_finite_are_an_error():
    samples = np.array([0.1, np.nan, np.inf, 0.2], "<f4").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + 16, b"WAVE", b"fmt ", 16, 3, 1, 16000, 64000, 4, 32)
    data = header + struct.pack("<4sI", b"data", 16) + samples
    assert cause_of(decode_audio, data) == "audio_corrupt"
