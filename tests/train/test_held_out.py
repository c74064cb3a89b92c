"""Evaluation on held-out samples: they never train, the numbers are the same for any number of ranks, and
blanked media change what depends on them and nothing else."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.plan import SourceTable
from tests.train.launching import SMALL, launch
from train.answers import deal_prompts
from train.config import EvalConfig, Objective, all_problems
from train.held_out import check_metrics, format_table, named_metrics, unmeasured

WORDS = (*SMALL, "train.steps=4", "train.packs_per_step=2", "optim.lr=1e-3", "eval.every=2", "log.every=4")
ANSWERS = (
    "eval.samples=10",
    "eval.batch=4",
    "eval.max_new_tokens=6",
    "+eval.metrics.mixed_cer=mixed.cer",
    "+eval.metrics.mixed_loss=mixed.loss",
    "+eval.metrics.text_loss=texts.loss",
)


def test_held_out_loss_is_logged_when_due_and_does_not_depend_on_ranks(tmp_path, mixed_shards):
    words = (*WORDS, f"data.path={mixed_shards}", "data.holdout=0.3")
    alone = launch(tmp_path / "alone", *words)
    assert [record["step"] for record in alone.records] == [1, 2, 4]
    assert "held_out" not in alone.records[0]
    first, last = (record["held_out"] for record in alone.records[1:])
    assert set(first) == {"loss", "loss_by_source", "loss_by_modality", "samples", "bad_samples"}
    assert first["samples"] > 5 and first["bad_samples"] == 0
    assert last["loss"] < first["loss"]
    assert alone.stage["metrics"]["held_out"] == last
    assert alone.stage["evaluation"] == {"loss_by_source": last["loss_by_source"]}
    assert not (alone.folder / "eval").exists()
    spread = launch(tmp_path / "spread", *words, "zero=zero3", processes=2)
    for ours, theirs in zip(spread.records[1:], alone.records[1:]):
        assert ours["held_out"]["loss"] == pytest.approx(theirs["held_out"]["loss"], rel=1e-5)
        for kind in ("loss_by_source", "loss_by_modality"):
            assert ours["held_out"][kind] == pytest.approx(theirs["held_out"][kind], rel=1e-5)


@pytest.mark.slow
def test_evaluating_changes_nothing_of_the_training(tmp_path, mixed_shards):
    words = (
        *SMALL,
        f"data.path={mixed_shards}",
        "data.holdout=0.3",
        "train.steps=4",
        "train.packs_per_step=2",
        "eval.samples=4",
        "eval.max_new_tokens=3",
    )
    often = launch(tmp_path / "often", *words, "eval.every=1")
    never = launch(tmp_path / "never", *words, "eval.every=0")
    assert often.losses == never.losses and often.grad_norms == never.grad_norms
    assert "held_out" in never.records[-1] and "held_out" not in never.records[0]
    assert "blank_answers" in often.records[0]["held_out"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, mixed_shards, text_shards, picture_shards):
    """A folder of configs: training on pictures alone, evaluation on everything."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "data").mkdir()
    (folder / "data" / "mine.yaml").write_text(
        "# @package data\n"
        f"sources: {{pictures: {{path: {picture_shards}}}}}\n"
        f"held_out: {{texts: {{path: {text_shards}}}, mixed: {{path: {mixed_shards}}}}}\n"
    )
    return ("data=mine", f"--config-dir={folder}")


@pytest.fixture(scope="module")
def answered(tmp_path_factory, sources):
    return launch(tmp_path_factory.mktemp("answered") / "run", *WORDS, *ANSWERS, *sources)


def lines(run, step):
    path = run.folder / "eval" / f"step-{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sources_for_evaluation_are_answered_by_name_when_due(answered):
    assert set(answered.records[-1]["loss_by_source"]) == {"pictures"}
    assert sorted(path.name for path in (answered.folder / "eval").iterdir()) == [
        "step-00000002.jsonl",
        "step-00000004.jsonl",
    ]
    found, rows = answered.records[-1]["held_out"], lines(answered, 4)
    assert [row["source"] for row in rows] == ["texts"] * 10 + ["mixed"] * 10
    for source, scores in found["answers"].items():
        mine = [row for row in rows if row["source"] == source]
        assert scores["samples"] == len(mine) == 10
        assert scores["exact"] == sum(row["exact"] for row in mine) / 10
    assert all(row["prompt"].endswith("assistant<|role_end|>") and row["reference"] for row in rows)
    assert set(found["metrics"]) == {"mixed_cer", "mixed_loss", "text_loss"}
    assert found["metrics"]["mixed_cer"] == found["answers"]["mixed"]["cer"]
    assert found["metrics"]["mixed_loss"] == found["loss_by_source"]["mixed"]
    evaluation = answered.stage["evaluation"]
    assert evaluation == {name: found[name] for name in evaluation} and "blank_metrics" in evaluation
    assert "step 4, held out:" in answered.output


def test_blanked_media_change_what_depends_on_them_and_nothing_else(answered):
    found, rows = answered.records[-1]["held_out"], lines(answered, 4)
    assert all((row["blank_output"] is None) == (row["modality"] == "text") for row in rows)
    assert {row["modality"] for row in rows} == {"text", "image", "audio", "image+audio"}
    assert any(row["output"] != row["blank_output"] for row in rows if row["blank_output"] is not None)
    assert set(found["blank_answers"]) == set(found["blank_loss_by_source"]) == {"mixed"}
    assert found["blank_loss_by_source"]["mixed"] != found["loss_by_source"]["mixed"]
    assert set(found["blank_metrics"]) == {"mixed_cer", "mixed_loss"}


@pytest.mark.parametrize("zero", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_train_and_answer_as_one_does(answered, tmp_path, sources, zero):
    spread = launch(tmp_path / "run", *WORDS, *ANSWERS, f"zero={zero}", *sources, processes=2)
    assert spread.losses == pytest.approx(answered.losses, rel=1e-5)  # also in the steps after evaluation
    for step in (2, 4):
        assert lines(spread, step) == lines(answered, step)
    ours, theirs = (run.records[-1]["held_out"] for run in (spread, answered))
    for name in ("loss_by_source", "blank_loss_by_source", "metrics", "blank_metrics"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert ours["answers"] == theirs["answers"] and ours["blank_answers"] == theirs["blank_answers"]


def table(name, lengths, media):
    count = len(lengths)
    return SourceTable(
        name=name,
        shard=np.zeros(count, np.int32),
        row=np.arange(count, dtype=np.int32),
        length=np.array(lengths, np.int32),
        cost=np.zeros(count),
        slices=np.array(media, np.int32),
        audio_seconds=np.zeros(count, np.float32),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("batch", "most_tokens"), [(1, 1), (4, 1000), (64, 10000), (64, 200)])
def test_every_chosen_sample_is_dealt_to_some_rank_in_equally_many_batches(world_size, batch, most_tokens):
    rng = np.random.default_rng(0)
    tables = [
        table("long", rng.integers(5, 90, 40), rng.integers(0, 2, 40)),
        table("short", rng.integers(5, 90, 3), [1, 1, 1]),
    ]
    dealt = [deal_prompts(tables, 9, batch, most_tokens, rank, world_size) for rank in range(world_size)]
    for rounds in zip(*dealt, strict=True):
        assert len({media for _, media in rounds}) == 1 and all(1 <= len(refs) <= batch for refs, _ in rounds)
    found = {(ref.source, ref.row) for rounds in dealt for refs, _ in rounds for ref in refs}
    assert found == {("long", row) for row in range(9)} | {("short", row) for row in range(3)}
    for rounds in dealt:
        for refs, media in rounds:
            tables_by_name = {item.name: item for item in tables}
            assert all(bool(tables_by_name[ref.source].slices[ref.row]) is media for ref in refs)


@pytest.mark.parametrize("world_size", [1, 3])
def test_no_batch_of_prompts_exceeds_its_tokens_and_the_longest_come_first(world_size):
    rng = np.random.default_rng(1)
    tables = [table("long", rng.integers(5, 500, 600), np.zeros(600))]
    for rank in range(world_size):
        dealt = [refs for refs, _ in deal_prompts(tables, 600, 16, 1000, rank, world_size)]
        sizes = [len(refs) * max(ref.length for ref in refs) for refs in dealt]
        assert max(sizes) <= 1000 and max(map(len, dealt)) == 16
        lengths = [ref.length for refs in dealt for ref in refs]
        assert lengths == sorted(lengths, reverse=True)


def test_a_prompt_longer_than_a_batch_may_be_is_answered_alone():
    alone = deal_prompts([table("one", [2000, 1500], [0, 0])], 2, 16, 1000, 0, 1)
    assert [len(refs) for refs, _ in alone] == [1, 1]


def stub(metrics, objective=Objective.next_token) -> Any:
    return SimpleNamespace(eval=SimpleNamespace(metrics=metrics, samples=0), objective=objective)


def tables_named(*names) -> Any:
    return SimpleNamespace(tables=[SimpleNamespace(name=name) for name in names])


def test_metric_of_a_source_that_is_not_held_out_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError) as error:
        check_metrics(stub({"scene_exact": "scens.exact"}), tables_named("scenes", "speech"))
    assert str(error.value) == (
        "eval.metrics.scene_exact='scens.exact': 'scens' is not a held-out source. Did you mean 'scenes'? "
        "Known: scenes, speech."
    )
    check_metrics(stub({"scene_exact": "scenes.exact"}), tables_named("scenes"))
    check_metrics(stub({"scene_exact": "scens.exact"}), tables_named())
    check_metrics(stub({"scene_exact": "scens.exact"}, Objective.ctc), tables_named("speech"))


@pytest.mark.parametrize(
    ("trained", "held", "refused"),
    [
        ([], [], True),
        (["caption"], [], True),
        ([], ["vqa"], True),
        (["caption", "vqa"], ["vqa"], True),
        (["caption"], ["vqa"], False),
    ],
)
def test_a_folder_is_trained_on_and_held_out_only_by_tags_that_are_apart(tmp_path, trained, held, refused):
    config = DataConfig(
        sources={"all": SourceConfig(path=f"{tmp_path}/shards", tags=trained)},
        held_out={"exam": SourceConfig(path=f"{tmp_path}/shards/", tags=held)},
    )
    wanted = f"data.held_out.exam.path={tmp_path}/shards/: source 'all' trains on this folder, so this would "
    assert [line[: len(wanted)] for line in all_problems(config, "data")] == [wanted] * refused


@pytest.mark.parametrize("place", ["exact", "scenes", "scenes.bleu", ".exact"])
def test_metric_that_is_not_source_and_measure_is_a_problem(place):
    found = all_problems(EvalConfig(metrics={"mine": place}), "eval")
    assert found == [
        f"eval.metrics.mine={place!r}: is not SOURCE.MEASURE. "
        "Use a held-out source and one of exact, cer, wer, loss."
    ]


def test_metrics_are_those_that_were_measured():
    found = {"loss_by_source": {"a.b": 2.0}, "answers": {"a.b": {"exact": 0.5}}}
    wanted = {"one": "a.b.exact", "two": "a.b.loss", "three": "a.b.cer", "four": "c.exact"}
    assert named_metrics(wanted, found) == {"metrics": {"one": 0.5, "two": 2.0}}


def test_table_has_a_line_per_source_with_blanked_values_behind_real_ones():
    scores = {"exact": 0.5, "cer": 0.25, "wer": 0.75, "samples": 7}
    shown = format_table(
        {
            "loss_by_source": {"scenes": 1.0, "texts": 2.0},
            "blank_loss_by_source": {"scenes": 3.0},
            "answers": {"scenes": scores},
            "blank_answers": {"scenes": {**scores, "exact": 0.0}},
        }
    )
    first, second = (" ".join(line.split()) for line in shown.splitlines()[1:])
    assert first == "scenes 7 1.000 3.000 0.500 0.000 0.250 0.250 0.750 0.750"
    assert second == "texts 2.000 - - - - - - -"
    lost = format_table({"loss_by_source": {}, "not_answered": {"scenes": {"image_corrupt": 2}}})
    assert lost.splitlines()[1].split() == ["scenes", "not", "answered:", "image_corrupt", "2"]


def test_a_metric_without_a_value_is_named_where_its_kind_was_measured():
    wanted = {"one": "a.exact", "two": "b.cer", "three": "b.loss"}
    both = unmeasured(wanted, {"metrics": {"one": 0.5}}, ["loss", "exact", "cer", "wer"])
    assert [line.partition(": ")[0] for line in both] == [
        "eval.metrics.two='b.cer'",
        "eval.metrics.three='b.loss'",
    ]
    assert unmeasured(wanted, {}, ["loss"]) == both[1:]
    assert unmeasured(wanted, {"metrics": dict.fromkeys(wanted, 1.0)}, ["loss", "exact", "cer"]) == []
