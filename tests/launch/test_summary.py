"""summary.json and the table, from stage.json files as stages leave them."""

import json

import pytest

from launch.summary import changes, markdown, summarize, table

VALUES = {
    "demo_text": ({"scene_exact": 0.0, "text_loss": 0.5}, {"scene_exact": 0.0}),
    "vision_align": ({"scene_exact": 0.875, "text_loss": 0.5}, {"scene_exact": 0.015}),
    "omni_sft": ({"scene_exact": 0.95, "text_loss": 0.49}, {"scene_exact": 0.0}),
}


@pytest.fixture
def runs(tmp_path):
    for name, (metrics, blanked) in VALUES.items():
        (final := tmp_path / name / "final").mkdir(parents=True)
        facts = {"seconds": 4.0, "evaluation": {"metrics": metrics, "blank_metrics": blanked}}
        (final / "stage.json").write_text(json.dumps(facts))
    return tmp_path


def test_a_summary_holds_the_complete_stages_in_order(runs):
    found = summarize(runs, ["demo_text", "vision_align", "never_run", "omni_sft"], {"omni_sft": 1.26})
    assert [stage["name"] for stage in found["stages"]] == list(VALUES)
    assert found["stages"][2] == {
        "name": "omni_sft",
        "seconds": 1.3,
        "metrics": VALUES["omni_sft"][0],
        "blank_metrics": VALUES["omni_sft"][1],
    }
    # Those of stages that no pipeline has run are what they say themselves.
    assert [stage["seconds"] for stage in found["stages"]] == [4.0, 4.0, 1.3] and found["seconds"] == 9.3


def test_the_table_shows_value_blanked_twin_and_change(runs):
    assert table(summarize(runs, list(VALUES), dict.fromkeys(VALUES, 61.0))) == (
        "              demo  vision    omni\n"
        "              text   align     sft\n"
        "scene_exact  0.000   0.875   0.950\n"
        "  blanked    0.000   0.015   0.000\n"
        "  change            +0.875  +0.075\n"
        "text_loss ↓  0.500   0.500   0.490\n"
        "  change                 =  -0.010\n"
        "seconds         61      61      61\n"
        "blanked: with grey pictures and silence. "
        "change: against the last stage before that has the value.\n"
        "↓ lower is better."
    )


def test_the_table_of_all_stages_and_metrics_fits_120_columns(tmp_path):
    names = [*VALUES, "demo_vision", "demo_audio", "vision_tune", "audio_align", "audio_tune"]
    metrics = dict.fromkeys(["spoken_instruction_exact", "asr_cer_zh", "text_loss"], 12.345)
    stages = [
        {"name": name, "seconds": 1234.5, "metrics": metrics, "blank_metrics": metrics} for name in names
    ]
    shown = table({"stages": stages, "seconds": 9999.9})
    assert max(map(len, shown.splitlines())) <= 120


def test_markdown_has_a_row_per_metric(runs):
    assert markdown(summarize(runs, list(VALUES), {})).splitlines() == [
        "| metric | demo_text | vision_align | omni_sft | blanked |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `scene_exact` | 0.000 | 0.875 (+0.875) | 0.950 (+0.075) | 0.000 |",
        "| `text_loss` ↓ | 0.500 | 0.500 (=) | 0.490 (-0.010) |  |",
        "| seconds | 4 | 4 | 4 |  |",
    ]


def test_a_change_is_against_the_last_stage_that_has_the_value():
    assert changes([0.25, None, 0.5, 0.5004, 0.25]) == ["", "", "+0.250", "=", "-0.250"]


def test_stages_without_answers_still_make_a_table(tmp_path):
    (final := tmp_path / "omni_sft" / "final").mkdir(parents=True)
    (final / "stage.json").write_text("{}")
    found = summarize(tmp_path, ["omni_sft"], {})
    assert found["stages"][0]["metrics"] == {} == found["stages"][0]["blank_metrics"]
    assert table(found).splitlines()[-1].split() == ["seconds", "0"]
