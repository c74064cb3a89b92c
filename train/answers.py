"""Answers to held-out prompts: which samples, on which rank, what the model says, and how right it is.

The samples are a fixed choice, the first of every source, whatever the number of ranks. Prompts of similar
length share a batch; every rank has equally many batches, so that weights spread over ranks can be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from data.counts import Tables
from data.encode import Encoder
from data.plan import SourceTable
from data.prompt import Prompt, PromptReader
from data.sample import Batch, SampleRef
from train.config import EvalConfig, Precision
from train.engine import Engine
from train.generate import generate
from train.measures import Score, corpus_scores, score

STOPS = ("<|turn_end|>", "<|eos|>")
"""Special tokens that end an answer."""


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


class Answering:
    """Has an engine answer the first `eval.samples` samples of every held-out source."""

    def __init__(self, config: EvalConfig, engine: Engine, tables: Tables, encoder: Encoder) -> None:
        self.config = config
        self.engine = engine
        self.tables = tables
        self.reader = PromptReader(tables.folders, encoder)
        self.tokenizer = encoder.tokenizer
        self.stop = frozenset(encoder.tokenizer.special(name) for name in STOPS)

    def __call__(self) -> list[Answer]:
        """Returns all answers, on every rank, in the order of the tables."""
        engine, config = self.engine, self.config
        rounds = deal_prompts(
            self.tables.tables, config.samples, config.batch, engine.rank, engine.world_size
        )
        hidden = None if engine.is_main else True  # None: shown on a terminal only
        mine: list[Answer] = []
        for refs, media in tqdm(rounds, desc="answers", unit="batch", leave=False, disable=hidden):
            mine += self._answer(refs, blanked=media and config.blank)
        # Where ranks outnumber prompts, some share one: the same answer twice.
        found = {answer.prompt.ref: answer for part in engine.gather_objects(mine) for answer in part}
        places = {table.name: place for place, table in enumerate(self.tables.tables)}
        return sorted(found.values(), key=lambda answer: _order(answer.prompt.ref, places))

    def _answer(self, refs: list[SampleRef], *, blanked: bool) -> list[Answer]:
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
        return answers

    def _generate(self, batch: Batch) -> list[str]:
        engine = self.engine
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
    tables: list[SourceTable], samples: int, batch: int, rank: int, world_size: int
) -> list[tuple[list[SampleRef], bool]]:
    """Returns the batches of one rank, each with whether its prompts hold media.

    All ranks have equally many, of similar length at the same time, and none is empty.
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
        refs.sort(key=lambda ref: ref.length)
        for start in range(0, len(refs), batch * world_size):
            shared = refs[start : start + batch * world_size]
            rounds.append((shared[rank::world_size] or shared[:1], media))
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
