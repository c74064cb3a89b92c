"""Writes a trained model in the form of the release, or as a folder that transformers loads.

    python -m train.export run=runs/omni_sft out=exports/omni format=transformers

A mistake in the request is refused before torch is imported; train/export/folder.py does the work.
"""

from __future__ import annotations

import argparse

from train.compose import readable_errors
from train.export.request import read_request


def main(words: list[str] | None = None) -> None:
    """Exports a model, printing progress and, at the end, what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Writes the weights of a finished stage, else of the newest checkpoint, as a folder of "
        "sharded safetensors with config, tokenizer and model card. format=megrez has the release's layout; "
        "format=transformers adds code for AutoModelForCausalLM, AutoProcessor and model.chat with "
        "trust_remote_code=True.",
        epilog="Example: python -m train.export run=runs/omni_sft out=exports/omni format=transformers",
    )
    parser.add_argument(
        "words",
        nargs="+",
        help="run=DIR or weights=DIR (a released folder), out=DIR, format=megrez|transformers, "
        "dtype=bf16|fp32 (default bf16), max_shard=SIZE (default 5GB)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(words)
    with readable_errors():
        request = read_request(arguments.words)
        from train.export.folder import export

        export(request, as_json=arguments.json)


if __name__ == "__main__":
    main()
