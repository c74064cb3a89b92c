"""One attention for every part of the model: segments of different lengths laid end to end.

The language model's documents, the slices of pictures, the clips and the resampler's queries all
go through `varlen_attention`, so no token ever attends outside its own segment and nothing is
padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) v within each segment. Empty segments are allowed.

    On CUDA in half precision this is one kernel and never waits for the device; on the CPU, and in
    fp32 on CUDA, it is one SDPA call per run of segments of equal length.

    Shapes: q [Tq, H, d]; k, v [Tk, Hkv, d], Hkv dividing H; cu_q, cu_k int32 [segments + 1],
    from 0 to Tq and Tk; result [Tq, H, d]. With `causal`, a segment has as many keys as queries.
    """
    q, k, v = _autocast(q, k, v)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        kernel = _cuda_kernel()
        if kernel is not None:
            return kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal)
    return _per_segment(q, k, v, cu_q, cu_k, causal)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Rotary embeddings leave q and k in fp32 under autocast while v is already in half precision.
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _per_segment(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    lengths = zip(_lengths(cu_q), _lengths(cu_k))
    runs = [(pair, len(list(group))) for pair, group in groupby(lengths)]
    # One split per tensor: slicing run by run would cost a whole-size gradient for every run.
    queries = q.split([count * len_q for (len_q, _), count in runs])
    keys = k.split([count * len_k for (_, len_k), count in runs])
    values = v.split([count * len_k for (_, len_k), count in runs])
    parts = [
        _run(q_run, k_run, v_run, count, len_k, causal)
        for q_run, k_run, v_run, ((_, len_k), count) in zip(queries, keys, values, runs)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _lengths(cu: Tensor) -> list[int]:
    ends = cu.tolist()
    return [stop - start for start, stop in pairwise(ends)]


def _run(q: Tensor, k: Tensor, v: Tensor, count: int, len_k: int, causal: bool) -> Tensor:
    """Returns attention over `count` segments of equal length, stacked by a view."""
    if not len(q) or not len_k:
        return torch.zeros_like(q)
    assert not causal or len(q) == len(k)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=1)
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """Returns the fastest variable-length kernel installed, or None."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return _torch_kernel()

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)

    return kernel


def _torch_kernel() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10
        return None
    known = inspect.signature(varlen_attn).parameters

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        options = varlen_options(known, causal, grouped=q.shape[1] != k.shape[1])
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        assert isinstance(out, Tensor)
        return out

    return kernel


def varlen_options(known, causal: bool, grouped: bool) -> dict[str, Any]:
    """Returns keyword arguments of torch's `varlen_attn`, by the parameter names its version knows.

    torch 2.10 has `is_causal`, 2.11 has `window_size` instead, 2.12 adds `enable_gqa`; before it,
    grouped heads need no word.
    """
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in known:
        options["enable_gqa"] = grouped
    return options
