"""A released folder at toy size, and conversations with real media for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from data.tokenizer import BUILT_IN, load_tokenizer
from tests.records import jpeg, wav
from tests.train.tiny_model import MEDIA, tiny_config
from train.model.initial import build_model
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
    """Writes a folder as a release has it, in fp32, and returns its model.

    Its weights are those that training starts from: larger ones would amplify rounding beyond 1e-5.
    """
    model = build_model(tiny_config(), MEDIA, seed).eval()
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


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def conversations(folder: Path) -> dict[str, list[dict]]:
    """Writes media into `folder` and returns conversations about them, in the release's message form."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    small = _write(folder / "small.jpg", jpeg(rng, 40, 50))
    large = _write(folder / "large.jpg", jpeg(rng, 190, 210))
    brief = _write(folder / "brief.wav", wav(rng, 0.5))
    almost = _write(folder / "almost.wav", wav(rng, 29.9, rate=8000))
    long = _write(folder / "long.wav", wav(rng, 65.0))

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
