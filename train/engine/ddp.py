"""Plain data parallelism, or one process."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn

from train.config import Precision, RunConfig
from train.engine.interface import Engine
from train.fragments import start_state, whole_fragments
from train.optim import build_optimizer


class DDPEngine(Engine):
    """One process, or DistributedDataParallel. bf16 is autocast over fp32 weights."""

    def __init__(self, config: RunConfig, accelerator, model: nn.Module) -> None:
        super().__init__(config, accelerator)
        self.model = model.to_empty(device=self.device)
        self.optimizer = build_optimizer(model, config, fused=self.device.type == "cuda")
        self.wrapped = accelerator.prepare_model(self.model) if self.world_size > 1 else self.model

    def forward(self, batch):  # noqa: D102
        self.sign("a forward pass")
        module = self.wrapped if torch.is_grad_enabled() else self.model
        return self._autocast(module, batch)

    def _autocast(self, module, batch):
        enabled = self.config.precision is Precision.bf16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            return module(batch)

    def micro_batch(self, last):  # noqa: D102
        # Gradients are reduced only with the last micro-batch of a step.
        no_sync = getattr(self.wrapped, "no_sync", contextlib.nullcontext)
        return contextlib.nullcontext() if last else no_sync()

    def backward(self, loss):  # noqa: D102
        self.sign("a backward pass")
        (loss * self.world_size).backward()

    def step(self, limit=math.inf):  # noqa: D102
        self.sign("the update")
        groups = [[p.grad for p in group["params"]] for group in self.optimizer.param_groups]
        norms = torch.stack([nn.utils.get_total_norm(grads) for grads in groups]).tolist()
        result = self._groups_to_modules(norms)
        result.applied = math.isfinite(result.grad_norm) and result.grad_norm <= limit
        if result.applied:
            scale = self.config.optim.clip / (result.grad_norm + 1e-6)
            if scale < 1:
                for grads in groups:
                    for grad in grads:
                        grad.mul_(scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def trained_fragments(self):  # noqa: D102
        return whole_fragments(self.model, self.optimizer, trained=True)

    def frozen_fragments(self):  # noqa: D102
        return whole_fragments(self.model, self.optimizer, trained=False)

    def start_moments(self, steps):  # noqa: D102
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                start_state(self.optimizer, parameter, steps)

    def publish_weights(self):  # noqa: D102
        pass
