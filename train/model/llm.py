"""The language model: transformers' Llama with our attention, our head and a rotary table that keeps fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from train.model.attention import ATTENTION
from train.model.config import LLMConfig
from train.model.head import LossHead


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
