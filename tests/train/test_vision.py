import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import SiglipVisionConfig, SiglipVisionModel

from data.geometry import ImageGeometry
from data.sample import VisionBatch
from tests.train.tiny_model import MEDIA, VISION, make_batch, make_sample
from train.model.vision import Vision, VisionEncoder

WIDTH = 64
GRIDS = [(3, 4), (1, 7), (4, 4), (3, 4), (8, 2)]


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def siglip(side):
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=VISION.width,
            intermediate_size=VISION.intermediate,
            num_hidden_layers=VISION.layers,
            num_attention_heads=VISION.heads,
            image_size=side * 14,
            patch_size=14,
            layer_norm_eps=1e-6,
            vision_use_head=False,
            attn_implementation="sdpa",
        )
    ).eval()


def to_patches(image):
    """[3, H, W] -> [patches, 3 * 14 * 14], channel-major as in EncodedSample.slices."""
    rows = image.unfold(1, 14, 14).unfold(2, 14, 14)
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def square(side, image):
    count = side * side
    return VisionBatch(
        pixels=to_patches(image),
        position_ids=torch.arange(count),
        coordinates=torch.cartesian_prod(torch.arange(side), torch.arange(side)),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        max_seqlen=count,
        index=torch.empty(0, dtype=torch.int64),
        grids=[(side, side)],
    )


def load(encoder, reference):
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in reference.state_dict()) else ""
    weights = {
        n.removeprefix(prefix): w for n, w in reference.state_dict().items() if "position_ids" not in n
    }
    encoder.load_state_dict(weights)


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 70])
def test_a_square_picture_of_the_tables_side_equals_transformers_siglip(side):
    reference = randomise(siglip(side))
    encoder = VisionEncoder(VISION, ImageGeometry(table_side=side)).eval()
    load(encoder, reference)
    image = torch.randint(0, 256, (3, side * 14, side * 14), dtype=torch.uint8)
    expected = reference(pixel_values=((image - 127.5) / 127.5)[None]).last_hidden_state[0]
    assert_close(encoder(square(side, image)), expected, atol=1e-5, rtol=1e-5)


def layer_outputs(encoder, batch):
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda *args: outputs.append(args[2]))
        for layer in encoder.encoder["layers"]
    ]
    encoder(batch)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
def test_every_layer_equals_transformers_siglip():
    reference = randomise(siglip(8))
    encoder = VisionEncoder(VISION, ImageGeometry(table_side=8)).eval()
    load(encoder, reference)
    image = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
    scaled = ((image - 127.5) / 127.5)[None]
    expected = reference(pixel_values=scaled, output_hidden_states=True).hidden_states
    batch = square(8, image)
    assert_close(encoder.embeddings(batch.pixels, batch.position_ids), expected[0][0], atol=1e-5, rtol=1e-5)
    outputs = layer_outputs(encoder, batch)
    assert len(outputs) == VISION.layers == len(expected) - 1
    for got, want in zip(outputs, expected[1:]):
        assert_close(got, want[0], atol=1e-5, rtol=1e-5)


def vision_model():
    return randomise(Vision(VISION, MEDIA.image, WIDTH))


def vision_batch(grids, seed=3):
    return make_batch([[make_sample(seed, 4, grids=grids)]]).vision


def by_item(tokens, batch):
    """Tokens in the order of their places, so of the slices in the sample."""
    return tokens[batch.index.argsort()].unflatten(0, (-1, MEDIA.image.queries))


@torch.no_grad()
def test_slices_do_not_depend_on_what_stands_beside_them():
    model = vision_model()
    sample = make_sample(3, 4, grids=GRIDS)
    together = make_batch([[sample]]).vision
    tokens = by_item(model(together), together)
    assert len(tokens) == len(GRIDS)
    for item, (grid, pixels) in enumerate(zip(GRIDS, sample.slices)):
        single = make_sample(4, 4, grids=[grid])
        single.slices = [pixels]
        assert_close(model(make_batch([[single]]).vision), tokens[item], atol=1e-6, rtol=1e-5)


def padded_reference(resampler, features, batch):
    """The resampler as published: nn.MultiheadAttention over padded rows, with a key padding mask."""
    attention = nn.MultiheadAttention(WIDTH, VISION.resampler_heads, batch_first=True)
    attention.load_state_dict(resampler.attn.state_dict())
    lengths = batch.cu_seqlens.diff().tolist()
    values = resampler.ln_kv(resampler.kv_proj(features))
    keys = torch.cat(
        [part + positions(rows, columns) for part, (rows, columns) in zip(values.split(lengths), batch.grids)]
    )
    keys, values = (nn.utils.rnn.pad_sequence(list(x.split(lengths)), True) for x in (keys, values))
    mask = torch.arange(keys.shape[1])[None] >= torch.tensor(lengths)[:, None]
    query = resampler.ln_q(resampler.query).expand(len(lengths), -1, -1)
    out, _ = attention(query, keys, values, key_padding_mask=mask)
    return (resampler.ln_post(out) @ resampler.proj).flatten(0, 1)


def positions(rows, columns):
    """Element by element, from the definition."""
    table = torch.zeros(rows, columns, WIDTH)
    quarter = WIDTH // 4
    for i in range(quarter):
        omega = 10000.0 ** (-i / quarter)
        for row in range(rows):
            table[row, :, 2 * quarter + i] = torch.sin(torch.tensor(row * omega))
            table[row, :, 3 * quarter + i] = torch.cos(torch.tensor(row * omega))
        for column in range(columns):
            table[:, column, i] = torch.sin(torch.tensor(column * omega))
            table[:, column, quarter + i] = torch.cos(torch.tensor(column * omega))
    return table.flatten(0, 1)


def test_the_resampler_equals_padded_multihead_attention_with_gradients():
    resampler = vision_model().resampler
    batch = vision_batch(GRIDS)
    features = torch.randn(len(batch.pixels), VISION.width, requires_grad=True)
    got, want = resampler(features, batch), padded_reference(resampler, features, batch)
    assert_close(got, want, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(got)
    inputs = [features, resampler.query, resampler.kv_proj.weight, resampler.proj]
    assert_close(
        torch.autograd.grad((got * upstream).sum(), inputs),
        torch.autograd.grad((want * upstream).sum(), inputs),
        atol=1e-4,
        rtol=1e-4,
    )


@torch.no_grad()
def test_half_precision_stays_close_to_fp32():
    model = vision_model()
    batch = vision_batch(GRIDS)
    exact = model(batch)
    rounded = model.bfloat16()(batch)
    assert rounded.dtype is torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
