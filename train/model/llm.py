"""The language model: transformers' Llama with our attention, our head and a rotary table that keeps fp32."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from train.model.attention import varlen_attention
from train.model.config import LLMConfig
from train.model.head import LossHead
from train.model.rotary import RotaryTable

ATTENTION = "segments"
"""Name of our attention in transformers' tables, under which an unmodified model finds it."""


def llama_config(config: LLMConfig) -> LlamaConfig:
    """Returns the transformers config: no biases, untied embeddings, plain rope."""
    return LlamaConfig(
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rope_theta=config.rope_theta,  # type: ignore[call-arg]  # where older readers look for it
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=ATTENTION,  # type: ignore[call-arg]
    )


def build_llm(config: LLMConfig) -> LlamaForCausalLM:
    """Returns an untrained language model whose `lm_head` also computes the loss."""
    llm = LlamaForCausalLM(llama_config(config))
    llm.model.rotary_emb = RotaryTable(config.head_dim, config.rope_theta)  # type: ignore[assignment]
    llm.lm_head = LossHead(config.width, config.vocab, bias=False)
    return llm


def _transformers_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention function in transformers' form: tensors are [1, H, T, d], the result [1, T, H, d].

    Without segments (generation with a cache, padded batches) it is transformers' SDPA, whose mask
    `AttentionMaskInterface` builds under the same name.
    """
    if options.get("cu_seq_lens_q") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert query.shape[0] == 1 and scaling in (None, query.shape[-1] ** -0.5)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    segments = (options[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    return varlen_attention(q, k, v, *segments, causal=True)[None], None


AttentionInterface.register(ATTENTION, _transformers_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
