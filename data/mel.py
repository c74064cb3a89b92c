"""Log-mel spectrogram of one clip, as Whisper's front end makes it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from data.geometry import AudioGeometry

WINDOW = 400
HOP = 160
PADDED_SECONDS = 30


def log_mel(waveform: np.ndarray, geometry: AudioGeometry, mel_frames: int) -> np.ndarray:
    """Returns the first `mel_frames` columns of the log-mel spectrogram of the zero-padded clip.

    Equal to transformers' `WhisperFeatureExtractor(feature_size=mel_bins)`, which pads to 30 s; here
    only frames that see the clip are computed. The others are all zeros and cannot hold the maximum.

    Shapes: waveform float32 [samples], at most 30 s; result float32 [mel_bins, mel_frames].
    """
    longest = geometry.sample_rate_hz * PADDED_SECONDS
    assert len(waveform) <= longest, len(waveform)
    # A frame reaches half a window to both sides, so one window of zeros stands for all of them.
    frames = max(-(-(len(waveform) + WINDOW) // HOP), mel_frames)
    padded = np.zeros(min(frames * HOP, longest), dtype=np.float32)
    padded[: len(waveform)] = waveform
    window, filters = _constants(geometry.mel_bins, geometry.sample_rate_hz)
    with torch.inference_mode():
        spectrum = torch.stft(torch.from_numpy(padded), WINDOW, HOP, window=window, return_complex=True)
        power = torch.view_as_real(spectrum)[:, :-1].square().sum(-1)
        mel = (filters @ power).clamp_(min=1e-10).log10_()
        mel = torch.maximum(mel, mel.max() - 8.0).add_(4.0).div_(4.0)
        return mel[:, :mel_frames].contiguous().numpy()


@lru_cache(maxsize=8)
def _constants(mel_bins: int, sample_rate_hz: int) -> tuple[torch.Tensor, torch.Tensor]:
    filters = mel_filters(mel_bins, sample_rate_hz).astype(np.float32)
    return torch.hann_window(WINDOW), torch.from_numpy(filters)


def mel_filters(mel_bins: int, sample_rate_hz: int) -> np.ndarray:
    """Returns triangular filters on Slaney's mel scale, each of unit area (librosa's default).

    Shapes: float64 [mel_bins, WINDOW // 2 + 1].
    """
    bins_hz = np.linspace(0, sample_rate_hz / 2, WINDOW // 2 + 1)
    edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate_hz / 2), mel_bins + 2))
    widths = np.diff(edges_hz)
    rising = (bins_hz - edges_hz[:-2, None]) / widths[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / widths[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (edges_hz[2:] - edges_hz[:-2]))[:, None]


# Slaney's scale: linear up to 1000 Hz (15 mel), then 27 mel for every factor of 6.4.
def _hz_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
