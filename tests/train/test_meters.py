import json
import threading
import time

import pytest
import torch

from data.sample import AudioBatch, Batch, Dropped, SampleInfo, VisionBatch
from train.meters import LossMeter, Meters

CPU = torch.device("cpu")
SOURCES = ["coco", "asr", "books"]
COCO = SampleInfo("a", "coco", "image", tokens=6, supervised=3)
ASR = SampleInfo("b", "asr", "audio", tokens=4, supervised=2)
BOOKS = SampleInfo("c", "books", "text", tokens=5, supervised=4)


def batch_of(
    *samples: SampleInfo, weights: list[float] | None = None, length: int = 16, bad: int = 0
) -> Batch:
    """A micro-batch whose supervised positions belong to the samples in turn."""
    owner = torch.tensor(
        [i for i, info in enumerate(samples) for _ in range(info.supervised)], dtype=torch.int64
    )
    empty = torch.zeros(0, dtype=torch.int64)
    vision = VisionBatch(empty, empty, empty, empty, 0, empty, [])
    audio = AudioBatch(empty, empty, empty, empty, empty, 0, empty, empty, empty, empty)
    return Batch(
        input_ids=torch.zeros(1, length, dtype=torch.int64),
        position_ids=torch.zeros(1, length, dtype=torch.int64),
        cu_seqlens=empty,
        max_seqlen=length,
        supervised=torch.zeros_like(owner),
        targets=torch.zeros_like(owner),
        weights=torch.tensor(weights) if weights else torch.ones(len(owner)),
        sample=owner,
        vision=vision,
        audio=audio,
        samples=list(samples),
        dropped=[Dropped("coco", "0.tar", str(i), "image_corrupt", "") for i in range(bad)],
    )


def alone(total: torch.Tensor) -> torch.Tensor:
    return total


def records_of_ranks(meters: list[Meters], step: int) -> list[dict]:
    """Records of several ranks, each in a thread of its own, summing as an all-reduce does."""
    gathered, barrier, records = {}, threading.Barrier(len(meters)), {}

    def run(rank: int) -> None:
        def all_reduce(tensor):
            gathered[rank] = tensor
            barrier.wait()
            return sum(gathered.values())

        records[rank] = meters[rank].record(step, all_reduce, len(meters))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(meters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [records[rank] for rank in range(len(meters))]


def test_losses_by_group_are_token_means_and_loss_is_weighted_as_trained():
    meters = Meters(SOURCES, CPU)
    batch = batch_of(COCO, ASR, weights=[0.5, 0.5, 0.5, 2.0, 2.0])
    meters.add(batch, torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]), flops=0.0)
    record = meters.record(1, alone, 1)
    assert record["loss"] == pytest.approx((0.5 * 6 + 2.0 * 10) / 5.5)
    assert record["loss_by_source"] == pytest.approx({"coco": 2.0, "asr": 5.0})
    assert record["loss_by_modality"] == pytest.approx({"image": 2.0, "audio": 5.0})


def test_every_rank_reports_what_one_rank_with_all_micro_batches_reports():
    work = [
        (batch_of(COCO, ASR), torch.rand(5)),
        (batch_of(BOOKS, bad=2), torch.rand(4)),
        (batch_of(ASR, BOOKS, bad=1), torch.rand(6)),
    ]
    one, ranks = Meters(SOURCES, CPU), [Meters(SOURCES, CPU), Meters(SOURCES, CPU)]
    for place, (batch, losses) in enumerate(work):
        one.add(batch, losses, flops=1e6)
        ranks[place % 2].add(batch, losses, flops=1e6)
    expected = one.record(1, alone, 1)
    for record in records_of_ranks(ranks, 1):
        for name in ("loss", "supervised_share"):
            assert record[name] == pytest.approx(expected[name])
        for name in ("loss_by_source", "loss_by_modality"):
            assert record[name] == pytest.approx(expected[name])


def test_a_window_holds_only_what_came_after_the_last_record():
    meters = Meters(SOURCES, CPU)
    meters.add(batch_of(COCO, bad=2), torch.full((3,), 9.0), flops=1.0)
    meters.end_step(fill=0.5, skipped=True)
    meters.record(1, alone, 1)
    meters.add(batch_of(BOOKS), torch.full((4,), 1.0), flops=1.0)
    meters.end_step(fill=0.75)
    record = meters.record(2, alone, 1)
    assert record["loss"] == 1.0
    assert record["loss_by_source"] == {"books": 1.0}
    assert record["fill"] == 0.75 and record["skipped_steps"] == 1


def test_speeds_and_mfu_count_the_wall_clock_without_pauses():
    meters = Meters(SOURCES, CPU, peak=1e9)
    time.sleep(0.25)
    meters.start()
    meters.add(batch_of(COCO, ASR), torch.ones(5), flops=2e7)
    time.sleep(0.05)
    meters.waited(0.04)
    with meters.paused():
        time.sleep(0.2)
    for _ in range(2):
        meters.end_step(fill=0.75)
    record = meters.record(2, alone, 1)
    seconds = 2 * record["seconds_per_step"]
    assert 0.05 <= seconds < 0.25
    assert record["seconds"] >= 0.25
    assert record["mfu"] == pytest.approx(2e7 / (1e9 * seconds))
    assert record["tokens_per_second"] == pytest.approx(10 / seconds)
    assert record["samples_per_second"] == pytest.approx(2 / seconds)
    assert record["data_wait_share"] == pytest.approx(0.04 / seconds)


def test_mfu_is_none_without_a_known_peak():
    meters = Meters(SOURCES, CPU)
    meters.add(batch_of(COCO), torch.ones(3), flops=1e9)
    assert meters.record(1, alone, 1)["mfu"] is None


def test_record_is_strict_json_and_names_what_was_not_finite():
    meters = Meters(SOURCES, CPU)
    meters.add(batch_of(COCO), torch.tensor([1.0, float("nan"), float("inf")]), flops=0.0)
    record = meters.record(1, alone, 1, lr=1e-4, grad_norm={"all": float("inf"), "llm": 1.0})
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["loss"] == 1.0
    assert record["nonfinite_tokens"] == 2
    assert record["nonfinite"] == ["grad_norm/all"]
    assert record["grad_norm"] == {"all": None, "llm": 1.0}


def test_window_without_supervised_tokens_has_no_loss():
    record = Meters(SOURCES, CPU).record(1, alone, 1)
    assert record["loss"] is None
    assert record["loss_by_source"] == {}


def test_loss_meter_serves_evaluation_alone():
    meter = LossMeter(SOURCES, CPU)
    meter.add(batch_of(COCO, BOOKS), torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]))
    found = meter.read(meter.sums.tolist())
    assert found["loss"] == pytest.approx(13 / 7)
    assert found["loss_by_modality"] == {"text": 1.0, "image": 3.0}


def test_add_keeps_no_graph_of_the_losses():
    meters = Meters(SOURCES, CPU)
    meters.add(batch_of(COCO), torch.ones(3, requires_grad=True) * 2, flops=0.0)
    assert not meters.losses.sums.requires_grad
