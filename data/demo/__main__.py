"""Makes demo data: pictures, speech and texts for training a small model in minutes.

python -m data.demo runs/demo/data
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from data.demo.build import Options, build, is_complete
from data.options import positive


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m data.demo",
        description="Make demo data from nothing: drawn pictures, synthetic speech, texts, and a tokenizer.",
        epilog="example: python -m data.demo runs/demo/data",
    )
    made.add_argument("out", metavar="OUT", help="folder to make, or to go on making")
    made.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that work")
    made.add_argument("--font", metavar="FILE", help="font for Chinese signs, which are left out without one")
    made.add_argument(
        "--tts-command",
        metavar="CMD",
        help="speaks in place of espeak-ng: gets the text on stdin, writes a WAV to {out}; "
        "may use {language}, {voice}, {rate} and {pitch}, and must use {rate} or {pitch}: in these alone "
        "the voices of training and evaluation differ",
    )
    made.add_argument("--scale", type=float, default=1.0, help="share of all samples (default: 1)")
    made.add_argument("--json", action="store_true", help="print what was made as JSON")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Makes what the command line asks for; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        there = is_complete(options.out)
        made = build(options.out, Options(options.font, options.tts_command, options.scale), options.workers)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made) if options.json else describe(options.out, made, there))
    return 0


def describe(out: str, facts: dict, there: bool) -> str:
    """Returns what was made, or was there already, as a few lines of text."""
    lines = [f"{out}: {'is complete already' if there else 'complete'}"]
    for split, of_split in facts["samples"].items():
        counts = ", ".join(f"{source} {count:,}" for source, count in of_split.items())
        lines.append(f"  {split}: {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
