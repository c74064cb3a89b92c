"""Meets the other ranks, and builds the engine that a config asks for."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from train.compose import refuse_world
from train.config import Precision, RunConfig
from train.engine.ddp import DDPEngine
from train.engine.interface import collective_timeout
from train.engine.zero import DeepSpeedEngine


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


def build_engine(config: RunConfig, accelerator, model: nn.Module) -> DDPEngine | DeepSpeedEngine:
    """Returns the engine of the kind `config.zero` asks for around a model on the meta device.

    Its weights have no values yet: `train.checkpoint.copy_weights` or `restore_checkpoint` fills them.
    """
    return (DeepSpeedEngine if config.zero.stage else DDPEngine)(config, accelerator, model)


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
