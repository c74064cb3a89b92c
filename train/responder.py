"""A model that answers, one question at a time: its weights alone, without engine or optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from data.encode import Encoder
from data.prompt import collate_prompts
from data.sample import EncodedSample
from data.tokenizer import TextStream
from train.config import Precision
from train.data import build_encoder
from train.generate import STOPS, generate
from train.model.omni import MegrezOmni
from train.request import ModelRequest
from train.sampling import Sampling
from train.source import open_weights

Ended = Literal["turn", "limit", "interrupt"]


@dataclass(slots=True)
class Reply:
    """An answer. `seconds` are from the question to the end of the answer.

    It ended with the turn, because no more tokens were allowed (`limit`), or by Ctrl-C (`interrupt`).
    """

    answer: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    ended: Ended

    @property
    def tokens_per_second(self) -> float:
        """Returns new tokens a second, the reading of the question included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


class Responder:
    """Answers questions with the weights of a run or of a released folder.

    Raises:
        ValueError: the weights are missing or do not fit, the tokenizer does not, or there is no such device.
    """

    def __init__(self, request: ModelRequest, sampling: Sampling, device: str, precision: Precision | None):
        self.device = _device(device)
        on_gpu = self.device.type == "cuda"
        self.precision = precision or (Precision.bf16 if on_gpu else Precision.fp32)
        self.sampling = sampling
        self.most_tokens = request.config.model.llm.max_positions
        self.encoder = _build_encoder(request)
        self.stop = frozenset(self.encoder.tokenizer.special(name) for name in STOPS)
        dtype = torch.bfloat16 if self.precision is Precision.bf16 else torch.float32
        self.model, self.step = load_model(request, self.device, dtype)

    def answer(self, prompt: EncodedSample, say: Callable[[str], None], number: int = 0) -> Reply:
        """Returns the answer to a question, having said every piece of it as soon as it was known.

        Ctrl-C ends the answer. With sampling, the answers of a conversation differ by their `number`.
        """
        start = time.perf_counter()
        stream = TextStream(self.encoder.tokenizer)
        pieces: list[str] = []
        tokens: list[int] = []

        def on_token(_: int, token: int) -> None:
            tokens.append(token)
            give(stream.add(token))

        def give(text: str) -> None:
            if text:
                pieces.append(text)
                say(text)

        ended = self._generate(prompt, number, on_token, tokens)
        give(stream.end())
        seconds = time.perf_counter() - start
        return Reply("".join(pieces), len(prompt.input_ids), len(tokens), seconds, ended)

    def _generate(
        self, prompt, number: int, on_token, tokens: list[int]
    ) -> Literal["turn", "limit", "interrupt"]:
        sampling = self.sampling
        room = min(sampling.max_new_tokens, self.most_tokens - len(prompt.input_ids) + 1)
        try:
            generate(
                self.model,
                collate_prompts([prompt], self.encoder).to(self.device),
                stop=self.stop,
                max_new_tokens=room,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed + number,
                on_token=on_token,
            )
        except KeyboardInterrupt:
            return "interrupt"
        return "limit" if len(tokens) == room else "turn"


def _build_encoder(request: ModelRequest) -> Encoder:
    """Returns the encoder of samples, without the bound of a row: a conversation has another one."""
    encoder = build_encoder(request.config)
    encoder.config.pack.length = 2**31
    return encoder


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= count:
            raise ValueError(f"device={name}: this machine has {count} usable GPUs. Use device=cpu.")
    return torch.device(name)


@torch.no_grad()
def load_model(request: ModelRequest, device: torch.device, dtype: torch.dtype) -> tuple[MegrezOmni, int]:
    """Returns a model with the weights of a request, in evaluation mode, and the step they are from.

    Never more than one tensor is held beside the model.

    Raises:
        ValueError: there are no weights, or they are those of another model.
    """
    reader, step = open_weights(request)
    with torch.device("meta"):
        model = MegrezOmni(request.config.model, request.config.media)
    model.requires_grad_(False).eval().to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        found = reader.shapes.get(name)
        if found is None or tuple(found) != tuple(parameter.shape):
            state = "is missing" if found is None else f"has shape {list(found)}"
            raise ValueError(
                f"{request.name}: weight {name} {state}, the model has {list(parameter.shape)}. "
                "Use the config that it was made with."
            )
        parameter.copy_(reader.read("weight", name, 0, parameter.numel()).view(parameter.shape))
    return model, step
