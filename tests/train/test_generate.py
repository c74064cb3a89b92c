"""Generation: the same tokens whatever the cache, the batch and the padding; those of the packed model."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data.blank import blank
from data.config import DataConfig, PackConfig
from data.encode import Encoder
from data.index import load_folder
from data.prompt import PromptReader
from data.sample import IGNORE, EncodedSample, SampleRef
from data.tokenizer import load_tokenizer
from tests.records import KINDS, prepare, write_records
from tests.train.tiny_model import LLM, MEDIA, make_batch, make_sample, mixed_samples, tiny_model
from train.generate import choose, generate

NEW = 8
LEAST_GAP = 0.05
"""Logits closer than this are equal in half precision."""


def prompt_of(sample: EncodedSample) -> EncodedSample:
    return dataclasses.replace(sample, labels=np.full_like(sample.labels, IGNORE))


def prompts_of(count=10):
    extra = [
        make_sample(10 + n, 3 + n, grids=[(2, 3 + n % 3)] * (n % 3), clips=[7 + n] * (n % 2))
        for n in range(5)
    ]
    return [prompt_of(sample) for sample in [*mixed_samples(), *extra]][:count]


def packed(prompts):
    return make_batch([prompts], sum(len(prompt.input_ids) for prompt in prompts))


def continued(prompt, ids):
    joined = np.concatenate([prompt.input_ids, np.array(ids, dtype=np.int32)])
    return dataclasses.replace(prompt, input_ids=joined, labels=np.full_like(joined, IGNORE))


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def test_tokens_do_not_depend_on_the_cache_or_on_what_shares_the_batch(model):
    prompts = prompts_of()
    together = generate(model, packed(prompts), stop=(), max_new_tokens=NEW)
    assert generate(model, packed(prompts), stop=(), max_new_tokens=NEW, use_cache=False) == together
    for prompt, answer in zip(prompts, together):
        assert generate(model, packed([prompt]), stop=(), max_new_tokens=NEW) == [answer]


def test_two_hundred_prompts_of_real_media_do_not_depend_on_cache_or_batch_either(model, tmp_path):
    shards = prepare(write_records(tmp_path / "records", [*KINDS] * 50), tmp_path / "shards")
    tokenizer = load_tokenizer(None)
    encoder = Encoder(DataConfig(pack=PackConfig(length=1024)), MEDIA, tokenizer)
    reader = PromptReader({"mixed": load_folder(str(shards))}, encoder)
    refs = [SampleRef("mixed", 0, row, 0) for row in range(200)]
    options = {"stop": {tokenizer.special("<|turn_end|>")}, "max_new_tokens": 4}
    modalities = set()
    for start in range(0, 200, 25):
        work = reader.read(refs[start : start + 25])
        modalities |= {prompt.modality for prompt in work.prompts}
        together = generate(model, work.batch, **options)
        assert generate(model, work.batch, use_cache=False, **options) == together
        alone = [generate(model, reader.read([prompt.ref]).batch, **options)[0] for prompt in work.prompts]
        assert alone == together and len(alone) == 25
    assert modalities == {"text", "image", "audio", "image+audio"}


@pytest.mark.gpu
def test_tokens_on_a_gpu_do_not_depend_on_the_cache_or_the_batch():
    device = torch.device("cuda")
    model, prompts = tiny_model().eval().to(device), prompts_of()
    together = generate(model, packed(prompts).to(device), stop=(), max_new_tokens=NEW)
    batch = packed(prompts).to(device)
    assert generate(model, batch, stop=(), max_new_tokens=NEW, use_cache=False) == together
    for prompt, answer in zip(prompts, together):
        assert generate(model, packed([prompt]).to(device), stop=(), max_new_tokens=NEW) == [answer]
    half = generate(model.bfloat16(), batch, stop=(), max_new_tokens=NEW)
    assert worst_gap(model, prompts, half) < LEAST_GAP


def worst_gap(model, prompts, answers):
    """Returns how far the logit of a generated token is below the best of the packed model, at most."""
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        batch = packed([continued(prompt, answer)]).to(model.llm.lm_head.weight.device)
        with torch.no_grad():
            logits = model.logits(batch)[0, -len(answer) - 1 : -1].float()
        chosen = logits.gather(-1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
        gaps += (logits.amax(-1) - chosen).tolist()
    return max(gaps, key=lambda gap: (math.isnan(gap), gap))


def test_every_token_is_the_likeliest_of_the_packed_model(model):
    prompts = prompts_of()
    answers = generate(model, packed(prompts), stop=(), max_new_tokens=NEW)
    for prompt, answer in zip(prompts, answers):
        with torch.no_grad():
            logits = model.logits(packed([continued(prompt, answer)]))[0]
        assert logits[-NEW - 1 : -1].argmax(-1).tolist() == answer


def test_answers_end_before_the_stop_token_and_the_others_go_on(model):
    prompts = prompts_of()
    free = generate(model, packed(prompts), stop=(), max_new_tokens=NEW)
    for stop in ({free[0][3], free[1][1]}, {answer[0] for answer in free}, set(range(LLM.vocab))):
        wanted = [next((a[:n] for n, token in enumerate(a) if token in stop), a) for a in free]
        for use_cache in (True, False):
            found = generate(model, packed(prompts), stop=stop, max_new_tokens=NEW, use_cache=use_cache)
            assert found == wanted


def test_a_rank_that_is_done_runs_as_often_as_one_that_is_not(model):
    calls = []

    def count(*_):
        calls.append(1)

    hook = model.llm.model.register_forward_hook(count)
    everything = set(range(LLM.vocab))
    found = generate(
        model, packed(prompts_of(3)), stop=everything, max_new_tokens=NEW, any_rank=lambda _: True
    )
    hook.remove()
    assert found == [[], [], []] and len(calls) == NEW


def test_batch_without_a_prompt_can_be_run():
    batch = packed([prompt_of(make_sample(1, 1))])
    batch.samples = []
    assert len(generate(tiny_model().eval(), batch, stop=(), max_new_tokens=2)) == 1


def test_blanked_media_change_the_answers_to_them_and_no_others(model):
    prompts = prompts_of()
    seen = generate(model, packed(prompts), stop=(), max_new_tokens=NEW)
    blind = generate(model, blank(packed(prompts)), stop=(), max_new_tokens=NEW)
    for prompt, one, other in zip(prompts, seen, blind):
        assert (one == other) is not bool(prompt.slices or prompt.clips)


def test_sampling_depends_on_the_seed_alone(model):
    prompts = prompts_of(6)
    options = {"stop": (), "max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.9}
    drawn = generate(model, packed(prompts), seed=3, **options)
    assert generate(model, packed(prompts), seed=3, **options) == drawn
    assert generate(model, packed(prompts), seed=4, **options) != drawn
    for row, prompt in enumerate(prompts):
        assert generate(model, packed([prompt]), seed=3 + row, **options) == [drawn[row]]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    generate(model, packed(prompts[:1]), seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_by_their_probability_among_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(10000, 4)
    draw = torch.arange(10000) / 10000
    counts = choose(logits, 1.0, 1.0, draw).bincount(minlength=4) / 10000
    assert torch.allclose(counts, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=1e-3)
    counts = choose(logits, 1.0, 0.6, draw).bincount(minlength=4) / 10000  # 0.4 is not enough, 0.7 is
    assert torch.allclose(counts, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]), atol=1e-3)
    assert (choose(logits, 1.0, 1e-9, draw) == 1).all()
    assert (choose(logits, 0.01, 1.0, draw) == 1).all()


def test_half_precision_generates_as_its_packed_model_does():
    model = tiny_model().eval().bfloat16()
    prompts = prompts_of(4)
    answers = generate(model, packed(prompts), stop=(), max_new_tokens=3)
    assert worst_gap(model, prompts, answers) < LEAST_GAP
    full = tiny_model().eval()
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(full, packed(prompts), stop=(), max_new_tokens=3)
        assert worst_gap(full, prompts, answers) < LEAST_GAP


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: must be above 0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(model, options, problem):
    with pytest.raises(ValueError, match=problem):
        generate(model, packed(prompts_of(1)), stop=(), max_new_tokens=1, **options)
