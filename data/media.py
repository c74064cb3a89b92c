"""Encoded pictures and recordings -> RGB images and 16 kHz waveforms, under limits.

Bytes come from strangers: sizes are checked before anything is decoded, only the formats named
here are tried, and what cannot be decoded whole is a `SampleError` with a stable cause:
image_empty, image_too_large, image_truncated, image_corrupt, audio_empty, audio_too_large,
audio_too_long, audio_truncated, audio_corrupt.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.config import LimitsConfig
from data.sample import SampleError

if TYPE_CHECKING:
    import av
    from av.audio.stream import AudioStream
    from av.error import FFmpegError
else:
    try:
        import av
        from av.error import FFmpegError
    except ImportError:  # an exported model is used for pictures and text without it
        av, FFmpegError = None, OSError

# Pillow has one limit a process, and only warns up to twice it. Ours is checked below, per call.
Image.MAX_IMAGE_PIXELS = None

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
AUDIO_FORMATS = "wav,w64,mp3,flac,ogg,mov"
"""FFmpeg demuxers that may be tried. Playlists are not among them: they can name files and URLs."""

JPEG_SCANS = 100
"""Passes over the picture that a progressive JPEG may make (10 are usual): each costs time, and few bytes."""

SAMPLE_RATE_HZ = 16000
LEAST_RATE_HZ, MOST_RATE_HZ = 100, 1_000_000
"""Beyond them, a resampler takes seconds and hundreds of megabytes for its filters."""

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How each EXIF orientation is made upright; 5 to 8 swap width and height."""

PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers are known to raise for damaged bytes."""

END_TOLERANCE_SECONDS = 0.1
"""A lossy file may end this much before the length in its header: codec frames are coarse."""


def decode_image(data: bytes, limits: LimitsConfig) -> Image.Image:
    """Returns a picture as RGB, upright, what is transparent laid on white.

    Of an animation the first frame. JPEG, PNG, WebP, GIF and BMP.

    Raises:
        SampleError: it is empty, damaged, cut off, or beyond the limits.
    """
    image = _open_image(data, limits)
    try:
        _load(image)
        rgb = _to_rgb(image)
        turn = UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except PILLOW_ERRORS as error:
        raise _image_error(error, data) from error


def image_size(data: bytes, limits: LimitsConfig) -> tuple[int, int]:
    """Returns (width, height) in pixels of what `decode_image` would give, having read all the data.

    Raises:
        SampleError: as `decode_image`.
    """
    image = _open_image(data, limits)
    width, height = image.size
    try:
        # A JPEG is decoded at an eighth of its size: all of its bits are read, in a third of the time.
        image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
        _load(image)
        turned = _orientation(image) >= 5
    except PILLOW_ERRORS as error:
        raise _image_error(error, data) from error
    return (height, width) if turned else (width, height)


def _open_image(data: bytes, limits: LimitsConfig) -> Image.Image:
    if not data:
        raise SampleError("the picture is empty (0 bytes)", cause="image_empty")
    if len(data) > limits.image_bytes:
        raise SampleError(
            f"the picture has {len(data)} bytes, more than data.limits.image_bytes={limits.image_bytes}",
            cause="image_too_large",
        )
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > JPEG_SCANS:
        raise SampleError(f"the picture has more than {JPEG_SCANS} scans", cause="image_corrupt")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except PILLOW_ERRORS as error:
        raise _image_error(error, data) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise SampleError(f"the picture is empty ({width}x{height} pixels)", cause="image_empty")
    if width * height > limits.image_pixels:
        raise SampleError(
            f"the picture has {width}x{height} pixels, more than "
            f"data.limits.image_pixels={limits.image_pixels}",
            cause="image_too_large",
        )
    return image


def _load(image: Image.Image) -> None:
    image.load()
    if image.mode == "P" and image.palette is None:
        raise ValueError("its palette is missing")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip it at 255.
        grey = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(np.minimum(grey, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
    except PILLOW_ERRORS:
        # Damaged EXIF data says nothing about the picture, which every viewer then shows as it lies.
        return 1
    return found if found in UPRIGHT else 1


def _image_error(error: Exception, data: bytes) -> SampleError:
    webp_missing = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    png_missing = data[:4] == b"\x89PNG" and b"IEND" not in data[-16:]
    if "truncated" in str(error).lower() or webp_missing or png_missing:
        return SampleError(
            f"the picture is cut off after {len(data)} bytes ({error})", cause="image_truncated"
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return SampleError(f"the picture is none of {', '.join(IMAGE_FORMATS)}", cause="image_corrupt")
    return SampleError(f"the picture is damaged ({error})", cause="image_corrupt")


def decode_audio(data: bytes, limits: LimitsConfig) -> np.ndarray:
    """Returns a recording as mono at 16 kHz: WAV, MP3, FLAC, Ogg, Opus or M4A, any rate and channels.

    Shapes: float32 [num_samples].

    Raises:
        SampleError: it is empty, damaged, cut off, or beyond the limits.
    """
    return np.concatenate(list(_waveform(data, limits)))


def audio_num_samples(data: bytes, limits: LimitsConfig) -> int:
    """Returns the length of what `decode_audio` would give, by decoding it.

    Raises:
        SampleError: as `decode_audio`.
    """
    return sum(len(piece) for piece in _waveform(data, limits))


def _waveform(data: bytes, limits: LimitsConfig) -> Iterator[np.ndarray]:
    """Yields the waveform piece by piece, so that a limit stops the decoder early."""
    if not data:
        raise SampleError("the recording is empty (0 bytes)", cause="audio_empty")
    if len(data) > limits.audio_bytes:
        raise SampleError(
            f"the recording has {len(data)} bytes, more than data.limits.audio_bytes={limits.audio_bytes}",
            cause="audio_too_large",
        )
    if missing := _missing_bytes(data):
        raise SampleError(f"the recording is cut off: {missing} bytes are missing", cause="audio_truncated")
    num_samples = 0
    for piece in _resampled(data, limits):
        num_samples += len(piece)
        if num_samples > limits.audio_seconds * SAMPLE_RATE_HZ:
            raise _too_long(limits)
        if not np.isfinite(piece).all():
            raise SampleError("the recording holds values that are not finite", cause="audio_corrupt")
        yield piece
    if num_samples == 0:
        raise SampleError("the recording is empty (no samples)", cause="audio_empty")


def _too_long(limits: LimitsConfig) -> SampleError:
    return SampleError(
        f"the recording is longer than data.limits.audio_seconds={limits.audio_seconds}",
        cause="audio_too_long",
    )


def _resampled(data: bytes, limits: LimitsConfig) -> Iterator[np.ndarray]:
    if av is None:
        raise RuntimeError("av: it is not installed, and it reads recordings. Run pip install av.")
    try:
        options = {"format_whitelist": AUDIO_FORMATS}
        if data.startswith(b"RIFF"):
            options["probesize"] = "4096"  # a header tells all, and looking further takes most of the time
        with av.open(io.BytesIO(data), options=options, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise SampleError("the file holds no audio", cause="audio_corrupt")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                # PyAV would crash the process.
                raise SampleError("the audio is of an unknown codec", cause="audio_corrupt")
            promised = _promised_seconds(container.format.name, stream, data)
            resampler: av.AudioResampler | None = None
            seconds = 0.0
            for frame in _frames(container, stream):
                if not LEAST_RATE_HZ <= frame.sample_rate <= MOST_RATE_HZ:
                    raise SampleError(f"a rate of {frame.sample_rate} Hz is not real", cause="audio_corrupt")
                seconds += frame.samples / frame.sample_rate
                if seconds > limits.audio_seconds + 1:
                    raise _too_long(limits)  # at 100 Hz one frame may become gigabytes
                if resampler is None and _is_ready(frame):
                    yield frame.to_ndarray()[0] / np.float32(32768)
                    continue
                resampler = resampler or av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
                yield from (piece.to_ndarray()[0] for piece in resampler.resample(frame))
            if resampler is not None:
                yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))
    except SampleError:
        raise
    except EOFError as error:
        raise SampleError("the recording is cut off before any sound", cause="audio_truncated") from error
    except (FFmpegError, ValueError, ZeroDivisionError) as error:
        raise SampleError(f"the recording is damaged ({error})", cause="audio_corrupt") from error
    if seconds < promised - END_TOLERANCE_SECONDS:
        raise SampleError(
            f"the recording is cut off: {seconds:.2f} of {promised:.2f} s are there", cause="audio_truncated"
        )


def _is_ready(frame: av.AudioFrame) -> bool:
    """Returns whether a frame needs scaling alone: 16 bit mono at 16 kHz, as most corpora of speech are."""
    is_mono = frame.layout.nb_channels == 1 and frame.sample_rate == SAMPLE_RATE_HZ
    return is_mono and frame.format.name in ("s16", "s16p")


def _frames(container, stream: AudioStream) -> Iterator[av.AudioFrame]:
    """Yields decoded frames. A last packet that cannot be decoded means that the file was cut off."""
    failure: FFmpegError | None = None
    for packet in container.demux(stream):
        if failure and packet.size:
            raise failure
        try:
            frames = packet.decode() if not failure else []
        except FFmpegError as error:
            failure, frames = error, []
        yield from frames
    if failure:
        raise SampleError(f"the recording is cut off ({failure})", cause="audio_truncated")


def _promised_seconds(container_format: str, stream: AudioStream, data: bytes) -> float:
    """Returns the length that the header states, or 0 where FFmpeg's figure is only an estimate."""
    exact = container_format != "mp3" or b"Xing" in data[:65536] or b"Info" in data[:65536]
    if not exact or stream.duration is None or stream.time_base is None:
        return 0.0
    return float(stream.duration * stream.time_base)


def _missing_bytes(data: bytes) -> int:
    """Returns how many bytes a container's own sizes state beyond the end of the data."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _missing_in_wav(data)
    if data[:4] == b"OggS":
        return _missing_in_ogg(data)
    if data[4:8] == b"ftyp":
        return _missing_in_mp4(data)
    return 0


def _missing_in_wav(data: bytes) -> int:
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        if name == b"data":
            # A program that writes into a pipe cannot know the size, and leaves a huge one.
            return 0 if size >= 0x7FFFF000 else max(0, place + 8 + size - len(data))
        place += 8 + size + size % 2
    return max(0, place + 8 - len(data))


def _missing_in_ogg(data: bytes) -> int:
    page = data.rfind(b"OggS")
    table = page + 27
    if table > len(data):
        return table - len(data)
    num_segments = data[page + 26]
    segments = data[table : table + num_segments]
    return max(0, table + num_segments + sum(segments) - len(data))


def _missing_in_mp4(data: bytes) -> int:
    place = 0
    while place + 16 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:
            return 0  # 0 means: up to the end of the file
        place += size
    return max(0, place - len(data))
