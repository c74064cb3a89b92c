from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.geometry import (
    AudioGeometry,
    ImageGeometry,
    LongAudio,
    cut_audio,
    position_ids,
    slice_image,
)
from data.sample import SampleError

IMAGE = ImageGeometry()
AUDIO = AudioGeometry()

# Where the released model's rows differ from i * 70 // n, for n = 1 .. 70: {n: {row: bucket}}.
BELOW_FLOOR = {
    25: {5: 13, 10: 27, 15: 41, 20: 55},
    49: {7: 9, 14: 19, 35: 49, 42: 59},
    50: {5: 6, 10: 13, 15: 20, 20: 27, 30: 41, 40: 55},
    55: {11: 13, 22: 27, 33: 41, 44: 55},
    58: {29: 34},
}


@pytest.mark.parametrize("count", range(1, 71))
def test_position_ids_of_one_to_seventy_rows_are_the_released_models(count):
    expected = [BELOW_FLOOR.get(count, {}).get(row, row * 70 // count) for row in range(count)]
    assert position_ids(1, count, 70).tolist() == expected
    assert position_ids(count, 1, 70).tolist() == [row * 70 for row in expected]


def test_position_id_is_row_bucket_times_side_plus_column_bucket():
    grid = position_ids(25, 49, 70).reshape(25, 49)
    rows, columns = position_ids(25, 1, 70), position_ids(1, 49, 70)
    assert np.array_equal(grid, rows[:, None] + columns[None, :])


@pytest.mark.parametrize(
    ("size", "grid", "overview", "tile", "tokens"),
    [
        ((720, 1480), (2, 3), (308, 644), (378, 518), 448),
        ((448, 448), None, (448, 448), None, 64),
        ((449, 449), (1, 2), None, None, 192),
        ((640, 480), (2, 1), None, None, 192),
        ((1344, 1344), (3, 3), (448, 448), (448, 448), 640),
        ((4000, 4000), (3, 3), (448, 448), (448, 448), 640),
        ((10, 10), None, (448, 448), None, 64),
    ],
)
def test_slicing_table(size, grid, overview, tile, tokens):
    slicing = slice_image(*size, IMAGE)
    assert slicing.grid == grid
    assert overview is None or slicing.overview == overview
    assert tile is None or slicing.tile == tile
    assert slicing.num_slices * IMAGE.queries == tokens


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12))
def test_every_slice_is_whole_patches_and_no_picture_has_more_tiles_than_allowed(width, height, most):
    geometry = ImageGeometry(max_slices=most, max_side_patches=10**6)
    slicing = slice_image(width, height, geometry)
    for size in (slicing.overview, slicing.tile):
        assert size is None or all(side > 0 and side % 14 == 0 for side in size)
    assert 1 <= slicing.num_slices <= 1 + most
    assert len(slicing.patch_grids) == slicing.num_slices
    assert slicing.num_patches == sum(rows * columns for rows, columns in slicing.patch_grids)


def test_a_picture_too_long_and_thin_is_refused():
    with pytest.raises(SampleError, match="1x1000") as caught:
        slice_image(1, 1000, IMAGE)
    assert caught.value.cause == "image_aspect"


@pytest.mark.parametrize("long", [90, 3_000, 200_000, 200_705, 10_000_000])
@pytest.mark.parametrize("turned", [False, True])
def test_both_ways_of_being_thin_are_refused(long, turned):
    with pytest.raises(SampleError, match="Crop it") as caught:
        slice_image(*((1, long) if turned else (long, 1)), ImageGeometry())
    assert caught.value.cause == "image_aspect"


@pytest.mark.parametrize(
    ("seconds", "frames", "tokens", "span"),
    [(0.5, 25, 12, 14), (1, 50, 25, 27), (2.5, 125, 62, 64), (10, 500, 250, 252), (30, 1500, 750, 752)],
)
def test_audio_table(seconds, frames, tokens, span):
    (clip,) = cut_audio(int(seconds * 16000), AUDIO)
    assert (clip.frames, clip.tokens, clip.span, clip.mel_frames) == (frames, tokens, span, 2 * frames)


def test_without_the_pool_fifty_tokens_a_second_remain():
    (clip,) = cut_audio(160000, AudioGeometry(pool=False))
    assert (clip.frames, clip.tokens) == (500, 500)


@given(st.integers(641, 3_000_000))
def test_split_windows_cover_a_recording_in_order_but_for_a_tail_too_short_for_a_token(num_samples):
    clips = cut_audio(num_samples, AUDIO)
    assert clips[0].start == 0
    assert all(before.stop == after.start for before, after in pairwise(clips))
    assert all(clip.stop - clip.start <= AUDIO.window_samples and clip.tokens > 0 for clip in clips)
    assert 0 <= num_samples - clips[-1].stop < 480


def test_truncate_keeps_the_first_window_and_error_refuses_a_second():
    assert len(cut_audio(500_000, AudioGeometry(long_audio=LongAudio.truncate))) == 1
    with pytest.raises(SampleError) as caught:
        cut_audio(500_000, AudioGeometry(long_audio=LongAudio.error))
    assert caught.value.cause == "audio_too_long"


@pytest.mark.parametrize("num_samples", [0, 1, 159, 319])
def test_a_clip_too_short_for_a_token_is_refused(num_samples):
    with pytest.raises(SampleError) as caught:
        cut_audio(num_samples, AUDIO)
    assert caught.value.cause == "audio_too_short"
