"""Views into what a rank holds: pieces of parameters and of their AdamW moments, by name and range.

ZeRO flattens parameters into partitions of its own layout. These functions read that layout (of
DeepSpeed's stages 1, 2 and 3) and hand out views that may be read or written, so that
train/checkpoint.py needs to know nothing about partitions. Each is proved by tests that replay steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from train.model.shapes import weight_name

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter, as views that may be read or written.

    `tensors` holds `weight` (fp32 master where it trains) and, where it trains, both moments.
    `replicated` says that every rank holds the same fragment.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    replicated: bool = False


class NamedShapes:
    """Names (of weights, as stored) and whole shapes of a model's parameters, partitioned (ZeRO-3) or not."""

    def __init__(self, model: nn.Module) -> None:
        self._facts = {
            id(p): (weight_name(name), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in model.named_parameters()
        }

    def __getitem__(self, parameter: torch.Tensor) -> tuple[str, tuple[int, ...]]:
        return self._facts[id(parameter)]


def whole_fragments(model: nn.Module, optimizer, *, trained: bool) -> Iterator[Fragment]:
    """Yields whole parameters, for ranks that each hold all of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != trained:
            continue
        state = optimizer.state.get(parameter, {}) if trained else {}
        tensors = {"weight": parameter.data} | {key: state[key] for key in MOMENTS if key in state}
        flat = {key: tensor.view(-1) for key, tensor in tensors.items()}
        yield Fragment(weight_name(name), 0, parameter.numel(), tuple(parameter.shape), flat, replicated=True)


def stage12_fragments(zero: Any, rank: int, names: NamedShapes) -> Iterator[Fragment]:
    """Yields the trained pieces of ZeRO 1 or 2: each group is one flat buffer cut into equal partitions."""
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        begin = zero.partition_size[index] * rank
        end = begin + zero.partition_size[index]
        offsets = zero.round_robin_bit16_offsets[index]
        for parameter, offset in zip(zero.round_robin_bit16_groups[index], offsets):
            first, last = max(offset, begin), min(offset + parameter.numel(), end)
            if first < last:
                piece = (first - offset, last - offset)
                yield _piece(zero.optimizer, names[parameter], piece, flat, first - begin)


def stage3_fragments(zero: Any, rank: int, names: NamedShapes) -> Iterator[Fragment]:
    """Yields the trained pieces of ZeRO 3: each parameter is cut into equal, padded parts."""
    for group in zero.fp16_groups:
        for parameter in group:
            sub_group, place, size = zero.grad_position[zero.get_param_id(parameter)]
            piece = (size * rank, min(size * (rank + 1), parameter.ds_numel))
            if piece[0] < piece[1]:
                flat = zero.fp32_partitioned_groups_flat[sub_group]
                yield _piece(zero.optimizer, names[parameter], piece, flat, place)


def stage3_frozen_fragments(model: nn.Module, rank: int, names: NamedShapes) -> Iterator[Fragment]:
    """Yields the frozen pieces of ZeRO 3."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        total: int = parameter.ds_numel  # type: ignore[attr-defined]
        first, last = part.ds_numel * rank, min(part.ds_numel * (rank + 1), total)
        if first < last:
            name, shape = names[parameter]
            yield Fragment(name, first, last, shape, {"weight": part.data.view(-1)[: last - first]})


def _piece(optimizer, named, piece: tuple[int, int], flat: torch.Tensor, place: int) -> Fragment:
    state = optimizer.state.get(flat, {})
    sources = {"weight": flat.data} | {key: state[key] for key in MOMENTS if key in state}
    views = {key: source.narrow(0, place, piece[1] - piece[0]) for key, source in sources.items()}
    return Fragment(named[0], *piece, named[1], views)


def step_count(optimizer) -> int:
    """Returns how many updates AdamW has applied."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"optimizer steps differ: {counts}"
    return counts.pop() if counts else 0


def start_state(optimizer, parameter: torch.Tensor, steps: int) -> None:
    """Gives `parameter` zero moments in the form torch's AdamW or DeepSpeed's CPU Adam keeps them."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.AdamW):
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
    else:
        state["step"] = steps
    for key in MOMENTS:
        state[key] = torch.zeros_like(parameter.data)
