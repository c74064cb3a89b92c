"""What a training loop asks of an engine, and what both backends share.

Engines take gradients of a *sum* over the global batch: a caller divides its loss by the global
count and calls `backward`; the engine undoes every averaging of its library.

They hand out the master weights and AdamW moments they hold as `Fragment`s (train/fragments.py).
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.config import RunConfig
from train.fragments import Fragment, step_count
from train.optim import group_module

PATIENCE = timedelta(hours=12)
MARGIN_SECONDS = 600.0
"""How long after `train.hang_seconds` a collective ends by itself, so that the watchdog speaks first."""


@dataclass(slots=True)
class StepResult:
    """What an update did. `grad_norm` and, per module, `module_norms` are before clipping.

    A step that was not applied changed nothing; with a finite norm it was above its limit.
    """

    applied: bool
    grad_norm: float
    module_norms: dict[str, float]


class Engine(ABC):
    """A model with its optimizer, spread over the ranks."""

    def __init__(self, config: RunConfig, accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        several = self.world_size > 1
        # Small sums go through host memory, so that no device is waited for.
        on_device = several and dist.get_backend() != "gloo"
        limit = collective_timeout(config)
        self._host_group: Any = dist.new_group(backend="gloo", timeout=limit) if on_device else None
        # Counting tokens, saving and merging weights may take longer than any collective should.
        self._patient_group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.sign: Callable[[str], None] = lambda what: None
        """Is told what begins that may wait for other ranks (train/watchdog.py)."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs."""
        return self.rank == 0

    @abstractmethod
    def forward(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the model's (weighted loss sum, loss per supervised row)."""

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Wraps forward and backward of one micro-batch; `last` is the one before `step`."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds gradients of `loss`, this rank's share of a sum over all ranks and micro-batches."""

    @abstractmethod
    def step(self, limit: float = math.inf) -> StepResult:
        """Clips and updates on all ranks; on none where the gradient norm is not finite or above `limit`."""

    @abstractmethod
    def trained_fragments(self) -> Iterator[Fragment]:
        """Yields what this rank holds of trained parameters: master weights and moments."""

    @abstractmethod
    def frozen_fragments(self) -> Iterator[Fragment]:
        """Yields what this rank holds of frozen parameters."""

    @abstractmethod
    def start_moments(self, steps: int) -> None:
        """Creates zero moments as they would stand after `steps` updates."""

    @abstractmethod
    def publish_weights(self) -> None:
        """Copies master weights that were written through fragments to where the model reads them."""

    def optimizer_steps(self) -> int:
        """Returns how many updates the optimizer has applied."""
        return step_count(self.optimizer)

    def set_lr(self, factor: float) -> None:
        """Sets every parameter group to `factor` times its peak learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Returns the element-wise sum over all ranks, through host memory: no device is waited for."""
        if self.world_size == 1:
            return values
        self.sign("a sum over all ranks")
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._host_group)
        return tensor.tolist()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            self.sign("a sum over all ranks")
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value) -> list:
        """Returns every rank's `value`, on every rank. Slow: for errors and saves."""
        if self.world_size == 1:
            return [value]
        self.sign("gathering from all ranks")
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient_group)
        return values

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main rank run the block first, then one rank of every other machine, then all others.

        However long each takes. So what is made once in a shared folder is made by one rank, and what
        lies on a disk of each machine by one rank of each.
        """
        if self.world_size == 1:
            yield
            return
        turn = 0 if self.is_main else 1 if self.accelerator.is_local_main_process else 2
        for _ in range(turn):
            dist.barrier(group=self._patient_group)
        yield
        for _ in range(turn, 2):
            dist.barrier(group=self._patient_group)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            self.sign("waiting for all ranks")
            dist.barrier(group=self._patient_group)

    def close(self) -> None:
        """Leaves the process group after every rank has come here."""
        self.barrier()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _groups_to_modules(self, norms: list[float]) -> StepResult:
        squares: dict[str, float] = {}
        for group, norm in zip(self.optimizer.param_groups, norms):
            module = group_module(group)
            squares[module] = squares.get(module, 0.0) + norm * norm
        modules = {name: math.sqrt(value) for name, value in squares.items()}
        total = math.sqrt(sum(squares.values()))
        return StepResult(applied=True, grad_norm=total, module_norms=modules)


def collective_timeout(config: RunConfig) -> timedelta | None:
    """Returns how long a collective may last; None is the library's own limit."""
    seconds = config.train.hang_seconds
    return None if seconds is None else timedelta(seconds=seconds + MARGIN_SECONDS)
