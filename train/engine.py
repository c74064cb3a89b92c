"""What a training loop asks of an engine, how ranks meet, and the one importer of accelerate and DeepSpeed.

Both engines (train/backends.py) take gradients of a *sum* over the global batch: a caller divides its
loss by the global count and calls `backward`; the engine undoes every averaging of its library.

They hand out the master weights and AdamW moments they hold as `Fragment`s (train/fragments.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from train.compose import refuse_world
from train.config import Precision, RunConfig
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


def start_engine(config: RunConfig):
    """Returns an `Accelerator` of the kind that `config.zero` needs, process group running.

    Raises:
        ValueError: the launcher's environment, the number of ranks or the machine do not fit.
    """
    _complete_environment()
    for message in ("OMP_NUM_THREADS", ".*all_gather_into_tensor", ".*reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=message)  # from the libraries; nothing to act on
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.zero.stage == 0:
        # Set by `accelerate launch --use_deepspeed`; with it, plain DDP would want a plugin.
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState

    world_size = int(os.environ["WORLD_SIZE"])
    if found := refuse_world(config, world_size):
        raise ValueError("\n".join(found))
    plugin = _plugin(config, world_size) if config.zero.stage else None
    limit = collective_timeout(config)
    _join_again(limit)
    if not torch.cuda.is_available():
        # Otherwise accelerate takes every CPU rank for a world of its own.
        PartialState(cpu=True, timeout=limit)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    precision = "bf16" if config.precision is Precision.bf16 and plugin else "no"
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision=precision,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=limit)],
        gradient_accumulation_steps=accumulation(config, world_size),
    )


def _join_again(limit: timedelta | None) -> None:
    """Meets the other ranks where a launcher (`--max_restarts`) has started all of them again.

    A static rendezvous keeps one store for all attempts, where ranks find the addresses of dead ones; so
    each later attempt gets names of its own in it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def accumulation(config: RunConfig, world_size: int) -> int:
    """Returns the micro-batches of one rank in one global step."""
    return config.train.packs_per_step // (world_size * config.train.micro_batch_packs)


def _complete_environment() -> None:
    if "RANK" in os.environ:
        return
    if "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']}: set without RANK, so this process does not know which "
            "rank it is. Start it with `accelerate launch` or torchrun, or unset MASTER_ADDR."
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(values | {"MASTER_PORT": str(port)})


def _plugin(config: RunConfig, world_size: int):
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"zero={config.zero.value}: deepspeed cannot be imported ({error}). Use zero=none, or Linux."
        ) from error
    from accelerate import DeepSpeedPlugin

    # Its first use would compile for a minute, for a shortcut between CPU ranks only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    zero: dict = {"stage": config.zero.stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    settings: dict = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_packs,
        "gradient_accumulation_steps": accumulation(config, world_size),
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.precision is Precision.bf16, "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.zero.stage >= 2:
        # Stage 1 with fp32 accumulation would switch DeepSpeed to another optimizer.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return DeepSpeedPlugin(hf_ds_config=settings)


def partition(model: nn.Module, settings: dict, device: torch.device) -> None:
    """Gives every parameter of a meta model its ZeRO-3 partition, with one whole parameter at a time."""
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=settings)
    for module in model.modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            whole = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
            init._convert_to_deepspeed_param(whole)
            whole.partition()  # type: ignore[attr-defined]
            setattr(module, name, whole)
