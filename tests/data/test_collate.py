import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.collate import BlankSegment, collate
from data.geometry import AudioGeometry, ImageGeometry, MediaConfig, position_ids
from data.sample import IGNORE, Dropped, EncodedSample

MEDIA = MediaConfig(image=ImageGeometry(patch_pixels=2, queries=3), audio=AudioGeometry(mel_bins=4))
LENGTH, PAD, UNK = 128, 9, 7
INFO = Dropped("source", "shard", "key", "image_corrupt", "no")


def make_sample(seed, slices=0, clips=0, text=5, key="k"):
    """A sample whose media come in every size; its text tokens are 100 and up."""
    rng = np.random.default_rng(seed)
    made = EncodedSample(key, "source", "text", np.empty(0), np.empty(0))
    ids: list[int] = [100]
    for _ in range(slices):
        grid = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        made.slices.append(rng.integers(0, 256, (grid[0] * grid[1], 12), dtype=np.uint8))
        made.grids.append(grid)
        made.slice_starts.append(len(ids) + 1)
        ids += [101, UNK, UNK, UNK, 102]
    for _ in range(clips):
        frames = int(rng.integers(2, 8))
        made.clips.append(rng.standard_normal((4, 2 * frames)).astype(np.float32))
        made.clip_tokens.append((frames - 2) // 2 + 1)
        made.clip_starts.append(len(ids) + 1)
        ids += [103, *[UNK] * (made.clip_tokens[-1] + 2), 104]
    answer = [int(token) for token in rng.integers(105, 200, text)]
    made.input_ids = np.array(ids + answer, dtype=np.int32)
    made.labels = np.array([IGNORE] * len(ids) + answer, dtype=np.int32)
    return made


def tokens(packs):
    return [[p.length if isinstance(p, BlankSegment) else len(p.input_ids) for p in pack] for pack in packs]


samples = st.builds(
    make_sample, st.integers(0, 99), slices=st.integers(0, 3), clips=st.integers(0, 3), text=st.integers(1, 9)
)
blanks = st.integers(1, 20).map(lambda length: BlankSegment(length, INFO))


def fitting(items):
    kept, room = [], LENGTH
    for item in items:
        need = item.length if isinstance(item, BlankSegment) else len(item.input_ids)
        if need <= room:
            kept.append(item)
            room -= need
    return kept


packs_of = st.lists(st.lists(st.one_of(samples, blanks), max_size=5).map(fitting), min_size=1, max_size=3)


def flat(batch):
    return batch.input_ids.reshape(-1)


@given(packs_of)
def test_every_placeholder_belongs_to_exactly_one_feature(packs):
    batch = collate(packs, LENGTH, MEDIA, PAD, "token")
    audio = batch.audio
    places = torch.cat([batch.vision.index, audio.index, audio.bos_index, audio.eos_index])
    assert torch.equal(places.sort().values, (flat(batch) == UNK).nonzero().flatten())


@given(packs_of)
def test_features_stand_where_their_sample_has_them(packs):
    batch = collate(packs, LENGTH, MEDIA, PAD, "token")
    by_place = dict(zip(batch.vision.index[::3].tolist(), batch.vision.pixels.split(patches_of(batch))))
    clips = {}
    for number, place in enumerate(batch.audio.bos_index.tolist()):
        first = 2 * int(batch.audio.cu_seqlens[number]) + 2 * number
        clips[place] = batch.audio.mel[:, first:]
    for row, pack in enumerate(packs):
        place = row * LENGTH
        for item in pack:
            if isinstance(item, BlankSegment):
                place += item.length
                continue
            for pixels, start in zip(item.slices, item.slice_starts):
                assert np.array_equal(by_place[place + start].numpy(), pixels)
            for mel, start in zip(item.clips, item.clip_starts):
                assert np.array_equal(clips[place + start][:, : mel.shape[1]].numpy(), mel)
            place += len(item.input_ids)


def patches_of(batch):
    return batch.vision.cu_seqlens.diff().tolist()


@given(packs_of)
def test_segments_cover_every_row_and_positions_restart_in_each(packs):
    batch = collate(packs, LENGTH, MEDIA, PAD, "token")
    bounds = batch.cu_seqlens
    assert bounds.dtype == torch.int32 and bounds[-1] == len(packs) * LENGTH
    segments = bounds.diff().tolist()
    assert batch.max_seqlen == max(segments)
    assert set(range(0, len(packs) * LENGTH, LENGTH)) <= set(bounds.tolist())
    expected = torch.cat([torch.arange(length) for length in segments])
    assert torch.equal(batch.position_ids.flatten(), expected)
    inner = [length for row in tokens(packs) for length in [*row, LENGTH - sum(row)] if length]
    assert segments == inner


@given(packs_of)
def test_targets_are_the_next_token_of_the_same_sample(packs):
    batch = collate(packs, LENGTH, MEDIA, PAD, "token")
    assert torch.equal(flat(batch)[batch.supervised + 1], batch.targets)
    segment = torch.bucketize(torch.arange(len(packs) * LENGTH), batch.cu_seqlens[1:], right=True)
    assert torch.equal(segment[batch.supervised], segment[batch.supervised + 1])
    wanted = [item for pack in packs for item in pack if isinstance(item, EncodedSample)]
    expected = np.concatenate([[], *(item.labels[1:][item.labels[1:] != IGNORE] for item in wanted)])
    assert batch.targets.tolist() == expected.tolist()
    for number, info in enumerate(batch.samples):
        assert int((batch.sample == number).sum()) == info.supervised
    assert sum(info.tokens for info in batch.samples) == sum(len(item.input_ids) for item in wanted)


def test_a_supervised_first_token_carries_no_loss_even_beside_another_sample():
    first, second = make_sample(0, text=3), make_sample(1, text=3)
    second.labels = second.input_ids.copy()
    batch = collate([[first, second]], LENGTH, MEDIA, PAD, "token")
    assert batch.samples[1].supervised == len(second.input_ids) - 1
    assert len(first.input_ids) - 1 not in batch.supervised.tolist()


@pytest.mark.parametrize(("loss", "total"), [("token", 4 + 9), ("sample", 2), ("sqrt", 2 + 3)])
def test_weights_of_a_sample_add_up_to_n_or_one_or_its_root(loss, total):
    batch = collate([[make_sample(0, text=4), make_sample(1, text=9)]], LENGTH, MEDIA, PAD, loss)
    assert batch.weights.dtype == torch.float32
    assert batch.weights.sum().item() == pytest.approx(total)


@given(packs_of)
def test_a_dropped_sample_leaves_every_other_token_in_its_place(packs):
    whole = collate(packs, LENGTH, MEDIA, PAD, "token")
    blanked = [
        [
            BlankSegment(len(p.input_ids), INFO) if isinstance(p, EncodedSample) and number == 0 else p
            for number, p in enumerate(pack)
        ]
        for pack in packs
    ]
    batch = collate(blanked, LENGTH, MEDIA, PAD, "token")
    assert batch.cu_seqlens.tolist() == whole.cu_seqlens.tolist()
    kept = flat(batch) != PAD
    assert torch.equal(flat(batch)[kept], flat(whole)[kept])
    firsts = sum(bool(pack) and isinstance(pack[0], EncodedSample) for pack in packs)
    assert len(batch.dropped) == len(whole.dropped) + firsts
    assert len(batch.samples) == len(whole.samples) - firsts


def test_without_media_both_encoders_get_one_blank_item_and_an_empty_index():
    batch = collate([[]], LENGTH, MEDIA, PAD, "token")
    assert batch.vision.pixels.shape == (4, 12) and not batch.vision.pixels.any()
    assert batch.vision.cu_seqlens.tolist() == [0, 4] and batch.vision.grids == [(2, 2)]
    assert batch.vision.position_ids.tolist() == position_ids(2, 2, 70).tolist()
    assert batch.audio.mel.shape == (4, 6) and not batch.audio.mel.any()
    assert batch.audio.gap.tolist() == [False] * 4 + [True] * 2
    assert batch.audio.cu_seqlens.tolist() == [0, 2] and batch.audio.keep.tolist() == [0, 1]
    assert batch.audio.pool.tolist() == [0]
    for index in (batch.vision.index, batch.audio.index, batch.audio.bos_index, batch.audio.eos_index):
        assert index.dtype == torch.int64 and len(index) == 0
    assert len(batch.supervised) == 0 and (batch.input_ids == PAD).all()
    assert batch.cu_seqlens.tolist() == [0, LENGTH]


@settings(max_examples=30)
@given(packs_of)
def test_vision_arrays_describe_each_slice_by_itself(packs):
    vision = collate(packs, LENGTH, MEDIA, PAD, "token").vision
    assert vision.grids == sorted(vision.grids)
    assert vision.max_seqlen == max(vision.cu_seqlens.diff().tolist())
    for (rows, columns), low, high in zip(vision.grids, vision.cu_seqlens[:-1], vision.cu_seqlens[1:]):
        assert high - low == rows * columns
        assert vision.position_ids[low:high].tolist() == position_ids(rows, columns, 70).tolist()
        assert vision.coordinates[low:high].tolist() == [[r, c] for r in range(rows) for c in range(columns)]


@settings(max_examples=30)
@given(packs_of)
def test_the_strided_convolution_keeps_each_clips_frames_and_none_of_a_gap(packs):
    audio = collate(packs, LENGTH, MEDIA, PAD, "token").audio
    # Output k of a convolution with stride 2, kernel 3 and padding 1 is centred on input 2k.
    assert audio.mel.shape[1] == len(audio.gap)
    assert torch.equal(audio.keep, (~audio.gap[::2]).nonzero().flatten())
    assert not audio.mel[:, audio.gap].any()
    lengths = audio.cu_seqlens.diff()
    assert torch.equal(audio.position_ids, torch.cat([torch.arange(n) for n in lengths]))
    assert lengths.tolist() == sorted(lengths.tolist())
    pooled = [low + 2 * torch.arange((n - 2) // 2 + 1) for low, n in zip(audio.cu_seqlens, lengths.tolist())]
    assert torch.equal(audio.pool, torch.cat(pooled).long())


def test_without_the_pool_every_frame_is_a_token():
    sample = make_sample(3, clips=1)
    frames = sample.clips[0].shape[1] // 2
    sample.clip_tokens = [frames]
    media = MediaConfig(image=MEDIA.image, audio=AudioGeometry(mel_bins=4, pool=False))
    audio = collate([[sample]], LENGTH, media, PAD, "token").audio
    assert audio.pool.tolist() == list(range(frames))
    assert collate([[]], LENGTH, media, PAD, "token").audio.pool.tolist() == [0, 1]


def test_a_pack_longer_than_its_row_is_our_own_mistake():
    with pytest.raises(AssertionError, match="longer than its row"):
        collate([[BlankSegment(LENGTH + 1, INFO)]], LENGTH, MEDIA, PAD, "token")


def test_every_tensor_of_a_batch_moves_to_the_device():
    moved = collate([[make_sample(1, slices=1, clips=1, text=5)]], 128, MEDIA, PAD, "token").to("meta")
    tensors = []
    for part in (moved, moved.vision, moved.audio):
        values = [getattr(part, entry.name) for entry in dataclasses.fields(part)]
        tensors += [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) == 21 and all(tensor.device.type == "meta" for tensor in tensors)
