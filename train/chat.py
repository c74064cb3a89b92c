"""Talks with a model about text, pictures and recordings: in the terminal, through a pipe, or once.

    python -m train.chat run=runs/omni_sft
    python -m train.chat weights=omni_release --image cat.jpg --text "What is in the picture?" --json

This file only reads the request, so that a mistake in it is refused before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data.conversation import Conversation
from data.formats import MediaKind
from train.compose import readable_errors
from train.config import Precision
from train.request import ModelRequest, read_model, take_words
from train.sampling import Sampling

OWN = ("max_new_tokens", "temperature", "top_p", "seed", "device", "precision")
"""Words that say how to answer. All others, but run= and weights=, change the config of the model."""


@dataclass(slots=True)
class Request:
    """A model and how it is to answer. `precision` None is what suits the device."""

    model: ModelRequest
    sampling: Sampling
    device: str
    precision: Precision | None

    def conversation(self) -> Conversation:
        """Returns an empty conversation under the limits of the model's data."""
        config = self.model.config
        return Conversation(config.media, config.data.limits, config.model.llm.max_positions)


def read_request(words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: there is no such model, or a word cannot be used; every mistake on a line of its own.
    """
    chosen, rest = take_words(words, OWN, "run=DIR temperature=0.7")
    sampling, problems = _read_sampling(chosen)
    device, precision = chosen.get("device", "auto"), chosen.get("precision")
    problems += _refuse_device(device) + _refuse_precision(precision)
    if problems:
        raise ValueError("\n".join(problems))
    return Request(read_model(rest), sampling, device, Precision(precision) if precision else None)


def _read_sampling(chosen: dict[str, str]) -> tuple[Sampling, list[str]]:
    sampling, problems = Sampling(), []
    for name in (entry.name for entry in fields(Sampling) if entry.name in chosen):
        default = getattr(sampling, name)
        try:
            setattr(sampling, name, type(default)(chosen[name]))
        except ValueError:
            wanted = "a whole number" if isinstance(default, int) else "a number"
            problems.append(f"{name}={chosen[name]}: is not {wanted}. Use {default}.")
    return sampling, problems + sampling.problems()


def _refuse_device(name: str) -> list[str]:
    if name == "auto" or re.fullmatch(r"cpu|cuda(:\d+)?", name):
        return []
    return [f"device={name}: not a known device. Use auto, cpu, cuda or cuda:1."]


def _refuse_precision(name: str | None) -> list[str]:
    known = [precision.value for precision in Precision]
    return [] if name in (None, *known) else [f"precision={name}: not known. Use one of {', '.join(known)}."]


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.chat",
        description="Talks with a model about text, pictures and recordings. Of a run it takes the weights "
        "of the finished stage, else of the newest checkpoint. In the terminal, /help lists the commands; "
        "lines from a pipe are answered one by one; --image, --audio and --text ask one question and end.",
        epilog='Example: python -m train.chat run=runs/omni_sft --image cat.jpg --text "What is it?" --json',
    )
    parser.add_argument(
        "words",
        nargs="+",
        help="run=DIR or weights=DIR; max_new_tokens=512, temperature=0 (the likeliest token), top_p=1, "
        "seed=0, device=auto, cpu or cuda, precision=bf16 or fp32; or any key=value of train.py",
    )
    for kind, what in (("image", "a picture"), ("audio", "a recording")):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="PATH", help=f"{what}; may be repeated"
        )
    parser.add_argument("--text", help="the question")
    parser.add_argument("--json", action="store_true", help="print the answer and its figures as JSON")
    return parser


def main(words: list[str] | None = None) -> None:
    """Answers one question, or holds a conversation."""
    arguments = build_parser().parse_intermixed_args(words)
    try:
        with readable_errors():
            status = _serve(arguments)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _serve(arguments: argparse.Namespace) -> int:
    request = read_request(arguments.words)
    try:
        if arguments.text is not None or arguments.image or arguments.audio:
            return _answer_once(request, arguments)
        return _converse(request, arguments.json)
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _answer_once(request: Request, arguments: argparse.Namespace) -> int:
    conversation = request.conversation()
    attached: dict[MediaKind, list[str]] = {"image": arguments.image, "audio": arguments.audio}
    for kind, paths in attached.items():
        for path in paths:
            conversation.attach(kind, Path(path).expanduser())
    if not arguments.text and not conversation.attached:
        raise ValueError("--text=: asks nothing. Write a question, or add --image or --audio.")
    from train.responder import Responder

    responder = Responder(request.model, request.sampling, request.device, request.precision)
    prompt = conversation.ask(arguments.text or "", responder.encoder)
    say = (lambda _: None) if arguments.json else (lambda text: print(text, end="", flush=True))
    reply = responder.answer(prompt, say)
    if arguments.json:
        speed = {"tokens_per_second": round(reply.tokens_per_second, 2)}
        print(json.dumps(asdict(reply) | {"seconds": round(reply.seconds, 3)} | speed, ensure_ascii=False))
    else:
        print()
    return 130 if reply.ended == "interrupt" else 0


def _converse(request: Request, as_json: bool) -> int:
    if as_json:
        raise ValueError("--json: is for one question. Add --text, --image or --audio.")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        print(f"Loading {request.model.name} ...", flush=True)
    from train.responder import Responder
    from train.terminal import Session

    responder = Responder(request.model, request.sampling, request.device, request.precision)
    return Session(request.conversation(), responder, on_terminal=on_terminal).run()


if __name__ == "__main__":
    main()
