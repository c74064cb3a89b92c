"""Generation from text, pictures and clips: one packed pass for the media, then padded decoding.

The prompts of a batch are embedded together, as in training. The language model then works on rows
that are padded on the left, so that every row's newest token stands last, with a key/value cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaModel

from data.sample import Batch
from train.model.omni import MegrezOmni
from train.sampling import sampling_problems

STOPS = ("<|turn_end|>", "<|eos|>")
"""Special tokens that end an answer."""

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What this version of transformers calls the argument."""

AnyRank = Callable[[bool], bool]
"""Returns whether the flag is true on any rank."""

OnToken = Callable[[int, int], None]
"""Is told row and id of every token of an answer as soon as it is chosen."""


@torch.no_grad()
def generate(
    model: MegrezOmni,
    batch: Batch,
    *,
    stop: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    any_rank: AnyRank = bool,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Returns the token ids that follow each prompt, without the stop token.

    A row ends at the first token of `stop`, or after `max_new_tokens`. Temperature 0 takes the likeliest
    token; above it, tokens are drawn from the likeliest ones that together have probability `top_p`, in
    row i by `seed + i` alone, whatever it shares a batch with.

    Where the weights are spread over ranks (ZeRO-3), every rank must call this equally often, with
    `any_rank` given: a rank whose rows have ended goes on until those of all have.

    Args:
        model: in evaluation mode, else dropout and recomputation would be on.
        batch: prompts laid end to end in one row (`data.prompt`), on the model's device.

    Raises:
        ValueError: `temperature` or `top_p` means nothing.
    """
    if problems := sampling_problems(temperature, top_p):
        raise ValueError("\n".join(problems))
    assert len(batch.input_ids) == 1, "prompts are laid end to end in one row"
    sizes = [info.tokens for info in batch.samples] or [batch.input_ids.shape[1]]
    decoder = _Decoder(model, batch, sizes, use_cache)
    draws = _draws(len(sizes), max_new_tokens, seed) if temperature else None
    answers: list[list[int]] = [[] for _ in sizes]
    rows, ended = list(range(len(sizes))), set()
    for step in range(max_new_tokens):
        draw = None if draws is None else draws[rows, step]
        chosen = choose(decoder.logits(), temperature, top_p, draw)
        for row, token in zip(rows, chosen.tolist()):
            if token in stop:
                ended.add(row)
            elif row not in ended:
                answers[row].append(token)
                if on_token:
                    on_token(row, token)
        going = [place for place, row in enumerate(rows) if row not in ended]
        if step + 1 == max_new_tokens or not any_rank(bool(going)):
            break
        decoder.append(chosen)
        if going and 2 * len(going) <= len(rows):
            decoder.keep(going)
            rows = [rows[place] for place in going]
    return answers


class _Decoder:
    """Rows of embeddings, padded on the left, and what the language model says to each of them."""

    def __init__(self, model: MegrezOmni, batch: Batch, sizes: list[int], use_cache: bool):
        self.llm = model.llm
        embedded = model.embed(batch)[: sum(sizes)]
        longest = max(sizes)
        self.inputs = embedded.new_zeros(len(sizes), longest, embedded.shape[1])
        mask = torch.zeros(len(sizes), longest, dtype=torch.int64)
        for row, (size, prompt) in enumerate(zip(sizes, embedded.split(sizes))):
            self.inputs[row, longest - size :] = prompt
            mask[row, longest - size :] = 1
        self.mask = mask.to(embedded.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=self.llm.config) if use_cache else None

    def logits(self) -> Tensor:
        """Returns the logits of every row's next token, [B, V]."""
        output = self.llm.model(
            inputs_embeds=self.inputs,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=self.cache is not None,
            **{CACHE: self.cache},
        )
        return self.llm.lm_head(output.last_hidden_state[:, -1])

    def append(self, tokens: Tensor) -> None:
        """Adds a token to every row, [B]."""
        new = self.llm.model.embed_tokens(tokens)[:, None]
        positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        if self.cache is not None:
            self.inputs, self.positions = new, positions
            return
        self.inputs = torch.cat([self.inputs, new.to(self.inputs)], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)

    def keep(self, places: list[int]) -> None:
        """Goes on with some of the rows only."""
        index = torch.tensor(places, device=self.mask.device)
        self.inputs, self.mask, self.positions = self.inputs[index], self.mask[index], self.positions[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)


def _draws(rows: int, tokens: int, seed: int) -> Tensor:
    """Returns numbers from [0, 1), a row of them from a generator of its own, [rows, tokens]."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(tokens, generator=generator) for generator in generators])


def choose(logits: Tensor, temperature: float, top_p: float, draw: Tensor | None) -> Tensor:
    """Returns the next token of every row.

    Shapes: logits [B, V]; draw [B] in [0, 1), or None for the likeliest token; result int64 [B].
    """
    if draw is None:
        return logits.argmax(-1)
    ordered, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)  # the likeliest token always stays
    upto = kept.cumsum(-1)
    wanted = draw.to(upto)[:, None] * upto[:, -1:]
    last = (kept > 0).sum(-1, keepdim=True) - 1  # where rounding would lead beyond what is kept
    place = torch.searchsorted(upto, wanted, right=True).minimum(last)
    return order.gather(1, place)[:, 0]
