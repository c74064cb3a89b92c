"""Stages: what a finished one leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.tokenizer import copy_tokenizer
from train.adapters import write_adapters
from train.checkpoint import PieceReader
from train.compose import to_yaml
from train.config import RunConfig
from train.first_weights import FirstWeights
from train.folder import naming
from train.model.omni import is_trained
from train.model.stand_in import HEADS
from train.parent import released_folder, tokenizer_digest, tokenizer_folder
from train.stored import write_base
from train.weights import FirstWeightsReader, sync, weights_digest, write_weights


def config_digest(config: RunConfig) -> str:
    """Returns a digest of the whole config."""
    return hashlib.blake2b(to_yaml(config).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Returns versions of what decides the numbers."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "peft")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError; deepspeed exists for Linux only
            found[name] = "not installed"
    return found


class FrozenFromStart:
    """A checkpoint's weights, but for frozen ones those that the stage began with: in bf16 ZeRO holds
    these rounded, and what nobody trained must not change by one bit."""

    def __init__(self, config: RunConfig, checkpoint: PieceReader, first: FirstWeightsReader) -> None:
        self.folder = checkpoint.folder
        self.shapes = checkpoint.shapes
        self.names = checkpoint.names
        self._readers = {
            name: checkpoint if is_trained(name, config.tuned, config.lora.adapted) else first
            for name in checkpoint.shapes
        }

    def place(self, name: str) -> str:
        """Returns the file of a frozen weight."""
        return self._readers[name].place(name)

    def read(self, kind: str, name: str, start: int, stop: int):
        """Returns elements [start, stop) of a flattened weight."""
        return self._readers[name].read(kind, name, start, stop)


def write_final(
    config: RunConfig, final: Path, checkpoint: Path, first: FirstWeightsReader, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes weights and `stage.json` of a finished stage from its last checkpoint (main rank only).

    `final` appears whole or not at all.
    """
    weights = FrozenFromStart(config, PieceReader(checkpoint), first)
    partial = final.with_name(".final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tuned = config.tuned
    stage = {
        "stage": config.stage,
        "model": config.model.name,
        "tuned": [name for name, on in tuned.items() if on],
        "frozen": [name for name, on in tuned.items() if not on],
        "config_digest": config_digest(config),
        "tokenizer_digest": tokenizer_digest(config),
        "release": released_folder(config),
        "weights_digest": _write_weights(config, weights, first.first, partial),
        **({"lora": asdict(config.lora)} if config.lora.rank else {}),
        "versions": versions(),
        **facts,
    }
    with naming(partial):
        (partial / "config.yaml").write_text(to_yaml(config))
        copy_tokenizer(tokenizer_folder(config), partial)
        (partial / "stage.json").write_text(json.dumps(stage, indent=1, ensure_ascii=False))
    sync(partial / "stage.json")
    os.replace(partial, final)
    return stage


def _write_weights(config: RunConfig, weights: FrozenFromStart, first: FirstWeights, folder: Path) -> str:
    """Writes the weights of a finished stage and returns their digest.

    With adapters it is only these, the modules that trained whole, and frozen weights that no file
    holds as they are: drawn ones, and tables that were grown. `base.json` says where the others lie.
    """
    if not config.lora.rank:
        return write_weights(weights, folder, leave_out=HEADS)
    base = {
        name: stored
        for name, stored in first.stored.items()
        if stored.shape == first.shapes[name] and not is_trained(name, config.tuned, config.lora.adapted)
    }
    own = [name for name in first.shapes if name not in base]
    if own:
        write_weights(weights, folder, names=own)
    write_base(base, config.lora.scale, bool(own), folder)
    write_adapters(config.lora, weights, folder)
    return weights_digest(folder)
