"""The output layer and its loss, without ever holding the logits of all rows.

Logits of 122,880 words take half a megabyte a row in fp32. They are made, turned into gradients
and dropped for a thousand rows at a time, in the forward pass, so the backward pass only scales.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 1024


class LossHead(nn.Linear):
    """A linear layer that returns logits, or, given targets, the loss.

    One call per micro-batch whatever the number of rows: with partitioned parameters (ZeRO-3)
    ranks that called it a different number of times would wait for each other forever.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits [..., V]; with targets, the weighted sum of losses and each row's loss.

        The sum is an fp32 scalar that carries the gradient; the losses of rows are fp32 [S] and
        detached. S may be 0: gradients are zeros then, not missing.

        Shapes: hidden [..., D], or [S, D] with targets int64 [S] and weights float32 [S].
        """
        if targets is None:
            return super().forward(hidden)
        assert weights is not None and self.bias is None
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        with torch.autocast(device, enabled=False):
            return _ChunkedLoss.apply(  # type: ignore[return-value]
                hidden, self.weight, targets, weights, dtype, torch.is_grad_enabled()
            )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, dtype, grad_enabled):
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        matrix = weight.to(dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk = hidden[rows].to(dtype)
            log_probs = torch.log_softmax(chunk @ matrix.t(), dim=-1, dtype=torch.float32)
            losses[rows] = -log_probs.gather(1, targets[rows, None])[:, 0]
            if grad_hidden is None and grad_weight is None:
                continue
            grad = _grad_logits(log_probs, targets[rows], weights[rows], dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ matrix
            if grad_weight is not None:
                grad_weight += grad.t() @ chunk
            del log_probs, grad  # else they live on beside the next chunk's
        ctx.grads = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, _):
        grad_hidden, grad_weight = ctx.grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_sum
        if grad_weight is not None:
            # Written in the weight's dtype at once: a product in fp32 would be another 1.3 GB.
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_sum, out=scaled)
        return grad_hidden, grad_weight, None, None, None, None


def _grad_logits(log_probs: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns weights * (softmax - one-hot), overwriting `log_probs`."""
    grad = log_probs.exp_()
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    return grad.mul_(weights[:, None]).to(dtype)
