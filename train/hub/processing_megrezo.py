"""The exported model's processor: conversations in, tokens and media arrays out, as in training.

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model.generate(**processor(messages), max_new_tokens=100)
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils.hub import cached_file

from data.collate import BlankSegment, collate
from data.config import DataConfig, PackConfig
from data.encode import Encoder
from data.media import audio_num_samples, image_size
from data.sample import EncodedSample, MediaSize, Message, Part, Sample, SampleError
from data.tokenizer import TextTokenizer
from train.release import sizes_of, template_of

ROLES = ("system", "user", "assistant")
MEDIA = ("image", "audio")
FROM_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MegrezOProcessor(ProcessorMixin):
    """Encodes conversations under the template and the media sizes of the folder's config.json."""

    attributes: ClassVar = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: Encoder):
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.chat_template = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> MegrezOProcessor:  # type: ignore[override]
        """Returns the processor of an exported folder, or of such a folder on a hub."""
        options = {name: options[name] for name in options if name in FROM_HUB}

        def read(name: str) -> bytes:
            found = cached_file(folder, name, **options)
            assert isinstance(found, str)
            return Path(found).read_bytes()

        content = json.loads(read("config.json"))
        model, media = sizes_of(content)
        config = DataConfig(
            template=template_of(content), pack=PackConfig(length=model.llm.max_positions), workers=0
        )
        encoder = Encoder(config, media, TextTokenizer(read("tokenizer.json")))
        return cls(PreTrainedTokenizerFast.from_pretrained(folder, **options), encoder)

    def __call__(self, messages: list, add_generation_prompt: bool = True) -> BatchFeature:  # type: ignore[override]
        """Returns `input_ids`, `attention_mask`, `vision` and `audio` of one conversation or of several.

        Args:
            messages: a conversation, or a list of conversations. Rows are padded on the left.
            add_generation_prompt: ends with an assistant header. Without it, a conversation has an
                answer and ends with it.

        Shapes: input_ids, attention_mask int64 [B, L].

        Raises:
            ValueError: the messages, or a file they name, cannot be used.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages: is no list of messages. Give at least one, with role and content.")
        conversations = messages if isinstance(messages[0], list) else [messages]
        return self._pad(
            [self._encode(conversation, add_generation_prompt) for conversation in conversations]
        )

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:  # type: ignore[override]
        """Writes tokenizer and processor_config.json beside a model that was saved there."""
        self.tokenizer.save_pretrained(folder)
        name = type(self).__name__
        content = {"processor_class": name, "auto_map": {"AutoProcessor": f"processing_megrezo.{name}"}}
        (Path(folder) / "processor_config.json").write_text(json.dumps(content))

    def decode(self, tokens, **options: Any) -> str:
        """Returns the text of a row of tokens."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False, **options)  # type: ignore[return-value]

    def batch_decode(self, rows, **options: Any) -> list[str]:
        """Returns the texts of rows of tokens."""
        return [self.decode(row, **options) for row in rows]

    def _encode(self, conversation: list, add_generation_prompt: bool) -> EncodedSample:
        sample = Sample("messages", [])
        sample.messages = [_message(turn, number, sample.media) for number, turn in enumerate(conversation)]
        limits = self.encoder.config.limits
        sizes = {}
        for name, data in sample.media.items():
            if name.endswith("image"):
                width, height = image_size(data, limits)
                sizes[name] = MediaSize("image", width=width, height=height)
            else:
                sizes[name] = MediaSize("audio", num_samples=audio_num_samples(data, limits))
        try:
            if add_generation_prompt:
                sample.messages.append(Message("assistant", []))
                layout = self.encoder.lay_out_prompt(sample, sizes)
            else:
                layout = self.encoder.lay_out(sample, sizes)
            return self.encoder.fill(layout, sample, "", sizes)
        except SampleError as error:
            if error.cause == "oversize":
                most = self.encoder.config.pack.length
                raise ValueError(
                    f"messages: longer than the {most} tokens of the model. Shorten it."
                ) from error
            raise ValueError(f"messages: {error}.") from error

    def _pad(self, rows: list[EncodedSample]) -> BatchFeature:
        longest = max(len(row.input_ids) for row in rows)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        packs: list[list] = []
        for place, row in enumerate(rows):
            missing = longest - len(row.input_ids)
            mask[place, missing:] = 1
            packs.append([BlankSegment(missing, None), row])  # type: ignore[arg-type]
        pad_id = self.encoder.tokenizer.special("<|pad|>")
        batch = collate(packs, longest, self.encoder.media, pad_id, "token")
        parts = {"vision": batch.vision, "audio": batch.audio}
        return BatchFeature({"input_ids": batch.input_ids, "attention_mask": mask, **parts})


def _message(turn: Any, number: int, media: dict[str, bytes]) -> Message:
    where = f"messages[{number}]"
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise ValueError(f"{where}: has no known role. Use {', '.join(ROLES)}.")
    content = turn.get("content")
    fields = {"text": content} if isinstance(content, str) else content
    if not isinstance(fields, dict) or set(fields) - {"text", *MEDIA}:
        raise ValueError(f"{where}.content: must be a string, or an object of text, image and audio.")
    parts = []
    for kind in MEDIA:
        for source in _listed(fields.get(kind)):
            name = f"{len(media)}.{kind}"
            media[name] = _bytes_of(source, f"{where}.content.{kind}")
            parts.append(Part(kind, media=name))  # type: ignore[arg-type]
    if text := fields.get("text"):
        parts.append(Part("text", text=text))
    return Message(turn["role"], parts)


def _listed(value: Any) -> Iterator[Any]:
    if value is not None:
        yield from value if isinstance(value, list | tuple) else [value]


def _bytes_of(source: Any, where: str) -> bytes:
    """Returns the encoded bytes of a file, of a picture of Pillow, or those given."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.save(file, "PNG")
        return file.getvalue()
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"{where}: is a {type(source).__name__}. Give a path, bytes, or a picture.")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{where}={str(source)!r}: there is no such file. Give the path of a local file.")
    return path.read_bytes()
