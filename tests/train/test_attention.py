import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from train.model import attention
from train.model.attention import varlen_attention, varlen_options
from train.model.config import LLMConfig
from train.model.llm import ATTENTION, build_llm, llama_config
from train.model.rotary import RotaryTable

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def tensors(lengths_q, lengths_k, dtype=torch.float64, device="cpu"):
    sizes = [(sum(lengths_q), HEADS), (sum(lengths_k), KV_HEADS), (sum(lengths_k), KV_HEADS)]
    torch.manual_seed(0)
    return [torch.randn(*s, HEAD_DIM, dtype=dtype, device=device, requires_grad=True) for s in sizes]


def masked_reference(q, k, v, lengths_q, lengths_k, causal):
    """One softmax over all keys, with every key of another segment masked out."""
    segment_q = torch.repeat_interleave(torch.arange(len(lengths_q)), torch.tensor(lengths_q))
    segment_k = torch.repeat_interleave(torch.arange(len(lengths_k)), torch.tensor(lengths_k))
    allowed = segment_q[:, None] == segment_k[None]
    if causal:
        allowed &= torch.arange(len(q))[:, None] >= torch.arange(len(k))[None]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    weights = scores.masked_fill(~allowed, -1e30).softmax(-1) * allowed
    return torch.einsum("hqk,khd->qhd", weights, v)


def check(lengths_q, lengths_k, causal):
    q, k, v = tensors(lengths_q, lengths_k)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    out = varlen_attention(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), causal)
    expected = masked_reference(q, k, v, lengths_q, lengths_k, causal)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    want = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    assert_close(got, want)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
def test_causal_attention_equals_a_masked_softmax_with_gradients(lengths):
    check(lengths, lengths, causal=True)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=8))
def test_cross_attention_equals_a_masked_softmax_with_gradients(pairs):
    pairs.append((2, 3))
    check([q for q, _ in pairs], [k for _, k in pairs], causal=False)


def test_segments_of_equal_length_share_one_sdpa_call(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: calls.append(len(q)) or real(q, *args, **kwargs),
    )
    lengths = [4, 4, 4, 7, 7, 4]
    q, k, v = tensors(lengths, lengths)
    varlen_attention(q, k, v, cumulative(lengths), cumulative(lengths), 7, 7, causal=True)
    assert calls == [3, 2, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("is_causal",), {"is_causal": True}),
        (("scale", "window_size"), {"window_size": (-1, 0)}),
        (("window_size", "enable_gqa"), {"window_size": (-1, 0), "enable_gqa": True}),
    ],
    ids=["torch 2.10", "torch 2.11", "torch 2.12"],
)
def test_every_torch_version_is_asked_for_causal_attention_in_its_own_words(names, expected):
    assert varlen_options(names, causal=True, grouped=True) == expected


def test_the_installed_varlen_kernel_knows_every_argument_we_pass():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    for causal in (True, False):
        signature.bind(*[None] * 7, **varlen_options(signature.parameters, causal, grouped=True))


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_on_cuda_is_one_call_that_reads_no_lengths_from_the_device(causal, monkeypatch):
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(attention, "_cuda_kernel", attention._torch_kernel)
    with FakeTensorMode(), torch.no_grad():  # shapes without data: reading one raises
        q, k = (torch.empty(21, h, 8, device="cuda", dtype=torch.bfloat16) for h in (HEADS, KV_HEADS))
        cu = torch.empty(4, device="cuda", dtype=torch.int32)
        out = varlen_attention(q, k, k, cu, cu, 9, 9, causal)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
        with pytest.raises(DataDependentOutputException):
            varlen_attention(q.float(), k.float(), k.float(), cu, cu, 9, 9, causal)


def test_half_precision_under_autocast_is_the_attention_of_cast_inputs():
    lengths = [3, 5]
    q, k, v = (x.detach() for x in tensors(lengths, lengths, torch.float32))
    cu = cumulative(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), cu, cu, 5, 5, causal=True)
    expected = varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu, cu, 5, 5, causal=True)
    assert out.dtype is torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [True, False])
def test_the_cuda_kernel_equals_the_per_segment_path(causal):
    lengths = [5, 0, 33, 33, 128]
    inputs = tensors(lengths, lengths, torch.float32, "cuda")
    cu = cumulative(lengths).cuda()
    arguments = (cu, cu, max(lengths), max(lengths), causal)
    exact = varlen_attention(*inputs, *arguments)
    fast = varlen_attention(*(x.bfloat16() for x in inputs), *arguments)
    assert_close(fast.float(), exact, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(exact)
    got = torch.autograd.grad((fast.float() * upstream).sum(), inputs)
    want = torch.autograd.grad((exact * upstream).sum(), inputs)
    assert_close(got, want, atol=5e-2, rtol=5e-2)


LLM = LLMConfig(width=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=97)


@pytest.fixture(scope="module")
def llamas():
    """A stock Llama on SDPA and ours on our attention, with the same weights."""
    torch.manual_seed(0)
    ours = build_llm(LLM).eval()
    with torch.no_grad():  # large enough for attention to decide which token comes next
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    config = copy.deepcopy(llama_config(LLM))
    config._attn_implementation = "sdpa"
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict(ours.state_dict())
    assert (ours.config._attn_implementation, stock.config._attn_implementation) == (ATTENTION, "sdpa")
    return ours, stock


@torch.no_grad()
def test_llama_without_segments_equals_stock_sdpa_with_left_padding(llamas):
    ours, stock = llamas
    ids = torch.randint(0, LLM.vocab, (3, 11))
    mask = (torch.arange(11)[None] >= torch.tensor([[0], [4], [7]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    want = stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert_close(got[mask.bool()], want[mask.bool()], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_llama_with_segments_equals_each_document_alone(llamas):
    ours, stock = llamas
    lengths = [5, 9, 2]
    documents = [torch.randint(0, LLM.vocab, (1, n)) for n in lengths]
    packed = ours.model(
        input_ids=torch.cat(documents, 1),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        use_cache=False,
        cu_seq_lens_q=cumulative(lengths),
        cu_seq_lens_k=cumulative(lengths),
        max_length_q=9,
        max_length_k=9,
    ).last_hidden_state
    alone = torch.cat([stock.model(input_ids=ids).last_hidden_state for ids in documents], 1)
    assert_close(packed, alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_cached_greedy_generation_of_padded_prompts_equals_stock_sdpa(llamas):
    ours, stock = llamas
    ids = torch.randint(0, LLM.vocab, (3, 8))
    mask = (torch.arange(8)[None] >= torch.tensor([[0], [3], [6]])).long()
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    want = stock.generate(ids, **options)
    assert len(want[:, 8:].unique()) > 12
    assert torch.equal(ours.generate(ids, **options), want)
    assert torch.equal(ours.generate(ids, use_cache=False, **options), want)


def test_rope_keeps_its_theta_and_stays_exact_when_the_model_is_cast():
    theta = 5_000_000.0
    config = llama_config(LLMConfig(rope_theta=theta))
    stock = LlamaRotaryEmbedding(config)
    positions = torch.tensor([[0, 1, 2, 1000, 4095]])
    expected = stock(torch.zeros(1), positions)
    assert_close(RotaryTable(64, theta).bfloat16()(torch.zeros(1), positions), expected, atol=1e-6, rtol=1e-6)
