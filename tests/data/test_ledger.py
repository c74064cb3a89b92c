import json

import pytest

from data.ledger import Ledger
from data.sample import Dropped


def bad(number, cause="image_corrupt", source="web"):
    return Dropped(source, "shard-000000.tar", f"key{number}", cause, "is damaged")


def filled(good, num_bad):
    ledger = Ledger()
    ledger.add_good(good)
    for number in range(num_bad):
        ledger.add(bad(number), step=number + 1)
    return ledger


def test_counts_are_per_source_and_cause():
    ledger = Ledger()
    ledger.add(bad(1), step=0)
    ledger.add(bad(2), step=3)
    ledger.add(bad(3, "length_changed"), step=3)
    ledger.add(bad(1, source="speech"), step=4)
    assert ledger.counts == {
        "speech": {"image_corrupt": 1},
        "web": {"image_corrupt": 2, "length_changed": 1},
    }


def test_quarantined_sample_is_entered_once_and_is_no_bad_delivery():
    ledger = Ledger()
    for _ in range(2):
        ledger.add(bad(1), step=0)
    ledger.add(bad(1), step=5)
    ledger.add(bad(1), step=5)
    assert len(ledger.entries) == 3
    assert ledger.bad == 2


def test_restored_state_equals_the_saved_one():
    ledger = filled(good=7, num_bad=2)
    again = Ledger()
    again.restore(json.loads(json.dumps(ledger.state())))
    assert again.state() == ledger.state()
    assert (again.good, again.bad, again.counts) == (7, 2, ledger.counts)


def test_state_leaves_out_what_was_quarantined_and_the_file_holds_it(tmp_path):
    ledger = filled(good=7, num_bad=2)
    ledger.add(bad(9), step=0)
    assert [entry["step"] for entry in ledger.state()["entries"]] == [1, 2]
    ledger.write(tmp_path / "ledger.jsonl")
    written = [json.loads(line)["step"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert written == [1, 2, 0]


def test_merge_of_ranks_adds_up_and_keeps_the_order_of_steps():
    ranks = [Ledger(), Ledger()]
    for rank, ledger in enumerate(ranks):
        ledger.add_good(10 + rank)
        for step in (4, 1):
            ledger.add(bad(f"{rank}-{step}"), step)
    merged = Ledger.merge([ledger.state() for ledger in ranks])
    assert [entry.step for entry in merged.entries] == [1, 1, 4, 4]
    assert (merged.good, merged.bad) == (21, 4)


def test_written_ledger_is_one_json_line_per_bad_sample(tmp_path):
    ledger = filled(good=1, num_bad=3)
    path = tmp_path / "ledger.jsonl"
    path.write_text("an older one")
    ledger.write(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == ledger.state()["entries"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize(
    ("good", "num_bad", "share"), [(0, 5, 0.05), (95, 5, 0.05), (995, 50, 0.05), (9, 0, 0.0)]
)
def test_run_goes_on_up_to_the_share(good, num_bad, share):
    filled(good, num_bad).check(share)


@pytest.mark.parametrize(("good", "num_bad", "share"), [(0, 6, 0.05), (900, 50, 0.05), (10_000, 1, 0.0)])
def test_run_stops_beyond_the_share(good, num_bad, share):
    with pytest.raises(
        ValueError, match=rf"^data\.max_bad_share={share}: {num_bad} of {good + num_bad} samples"
    ):
        filled(good, num_bad).check(share)


def test_sums_over_ranks_decide_where_they_are_given():
    ledger = filled(good=1000, num_bad=1)
    with pytest.raises(ValueError, match="200 of 1200"):
        ledger.check(0.05, good=1000, bad=200)
    filled(good=0, num_bad=100).check(0.05, good=10_000, bad=100)
