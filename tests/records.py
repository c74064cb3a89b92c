"""Real records for tests: JPEG pictures, WAV clips and a megrez `records.jsonl`, made on the spot."""

import io
import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards import fill_folder, whole_folder

WORDS = [
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "left",
    "right",
    "one",
    "two",
    "three",
    "under",
    "above",
    "bright",
    "small",
    "round",
]
KINDS = ("text", "image", "audio", "both")


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Returns a picture with a gradient and noise, so that every pixel matters."""
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.integers(1, 4, 3)
    pixels = ((ramp + rng.integers(0, 60, (height, width, 3))) % 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def wav(rng: np.random.Generator, seconds: float, rate: int = 16000) -> bytes:
    """Returns a clip of two tones and noise, mono, 16 bit."""
    time = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * time) for _ in range(2))
    samples = ((tones * 0.3 + rng.normal(0, 0.05, len(time))) * 12000).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def sentence(rng: np.random.Generator, least: int = 3, most: int = 12) -> str:
    """Returns some words."""
    return " ".join(rng.choice(WORDS, rng.integers(least, most)))


def write_records(folder: Path, kinds: list[str], seed: int = 0) -> Path:
    """Writes one megrez record per entry of `kinds` (text, image, audio, both) with its media."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, kind in enumerate(kinds):
        content = {"text": sentence(rng)}
        if kind in ("image", "both"):
            content["image"] = f"{number}.jpg"
            size = rng.integers(40, 300, 2)
            (folder / content["image"]).write_bytes(jpeg(rng, int(size[0]), int(size[1])))
        if kind in ("audio", "both"):
            content["audio"] = f"{number}.wav"
            (folder / content["audio"]).write_bytes(wav(rng, float(rng.uniform(0.2, 2.0))))
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": sentence(rng)}]
        lines.append(json.dumps({"conversations": turns}))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(records: Path, out: Path, *words: str) -> Path:
    """Runs `data.prepare` in this process and returns the folder of shards."""
    from data.prepare import main

    assert main([str(records), "--format", "megrez", "--out", str(out), "--workers", "1", *words]) == 0
    return out


def write_shards(samples, out, **sizes) -> list[str]:
    """Writes samples as shards into a new folder, as `data.prepare` does; returns the paths of the tars."""
    with whole_folder(str(out)) as folder:
        names = [Path(path).name for path in fill_folder(samples, folder, **sizes)]
    return [str(Path(out) / name) for name in names]
