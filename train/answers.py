"""Answers to held-out prompts: which samples, on which rank, what the model says, and how right it is.

The samples are a fixed choice, the first of every source, whatever the number of ranks. Prompts of similar
length share a batch; every rank has equally many batches, so that weights spread over ranks can be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from data.counts import Tables
from data.encode import Encoder
from data.plan import SourceTable
from data.prompt import Prompt, PromptReader
from data.sample import Batch, Dropped, SampleRef
from train.config import EvalConfig, Precision
from train.engine import Engine
from train.generate import STOPS, generate
from train.measures import Score, corpus_scores, score

MOST_ROWS = 16
"""Prompts that are answered together have at most the tokens of this many rows of training."""


@dataclass(slots=True)
class Answer:
    """What the model said to a prompt, and to the same one with its media blanked if it has any."""

    prompt: Prompt
    output: str
    score: Score
    blank_output: str | None = None
    blank_score: Score | None = None

    def line(self) -> dict[str, Any]:
        """Returns what a file of answers holds of it."""
        return {
            "source": self.prompt.ref.source,
            "key": self.prompt.key,
            "modality": self.prompt.modality,
            "prompt": self.prompt.text,
            "reference": self.prompt.reference,
            "output": self.output,
            "blank_output": self.blank_output,
            "exact": self.score.exact,
            "cer": round(self.score.characters.rate, 6),
            "wer": round(self.score.words.rate, 6),
        }


class Answered(NamedTuple):
    """All answers, in the order of the tables, and how many samples have none, by source and cause."""

    answers: list[Answer]
    not_answered: dict[str, dict[str, int]]


class Answering:
    """Has an engine answer the first `eval.samples` samples of every held-out source.

    Every rank calls `check` before each batch, and it may raise.
    """

    def __init__(
        self,
        config: EvalConfig,
        engine: Engine,
        tables: Tables,
        encoder: Encoder,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        self.config = config
        self.engine = engine
        self.tables = tables
        self.reader = PromptReader(tables.folders, encoder)
        self.tokenizer = encoder.tokenizer
        self.stop = frozenset(encoder.tokenizer.special(name) for name in STOPS)

    def __call__(self) -> Answered:
        """Returns all answers, the same on every rank."""
        engine, config = self.engine, self.config
        most_tokens = MOST_ROWS * engine.config.data.pack.length
        rounds = deal_prompts(
            self.tables.tables, config.samples, config.batch, most_tokens, engine.rank, engine.world_size
        )
        hidden = None if engine.is_main else True  # None: shown on a terminal only
        answers: list[Answer] = []
        dropped: list[Dropped] = []
        for refs, media in tqdm(rounds, desc="answers", unit="batch", leave=False, disable=hidden):
            self.check()
            found, lost = self._answer(refs, blanked=media and config.blank)
            answers += found
            dropped += lost
        return self._gather(answers, dropped)

    def _gather(self, answers: list[Answer], dropped: list[Dropped]) -> Answered:
        # Where ranks outnumber prompts, some share one: the same answer twice, or the same fault.
        parts = self.engine.gather_objects((answers, dropped))
        found = {answer.prompt.ref: answer for part, _ in parts for answer in part}
        lost = {(item.source, item.shard, item.key): item.cause for _, part in parts for item in part}
        places = {table.name: place for place, table in enumerate(self.tables.tables)}
        ordered = sorted(found.values(), key=lambda answer: _order(answer.prompt.ref, places))
        not_answered: dict[str, Counter[str]] = {}
        for source, shard, key in sorted(lost):
            not_answered.setdefault(source, Counter())[lost[source, shard, key]] += 1
        return Answered(ordered, {source: dict(causes) for source, causes in not_answered.items()})

    def _answer(self, refs: list[SampleRef], *, blanked: bool) -> tuple[list[Answer], list[Dropped]]:
        work = self.reader.read(refs, blanked=blanked)
        answers = [
            Answer(prompt, output, score(prompt.reference, output))
            for prompt, output in zip(work.prompts, self._generate(work.batch))
        ]
        if work.blank is not None:
            outputs = self._generate(work.blank)
            for answer, row in zip(answers, work.blank_rows):
                answer.blank_output = outputs[row]
                answer.blank_score = score(answer.prompt.reference, outputs[row])
        return answers, work.batch.dropped

    def _generate(self, batch: Batch) -> list[str]:
        engine = self.engine
        engine.sign("answers to held-out samples")
        halved = engine.config.precision is Precision.bf16 and engine.config.zero.stage == 0
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=halved):
            found = generate(
                engine.model,  # type: ignore[arg-type]
                batch.to(engine.device),
                stop=self.stop,
                max_new_tokens=self.config.max_new_tokens,
                any_rank=self._any_rank if engine.config.zero.stage == 3 else bool,
            )
        return [self.tokenizer.decode(ids) for ids in found]

    def _any_rank(self, flag: bool) -> bool:
        return self.engine.sum_over_ranks([float(flag)])[0] > 0


def _order(ref: SampleRef, places: dict[str, int]) -> tuple[int, int, int]:
    return places[ref.source], ref.shard, ref.row


def deal_prompts(
    tables: list[SourceTable], samples: int, batch: int, most_tokens: int, rank: int, world_size: int
) -> list[tuple[list[SampleRef], bool]]:
    """Returns the batches of one rank, each with whether its prompts hold media.

    A batch has at most `batch` prompts and, padded to the longest, `most_tokens` tokens, unless it is one
    prompt alone. The longest come first: memory that does not suffice shows at once. All ranks have
    equally many batches, of similar length at the same time, and none is empty.
    """
    with_media: dict[bool, list[SampleRef]] = {False: [], True: []}
    for table in tables:
        for place in range(min(samples, len(table))):
            media = bool(table.slices[place] or table.audio_seconds[place])
            ref = SampleRef(
                table.name, int(table.shard[place]), int(table.row[place]), int(table.length[place])
            )
            with_media[media].append(ref)
    rounds = []
    for media, refs in with_media.items():
        refs.sort(key=lambda ref: -ref.length)
        start = 0
        while start < len(refs):
            rows = max(1, min(batch, most_tokens // refs[start].length)) * world_size
            shared = refs[start : start + rows]
            rounds.append((shared[rank::world_size] or shared[:1], media))
            start += rows
    return rounds


def summarise(answers: list[Answer]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns `answers` by source and, where any sample of a source was blanked, `blank_answers`.

    A sample without media counts with its own answer there: for it nothing changes.
    """
    by_source: dict[str, list[Answer]] = {}
    for answer in answers:
        by_source.setdefault(answer.prompt.ref.source, []).append(answer)
    found: dict[str, dict[str, dict[str, Any]]] = {"answers": {}, "blank_answers": {}}
    for source, part in by_source.items():
        found["answers"][source] = corpus_scores(answer.score for answer in part)
        if any(answer.blank_score for answer in part):
            blanked = (answer.blank_score or answer.score for answer in part)
            found["blank_answers"][source] = corpus_scores(blanked)
    return found
