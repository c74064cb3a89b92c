"""The clean data that is corrupted: three small sources with every format of picture and clip."""

import io
import json
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from data.config import LimitsConfig
from data.index import load_folder
from data.prepare import main as prepare
from data.scan import index_shards
from tests.data.corpus import image_bytes, record, wav_bytes

LIMITS = LimitsConfig(image_pixels=4_000_000, audio_seconds=30.0, text_bytes=200_000, parts=64)
"""Small ones, so that a sample that asks for too much memory stands out."""

FORMATS = {"chat": "native", "captions": "caption", "speech": "asr"}
PICTURES = ("JPEG", "PNG", "WEBP", "GIF")
CLIPS = {
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "ogg": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
}


@dataclass(frozen=True)
class Span:
    """Where a sample lies in its tar: `start` of its first header to `stop` of its last block."""

    key: str
    start: int
    stop: int
    members: tuple[tuple[str, int, int], ...]
    """Name, offset of the data and size of every member; a header is 512 bytes before its data."""


def build(root: Path) -> dict[str, str]:
    """Writes the clean sources below `root`; returns their folders by name."""
    _write_shard(root / "captions/shard-000000.tar", _captions())
    _write_shard(root / "speech/shard-000000.tar", _speech())
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        _write_chat(root)
        for name in ("captions", "speech"):
            index_shards([str(root / name / "shard-000000.tar")], FORMATS[name], LIMITS, workers=1)
    return {name: str(root / name) for name in FORMATS}


def _write_chat(root: Path) -> None:
    media = root / "records"
    media.mkdir(parents=True)
    lines = []
    clips = ["wav", *CLIPS]
    for number in range(20):
        kind, ending = PICTURES[number // 2 % 4], clips[number // 2 % 5]
        picture, clip = f"{number}.{kind.lower()}", f"{number}.{ending}"
        (media / picture).write_bytes(image_bytes(40 + 3 * number, 90 - 2 * number, kind))
        (media / clip).write_bytes(clip_bytes(ending, 0.2 + 0.02 * number))
        shown = picture if number % 4 in (1, 3) else None
        heard = clip if number % 4 in (2, 3) else None
        lines.append(json.dumps(record(number, answer=f"Answer {number}.", image=shown, audio=heard)))
    (media / "chat.jsonl").write_text("\n".join(lines) + "\n")
    prepare_records(media / "chat.jsonl", root / "chat", "llava")


def prepare_records(file: Path, out: Path, format: str) -> int:
    """Runs `data.prepare` on a file of records, whose media lie beside the clean ones."""
    command = [
        str(file),
        "--format",
        format,
        "--out",
        str(out),
        "--workers",
        "1",
        "--samples-per-shard",
        "10",
    ]
    limits = ["image_pixels", "audio_seconds", "text_bytes", "parts"]
    return prepare(
        command + [word for name in limits for word in ("--limit", f"{name}={getattr(LIMITS, name)}")]
    )


def clip_bytes(ending: str, seconds: float) -> bytes:
    """Returns an encoded tone."""
    if ending == "wav":
        return wav_bytes(int(seconds * 16000))
    container, codec = CLIPS[ending]
    rate = 48000 if codec == "libopus" else 16000
    tone = (np.sin(np.arange(int(rate * seconds)) * 0.05) * 8000).astype("<i2").reshape(1, -1)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = rate
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "mono", rate, context.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(piece))
    return file.getvalue()


def _captions() -> list[tuple[str, bytes]]:
    members = []
    for number in range(8):
        kind = PICTURES[number % 4]
        data = image_bytes(50 + 7 * number, 60, kind)
        ending = "jpg" if kind == "JPEG" else kind.lower()
        members += [(f"c{number}.{ending}", data), (f"c{number}.txt", f"caption {number}".encode())]
    return members


def _speech() -> list[tuple[str, bytes]]:
    members = []
    for number, ending in enumerate(["wav", *CLIPS, *CLIPS]):
        members.append((f"s{number}.{ending}", clip_bytes(ending, 0.3 + 0.03 * number)))
        members.append(
            (f"s{number}.json", json.dumps({"text": f"words {number}", "language": "en"}).encode())
        )
    return members


def _write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """Returns a tar of the members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def members_of(shard: Path) -> list[tuple[str, bytes]]:
    """Returns name and bytes of every member of a clean tar, in order."""
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def spans_of(folder: str, shard: int) -> list[Span]:
    """Returns where the samples of a clean shard lie."""
    index = load_folder(folder).shards[shard]
    found = []
    for row, key in enumerate(index.keys):
        members = [(name, offset, size) for name, (offset, size) in index.members(row).items()]
        _, offset, size = members[-1]
        stop = offset + -(-size // 512) * 512
        found.append(Span(key, members[0][1] - 512, stop, tuple(members)))
    return found
