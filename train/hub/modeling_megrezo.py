"""The exported model: transformers' Llama behind the towers and connectors that were trained with it.

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
model.chat([{"role": "user", "content": {"text": "What is this?", "image": "cat.jpg"}}])
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

from data.sample import AudioBatch, VisionBatch, move
from train.hub.configuration_megrezo import MegrezOConfig
from train.hub.processing_megrezo import MegrezOProcessor
from train.model.audio import Audio
from train.model.placement import place_media
from train.model.rotary import RotaryTable
from train.model.vision import Vision


class MegrezO(PreTrainedModel, GenerationMixin):
    """Text + image + audio language model, its weights under the names of the release."""

    config_class = MegrezOConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "VisionLayer", "Resampler", "AudioLayer"]

    def __init__(self, config: MegrezOConfig):
        super().__init__(config)
        sizes, media = config.sizes()
        self.llm = LlamaForCausalLM(config.llama())
        # Transformers keeps rotary frequencies in a buffer that is not stored with the weights.
        self.llm.model.rotary_emb = RotaryTable(sizes.llm.head_dim, sizes.llm.rope_theta)  # type: ignore[assignment]
        self.vision = Vision(sizes.vision, media.image, sizes.llm.width)
        self.audio = Audio(sizes.audio, media.audio, sizes.llm.width)
        self._processor: MegrezOProcessor | None = None
        self.post_init()

    def get_input_embeddings(self):
        """Returns the table of words."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        """Returns the layer that makes logits."""
        return self.llm.get_output_embeddings()

    def embed(self, input_ids: Tensor, vision: VisionBatch | None, audio: AudioBatch | None) -> Tensor:
        """Returns what enters the language model: words, with media in their places.

        Shapes: input_ids [B, L]; result [B, L, D].
        """
        words = self.get_input_embeddings()(input_ids)
        if vision is None or audio is None:
            return words
        seen, heard = move(vision, words.device), move(audio, words.device)
        return place_media(words.flatten(0, 1), seen, heard, self.vision, self.audio).view_as(words)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision: VisionBatch | None = None,
        audio: AudioBatch | None = None,
        **options: Any,
    ):
        """Returns what `LlamaForCausalLM` does: logits [B, L, V] and, with `labels`, the loss.

        Rows may be padded on the left. `vision` and `audio` come from the processor.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "input_ids or inputs_embeds"
            inputs_embeds = self.embed(input_ids, vision, audio)
        if position_ids is None and attention_mask is not None and options.get("past_key_values") is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.llm(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **options
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        vision: VisionBatch | None = None,
        audio: AudioBatch | None = None,
        **options: Any,
    ):
        """Returns the prompts with what follows them, [B, L + new]; options are those of transformers.

        Media are embedded once; the language model then generates by itself.
        """
        embedded = self.embed(input_ids, vision, audio)
        self.llm.generation_config = self.generation_config
        return self.llm.generate(  # type: ignore[operator]
            input_ids, inputs_embeds=embedded, attention_mask=attention_mask, **options
        )

    def chat(
        self,
        messages: list,
        processor: MegrezOProcessor | None = None,
        *,
        sampling: bool = False,
        max_new_tokens: int = 512,
        **options: Any,
    ) -> str | list[str]:
        """Returns the answer to a conversation, or the answers to a list of conversations.

        Args:
            messages: `{"role": ..., "content": ...}` each; content is a string, or an object with any of
                text, image and audio, the latter two a path or a list of paths.
            processor: the folder's own where none is given.
            sampling: draws tokens; `temperature`, `top_p` and `top_k` have no meaning without it.
            options: any other of `generate`.

        Raises:
            ValueError: the messages, or a file they name, cannot be used.
        """
        processor = processor or self._own_processor()
        if not sampling:
            options = {
                name: options[name] for name in options if name not in ("temperature", "top_p", "top_k")
            }
        inputs = processor(messages).to(self.device)
        tokens = self.generate(**inputs, do_sample=sampling, max_new_tokens=max_new_tokens, **options)
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers if isinstance(messages[0], list) else answers[0]

    def _own_processor(self) -> MegrezOProcessor:
        if self._processor is None:
            self._processor = MegrezOProcessor.from_pretrained(self.config._name_or_path)
        return self._processor
