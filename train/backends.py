"""The two engines.

`DDPEngine` is plain data parallelism, or one process; `DeepSpeedEngine` is ZeRO 1, 2, 3 with or without
CPU offload.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.distributed as dist
from torch import nn

from train.config import Precision, RunConfig
from train.engine import Engine, StepResult, partition
from train.fragments import (
    NamedShapes,
    stage3_fragments,
    stage3_frozen_fragments,
    stage12_fragments,
    start_state,
    whole_fragments,
)
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


class DeepSpeedEngine(Engine):
    """ZeRO 1, 2 or 3. bf16 keeps bf16 weights beside fp32 masters in the optimizer."""

    def __init__(self, config: RunConfig, accelerator, model: nn.Module) -> None:
        super().__init__(config, accelerator)
        self.model = model
        self._stage3 = config.zero.stage == 3
        # In the dtype that DeepSpeed would cast to, so that nothing is ever held twice.
        model.to(torch.bfloat16 if config.precision is Precision.bf16 else torch.float32)
        if self._stage3:
            partition(model, accelerator.state.deepspeed_plugin.deepspeed_config, self.device)
        else:
            model.to_empty(device=self.device)
        self._names = NamedShapes(model)
        optimizer = build_optimizer(model, config, fused=self.device.type == "cuda")
        prepared = accelerator.prepare(model, optimizer)
        self.ds = prepared[0]
        self.zero = self.ds.optimizer
        self.optimizer = self.zero.optimizer
        self._norms: list[float] = []
        self._limit = math.inf
        self._is_above_limit = False
        self._record_group_norms()
        self._refuse_what_is_above_limit()

    def _record_group_norms(self) -> None:
        # DeepSpeed computes a norm per group (per sub-group in stage 3) on its way to the global
        # one and forgets it. Listening costs nothing; computing it again would cost a pass.
        name = (
            "complete_grad_norm_calculation_for_cpu_offload"
            if self.config.zero.offload
            else "get_grad_norm_direct"
        )
        original = getattr(self.zero, name)

        def listen(*arguments, **keywords):
            norm = original(*arguments, **keywords)
            self._norms.append(float(norm))
            return norm

        setattr(self.zero, name, listen)

    def _refuse_what_is_above_limit(self) -> None:
        # Between these norms and the update DeepSpeed looks whether they are finite, and skips the step on
        # all ranks where they are not, clearing what it gathered. So a norm above the limit is shown as
        # infinite. The norms are equal on all ranks, and so is the verdict.
        name = "_get_norm_groups" if self._stage3 else "scaled_global_norm"
        original = getattr(self.zero, name)

        def judge(*arguments, **keywords):
            found = original(*arguments, **keywords)
            total = self._groups_to_modules(self._group_norms()).grad_norm
            is_sound = all(norm >= 0 and math.isfinite(norm) for norm in self._norms)  # -1 says it was not
            self._is_above_limit = is_sound and total > self._limit
            if not self._is_above_limit:
                return found
            return [math.inf for _ in found] if self._stage3 else math.inf

        setattr(self.zero, name, judge)
        # All that a scale of 1 does with the verdict is to log that gradients are not finite.
        self.zero.loss_scaler.update_scale = lambda overflow: None

    def forward(self, batch):  # noqa: D102
        self.sign("a forward pass")
        return self.ds(batch)

    @contextlib.contextmanager
    def micro_batch(self, last):  # noqa: D102
        self.ds.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.ds.step()  # only counts the micro-batch

    def backward(self, loss):  # noqa: D102
        self.sign("a backward pass")
        self.ds.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, limit=math.inf):  # noqa: D102
        self.sign("the update")
        self._norms.clear()
        self._limit, self._is_above_limit = limit, False
        self.ds.step()
        result = self._groups_to_modules(self._group_norms())
        result.applied = bool(self.ds.was_step_applied())
        if not result.applied and not self._is_above_limit:
            # DeepSpeed's norms are placeholders then.
            return StepResult(applied=False, grad_norm=math.inf, module_norms={})
        return result

    def _group_norms(self) -> list[float]:
        if not self._stage3:
            return self._norms
        squares = [0.0] * len(self.optimizer.param_groups)
        for sub_group, norm in enumerate(self._norms):
            squares[self.zero.sub_group_to_group_id[sub_group]] += norm * norm
        return [math.sqrt(value) for value in squares]

    def trained_fragments(self):  # noqa: D102
        fragments = stage3_fragments if self._stage3 else stage12_fragments
        return fragments(self.zero, self.rank, self._names)

    def frozen_fragments(self):  # noqa: D102
        if self._stage3:
            return stage3_frozen_fragments(self.model, self.rank, self._names)
        return whole_fragments(self.model, self.optimizer, trained=False)

    def start_moments(self, steps):  # noqa: D102
        zero = self.zero
        flats = zero.fp32_partitioned_groups_flat if self._stage3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            start_state(self.optimizer, flat, steps)

    @torch.no_grad()
    def publish_weights(self):  # noqa: D102
        zero = self.zero
        if self._stage3:
            zero._partition_all_parameters()
            for sub_group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        for index, flat in enumerate(zero.single_partition_of_fp32_groups):
            parts = zero.parallel_partitioned_bit16_groups[index]
            parts[self.rank].data.copy_(flat.data)
            if self.world_size > 1:
                dist.all_gather([part.data for part in parts], parts[self.rank].data.clone())


def build_engine(config: RunConfig, accelerator, model: nn.Module) -> DDPEngine | DeepSpeedEngine:
    """Returns the engine of the kind `config.zero` asks for around a model on the meta device.

    Its weights have no values yet: `train.checkpoint.copy_weights` or `restore_checkpoint` fills them.
    """
    return (DeepSpeedEngine if config.zero.stage else DDPEngine)(config, accelerator, model)
