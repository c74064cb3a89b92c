"""A released folder at toy size, and conversations with real media for it."""

from __future__ import annotations

import io
import json
import shutil
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from data.tokenizer import BUILT_IN, load_tokenizer
from tests.train.tiny_model import MEDIA, tiny_config, tiny_model
from train.model.omni import MegrezOmni
from train.release import release_config
from train.weights import write_weights


class ModelReader:
    """Weights of a model, with the interface of `train.checkpoint.PieceReader`."""

    def __init__(self, model: MegrezOmni):
        self.weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def names(self):
        return sorted(self.shapes)

    def read(self, kind, name, start, stop):
        assert kind == "weight"
        return self.weights[name].reshape(-1)[start:stop]


def write_release(folder: Path, seed: int = 0) -> MegrezOmni:
    """Writes a folder as a release has it, in fp32, and returns its model."""
    model = tiny_model(seed).eval()
    folder.mkdir(parents=True)
    write_weights(ModelReader(model), folder)
    special = load_tokenizer(None).special
    ids = {"eos_token_id": special("<|turn_end|>"), "pad_token_id": special("<|pad|>")}
    content = release_config(tiny_config(), MEDIA, **ids, dtype="float32")
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_megrezo.TheirModel"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "modeling_megrezo.py").write_text("raise ImportError\n")
    (folder / "README.md").write_text("A release.\n")
    (folder / "notes.txt").write_text("Goes along.\n")
    shutil.copy(BUILT_IN, folder / "tokenizer.json")
    return model


def write_picture(path: Path, width: int, height: int) -> str:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 3 + y, y * 5 + width, x * y + height], axis=-1) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def write_clip(path: Path, seconds: float, rate: int = 16000) -> str:
    time = np.arange(int(seconds * rate)) / rate
    tone = (8000 * np.sin(time * 2000 + 300 * np.sin(time * 3))).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, len(tone), "NONE", ""))
        writer.writeframes(tone.tobytes())
    path.write_bytes(file.getvalue())
    return str(path)


def conversations(folder: Path) -> dict[str, list[dict]]:
    """Writes media into `folder` and returns conversations about them, in the release's message form."""
    folder.mkdir(parents=True, exist_ok=True)
    small, large = write_picture(folder / "s.png", 40, 50), write_picture(folder / "l.jpg", 190, 210)
    brief, long = write_clip(folder / "b.wav", 0.5), write_clip(folder / "l.wav", 65.0)
    almost = write_clip(folder / "a.wav", 29.9, rate=8000)

    def asks(**content):
        return [{"role": "user", "content": content}]

    return {
        "text": [{"role": "user", "content": "Say <|turn_end|> and 你好."}],
        "one slice": asks(text="What is this?", image=small),
        "ten slices": asks(text="What is this?", image=large),
        "0.5 s": asks(text="Write it down.", audio=brief),
        "29.9 s": asks(audio=almost),
        "65 s": asks(text="Write it down.", audio=[long]),
        "both": asks(text="Which of them?", image=[small, large], audio=[brief, brief]),
        "turns": [
            {"role": "system", "content": "Be brief."},
            *asks(text="And this?", image=small, audio=None),
            {"role": "assistant", "content": {"text": "A pattern."}},
            *asks(audio=brief),
            {"role": "assistant", "content": "A tone."},
            *asks(text="Are you sure?", audio=brief),
        ],
    }
