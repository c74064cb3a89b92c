import dataclasses
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from data.geometry import MediaConfig
from tests.train.tiny_model import (
    LENGTH,
    MEDIA,
    gradients,
    make_batch,
    make_sample,
    mixed_samples,
    tiny_config,
    tiny_model,
)
from train.model.config import ModelConfig
from train.model.initial import STD, build_model
from train.model.omni import MODULES, MegrezOmni, module_of

ALL = dict.fromkeys(MODULES, True)


@pytest.fixture(scope="module")
def released():
    """The real sizes, without memory."""
    with torch.device("meta"):
        return MegrezOmni(ModelConfig(), MediaConfig())


def release_shapes():
    """Names and shapes of the released checkpoint, written out."""
    shapes = {
        "llm.model.embed_tokens.weight": (122880, 2560),
        "llm.lm_head.weight": (122880, 2560),
        "llm.model.norm.weight": (2560,),
        "vision.vpm.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision.vpm.embeddings.patch_embedding.bias": (1152,),
        "vision.vpm.embeddings.position_embedding.weight": (4900, 1152),
        "vision.resampler.query": (64, 2560),
        "vision.resampler.proj": (2560, 2560),
        "vision.resampler.kv_proj.weight": (2560, 1152),
        "vision.resampler.attn.in_proj_weight": (7680, 2560),
        "vision.resampler.attn.in_proj_bias": (7680,),
        "audio.audio.positional_embedding": (1500, 1280),
        "audio.audio.audio_bos_eos_token.weight": (2, 2560),
    }

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for i in range(32):
        llm = f"llm.model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer(f"{llm}.{norm}", 2560, bias=False)
        for name, rows in {"q_proj": 2560, "o_proj": 2560, "k_proj": 640, "v_proj": 640}.items():
            layer(f"{llm}.self_attn.{name}", rows, 2560, bias=False)
        for name in ("gate_proj", "up_proj"):
            layer(f"{llm}.mlp.{name}", 7168, 2560, bias=False)
        layer(f"{llm}.mlp.down_proj", 2560, 7168, bias=False)
        block = f"audio.audio.blocks.{i}"
        for name in ("query", "key", "value", "out"):
            layer(f"{block}.attn.{name}", 1280, 1280, bias=name != "key")
        layer(f"{block}.attn_ln", 1280)
        layer(f"{block}.mlp_ln", 1280)
        layer(f"{block}.mlp.0", 5120, 1280)
        layer(f"{block}.mlp.2", 1280, 5120)
    for i in range(27):
        vision = f"vision.vpm.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{vision}.self_attn.{name}", 1152, 1152)
        layer(f"{vision}.layer_norm1", 1152)
        layer(f"{vision}.layer_norm2", 1152)
        layer(f"{vision}.mlp.fc1", 4304, 1152)
        layer(f"{vision}.mlp.fc2", 1152, 4304)
    layer("vision.vpm.post_layernorm", 1152)
    layer("vision.resampler.attn.out_proj", 2560, 2560)
    for norm in ("ln_q", "ln_kv", "ln_post"):
        layer(f"vision.resampler.{norm}", 2560)
    layer("audio.audio.conv1", 1280, 128, 3)
    layer("audio.audio.conv2", 1280, 1280, 3)
    layer("audio.audio.ln_post", 1280)
    layer("audio.audio.proj", 2560, 1280)
    return shapes


def test_names_and_shapes_are_those_of_the_release(released):
    assert {name: tuple(w.shape) for name, w in released.state_dict().items()} == release_shapes()


def test_the_release_has_1231_tensors_and_4009159920_parameters(released):
    weights = released.state_dict()
    assert len(weights) == 1231
    assert sum(w.numel() for w in weights.values()) == 4_009_159_920
    sizes = Counter()
    for name, weight in weights.items():
        sizes[module_of(name)] += weight.numel()
    assert sizes == {
        "llm": 2_286_062_080 + 2 * 314_572_800,
        "vision_encoder": 417_792_240,
        "vision_proj": 35_906_560,
        "audio_encoder": 636_968_960,
        "audio_proj": 3_279_360 + 2 * 2560,
    }


def test_parameters_are_the_whole_state(released):
    assert not list(released.buffers())
    assert set(released.state_dict()) == {name for name, _ in released.named_parameters()}


def test_weights_depend_on_the_seed_alone():
    first, second, other = (build_model(tiny_config(), MEDIA, seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.llm.lm_head.weight, other.llm.lm_head.weight)


def test_matrices_keep_the_scale_of_what_enters_them():
    model = build_model(tiny_config(), MEDIA, 1)
    words = {"llm.model.embed_tokens.weight", "audio.audio.audio_bos_eos_token.weight"}
    connectors = {"vision.resampler.proj", "audio.audio.proj.weight"}
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim == 1 or name.endswith(
            ("query", "position_embedding.weight", "positional_embedding")
        ):
            continue
        expected = STD if name in words else parameter[0].numel() ** -0.5
        expected *= STD if name in connectors else 1
        assert parameter.std().item() == pytest.approx(expected, rel=0.2), name


def test_pictures_and_clips_enter_at_the_scale_of_words():
    model = build_model(tiny_config(), MEDIA, 0)
    batch = make_batch([mixed_samples()])
    words = model.llm.model.embed_tokens.weight.std()
    assert 0.5 < model.vision(batch.vision).std() / words < 2
    assert 0.5 < model.audio(batch.audio)[0].std() / words < 2


def test_module_of_refuses_a_foreign_name():
    with pytest.raises(ValueError, match="belongs to none"):
        module_of("module.llm.lm_head.weight")


def run(model, batch):
    model.zero_grad(set_to_none=True)
    loss, rows = model(batch)
    loss.backward()
    return loss.detach(), rows, gradients(model)


def test_a_pack_equals_its_samples_alone_in_loss_and_gradients():
    model = tiny_model().double()  # so that rounding, which grows with the weights, hides nothing
    samples = mixed_samples()
    packed = run(model, make_batch([samples[:3], samples[3:]]))
    alone = [run(model, make_batch([[sample]], len(sample.input_ids))) for sample in samples]
    assert_close(packed[0], sum(loss for loss, _, _ in alone), atol=0, rtol=1e-6)  # losses are fp32
    assert_close(packed[1], torch.cat([rows for _, rows, _ in alone]), atol=0, rtol=1e-6)
    for name, gradient in packed[2].items():
        total = sum(grads[name] for _, _, grads in alone)
        assert_close(gradient, total, atol=1e-6 * max(1.0, total.abs().max().item()), rtol=1e-6, msg=name)


@torch.no_grad()
def test_logits_of_a_pack_equal_those_of_its_samples_alone():
    model = tiny_model().double().eval()
    samples = mixed_samples()
    packed = model.logits(make_batch([samples]))[0]
    place = 0
    for sample in samples:
        length = len(sample.input_ids)
        alone = model.logits(make_batch([[sample]], length))[0]
        assert_close(packed[place : place + length], alone, atol=1e-12, rtol=1e-12)
        place += length


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_a_change_in_one_sample_leaves_the_logits_of_the_others(kind):
    model = tiny_model().eval()
    before = model.logits(make_batch([mixed_samples()]))[0]
    samples = mixed_samples()
    changed = {"text": 0, "image": 1, "audio": 2}[kind]
    if kind == "text":
        samples[changed].input_ids[:] = 7
    elif kind == "image":
        samples[changed].slices[1][:] = 255
    else:
        samples[changed].clips[1] = samples[changed].clips[1] + 1.0
    after = model.logits(make_batch([samples]))[0]
    ends = torch.tensor([0, *(len(s.input_ids) for s in samples)]).cumsum(0).tolist()
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    inside[ends[changed] : ends[changed + 1]] = True
    assert (after - before)[~inside].abs().max() < 1e-6
    assert (after - before)[inside].abs().max() > 1e-2


@torch.no_grad()
def test_media_fill_their_own_places():
    model = tiny_model().eval()
    sample = make_sample(1, 6, grids=[(3, 4), (2, 5)], clips=[7])
    batch = make_batch([[sample]], len(sample.input_ids))
    features = model.vision(batch.vision)[batch.vision.index.argsort()]
    tokens, marks = model.audio(batch.audio)
    media = torch.cat([features, marks[:1], tokens, marks[1:]])
    words = model.llm.model.embed_tokens.weight[torch.from_numpy(sample.input_ids).long()]
    expected = torch.cat([words[:1], media, words[1 + len(media) :]])
    assert_close(model.embed(batch), expected, atol=1e-6, rtol=1e-6)


def test_without_media_encoders_have_gradients_of_exactly_zero():
    model = tiny_model()
    grads = run(model, make_batch([[make_sample(1, 14)]]))[2]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(grads) == trained
    media = [name for name in trained if not name.startswith("llm.")]
    assert media and all(torch.equal(grads[n], torch.zeros_like(grads[n])) for n in media)
    assert grads["llm.lm_head.weight"].any()


def test_without_media_nothing_of_the_towers_reaches_the_loss():
    model, batch = tiny_model(), make_batch([[make_sample(1, 14)]])
    before = model(batch).loss_sum
    with torch.no_grad():
        model.vision.vpm.post_layernorm.weight.fill_(float("inf"))
        model.audio.audio.ln_post.weight.fill_(float("inf"))
    assert torch.equal(model(batch).loss_sum, before)


def test_a_batch_without_supervision_gives_zero_gradients_everywhere():
    sample = make_sample(1, 8, grids=[(2, 2)], clips=[7])
    sample.labels[:] = -100
    loss, rows, grads = run(model := tiny_model(), make_batch([[sample]]))
    assert loss == 0 and rows.shape == (0,)
    assert set(grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("module", MODULES)
def test_only_tuned_modules_receive_gradients_and_they_are_the_same(module):
    batch = make_batch([mixed_samples()])
    model = tiny_model()
    everything = run(model, batch)[2]
    model.set_tuned({name: name == module for name in MODULES})
    grads = run(model, batch)[2]
    assert set(grads) == {name for name in everything if module_of(name) == module}
    for name, gradient in grads.items():
        assert_close(gradient, everything[name], msg=name)


def test_the_audio_position_table_is_never_tuned():
    model = tiny_model()
    assert not model.audio.audio.positional_embedding.requires_grad
    model.set_tuned(ALL)
    assert not model.audio.audio.positional_embedding.requires_grad


def test_frozen_towers_keep_no_activations():
    model, batch = tiny_model(), make_batch([mixed_samples()])
    model.set_tuned({**ALL, "vision_encoder": False, "audio_encoder": False, "vision_proj": False})
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        assert not model.vision(batch.vision).requires_grad
        assert not saved
        assert model.audio(batch.audio)[0].requires_grad
    assert max(tensor.numel() for tensor in saved) <= len(batch.audio.pool) * 64


def test_flags_are_checked_by_name():
    model = tiny_model()
    with pytest.raises(ValueError, match="Did you mean 'vision_proj'"):
        model.set_tuned({**ALL, "vison_proj": True})
    with pytest.raises(ValueError, match="tuned='audio_proj'"):
        model.set_tuned({name: True for name in MODULES if name != "audio_proj"})


class HostReads(TorchDispatchMode):
    """Notes every operation that would make the host wait for a device to learn a value or a size."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if masked or str(func).split(".")[1] in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("samples", [mixed_samples(), [make_sample(1, 9)]], ids=["media", "text"])
def test_forward_and_backward_read_nothing_back_from_the_device(samples):
    model, batch = tiny_model(), make_batch([samples])
    with HostReads() as reads:
        model(batch).loss_sum.backward()
    assert not reads.found


def test_recompute_changes_neither_loss_nor_gradients():
    batch = make_batch([mixed_samples()])
    plain, recomputing = (tiny_model(recompute=flag).train() for flag in (False, True))
    calls = Counter()
    for layer in (recomputing.llm.model.layers[0].mlp, recomputing.vision.vpm.encoder["layers"][0].mlp):
        layer.register_forward_pre_hook(lambda module, *_: calls.update([module]))
    recomputing.audio.audio.blocks[0].mlp.register_forward_pre_hook(lambda module, *_: calls.update([module]))
    for got, want in zip(run(recomputing, batch), run(plain, batch)):
        assert_close(got, want, atol=0, rtol=0)
    assert list(calls.values()) == [2, 2, 2]
    recomputing.eval()
    run(recomputing, batch)
    assert list(calls.values()) == [3, 3, 3]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half weights"])
def test_half_precision_stays_close_to_fp32(autocast):
    batch = make_batch([mixed_samples()])
    exact = run(tiny_model(), batch)[1]
    model = tiny_model() if autocast else tiny_model().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows = run(model, batch)[1]
    assert rows.dtype is torch.float32
    assert (rows - exact).abs().mean() < 0.1 * exact.mean()


def test_generation_from_embeddings_with_a_cache_equals_the_packed_logits():
    model = tiny_model().eval()
    sample = make_sample(2, 6, grids=[(3, 4)], clips=[7])
    batch = make_batch([[sample]], len(sample.input_ids))
    new = 5
    with torch.no_grad():
        embeddings = model.embed(batch)[None]
        words = model.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
        )[0]
    longer = dataclasses.replace(sample)
    longer.input_ids = torch.cat([torch.from_numpy(sample.input_ids), words.int()]).numpy()
    longer.labels = longer.input_ids
    logits = model.logits(make_batch([[longer]], len(longer.input_ids)))[0]
    assert torch.equal(logits[-new - 1 : -1].argmax(-1), words)
