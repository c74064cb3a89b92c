import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from data.geometry import AudioGeometry, cut_audio
from data.mel import log_mel, mel_filters

LENGTHS = (480, 641, 1000, 15999, 16000, 16079, 16080, 16161, 39999, 100_001, 479_500, 479_999, 480_000)


def sound(num_samples, loudness=0.1):
    noise = np.random.default_rng(num_samples).standard_normal(num_samples)
    tone = np.sin(np.arange(num_samples) * 0.3)
    # Loudest at the end, where the padding begins.
    return ((noise + tone) * loudness * np.linspace(0, 1, num_samples)).astype(np.float32)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_log_mel_equals_whispers_feature_extractor_at_every_length(mel_bins):
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    geometry = AudioGeometry(mel_bins=mel_bins)
    for num_samples in LENGTHS:
        waveform = sound(num_samples)
        frames = cut_audio(num_samples, geometry)[0].mel_frames
        expected = extractor(waveform, sampling_rate=16000, return_tensors="np")["input_features"][0]
        mel = log_mel(waveform, geometry, frames)
        assert mel.shape == (mel_bins, frames) and mel.dtype == np.float32
        np.testing.assert_allclose(mel, expected[:, :frames], atol=1e-5, rtol=0)


def test_the_maximum_is_taken_over_frames_behind_those_returned():
    waveform = np.zeros(16000, dtype=np.float32)
    waveform[-1] = 1.0
    expected = WhisperFeatureExtractor(feature_size=80)(waveform, sampling_rate=16000, return_tensors="np")
    mel = log_mel(waveform, AudioGeometry(mel_bins=80), 90)
    np.testing.assert_allclose(mel, expected["input_features"][0][:, :90], atol=1e-5, rtol=0)


@pytest.mark.parametrize("loudness", [0.0, 1e-7, 1.0, 100.0])
def test_silence_and_clipping_give_the_extractors_values(loudness):
    waveform = sound(8000, loudness)
    expected = WhisperFeatureExtractor(feature_size=80)(waveform, sampling_rate=16000, return_tensors="np")
    mel = log_mel(waveform, AudioGeometry(mel_bins=80), 50)
    np.testing.assert_allclose(mel, expected["input_features"][0][:, :50], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_filters_are_slaneys(mel_bins):
    expected = mel_filter_bank(201, mel_bins, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(mel_bins, 16000), expected.T, atol=1e-12)
