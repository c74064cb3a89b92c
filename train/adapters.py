"""Adapters of the form that peft has: put into a model, and written so that peft loads them."""

from __future__ import annotations

import math
from pathlib import Path

from train.lora import LoraConfig
from train.model.omni import MegrezOmni
from train.model.shapes import ADAPTER
from train.stored import ADAPTER_FILE
from train.weights import save_tensors

PREFIX = "base_model.model."
"""What peft's files put before every name."""


def add_adapters(model: MegrezOmni, lora: LoraConfig) -> None:
    """Wraps the layers that `lora` names; the adapters lie on the meta device, without values.

    Call before `set_tuned`: peft freezes everything but adapters.
    """
    if not lora.adapted:
        return
    import peft  # takes seconds, and few runs need it

    peft.inject_adapter_in_model(_peft_config(lora), model, low_cpu_mem_usage=True)


def write_adapters(lora: LoraConfig, reader, folder: Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` from a reader of whole weights."""
    tensors = {
        PREFIX + name: reader.read("weight", name, 0, math.prod(shape := reader.shapes[name])).reshape(shape)
        for name in reader.names()
        if ADAPTER in name
    }
    save_tensors(tensors, folder / ADAPTER_FILE)
    config = _peft_config(lora)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _peft_config(lora: LoraConfig):
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it is only divided by
        target_modules=lora.pattern,
    )
