"""What the stages of a pipeline have come to: summary.json and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEPARATOR = "  "


def summarize(runs: Path, names: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    """Returns the content of summary.json: the complete stages in order, and the seconds of all.

    Units: wall time of all starts of a stage, with loading, evaluation and saving; of a stage that no
    pipeline ran, those of its own stage.json.
    """
    stages = []
    for name in names:
        file = runs / name / "final" / "stage.json"
        if file.is_file():
            facts = json.loads(file.read_text())
            found = facts.get("evaluation", {})
            stages.append(
                {
                    "name": name,
                    "seconds": round(seconds[name] if name in seconds else facts.get("seconds", 0.0), 1),
                    "metrics": found.get("metrics", {}),
                    "blank_metrics": found.get("blank_metrics", {}),
                }
            )
    return {"stages": stages, "seconds": round(sum(stage["seconds"] for stage in stages), 1)}


LEGEND = """\
blanked: with grey pictures and silence. change: against the last stage before that has the value.
↓ lower is better."""


def table(summary: dict[str, Any]) -> str:
    """Returns a table for a terminal: under every value the one with the media blanked, and its change.

    Stages are columns, their names broken at the underscores; that fits nine of them into 120 columns.
    """
    rows = _rows(summary["stages"])
    heads = [stage["name"].split("_") for stage in summary["stages"]]
    depth = max((len(head) for head in heads), default=0)
    lines = [["", *((head + [""] * depth)[row] for head in heads)] for row in range(depth)]
    lines += [[label, *cells] for label, cells in rows]
    lines.append(["seconds", *(f"{stage['seconds']:.0f}" for stage in summary["stages"])])
    return f"{_align(lines)}\n{LEGEND}" if metric_names(summary["stages"]) else _align(lines)


def _rows(stages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = []
    for name in metric_names(stages):
        values = [stage["metrics"].get(name) for stage in stages]
        blanked = [stage["blank_metrics"].get(name) for stage in stages]
        rows.append((_label(name), [_number(value) for value in values]))
        if any(value is not None for value in blanked):
            rows.append(("  blanked", [_number(value) for value in blanked]))
        rows.append(("  change", changes(values)))
    return rows


def metric_names(stages: list[dict[str, Any]]) -> list[str]:
    """Returns the names of all metrics, in the order in which they first come."""
    return list(dict.fromkeys(name for stage in stages for name in stage["metrics"]))


def changes(values: list[float | None]) -> list[str]:
    """Returns how each value differs from the last one before it that is known, signed."""
    shown, last = [], None
    for value in values:
        shown.append("" if value is None or last is None else _signed(value - last))
        last = last if value is None else value
    return shown


def _signed(difference: float) -> str:
    text = f"{difference:+.3f}"
    return "=" if float(text) == 0 else text


def _label(name: str) -> str:
    return f"{name} ↓" if {"cer", "wer", "loss"} & {*name.split("_")} else name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _align(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        SEPARATOR.join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    )


def markdown(summary: dict[str, Any]) -> str:
    """Returns the table for a page: a row per metric, the change in brackets, at last the blanked twin."""
    stages = summary["stages"]
    lines = [["metric", *(stage["name"] for stage in stages), "blanked"]]
    lines.append(["---", *("---:" for _ in stages), "---:"])
    for name in metric_names(stages):
        values = [stage["metrics"].get(name) for stage in stages]
        cells = [
            f"{_number(value)} ({change})" if change else _number(value)
            for value, change in zip(values, changes(values))
        ]
        lines.append(
            [
                f"`{name}`{_label(name).removeprefix(name)}",
                *cells,
                _number(stages[-1]["blank_metrics"].get(name)),
            ]
        )
    lines.append(["seconds", *(f"{stage['seconds']:.0f}" for stage in stages), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
