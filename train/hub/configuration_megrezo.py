"""Config of an exported model: what its config.json says, and our config dataclasses behind it."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig

from data.geometry import MediaConfig
from train.model.config import ModelConfig
from train.release import sizes_of

LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class MegrezOConfig(PretrainedConfig):
    """The content of config.json as attributes, under the release's names."""

    model_type = "megrezo"

    def __init__(self, **values):
        super().__init__(**values)

    def sizes(self) -> tuple[ModelConfig, MediaConfig]:
        """Returns the sizes of every part.

        Raises:
            ValueError: one is missing or not supported.
        """
        return sizes_of(self.to_dict())

    def llama(self) -> LlamaConfig:
        """Returns the config of the language model alone."""
        llm = self.sizes()[0].llm
        return LlamaConfig(
            **{name: getattr(self, name, None) for name in LLAMA},
            head_dim=llm.head_dim,
            rope_theta=llm.rope_theta,  # type: ignore[call-arg]  # version 4 asks here
            rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
            tie_word_embeddings=False,
            attn_implementation=self._attn_implementation,  # type: ignore[call-arg]
        )
