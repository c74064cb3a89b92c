"""Rotary positions of the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Cosines and sines of rotary positions, without a buffer.

    A stored inverse-frequency buffer is rounded to half precision when the model is cast, which
    turns far positions by whole radians; and it is lost when a model is built on the meta device.
    """

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin), each [B, L, head_dim], in the dtype of x."""
        channels = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * (1.0 / self.theta ** (channels / self.head_dim))
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)
