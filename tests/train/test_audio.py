import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from tests.train.tiny_model import AUDIO, MEDIA, make_batch, make_sample
from train.model.audio import POSITIONS, AudioEncoder, sinusoids

WIDTH = 64
WINDOW = 20
"""Frames of the reference's window; its mel input is always twice that."""
FRAMES = [20, 7, 2, 13, 7]


@pytest.fixture(scope="module")
def encoders():
    """transformers' encoder and ours, with the same weights and transformers' names translated."""
    torch.manual_seed(0)
    reference = Qwen2AudioEncoder(
        Qwen2AudioEncoderConfig(
            num_mel_bins=MEDIA.audio.mel_bins,
            d_model=AUDIO.width,
            encoder_layers=AUDIO.layers,
            encoder_attention_heads=AUDIO.heads,
            encoder_ffn_dim=4 * AUDIO.width,
            max_source_positions=WINDOW,
            attn_implementation="eager",
        )
    ).eval()
    ours = AudioEncoder(AUDIO, MEDIA.audio, WIDTH).eval()
    with torch.no_grad():
        for parameter in [*reference.parameters(), *ours.parameters()]:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        ours.load_state_dict(translated(reference.state_dict()), strict=False)
        ours.positional_embedding[:WINDOW] = reference.embed_positions.weight
    return reference, ours


def translated(weights):
    names = {
        "layers.": "blocks.",
        "self_attn_layer_norm": "attn_ln",
        "final_layer_norm": "mlp_ln",
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
    }
    result = {}
    for name, weight in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.startswith("layer_norm"):
            name = name.replace("layer_norm", "ln_post")
        if not name.startswith("embed_positions"):
            result[name.replace("layer_norm.", "ln_post.") if name.startswith("layer_norm") else name] = (
                weight
            )
    return result


def reference_tokens(reference, mel):
    """One clip in the reference's window: mel zeroed past the clip, padded keys masked, then cut."""
    frames = mel.shape[1] // 2
    padded = torch.zeros(1, MEDIA.audio.mel_bins, 2 * WINDOW)
    padded[0, :, : 2 * frames] = mel
    mask = torch.zeros(1, 1, WINDOW, WINDOW).masked_fill(torch.arange(WINDOW) >= frames, float("-inf"))
    return reference(padded, attention_mask=mask).last_hidden_state[0, : (frames - 2) // 2 + 1]


def by_place(tokens, batch):
    return tokens[batch.index.argsort()]


@torch.no_grad()
@pytest.mark.parametrize("frames", [[20], [2], [7], FRAMES, FRAMES[::-1]], ids=str)
def test_clips_equal_the_reference_alone_and_in_any_batch(encoders, frames):
    reference, ours = encoders
    sample = make_sample(1, 4, clips=frames)
    batch = make_batch([[sample]]).audio
    expected = torch.cat([reference_tokens(reference, torch.from_numpy(mel)) for mel in sample.clips])
    tokens, _ = ours(batch)
    assert_close(by_place(tokens, batch), ours.proj(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_clip_does_not_hear_its_neighbours(encoders):
    _, ours = encoders
    sample = make_sample(1, 4, clips=FRAMES)
    batch = make_batch([[sample]]).audio
    before = by_place(ours(batch)[0], batch)
    sample.clips[0] = sample.clips[0] + 100.0
    batch = make_batch([[sample]]).audio
    after = by_place(ours(batch)[0], batch)
    changed = sample.clip_tokens[0]
    assert_close(after[changed:], before[changed:], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:changed], before[:changed], atol=1e-2)


@torch.no_grad()
def test_without_pool_every_frame_is_a_token(encoders):
    reference, ours = (copy.deepcopy(encoder) for encoder in encoders)
    reference.avg_pooler, ours.pool = torch.nn.Identity(), False
    sample = make_sample(1, 4, clips=[WINDOW])
    batch = make_batch([[sample]]).audio
    batch.pool = torch.arange(WINDOW)
    expected = reference(torch.from_numpy(sample.clips[0])[None]).last_hidden_state[0]
    assert_close(ours(batch)[0], ours.proj(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_marks_are_the_rows_of_the_bos_eos_embedding(encoders):
    _, ours = encoders
    _, marks = ours(make_batch([[make_sample(1, 4)]]).audio)
    assert torch.equal(marks, ours.audio_bos_eos_token.weight)


def test_positions_are_whispers_sinusoids():
    table = sinusoids(POSITIONS, AUDIO.width).numpy()
    half = AUDIO.width // 2
    for position, channel in [(0, 0), (1, 0), (1, 5), (1499, 3), (700, half - 1)]:
        angle = position * 10000.0 ** (-channel / (half - 1))
        assert np.allclose(table[position, channel], np.sin(angle), atol=1e-4)
        assert np.allclose(table[position, half + channel], np.cos(angle), atol=1e-4)
