"""From held-out samples to prompts: all that stands before the last answer, and that answer as reference.

A prompt goes through the same template, encoder and collation as a training sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data.blank import blank
from data.collate import collate
from data.encode import Encoder
from data.index import FolderIndex
from data.sample import Batch, Dropped, EncodedSample, SampleError, SampleRef
from data.shards import ShardReader
from data.template import Rendered, answer_text
from data.tokenizer import TextTokenizer


@dataclass(slots=True)
class Prompt:
    """A question to the model. `text` is all it sees, with `<image>` and `<audio>` for media."""

    ref: SampleRef
    key: str
    modality: str
    text: str
    reference: str


@dataclass(slots=True)
class PromptBatch:
    """Prompts and, in the same order, their tokens and media: one row, laid end to end.

    `batch.samples` has an entry per prompt; `batch.dropped` names those that could not be used.
    `blank` holds the same with their media blanked, where it was asked for. Many differ in nothing then:
    each is there once, and `blank_rows` says which row stands for each prompt.
    """

    prompts: list[Prompt]
    batch: Batch
    blank: Batch | None = None
    blank_rows: list[int] = field(default_factory=list)


class PromptReader:
    """Reads prompts out of indexed folders. Files are opened when first needed."""

    def __init__(self, folders: dict[str, FolderIndex], encoder: Encoder):
        self.folders = folders
        self.encoder = encoder
        self._readers = {name: ShardReader(folder, name) for name, folder in folders.items()}

    def read(self, refs: list[SampleRef], *, blanked: bool = False) -> PromptBatch:
        """Returns the prompts of some samples, `blanked` too; those that cannot be used are left out.

        Without any usable one it is a batch of one padding token and no prompt, since a model that is
        spread over ranks must run on all of them.

        Raises:
            RuntimeError: a shard is gone or changed.
        """
        prompts: list[Prompt] = []
        encoded: list[EncodedSample] = []
        dropped: list[Dropped] = []
        for ref in refs:
            try:
                prompt, sample = self._load(ref)
            except SampleError as error:
                if error.cause == "shard_unreadable":
                    raise RuntimeError(str(error)) from error
                shard = self.folders[ref.source].shards[ref.shard]
                dropped.append(Dropped(ref.source, shard.name, shard.keys[ref.row], error.cause, str(error)))
                continue
            prompts.append(prompt)
            encoded.append(sample)
        batch = collate_prompts(encoded, self.encoder)
        batch.dropped = dropped
        if not blanked:
            return PromptBatch(prompts, batch)
        distinct, rows = _distinct_when_blank(encoded)
        return PromptBatch(prompts, batch, blank(collate_prompts(distinct, self.encoder)), rows)

    def _load(self, ref: SampleRef) -> tuple[Prompt, EncodedSample]:
        sample = self._readers[ref.source].read(ref.shard, ref.row, media=True)
        sizes = self.folders[ref.source].shards[ref.shard].sizes(ref.row)
        layout = self.encoder.lay_out_prompt(sample, sizes)
        encoded = self._fill(layout, sample, ref, sizes)
        text = prompt_text(layout.rendered, self.encoder.tokenizer)
        prompt = Prompt(ref, sample.key, encoded.modality, text, answer_text(sample.messages))
        return prompt, encoded

    def _fill(self, layout, sample, ref: SampleRef, sizes) -> EncodedSample:
        try:
            return self.encoder.fill(layout, sample, ref.source, sizes)
        except (SampleError, MemoryError):
            raise
        except Exception as error:
            # The sample border: whatever a decoder throws at hostile bytes must not end the evaluation.
            raise SampleError(f"{type(error).__name__}: {error}", cause="unexpected") from error


def _distinct_when_blank(encoded: list[EncodedSample]) -> tuple[list[EncodedSample], list[int]]:
    """Returns samples that differ in more than the content of their media, and which one each is like."""
    looks = [
        (item.input_ids.tobytes(), tuple(item.grids), tuple(clip.shape for clip in item.clips))
        for item in encoded
    ]
    rows = {look: row for row, look in enumerate(dict.fromkeys(looks))}
    distinct = {rows[look]: item for look, item in zip(looks, encoded)}
    return [distinct[row] for row in range(len(rows))], [rows[look] for look in looks]


def collate_prompts(prompts: list[EncodedSample], encoder: Encoder) -> Batch:
    """Returns prompts as one row of exactly their length, or one padding token without any."""
    length = sum(len(prompt.input_ids) for prompt in prompts)
    pad_id = encoder.tokenizer.special("<|pad|>")
    return collate([prompts], max(length, 1), encoder.media, pad_id, "token")  # type: ignore[list-item]


def prompt_text(rendered: Rendered, tokenizer: TextTokenizer) -> str:
    """Returns tokens as text, with `<image>` or `<audio>` for every span of media."""
    text, place = "", 0
    for span in rendered.spans:
        text += tokenizer.decode(rendered.input_ids[place : span.start].tolist()) + f"<{span.kind}>"
        place = span.stop
    return text + tokenizer.decode(rendered.input_ids[place:].tolist())
