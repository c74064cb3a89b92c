import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.collate import collate
from data.geometry import AudioGeometry, ImageGeometry, MediaConfig
from data.sample import IGNORE, Batch, EncodedSample
from train.adapters import add_adapters
from train.flops import (
    ADAPTERS,
    EVERYTHING,
    forward_flops,
    measure,
    peak_flops,
    sample_cost,
    terms,
    training_flops,
    trains_anything,
    work_of,
)
from train.lora import LoraConfig
from train.model.config import AudioConfig, LLMConfig, ModelConfig, VisionConfig
from train.model.initial import build_model, initialise
from train.model.omni import MegrezOmni, meta_model

FROZEN = dict.fromkeys(EVERYTHING, False)
STAGES = {
    "vision_align": {**FROZEN, "vision_proj": True},
    "vision_tune": {**FROZEN, "vision_proj": True, "vision_encoder": True},
    "audio_align": {**FROZEN, "audio_proj": True},
    "audio_tune": {**FROZEN, "audio_proj": True, "audio_encoder": True},
    "omni_sft": dict.fromkeys(EVERYTHING, True),
}
TINY = ModelConfig(
    llm=LLMConfig(width=64, intermediate=176, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=256),
    vision=VisionConfig(width=48, intermediate=96, layers=2, heads=3, resampler_heads=4),
    audio=AudioConfig(width=48, layers=2, heads=3),
)
MEDIA = MediaConfig(image=ImageGeometry(queries=8), audio=AudioGeometry(mel_bins=16))


def counted(run) -> int:
    """FLOPs that torch sees. Only the math kernel of attention is visible to it on a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_llama_of_transformers_has_the_counted_flops_in_every_stage():
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = TINY.llm
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=llm.width,
            intermediate_size=llm.intermediate,
            num_hidden_layers=llm.layers,
            num_attention_heads=llm.heads,
            num_key_value_heads=llm.kv_heads,
            head_dim=llm.head_dim,
            vocab_size=llm.vocab,
            tie_word_embeddings=False,
        )
    )
    work = measure([96], 96, [], [], MEDIA, causal=False)
    for tuned in (FROZEN, *STAGES.values()):
        model.requires_grad_(tuned["llm"])
        trains = any(tuned.values())
        embeds = torch.randn(1, 96, llm.width, requires_grad=trains)

        def run(embeds=embeds, trains=trains):
            loss = model(inputs_embeds=embeds, use_cache=False).logits.sum()
            if trains:
                loss.backward()

        assert counted(run) == sum(training_flops(work, TINY, MEDIA, tuned).values())


@pytest.mark.parametrize("tuned", [False, True])
def test_siglip_of_transformers_has_the_counted_flops(tuned):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    tower = TINY.vision
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.intermediate,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=140,
            patch_size=14,
            vision_use_head=False,
        )
    ).requires_grad_(tuned)

    def run():
        states = model(torch.randn(2, 3, 140, 140)).last_hidden_state
        if tuned:
            states.sum().backward()

    work = measure([], 0, [100, 100], [], MEDIA)
    parts = training_flops(work, TINY, MEDIA, {**FROZEN, "vision_encoder": tuned})
    assert counted(run) == parts["vision_linear"] + parts["vision_attention"]


@pytest.mark.parametrize("tuned", [False, True])
def test_whisper_of_transformers_has_the_counted_flops(tuned):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tower = TINY.audio
    config = WhisperConfig(
        d_model=tower.width,
        encoder_layers=tower.layers,
        encoder_attention_heads=tower.heads,
        encoder_ffn_dim=4 * tower.width,
        num_mel_bins=MEDIA.audio.mel_bins,
        max_source_positions=50,
        pad_token_id=0,
        vocab_size=8,
    )
    model = WhisperEncoder(config).requires_grad_(tuned)

    def run():
        states = model(torch.randn(1, MEDIA.audio.mel_bins, 100)).last_hidden_state
        if tuned:
            states.sum().backward()

    work = measure([], 0, [], [50], MEDIA)
    parts = training_flops(work, TINY, MEDIA, {**FROZEN, "audio_encoder": tuned})
    assert counted(run) == sum(parts[f"audio_{name}"] for name in ("conv", "linear", "attention"))


def full_row() -> Batch:
    """One row of two segments without padding: 2 slices of 100 and 80 patches, a clip of 150 frames."""
    draw = np.random.default_rng(0)

    def sample(modality: str, length: int, supervised: int, **media) -> EncodedSample:
        ids = draw.integers(0, TINY.llm.vocab, length).astype(np.int32)
        labels = np.where(np.arange(length) >= length - supervised, ids, IGNORE).astype(np.int32)
        return EncodedSample(modality, "source", modality, ids, labels, **media)

    slices = [draw.integers(0, 256, (count, 588)).astype(np.uint8) for count in (100, 80)]
    clip = draw.random((MEDIA.audio.mel_bins, 300)).astype(np.float32)
    image = sample("image", 64, 30, slices=slices, grids=[(10, 10), (10, 8)], slice_starts=[2, 14])
    audio = sample("audio", 128, 40, clips=[clip], clip_tokens=[75], clip_starts=[3])
    return collate([[image, audio]], 192, MEDIA, 0, "token")


def runs_of_modules(model: MegrezOmni, batch: Batch, tuned: dict[str, bool]) -> dict[str, tuple]:
    """How to run each module alone, fed as in its stage, and the parts of the count that are its own."""
    trains, width = any(tuned.values()), TINY.llm.width
    features = torch.randn(len(batch.vision.pixels), TINY.vision.width, requires_grad=tuned["vision_encoder"])
    embeddings = torch.randn(batch.input_ids.numel(), width, requires_grad=trains)
    rows = torch.randn(len(batch.supervised), width, requires_grad=trains)
    model.embed = lambda _: embeddings * 1.0
    return {
        "encoder": (lambda: model.vision.vpm(batch.vision), ("vision_linear", "vision_attention")),
        "resampler": (lambda: model.vision.resampler(features, batch.vision), ("resampler",)),
        "audio": (
            lambda: model.audio(batch.audio)[0],
            ("audio_conv", "audio_linear", "audio_attention", "audio_proj"),
        ),
        "llm": (lambda: model.hidden(batch), ("llm_linear", "llm_attention")),
        "head": (lambda: model.llm.lm_head(rows, batch.targets, batch.weights)[0], ("head",)),
    }


@pytest.mark.parametrize("stage", ["forward", *STAGES])
def test_every_module_has_the_counted_flops_in_every_stage(stage):
    tuned = STAGES.get(stage, FROZEN)
    batch, model = full_row(), build_model(TINY, MEDIA, seed=0)
    model.set_tuned(tuned)
    work = dataclasses.replace(
        work_of(batch, MEDIA), pairs=sum(s * s for s in batch.cu_seqlens.diff().tolist())
    )
    parts = training_flops(work, TINY, MEDIA, tuned)

    def step(forward):
        result = forward()
        if result.requires_grad:
            result.sum().backward()

    whole = counted(lambda: step(lambda: model(batch).loss_sum))
    assert whole == pytest.approx(sum(parts.values()), rel=0.02)
    for name, (forward, own) in runs_of_modules(model, batch, tuned).items():
        alone = counted(lambda forward=forward: step(forward))
        assert alone == pytest.approx(sum(parts[part] for part in own), rel=0.02), name


@pytest.mark.parametrize(
    ("modules", "others"),
    [
        (["llm"], ()),
        (["llm"], ("vision_proj",)),
        (["llm", "vision_encoder", "audio_encoder"], ("audio_proj",)),
    ],
)
def test_adapters_have_the_counted_flops_and_the_weights_below_them_no_gradient(modules, others):
    lora = LoraConfig(rank=8, modules=modules)
    tuned = {name: name in (*modules, *others) for name in EVERYTHING}
    batch, model = full_row(), meta_model(TINY, MEDIA)
    add_adapters(model, lora)
    model.set_tuned(tuned, lora.adapted)
    initialise(model.to_empty(device="cpu"), seed=0)
    work = dataclasses.replace(
        work_of(batch, MEDIA), pairs=sum(s * s for s in batch.cu_seqlens.diff().tolist())
    )
    parts = training_flops(work, TINY, MEDIA, tuned, lora)
    assert parts.keys() >= {ADAPTERS[name] for name in modules}
    seen = counted(lambda: model(batch).loss_sum.backward())
    assert seen == pytest.approx(sum(parts.values()), rel=0.005)
    assert sum(parts.values()) < sum(training_flops(work, TINY, MEDIA, tuned).values())


def test_blank_media_and_padding_are_no_work():
    text = EncodedSample("a", "source", "text", *(np.arange(40, dtype=np.int32),) * 2)
    work = work_of(collate([[text]], 64, MEDIA, 0, "token"), MEDIA)
    assert work == measure([40], 39, [], [], MEDIA)


CONNECTORS = ("vision_proj", "audio_proj")
ENCODERS = ("vision_encoder", "audio_encoder")


@pytest.mark.parametrize(
    "modules, segments, supervised, teraflops",
    [
        # While the language model is frozen, the 30% of tokens in text-only samples are left out.
        (CONNECTORS, [478] * 6, 967, 48.7),
        ((*CONNECTORS, *ENCODERS), [478] * 6, 967, 87.2),
        ((*CONNECTORS, "llm"), [512] * 8, 1382, 80.8),
        (EVERYTHING, [512] * 8, 1382, 119.4),
    ],
)
def test_mean_pack_of_the_released_model_costs_what_was_worked_out_by_hand(
    modules, segments, supervised, teraflops
):
    media, tuned = MediaConfig(), {**FROZEN, **dict.fromkeys(modules, True)}
    work = measure(segments, supervised, [1024] * 17 + [614], [500] * 3, media)
    total = sum(training_flops(work, ModelConfig(), media, tuned).values())
    assert total / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_causal_attention_counts_half_the_pairs_and_the_diagonal():
    assert measure([3, 5], 0, [], [], MEDIA).pairs == (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)


def test_packing_adds_no_flops_beyond_those_of_its_segments():
    one = forward_flops(measure([30, 66], 9, [100, 81], [50, 20], MEDIA), TINY, MEDIA)
    parts = [
        forward_flops(measure([30], 4, [100], [50], MEDIA), TINY, MEDIA),
        forward_flops(measure([66], 5, [81], [20], MEDIA), TINY, MEDIA),
    ]
    for name in set(one) - {"resampler"}:
        assert one[name] == parts[0][name] + parts[1][name]
    # Together, the queries of the resampler are projected once less.
    assert one["resampler"] == parts[0]["resampler"] + parts[1]["resampler"] - 2 * 8 * 64**2


def test_modules_behind_nothing_trained_cost_only_their_forward_pass():
    work = measure([96], 50, [100], [50], MEDIA)
    forward, training = (
        forward_flops(work, TINY, MEDIA),
        training_flops(work, TINY, MEDIA, STAGES["vision_align"]),
    )
    for name in (
        "vision_linear",
        "vision_attention",
        "audio_linear",
        "audio_conv",
        "audio_attention",
        "audio_proj",
    ):
        assert training[name] == forward[name]
    assert training["llm_linear"] == 2 * forward["llm_linear"]
    assert training["head"] == 2 * forward["head"]
    assert training["llm_attention"] == 3 * forward["llm_attention"]


def test_every_term_is_known_by_a_count_and_a_module():
    names = set(measure([1], 1, [1], [2], MEDIA).__slots__)
    for term in terms(TINY, MEDIA):
        assert term.per in names
        assert {term.owner, *term.upstream} <= {None, *EVERYTHING, *ADAPTERS.values()}


@pytest.mark.parametrize("stage", STAGES)
def test_sample_cost_of_usual_samples_is_their_exact_cost(stage):
    tuned = STAGES[stage]
    cost = sample_cost(TINY, MEDIA, tuned)
    cases = [([40], [], []), ([64], [1024], []), ([900], [], [1500, 100]), ([850], [1024, 1024], [1500])]
    exact = []
    for (length,), patches, frames in cases:
        supervised = length - 8 * len(patches) - sum(frames) // 2
        work = measure([length], supervised, patches, frames, MEDIA)
        work = dataclasses.replace(work, query_projections=0)  # belongs to no sample
        exact.append(sum(training_flops(work, TINY, MEDIA, tuned).values()) / 1e12)
    lengths, patches, frames = (np.array([sum(case[k]) for case in cases]) for k in range(3))
    assert cost(lengths, patches, frames) == pytest.approx(np.array(exact))


def test_samples_train_something_only_through_the_modules_they_meet():
    assert not trains_anything("text", STAGES["vision_tune"])
    assert not trains_anything("audio", STAGES["vision_align"])
    assert trains_anything("image+audio", STAGES["vision_align"])
    assert trains_anything("audio", STAGES["audio_align"])
    assert trains_anything("text", STAGES["omni_sft"])


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_is_known_by_the_name_that_cuda_gives(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


def test_peak_of_an_unknown_device_is_none():
    assert peak_flops("cpu") is None
