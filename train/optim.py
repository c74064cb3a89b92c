"""AdamW parameter groups: one per module and decay class, so that each has its own learning rate
and its own gradient norm."""

from __future__ import annotations

import torch
from torch import nn

from train.config import RunConfig
from train.model.omni import module_of

NO_DECAY = (
    "llm.model.embed_tokens.weight",
    "vision.vpm.embeddings.position_embedding.weight",
    "vision.resampler.query",
    "audio.audio.audio_bos_eos_token.weight",
)
"""Matrices that are tables of vectors: decay would pull towards nothing in particular."""


def has_decay(name: str, parameter: torch.Tensor) -> bool:
    """Returns whether weight decay applies: not to norms, biases, embeddings and learned queries."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # the whole one, where ZeRO-3 has cut it
    return len(shape) >= 2 and name not in NO_DECAY


def build_groups(model: nn.Module, config: RunConfig) -> list[dict]:
    """Returns parameter groups for everything that trains, in a fixed order."""
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((module_of(name), has_decay(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{module}/{'decay' if decay else 'no_decay'}",
            "peak_lr": config.learning_rate(module),
            "lr": config.learning_rate(module),
            "weight_decay": config.optim.weight_decay if decay else 0.0,
        }
        for (module, decay), parameters in sorted(groups.items())
    ]


def group_module(group: dict) -> str:
    """Returns the module that a parameter group belongs to."""
    return group["name"].split("/")[0]


def build_optimizer(model: nn.Module, config: RunConfig, *, fused: bool) -> torch.optim.AdamW:
    """Returns AdamW over the groups of `build_groups`."""
    optim = config.optim
    return torch.optim.AdamW(
        build_groups(model, config), betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused
    )
