"""Draws the loss of every stage of a pipeline: `python -m launch.curves RUNS --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

SIZE_INCHES = (5.2, 2.2)
OFFSET = 1e-3
"""Lower end of the axes, so that a loss of exactly zero can be shown on a logarithmic one."""


def read_losses(stage: Path) -> tuple[list[int], dict[str, list[float | None]]]:
    """Returns the steps that a stage logged, and the loss of each of its sources there (None: not drawn)."""
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    sources = sorted({name for record in records for name in record["loss_by_source"]})
    losses = {name: [record["loss_by_source"].get(name) for record in records] for name in sources}
    return [record["step"] for record in records], losses


def draw_stage(stage: Path, out: Path) -> Path:
    """Writes the curves of one stage as `out/STAGE.svg`; the same run gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": stage.name, "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    steps, losses = read_losses(stage)
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    for name, values in losses.items():
        points = [(step, max(value, OFFSET)) for step, value in zip(steps, values) if value is not None]
        axes.plot(*zip(*points), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title=stage.name)
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    path = out / f"{stage.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def find_stages(runs: Path) -> list[Path]:
    """Returns the folders of stages under a pipeline's folder, by name.

    Raises:
        ValueError: there is none with anything logged.
    """
    found = sorted(path.parent for path in runs.glob("*/metrics.jsonl"))
    if not found:
        raise ValueError(f"{runs}: no stage has logged anything there. Name the `runs` of a pipeline.")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Draws all stages; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.curves",
        description="Draw the training loss of every stage of a pipeline, by source, as small SVG files.",
        epilog="Example: python -m launch.curves runs/demo --out docs/curves",
    )
    parser.add_argument("runs", type=Path, help="folder of a pipeline's runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    options = parser.parse_args(arguments)
    try:
        stages = find_stages(options.runs)
        options.out.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            print(draw_stage(stage, options.out))
    except ImportError as error:
        print(f"matplotlib: cannot be imported ({error}). Run pip install matplotlib.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
