import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from train.model import head
from train.model.head import LossHead

WIDTH, VOCAB, ROWS = 12, 50, 23


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ROWS", 5)


def inputs(dtype=torch.float64, rows=ROWS):
    torch.manual_seed(0)
    layer = LossHead(WIDTH, VOCAB, bias=False, dtype=dtype)
    hidden = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)
    return layer, hidden, torch.randint(0, VOCAB, (rows,)), torch.rand(rows)


def reference(layer, hidden, targets, weights):
    losses = F.cross_entropy(F.linear(hidden, layer.weight).float(), targets, reduction="none")
    return (losses * weights).sum(), losses


def test_loss_and_gradients_equal_cross_entropy_for_any_upstream_scale():
    layer, *rest = inputs()
    total, losses = layer(*rest)
    expected, expected_losses = reference(layer, *rest)
    assert_close(total, expected)
    assert_close(losses, expected_losses)
    assert total.dtype is losses.dtype is torch.float32 and not losses.requires_grad
    for scale in (1.0, 1 / 7, -3.0):
        got = torch.autograd.grad(total * scale, (rest[0], layer.weight), retain_graph=True)
        want = torch.autograd.grad(expected * scale, (rest[0], layer.weight), retain_graph=True)
        assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_only_what_requires_a_gradient_gets_one(frozen):
    layer, hidden, targets, weights = inputs()
    (layer.weight if frozen == "weight" else hidden).requires_grad_(False)
    layer(hidden, targets, weights)[0].backward()
    reached = hidden if frozen == "weight" else layer.weight
    (want,) = torch.autograd.grad(reference(layer, hidden, targets, weights)[0], [reached])
    assert_close(reached.grad, want, rtol=1e-5, atol=1e-6)
    assert (layer.weight if frozen == "weight" else hidden).grad is None


def test_no_rows_give_a_zero_loss_and_zero_gradients():
    layer, hidden, targets, weights = inputs(torch.float32, rows=0)
    total, losses = layer(hidden, targets, weights)
    assert total.item() == 0.0 and losses.shape == (0,)
    total.backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_without_gradients_only_losses_are_computed(monkeypatch):
    layer, *rest = inputs()
    expected = reference(layer, *rest)
    monkeypatch.setattr(head, "_grad_logits", lambda *_: pytest.fail("made gradients under no_grad"))
    with torch.no_grad():
        assert_close(layer(*rest), expected)


def test_logits_of_all_rows_never_exist_at_once():
    layer, *rest = inputs(torch.float32, rows=40)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == VOCAB:
                largest = max(largest, len(out))
            return out

    with Watch():
        layer(*rest)[0].backward()
    # The weight seen from its side is [WIDTH, VOCAB].
    assert largest == max(5, WIDTH)


def test_a_half_precision_weight_sums_its_gradient_over_chunks_in_fp32():
    layer, hidden, targets, weights = inputs(torch.float32, rows=400)
    half = LossHead(WIDTH, VOCAB, bias=False, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    layer.load_state_dict(half.state_dict())
    rounded = hidden.detach().bfloat16().requires_grad_()
    half(rounded, targets, weights)[0].backward()
    exact = rounded.detach().float().requires_grad_()
    layer(exact, targets, weights)[0].backward()
    assert half.weight.grad.dtype is torch.bfloat16 and rounded.grad.dtype is torch.bfloat16
    scale = layer.weight.grad.abs().max()
    assert (half.weight.grad - layer.weight.grad).abs().max() < 0.01 * scale


def test_autocast_computes_in_bf16_and_returns_gradients_in_the_weights_dtype():
    layer, hidden, targets, weights = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = layer(hidden, targets, weights)
        expected = F.cross_entropy(layer(hidden).float(), targets, reduction="none")
    assert_close(losses, expected)
    total.backward()
    assert layer.weight.grad.dtype is hidden.grad.dtype is torch.float32
    (want,) = torch.autograd.grad(reference(layer, hidden, targets, weights)[0], [layer.weight])
    assert_close(layer.weight.grad, want, atol=0.03, rtol=0.03)


def test_without_targets_it_is_a_linear_layer():
    layer, hidden, *_ = inputs()
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))
