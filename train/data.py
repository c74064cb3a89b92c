"""Joins the data side to a run: tables of samples, the plan, and this rank's loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from data.chat_template import adopt_template
from data.counts import Tables, build_tables
from data.encode import Encoder
from data.loader import Loader
from data.plan import Planner
from data.remote import check_room
from data.tokenizer import load_tokenizer
from train.config import Objective, RunConfig
from train.engine import Engine
from train.flops import sample_cost, trains_anything
from train.parent import tokenizer_folder

Split = Literal["train", "held_out"]

__all__ = [
    "Tables",
    "build_encoder",
    "build_loader",
    "build_planner",
    "check_cache",
    "load_held_out",
    "load_tables",
]


def build_encoder(config: RunConfig) -> Encoder:
    """Returns the encoder of samples, after checking that the tokenizer fits the model.

    Raises:
        ValueError: the tokenizer has more words than the model.
    """
    folder = tokenizer_folder(config)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.model.llm.vocab:
        raise ValueError(
            f"model.llm.vocab={config.model.llm.vocab}: the tokenizer has {tokenizer.vocab_size} words. "
            f"Use at least that."
        )
    template = adopt_template(config.data.template, Path(folder) if folder else None, tokenizer)
    return Encoder(replace(config.data, template=template), config.media, tokenizer)


def load_tables(
    config: RunConfig, engine: Engine, encoder: Encoder, split: Split, *, to_answer: bool = False
) -> Tables:
    """Returns the samples of one split. Token counts are computed once, by one rank, and cached.

    A stand-in task has a loss on samples of its own tags only; with `to_answer`, there are all.

    Raises:
        ValueError: the data cannot be used, or ranks do not see the same (another copy on another node).
    """
    cost = sample_cost(config.model, config.media, config.tuned, config.lora)

    with engine.main_first():
        tables = build_tables(
            config.data,
            config.media,
            encoder,
            split=split,
            cost=cost,
            takes=lambda modality: split == "held_out" or trains_anything(modality, config.tuned),
            evaluates_all=to_answer or config.objective is Objective.next_token,
        )
    prints = engine.gather_objects(tables.fingerprint)
    others = [rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0]]
    if others:
        raise ValueError(
            f"data.sources: ranks {', '.join(map(str, others))} see other data than rank 0, so their plans "
            "would differ. Give every machine the same shards and indexes."
        )
    return tables


def load_held_out(config: RunConfig, engine: Engine, encoder: Encoder) -> tuple[Tables, Tables]:
    """Returns the held-out samples for the loss, and those to be answered."""
    tables = load_tables(config, engine, encoder, "held_out")
    if config.objective is Objective.next_token or not config.eval.samples:
        return tables, tables
    return tables, load_tables(config, engine, encoder, "held_out", to_answer=True)


def check_cache(config: RunConfig, tables: Tables, held_out: Tables) -> None:
    """Raises ValueError where `data.cache_gib` is too small for training and an evaluation in between."""
    folders = [*tables.folders.values(), *held_out.folders.values()]
    check_room(folders, config.data.shuffle_shards, config.data.cache_gib)


def build_planner(config: RunConfig, tables: Tables, *, epochs: float | None) -> Planner:
    """Returns the plan over `tables`; `epochs` None runs on for ever."""
    return Planner(
        tables.tables,
        config.data.pack,
        config.train.packs_per_step,
        seed=config.seed,
        shuffle_shards=config.data.shuffle_shards,
        epochs=epochs,
        fingerprint=tables.fingerprint,
    )


def build_loader(
    config: RunConfig, engine: Engine, tables: Tables, encoder: Encoder, planner: Planner
) -> Loader:
    """Returns this rank's loader over a plan."""
    return Loader(
        planner,
        tables.folders,
        encoder,
        config=config.data,
        media=config.media,
        pad_id=encoder.tokenizer.special("<|pad|>"),
        micro_batch_packs=config.train.micro_batch_packs,
        loss=config.train.loss.value,
        rank=engine.rank,
        world_size=engine.world_size,
    )
